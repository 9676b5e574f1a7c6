import logging

import matplotlib as mpl
import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from conftest import make_part
from interruptions import interrupted_at, interruptible_lce, on_each_step
from ir_measures import RR

from pyterrier_msft import Contrastive, Distillation, MonoCE, Stage, fit_grid, losses, plots

mpl.use("Agg")
import matplotlib.pyplot as plt

UPDATES = 3
CL = Contrastive(
    n_negatives=3, learning_rate=1e-2, max_steps=UPDATES, batch_size=8, dropout=0.0, eval_every=UPDATES,
    loss=interruptible_lce,
)  # fmt: skip
RATES = [1e-5, 3e-2]
GRID = {"n_negatives": [2], "learning_rate": RATES}
pytestmark = [
    pytest.mark.usefixtures("fast_garbage_collection"),
    pytest.mark.filterwarnings(
        "ignore:Contrastive didn't improve",
        "ignore:Distillation didn't improve",
        "ignore:re-ranking is worse than the fir",
    ),
]


@pytest.fixture(scope="module")
def dev():
    part = make_part("va", n_queries=12, seed=2)
    return part.results, part.qrels


@pytest.fixture(scope="module")
def stage(train_part) -> Stage:
    return Stage(CL, train_part.results, train_part.qrels)


