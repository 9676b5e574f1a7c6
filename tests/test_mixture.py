"""Several sources of training data in one stage."""

import dataclasses
import warnings
from collections import Counter

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from conftest import Part, make_part
from interruptions import interrupted_at, interruptible_lce

from pyterrier_msft import Contrastive, Distillation, MonoCE, Stage, fit_sequences, losses
from pyterrier_msft.data.groups import Groups
from pyterrier_msft.data.mixture import MixedGroups
from pyterrier_msft.data.texts import TextSource
from pyterrier_msft.fitting import prepare_stage
from pyterrier_msft.training.batches import BatchSchedule, GroupDataset
from pyterrier_msft.training.plan import plan_training

CL = Contrastive(n_negatives=3, learning_rate=1e-2, max_steps=2, batch_size=8, loss=interruptible_lce)
BRIEF = dataclasses.replace(CL, max_steps=1)
ALL = Contrastive(n_negatives=7, learning_rate=1e-2, max_steps=1, batch_size=1000, warmup=0, dropout=0.0, epochs=1)


@pytest.fixture(scope="module")
def first() -> Part:
    return make_part("q", n_queries=8, seed=1)


@pytest.fixture(scope="module")
def second() -> Part:
    """Other candidates of the same queries, as of another first stage."""
    other = make_part("q", n_queries=8, n_docs=6, seed=1)
    docnos = {docno: f"{docno}'" for docno in other.results["docno"]}
    texts = other.results.assign(docno=other.results["docno"].map(docnos), text="w5 " + other.results["text"])
    return Part(texts, other.qrels.assign(docno=other.qrels["docno"].map(docnos)))


@pytest.fixture(scope="module")
def other() -> Part:
    return make_part("r", n_queries=5, seed=2)


def groups_of(*sources, fitter=CL) -> MixedGroups | Groups:
    return prepare_stage(fitter, list(sources), None, TextSource("text"), verbose=False).parts[0].groups


def test_sources_with_the_same_queries_stay_separate(first, second):
    groups = groups_of((first.results, first.qrels), (second.results, second.qrels), fitter=Contrastive(n_random=2))
    assert groups.qids == 2 * sorted(first.qrels["qid"])
    own = [set(part.results["text"]) for part in (first, second)]
    relevant = [set(part.results["text"][part.results["docno"].isin(part.qrels["docno"])]) for part in (first, second)]
    drawn = groups.draw_all([(i, epoch) for epoch in range(3) for i in (15, 0, 7, 8, 1, 9)], seed=1)
    assert [group.qid for group in drawn[:6]] == ["q7", "q0", "q7", "q0", "q1", "q1"]
    for group, source in zip(drawn, 3 * [1, 0, 0, 1, 0, 1], strict=True):
        assert set(group.texts) <= own[source]
        assert len(group.texts) == (10 if source == 0 else 8)
        assert {group.texts[i] for i in np.flatnonzero(group.labels)} <= relevant[source]
    # Positions are sampled independently, though the queries are the same.
    few = groups_of((first.results, first.qrels), (first.results, first.qrels))
    pairs = [few.draw_all([(i, 0), (i + 8, 0)], seed=1) for i in range(8)]
    assert any(a.texts != b.texts for a, b in pairs)


@pytest.mark.filterwarnings("ignore:source 2 counts for more than its weight")
@pytest.mark.parametrize("weight", [0.5, 1, 1.6, 2, 0.01])
def test_a_weight_is_how_often_an_epoch_draws_a_query(first, other, weight):
    groups = groups_of((first.results, first.qrels), (other.results, other.qrels, weight))
    per_epoch = max(1, round(5 * weight))
    epochs = [groups.epoch(number, seed=3) for number in range(10)]
    for rows in epochs:
        assert groups.groups_per_epoch() == len(rows) == 8 + per_epoch
        assert sorted(rows[rows[:, 0] < 8, 0]) == list(range(8))
        counts = Counter(rows[rows[:, 0] >= 8, 0].tolist())
        assert max(counts.values()) - min(counts.get(i, 0) for i in range(8, 13)) <= 1
    pairs = [tuple(row) for rows in epochs for row in rows]
    assert len(set(pairs)) == len(pairs)  # each draw samples anew
    totals = Counter(index for index, _ in pairs if index >= 8)
    assert set(totals.values()) == {2 * per_epoch}
    assert len(totals) == 5
    assert np.array_equal(epochs[4], groups.epoch(4, seed=3))
    assert groups.drawn_documents() == 8 * 4 + 4 * per_epoch


