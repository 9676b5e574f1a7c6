from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

from pyterrier_msft.data.diagnosis import explain_mismatch
from pyterrier_msft.data.frames import frame_digest, order_key
from pyterrier_msft.data.labels import from_qrels, from_teacher, has_only_ranks
from pyterrier_msft.data.rankings import top_documents
from pyterrier_msft.data.report import DataReport


def results(text: str, **columns: list) -> pd.DataFrame:
    """A result frame from lines of `qid docno score`."""
    rows = [line.split() for line in text.strip().splitlines()]
    frame = pd.DataFrame(rows, columns=["qid", "docno", "score"]).astype({"score": float})
    return frame.assign(query="query of " + frame["qid"], text="text of " + frame["docno"], **columns)


def qrels(text: str) -> pd.DataFrame:
    rows = [line.split() for line in text.strip().splitlines()]
    return pd.DataFrame(rows, columns=["qid", "docno", "label"]).astype({"label": int})


RESULTS = """
q1 a 3
q1 b 2
q1 c 1
q2 a 9
q2 d 8
"""
QRELS = """
q1 b 1
q2 d 2
q2 a 0
"""


def lists(groups) -> dict[str, list[tuple[str, float]]]:
    """Each query's texts (shortened to the docno) with labels, best-ranked first."""
    return {
        qid: [(groups.texts[d].removeprefix("text of "), float(y)) for d, y in zip(ds, ys, strict=True)]
        for qid, ds, ys in zip(groups.qids, groups.documents, groups.labels, strict=True)
    }


def contrastive(res, rel, **options):
    return from_qrels(res, rel, **{"depth": None, "n_negatives": 7, "min_relevance": 1, **options})


# ---- from qrels


def test_labels_are_grades_in_the_order_of_the_ranking():
    groups, report = contrastive(results(RESULTS), qrels(QRELS))
    assert lists(groups) == {"q1": [("a", 0), ("b", 1), ("c", 0)], "q2": [("a", 0), ("d", 2)]}
    assert groups.queries == ["query of q1", "query of q2"]
    assert (report.queries, report.groups, report.documents, report.dropped()) == (2, 2, 5, "")


def test_the_order_and_the_index_of_rows_do_not_matter():
    frame = results(RESULTS).sample(frac=1, random_state=3)
    frame.index = [0] * len(frame)
    assert lists(contrastive(frame, qrels(QRELS))[0]) == lists(contrastive(results(RESULTS), qrels(QRELS))[0])


def test_integer_ids():
    frame = results(RESULTS).replace({"qid": {"q1": 1, "q2": 2}}).assign(docno=lambda f: f["docno"].map(ord))
    relevant = (
        qrels(QRELS).replace({"qid": {"q1": "1", "q2": "2"}}).assign(docno=lambda f: f["docno"].map(ord).map(str))
    )
    groups, _ = contrastive(frame, relevant)
    assert [labels.tolist() for labels in groups.labels] == [[0, 1, 0], [0, 2]]


def test_minimum_relevance():
    groups, report = contrastive(results(RESULTS), qrels(QRELS), min_relevance=2)
    assert lists(groups) == {"q2": [("a", 0), ("d", 2)]}
    assert report.without_relevant == 1
    assert report.dropped() == "1 of 2 queries without a relevant document"


def test_negative_and_float_grades():
    graded = pd.DataFrame([("q1", "a", -1.0), ("q1", "b", 0.5), ("q1", "c", 1.5)], columns=["qid", "docno", "label"])
    groups, _ = contrastive(results(RESULTS), graded)
    assert lists(groups) == {"q1": [("a", 0), ("b", 0), ("c", 1.5)]}


def test_depth_limits_negatives_only():
    groups, _ = contrastive(results(RESULTS), qrels("q1 c 1"), depth=1)
    assert lists(groups) == {"q1": [("a", 0), ("c", 1)]}


def test_queries_without_negatives_are_counted():
    groups, report = contrastive(results("q1 a 1"), qrels("q1 a 1"))
    assert len(groups) == 0
    assert report.without_negatives == 1


