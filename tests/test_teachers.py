import gzip
import itertools
import json
import pickle
import time
import warnings
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from conftest import write_tiny_bert
from ir_measures import RR
from pandas.testing import assert_frame_equal

from pyterrier_msft import Contrastive, Distillation, MonoCE, PrependScore, losses, teachers, unlabelled
from pyterrier_msft.data.answer_text import read_names
from pyterrier_msft.data.permutations import text_id

COLUMNS = ["qid", "query", "docno", "text", "rank", "score"]
A, B, C = "text of a", "text of b", "text of c"
OBJECTS = [{"docid": "a", "text": A}, {"docid": "b", "text": B}, {"docid": "c", "text": C}]


def write(path: Path, *records) -> Path:
    """Write records, or lines, to a file of JSON lines."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def line(**fields) -> dict:
    return {"qid": "q1", "query": "a query", **fields}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "rankings.jsonl"


def docnos(frame: pd.DataFrame) -> list[str]:
    return frame["docno"].tolist()


# ---- permutations


def test_positions(file):
    out = teachers.read_permutations(write(file, line(candidates=OBJECTS, permutation=[2, 3, 1])))
    expected = [("q1", "a query", d, f"text of {d}", rank, -float(rank)) for rank, d in enumerate("bca")]
    assert_frame_equal(out, pd.DataFrame(expected, columns=COLUMNS))


@pytest.mark.parametrize(
    "record",
    [
        line(candidates=OBJECTS, permutation=["b", "c", "a"]),
        line(candidates=OBJECTS, permutation=["2", "3", "1"]),
        line(candidates=OBJECTS, ranking="[2] > [3] > [1]"),
        line(candidates=OBJECTS, response="The 3 passages: [2] > [03] > [1]"),
        line(candidates=OBJECTS, response="2, 3, 1"),
        {"query_id": "q1", "question": "a query", "ctxs": OBJECTS, "permutation": [2, 3, 1]},
        line(
            docs=[{"_id": "a", "content": A}, {"id": "b", "contents": B}, {"pid": "c", "passage": C}],
            ranking=[2, 3, 1],
        ),
        # RankGPT's output
        {"query": "a query",
         "hits": [{"content": f"text of {d}", "qid": "q1", "docid": d, "rank": 1, "score": 2.5} for d in "bca"]},
        # RankLLM's
        {"query": {"text": "a query", "qid": "q1"},
         "candidates": [{"docid": d, "score": 9, "doc": {"contents": f"text of {d}"}} for d in "bca"]},
        # Reason-to-Rank's: the ids are in the teacher's order, the labels in that of the documents
        line(unsorted_docs=[A, B, C], re_rank_id=[2, 3, 1], sorted_docids=["b", "c", "a"], scores=["0", "0", "1"]),
    ],
)  # fmt: skip
def test_published_formats(file, record):
    out = teachers.read_permutations(write(file, record))
    expected = [("q1", "a query", d, f"text of {d}", rank, -float(rank)) for rank, d in enumerate("bca")]
    assert_frame_equal(out, pd.DataFrame(expected, columns=COLUMNS))


def test_docnos_that_look_like_positions(file):
    numbered = [{"docid": 7, "text": A}, {"docid": 2, "text": B}, {"docid": 9, "text": C}]
    assert docnos(teachers.read_permutations(write(file, line(docs=numbered, ranking=[2, 9, 7])))) == ["2", "9", "7"]
    assert docnos(teachers.read_permutations(write(file, line(docs=numbered, ranking=[2, 3, 1])))) == ["2", "9", "7"]
    numbered = [{"docid": 3, "text": A}, {"docid": 1, "text": B}, {"docid": 2, "text": C}]
    assert docnos(teachers.read_permutations(write(file, line(docs=numbered, ranking=[1, 2, 3])))) == ["3", "1", "2"]
    assert docnos(teachers.read_permutations(write(file, line(docs=numbered, ranking=list("123"))))) == ["1", "2", "3"]


@pytest.mark.parametrize(
    "response",
    [
        "[2] > [1] > [3]", "2 > 1 > 3", "[2], [1], [3]", "[2] > [1] = [3]", "Passage 2 > Passage 1 > Passage 3",
        "<think>[3] is off topic; [1] > [2]?</think>[2] > [1] > [3]", "[1] > [2]? </think>\n\n[2] > [1] > [3]",
        "Here is the ranking of the 3 passages: 2 > 1 > 3", "The ranking of the 3 passages is [2] > [1] > [3].",
        "[2] > [1] > [3]\n\nExplanation: [1] > [3], as 3 is off topic.", "[1] > [3], but:\n[2] > [1] > [3]",
        "[2] >\n[1] >\n[3]", "**[2]** > **[1]** > **[3]**", "<answer>\n2, 1, 3\n</answer>", "[2][1][3]", "2 1 3",
        "1. 2\n2. 1\n3. 3", "1. [2] (a > b)\n2. [1]\n3. [3]", "[2] -> [1] -> [3]", "The ranking is [2], [1], [3].",
        "[2] > [1]\n> [3]", "1. [2] >\n2. [1]\n3. [3]", "I rank them:\n> [2] > [1] > [3]", "[2] >\n[1] > [3]",
        "1. [2] (score > 0.9)\n2. [1] (score > 0.8)\n3. [3]", "<ranking>2, 1, 3</ranking>", "2\n1\n3",
        "[2], [1], [3]\nAll scores > 0.5 except for 3.", "**Ranking:** 2, 1, 3", "A: [2] > [1] > [3]",
        "Here is the ranking of the passages, from most to least relevant:\n1. [2]\n2. [1]\n3. [3]",
        '[{"id": "d3", "original_rank": 1, "rank": 3}, {"id": "d2", "original_rank": 2, "rank": 1}, '
        '{"id": "d1", "original_rank": 3, "rank": 2}]',
        "The final ranking would be [2] > [1] > [3]", "<answer>2, 1, 3", "\\boxed{2 > 1 > 3}", "[2] > [1] > [3] > [",
        '{"ranked_passages": [2, 1, 3], "reasons": ["2 is on topic"]}', '{"ranking": "2, 1, 3"}', "排名：2 > 1 > 3",
        '[{"id": "d3", "new_rank": "3"}, {"id": "d1", "new_rank": "2"}, {"id": "d2", "new_rank": "1"}]',
        "\\boxed{[2] > [1] > [3]}", "<Answer>[2] > [1] > [3]</Answer>",
        "排名：[2] ＞ [1] ＞ [3]", "【2】、【1】、【3】", "2，1，3", "[Passage 2] > [Passage 1] > [Passage 3]",
        "[2] > [1] > [3]\n<think>ok</think>", "<reasoning>[3] > [1]? no</reasoning>\n<answer>2 > 1 > 3</answer>",
        '{"reason": "3 is off topic", "ranking": "[2] > [1] > [3]"}', "[1] is good.\n[3] is bad.\n\n[2] > [1] > [3]",
    ],
)  # fmt: skip
def test_positions_in_text(file, response):
    candidates = [{"docid": f"d{i}", "text": f"text {i}"} for i in (1, 2, 3)]
    out = teachers.read_permutations(write(file, line(candidates=candidates, response=response)))
    assert docnos(out) == ["d2", "d1", "d3"]


@pytest.mark.filterwarnings("ignore:.*rankings with mistakes")
def test_an_answer_without_a_ranking_makes_way_for_one(file):
    lines = [line(candidates=OBJECTS, response=text) for text in ("I'm sorry", "[2] > [1] > [3]", "[3] > [1] > [2]")]
    assert docnos(teachers.read_permutations(write(file, *lines))) == ["b", "a", "c"]


@pytest.mark.parametrize("text", ["[1], ", "1, ", "[2] > [1] = ", "[", "> ", "1. [2]\n", "<think>", "passage "])
@pytest.mark.filterwarnings("ignore:.*rankings with mistakes", "ignore:.*may count from 0")
def test_answers_that_repeat_themselves_take_no_time(file, text):
    candidates = [{"docid": f"d{i}", "text": f"text {i}"} for i in (1, 2)]
    lines = [line(candidates=candidates, response="[1] > [2]"), line(candidates=candidates, response=text * 5000)]
    teachers.read_permutations(write(file, lines[0], {**lines[1], "qid": "other"}))


def in_lines(form: str):
    return lambda names: "\n".join(form.format(rank=i, name=name, score=40 - i) for i, name in enumerate(names, 1))


def joined(separator: str, form: str = "{}"):
    return lambda names: separator.join(map(form.format, names))


LISTS = [
    "{rank}. {name}", "{rank}. Passage {name}", "{rank}) {name}", "({rank}) {name}", "Rank {rank}: {name}",
    "#{rank}: {name}", "**{rank}.** `{name}`", "{rank}. [{name}] (as good as 1)",
    "{rank}. {name} (score {score})", "{rank}. Passage {name}: it gives 3 reasons",
    "| {rank} | [{name}] | 0.9 |", "{rank}: Document {name}", "- {name}", "{rank}. {name}\n   It gives 3 reasons.",
]  # fmt: skip
DOCNO_LISTS = [  # a number instead of a docno may be a score
    "{rank}: {name}", "{rank} - {name}", "[{rank}] {name}", "[{rank}]: {name}", "| {rank} | {name} |",
    "| {rank} | {name} | 0.9 |", "{rank}\t{name}",
]  # fmt: skip
FORMS = {
    **{form: in_lines(form) for form in (*LISTS, *DOCNO_LISTS)},
    "json": json.dumps,
    "json in an object": lambda names: json.dumps({"reason": "the first 3 are best", "ranking": names}),
    "json in a block": lambda names: f"The ranking:\n```json\n{json.dumps(names, indent=1)}\n```\nI read it 2 times.",
    "json in a sentence": lambda names: f"The ranking of the 20 passages: {json.dumps(names)}",
    "json, cut off": lambda names: json.dumps(names)[:-1],
    "json objects": lambda names: json.dumps([{"rank": i, "id": name} for i, name in enumerate(names, 1)]),
    "json objects by rank": lambda names: json.dumps(
        sorted([{"rank": i, "docno": name} for i, name in enumerate(names, 1)], key=lambda item: str(item["docno"]))
    ),
    "json lines": lambda names: "\n".join(json.dumps({"passage": name, "score": -i}) for i, name in enumerate(names)),
    ">": joined(" > "), ">>": joined(">"), "≻": joined("≻"), ",": joined(", "), "lines": joined("\n"),
    "backquotes": joined(", ", "`{}`"), "angles": joined(" ", "<{}>"), "brackets": joined(" > ", "[{}]"),
    "a count": lambda names: f"The top {len(names)} passages are: " + " > ".join(map(str, names)) + ".",
    "scores": lambda names: " > ".join(map(str, names)) + "\nScores: "
    + ", ".join(str(40 - i) for i, _ in enumerate(names)),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["positions", "MED-{}", "a/b.{}:1", "7187{:03}"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("error", "ignore:.*unranked documents")
def test_forms_of_answers(file, form, kind):
    if kind == "positions" and form in DOCNO_LISTS:
        pytest.skip("a number may be a score")
    rng = np.random.default_rng(0)
    ids = [("d{}" if kind == "positions" else kind).format(i) for i in rng.permutation(20) + 1]
    positions = (rng.permutation(20) + 1).tolist()
    for n in (20, 19, 10):
        expected = [ids[position - 1] for position in positions[:n]]
        response = FORMS[form](positions[:n] if kind == "positions" else expected)
        candidates = [{"docid": docid, "text": docid} for docid in ids]
        lines = [
            line(candidates=candidates, response=response),
            {"qid": "q2", "query": "x", "candidates": [A, B], "permutation": [2, 1]},
        ]
        assert docnos(teachers.read_permutations(write(file, *lines)))[:-2] == expected, (n, response)


@pytest.mark.parametrize(
    "response",
    [
        # comments and scores
        "1. relevant\n2. not relevant\n3. relevant", "[1] is about cats\n[2] is about dogs", "[1]\nCats.\n[2]\nDogs.",
        "1. [1] is about cats\n2. [2] is about dogs\n3. [3] is off topic", "1. d1: about cats\n2. d2: about dogs",
        "[1] (score 3)\n[2] (score 9)\n[3] (score 7)", "[2]: 0.93\n[1]: 0.4\n[3]: 0.1", "- d2: good\n- d1: bad",
        "Passage 1: rank 3\nPassage 2: rank 1\nPassage 3: rank 2", "| id | rank |\n|---|---|\n| 1 | 3 |\n| 2 | 1 |",
        "Rank 1 (3), Rank 2 (2)", "1: 3\n2: 2\n3: 2", "1: 2\n2: 1\n3: 3", "| 1 | 2 |\n| 2 | 1 |", "Scores: 3, 1, 2",
        "1. 3 points\n2. 1 point", "1. 2/10\n2. 1/10", "Ranks: 3, 1, 2", "1. 0.2\n2. 0.1", "2 0.9\n1 0.1",
        "1. d3 (2/5)\n2. d1 (5/5)\n3. d2 (4/5)", "| # | id | Score |\n|---|---|---|\n| 1 | d3 | 0.1 |\n| 2 | d1 | 1 |",
        "| Passage | Rank |\n|---|---|\n| [1] | [3] |\n| [2] | [1] |\n| [3] | [2] |", "5 > 3 is true",
        "Scores:\n2\n1\n3",
        "The scores are:\n```json\n[2, 1, 3]\n```", '{"relevance_scores": [2, 1, 3]}', "Scores: [2, 1, 3]",
        '[{"id": "d1", "relevanceScore": 2}, {"id": "d2", "relevanceScore": 9}]', '{"irrelevant": [2, 1]}',
        '[{"id": 1, "relevant": false}, {"id": 2, "relevant": true}]',
        '[{"id": "d1", "relevance": "low"}, {"id": "d2"}]',
        # excluded or equal documents, the worst first, and examples
        "The least relevant are:\n1. [3]\n2. [2]", "From least to most relevant: [3] > [1] > [2]", "Not [2] > [1]",
        "[1] = [2] = [3]", '[{"id": "d3", "rank_score": 1}, {"id": "d2", "rank_score": 9}]',
        "[2] > [1], [3]", "1. [2] and [1]\n2. [3]", "1. [2], [1]\n2. [3]", "- [2] (best)\n- [1]\n- [3]",
        "[2] > ... > [1]",
        "1. [3] is off topic.\n2. [2] is the best.", "Reasons:\n1. [3]\n2. [2]", "The form is [1] > [2].",
        # several rankings
        "1 > 2\n2 > 3", '{"relevant": [3, 1], "other": [2]}', "[1] > [2] > [3]\n[2] > [3] > [1]",
        "[3] > [1] > [2]\n\nCorrected: [2] > [1] > [3]", "Relevant: 2, 1\nNot relevant: 3",
        "1. [1]\n2. [2]\n3. [3]\n\n1. [3]\n2. [1]\n3. [2]", "1. [2]\n2. [1]\n4. [3]", "[1, 3] > [2]",
        # sentences, and names that aren't those of candidates
        "Passage 2 is best. Then 3, 1", "I can't rank these 3 passages.", "d3 is off topic. d2 is the best.",
        "[3] is off topic. The best is [2]. Then [1].", "[2] is the best, then [1] > [3]", "[2] and [1]",
        "[2] (the best) > [1] > [3]", "[2] = 9 > [1] = 8", "d2 = 9 > d1 = 8",
        "[3] < [2] < [1]", "MED-7 > MED-9", "d3-d2-d1", "P2 > P1", "2-1-3", "[1] d3",
        "1. 2, 2. 1, 3. 3", "as d3 is bad: d2 > d1", '{"1": 3, "2": 1, "3": 2}', "d2/d1",
        '[{"id": 1, "score": 0.2}, {"id": 2, "score": 0.9}, {"id": 3, "score": 0.4}]',
    ],
)  # fmt: skip
def test_other_answers_are_no_ranking(file, response):
    candidates = [{"docid": f"d{i}", "text": f"text {i}"} for i in (1, 2, 3)]
    lines = [
        line(qid=f"q{i}", candidates=candidates, response=text) for i, text in enumerate(["[2] > [1] > [3]", response])
    ]
    with pytest.warns(UserWarning, match="1 queries without a ranking") as caught:
        out = teachers.read_permutations(write(file, *lines))
    assert len(caught) == 1
    assert docnos(out) == ["d2", "d1", "d3"]


@pytest.mark.parametrize(
    ("ids", "response", "expected"),
    [
        (["a", "it", "c"], "[2] > [1], as it is a good one", ["it", "a"]),
        (["a", "it", "c"], "c > a", ["c", "a"]),
        (["a", "it", "c"], "B: 2 > 1", ["it", "a"]),
        (["MED-1", "MED-11", "med-1"], "MED-11, med-1, MED-1", ["MED-11", "med-1", "MED-1"]),
        (["MED-2", "MED-1", "x"], "[2] > [1]; MED-2 is off topic", ["MED-1", "MED-2"]),
        (["doc-3", "doc-1", "doc-2"], "Document doc-1 > Document doc-2", ["doc-1", "doc-2"]),
        (["doc-3", "doc-1", "doc-2"], "DOC-1, DOC-2", ["doc-1", "doc-2"]),
        (["0003", "0001", "0002"], "1. 0002\n2. 0001", ["0002", "0001"]),
        (["MED-1", "MED-2", "x"], "\\boxed{MED-2 > MED-1}", ["MED-2", "MED-1"]),
        (["1-cf", "2-ab", "x"], "x >\n2-ab >\n1-cf", ["x", "2-ab", "1-cf"]),
        (["17", "4", "1"], "[1] 17\n[2] 4", ["17", "4"]),
        (["a b", "a", "c, d"], "1. a b - good\n2. c, d\n3. a", ["a b", "c, d", "a"]),
        (["a b", "a", "c"], "[a] > [a b]", ["a", "a b"]),
        (["x1", "x2", "x3"], "I left out [2].\n[3] > [1]", ["x3", "x1"]),
        (["x1", "x2", "x3"], "1. [1] is good\n2. [2] is bad\n3. [3] is best\n\n[3] > [1] > [2]", ["x3", "x1", "x2"]),
        (["x1", "x2", "x3"], "1. Read them\n2. Rank them\n\n3 > 1 > 2", ["x3", "x1", "x2"]),
        (["x1", "x2", "x3"], "[x3] > [x9] > [x1]", ["x3", "x1"]),
        (["甲：1", "甲：2", "x3"], "甲：2 > 甲：1", ["甲：2", "甲：1"]),
        (["x1", "x2", "x3"], "[x3] > [x1]\n\n[x2] is off topic.", ["x3", "x1"]),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*unranked", "ignore:.*may count from", "ignore:.*unknown positions")
def test_names_among_other_words(file, ids, response, expected):
    candidates = [{"docid": docid, "text": docid} for docid in ids]
    assert docnos(teachers.read_permutations(write(file, line(candidates=candidates, response=response)))) == expected


def test_a_repetitive_answer_takes_linear_time():
    repeated = [
        "[1], ", "2 > 1 = ", "1. [2]\n", "| 1 | 2 |\n", "rank 1: 2\n", "```a", "<a", "(", "[", "{", "[1, ", "MED-",
        "d1/", "2 and ", "1-", " ", "\n", "*", "#", '"', "9", "passage ", "id: ", "order is ", "<answer>",
    ]  # fmt: skip
    for text, before in itertools.product(repeated, ("", "[2] > [1]\n```")):
        fastest = []
        for n in (1000, 16000):
            times = []
            for _ in range(3):
                start = time.process_time()
                read_names(before + text * n, ["d1", "d2"])
                times.append(time.process_time() - start)
            fastest.append(min(times))
        assert fastest[1] < 64 * max(fastest[0], 0.005), text  # 256 times if quadratic


def test_unfinished_thoughts_are_no_ranking(file):
    candidates = [{"docid": f"d{i}", "text": f"text {i}"} for i in (1, 2)]
    lines = [line(candidates=candidates, response=text) for text in ("[2] > [1]", "<think>[1] > [2], or")]
    with pytest.warns(UserWarning, match="1 queries without a ranking"):
        out = teachers.read_permutations(write(file, lines[0], {**lines[1], "qid": "other"}))
    assert docnos(out) == ["d2", "d1"]


def test_docnos_without_candidates(file):
    out = teachers.read_permutations(write(file, {"qid": 1, "permutation": ["b", "a"]}))
    expected = pd.DataFrame([("1", None, "b", None, 0, 0.0), ("1", None, "a", None, 1, -1.0)], columns=COLUMNS)
    assert_frame_equal(out, expected, check_dtype=False)


def test_titles_precede_texts(file):
    out = teachers.read_permutations(
        write(file, line(hits=[{"title": " T ", "text": "x "}, {"title": "", "text": "y"}]))
    )
    assert out["text"].tolist() == ["T x", "y"]


def test_missing_ids_are_digests_of_texts(file):
    out = teachers.read_permutations(
        write(file, {"query": "one", "docs": [A, B], "ranking": [2, 1]}, {"query": "two", "docs": [A], "ranking": [1]})
    )
    assert out["qid"].nunique() == 2
    assert out.groupby("text")["docno"].nunique().tolist() == [1, 1]
    assert docnos(out) == [text_id(text) for text in (B, A, A)]


def test_gzip_blank_lines_and_unicode(tmp_path):
    text = "\n" + json.dumps(line(docs=["naïve\u2028text", B], ranking=[1, 2]), ensure_ascii=False) + "\n\n"
    path = tmp_path / "rankings.jsonl.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
    assert teachers.read_permutations(path)["text"].tolist() == ["naïve\u2028text", B]
    array = tmp_path / "rankings.json"
    array.write_text(json.dumps([line(docs=[A, B], ranking=[2, 1])]))
    assert teachers.read_permutations(array)["text"].tolist() == [B, A]


def test_mistakes_of_an_llm_give_one_warning(file):
    write(
        file,
        line(candidates=OBJECTS, permutation="[3] > [3] > [7] > [1]"),
        {"qid": "q2", "query": "sorry", "candidates": OBJECTS, "permutation": "I can't rank these."},
        {"qid": "q3", "query": "all", "candidates": OBJECTS, "permutation": [1, 2, 3]},
        {"qid": "q3", "query": "all", "candidates": OBJECTS, "permutation": [3, 2, 1]},
    )
    with pytest.warns(UserWarning, match="4 rankings with mistakes") as caught:
        out = teachers.read_permutations(file)
    assert [str(w.message).removeprefix(f"{file}: ") for w in caught] == [
        "4 rankings with mistakes: 1 documents named twice (e.g. query 'q1'), "
        "1 unknown positions or docnos (e.g. query 'q1'), "
        "1 unranked documents, dropped (e.g. query 'q1'), 1 queries without a ranking (e.g. query 'q2'), "
        "1 repeated queries (e.g. query 'q3')"
    ]
    assert docnos(out) == ["c", "a", "a", "b", "c"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_unranked_documents_ranked_last(file):
    write(file, line(candidates=[*OBJECTS, {"docid": "d", "text": "x"}], permutation=[3, 1]))
    assert docnos(teachers.read_permutations(file)) == ["c", "a"]
    out = teachers.read_permutations(file, unranked="last")
    assert docnos(out) == ["c", "a", "b", "d"]
    assert out["score"].tolist() == [0, -1, -2, -2]
    groups, _ = Distillation().groups(out, None)
    assert groups.labels[0].tolist() == [3, 2, 0, 0]
    with pytest.raises(ValueError, match="unranked must be 'drop' or 'last'; got 'first'"):
        teachers.read_permutations(file, unranked="first")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("permutation", [[3, 1], [2]])
def test_a_permutation_has_no_scores_to_learn_from(file, permutation):
    write(file, line(candidates=OBJECTS, permutation=permutation))
    for unranked in ("drop", "last"):
        out = teachers.read_permutations(file, unranked=unranked)
        if len(out) > 1:
            with pytest.raises(ValueError, match="scores that only restate its ranks"):
                Distillation(loss=losses.margin_mse).groups(out, None)


def test_a_single_query_with_several_documents_may_have_scores():
    rows = [("q1", "a", 4.5), ("q1", "b", 3.25), ("q1", "c", -1), ("q2", "a", 3), ("q3", "b", 1)]
    scored = pd.DataFrame(rows, columns=["qid", "docno", "score"]).assign(query="x", text=lambda frame: frame["docno"])
    groups, _ = Distillation(loss=losses.margin_mse).groups(scored, None)
    assert [labels.tolist() for labels in groups.labels] == [[4.5, 3.25, -1]]


FIVE = [{"docid": docid, "text": docid} for docid in "abcde"]


@pytest.mark.parametrize(
    ("permutations", "expected"),
    [
        ([[3, 1, 2], [0, 2, 1]], ["dbc", "acb"]),
        ([[3, 1, 2], [2, 5, 1]], ["cab", "bea"]),
        ([[3, 1, 2], [4, 3, 2, 1, 0]], ["dbc", "edcba"]),
        ([[3, 1, 2], "[1] > [0] > [2] > [4] > [3]"], ["dbc", "baced"]),
        (["[3] > [01]", "[0]"], ["db", "a"]),
        ([*["[5] > [2]"] * 60, "[1] > [0] > [2] > [4] > [3]"], [*["eb"] * 60, ""]),  # one complete, from 0
        (["[3] > [1]", "[0] > [2]", "[5] > [4]", "[5]"], ["ca", "b", "ed", "e"]),  # one answer has a mistake
        ([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1], [4, 3, 2, 1, 0], [3, 1]], ["abcde", "edcba", "", "ca"]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*rankings with mistakes:UserWarning")
def test_the_whole_file_decides_what_positions_count_from(file, permutations, expected):
    queries = [f"q{i}" for i in range(len(permutations))]
    for order in (1, -1):
        lines = [line(qid=q, candidates=FIVE, permutation=p) for q, p in zip(queries, permutations, strict=True)]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*positions are read")
            out = teachers.read_permutations(write(file, *lines[::order]))
        assert ["".join(out.loc[out["qid"] == qid, "docno"]) for qid in queries] == expected


@pytest.mark.parametrize(
    "permutations", [[[3, 1, 2]], [[3, 1], "[2] > [4]"], [[0, 1], [5, 1]], [*[[3, 1]] * 60, "[0] > [2]"]]
)
def test_a_warning_if_positions_may_count_from_0_or_1(file, permutations):
    lines = [line(qid=f"q{i}", candidates=FIVE, permutation=p) for i, p in enumerate(permutations)]
    with pytest.warns(UserWarning, match="positions are read as counted from 1, but they may count from 0") as caught:
        out = teachers.read_permutations(write(file, *lines))
    assert sum("positions" in str(w.message).partition(": ")[2][:9] for w in caught) == 1
    assert docnos(out)[:1] == [{3: "c", 0: "a"}[permutations[0][0]]]


def test_complete_permutations_that_count_from_0_and_from_1(file):
    write(file, line(docs=[A, B], ranking=[2, 1]), line(qid="q2", docs=[A, B, C], ranking=[1, 0, 2]))
    with pytest.raises(ValueError, match="from 0 in all; got 1 to n in line 1 and 0 to n - 1 in line 2"):
        teachers.read_permutations(file)


def test_entries_that_fit_docnos_and_positions_are_what_the_others_are(file):
    numbered = [{"docid": i, "text": str(i)} for i in range(5)]
    lines = [line(qid=f"q{i}", docs=numbered, ranking=ranking) for i, ranking in enumerate([[0, 4, 2], [2, 1], [3]])]
    for order in (1, -1):
        with pytest.warns(UserWarning, match="unranked") as caught:
            out = teachers.read_permutations(write(file, *lines[::order]))
        assert len(caught) == 1
        assert out.groupby("qid")["docno"].agg("".join).tolist() == ["042", "21", "3"]


def test_docnos_beside_positions_from_0(file):
    write(file, line(unsorted_docs=[A, B, C], re_rank_id=[1, 2, 0], sorted_docids=["b", "c", "a"]))
    assert docnos(teachers.read_permutations(file)) == ["b", "c", "a"]


def test_a_repeated_candidate(file):
    write(file, line(candidates=[*OBJECTS, OBJECTS[0]], permutation=[2, 4, 1, 3]))
    with pytest.warns(UserWarning, match="1 repeated candidates"):
        out = teachers.read_permutations(file)
    assert docnos(out) == ["b", "a", "c"]
    assert out["rank"].tolist() == [0, 1, 2]


def test_answers_in_a_separate_file(file, tmp_path):
    answers = tmp_path / "gpt.json"
    passages = [{"docid": d["docid"], "text": d["text"]} for d in OBJECTS]
    write(
        file, *({"query": q, "positive_passages": [], "retrieved_passages": passages} for q in ("one", "two", "three"))
    )
    answers.write_text(json.dumps(["[2] > [1] > [3]", None, "[3] > [2] > [1]"]))
    with pytest.warns(UserWarning, match="1 queries without a ranking"):
        out = teachers.read_permutations(file, responses=answers)
    assert docnos(out) == ["b", "a", "c", "c", "b", "a"]
    answers.write_text('["[1]"]')
    with pytest.raises(ValueError, match="got 1 for 3 queries"):
        teachers.read_permutations(file, responses=answers)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{'qid'", "line 2: the line must be JSON; got an error at column 2"),
        ("[1, 2]", r"line 2: the line must be an object; got \[1, 2\]"),
        ({"docs": [A], "ranking": [1]}, r"line 2: a query is required \(one of query, .*\); got the fields \['docs'"),
        (line(query=3, docs=[A], ranking=[1]), "line 2: query must be text; got 3"),
        (line(qid=1.5, docs=[A], ranking=[1]), "line 2: an id must be text or an integer; got 1.5"),
        (line(ranking=[1]), r"line 2: candidates are required \(one of candidates, hits, .*\); got the fields"),
        (line(docs="a b", ranking=[1]), "line 2: candidates must be a list; got 'a b'"),
        (line(docs=[A, B]), r"line 2: a permutation is required \(one of permutation, .*\); got the fields"),
        (line(candidates=OBJECTS, best_first=[3, 2, 1]), r"line 2: a permutation is required .* 'best_first'\]"),
        (line(docs=[A, 7], ranking=[1]), "line 2: a passage must be text or an object; got 7"),
        (line(docs=[{"title": "x"}], ranking=[1]), r"line 2: a passage must have one of text, .*\['title'\]"),
        (line(docs=[{"text": ["x"]}], ranking=[1]), r"line 2: a passage's text and title must be text; got \['x'\]"),
        (line(docs=[A, B], ranking=[1.0, 2.0]), "line 2: permutation must have positions, docnos or text; got"),
        (line(docs=[A, B], ranking=[True]), "line 2: permutation must have positions, docnos or text; got"),
        (line(docs=[A, B], ranking=[1, 2], sorted_docids=["a"]), "line 2: sorted_docids must have 2 ids"),
        (line(qid="q0", docs=[A], ranking=[1]), "line 2: qid 'q0' must have one query; got 'a query' and 'fine'"),
    ],
)  # fmt: skip
def test_an_invalid_line(file, record, message):
    write(file, {"qid": "q0", "query": "fine", "docs": [A, B], "ranking": [2, 1]}, record)
    with pytest.raises(ValueError, match=message) as error:
        teachers.read_permutations(file)
    assert str(file) in str(error.value)


def test_files_that_cannot_be_read(tmp_path, file):
    with pytest.raises(ValueError, match="there is no file"):
        teachers.read_permutations(tmp_path / "nothing.jsonl")
    file.write_bytes(b'{"query": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"line 1: the file must be JSON in UTF-8; got 'utf-8' codec"):
        teachers.read_permutations(file)
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(b'{"query": "x"}\n' * 9)[:-12])
    with pytest.raises(ValueError, match="the file must be JSON in UTF-8; got Compressed file ended"):
        teachers.read_permutations(broken)
    with pytest.raises(ValueError, match="must have rankings; got none in 0 lines"):
        teachers.read_permutations(write(file))
    (tmp_path / "object.json").write_text('{"query": "x"}')
    with pytest.raises(ValueError, match="which isn't an array"):
        teachers.read_permutations(tmp_path / "object.json")


# ---- labelled passages


def test_the_format_of_tevatron(tmp_path):
    path = tmp_path / "train.jsonl.gz"
    record = {
        "query_id": 7, "query": "a query",
        "positive_passages": [{"docid": "b", "title": "Title", "text": "text"}],
        "negative_passages": [{"docid": 3, "text": C}, {"docid": "a", "title": "", "text": A}, {"docid": 3, "text": C}],
    }  # fmt: skip
    path.write_bytes(gzip.compress(json.dumps(record).encode()))
    results, qrels = teachers.read_labelled_passages(path)
    expected = [("7", "a query", "b", "Title text"), ("7", "a query", "3", C), ("7", "a query", "a", A)]
    assert_frame_equal(results, pd.DataFrame(expected, columns=COLUMNS[:4]))
    assert_frame_equal(qrels, pd.DataFrame([("7", "b", 1)], columns=["qid", "docno", "label"]))
    groups, report = Contrastive().groups(results, qrels)
    assert (report.groups, report.documents) == (1, 3)
    assert groups.labels[0].tolist() == [1, 0, 0]


def test_passages_without_ids_and_queries_on_several_lines(file):
    write(file, {"query": "x", "pos": [A], "neg": [B]}, {"query": "x", "pos": [B], "neg": [C]})
    with pytest.warns(UserWarning, match="1 passages are both positive and negative"):
        results, qrels = teachers.read_labelled_passages(file)
    assert results["text"].tolist() == [A, B, C]
    assert qrels["docno"].tolist() == [text_id(A), text_id(B)]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"query": "x", "positive_passages": [A]}, "line 1: one of negative_passages, .* must be a list"),
        (
            {"query": "x", "pos": [[101, 102]], "neg": []},
            r"a passage must be text or an object; got \[101, 102\]",
        ),
        ({"query": [101], "pos": [A], "neg": []}, "query must be text"),
        ({"query": "x", "pos": [], "neg": []}, "must have queries with passages; got none"),
    ],
)
def test_invalid_labelled_passages(file, record, message):
    with pytest.raises(ValueError, match=message):
        teachers.read_labelled_passages(write(file, record))


# ---- data sets of sentence-transformers


MINED = {  # the same data in the forms of mine_hard_negatives
    "n-tuple": {"anchor": ["x", "y"], "positive": [A, B], "negative_1": [B, C], "negative_2": [C, A]},
    "triplet": {"query": ["x", "x", "y", "y"], "positive": [A, A, B, B], "negative": [B, C, C, A]},
    "labeled-pair": {"q": [*"xxxyyy"], "passage": [A, B, C, B, C, A], "label": [1, 0, 0, 1, 0, 0]},
    "labeled-list": {"q": ["x", "y"], "passages": [[A, B, C], [B, C, A]], "labels": [[1, 0, 0]] * 2},
}


@pytest.mark.parametrize("form", MINED)
def test_mined_negatives(form):
    for dataset in (pd.DataFrame(MINED[form]), datasets.Dataset.from_dict(MINED[form])):
        results, qrels = teachers.read_hard_negatives(dataset)
        assert [*zip(results["query"], results["text"], strict=True)] == [
            ("x", A), ("x", B), ("x", C), ("y", B), ("y", C), ("y", A)
        ]  # fmt: skip
        assert qrels.to_numpy().tolist() == [[text_id("x"), text_id(A), 1], [text_id("y"), text_id(B), 1]]
        groups, report = Contrastive().groups(results, qrels)
        assert (report.groups, groups.labels[1].tolist()) == (2, [1, 0, 0])


@pytest.mark.parametrize("name", ["scores", "labels", "label"])  # sentence-transformers' distillation calls them labels
def test_mined_negatives_with_scores(name):
    tuples = {**MINED["n-tuple"], name: [[3.5, 1.0, 2.25], [1.0, 2.0, 3.75]]}
    results, qrels = teachers.read_hard_negatives(datasets.Dataset.from_dict(tuples))
    assert results["score"].tolist() == [3.5, 1, 2.25, 1, 2, 3.75]
    assert qrels["label"].tolist() == [1, 1]
    groups, _ = Distillation(loss=losses.margin_mse).groups(results, None)
    (group,) = groups.draw_all([(0, 0)], seed=1)
    assert sorted(zip(group.texts, group.labels, strict=True)) == [(A, 3.5), (B, 1), (C, 2.25)]
    pairs = {"q": ["x", "x"], "passage": [A, B], "score": [0.5, 0.25]}
    results, qrels = teachers.read_hard_negatives(pd.DataFrame(pairs))
    assert (results["score"].tolist(), len(qrels)) == ([0.5, 0.25], 0)


def test_mined_negatives_with_grades():
    results, qrels = teachers.read_hard_negatives(pd.DataFrame({**MINED["n-tuple"], "labels": [[3, 0, 1], [2, 0, 0]]}))
    assert "score" not in results
    assert qrels["label"].tolist() == [3, 1, 2]


def test_a_mined_passage_that_is_also_a_positive():
    results, qrels = teachers.read_hard_negatives(
        pd.DataFrame({"q": ["x", "x"], "positive": [A, B], "negative": [B, C]})
    )
    assert results["text"].tolist() == [A, B, C]
    assert qrels["docno"].tolist() == [text_id(A), text_id(B)]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"query": ["x"], "positive": [A]}, r"dataset must have rows with .*; got 1 rows of \['query', 'positive'\]"),
        ({"query": [], "positive": [], "negative": []}, "got 0 rows"),
        ({"query": [1], "positive": [2], "negative": [3]}, "row 1: queries and passages must be texts; got 1. Ids"),
        ({"query": ["x"], "passage": ["y"], "label": [np.nan]}, "row 1: label must be numbers; got nan"),
        ({"query": ["x"], "passage": [7], "label": [1]}, "row 1: queries and passages must be texts; got 7"),
        ({"q": ["x"], "passages": [[A, B]], "labels": [[1]]}, "row 1: labels must be one per passage; got 1 of 2"),
    ],
)
def test_invalid_mined_negatives(dataset, message):
    with pytest.raises(ValueError, match=message):
        teachers.read_hard_negatives(pd.DataFrame(dataset))
    with pytest.raises(ValueError, match="dataset must be a split or a frame; got dict"):
        teachers.read_hard_negatives(dataset)


# ---- fusion


def ranked(text: str) -> pd.DataFrame:
    rows = [row.split() for row in text.split(",")]
    return pd.DataFrame(rows, columns=["qid", "docno", "score"]).astype({"score": float})


def test_reciprocal_rank_fusion_by_hand():
    out = teachers.fuse({"a": ranked("1 x 9, 1 y 8, 1 z 8, 2 x 1"), "b": ranked("1 z 2, 1 y 1")})
    expected = pd.DataFrame(
        [("1", "x", 1 / 61), ("1", "y", 1 / 62 + 1 / 62), ("1", "z", 1 / 61 + 1 / 62), ("2", "x", 1 / 61)],
        columns=["qid", "docno", "score"],
    )
    assert_frame_equal(out.sort_values(["qid", "docno"], ignore_index=True), expected, check_dtype=False)
    assert teachers.fuse({"a": ranked("1 x 1")}, k=1)["score"].tolist() == [0.5]


def test_the_same_ranks_from_different_teachers_tie():
    orders = ("xyz", "yzx", "zxy")
    runs = {str(i): ranked(",".join(f"1 {d} {-r}" for r, d in enumerate(order))) for i, order in enumerate(orders)}
    assert teachers.fuse(runs)["score"].nunique() == 1


def test_fusion_needs_an_order_and_common_queries(train_part):
    with pytest.raises(ValueError, match="teacher 'b' must have a score or a rank"):
        teachers.fuse({"a": ranked("1 x 1"), "b": ranked("1 x 1").drop(columns="score")})
    with pytest.raises(ValueError, match="teacher 'b' must rank documents of the results"):
        teachers.get_ranking({"a": train_part.results, "b": ranked("1 x 1")}, train_part.results)


def test_a_mapping_of_teachers(train_part, tmp_path):
    good = train_part.results.assign(score=train_part.results["quality"].astype(float))
    path = tmp_path / "b.trec.gz"
    pt.io.write_results(good, str(path))
    fitter = Distillation(teacher={"a": good, "b": path, "c": pt.apply.doc_score(lambda row: row["quality"])})
    groups, report = fitter.groups(train_part.results, None)
    assert report.groups == 64
    assert all(set(labels) == {0, 7} for labels in groups.labels)
    first, _ = Distillation(teacher={"first": None}).groups(train_part.results, None)
    assert first.labels[0].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    with pytest.raises(ValueError, match="got a mapping of 1, whose fusion gives only ranks"):
        Distillation(teacher={"a": good}, loss=losses.margin_mse)


# ---- files as teachers


def test_the_path_of_permutations(train_part, tmp_path):
    best_first = train_part.results.sort_values("quality", ascending=False, kind="stable")
    path = tmp_path / "teacher.jsonl.gz"
    lines = [json.dumps({"qid": qid, "ranking": rows["docno"].tolist()}) for qid, rows in best_first.groupby("qid")]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    groups, report = Distillation(teacher=str(path)).groups(train_part.results, None)
    assert report.groups == 64
    relevant = train_part.qrels["docno"].tolist()
    texts = train_part.results.set_index("docno")["text"]
    best = {groups.qids[i]: groups.texts[groups.documents[i][groups.labels[i].argmax()]] for i in range(64)}
    assert list(map(best.get, train_part.qrels["qid"])) == texts[relevant].tolist()


def test_a_file_that_is_not_a_run(train_part, tmp_path):
    path = tmp_path / "teacher.txt"
    for content in ("not a run at all of course\n", "tr0 0 tr0d0 1\n"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"teacher must be a TREC run \(qid Q0 docno rank score name\)"):
            Distillation(teacher=path).groups(train_part.results, None)


@pytest.mark.parametrize("teacher", [[], {}, {"a": 3}, Contrastive(), pt.Transformer])
def test_what_cannot_be_a_teacher(teacher):
    with pytest.raises(ValueError, match="teacher must be a frame, the path"):
        Distillation(teacher=teacher)


# ---- transformers


class Judge(pt.Transformer):
    """Scores by `quality`, records its calls, and can fail at one of them."""

    def __init__(self, fails_at: int | None = None, top: int | None = None):
        self.calls: list[list[str]] = []
        self.seen = pd.DataFrame()
        self.fails_at, self.top = fails_at, top

    def transform(self, inp):
        self.calls.append(inp["qid"].unique().tolist())
        self.seen = inp
        if len(self.calls) == self.fails_at:
            raise KeyboardInterrupt
        out = pt.model.add_ranks(inp.assign(score=inp["quality"] - 0.01 * inp["rank"]))
        return out if self.top is None else out[out["rank"] < self.top]


def test_a_transformer_ranks_the_top_of_the_candidates(train_part):
    judge = Judge()
    results = train_part.results.assign(qid=train_part.results["qid"].str[2:].astype(int)).sample(
        frac=1, random_state=1
    )
    groups, report = Distillation(teacher=judge, depth=4).groups(results.drop(columns="rank"), None)
    assert report.documents == 4 * report.groups == 256
    assert sum(map(len, judge.calls)) == 64
    assert max(map(len, judge.calls)) > 1
    assert (
        judge.seen.groupby("qid")["score"].apply(list).tolist() == [[8.0, 7.0, 6.0, 5.0]] * judge.seen["qid"].nunique()
    )
    assert judge.seen["rank"].tolist() == [0, 1, 2, 3] * judge.seen["qid"].nunique()
    by_frame, _ = Distillation(teacher=judge(results), depth=4).groups(results, None)
    assert by_frame.digest() == groups.digest()


def test_a_transformer_on_results_after_a_union(train_part):
    results = train_part.results.drop(columns=["score", "rank"])
    results.index = [0] * len(results)
    expected, _ = Distillation(teacher=Judge()).groups(results.reset_index(drop=True), None)
    assert Distillation(teacher=Judge()).groups(results, None)[0].digest() == expected.digest()


def test_progress_is_shown_if_verbose(train_part, capsys):
    Distillation(teacher=Judge()).groups(train_part.results, None)
    assert capsys.readouterr().err == ""
    Distillation(teacher=Judge()).groups(train_part.results, None, verbose=True)
    assert "64/64" in capsys.readouterr().err


def test_a_transformer_without_an_order(train_part):
    no_order = pt.apply.generic(lambda frame: frame[["qid", "docno"]])
    with pytest.raises(ValueError, match="must have a score or a rank"):
        Distillation(teacher=no_order).groups(train_part.results, None)
    with pytest.raises(ValueError, match="none in common"):
        Distillation(teacher=pt.apply.generic(lambda frame: frame.head(0))).groups(train_part.results, None)


def test_a_transformer_has_no_digest_but_its_settings_have(train_part):
    fitter = Distillation(teacher=Judge(), seed=1)
    with pytest.raises(ValueError, match=r"teacher must not be a transformer.*Judge.*teacher=transformer\(results\)"):
        fitter.digest()
    with pytest.raises(ValueError, match="teacher must not be a transformer"):
        Distillation(teacher={"a": Judge(), "b": train_part.results}).digest()
    assert fitter.readable_settings() == Distillation(seed=1).readable_settings() != Distillation().readable_settings()


def test_quotation_marks_in_a_run(tmp_path):
    docnos = ['"Heroes"_(album)', '"Weird_Al"_Yankovic', "Bowie", '"Unbalanced', 'a"b', '"Low"', "NA"]
    frame = pd.DataFrame({"qid": "1", "docno": docnos, "score": np.arange(7.0), "rank": range(7)})
    by_hand, written = tmp_path / "hand.trec", tmp_path / "written.trec"
    by_hand.write_text("".join(f"1 Q0 {docno} {rank} {rank}.0 llm\n" for rank, docno in enumerate(docnos)))
    pt.io.write_results(frame, str(written))
    assert '"""Heroes""_(album)"' in written.read_text()
    candidates = frame.assign(query="q", text="t", score=0.0)
    for path in (by_hand, written):
        ranking = teachers.get_ranking(path, candidates)
        assert dict(zip(ranking["docno"], ranking["score"], strict=True)) == dict(zip(docnos, range(7), strict=True))
    # pandas puts a field with a space into quotation marks.
    spaced = frame.assign(docno=[f"pages/page {i}.txt" for i in range(7)], qid='"1"')
    pt.io.write_results(spaced, str(written), run_name="my run")
    ranking = teachers.get_ranking(written, spaced.assign(query="q", text="t", score=0.0))
    assert {*ranking["docno"]} == {*spaced["docno"]}
    assert {*ranking["qid"]} == {'"1"'}