def test_the_weight_of_a_single_source(ce, first):
    source = (first.results, first.qrels)
    counts = [groups_of((*source, weight)).groups_per_epoch() for weight in (0.5, 1, 2)]
    assert counts == [4, 8, 16]
    ce.fit([(*source, 2)], fitter=dataclasses.replace(BRIEF, max_steps=None, epochs=1))
    assert ce.stages[-1].updates == 2
    assert repr(ce.data_report).splitlines()[1] == "  source 1, weight 2:"


def test_a_weight_below_a_query_per_epoch_warns(first, other):
    one = (first.results, first.qrels)
    with pytest.warns(UserWarning, match=r"source 2 .*draws one of its 5 queries, but 0\.01 means 0\.05\. Use more"):
        groups_of(one, (other.results, other.qrels, 0.01))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups_of(one, (other.results, other.qrels, 0.1))


def test_random_negatives_of_sources_with_the_same_labels(first):
    """A document that only the second source finds for a query isn't its random negative in the first source."""
    query, relevant = first.qrels["qid"][0], first.qrels["docno"][0]
    results = first.results
    moved = results["docno"] == relevant
    one = results.assign(
        qid=results["qid"].where(~moved, "q1"),
        query=results["query"].where(~moved, results["query"][results["qid"] == "q1"].iloc[0]),
    )
    labels = pd.concat([first.qrels, pd.DataFrame({"qid": [query], "docno": ["q0d0"], "label": [1]})])
    groups = groups_of((one, labels), (results, labels), fitter=Contrastive(n_random=1000))
    text = results["text"][moved].item()
    drawn = {group.qid: group.texts for group in groups.draw_all([(i, 0) for i in range(8)], seed=1)}
    assert text not in drawn[query]
    assert text in drawn["q2"]


def test_a_query_that_is_drawn_twice_gets_other_documents(first, other):
    groups = groups_of((first.results, first.qrels), (other.results, other.qrels, 2))
    twice = [tuple(row) for row in groups.epoch(0, seed=1) if row[0] == 8]
    one, two = groups.draw_all(twice, seed=1)
    assert one.qid == two.qid == "r0"
    assert set(one.texts) != set(two.texts)


def test_batches_of_all_ranks_have_each_draw_once(first, other, monkeypatch):
    groups = groups_of((first.results, first.qrels), (other.results, other.qrels, 2))
    fitter = Contrastive(epochs=2, batch_size=4)
    plan = plan_training(fitter, groups, width=16, head_is_new=True)
    assert (plan.updates_per_epoch, plan.updates) == (5, 10)
    ranks = []
    for rank in range(2):
        monkeypatch.setattr("pyterrier_msft.training.distributed.rank", lambda rank=rank: rank)
        monkeypatch.setattr("pyterrier_msft.training.distributed.world_size", lambda: 2)
        ranks.append([*BatchSchedule(groups, plan, seed=1)])
    drawn = [pair for batches in ranks for batch in batches for pair in batch]
    assert sorted(drawn) == sorted(tuple(row) for epoch in (0, 1) for row in groups.epoch(epoch, seed=1).tolist())
    batch = GroupDataset(groups, seed=1).__getitems__(ranks[0][0])
    assert [group.qid for group in batch] == [groups.qids[index] for index, _ in ranks[0][0]]


def test_sources_train_as_one_frame_does(ce, first, other):
    """In a single full batch, neither the order nor the source of a query matters."""
    frame, qrels = (pd.concat(parts) for parts in ((first.results, other.results), (first.qrels, other.qrels)))
    sample = frame.head(16)
    expected = ce.clone().fit(frame, qrels, fitter=ALL)(sample)["score"]
    one, two = (first.results, first.qrels), (other.results, other.qrels)
    mixed = ce.clone().fit([one, two], fitter=ALL)(sample)["score"]
    np.testing.assert_allclose(mixed, expected, atol=1e-4)
    repeated = ce.clone().fit([one, two, two, two], fitter=ALL)(sample)["score"]
    weighted = ce.clone().fit([one, (*two, 3)], fitter=ALL)(sample)["score"]
    np.testing.assert_allclose(weighted, repeated, atol=1e-4)
    assert not np.allclose(weighted, mixed, atol=1e-3)


