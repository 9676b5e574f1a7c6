"""Results in files: chunks give the same groups as a frame, and texts are looked up later."""

import dataclasses
import warnings

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyterrier_msft import Contrastive, Distillation, MonoCE, Stage, fit_sequences, losses
from pyterrier_msft.data import runs
from pyterrier_msft.data.groups import Groups
from pyterrier_msft.data.report import DataReport

pl = pytest.importorskip("polars")
FAST = {"learning_rate": 1e-2, "epochs": 2, "batch_size": 8}


class Dataset:
    """Texts and queries for a file that lacks them; counts look-ups."""

    def __init__(self, part):
        self.documents = part.results.drop_duplicates("docno").set_index("docno")["text"]
        self.topics = part.results[["qid", "query"]].drop_duplicates()
        self.loads = 0

    def get_topics(self):
        return self.topics

    def text_loader(self, fields):
        def load(frame):
            self.loads += 1
            return frame.assign(text=self.documents.reindex(frame["docno"]).to_numpy())

        return load


def write(frame: pd.DataFrame, folder, kind: str):
    path = folder / f"run{kind}"
    if kind == ".parquet":
        pl.DataFrame({column: frame[column].tolist() for column in frame.columns}).write_parquet(path)
    else:
        lines = frame.assign(Q0="Q0", tag="t")[["qid", "Q0", "docno", "rank", "score", "tag"]]
        lines.to_csv(path, sep="\t" if "tab" in kind else " ", header=False, index=False)
    return path


@pytest.fixture(scope="module")
def results(train_part) -> pd.DataFrame:
    """The part's results with scores."""
    results = train_part.results.reset_index(drop=True)
    rank = results.groupby("qid").cumcount()
    return results.assign(rank=rank, score=30.0 - rank)


def read(fitter, source, part, dataset=None):
    if dataset is None:
        return fitter.groups(source, part.qrels)
    return fitter.groups(source, part.qrels, load_text=dataset.text_loader(["text"]), topics=dataset.get_topics())


@pytest.mark.parametrize("kind", [".trec", ".tab.trec", ".trec.gz", ".parquet"])
@pytest.mark.parametrize("rows", [7, 1_000_000])
@pytest.mark.parametrize("depth", [3, None])
@pytest.mark.parametrize("objective", ["labels", "ranking", "teacher"])
def test_a_file_gives_the_groups_of_the_frame(results, train_part, tmp_path, monkeypatch, kind, rows, depth, objective):
    monkeypatch.setattr(runs, "CHUNK_ROWS", rows)
    teacher = results[["qid", "docno"]].assign(score=np.random.default_rng(0).random(len(results)))
    fitter = {
        "labels": Contrastive(n_negatives=4, depth=depth),
        "ranking": Distillation(depth=depth),
        "teacher": Distillation(depth=depth, teacher=teacher),
    }[objective]
    dataset = Dataset(train_part)
    expected, expected_report = read(fitter, results, train_part)
    groups, report = read(fitter, write(results, tmp_path, kind), train_part, dataset)
    assert dataset.loads == 0  # texts are looked up in training
    assert_same(groups, expected)
    assert_same_report(report, expected_report)


def assert_same(groups: Groups, expected: Groups) -> None:
    assert groups.qids == expected.qids
    for index in range(len(groups)):
        a, b = (g.draw_all([(index, 2)], seed=1)[0] for g in (groups, expected))
        assert (a.qid, a.query, a.texts) == (b.qid, b.query, b.texts)
        np.testing.assert_array_equal(a.labels, b.labels)


def assert_same_report(report: DataReport, expected: DataReport) -> None:
    for name, value in dataclasses.asdict(expected).items():
        assert getattr(report, name) == pytest.approx(value), name


IDS = st.sampled_from(["a", "b", "b%p0", "b%p1", "c", "d", "e%p0", "e"])
SCORES = st.sampled_from([-1.0, 0.0, 0.5, 2.0, 2.0, 3.0])