def test_digests_of_mappings(train_part, tmp_path):
    run = tmp_path / "a.trec"
    pt.io.write_results(train_part.results, str(run))
    one = Distillation(teacher={"a": run, "b": train_part.results})
    assert one.digest() == Distillation(teacher={"b": train_part.results.copy(), "a": str(run)}).digest()
    assert one.digest() != Distillation(teacher={"a": run, "b": train_part.results.head(9)}).digest()


def test_reprs(tmp_path):
    llm = pt.apply.doc_score(lambda row: 0.0)
    assert repr(Distillation(teacher=llm % 5)) == "Distillation(teacher=(pt.apply.doc_score() >> RankCutoff(5)))"
    assert "0x" not in repr(Distillation(teacher=Judge()))
    run = tmp_path / "b.trec"
    run.touch()
    mixed = Distillation(teacher={"a": ranked("1 x 1"), "b": run, "c": llm}, unranked="last")
    assert repr(mixed) == (
        f"Distillation(teacher={{'a': <1 rows>, 'b': '{run}', 'c': pt.apply.doc_score()}}, unranked='last')"
    )
    assert repr(teachers.cached(llm, "folder")) == "teachers.cached(pt.apply.doc_score(), 'folder')"


# ---- caching


def test_an_interrupted_teacher_resumes(train_part, tmp_path):
    results = train_part.results[train_part.results["qid"].isin(["tr0", "tr1", "tr2", "tr3", "tr4"])]
    judge = Judge(fails_at=3)
    fitter = Distillation(teacher=teachers.cached(judge, tmp_path / "judge"))
    with pytest.raises(KeyboardInterrupt):
        fitter.groups(results, None)
    assert judge.calls == [["tr0"], ["tr1"], ["tr2"]]
    expected, _ = Distillation(teacher=Judge()).groups(results, None)
    assert len(expected) == 5
    assert fitter.groups(results, None)[0].digest() == expected.digest()
    assert judge.calls[3:] == [["tr2"], ["tr3"], ["tr4"]]
    another = Judge(fails_at=1)  # in a later session
    again = Distillation(teacher=teachers.cached(another, str(tmp_path / "judge")))
    assert again.groups(results, None)[0].digest() == expected.digest()
    assert another.calls == []
    rankings = teachers.read_permutations(tmp_path / "judge" / "rankings.jsonl")
    assert Distillation(teacher=rankings).groups(results, None)[0].qids == expected.qids