@pytest.fixture(scope="module")
def start(backbone) -> MonoCE:
    return MonoCE(backbone, max_length=24, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("grid")


@pytest.fixture(scope="module")
def found(start, stage, dev, saved):
    before = start.fingerprint
    result = fit_grid(start, stage, GRID, validation=dev, metric="RR@10", save_dir=saved)
    assert start.fingerprint == before
    return result


@pytest.fixture
def batches():
    seen: list[int] = []
    with on_each_step(lambda stage, step: seen.append(step)):
        yield seen


def measured(transformer, validation) -> float:
    results, qrels = validation
    return pt.Evaluate(transformer(results), qrels, [RR @ 10])["RR@10"]


def test_the_table_and_the_best_are_those_of_fits_by_hand(found, start, stage, dev):
    by_hand = []
    for rate in RATES:
        fitter = Contrastive(
            n_negatives=2, learning_rate=rate, max_steps=UPDATES, batch_size=8, dropout=0.0, eval_every=UPDATES,
            loss=interruptible_lce, metric=RR @ 10,
        )  # fmt: skip
        by_hand.append(start.clone().fit(stage.results, stage.qrels, *dev, fitter=fitter))
    values = [measured(trained, dev) for trained in by_hand]
    assert list(found.table) == ["n_negatives", "learning_rate", "RR@10", "updates", "seconds"]
    assert found.table["n_negatives"].tolist() == [2, 2]
    assert found.table["learning_rate"].tolist() == RATES
    np.testing.assert_allclose(found.table["RR@10"], values)
    assert values[0] != values[1]
    k = int(np.argmax(values))
    assert found.best.fingerprint == by_hand[k].fingerprint
    assert found.best_setting == {"n_negatives": 2, "learning_rate": RATES[k]}
    assert found.best.fitter.learning_rate == RATES[k]
    assert (found.table["updates"] == UPDATES).all()
    assert found.first_stage == pytest.approx(measured(pt.Transformer.identity(), dev))
    assert found.start is None  # a new head
    assert f"best of 2: n_negatives=2, learning_rate={RATES[k]}; validation RR@10" in repr(found)


def test_saved_combinations_are_reused_and_a_larger_grid_adds_to_them(found, start, stage, dev, saved, batches):
    larger = {"n_negatives": [2], "learning_rate": [1e-2, *RATES[::-1]]}
    result = fit_grid(start, stage, larger, validation=dev, metric="RR@10", save_dir=saved)
    assert len(batches) == UPDATES
    values = found.table.set_index("learning_rate")["RR@10"]
    np.testing.assert_allclose(result.table.set_index("learning_rate")["RR@10"][values.index], values)


def test_an_interrupted_grid_is_resumed(found, start, stage, dev, tmp_path, caplog):
    with interrupted_at(UPDATES + 1), pytest.raises(KeyboardInterrupt):
        fit_grid(start, stage, GRID, validation=dev, metric="RR@10", save_dir=tmp_path)
    with caplog.at_level(logging.INFO):
        resumed = fit_grid(start, stage, GRID, validation=dev, metric="RR@10", save_dir=tmp_path)
    assert "grid: reusing" in caplog.text
    assert resumed.best.fingerprint == found.best.fingerprint
    columns = ["learning_rate", "RR@10", "updates"]
    pd.testing.assert_frame_equal(resumed.table[columns], found.table[columns])


def test_seeds_give_the_mean_and_the_range(start, stage, dev):
    result = fit_grid(start, stage, {"learning_rate": [3e-2]}, validation=dev, metric=RR @ 10, seeds=[1, 2])
    values = {}
    for seed in (1, 2):
        fitter = CL.replace(learning_rate=3e-2, seed=seed, metric="RR@10")
        trained = start.reseeded(seed).fit(stage.results, stage.qrels, *dev, fitter=fitter)
        values[trained.fingerprint] = measured(trained, dev)
    lowest, highest = sorted(values.values())
    assert lowest < highest
    assert list(result.table) == ["learning_rate", "RR@10", "lowest", "highest", "updates", "seconds"]
    expected = [3e-2, (lowest + highest) / 2, lowest, highest, UPDATES]
    np.testing.assert_allclose(result.table.iloc[0, :-1].astype(float), expected)
    assert result.best.fingerprint == max(values, key=values.__getitem__)


def test_a_second_grid_starts_from_the_best_of_the_first(found, dev, train_part):
    fitter = Distillation(max_steps=2, batch_size=8, learning_rate=1e-3, dropout=0.0)
    second = fit_grid(
        found.best, Stage(fitter, train_part.results), {"loss": [losses.list_mle]}, validation=dev, metric="RR@10"
    )
    assert second.start == pytest.approx(measured(found.best, dev))
    assert second.table["loss"].tolist() == ["losses.list_mle"]
    assert second.best_setting == {"loss": losses.list_mle}
    assert [record.objective for record in second.best.stages] == ["Contrastive", "Distillation"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": {"learningrate": [1e-3]}}, "got 'learningrate'. Did you mean 'learning_rate'?"),
        ({"grid": {"lr": [1e-3]}}, "got 'lr'. They are add_missing_positives, batch_size, "),
        ({"grid": {"learning_rate": []}}, "grid must map 'learning_rate' to a non-empty list of values; got"),
        ({"grid": {"learning_rate": 1e-3}}, r"to a non-empty list of values; got 0\.001"),
        ({"grid": {"loss": "ranknet"}}, "to a non-empty list of values; got 'ranknet'"),
        ({"grid": {"n_negatives": [3, -1]}}, "n_negatives must be a non-negative integer; got -1"),
        ({"grid": {}}, "grid must map settings to lists of values; got {}"),
        ({"grid": {"seed": [1, 2]}}, "grid must not vary 'seed'. Use seeds= instead"),
        ({"grid": {"metric": ["RR"]}}, "grid must not vary 'metric'. Use metric= instead"),
        ({"seeds": []}, "seeds must be a non-empty list or None"),
        ({"validation": None}, "validation is required by fit_grid; got None"),
    ],
)
def test_what_is_refused_before_training(options, message, stage, dev):
    options = {"grid": GRID, "validation": dev, **options}
    with pytest.raises(ValueError, match=message):
        fit_grid(MonoCE("nobody/nothing"), stage, options.pop("grid"), **options)