@st.composite
def runs_and_judgments(draw):
    """Results grouped by query, with duplicates and ties; labels of all kinds; a teacher's ranking."""
    row = st.tuples(st.sampled_from(["1", "2", "10"]), IDS, SCORES)
    rows = sorted(draw(st.lists(row, min_size=1, max_size=25)), key=lambda row: row[0])
    results = pd.DataFrame(rows, columns=["qid", "docno", "score"])
    query = "query " + results["qid"]
    if draw(st.booleans()):
        query = query.where(results["docno"] != "c", draw(st.sampled_from([" ", "another query"])))
    results = results.assign(query=query, text="text of " + results["docno"])
    if draw(st.booleans()):
        results = results.rename(columns={"score": "rank"})
    pairs = st.tuples(st.sampled_from(["1", "2", "3"]), IDS.map(lambda docno: docno.partition("%")[0]))
    judged = draw(st.dictionaries(pairs, st.sampled_from([-1, 0, 0.5, 1, 2]), max_size=9))
    qrels = pd.DataFrame([(*pair, label) for pair, label in judged.items()], columns=["qid", "docno", "label"])
    taught = draw(st.lists(st.tuples(st.sampled_from(["1", "2"]), IDS, SCORES), min_size=1, max_size=12))
    return results, qrels.astype({"label": float}), pd.DataFrame(taught, columns=["qid", "docno", "score"])


@settings(deadline=None, max_examples=40)
@given(
    runs_and_judgments(),
    st.sampled_from(
        [
            "labels",
            "labels and missing ones",
            "random negatives",
            "ranking",
            "scores",
            "teacher",
            "teacher, others last",
        ]
    ),
    st.sampled_from([1, 2, 3, None]),
    st.sampled_from([1, 4, 1_000_000]),
)
def test_any_file_gives_the_groups_of_its_frame(tmp_path_factory, data, objective, depth, rows):
    results, qrels, teacher = data
    options = {"n_negatives": 2, "depth": depth}
    if objective == "labels":
        fitter = Contrastive(**options)
    elif objective == "random negatives":
        fitter = Contrastive(**options, n_random=2, skip=0 if depth == 1 else 1, sample="log")
    elif objective == "labels and missing ones":
        fitter = Contrastive(**options, add_missing_positives=True)
    else:
        fitter = Distillation(
            depth=None if depth == 1 else depth,
            teacher=None if objective == "ranking" else teacher,
            loss=losses.margin_mse if objective == "scores" else losses.ranknet,
            unranked="last" if objective.endswith("last") else "drop",
        )

    def load(frame):
        return frame.assign(text="text of " + frame["docno"])

    def outcome(source):
        try:
            return fitter.groups(source, qrels, load_text=load)
        except ValueError as error:
            return str(error).partition(":")[0]  # the explanation depends on the first chunk

    path = write(results.drop(columns="text"), tmp_path_factory.mktemp("runs"), ".parquet")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the teacher may look upside down
        patch.setattr(runs, "CHUNK_ROWS", rows)
        by_frame, by_file = outcome(results), outcome(path)
    if isinstance(by_frame, str):
        assert by_file == by_frame
    else:
        assert not isinstance(by_file, str), by_file
        assert_same(by_file[0], by_frame[0])
        assert_same_report(by_file[1], by_frame[1])


@pytest.mark.parametrize("known", ["some", "none"])
def test_scores_are_recognized_in_the_first_chunk_with_rows(results, train_part, tmp_path, monkeypatch, known):
    monkeypatch.setattr(runs, "CHUNK_ROWS", 20)
    dataset, fitter = Dataset(train_part), Distillation(loss=losses.margin_mse)
    scored = results.assign(score=np.random.default_rng(0).random(len(results)))
    path = write(scored.drop(columns=["query", "rank"]), tmp_path, ".parquet")
    dataset.topics = dataset.topics.iloc[40:] if known == "some" else dataset.topics.head(1).assign(qid="nobody")
    if known == "some":
        assert len(read(fitter, path, train_part, dataset)[0]) == 24
    else:
        with pytest.raises(ValueError, match=r"topics must have the queries .*'tr0' in the results and 'nobody' in"):
            read(fitter, path, train_part, dataset)


def test_an_empty_file(results, train_part, tmp_path):
    with pytest.raises(ValueError, match="the results are empty"):
        read(Contrastive(), write(results.head(0), tmp_path, ".parquet"), train_part, Dataset(train_part))


def test_other_texts_give_another_model(results, train_part, backbone, tmp_path):
    path, datasets = write(results, tmp_path, ".parquet"), [Dataset(train_part), Dataset(train_part)]
    datasets[1].documents = "w1 " + datasets[1].documents
    stage = Stage(Contrastive(n_negatives=3, max_steps=2, batch_size=8), path, train_part.qrels)
    found = [
        fit_sequences(
            MonoCE(backbone, max_length=24, device="cpu", text=dataset), {"CL": stage}, ["CL"], save_dir=tmp_path / "m"
        )["CL"].fingerprint
        for dataset in (*datasets, *datasets)
    ]
    assert found[:2] == found[2:]
    assert found[0] != found[1]
    ce = MonoCE(backbone, max_length=24, device="cpu")
    for source in (path, results.drop(columns="text")):
        digests = {ce.apply_attributes(text=dataset).text_source.digest(source) for dataset in (*datasets, *datasets)}
        assert len(digests) == 2
    assert ce.apply_attributes(text=datasets[0]).text_source.digest(results) == ""


