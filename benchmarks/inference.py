"""Compare scoring: MonoCE, sentence-transformers' CrossEncoder, a plain Hugging Face loop, and ElectraScorer.

All have the same weights, pairs and max_length, and run in turn; times are medians. CrossEncoder runs with its default
settings and with its best ones, which are searched among batch sizes and the hardware's precisions. pyterrier-dr's
ElectraScorer is included if it is installed and the backbone is an ELECTRA (`--backbone electra-base-random`).
lightning-ir 0.0.6 can't load tokenizers of transformers 5: "type 'BertTokenizer' is not subscriptable".

    pip install -c constraints.txt -e ".[bench]" && python benchmarks/inference.py
"""

import itertools
import tempfile
import time
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt
import torch
from common import Shape, System, arguments, candidates, interleaved, minilm, report
from ir_measures import nDCG
from scipy.stats import kendalltau
from sentence_transformers import CrossEncoder
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, ElectraConfig

from pyterrier_msft import Contrastive, MonoCE
from pyterrier_msft.model.precision import resolve_device, resolve_dtype

OURS = "MonoCE"


def main() -> None:
    """Measure and print the table."""
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("--queries", type=int, default=25)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--long", type=int, default=1, help="repetitions of each text, for long documents")
    parser.add_argument("--train", type=int, default=400, help="queries to train the model on first; takes a minute")
    args = parser.parse_args()
    results, qrels = candidates(args.queries, args.depth)
    results["text"] = results["text"].map(lambda text: " ".join([text] * args.long))
    with tempfile.TemporaryDirectory() as folder:
        save_model(args.backbone or minilm(), folder)
        if args.train:  # the scores of a new head don't show how rounding affects a ranking
            fitter = Contrastive(n_negatives=3, depth=50, learning_rate=2e-4, batch_size=8, dropout=0.0)
            MonoCE(folder, max_length=64, fitter=fitter).fit(*candidates(args.train, 50, "train")).save(folder)
        measure(folder, results, qrels, args)


def save_model(backbone: str, folder: str) -> None:
    """Save the backbone, or a random model of ELECTRA-base's shape, as a cross-encoder with a single score."""
    torch.manual_seed(0)
    if backbone == "electra-base-random":
        config = ElectraConfig(
            embedding_size=768, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
            num_labels=1,
        )  # fmt: skip
        model = AutoModelForSequenceClassification.from_config(config)
        backbone = minilm()  # its tokenizer has ELECTRA's vocabulary
    else:
        model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)