def test_cached_gives_what_the_teacher_gives(train_part, tmp_path):
    frame = train_part.results.assign(extra=[np.arange(2)] * len(train_part.results)).sample(frac=1, random_state=0)
    before = frame.copy()
    judge = Judge(top=3)
    cached_judge = teachers.cached(judge, tmp_path, batch_size=10)
    first = cached_judge(frame)
    assert_frame_equal(frame, before)
    assert_frame_equal(first, Judge(top=3)(frame)[first.columns])
    assert max(map(len, judge.calls)) == 10
    assert_frame_equal(pickle.loads(pickle.dumps(cached_judge))(frame), first)
    frame.index = [0] * len(frame)
    assert cached_judge(frame)["score"].tolist() == first["score"].tolist()
    assert len(judge.calls) == 7
    assert [*cached_judge(frame.head(0)).columns] == [*first.columns]


def test_other_documents_texts_orders_and_weights_are_not_cached(train_part, tmp_path):
    judge = Judge()
    cached_judge = teachers.cached(judge, tmp_path)
    frame = train_part.results[train_part.results["qid"] == "tr0"]
    changed = [
        frame,
        frame.head(7),
        frame.assign(text=["another text", *frame["text"][1:]]),
        frame.assign(query="another query"),
        frame.assign(score=-frame["score"], rank=range(7, -1, -1)),
        frame.assign(qid="tr1"),
    ]
    for calls, results in enumerate(changed, 1):
        cached_judge(results)
        assert len(judge.calls) == calls
    for results in (*changed, frame[::-1], frame.assign(score=frame["score"] / 3), frame.drop(columns="rank")):
        cached_judge(results)
    assert len(judge.calls) == len(changed)
    judge.fingerprint = "other weights"
    cached_judge(frame)
    assert len(judge.calls) == len(changed) + 1


