import dataclasses
import functools

import pandas as pd
import pyterrier as pt
import pytest

from pyterrier_msft import Contrastive, Distillation, MonoCE, losses
from pyterrier_msft.algebra import FitterSequence


def a_loss(scores, labels, mask):
    return scores.sum()


# ---- declarations


def test_the_repr_can_be_evaluated():
    assert repr(Contrastive()) == "Contrastive()"
    fitter = Contrastive(n_negatives=3, loss=losses.ranknet, trainer_args={"report_to": "wandb"})
    assert eval(repr(fitter)) == fitter
    frame = pd.DataFrame({"qid": ["1"], "docno": ["a"], "score": [1.0]})
    assert repr(Distillation(teacher=frame, depth=5)) == "Distillation(teacher=<1 rows>, depth=5)"


def test_fitters_are_immutable_keyword_only_values():
    assert Contrastive(seed=1) == Contrastive(seed=1) != Contrastive(seed=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Contrastive().seed = 2
    with pytest.raises(TypeError):
        Contrastive(7)


def test_sequences():
    cl, kd = Contrastive(), Distillation()
    assert (cl >> kd).stages == (cl, kd)
    assert (cl >> kd >> cl).stages == (cl >> (kd >> cl)).stages == (cl, kd, cl)
    assert isinstance(cl >> kd, FitterSequence)
    assert repr(cl >> kd) == "Contrastive() >> Distillation()"


def test_a_transformer_cannot_follow_a_fitter():
    with pytest.raises(ValueError, match=r"Pass fitters to MonoCE\(\.\.\., fitter=\.\.\.\)"):
        Contrastive() >> pt.Transformer.identity()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Contrastive(n_negatives=0), "n_negatives must be a positive integer without n_random; got 0"),
        (lambda: Contrastive(n_positives=0), "n_positives must be a positive integer or None; got 0"),
        (lambda: Contrastive(min_relevance=0), "min_relevance must be a positive number; got 0"),
        (lambda: Contrastive(loss="ranknet"), r"loss must be a function, e\.g\. losses\.ranknet; got 'ranknet'"),
        (lambda: Contrastive(loss=losses.margin_mse), "needs scores labels"),
        (lambda: Distillation(depth=1), "depth must be at least 2; got 1"),
        (lambda: Distillation(loss=losses.localized_contrastive), "needs binary labels"),
        (lambda: Distillation(teacher="nowhere.trec"), "there is no file 'nowhere.trec'"),
        (lambda: Distillation(teacher=3), "teacher must be .*; got 3"),
        (lambda: Distillation(unranked="first"), "unranked must be 'drop' or 'last'; got 'first'"),
        (
            lambda: Distillation(unranked="last", loss=losses.margin_mse),
            "unranked must be 'drop' with losses.margin_mse",
        ),
        (lambda: MonoCE("x/y", fitter=MonoCE("x/y")), r"fitter must be e\.g\. Contrastive\(\)"),
    ],
)
def test_invalid_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_digest_includes_what_a_function_captures():
    def scaled(k):
        def loss(scores, labels, mask):
            return losses.ranknet(scores, labels, mask) * k

        return loss

    class Loss:
        def __init__(self, k):
            self.k = k

        def __call__(self, scores, labels, mask):
            return scores.sum()

    assert Contrastive(loss=scaled(1)).digest() == Contrastive(loss=scaled(1)).digest()
    assert Contrastive(loss=scaled(1)).digest() != Contrastive(loss=scaled(9)).digest()
    with_partials = [Contrastive(loss=functools.partial(a_loss, k=k)).digest() for k in (1, 1, 2)]
    assert with_partials[0] == with_partials[1] != with_partials[2]
    with_objects = [Contrastive(loss=Loss(k)).digest() for k in (1, 1, 2)]
    assert with_objects[0] == with_objects[1] != with_objects[2]


# ---- sampling


def test_the_number_of_relevant_documents_in_a_group():
    frame = pd.DataFrame({"qid": "q", "query": "x", "docno": list("abcde"), "text": list("abcde"), "rank": range(5)})
    rel = pd.DataFrame({"qid": "q", "docno": ["a", "c", "d"], "label": [1, 2, 1]})

    def labels(**options):
        groups, _ = Contrastive(n_negatives=1, **options).groups(frame, rel)
        return sorted(groups.draw_all([(0, 0)], seed=1)[0].labels.tolist(), reverse=True)

    assert len(labels()) == 2
    assert len(labels(n_positives=2)) == 3
    assert labels(n_positives=None, loss=losses.multi_positive) == [2, 1, 1, 0]


# ---- digests


