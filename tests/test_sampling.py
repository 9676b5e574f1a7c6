"""Which documents an epoch draws, by the settings of `Contrastive` and `Distillation`."""

import dataclasses
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyterrier_msft import Contrastive, Distillation, MonoCE, losses
from pyterrier_msft.data.groups import Groups


def ranked(n: int, qid: str = "q", prefix: str = "d") -> pd.DataFrame:
    """The results of a query, best first: d1, d2, ..."""
    docnos = [f"{prefix}{rank}" for rank in range(1, n + 1)]
    return pd.DataFrame({"qid": qid, "query": f"query {qid}", "docno": docnos, "text": docnos, "rank": range(1, n + 1)})


def judged(*docnos: str, qid: str = "q") -> pd.DataFrame:
    return pd.DataFrame({"qid": qid, "docno": [*docnos], "label": 1})


def make(fitter, results, qrels=None) -> Groups:
    return fitter.groups(results, qrels)[0]


def draw(groups: Groups, epoch: int = 0, *, index: int = 0, seed: int = 42) -> list[str]:
    return groups.draw_all([(index, epoch)], seed=seed)[0].texts


def ranks(docnos) -> list[int]:
    return [int(docno[1:]) for docno in docnos]


# ---- negatives from the first stage


def test_the_defaults_sample_uniformly_with_the_same_random_numbers_as_ever():
    groups = make(Contrastive(n_negatives=5, depth=20), ranked(30), judged("d3", "d25"))
    negatives = [f"d{rank}" for rank in range(1, 21) if rank != 3]
    for epoch in range(3):
        rng = np.random.default_rng([42, epoch, 0])
        expected = [["d3", "d25"][i] for i in rng.choice([0, 1], 1, replace=False)]
        assert draw(groups, epoch) == expected + [negatives[i] for i in rng.choice(19, 5, replace=False)]


@pytest.mark.parametrize("sample", ["uniform", "log"])
def test_skipped_ranks_are_never_negatives(sample):
    fitter = Contrastive(n_negatives=3, skip=5, depth=12, sample=sample)
    groups = make(fitter, ranked(30), judged("d2", "d7", "d25"))
    seen = [draw(groups, epoch) for epoch in range(200)]
    assert all(len(set(texts)) == 4 for texts in seen)
    assert {texts[0] for texts in seen} == {"d2", "d7", "d25"}  # relevant documents may have any rank
    assert {*ranks(text for texts in seen for text in texts[1:])} == {6, 8, 9, 10, 11, 12}


def test_duplicates_and_empty_texts_have_no_rank():
    results = pd.concat([ranked(2), ranked(6)]).assign(rank=range(8))
    results.loc[results["docno"] == "d3", "text"] = ""
    groups = make(Contrastive(n_negatives=9, skip=2, depth=4), results, judged("d1"))
    assert draw(groups) == ["d1", "d4", "d5"]


def test_the_top_negatives_in_order():
    groups = make(Contrastive(n_negatives=3, skip=1, sample="top"), ranked(30), judged("d3", "d9"))
    assert {tuple(draw(groups, epoch)[1:]) for epoch in range(20)} == {("d2", "d4", "d5")}
    assert {draw(groups, epoch)[0] for epoch in range(20)} == {"d3", "d9"}


def test_log_sampling_has_the_weights_that_are_stated():
    fitter, n = Contrastive(n_negatives=1, skip=2, depth=8, sample="log"), 1000
    groups = make(fitter, ranked(20), judged("d4"))
    counts = Counter(group.texts[1] for group in groups.draw_all([(0, epoch) for epoch in range(n)], seed=1))
    weights = {docno: 1 / np.log2(1 + 2 + k) for k, docno in enumerate(["d3", "d5", "d6", "d7", "d8"], 1)}
    assert counts.keys() == weights.keys()
    for docno, weight in weights.items():
        share = weight / sum(weights.values())
        assert abs(counts[docno] / n - share) < 4 * np.sqrt(share * (1 - share) / n)  # four standard errors
    assert counts["d3"] > 1.2 * counts["d8"]  # the first has 1.58 times the weight


# ---- random negatives


def test_random_negatives_come_from_other_queries():
    results = pd.concat([ranked(4), ranked(5, "r", "e")]).assign(score=lambda frame: -frame["rank"])
    results = pd.concat([results, ranked(1, "s", "d").assign(docno="d9", text="d9", score=1.0)])  # without a positive
    qrels = pd.concat([judged("d1", "e2"), judged("e1", qid="r"), judged("e3", qid="s")])
    groups = make(Contrastive(n_negatives=2, skip=1, n_random=2, depth=3), results, qrels)
    hard, random = (
        {text for epoch in range(60) for text in draw(groups, epoch)[part]} for part in (slice(1, 3), slice(3, 5))
    )
    assert hard == {"d2", "d3"}
    assert random == {"e1", "e3"}  # e2 is relevant, e4 and e5 are below the depth
    other = {text for epoch in range(60) for text in draw(groups, epoch, index=1)[3:]}
    assert other == {"d1", "d2", "d3"}
    group = groups.draw_all([(0, 0)], seed=42)[0]
    assert group.labels.tolist() == [1, 0, 0, 0, 0]
    assert group.labels.dtype == np.float32