def test_a_teacher_with_other_settings_is_not_cached(backbone, train_part, tmp_path):
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu")
    assert ce.cross_encoder.head_is_new  # loaded
    ce.cross_encoder.head_is_new = False
    frame = train_part.results.head(8)
    reversed_scores = frame.assign(score=frame["score"].to_numpy()[::-1], rank=frame["rank"].to_numpy()[::-1])
    others = [
        ce, ce.apply_attributes(max_length=6), ce.apply_attributes(interpolate=5.0),
        ce.apply_attributes(max_length=6).cached(tmp_path / "scores"),
    ]  # fmt: skip
    for teacher in others:
        cached_teacher = teachers.cached(teacher, tmp_path / "rankings")
        for results in (frame, reversed_scores, frame.assign(score=frame["score"] * 2)):
            assert cached_teacher(results)["score"].tolist() == pytest.approx(teacher(results)["score"].tolist())


def test_a_partial_line_is_ignored(train_part, tmp_path, caplog):
    frame = train_part.results.head(24)
    expected = teachers.cached(Judge(), tmp_path)(frame)
    path = tmp_path / "rankings.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    judge = Judge()
    assert_frame_equal(teachers.cached(judge, tmp_path)(frame), expected)
    assert judge.calls == [["tr2"]]
    assert_frame_equal(teachers.cached(judge, tmp_path)(frame), expected)
    assert len(judge.calls) == 1
    assert "ignored a damaged line" in caplog.text