def test_the_report_of_each_source(ce, first, other, tmp_path):
    some = other.qrels.head(3)
    with pytest.warns(UserWarning, match="^source 2: Contrastive dropped 2 of 5 queries without a relevant document"):
        ce.fit([(first.results, first.qrels), (other.results, some, 2)], fitter=BRIEF)
    report = ce.data_report
    assert (report.queries, report.groups, report.without_relevant) == (13, 11, 2)
    assert repr(report).splitlines() == [
        "DataReport:",
        "  source 1:",
        "    8 of 8 queries to train on, with 64 documents",
        "  source 2, weight 2:",
        "    3 of 5 queries to train on, with 24 documents",
        "    dropped 2 of 5 queries without a relevant document (2 of them not in the qrels)",
        "  0.5 epochs of 2 updates with 8 queries each, learning rate 0.01",
        "  a new re-ranker that is trained on fewer than 1,000 queries is often worse than its first stage: compare "
        "them, and try interpolate=True, which adds the first stage's score",
    ]
    ce.save(tmp_path)
    assert repr(MonoCE.load(tmp_path).data_report) == repr(report)


def test_sources_in_sequences(ce, first, second, other, tmp_path):
    sources = [(first.results, first.qrels), (second.results, second.qrels, 2)]
    teacher = [(part.results, None) for part in (first, other)]
    stages = {"CL": Stage(CL, sources), "KD": Stage(Distillation(max_steps=1, batch_size=8), teacher)}
    expected = ce.clone().fit(sources, fitter=CL)
    with interrupted_at(1), pytest.raises(KeyboardInterrupt):
        fit_sequences(ce, stages, ["CL"], save_dir=tmp_path)
    both = fit_sequences(ce, stages, ["CL-KD"], save_dir=tmp_path)["CL-KD"]
    assert both.stages[0].fingerprint == expected.fingerprint
    assert both.stages[1].data_report["groups"] == 13
    again = fit_sequences(ce, stages, ["CL-KD"], save_dir=tmp_path)["CL-KD"]
    assert again.fingerprint == both.fingerprint
    assert len([*tmp_path.glob("CL*")]) == 2
    one, two = sources
    changed = [[two, one], [one, (*two[:2], 3)], [one, two[:2]], [one], [one, (second.results.head(40), two[1], 2)]]
    assert len({Stage(CL, data).digest() for data in [sources, *changed]}) == 6
    assert groups_of(*sources).digest() == groups_of(*sources).digest()
    assert len({groups_of(*data).digest() for data in [sources, *changed[:4]]}) == 5
    assert Stage(CL, first.results, first.qrels).digest() == Stage(CL, [one]).digest()


def test_a_frame_and_a_file(ce, first, other, tmp_path):
    pytest.importorskip("polars")

    class Texts:
        def text_loader(self, fields):
            texts = first.results[["docno", "text"]]
            return pt.apply.generic(lambda frame: frame.merge(texts, on="docno"))

        def get_topics(self):
            return first.results[["qid", "query"]].drop_duplicates()

    run = tmp_path / "run.trec"
    pt.io.write_results(first.results, str(run))
    sources = [(other.results, other.qrels), (run, first.qrels)]
    prepared = prepare_stage(CL, sources, None, TextSource("text", Texts()), verbose=False).parts[0]
    groups = prepared.groups
    drawn = groups.draw_all([(i, 0) for i in range(13)], seed=1)
    assert {text for group in drawn for text in group.texts} <= {*first.results["text"], *other.results["text"]}
    assert groups.load is not None
    assert groups.lengths().tolist() == [len(group.query) for group in drawn]
    ce.apply_attributes(text=Texts()).fit(sources, fitter=BRIEF)


def test_no_weight_of_the_first_stage_is_chosen(backbone, first, other):
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu", interpolate=True)
    with pytest.warns(UserWarning, match="no weight is chosen .*: the training results are several or weighted"):
        ce.fit([(first.results, first.qrels), (other.results, other.qrels)], fitter=BRIEF)


def test_a_single_source_chooses_the_weight_of_the_first_stage(backbone):
    part = make_part("one", n_queries=24, seed=3)
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu", interpolate=True)
    as_list, apart = ce.clone(), ce
    as_list.fit([(part.results, part.qrels)], fitter=BRIEF)
    apart.fit(part.results, part.qrels, fitter=BRIEF)
    assert as_list.first_stage_weight == apart.first_stage_weight is not None


def test_a_sum_of_fitters(ce, first, other):
    fitter = BRIEF + 0.5 * Distillation(loss=losses.ranknet)
    ce.fit([(first.results, first.qrels), (other.results, other.qrels, 2)], fitter=fitter)
    report = ce.data_report
    assert [*report.parts] == ["Contrastive", "Distillation"]
    assert [part.groups for part in report.parts["Distillation"].parts.values()] == [8, 5]
