"""Model cards, written from a model's record."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pyterrier_msft.model.record import CARD_MARK, ModelRecord, StageRecord

Kind = Literal["one label", "several labels", "modular", "prompt"]
"""A network with one label; one with several, whose score is the log-odds of one; the modules of a CrossEncoder; a
network that reads pairs in a prompt."""


def model_card(
    record: ModelRecord, *, name: str, is_adapter: bool, kind: Kind, license: str | None = None,
    metrics: pd.DataFrame | None = None, **data: Any,
) -> str:  # fmt: skip
    """Write a model card in Markdown, with the front matter that the hub reads. For the options see `MonoCE.save`.

    `kind` decides which libraries can use the model as it is.
    """
    base = data.get("base_model", record.base)
    validation = record.stages[-1].metrics if record.stages else {}
    eval_results = [
        EvalResult(
            task_type="text-ranking", dataset_type="validation", dataset_name="validation queries",
            metric_type=metric, metric_name=metric, metric_value=round(value, 4),
        )
        for metric, value in validation.items()
    ]  # fmt: skip
    evaluation = [] if metrics is None else [markdown_table(metrics)]
    if validation:
        table = markdown_table(pd.DataFrame(validation.items(), columns=["metric", "value"]))
        evaluation = ["On the validation queries that selected the weights:\n", table, *evaluation]
    known = {
        "library_name": "peft" if is_adapter else "sentence-transformers" if kind == "modular" else "transformers",
        "pipeline_tag": "text-ranking",
        "license": license,
        "base_model": base,
        "model_name": name,
        "eval_results": eval_results or None,
    }
    tags = ["cross-encoder", "reranker", "sentence-transformers", "pyterrier", *data.pop("tags", [])]
    front_matter = ModelCardData(**{**known, **data, "tags": tags})
    parts = [
        f"---\n{front_matter.to_yaml()}\n---\n",
        f"# {name.rpartition('/')[2]}\n",
        f"A cross-encoder that re-ranks documents for a query{f', made from `{base}`' if base else ''}, trained with "
        f"{CARD_MARK} {record.versions['pyterrier_msft']}.\n",
        "## How to use\n",
        _usage(
            record.settings,
            name,
            _interpolation(record),
            is_adapter=is_adapter,
            kind=kind,
            is_calibrated=record.calibration is not None,
        ),
        "## Training\n",
        _training(record.stages),
        *(["## Evaluation\n", *evaluation] if evaluation else []),
        "## Versions\n",
        ", ".join(f"{package} {version}" for package, version in record.versions.items()) + ".\n",
        f"Weights: `{record.fingerprint}` (`MonoCE.fingerprint`). `msft.json` holds the whole training record.\n",
    ]
    return str(ModelCard("\n".join(parts)))


def markdown_table(frame: pd.DataFrame) -> str:
    """Format a frame in Markdown, numbers with four decimals."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return "" if pd.isna(value) else f"{value:.4f}"
        return str(value).replace("|", "\\|").replace("\n", " ")

    lines: list[Iterable[Any]] = [
        frame.columns,
        ["---"] * len(frame.columns),
        *frame.itertuples(index=False, name=None),
    ]
    return "".join(f"| {' | '.join(cell(value) for value in line)} |\n" for line in lines)


def _usage(
    settings: Mapping[str, Any], name: str, interpolation: str, *, is_adapter: bool, kind: Kind, is_calibrated: bool
) -> str:
    length = settings["max_length"]
    model_class = "AutoPeftModelForSequenceClassification" if is_adapter else "AutoModelForSequenceClassification"
    imports = f"from transformers import {model_class}, AutoTokenizer"
    if is_adapter:
        imports = f"from peft import {model_class}\nfrom transformers import AutoTokenizer"
    examples = {
        "PyTerrier": f'from pyterrier_msft import MonoCE\n\npipeline = first_stage >> MonoCE.load("{name}")',
        "transformers": (
            f"{imports}\n\n"
            f'model = {model_class}.from_pretrained("{name}"{", num_labels=1" * is_adapter}).eval()\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
            f"inputs = tokenizer(query, document, truncation=True, max_length={length}, return_tensors='pt')\n"
            "score = model(**inputs).logits.item()"
        ),
    }
    if kind != "one label":
        del examples["transformers"]
    if not is_adapter and kind != "several labels":
        examples["sentence-transformers"] = (
            "from sentence_transformers import CrossEncoder\n\n"
            f'scores = CrossEncoder("{name}").predict([(query, document)])'
        )
    notes = f"The score is the model's raw output. Query and document are truncated to {length} tokens together."
    if kind == "prompt":
        notes += f" Pairs longer than {length} tokens, template included, score differently in sentence-transformers."
    if kind == "several labels":
        notes += f" It is the log-odds of the label {settings['relevant']!r}: other libraries give one for each label."
    if settings.get("max_query_length"):
        notes += f" PyTerrier truncates a query to {settings['max_query_length']} tokens; the others don't."
    if settings.get("passages", 1) > 1:
        notes += (
            f" PyTerrier reads a longer document in up to {settings['passages']} windows and takes the best one's "
            "score; the others truncate it."
        )
    if interpolation:
        notes += f" PyTerrier adds the first stage's score to it, the others don't: {interpolation}."
    if is_calibrated:
        notes += " PyTerrier adds a column `probability` (`MonoCE.calibration`)."
    return "\n".join(f"{library}:\n\n```python\n{code}\n```\n" for library, code in examples.items()) + f"\n{notes}\n"


def _interpolation(record: ModelRecord) -> str:
    """Say which weight the first stage's score has; empty if it isn't used."""
    weight = setting = record.settings.get("interpolate", False)
    if setting is True:
        weight = record.stages[-1].interpolation.get("weight") if record.stages else None
    if not weight:
        return ""
    is_known = record.stages and record.stages[-1].interpolation.get("weight") == weight
    text = record.stages[-1].data_report["interpolation"] if is_known else ""
    return f"`score + {weight:.6g} * first_stage_score`{f' ({text})' * bool(text)}"


def _training(stages: Sequence[StageRecord]) -> str:
    if not stages:
        return "None with pyterrier_msft.\n"
    columns = ["stage", "objective", "loss", "queries", "documents", "updates", "seed"]
    rows = [
        [number, s.objective, s.loss, f"{s.queries:,}", f"{s.documents:,}", s.updates_text, s.seed]
        for number, s in enumerate(stages, 1)
    ]
    fitters = "\n".join(stage.fitter for stage in stages)
    return f"{markdown_table(pd.DataFrame(rows, columns=columns))}\n```python\n{fitters}\n```\n"