def test_duplicates_and_missing_text_are_counted():
    frame = pd.concat([results(RESULTS), results("q1 a 1\nq1 e 0\nq1 f 0\nq1 g 0")], ignore_index=True)
    frame.loc[frame["docno"] == "e", "text"] = None
    frame.loc[frame["docno"] == "f", "text"] = " \n"
    frame.loc[frame["docno"] == "g", "text"] = float("nan")
    groups, report = contrastive(frame, qrels(QRELS))
    assert lists(groups)["q1"] == [("a", 0), ("b", 1), ("c", 0)]
    assert (report.duplicates, report.without_text) == (1, 3)


def test_passages_get_the_label_of_their_document():
    groups, report = contrastive(results("q1 a%p0 3\nq1 a%p1 2\nq1 b%p0 1"), qrels("q1 a 1"))
    assert lists(groups) == {"q1": [("a%p0", 1), ("a%p1", 1), ("b%p0", 0)]}
    assert report.without_relevant == 0


def test_missing_positives_are_added():
    requests = []

    def load(frame):
        requests.append(frame[["qid", "docno", "query"]])
        return ["text of z", "text of b", None]

    relevant = qrels(QRELS + "q1 z 1\nq2 x 2\nq9 z 1\nq2 y 0\nq2 w 1")
    groups, report = contrastive(results(RESULTS), relevant, depth=1, load_missing=load)
    expected = pd.DataFrame([("q1", "z"), ("q2", "w"), ("q2", "x")], columns=["qid", "docno"])
    assert_frame_equal(requests[0], expected.assign(query="query of " + expected["qid"]), check_dtype=False)
    assert lists(groups) == {"q1": [("a", 0), ("b", 1), ("z", 1)], "q2": [("a", 0), ("d", 2), ("b", 1)]}
    assert groups.texts == ["text of a", "text of b", "text of z", "text of d"]  # without duplicates
    assert report.without_text == 1


def test_the_text_of_a_positive_is_not_a_negative_of_its_query():
    frame = results(RESULTS + "q1 e 0\nq1 f -1\nq2 g 1")
    frame.loc[frame["docno"].isin(["a", "f", "g"]), "text"] = "text of b"  # of the positive of q1
    groups, report = contrastive(frame, qrels(QRELS), depth=4)
    assert lists(groups) == {"q1": [("b", 1), ("c", 0), ("e", 0)], "q2": [("b", 0), ("d", 2), ("b", 0)]}
    assert report.copies_of_positives == 1  # f is below the depth
    assert report.dropped() == "1 document with the text of a relevant document"
    assert draw(groups, 0).texts.count("text of b") == 1
    _, report = contrastive(frame[frame["docno"].isin(["a", "b"])], qrels(QRELS))
    assert (report.groups, report.without_negatives, report.copies_of_positives) == (0, 1, 1)


def test_the_text_of_an_added_positive_is_not_a_negative():
    groups, report = contrastive(results(RESULTS), qrels("q1 z 1"), load_missing=lambda frame: ["text of c"])
    assert lists(groups) == {"q1": [("a", 0), ("b", 0), ("c", 1)]}
    assert report.copies_of_positives == 1


@pytest.mark.parametrize("column", ["qid", "query", "docno", "text"])
def test_a_missing_column_is_named(column):
    with pytest.raises(ValueError, match=f"training results must have the columns .*'{column}'.*; got"):
        contrastive(results(RESULTS).drop(columns=column), qrels(QRELS))


def test_scores_must_be_numeric():
    frame = results(RESULTS)
    frame.loc[1, "score"] = np.nan
    with pytest.raises(ValueError, match=r"scores must be numeric; 1 of 5 isn't, e\.g\. nan"):
        contrastive(frame, qrels(QRELS))


def test_rank_is_used_without_a_score():
    frame = results(RESULTS).drop(columns="score").assign(rank=[3, 2, 1, 1, 2])
    assert [text for text, _ in lists(contrastive(frame, qrels(QRELS))[0])["q1"]] == ["c", "b", "a"]


# ---- sampling


def draw(groups, index: int = 0, *, seed: int = 0, epoch: int = 0):
    return groups.draw_all([(index, epoch)], seed=seed)[0]


