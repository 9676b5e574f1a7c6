"""False negatives: candidates that a judge scores like relevant documents."""

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from test_groups import lists, qrels, results

from pyterrier_msft import Contrastive, MonoCE, Stage, fit_sequences, losses, teachers
from pyterrier_msft.data.report import DataReport, FalseNegative

# q1: b is relevant; q2: d and e are.
FIRST = results("q1 a 9\nq1 b 8\nq1 c 7\nq1 f 6\nq2 a 9\nq2 d 8\nq2 e 7\nq2 g 6\nq2 h 5")
QRELS = qrels("q1 b 1\nq2 d 2\nq2 e 1\nq2 g 0")
JUDGE = results("q1 a 5.0\nq1 b 4.5\nq1 c 4.0\nq1 f 1.0\nq2 a 3.0\nq2 d 9.0\nq2 e 2.5\nq2 g 2.5\nq2 h 0.0")


def judged(*, judge=JUDGE, first=FIRST, **options):
    groups, report = Contrastive(judge=judge, **options).groups(first, QRELS)
    return lists(groups), report


def negatives(*, judge=JUDGE, **options) -> dict[str, str]:
    found, _ = judged(judge=judge, **options)
    return {qid: "".join(docno for docno, label in rows if label == 0) for qid, rows in found.items()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"q1": "cf", "q2": "h"}),  # g equals e, the lowest of two relevant documents
        ({"margin": 0.5}, {"q1": "f", "q2": "h"}),
        ({"margin": 0.49}, {"q1": "cf", "q2": "h"}),
        ({"margin": -0.5}, {"q1": "cf", "q2": "gh"}),  # a of both queries is exactly 0.5 above
        ({"margin": -0.51}, {"q1": "acf", "q2": "agh"}),
        ({"margin": None, "max_score": 4.0}, {"q1": "f", "q2": "agh"}),
        ({"margin": 0.0, "max_score": 1.0}, {"q2": "h"}),
        ({"margin": 3.5}, {}),
    ],
)
def test_limits(options, expected):
    if expected:
        assert negatives(**options) == expected
    else:
        with pytest.raises(ValueError, match="the judge scores all other documents in the top of the results like rel"):
            negatives(**options)


def test_false_negatives_are_counted_with_examples():
    found, report = judged()
    assert found == {"q1": [("b", 1), ("c", 0), ("f", 0)], "q2": [("d", 2), ("e", 1), ("h", 0)]}
    assert (report.false_negatives, report.relabelled, report.documents) == (3, 0, 6)
    assert report.false_negative_examples == (
        FalseNegative("query of q1", "text of a", 5.0, 4.5),
        FalseNegative("query of q2", "text of a", 3.0, 2.5),
        FalseNegative("query of q2", "text of g", 2.5, 2.5),
    )
    assert repr(report).splitlines()[2:] == [
        "  dropped 3 negatives that the judge scored like a relevant document, e.g.",
        "    5 (relevant: 4.5) for 'query of q1': 'text of a'",
        "    3 (relevant: 2.5) for 'query of q2': 'text of a'",
        "    2.5 (relevant: 2.5) for 'query of q2': 'text of g'",
    ]


def test_false_negatives_as_relevant_documents():
    found, report = judged(false_negatives="relevant", n_positives=None, loss=losses.multi_positive)
    assert found == {
        "q1": [("a", 1), ("b", 1), ("c", 0), ("f", 0)], "q2": [("a", 1), ("d", 2), ("e", 1), ("g", 1), ("h", 0)],
    }  # fmt: skip
    assert (report.false_negatives, report.relabelled, report.documents) == (0, 3, 9)
    assert "used as relevant 3 negatives that the judge scored like a relevant document" in repr(report)
    copy = FIRST.replace({"text": {"text of f": "text of a"}})
    found, report = judged(false_negatives="relevant", first=copy)
    assert [label for _, label in found["q1"]] == [1, 1, 0]
    assert report.copies_of_positives == 1


def test_skipped_documents_are_not_relabelled():
    found, report = judged(false_negatives="relevant", skip=1, n_positives=None)
    assert found == {"q1": [("b", 1), ("c", 0), ("f", 0)], "q2": [("d", 2), ("e", 1), ("g", 1), ("h", 0)]}
    assert report.relabelled == 1


