"""The Hugging Face hub: a model's card, made from its record, and models by their names."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import ParseResult

import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData, snapshot_download

# What a model is loaded from; repositories hold other formats of the same weights too.
FILES = ["*.json", "*.txt", "*.model", "*.safetensors", "*.py", "*.md", "*.jinja"]


def fetch(name: str, *, revision: str | None = None, files: Sequence[str] = tuple(FILES)) -> Path:
    """The local folder with a hub model's files, downloaded if they aren't there.

    Raises:
        ValueError: If there is no such model, or no connection and no earlier download.
    """
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*files]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ValueError(
            f"expected a model's folder or a name on the Hugging Face hub, found {name!r}: {reason}"
        ) from (error)


def resolve(url: ParseResult) -> str:
    """Where `pt.Artifact.from_url("hf-model:user/model@revision")` finds the model: an entry point of PyTerrier's."""
    name, _, revision = url.path.partition("@")
    return os.fspath(fetch(name, revision=revision or None))


def card(
    record: Mapping[str, Any],
    *,
    name: str,
    base: str | None,
    adapter: bool,
    license: str | None = None,
    metrics: pd.DataFrame | None = None,
    **data: Any,
) -> str:
    """A model card in Markdown, with the front matter that the hub reads.

    Args:
        record: What `MonoCE.save` records.
        name: The model's, such as "user/model".
        base: The backbone's name on the hub; None for a local one.
        adapter: Whether the folder holds an adapter, without the backbone's weights.
        license: Its identifier on the hub, such as "apache-2.0".
        metrics: A table to show, such as `pt.Experiment`'s.
        **data: Whatever else `huggingface_hub.ModelCardData` takes, such as `language="en"`.
    """
    stages: list[dict[str, Any]] = record["stages"]
    base = data.get("base_model", base)
    known = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-ranking",
        "license": license,
        "base_model": base,
        "model_name": name,
        "eval_results": _validation(stages) or None,
    }
    tags = ["cross-encoder", "reranker", "sentence-transformers", "pyterrier", *data.pop("tags", [])]
    front = ModelCardData(**{**known, **data, "tags": tags})
    title = name.rpartition("/")[2]
    parts = [
        f"---\n{front.to_yaml()}\n---\n",
        f"# {title}\n",
        f"A cross-encoder that re-ranks documents for a query{f', made from `{base}`' if base else ''}, by "
        f"[pyterrier_msft](https://github.com/terrierteam/pyterrier_msft) {record['versions']['pyterrier_msft']}.\n",
        "## How to use\n",
        _use(record["settings"], name, base, adapter=adapter),
        "## Training\n",
        _training(stages),
        *(["## Evaluation\n"] if metrics is not None or _validation(stages) else []),
        *([_validation_table(stages)] if _validation(stages) else []),
        *([table(metrics)] if metrics is not None else []),
        "## Versions\n",
        ", ".join(f"{package} {version}" for package, version in record["versions"].items()) + ".\n",
        f"Weights: `{record['fingerprint']}` (`MonoCE.fingerprint`). `msft.json` has the whole record.\n",
    ]
    return str(ModelCard("\n".join(parts)))


def table(frame: pd.DataFrame) -> str:
    """A frame in Markdown, numbers with four decimals."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return "" if pd.isna(value) else f"{value:.4f}"
        return str(value).replace("|", "\\|").replace("\n", " ")

    rows = [[cell(value) for value in row] for row in frame.itertuples(index=False, name=None)]
    return _markdown([str(column) for column in frame.columns], rows)


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _use(settings: Mapping[str, Any], name: str, base: str | None, *, adapter: bool) -> str:
    length = settings["max_length"]
    pyterrier = f'from pyterrier_msft import MonoCE\n\npipeline = first_stage >> MonoCE.load("{name}")'
    tokens = f"tokenizer(query, document, truncation=True, max_length={length}, return_tensors='pt')"
    if adapter:
        transformers = (
            "from peft import AutoPeftModelForSequenceClassification\nfrom transformers import AutoTokenizer\n\n"
            f'model = AutoPeftModelForSequenceClassification.from_pretrained("{name}", num_labels=1).eval()\n'
        )
    else:
        transformers = (
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
            f'model = AutoModelForSequenceClassification.from_pretrained("{name}").eval()\n'
        )
    transformers += f'tokenizer = AutoTokenizer.from_pretrained("{name}")\nscore = model(**{tokens}).logits.item()'
    sentences = (
        "from sentence_transformers import CrossEncoder\n\n"
        f'scores = CrossEncoder("{name}").predict([(query, document)])'
    )
    uses = {"PyTerrier": pyterrier, "transformers": transformers}
    if not adapter:
        uses["sentence-transformers"] = sentences
    reading = f"The score is the model's raw output; a query and a document are cut to {length} tokens together."
    if settings.get("max_query_length"):
        reading += f" In PyTerrier a query is cut to {settings['max_query_length']} tokens; elsewhere it isn't."
    if settings.get("passages", 1) > 1:
        reading += (
            f" In PyTerrier a longer document is read in up to {settings['passages']} windows, and has the best one's "
            "score; elsewhere it is cut."
        )
    return "\n".join(f"{where}:\n\n```python\n{code}\n```\n" for where, code in uses.items()) + f"\n{reading}\n"


def _training(stages: Sequence[Mapping[str, Any]]) -> str:
    if not stages:
        return "None by pyterrier_msft.\n"
    columns = ["stage", "objective", "loss", "queries", "documents", "updates", "seed"]
    rows = [
        [
            str(number),
            str(stage["fitter"]).partition("(")[0],
            str(stage.get("loss", "")),
            f"{stage['queries']:,}",
            f"{stage['documents']:,}",
            f"{stage['history'][-1]['step']:,}" if stage["history"] else "",
            str(stage["seed"]),
        ]
        for number, stage in enumerate(stages, 1)
    ]
    fitters = "\n".join(str(stage["fitter"]) for stage in stages)
    return f"{_markdown(columns, rows)}\n```python\n{fitters}\n```\n"


def _validation(stages: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
    """The last stage's metric on its validation queries: of the weights that are here, since the best are kept."""
    known = {"step", "epoch", "loss", "learning_rate", "seconds", "pairs_per_second"}
    rows: list[dict[str, Any]] = stages[-1]["history"] if stages else []
    metrics = {key for row in rows for key in row if key not in known}
    return [
        EvalResult(
            task_type="text-ranking",
            dataset_type="validation",
            dataset_name="validation queries",
            metric_type=metric,
            metric_name=metric,
            metric_value=round(max(row[metric] for row in rows if metric in row), 4),
        )
        for metric in sorted(metrics)
    ]


def _validation_table(stages: Sequence[Mapping[str, Any]]) -> str:
    rows = [[str(result.metric_name), f"{result.metric_value:.4f}"] for result in _validation(stages)]
    return "On the validation queries that chose the weights:\n\n" + _markdown(["metric", "value"], rows)