def test_a_failure_is_not_cached(train_part, tmp_path):
    frame = train_part.results.head(16)
    silent = pt.apply.generic(lambda results: results[results["qid"] != "tr0"])
    assert teachers.cached(silent, tmp_path)(frame)["qid"].unique().tolist() == ["tr1"]
    judge = Judge()
    assert len(teachers.cached(judge, tmp_path)(frame)) == 16
    assert judge.calls == [["tr0"]]
    with pytest.raises(ValueError, match=r"scores must be numeric; 8 of 8 aren't"):
        teachers.cached(pt.apply.generic(lambda res: res.assign(score=float("nan"))), tmp_path / "nan")(frame)
    assert not (tmp_path / "nan" / "rankings.jsonl").exists()


def test_invalid_uses_of_cached(train_part, tmp_path):
    with pytest.raises(ValueError, match="teacher must be a transformer; got 3"):
        teachers.cached(3, tmp_path)
    with pytest.raises(ValueError, match="batch_size must be a positive integer; got 0"):
        teachers.cached(Judge(), tmp_path, batch_size=0)
    unfaithful = pt.apply.generic(lambda results: results.assign(docno="x" + results["docno"]))
    with pytest.raises(ValueError, match=r"got 8 other documents for query 'tr0', e\.g\. 'xtr0d0'"):
        teachers.cached(unfaithful, tmp_path)(train_part.results)
    with pytest.raises(pt.validate.InputValidationError, match="query"):
        teachers.cached(Judge(), tmp_path)(train_part.results.drop(columns="query"))