DOCNOS = ["a", "b", "c%p0", "c%p1", "d", "e", "f%p0", "f", "g"]


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.tuples(st.sampled_from("123"), st.sampled_from(DOCNOS)), min_size=6, max_size=27, unique=True),
    st.sets(st.tuples(st.sampled_from("123"), st.sampled_from("abcdefg")), min_size=1),
    st.sampled_from([1, 3, None]),
    st.integers(1, 5),
    st.booleans(),
)
def test_random_negatives_of_any_results(pairs, relevant, depth, n_random, drops_one):
    rows = [(qid, docno, f"query {qid}", f"text {docno}", -i) for i, (qid, docno) in enumerate(pairs)]
    results = pd.DataFrame(rows, columns=["qid", "docno", "query", "text", "score"])
    qrels = pd.DataFrame([(*pair, 1) for pair in relevant], columns=["qid", "docno", "label"])
    fitter = Contrastive(n_negatives=2, n_random=n_random, depth=depth)
    try:
        groups = make(fitter, results, qrels)
    except ValueError:  # nothing to learn from
        return
    pool = set(groups.texts)
    if drops_one and len(groups) > 1:
        groups = groups.without(groups.qids[:1])
    drawn = [group for epoch in range(3) for group in groups.draw_all([(i, epoch) for i in range(len(groups))], seed=3)]
    for group in drawn:
        own = [docno for qid, docno in pairs if qid == group.qid][:depth]
        forbidden = {f"text {docno}" for docno in DOCNOS if (group.qid, docno.partition("%")[0]) in relevant}
        forbidden |= {f"text {docno}" for docno in own}
        n = min(n_random, len(pool - forbidden))
        random = group.texts[len(group.texts) - n :]
        assert not {*random} & forbidden
        assert len({*group.texts}) == len(group.texts)
        assert not group.labels[len(group.texts) - n :].any()
        assert np.count_nonzero(group.labels == 0) <= 2 + n
    assert groups.drawn_documents() * 3 == sum(len(group.texts) for group in drawn)


# ---- lists of a teacher

TEACHER = ranked(20)[["qid", "docno"]].assign(score=[-(7 * rank) % 20 for rank in range(20)])  # all different
ORDER = TEACHER.sort_values("score", ascending=False)["docno"].tolist()


def lists(n: int, sample: str = "stratified", *, epochs: int = 300, **options) -> list[list[str]]:
    fitter = Distillation(teacher=TEACHER, n_documents=n, sample=sample, **options)
    groups = make(fitter, ranked(20))
    drawn = groups.draw_all([(0, epoch) for epoch in range(epochs)], seed=5)
    scores = dict(zip(TEACHER["docno"], TEACHER["score"], strict=True))
    for group in drawn:
        assert group.labels.tolist() == [scores[text] for text in group.texts]  # the number of lower documents
        assert ranks(group.texts) == sorted(ranks(group.texts))  # in the first stage's order
        assert len({*group.texts}) == n
    return [group.texts for group in drawn]