def test_documents_without_a_score_stay_negatives():
    judge = JUDGE[~JUDGE["docno"].isin(["a", "b"])]
    assert negatives(judge=judge) == {"q1": "acf", "q2": "ah"}
    assert negatives(judge=judge, max_score=4.0) == {"q1": "af", "q2": "ah"}
    _, report = judged(judge=judge, max_score=4.0)
    assert (report.unjudged_negatives, report.unjudged_positives, report.false_negatives) == (2, 1, 2)
    assert report.false_negative_examples[0] == FalseNegative("query of q1", "text of c", 4.0, None)
    assert "kept 2 negatives that the judge didn't score" in repr(report)
    assert "4 (relevant: not scored) for" in repr(report)
    assert "1 of 2 queries whose relevant documents the judge didn't score: margin has no effect" in repr(report)
    _, report = judged(judge=judge, margin=None, max_score=4.0)
    assert report.unjudged_positives == 0


def test_a_document_of_passages_has_the_score_of_its_best_one():
    first = results("q1 b%p0 9\nq1 b%p1 8\nq1 c%p0 7\nq1 f%p0 6\nq1 f%p1 5\nq2 a 2\nq2 d 1")
    judge = results("q1 b%p0 1\nq1 b%p1 6\nq1 c%p0 5\nq1 f%p0 6.5\nq1 f%p1 2\nq2 a 2.2\nq2 d 3")
    assert negatives(first=first, judge=judge) == {"q1": "c%p0f%p1", "q2": "a"}


@pytest.mark.parametrize("form", ["run", "transformer", "cached"])
def test_forms_of_a_judge(form, tmp_path):
    seen = []

    def score(frame: pd.DataFrame) -> pd.DataFrame:
        seen.extend(zip(frame["qid"], frame["docno"], strict=True))
        assert {"query", "text"} <= {*frame.columns}
        return frame.drop(columns="score").merge(JUDGE[["qid", "docno", "score"]], on=["qid", "docno"])

    judge = pt.apply.generic(score)
    if form == "run":
        judge = tmp_path / "judge.trec"
        pt.io.write_results(JUDGE.assign(rank=0), str(judge))
    if form == "cached":
        judge = teachers.cached(judge, tmp_path)
    first = FIRST.replace({"docno": {"e": "h", "h": "e"}}).assign(text=lambda frame: "text of " + frame["docno"])
    assert negatives(judge=judge, first=first, depth=3, margin=-0.51) == {"q1": "ac", "q2": "ah"}
    # The top 3 of each query, and relevant documents at any rank.
    asked = sorted(qid + docno for qid, docno in seen)
    assert asked == ([] if form == "run" else ["q1a", "q1b", "q1c", "q2a", "q2d", "q2e", "q2h"])


@pytest.mark.parametrize("limits", [(0.0, None), (0.3, None), (-0.2, None), (None, 0.7), (0.1, 0.6), (2.0, None)])
def test_the_candidates_are_those_of_sentence_transformers(limits):
    """`margin` is its `absolute_margin`; only a score that equals a limit differs."""
    datasets = pytest.importorskip("datasets")
    util = pytest.importorskip("sentence_transformers.util")
    torch = pytest.importorskip("torch")
    margin, max_score = limits
    rng = np.random.default_rng(1)
    docnos, qids = [f"d{i}" for i in range(12)], [f"q{i}" for i in range(6)]
    scores = rng.uniform(-1, 1, (len(qids), len(docnos))).astype(np.float32)
    relevant = [(qid, docno) for i, qid in enumerate(qids) for docno in rng.choice(docnos, 1 + i % 2, replace=False)]

    class Model:
        device = torch.device("cpu")

        def encode_query(self, queries, **options):
            return scores[[qids.index(query) for query in queries]]

        def encode_document(self, corpus, **options):
            return np.eye(len(docnos), dtype=np.float32)[[docnos.index(text) for text in corpus]]

        def similarity(self, queries, documents):
            return torch.as_tensor(queries) @ torch.as_tensor(documents).T

        def similarity_pairwise(self, queries, documents):
            return (torch.as_tensor(queries) * torch.as_tensor(documents)).sum(1)

    mined = util.mine_hard_negatives(
        datasets.Dataset.from_dict({"query": [q for q, _ in relevant], "text": [d for _, d in relevant]}),
        Model(), corpus=docnos, range_max=len(docnos), num_negatives=len(docnos), absolute_margin=margin,
        max_score=max_score, verbose=False,
    )  # fmt: skip
    expected = set(zip(mined["query"], mined["negative"], strict=True))

    judge = pd.DataFrame([(q, d, float(scores[i, j])) for i, q in enumerate(qids) for j, d in enumerate(docnos)])
    judge.columns = ["qid", "docno", "score"]
    first = judge.assign(query=judge["qid"], text=judge["docno"])
    rel = pd.DataFrame(relevant, columns=["qid", "docno"]).assign(label=1)
    fitter = Contrastive(judge=judge, margin=margin, max_score=max_score)
    if not expected:
        with pytest.raises(ValueError, match="0 of 6 queries do"):
            fitter.groups(first, rel)
        return
    groups, report = fitter.groups(first, rel)
    found = {
        (qid, groups.texts[d])
        for qid, documents, labels in zip(groups.qids, groups.documents, groups.labels, strict=True)
        for d in documents[labels == 0]
    }
    assert found == expected
    assert report.false_negatives == len(judge) - len(rel) - len(expected)