# ---- training


@pytest.mark.parametrize("kept", [False, True])
def test_fit_with_a_transformer_as_teacher(ce, train_part, test_part, tmp_path, kept):
    judge = Judge()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = pt.Evaluate(ce(test_part.results), test_part.qrels, [RR @ 10])["RR@10"]
    fitter = Distillation(
        teacher=teachers.cached(judge, tmp_path) if kept else judge, learning_rate=1e-2, epochs=3, batch_size=8
    )
    ce.fit(train_part.results, fitter=fitter)
    after = pt.Evaluate(ce(test_part.results), test_part.qrels, [RR @ 10])["RR@10"]
    assert after > max(before, 0.6)
    assert sum(map(len, judge.calls)) == 64


def test_fit_with_files(ce, train_part, tmp_path):
    part = train_part.results.merge(train_part.qrels, how="left").fillna({"label": 0})
    taught, labelled = [], []
    for qid, rows in part.groupby("qid"):
        texts, labels = rows["text"].tolist(), rows["label"].to_numpy()
        order = (np.argsort(-labels, kind="stable") + 1).tolist()
        taught.append({"qid": qid, "query": rows["query"].iloc[0], "unsorted_docs": texts, "re_rank_id": order})
        sides = [[{"text": t} for t, y in zip(texts, labels, strict=True) if y == side] for side in (1, 0)]
        labelled.append({"query": rows["query"].iloc[0], "positive_passages": sides[0], "negative_passages": sides[1]})
    quick = {"learning_rate": 1e-2, "max_steps": 2}
    ce.fit(teachers.read_permutations(write(tmp_path / "kd.jsonl", *taught)), fitter=Distillation(**quick))
    assert (ce.data_report.groups, ce.data_report.documents) == (64, 512)
    ce.fit(*teachers.read_labelled_passages(write(tmp_path / "cl.jsonl", *labelled)), fitter=Contrastive(**quick))
    assert (ce.data_report.groups, ce.data_report.documents) == (64, 512)