@pytest.mark.parametrize("n", [2, 6, 7, 19])
def test_a_stratified_list_has_a_document_of_each_part_of_the_teachers_ranking(n):
    drawn = lists(n)
    sizes = [20 * (part + 1) // n - 20 * part // n for part in range(n)]
    assert max(sizes) - min(sizes) <= 1
    parts = [{*part} for part in np.split(np.array(ORDER), np.cumsum(sizes)[:-1])]
    assert all(len(part & {*texts}) == 1 for texts in drawn for part in parts)
    assert {text for texts in drawn for text in texts} == {*ORDER}


def test_the_other_ways_to_draw_a_list():
    assert {frozenset(texts) for texts in lists(6, "top", epochs=5)} == {frozenset(ORDER[:6])}
    uniform = Counter(text for texts in lists(6, "random") for text in texts)
    assert uniform.keys() == {*ORDER}
    assert all(abs(count - 300 * 6 / 20) < 5 * np.sqrt(300 * 0.3 * 0.7) for count in uniform.values())
    for n, n_top in ((6, 3), (7, 4)):
        both = lists(n, "top_and_random")
        assert all({*ORDER[:n_top]} < {*texts} for texts in both)
        assert {text for texts in both for text in texts} == {*ORDER}


@pytest.mark.parametrize("sample", ["stratified", "random", "top_and_random"])
def test_each_epoch_has_another_list(sample):
    drawn = lists(8, sample, epochs=20)
    assert len({tuple(texts) for texts in drawn}) == 20
    assert drawn == lists(8, sample, epochs=20)


def test_a_list_of_at_most_n_documents_is_kept():
    whole = make(Distillation(teacher=TEACHER), ranked(20))
    assert draw(whole, 3) == ranked(20)["docno"].tolist()
    short = make(Distillation(n_documents=8), ranked(5))
    assert draw(short, 3) == ranked(5)["docno"].tolist()


@pytest.mark.filterwarnings("ignore:the teacher's ranking looks upside down")
def test_tied_documents_are_in_the_first_stages_order():
    groups = make(Distillation(teacher=TEACHER[18:], unranked="last", n_documents=4, sample="top"), ranked(20))
    assert draw(groups) == ["d1", "d2", "d19", "d20"]


# ---- what depends on the samples

FITTERS = [
    Contrastive(n_negatives=3), Contrastive(n_negatives=3, skip=2), Contrastive(n_negatives=3, sample="top"),
    Contrastive(n_negatives=3, sample="log"), Contrastive(n_negatives=3, n_random=2),
    Contrastive(n_negatives=3, n_random=3), Distillation(depth=7), Distillation(n_documents=4),
    Distillation(n_documents=5), *(Distillation(n_documents=4, sample=s) for s in ("top", "random", "top_and_random")),
]  # fmt: skip


def test_digests_differ_exactly_where_settings_do(train_part):
    def digests(fitters):
        results = train_part.results.head(8 * 8)
        groups = [make(fitter, results, train_part.qrels) for fitter in fitters]
        return [(fitter.digest(), group.digest()) for fitter, group in zip(fitters, groups, strict=True)]

    first = digests(FITTERS)
    assert first[4:8] == digests(FITTERS[4:8])
    assert [len(set(column)) for column in zip(*first, strict=True)] == [len(FITTERS)] * 2


def test_a_digest_includes_what_random_negatives_avoid(train_part):
    def digest(n_random, qrels):
        return make(Contrastive(n_random=n_random), train_part.results, qrels).digest()

    # A document of another query becomes relevant; the groups stay the same otherwise.
    more = pd.concat([train_part.qrels, judged("tr1d0", qid="tr0")])
    assert digest(1, train_part.qrels) != digest(1, more)
    assert digest(0, train_part.qrels) == digest(0, more)


@pytest.mark.parametrize(
    ("fitter", "size"),
    [
        (Contrastive(n_negatives=3, skip=1, sample="log", n_random=2), 6),
        (Distillation(n_documents=5), 5),
    ],
)
def test_training_has_lists_of_these_sizes(ce: MonoCE, train_part, fitter, size):
    sizes, results = [], train_part.results.head(8 * 12)

    @losses.needs("order")
    def counting(scores, labels, mask):
        sizes.extend(mask.sum(-1).tolist())
        return losses.ranknet(scores, labels, mask)

    fitter = dataclasses.replace(fitter, loss=counting, epochs=1, batch_size=12, learning_rate=1e-3)
    before = ce.fingerprint
    ce.fit(results, train_part.qrels, fitter=fitter)
    assert sizes == [size] * 12
    assert make(fitter, results, train_part.qrels).drawn_documents() == 12 * size
    assert np.isfinite(ce.history["loss"]).all()
    assert ce.fingerprint != before


def test_a_checkpoint_of_other_samples_is_refused(ce: MonoCE, train_part, tmp_path):
    results = train_part.results.head(8 * 4)
    fitter = Contrastive(n_negatives=3, max_steps=1, warmup=0, batch_size=4, learning_rate=1e-3)
    ce.clone().fit(results, train_part.qrels, fitter=fitter, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"holds a checkpoint of another training run: .*skip"):
        fitter = dataclasses.replace(fitter, skip=1)
        ce.clone().fit(results, train_part.qrels, fitter=fitter, checkpoint_dir=tmp_path)


def test_only_random_negatives(train_part, ce):
    fitter = Contrastive(n_negatives=0, n_random=2)
    groups, _ = fitter.groups(train_part.results, train_part.qrels)
    own = {qid: {*frame["text"]} for qid, frame in train_part.results.groupby("qid")}
    for group in groups.draw_all([(i, 0) for i in range(len(groups))], seed=1):
        relevant = [text for text in group.texts if text in own[group.qid]]
        assert len(relevant) == 1
        assert len(group.texts) == 3
    with pytest.raises(ValueError, match="n_negatives must be a positive integer without n_random; got 0"):
        Contrastive(n_negatives=0)