def test_a_digest_includes_what_determines_the_result(tmp_path):
    frame = pd.DataFrame({"qid": ["1", "1"], "docno": ["a", "b"], "score": [1.0, 2.0]})
    runs = [tmp_path / name for name in ("run", "same", "other")]
    for path, score in zip(runs, (1, 1, 2), strict=True):
        path.write_text(f"1 Q0 a 0 {score} x\n")
    fitters = [
        Contrastive(), Contrastive(seed=1), Contrastive(learning_rate=2e-5), Contrastive(loss=losses.ranknet),
        Contrastive(loss=a_loss), Contrastive(trainer_args={"optim": "sgd"}), Distillation(),
        Distillation(teacher=frame),
        Distillation(teacher=frame.assign(score=[2.0, 1.0])), Distillation(teacher=runs[0]),
        Distillation(teacher=runs[2]),
        Contrastive() >> Distillation(), Distillation() >> Contrastive(),
        Contrastive(loss=losses.combine((a_loss, 1.0))), Contrastive(loss=losses.combine((a_loss, 2.0))),
        Contrastive(loss=losses.LambdaLoss(k=3)), Contrastive(loss=losses.LambdaLoss(k=5)),
    ]  # fmt: skip
    digests = [fitter.digest() for fitter in fitters]
    assert len(set(digests)) == len(digests)
    assert digests == [fitter.digest() for fitter in fitters]
    assert Contrastive(seed=42).digest() == Contrastive().digest()
    assert Distillation(teacher=frame.copy()).digest() == Distillation(teacher=frame).digest()
    assert Distillation(teacher=runs[1]).digest() == Distillation(teacher=runs[0]).digest()


# ---- groups


def test_contrastive_without_qrels(train_part):
    with pytest.raises(ValueError, match=r"qrels is required by Contrastive; got None.*Distillation"):
        Contrastive().groups(train_part.results, None)


def test_qids_that_do_not_match(train_part):
    other = train_part.qrels.assign(qid="x" + train_part.qrels["qid"])
    with pytest.raises(ValueError, match=r"the qids don't match, e\.g\. 'tr0' in the results and 'xtr0' in the qrels"):
        Contrastive().groups(train_part.results, other)


def test_missing_positives_are_looked_up(train_part):
    relevant = train_part.results["docno"].isin(train_part.qrels["docno"])
    texts = train_part.results.set_index("docno")["text"]
    fitter = Contrastive(add_missing_positives=True)
    with pytest.raises(ValueError, match=r"text is required by add_missing_positives=True.*text=dataset"):
        fitter.groups(train_part.results[~relevant], train_part.qrels)
    groups, report = fitter.groups(
        train_part.results[~relevant], train_part.qrels, load_text=lambda f: f.assign(text=texts[f["docno"]].to_numpy())
    )
    assert len(groups) == report.queries == 64
    wanted = texts[train_part.qrels.set_index("qid")["docno"][groups.qids]].tolist()
    assert [groups.texts[d[y > 0][0]] for d, y in zip(groups.documents, groups.labels, strict=True)] == wanted


def test_distillation_gives_the_labels_that_the_loss_needs(train_part):
    teacher = train_part.results.assign(score=train_part.results["quality"] * 0.7)
    ranks, _ = Distillation(teacher=teacher).groups(train_part.results, None)
    assert set(ranks.labels[0]) == {0, 7}
    scores, _ = Distillation(teacher=teacher, loss=losses.margin_mse).groups(train_part.results, None)
    assert sorted(set(scores.labels[0])) == pytest.approx([0, 2.1])
    with pytest.raises(ValueError, match="only restate its ranks"):
        Distillation(teacher=train_part.results, loss=losses.margin_mse).groups(train_part.results, None)


def test_a_run_file_as_teacher(train_part, tmp_path):
    path = tmp_path / "teacher.trec"
    pt.io.write_results(train_part.results.assign(score=train_part.results["quality"].astype(float)), str(path))
    groups, report = Distillation(teacher=path).groups(train_part.results, None)
    assert report.groups == 64
    assert set(groups.labels[0]) == {0, 7}


def test_documents_that_the_teacher_did_not_rank(train_part):
    teacher = train_part.results[train_part.results["rank"] < 3]
    dropped, report = Distillation(teacher=teacher).groups(train_part.results, None)
    assert (report.unranked_by_teacher, report.ranked_last, report.documents) == (64 * 5, 0, 64 * 3)
    assert dropped.labels[0].tolist() == [2, 1, 0]
    last, report = Distillation(teacher=teacher, unranked="last").groups(train_part.results, None)
    assert (report.unranked_by_teacher, report.ranked_last, report.documents) == (0, 64 * 5, 64 * 8)
    assert last.labels[0].tolist() == [7, 6, 5, 0, 0, 0, 0, 0]
    assert Distillation(unranked="last").digest() != Distillation().digest()


def test_a_warning_if_the_teacher_looks_upside_down(train_part):
    upside_down = train_part.results.assign(score=-train_part.results["score"])
    with pytest.warns(UserWarning, match="looks upside down"):
        Distillation(teacher=upside_down).groups(train_part.results, None)