def many(n: int = 50):
    frame = results("\n".join(f"q1 d{i} {n - i}" for i in range(n)))
    return contrastive(frame, qrels("q1 d3 1\nq1 d40 2"), n_negatives=5)[0]


def test_a_group_has_one_positive_and_distinct_negatives():
    group = draw(many(), seed=1)
    assert len(group.texts) == len(set(group.texts)) == 6
    assert np.count_nonzero(group.labels) == 1
    assert group.labels.dtype == np.float32


def test_samples_depend_only_on_seed_and_epoch():
    first = draw(many(), seed=1, epoch=2)
    assert first.texts == draw(many(), seed=1, epoch=2).texts
    assert first.texts != draw(many(), seed=1, epoch=3).texts
    assert first.texts != draw(many(), seed=2, epoch=2).texts


def test_all_documents_are_sampled_over_many_epochs():
    groups = many()
    seen = {text for epoch in range(100) for text in draw(groups, epoch=epoch).texts}
    assert seen == set(groups.texts)


# ---- from a teacher


def test_the_incoming_ranking_is_the_default_teacher():
    groups, report = from_teacher(results(RESULTS), None, depth=2)
    assert lists(groups) == {"q1": [("a", 1), ("b", 0)], "q2": [("a", 1), ("d", 0)]}
    assert report.agreement is None


def test_a_teacher_reorders_the_first_stage():
    teacher = results("q1 c 9\nq1 b 8\nq1 a 7\nq1 x 99")
    groups, report = from_teacher(results(RESULTS), teacher, depth=None)
    assert lists(groups) == {"q1": [("a", 0), ("b", 1), ("c", 2)]}
    assert report.without_teacher == 1
    assert report.agreement == pytest.approx(-1)
    assert not report.teacher_looks_inverted()  # a single query proves nothing
    assert replace(report, groups=5).teacher_looks_inverted()


def test_queries_without_a_preference_are_counted():
    teacher = results("q1 a 5\nq1 b 5\nq2 a 9")  # ties, and a single document
    _, report = from_teacher(results(f"{RESULTS.strip()}\nq3 a 2\nq3 b 1"), teacher, depth=None)
    assert report.without_preference == 2
    assert report.without_teacher == 1
    assert "2 of 3 queries in which the teacher prefers no document to another" in report.dropped()


def test_scores_that_are_equal_as_float32():
    scores = [f"q1 {name} {offset}" for name, offset in zip("abc", (3, 2, 1), strict=True)]
    teacher = results("\n".join(scores))
    near = from_teacher(results(RESULTS), teacher.assign(score=teacher["score"] + 1e6), depth=None, keep_scores=True)
    assert lists(near[0]) == {"q1": [("a", 1e6 + 3), ("b", 1e6 + 2), ("c", 1e6 + 1)]}
    far = teacher.assign(score=teacher["score"] + 1e9)
    with pytest.raises(ValueError, match="teacher scores must differ in the first seven digits; 2 of 3 are equal"):
        from_teacher(results(RESULTS), far, depth=None, keep_scores=True)
    groups, _ = from_teacher(results(RESULTS), far, depth=None, keep_scores=True, scale="zscore")
    assert len({label for _, label in lists(groups)["q1"]}) == 3


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_may_start_at_zero_or_one(first):
    teacher = results("q1 c 0\nq1 a 0\nq1 b 0").drop(columns="score").assign(rank=[first, first + 1, first + 2])
    assert lists(from_teacher(results(RESULTS), teacher, depth=None)[0]) == {"q1": [("a", 1), ("b", 0), ("c", 2)]}


def test_tied_documents_have_equal_labels():
    groups, report = from_teacher(results(RESULTS), results("q1 a 1\nq1 b 1\nq1 c 5"), depth=None)
    assert lists(groups) == {"q1": [("a", 0), ("b", 0), ("c", 2)]}
    assert report.tied_labels == pytest.approx(1 / 3)


def test_scores_as_labels():
    groups, _ = from_teacher(results(RESULTS), results("q1 a 1.5\nq1 b -2\nq1 c 5"), depth=None, keep_scores=True)
    assert lists(groups) == {"q1": [("a", 1.5), ("b", -2), ("c", 5)]}