def test_stages_that_are_refused(train_part, dev):
    both = CL + 0.5 * Distillation()
    for fitter, message in [
        (CL >> CL, "a single fitter"),
        (CL.replace(metric=None), "metric is required"),
        (both.replace(metric=None), "metric is required"),
        (both, "settings must be those of Distillation; got 'n_negatives'"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit_grid(MonoCE("nobody/nothing"), Stage(fitter, train_part.results), GRID, validation=dev)


# ---- plot


class Found:
    """What the plot reads of a GridResult."""

    metric = "nDCG@10"
    first_stage = 0.45
    best_setting = {"learning_rate": 1e-4, "n_negatives": 7}  # noqa: RUF012
    table = pd.DataFrame(
        [(1e-5, 3, 0.4, 0.3, 0.5), (1e-5, 7, 0.5, 0.4, 0.6), (1e-4, 3, 0.6, 0.5, 0.7), (1e-4, 7, 0.7, 0.6, 0.8),
         (1e-3, 3, 0.1, 0.0, 0.2), (1e-3, 7, 0.2, 0.1, 0.3)],
        columns=["learning_rate", "n_negatives", "nDCG@10", "lowest", "highest"],
    )  # fmt: skip


def test_plot_of_a_grid():
    ax = plots.grid(Found())
    three, seven, ring, first_stage = ax.lines
    assert (three.get_label(), seven.get_label()) == ("n_negatives=3", "n_negatives=7")
    assert three.get_xydata().tolist() == [[0, 0.4], [1, 0.6], [2, 0.1]]
    assert seven.get_xydata().tolist() == [[0, 0.5], [1, 0.7], [2, 0.2]]
    assert ring.get_xydata().tolist() == [[1, 0.7]]
    assert set(first_stage.get_ydata()) == {0.45}
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1e-05", "0.0001", "0.001"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("learning_rate", "validation nDCG@10")
    ranges = [segment.tolist() for bars in ax.collections for segment in bars.get_segments()]
    assert [[1, 0.6], [1, 0.8]] in ranges
    plt.close("all")


def test_plot_of_one_setting():
    class One(Found):
        first_stage = None
        best_setting = {"learning_rate": 1e-4}  # noqa: RUF012
        table = Found.table.query("n_negatives == 7").drop(columns=["lowest", "highest"])

    ax = plots.grid(One())
    line, ring = ax.lines
    assert line.get_ydata().tolist() == [0.5, 0.7, 0.2]
    assert ring.get_xydata().tolist() == [[1, 0.7]]
    assert ax.get_legend() is None
    plt.close("all")


# ---- PyTerrier's grid search


@pytest.fixture
def ce(found) -> MonoCE:
    return found.best.clone()


@pytest.fixture
def pipeline_parts(ce, dev):
    results, qrels = dev
    return pt.Transformer.from_df(results) >> ce, results[["qid", "query"]].drop_duplicates(), qrels


FITTERS = [CL.replace(learning_rate=1e-3), CL.replace(learning_rate=3e-2)]


@pytest.mark.parametrize("search", [pt.GridScan, pt.GridSearch])
def test_pyterriers_grid_over_fitters_is_refused(ce, pipeline_parts, search):
    pipeline, topics, qrels = pipeline_parts
    with pytest.raises(ValueError, match=r"fit is required after set_parameter\('fitter', .*fit_grid"):
        search(pipeline, {ce: {"fitter": FITTERS}}, topics, qrels, [RR @ 10] if search is pt.GridScan else RR @ 10)


def test_pyterriers_grid_over_other_settings_works(ce, pipeline_parts):
    pipeline, topics, qrels = pipeline_parts
    table = pt.GridScan(pipeline, {ce: {"interpolate": [0.0, 100.0]}}, topics, qrels, [RR @ 10])
    first_stage = pt.Evaluate(pipeline[0](topics), qrels, [RR @ 10])["RR@10"]
    assert table["RR@10"].iloc[1] == pytest.approx(first_stage) != table["RR@10"].iloc[0]


def test_set_parameter_and_assignment_go_on_working(ce, pipeline_parts, stage):
    pipeline, topics, _ = pipeline_parts
    before, original = pipeline(topics)["score"].tolist(), ce.fitter
    ce.fitter = FITTERS[0]  # an assignment
    assert pipeline(topics)["score"].tolist() == before
    ce.set_parameter("fitter", FITTERS[1])
    with pytest.raises(ValueError, match="fit is required"):
        pipeline(topics)
    with pytest.raises(ValueError, match="fit is required"):
        ce.clone()(stage.results)
    ce.set_parameter("fitter", FITTERS[0])  # restored
    assert pipeline(topics)["score"].tolist() == before
    ce.set_parameter("fitter", FITTERS[1])
    ce.fit(stage.results, stage.qrels)
    assert pipeline(topics)["score"].tolist() != before
    ce.set_parameter("fitter", FITTERS[0])
    ce.fitter = original
    assert len(pipeline(topics))
    ce.set_parameter("verbose", False)
    with pytest.raises(ValueError, match="Invalid parameter name learning_rate"):
        ce.set_parameter("learning_rate", 1e-3)


# ---- fitters with other settings


def test_replace(ce):
    fitter = Contrastive(n_negatives=3)
    other = fitter.replace(learning_rate=1e-5, n_negatives=5)
    assert (other.learning_rate, other.n_negatives, other.depth) == (1e-5, 5, 100)
    assert fitter == Contrastive(n_negatives=3)
    with pytest.raises(ValueError, match=r"settings must be those of Contrastive; got 'n_negative'\. Did you mean"):
        fitter.replace(n_negative=5)
    with pytest.raises(ValueError, match="learning_rate must be a positive number"):
        fitter.replace(learning_rate=0)
    both = (Contrastive(depth=50) >> Distillation()).replace(seed=3)
    assert both == Contrastive(depth=50, seed=3) >> Distillation(seed=3)
    with pytest.raises(ValueError, match="settings must be those of Distillation; got 'n_negatives'"):
        both.replace(n_negatives=3)


def test_clone_with_a_fitter(ce):
    ce.fitter = CL
    other = ce.clone(fitter=FITTERS[0])
    assert (ce.fitter, other.fitter, ce.clone().fitter) == (CL, FITTERS[0], CL)
    assert other.fingerprint == ce.fingerprint
    with pytest.raises(ValueError, match="fitter must be an object; got the class Contrastive"):
        ce.clone(fitter=Contrastive)


@pytest.mark.filterwarnings("ignore:.*gives random")
def test_values_that_look_the_same(start, train_part, dev):
    part = train_part.results[train_part.results["qid"].isin([f"tr{i}" for i in range(16)])]
    fitter = Distillation(depth=8, max_steps=1, learning_rate=1e-2, batch_size=8)
    two = [part, part.assign(score=part["quality"] - part["rank"] / 100)]
    found = fit_grid(start, Stage(fitter, part), {"teacher": two}, validation=dev, metric=RR)
    assert found.table["teacher"].tolist() == ["<128 rows> (1)", "<128 rows> (2)"]
    assert f"teacher={found.table['teacher'][int(found.table['RR'].argmax())]};" in repr(found)
    assert [tick.get_text() for tick in plots.grid(found).get_xticklabels()] == ["<128 rows> (1)", "<128 rows> (2)"]


def test_a_start_that_cannot_be_scored_is_refused_before_training(start, stage, dev, monkeypatch):
    ce = start.clone().fit(stage.results, stage.qrels, fitter=CL)
    ce.set_parameter("fitter", CL)  # transform needs a fit
    monkeypatch.setattr(MonoCE, "fit", lambda *args, **options: pytest.fail("trained"))
    with pytest.raises(ValueError, match="fit is required after set_parameter"):
        fit_grid(ce, stage, {"n_negatives": [3]}, validation=dev)