def measure(folder: str, results: pd.DataFrame, qrels: pd.DataFrame, args: Any) -> None:
    """Time all systems on the same pairs."""
    device = resolve_device(None)
    auto = resolve_dtype("auto", device)
    sample = results.head(max(32, min(128, len(results) // 3)))
    systems, dtypes = {}, {}

    def add(name: str, system: System, dtype: torch.dtype = torch.float32) -> None:
        systems[name], dtypes[name] = system, dtype

    add(OURS, monoce(folder, args, "auto"), auto)
    if auto != torch.float32:
        add("MonoCE, float32", monoce(folder, args, "float32"))
    if device.type == "cpu":
        add("MonoCE, int8", monoce(folder, args, "int8"))
    cross = {dtype: cross_encoder(folder, args, dtype) for dtype in dict.fromkeys([torch.float32, auto])}
    add("CrossEncoder, defaults", cross[torch.float32](None))
    dtype, batch_size = search(cross, sample)
    name = f"CrossEncoder, {str(dtype).removeprefix('torch.')}, batches of {batch_size}"
    add(name, cross[dtype](batch_size), dtype)
    add("plain Hugging Face", hugging_face(folder, args, device))
    if AutoConfig.from_pretrained(folder).model_type == "electra":
        try:
            add("ElectraScorer", electra_scorer(folder, args, device))
        except ImportError as error:
            print(f"skipped ElectraScorer: {error}")

    runs, scores = interleaved(systems, results, sample.head(32), repeats=args.repeats)
    reference = scores["plain Hugging Face"]
    topics = results[["qid", "query"]].drop_duplicates()
    quality = {
        name: pt.Experiment([pt.model.add_ranks(results.assign(score=values))], topics, qrels, [nDCG @ 10]).iloc[0, -1]
        for name, values in scores.items()
    }
    agreement = pd.DataFrame(
        {
            "largest difference": {name: np.abs(values - reference).max() for name, values in scores.items()},
            "Kendall's tau": {name: kendalltau(values, reference).statistic for name, values in scores.items()},
            "nDCG@10 difference": {name: value - quality["plain Hugging Face"] for name, value in quality.items()},
        }
    )
    lengths = [len(ids) for ids in AutoTokenizer.from_pretrained(folder)(
        results["query"].tolist(), results["text"].tolist(), truncation=True, max_length=args.max_length
    )["input_ids"]]  # fmt: skip
    print(f"{len(results)} pairs of {np.mean(lengths):.0f} tokens on average, at most {max(lengths)}")
    report(
        runs, ours=OURS, pairs=len(results), operations=sum(map(Shape.of(folder).operations, lengths)), dtypes=dtypes,
        agreement=agreement, args=args,
    )  # fmt: skip


def monoce(folder: str, args: Any, dtype: str) -> System:
    """Prepare MonoCE."""
    ce = MonoCE(folder, max_length=args.max_length, dtype=dtype)

    def prepare(results: pd.DataFrame) -> Any:
        order = pd.MultiIndex.from_frame(results[["qid", "docno"]])
        return lambda: ce.transform(results).set_index(["qid", "docno"])["score"].reindex(order).to_numpy()

    return prepare


def cross_encoder(folder: str, args: Any, dtype: torch.dtype) -> Any:
    """Prepare sentence-transformers' CrossEncoder for a batch size; None: its default."""
    model = CrossEncoder(folder, max_length=args.max_length, model_kwargs={"dtype": dtype})

    def with_batch_size(batch_size: int | None) -> System:
        options = {} if batch_size is None else {"batch_size": batch_size}

        def prepare(results: pd.DataFrame) -> Any:
            pairs = list(zip(results["query"], results["text"], strict=True))
            return lambda: model.predict(
                pairs, show_progress_bar=False, activation_fn=torch.nn.Identity(), **options
            )  # fmt: skip

        return prepare

    return with_batch_size


def search(cross: dict[torch.dtype, Any], sample: pd.DataFrame) -> tuple[torch.dtype, int]:
    """Find CrossEncoder's fastest setting."""
    times = {}
    for dtype, batch_size in itertools.product(cross, (8, 16, 32, 64, 128)):
        if batch_size <= len(sample):
            call = cross[dtype](batch_size)(sample)
            start = time.perf_counter()
            call()
            times[dtype, batch_size] = time.perf_counter() - start
    return min(times, key=times.__getitem__)


def hugging_face(folder: str, args: Any, device: torch.device) -> System:
    """Prepare a plain Hugging Face loop."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval().to(device)

    @torch.inference_mode()
    def score(results: pd.DataFrame) -> np.ndarray:
        scores = []
        for start in range(0, len(results), 32):
            batch = tokenizer(
                results["query"].tolist()[start : start + 32], results["text"].tolist()[start : start + 32],
                truncation=True, max_length=args.max_length, padding=True, return_tensors="pt",
            )  # fmt: skip
            scores.append(model(**batch.to(device)).logits[:, 0].float().cpu().numpy())
        return np.concatenate(scores)

    return lambda results: lambda: score(results)


def electra_scorer(folder: str, args: Any, device: torch.device) -> System:
    """Prepare pyterrier-dr's ElectraScorer, which reads the second of two labels as the score."""
    from pyterrier_dr import ElectraScorer

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    head = model.classifier.out_proj
    model.classifier.out_proj = torch.nn.Linear(head.in_features, 2)
    with torch.no_grad():
        for ours, theirs in zip(head.parameters(), model.classifier.out_proj.parameters(), strict=True):
            theirs.copy_(torch.cat([torch.zeros_like(ours), ours]))
    # Its constructor loads weights and a tokenizer from the hub.
    scorer = ElectraScorer.__new__(ElectraScorer)
    scorer.batch_size, scorer.text_field, scorer.verbose, scorer.device = 16, "text", False, device
    scorer.tokeniser = AutoTokenizer.from_pretrained(folder, model_max_length=args.max_length)
    scorer.model = model.eval().to(device)

    def prepare(results: pd.DataFrame) -> Any:
        order = pd.MultiIndex.from_frame(results[["qid", "docno"]])
        return lambda: scorer(results).set_index(["qid", "docno"])["score"].reindex(order).to_numpy()

    return prepare


if __name__ == "__main__":
    main()