def test_texts_anywhere_in_a_file_are_part_of_the_digest(results, train_part, backbone, tmp_path):
    ce, dataset = MonoCE(backbone, device="cpu"), Dataset(train_part)
    for kind in (".trec.gz", ".parquet"):
        path, digests = write(results, tmp_path, kind), set()
        for half in (slice(0, 0), slice(0, len(results) // 2), slice(len(results) // 2, None)):
            changed = Dataset(train_part)
            changed.documents = dataset.documents.copy()
            changed.documents.iloc[half] = "other text"
            digests.add(ce.apply_attributes(text=changed).text_source.digest(path))
        assert len(digests) == 3


def test_topics_are_read_for_a_file_without_queries_only(results, train_part, backbone, tmp_path):
    dataset = Dataset(train_part)
    dataset.get_topics = lambda: 1 / 0
    ce = MonoCE(backbone, max_length=24, device="cpu", text=dataset)
    stage = Stage(Contrastive(n_negatives=3, max_steps=1), write(results, tmp_path, ".parquet"), train_part.qrels)
    fit_sequences(ce, {"CL": stage}, ["CL"], save_dir=tmp_path / "models")
    with pytest.raises(ZeroDivisionError):
        ce.fit(write(results, tmp_path, ".trec"), train_part.qrels)


def test_chunks_that_the_teacher_did_not_rank(results, train_part, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "CHUNK_ROWS", 20)
    qid = results["qid"].iloc[-1]
    teacher = results[results["qid"] == qid][["qid", "docno", "score"]]
    groups, _ = read(
        Distillation(teacher=teacher), write(results, tmp_path, ".parquet"), train_part, Dataset(train_part)
    )
    assert groups.qids == [qid]
    unmatched = teacher.assign(qid="nobody")
    with pytest.raises(ValueError, match=r"none in common: the qids don't match, e\.g\. 'tr0' .* and 'nobody'"):
        read(Distillation(teacher=unmatched), tmp_path / "run.parquet", train_part, Dataset(train_part))


def test_fit_from_a_file_gives_the_weights_of_the_frame(results, train_part, backbone, tmp_path):
    path = write(results, tmp_path, ".parquet")
    # The order of batches depends on the lengths of texts, which a file lacks: use one batch per epoch.
    fitter = Contrastive(n_negatives=3, **{**FAST, "batch_size": 64})
    options = {"max_length": 24, "dtype": "float32", "device": "cpu", "fitter": fitter}
    by_frame = MonoCE(backbone, **options).fit(results, train_part.qrels)
    by_file = MonoCE(backbone, **options, text=Dataset(train_part)).fit(path, train_part.qrels)
    a, b = (ce.history["loss"].to_numpy() for ce in (by_frame, by_file))
    np.testing.assert_allclose(a, b, rtol=1e-4)


def test_a_stage_from_a_file_is_trained_once(results, train_part, backbone, tmp_path):
    path = write(results, tmp_path, ".trec")
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu", text=Dataset(train_part))
    stage = Stage(Contrastive(n_negatives=3, **FAST), path, train_part.qrels)
    first = fit_sequences(ce, {"CL": stage}, ["CL"], save_dir=tmp_path / "models")["CL"]
    assert fit_sequences(ce, {"CL": stage}, ["CL"], save_dir=tmp_path / "models")["CL"].fingerprint == first.fingerprint
    assert dataclasses.replace(stage, results=write(results.head(40), tmp_path, ".parquet")).digest() != stage.digest()


def test_an_error_of_the_text_source_is_raised(results, train_part, backbone, tmp_path):
    dataset = Dataset(train_part)
    ce = MonoCE(backbone, max_length=24, device="cpu", text=dataset)
    ce.fit(write(results, tmp_path, ".trec"), train_part.qrels, fitter=Contrastive(n_negatives=3, max_steps=1))
    dataset.text_loader = lambda fields: lambda frame: frame.assign(text=1 / 0)
    with pytest.raises(ZeroDivisionError):
        ce.fit(tmp_path / "run.trec", train_part.qrels, fitter=Contrastive(n_negatives=3))


def test_missing_texts(results, train_part, backbone, tmp_path):
    dataset = Dataset(train_part)
    ce = MonoCE(backbone, max_length=24, device="cpu", text=dataset)
    path, fitter = write(results, tmp_path, ".trec"), Contrastive(n_negatives=3, max_steps=2)
    dataset.documents = dataset.documents.iloc[::2]
    with pytest.warns(UserWarning, match="some documents have no text, e.g."):
        ce.fit(path, train_part.qrels, fitter=fitter)
    dataset.documents = dataset.documents.head(0)
    with pytest.raises(ValueError, match=r"text source: .* documents have no text, e\.g\."):
        ce.fit(path, train_part.qrels, fitter=fitter)


@pytest.fixture
def irds(results, train_part, tmp_path, request):
    """An ir_datasets collection with a document store on disk."""
    ir_datasets = pytest.importorskip("ir_datasets")
    tables = {
        "docs": results[["docno", "text"]].drop_duplicates(),
        "queries": results[["qid", "query"]].drop_duplicates(),
        "qrels": train_part.qrels.assign(iteration=0)[["qid", "iteration", "docno", "label"]],
    }
    for name, table in tables.items():
        table.to_csv(tmp_path / name, sep=" " if name == "qrels" else "\t", header=False, index=False)
    paths = {f"{name}_{kind}": str(tmp_path / name) for name, kind in zip(tables, ("tsv", "tsv", "trec"), strict=True)}
    name = f"tiny-{tmp_path.name}"
    ir_datasets.registry.register(name, ir_datasets.create_dataset(**paths))
    return pt.get_dataset(f"irds:{name}")


def test_texts_and_queries_of_an_irds_collection(results, train_part, backbone, tmp_path, irds):
    path = write(results.drop(columns="query"), tmp_path, ".parquet")
    settings = {"max_length": 24, "dtype": "float32", "device": "cpu"}
    fitter = Contrastive(n_negatives=3, **{**FAST, "batch_size": 64})
    by_frame = MonoCE(backbone, **settings).fit(results, train_part.qrels, fitter=fitter)
    by_file = MonoCE(backbone, **settings, text=irds).fit(path, irds.get_qrels(), fitter=fitter)
    np.testing.assert_allclose(by_file.history["loss"], by_frame.history["loss"], rtol=1e-4)
    scores = by_file(results.drop(columns="text"))["score"]
    np.testing.assert_allclose(scores, by_file(results)["score"], atol=1e-6)
    with pytest.raises(ValueError, match=r"text source must have all documents of the results.*nowhere"):
        by_file(results.drop(columns="text").replace({"docno": {"tr0d0": "nowhere"}}))
    adding = Contrastive(n_negatives=3, max_steps=1, add_missing_positives=True)
    with pytest.raises(ValueError, match=r"of the qrels with add_missing_positives=True; not found.*nowhere"):
        by_file.fit(results, train_part.qrels.assign(docno="nowhere"), fitter=adding)


def test_relevant_documents_that_are_missing_are_added(results, train_part, tmp_path):
    relevant = train_part.qrels[train_part.qrels["label"] > 0]
    without = results[~results["docno"].isin(relevant["docno"].head(10))]
    fitter = Contrastive(n_negatives=4, add_missing_positives=True)
    dataset = Dataset(train_part)
    expected, _ = fitter.groups(without, train_part.qrels, load_text=dataset.text_loader(["text"]))
    groups, report = read(fitter, write(without, tmp_path, ".trec"), train_part, dataset)
    assert groups.qids == expected.qids
    assert report.without_relevant == 0


@pytest.mark.parametrize("rows", [7, 1_000_000])
@pytest.mark.parametrize("kind", [".trec", ".parquet"])
def test_queries_that_the_topics_lack_are_dropped(results, train_part, tmp_path, monkeypatch, rows, kind):
    """They are counted as those of a frame without a query are. This includes whole chunks of such queries."""
    monkeypatch.setattr(runs, "CHUNK_ROWS", rows)
    dataset = Dataset(train_part)
    dataset.topics = dataset.topics.iloc[20:23]
    known = results["query"].where(results["qid"].isin(dataset.topics["qid"]))
    expected, expected_report = read(Contrastive(n_negatives=4), results.assign(query=known), train_part)
    assert (expected_report.queries, expected_report.groups, expected_report.without_query) == (64, 3, 61 * 8)
    path = write(results.drop(columns="query"), tmp_path, kind)
    groups, report = read(Contrastive(n_negatives=4), path, train_part, dataset)
    assert_same(groups, expected)
    assert_same_report(report, expected_report)
    [*chunks] = runs.read_run(path, depth=2, topics=dataset.topics)
    assert pd.concat([chunk.frame() for chunk in chunks])["qid"].unique().tolist() == dataset.topics["qid"].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.sample(frac=1, random_state=0), "must have the rows of a query together"),
        (lambda f: f.drop(columns=["rank", "score"]), "must have a score or a rank"),
        (lambda f: f.drop(columns="docno"), "must have the columns"),
    ],
)
def test_a_file_with_another_format(results, train_part, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(runs, "CHUNK_ROWS", 50)
    with pytest.raises(ValueError, match=message):
        read(Contrastive(), write(change(results), tmp_path, ".parquet"), train_part, Dataset(train_part))


@pytest.mark.parametrize("content", ["q1 Q0 d1 1\n", "q1 Q0 d1 1 high t\n", "", "q1  Q0  d1 1 2.0 t\n"])
def test_a_broken_run(train_part, tmp_path, content):
    path = tmp_path / "run.trec"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"run\.trec must (be|have)"):
        read(Contrastive(), path, train_part, Dataset(train_part))