@pytest.mark.filterwarnings("ignore:re-ranking")
def test_cached_pipelines_know_their_weights(backbone, train_part, tmp_path):
    results, qrels = train_part.results.head(128), train_part.qrels
    short = Contrastive(n_negatives=3, max_steps=1, warmup=0, learning_rate=1e-2, batch_size=8)
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu").fit(results, qrels, fitter=short)
    pipeline = pt.apply.generic(lambda frame: frame) >> ce
    cached = teachers.cached(pipeline, tmp_path)
    before = cached(results)["score"]
    np.testing.assert_allclose(before, pipeline(results)["score"], atol=1e-6)
    ce.fit(results, qrels, fitter=short)
    after = cached(results)["score"]
    assert not np.allclose(before, after)
    np.testing.assert_allclose(after, pipeline(results)["score"], atol=1e-6)
    ce.interpolate = 2.0
    for frame in (results, results.assign(score=results["score"] * 3)):
        np.testing.assert_allclose(cached(frame)["score"], pipeline(frame)["score"], atol=1e-5)


def test_the_score_in_the_text_is_part_of_the_key(backbone, train_part, tmp_path):
    results = train_part.results.head(16)
    pipeline = PrependScore() >> MonoCE(backbone, max_length=24, dtype="float32", device="cpu")
    cached = teachers.cached(pipeline, tmp_path)
    for frame in (results, results.assign(score=results["score"] ** 4)):
        np.testing.assert_allclose(cached(frame)["score"], pipeline(frame)["score"], atol=1e-5)


