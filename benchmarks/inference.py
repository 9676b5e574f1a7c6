"""Scoring, side by side: MonoCE against sentence-transformers' CrossEncoder and a plain Hugging Face loop.

Same weights, same pairs, same max_length; in turns, medians. CrossEncoder runs as its users call it and in the best of
its settings, which is searched for among batch sizes and precisions.

    pip install -c constraints.txt -e ".[bench]" && python benchmarks/inference.py
"""

import itertools
import tempfile
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import pyterrier as pt
import torch
from common import Shape, arguments, candidates, interleaved, minilm, report
from ir_measures import nDCG
from scipy.stats import kendalltau
from sentence_transformers import CrossEncoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer, ElectraConfig

from pyterrier_msft import MonoCE
from pyterrier_msft.scoring import resolve_dtype

OURS = "MonoCE"


def main() -> None:
    """Measure, and print the table."""
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("--queries", type=int, default=75)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--long", type=int, default=1, help="repeat each text so many times: long documents")
    args = parser.parse_args()
    results, qrels = candidates(args.queries, args.depth)
    results["text"] = results["text"].map(lambda text: " ".join([text] * args.long))
    with tempfile.TemporaryDirectory() as folder:
        # A folder with a trained head, as all read it, so that scores differ between documents.
        save_model(args.backbone or minilm(), folder)
        measure(folder, results, qrels, args)


def save_model(backbone: str, folder: str) -> None:
    """The backbone, or a random one of ELECTRA-base's shape, as a cross-encoder of a single score."""
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


def measure(folder: str, results: pd.DataFrame, qrels: pd.DataFrame, args) -> None:  # noqa: ANN001
    """Time all systems on the same pairs."""
    pairs = list(zip(results["query"], results["text"], strict=True))
    monoce = MonoCE(folder, max_length=args.max_length)
    exact = MonoCE(folder, max_length=args.max_length, dtype="float32")
    cross = {
        dtype: CrossEncoder(folder, max_length=args.max_length, model_kwargs={"dtype": dtype})
        for dtype in dict.fromkeys([torch.float32, torch.bfloat16])
    }

    def predict(dtype: torch.dtype, batch_size: int, texts: list[tuple[str, str]] = pairs) -> np.ndarray:
        return cross[dtype].predict(
            texts, batch_size=batch_size, show_progress_bar=False, activation_fn=torch.nn.Identity()
        )

    def search() -> tuple[torch.dtype, int]:
        """The fastest setting of the peer, on a third of the pairs."""
        times = {}
        for dtype, batch_size in itertools.product(cross, (8, 16, 32, 64, 128)):
            start = time.perf_counter()
            predict(dtype, batch_size, pairs[: max(64, len(pairs) // 3)])
            times[dtype, batch_size] = time.perf_counter() - start
        return min(times, key=times.__getitem__)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    plain.to(cross[torch.float32].device)

    @torch.inference_mode()
    def hugging_face() -> np.ndarray:
        scores = []
        for start in range(0, len(pairs), 32):
            queries, texts = zip(*pairs[start : start + 32], strict=True)
            batch = tokenizer(
                queries, texts, truncation=True, max_length=args.max_length, padding=True, return_tensors="pt"
            )
            scores.append(plain(**batch.to(plain.device)).logits[:, 0].float().cpu().numpy())
        return np.concatenate(scores)

    def transform(ce: MonoCE) -> np.ndarray:
        scored = ce.transform(results).set_index(["qid", "docno"])["score"]
        return scored.reindex(pd.MultiIndex.from_frame(results[["qid", "docno"]])).to_numpy()

    best = search()
    best_name = f"CrossEncoder, {str(best[0]).removeprefix('torch.')}, batches of {best[1]}"
    auto = resolve_dtype("auto", plain.device)
    systems: dict[str, Callable[[], np.ndarray]] = {OURS: lambda: transform(monoce)}
    dtypes = {OURS: auto}
    if auto != torch.float32:
        systems["MonoCE, float32"], dtypes["MonoCE, float32"] = lambda: transform(exact), torch.float32
    if plain.device.type == "cpu":
        int8 = MonoCE(folder, max_length=args.max_length, dtype="int8")
        systems["MonoCE, int8"], dtypes["MonoCE, int8"] = lambda: transform(int8), torch.float32
    systems |= {
        "CrossEncoder, as called": lambda: predict(torch.float32, 32),
        best_name: lambda: predict(*best),
        "plain Hugging Face": hugging_face,
    }
    dtypes |= {"CrossEncoder, as called": torch.float32, best_name: best[0], "plain Hugging Face": torch.float32}
    ready = {name: lambda system=system: system for name, system in systems.items()}
    seconds, peaks, scores = interleaved(ready, repeats=args.repeats)
    reference = scores["plain Hugging Face"]
    quality = {
        name: pt.Experiment(
            [pt.model.add_ranks(results.assign(score=values))], results[["qid", "query"]].drop_duplicates(), qrels,
            [nDCG @ 10], names=[name],
        )["nDCG@10"].iloc[0]
        for name, values in scores.items()
    }  # fmt: skip
    agreement = pd.DataFrame(
        {
            "largest difference": {name: np.abs(values - reference).max() for name, values in scores.items()},
            "Kendall's tau": {name: kendalltau(values, reference).statistic for name, values in scores.items()},
            "nDCG@10": quality,
        }
    )
    lengths = [len(ids) for ids in tokenizer(*map(list, zip(*pairs, strict=True)), truncation=True,
                                              max_length=args.max_length)["input_ids"]]  # fmt: skip
    operations = sum(map(Shape.of(folder).operations, lengths))
    print(f"{len(pairs)} pairs of {np.mean(lengths):.0f} tokens on average, at most {max(lengths)}")
    report(
        seconds,
        peaks,
        ours=OURS,
        pairs=len(pairs),
        operations=operations,
        dtypes=dtypes,
        agreement=agreement,
        args=args,
    )


if __name__ == "__main__":
    main()