def test_no_file(train_part):
    with pytest.raises(ValueError, match=r"there is no file 'nowhere\.trec'"):
        read(Contrastive(), "nowhere.trec", train_part, Dataset(train_part))


def test_the_total_of_reports():
    total = DataReport.total([DataReport(queries=2, groups=1, agreement=1.0), DataReport(queries=3, groups=3)])
    assert (total.queries, total.groups, total.agreement) == (5, 4, 1.0)


def test_topics_with_two_queries_for_a_qid(results, train_part, tmp_path):
    path, topics = write(results.drop(columns="query"), tmp_path, ".trec"), Dataset(train_part).topics
    [*runs.read_run(path, depth=2, topics=pd.concat([topics, topics.head(1)]))]
    other = topics.head(1).assign(query="another query")
    with pytest.raises(ValueError, match="topics must have one query for each qid; got several for 'tr0'"):
        [*runs.read_run(path, depth=2, topics=pd.concat([topics, other]))]


def test_blank_lines(results, tmp_path):
    lines = write(results, tmp_path, ".trec").read_text().splitlines(keepends=True)
    (tmp_path / "blank.trec").write_text("".join([*lines[:3], "\n", *lines[3:], "\n", "\n"]))
    topics = results[["qid", "query"]].drop_duplicates()
    whole, blank = (
        next(runs.read_run(tmp_path / name, depth=None, topics=topics)) for name in ("run.trec", "blank.trec")
    )
    assert blank.docnos == whole.docnos
    assert blank.key.tolist() == whole.key.tolist()