def test_a_bi_encoder_reads_the_first_stages_scores(tmp_path, train_part):
    model = str(write_tiny_bert(tmp_path / "model"))
    rows = train_part.results.head(8)
    other = rows.assign(score=rows["score"] * [1, 1, 1, 1, 1, 1, 1, -9])
    teacher = unlabelled.BiEncoder(model, device="cpu")
    cached = teachers.cached(teacher, tmp_path / "cache")
    cached(rows)
    assert_frame_equal(cached(other), teacher(other), check_exact=False)


def test_texts_of_one_docno_that_differ(tmp_path, train_part):
    rows = train_part.results.head(4)
    cached = teachers.cached(pt.apply.doc_score(lambda row: len(row["text"])), tmp_path)
    assert len(cached(pd.concat([rows, rows]))) == 8
    with pytest.raises(ValueError, match="results must have one row for each qid and docno; got several that differ"):
        cached(pd.concat([rows, rows.assign(text="other")]))


CONTRADICTION = "rank and a score that contradict each other for 7 of 7 neighbouring documents"


def test_ranks_that_contradict_scores(train_part, tmp_path):
    rows = train_part.results.head(8)
    stale = rows.assign(rank=7 - rows["rank"])
    as_text = stale.astype({"rank": str, "score": str})
    for results, teacher in ((rows, stale), (rows, as_text), (stale, None), (rows, {"a": stale, "b": rows})):
        with pytest.warns(UserWarning, match=CONTRADICTION):
            Distillation(teacher=teacher).groups(results, None)
    reverse = pt.apply.generic(lambda frame: frame.assign(rank=7 - frame["rank"]))  # leaves the scores as they were
    for each in (reverse, teachers.cached(reverse, tmp_path)):
        with pytest.warns(UserWarning, match=CONTRADICTION):
            Distillation(teacher=each).groups(rows, None)
    reranker = pt.apply.generic(lambda frame: frame.assign(score=-frame["score"]))  # leaves the ranks as they were
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for teacher in (rows, rows.assign(rank=np.nan), reranker):
            Distillation(teacher=teacher).groups(rows, None)
    assert not [w for w in caught if "contradict" in str(w.message)]


def test_texts_that_a_teacher_looks_up_are_part_of_the_key(backbone, train_part, tmp_path):
    class Texts:
        def __init__(self, prefix):
            self.texts = prefix + train_part.results.set_index("docno")["text"]

        def text_loader(self, fields):
            return pt.apply.generic(lambda frame: frame.assign(text=self.texts.loc[frame["docno"]].to_numpy()))

    results, scores = train_part.results.head(8).drop(columns="text"), []
    for prefix in ("", "apple banana "):
        ce = MonoCE(backbone, text=Texts(prefix), max_length=24, dtype="float32", device="cpu")
        scores.append(teachers.cached(ce, tmp_path)(results)["score"])
        assert scores[-1].tolist() == pytest.approx(ce(results)["score"].tolist())
    assert scores[0].tolist() != pytest.approx(scores[1].tolist())