def test_unranked_documents_are_dropped_and_counted():
    groups, report = from_teacher(results(RESULTS), results("q1 a 1\nq1 c 5"), depth=None)
    assert lists(groups) == {"q1": [("a", 0), ("c", 1)]}
    assert report.unranked_by_teacher == 1


def test_unranked_documents_ranked_last():
    groups, report = from_teacher(results(RESULTS), results("q1 a 1\nq2 x 1"), depth=None, unranked="last")
    assert lists(groups) == {"q1": [("a", 2), ("b", 0), ("c", 0)]}
    assert (report.unranked_by_teacher, report.ranked_last, report.without_teacher) == (0, 2, 1)
    assert report.tied_labels == pytest.approx(1 / 3)
    assert "placed 2 documents last that the teacher didn't rank" in repr(report)
    assert report.dropped() == "1 of 2 queries that the teacher didn't rank"


def test_top_documents_are_those_to_train_on():
    frame = results(RESULTS + "q0 z 99").assign(extra=range(6)).drop(columns="text").sample(frac=1, random_state=4)
    frame["body"] = "text of " + frame["docno"]
    frame.loc[frame["docno"] == "a", "body"] = ""
    top = top_documents(frame, depth=1, text_field="body")
    assert sorted(zip(top["qid"], top["docno"], top["extra"], top["rank"], strict=True)) == [
        ("q0", "z", 5, 0), ("q1", "b", 1, 0), ("q2", "d", 4, 0),
    ]  # fmt: skip
    assert top["qid"].tolist() == frame["qid"].unique().tolist()


def test_a_teacher_needs_an_order_and_common_queries():
    with pytest.raises(ValueError, match="teacher's ranking must have a score or a rank"):
        from_teacher(results(RESULTS).drop(columns="score"), None, depth=None)
    with pytest.raises(ValueError, match="none in common"):
        from_teacher(results(RESULTS), results("other a 1"), depth=None)


def test_scores_that_only_restate_ranks():
    lists_of_two = "q1 a {}\nq1 b {}\nq2 a {}\nq2 b {}\nq2 c {}"
    assert has_only_ranks(results(lists_of_two.format(2, 1, 3, 2, 1)))
    assert has_only_ranks(results(lists_of_two.format(1, 1 / 2, 1, 1 / 2, 1 / 3)))
    assert has_only_ranks(results(RESULTS).drop(columns="score").assign(rank=0))
    assert not has_only_ranks(results(lists_of_two.format(2.5, 1, 3, 2, -1)))
    twice = results(lists_of_two.format(2, 1, 3, 2, 1))
    assert has_only_ranks(pd.concat([twice, twice]))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([[0, -1, -2, -2]], True),  # two documents that the teacher didn't rank
        ([[0, -1, -2, -2], [0, -1, -2, -3]], True),
        ([[0, -1, -1], [0, -1, -1]], True),  # it named only the best one
        ([[7, 6, 5, 5]], True),
        ([[0], [0, -1, -2]], True),
        ([[1, 0, 0], [1, 0, 0]], False),  # grades
        ([[3, 3, 1, 0]], False),
        ([[3, 2, 2, 1], [3, 1, 0, 0]], False),
        ([[4.5, 3.25, -1]], False),  # only one query has several documents
        ([[4.5, 3.25, -1], [2], [7]], False),
        ([[4.5, 3.25, -1], [2, 2]], False),
        ([[1], [1]], False),  # no order at all: another message
        ([[1, 1], [1, 1]], False),
    ],
)
def test_scores_that_restate_ranks_with_ties_or_in_a_single_query(scores, expected):
    rows = [f"q{q} d{d} {score}" for q, query in enumerate(scores) for d, score in enumerate(query)]
    assert has_only_ranks(results("\n".join(rows))) is expected


# ---- reports and digests