@pytest.mark.parametrize("padded", ["qid", "Q0", "docno", "rank"])
def test_aligned_columns_are_rejected(train_part, results, tmp_path, padded):
    path = write(results, tmp_path, ".trec")
    first, *others = path.read_text().splitlines()
    column = ["qid", "Q0", "docno", "rank"].index(padded)
    shifted = [" ".join(part + " " * (i == column) for i, part in enumerate(line.split())) for line in others]
    path.write_text("\n".join([first, *shifted]) + "\n")
    with pytest.raises(
        ValueError, match="columns that are separated by one space or one tab; got several spaces in a row"
    ):
        read(Contrastive(n_negatives=3), path, train_part, Dataset(train_part))


@pytest.mark.parametrize("writer", ["file", "PyTerrier"])
def test_docnos_with_spaces_are_rejected(train_part, results, tmp_path, writer):
    path = tmp_path / "run.trec"
    docnos = results["docno"].where(results.index != 5, "a 1")
    if writer == "PyTerrier":
        pt.io.write_results(results.assign(docno=docnos), path)
    else:
        rows = zip(results["qid"], docnos, results["rank"], results["score"], strict=True)
        path.write_text("".join(f"{qid} Q0 {docno} {rank} {score} bm25\n" for qid, docno, rank, score in rows))
    with pytest.raises(ValueError, match="must have 6 columns in each line; got more"):
        read(Contrastive(n_negatives=3), path, train_part, Dataset(train_part))


def test_other_encodings_are_rejected(train_part, tmp_path):
    path = tmp_path / "run.trec"
    path.write_text("q1 Q0 d1 0 1.0 bm25\n", encoding="utf-16")
    with pytest.raises(ValueError, match="must be in UTF-8; got another encoding"):
        read(Contrastive(n_negatives=3), path, train_part, Dataset(train_part))


def test_ids_that_are_large_numbers(tmp_path):
    frame = pd.DataFrame({"qid": [1e16, 1e16], "docno": [2.0, 3.0], "query": "q", "score": [2.0, 1.0]})
    rankings = next(runs.read_run(write(frame, tmp_path, ".parquet"), depth=None))
    assert rankings.qids == ["10000000000000000"]
    assert [*rankings.docnos] == ["2", "3"]