def test_a_file_of_results(tmp_path):
    pytest.importorskip("polars")
    run = tmp_path / "run.trec"
    pt.io.write_results(FIRST.assign(rank=0), str(run))
    topics = FIRST[["qid", "query"]].drop_duplicates()
    groups, report = Contrastive(judge=JUDGE).groups(
        run, QRELS, topics=topics, load_text=lambda frame: frame.assign(text="text of  " + frame["docno"])
    )
    expected, from_frame = Contrastive(judge=JUDGE).groups(FIRST, QRELS)
    assert [labels.tolist() for labels in groups.labels] == [labels.tolist() for labels in expected.labels]
    assert report.false_negative_examples == from_frame.false_negative_examples
    with pytest.raises(ValueError, match="judge must be a frame or a file where the results are a file"):
        Contrastive(judge=pt.Transformer.identity()).groups(run, QRELS, topics=topics)


def test_training_with_a_judge(ce, train_part, tmp_path):
    judge = train_part.results.assign(score=train_part.results["quality"] - train_part.results["score"] / 3)
    fitter = Contrastive(judge=judge, margin=2, max_steps=1, n_negatives=3)
    ce.fit(train_part.results, train_part.qrels, fitter=fitter)
    assert 0 < ce.data_report.false_negatives < 448
    ce.save(tmp_path)
    report = MonoCE.load(tmp_path).data_report
    assert report == ce.data_report
    assert repr(report) == repr(ce.data_report)
    # A transformer's output isn't known in advance, so it has no digest, as that of a teacher.
    stages = {"CL": Stage(Contrastive(judge=pt.Transformer.identity()), train_part.results, train_part.qrels)}
    with pytest.raises(
        ValueError, match=r"judge must not be a transformer where a digest is needed.*judge=transformer"
    ):
        fit_sequences(ce, stages, ["CL"], save_dir=tmp_path / "saved")


def test_digests_include_the_judge(tmp_path):
    runs = [tmp_path / name for name in ("run", "same", "other")]
    for path, score in zip(runs, (1, 1, 2), strict=True):
        path.write_text(f"1 Q0 a 0 {score} x\n")
    first, same, other = (Contrastive(judge=path).digest() for path in runs)
    fitters = [
        Contrastive(judge=JUDGE), Contrastive(judge=JUDGE.head(3)), Contrastive(judge=JUDGE, margin=1),
        Contrastive(judge=JUDGE, max_score=1), Contrastive(judge=JUDGE, false_negatives="relevant"),
    ]  # fmt: skip
    assert first == same != other
    assert len({first, *(fitter.digest() for fitter in fitters), Contrastive().digest()}) == 7
    assert repr(fitters[2]) == "Contrastive(judge=<9 rows>, margin=1)"


def test_reports_of_chunks_keep_a_few_examples():
    example = FalseNegative("q", "d", 1.0, 0.5)
    report = DataReport.total([DataReport(false_negatives=2, false_negative_examples=(example,) * 2)] * 3)
    assert (report.false_negatives, report.false_negative_examples) == (6, (example,) * 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"judge": None, "margin": 0.5}, r"^judge is required by margin=0\.5; got None"),
        ({"judge": None, "max_score": 1}, "^judge is required by max_score=1; got None"),
        ({"judge": None, "false_negatives": "relevant"}, "^judge is required by false_negatives='relevant'; got None"),
        ({"margin": None}, "^max_score is required by margin=None; got None"),
        ({"false_negatives": "ignore"}, "^false_negatives must be 'drop' or 'relevant'; got 'ignore'"),
        ({"margin": float("nan")}, "^margin must be a finite number or None; got nan"),
        ({"max_score": "1"}, "^max_score must be a finite number or None; got '1'"),
        ({"judge": {"a": JUDGE}}, "^judge must be a single teacher with scores; got a mapping of 1"),
        ({"judge": "nowhere"}, "^judge must be a TREC run or permutations; there is no file 'nowhere'"),
        ({"judge": 3}, "^judge must be a frame, .*; got 3"),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Contrastive(**{"judge": JUDGE, **settings})