def test_the_repr_of_a_report():
    report = DataReport(
        queries=1200, groups=1000, documents=5000, without_relevant=199, without_teacher=1, without_text=1,
        judged_twice=2, several_queries=1, truncated_documents=0.031, agreement=0.5,
    )  # fmt: skip
    assert repr(report).splitlines() == [
        "DataReport:",
        "  1,000 of 1,200 queries to train on, with 5,000 documents",
        "  dropped 199 of 1,200 queries without a relevant document",
        "  dropped 1 of 1,200 queries that the teacher didn't rank",
        "  dropped 1 document without text",
        "  2 documents with two labels in the qrels: the higher one is used",
        "  1 qid with several queries: the best-ranked document's is used",
        "  3.1% of the documents are truncated (max_length)",
        "  rank correlation of the teacher with the first stage: 0.50",
    ]


def test_a_frames_digest_depends_on_its_content():
    frame = results(RESULTS)
    assert frame_digest(frame) == frame_digest(frame[frame.columns[::-1]].set_index(pd.Index([5] * len(frame))))
    assert frame_digest(frame) != frame_digest(frame.assign(score=frame["score"] + 1))
    assert frame_digest(frame) != frame_digest(frame.rename(columns={"score": "points"}))
    assert frame_digest(frame) != frame_digest(frame[::-1])


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("uvwxyz"), st.floats(-5, 5)), min_size=1, max_size=30)
)
def test_any_results_give_valid_groups(rows):
    frame = pd.DataFrame(rows, columns=["qid", "docno", "score"]).assign(query="q", text=lambda f: f["docno"])
    groups, report = contrastive(frame, qrels("a u 1\nb v 2\nb w 1"), n_negatives=2)
    assert (
        report.groups + report.without_relevant + report.without_negatives == report.queries == frame["qid"].nunique()
    )
    for index in range(len(groups)):
        group = draw(groups, index)
        assert np.count_nonzero(group.labels) == 1
        assert 2 <= len(group.texts) <= 3
    distilled, _ = from_teacher(frame, None, depth=None)
    for documents, labels in zip(distilled.documents, distilled.labels, strict=True):
        assert len(documents) == len(labels) > 1
        assert (np.diff(labels) <= 0).all()  # best-ranked first


def test_a_groups_digest_depends_on_its_content():
    def digest(frame, **options):
        return contrastive(frame, qrels(QRELS), **options)[0].digest()

    frame = results(RESULTS)
    assert digest(frame) == digest(frame.sample(frac=1, random_state=3))
    others = [
        frame.assign(text="x" + frame["text"]), frame.assign(query="x"), frame.head(4),
        frame.assign(score=-frame["score"]),
    ]  # fmt: skip
    assert len({digest(frame), digest(frame, n_negatives=3), *map(digest, others)}) == 6


def test_order_key():
    assert order_key(pd.DataFrame({"docno": ["a"]})) is None
    assert order_key(pd.DataFrame({"rank": [0, 1], "score": ["2.5", "1"]})).tolist() == [2.5, 1]


def test_passages_and_documents_that_do_not_match():
    passages, documents = (pd.DataFrame({"qid": ["1"], "docno": [docno]}) for docno in ("d%p0", "d"))
    other_query = pd.DataFrame({"qid": ["1", "2"], "docno": ["e%p0", "d%p0"]})
    assert explain_mismatch(passages, documents, "the qrels").startswith("qids and docnos match")
    assert explain_mismatch(passages, other_query, "the teacher", by_document=False).startswith("qids and docnos match")
    why = explain_mismatch(passages, documents, "the teacher", by_document=False)
    assert why.startswith("the docnos don't match, e.g. 'd%p0' in the results and 'd' in the teacher. A docno that")
    assert why.endswith("the teacher must have passages where the results have them")
    assert explain_mismatch(passages, passages, "the qrels").endswith("the qrels must have documents, not passages")


def test_leading_zeros_that_were_lost():
    first, qrels = (pd.DataFrame({"qid": qids, "docno": "d"}) for qids in (["001", "016"], [1, 16]))
    assert explain_mismatch(first, qrels, "the qrels") == (
        "the qids don't match, e.g. '001' in the results and '1' in the qrels. Leading zeros are lost when ids are "
        "read as numbers: read them with dtype=str"
    )
    assert explain_mismatch(first, qrels.assign(qid=[2, 3]), "the qrels").endswith("and '2' in the qrels")
