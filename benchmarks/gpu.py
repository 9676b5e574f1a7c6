"""Measure scoring, training and memory on a GPU, against sentence-transformers: one command, one JSON file.

Models have the shapes of published backbones, random weights and a made-up vocabulary, so nothing is downloaded. Every
pair has exactly the tokens that its row names, without padding, and a text of its own. A part that fails is recorded
and doesn't stop the others, and the file always has the rows measured so far. `--dry-run` runs every part with tiny
models, on a CPU too, where a limit of the pairs per pass stands in for the memory.

    pip install -c constraints.txt -e ".[bench]" && python benchmarks/gpu.py --out gpu.json
"""

import argparse
import contextlib
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from common import System, interleaved
from cost import matmul_speed
from datasets import Dataset
from gpu_tools import busy_share, difference, limited_memory, messages, peak_gib, peak_of, wait_for
from inference import cross_encoder
from random_models import make_results, operations, write_model
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from training import LOSSES
from transformers import PrinterCallback

from pyterrier_msft import Distillation, MonoCE
from pyterrier_msft.model.first_token import first_token_only
from pyterrier_msft.model.loading import quiet_transformers
from pyterrier_msft.model.precision import autocast
from pyterrier_msft.model.scoring import forward
from pyterrier_msft.training.callbacks import HistoryCallback
from pyterrier_msft.training.trainer import ListwiseTrainer

OURS = "MonoCE"
PAPER = "ELECTRA-base"  # the paper's backbone
SHORT_STEPS = 3  # of a training run that is subtracted from a longer one

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What all parts share: the folder of the models, the device, and its speed."""

    folder: Path
    device: torch.device
    is_dry: bool
    gemm: float  # FLOP/s
    peak: float | None  # FLOP/s; None for an unknown card

    def size(self, full: Any, dry: Any) -> Any:
        """Choose a size."""
        return dry if self.is_dry else full

    def model(self, name: str) -> str:
        """Return the folder of a random model, which is written when it is first needed."""
        folder = self.folder / name
        if not folder.exists():
            write_model(name, folder, is_tiny=self.is_dry)
        return str(folder)

    def speed(self, folder: str, tokens: int, rate: float, *, passes: int = 1) -> Row:
        """Express pairs/s as shares of the card's peak, and of its speed in matrix multiplication."""
        operations_per_second = passes * rate * operations(folder, tokens)
        return {
            "pairs/s": rate,
            "share of bf16 peak": None if self.peak is None else operations_per_second / self.peak,
            "share of GEMM": operations_per_second / self.gemm,
        }


def main() -> None:
    """Measure the parts, and write each row as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the JSON file to write")
    parser.add_argument("--minutes", type=float, default=7, help="start no further row after this time")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--dry-run", action="store_true", help="tiny models, on a CPU too")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.dry_run:
        parser.error("a GPU is required; torch.cuda.is_available() is False. Use --dry-run to test on a CPU")
    end = time.monotonic() + 60 * args.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    gemm, peak = matmul_speed(device, torch.bfloat16 if device.type == "cuda" else torch.float32), peak_of(card)
    figures: dict[str, Any] = {
        "machine": {
            "date": f"{date.today()}", "card": card, "dry run": args.dry_run,
            "bf16 peak TFLOP/s": None if peak is None else peak / 1e12, "GEMM TFLOP/s": gemm / 1e12,
            "CUDA": torch.version.cuda,
            "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
        },
        "errors": {}, "cut short": [], "seconds": {},
        **{name: [] for name in args.parts},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), device, args.dry_run, gemm, peak)
        for name in args.parts:
            measure(name, bench, figures, end, args.out)
    if figures["errors"]:
        raise SystemExit(f"failed: {', '.join(figures['errors'])}; see {args.out}")


def measure(name: str, bench: Bench, figures: dict[str, Any], end: float, out: Path) -> None:
    """Add a part's rows to the figures, and write these after each row."""
    start, rows = time.monotonic(), PARTS[name](bench)
    try:
        while time.monotonic() < end and (row := next(rows, None)) is not None:
            figures[name].append(row)
            print(name, json.dumps(row, default=np.generic.item), flush=True)
            out.write_text(json.dumps(figures, indent=1, default=np.generic.item))
    except Exception:
        figures["errors"][name] = traceback.format_exc()
        print(figures["errors"][name], flush=True)
    if time.monotonic() >= end:
        figures["cut short"].append(name)
    figures["seconds"][name] = time.monotonic() - start
    out.write_text(json.dumps(figures, indent=1, default=np.generic.item))


# ---- parts: each yields rows


def agreement(bench: Bench) -> Iterator[Row]:
    """Compare the GPU's scores with the CPU's in float32."""
    folder, tokens = bench.model(PAPER), bench.size(128, 32)
    frame = make_results(2, bench.size(64, 8), tokens)
    reference = MonoCE(folder, max_length=tokens, dtype="float32", device="cpu")(frame)["score"].to_numpy()
    for dtype in ("float32", "bfloat16"):
        scores = MonoCE(folder, max_length=tokens, dtype=dtype, device=bench.device)(frame)["score"].to_numpy()
        yield {"dtype": dtype, **difference(scores, reference)}


def limited_scoring(bench: Bench) -> Iterator[Row]:
    """Score batches that are too large for the memory: the passes are halved, and the scores stay the same."""
    folder, tokens = bench.model(PAPER), bench.size(256, 32)
    frame = make_results(bench.size(160, 2), bench.size(100, 16), tokens)
    reference = MonoCE(folder, max_length=tokens, dtype="bfloat16")(frame)["score"].to_numpy()
    ce = MonoCE(folder, max_length=tokens, dtype="bfloat16", batch_size=8192)
    with limited_memory(ce.cross_encoder.network) as limit, messages() as logged, peak_gib(bench.device) as peak:
        scores = ce(frame)["score"].to_numpy()
    yield {"limit": limit, "peak GiB": peak[0], "messages": logged, **difference(scores, reference)}


def memory(bench: Bench) -> Iterator[Row]:
    """Train some of the paper's steps with all activations, with `pairs_per_pass`, and in less memory."""
    folder, tokens = bench.model(PAPER), bench.size(256, 32)
    frame, reference = make_results(12, bench.size(100, 10), tokens), None
    for pairs, is_limited in ((None, False), (16, False), (None, True)):
        ce = MonoCE(folder, max_length=tokens, dtype="bfloat16", fitter=paper_steps(pairs_per_pass=pairs, dropout=0.0))
        context = limited_memory(ce.cross_encoder.network) if is_limited else contextlib.nullcontext()
        with context as limit, messages() as logged, peak_gib(bench.device) as peak:
            losses = ce.fit(frame).history["loss"].to_numpy()
        reference = losses if reference is None else reference
        yield {
            "pairs_per_pass": pairs, "limit": limit, "peak GiB": peak[0], "messages": logged, "losses": losses.tolist(),
            "largest difference of losses": np.abs(losses - reference).max(),
        }  # fmt: skip


def second_stage(bench: Bench) -> Iterator[Row]:
    """Train two stages, which should need the same memory."""
    tokens = bench.size(256, 32)
    ce = MonoCE(bench.model(PAPER), max_length=tokens, dtype="bfloat16")
    frame = make_results(8, bench.size(100, 10), tokens)
    for stage in (1, 2):
        with peak_gib(bench.device) as peak:
            ce.fit(frame, fitter=paper_steps(pairs_per_pass=64, seed=stage))
        allocated = torch.cuda.memory_allocated() if bench.device.type == "cuda" else 0
        yield {"stage": stage, "peak GiB": peak[0], "GiB afterwards": allocated / 2**30}


def resume(bench: Bench) -> Iterator[Row]:
    """Interrupt training, resume it, and compare the weights with those of two undisturbed runs."""
    folder, tokens = bench.model("MiniLM"), bench.size(128, 32)
    checkpoint_dir, step = bench.folder / "checkpoints", ListwiseTrainer.training_step
    frame = make_results(128, 8, tokens)
    # With AdamW, gradients that are zero up to rounding would make the runs differ.
    fitter = Distillation(
        depth=None, batch_size=16, max_steps=16, eval_every=4, learning_rate=0.01, trainer_args={"optim": "sgd"}
    )  # fmt: skip

    def weights(ce: MonoCE) -> torch.Tensor:
        return torch.cat([weight.flatten().cpu() for weight in ce.cross_encoder.network.parameters()]).detach()

    def train(**options: Any) -> torch.Tensor:
        return weights(MonoCE(folder, max_length=tokens, dtype="bfloat16", fitter=fitter).fit(frame, **options))

    def interrupt(trainer: ListwiseTrainer, *args: Any) -> torch.Tensor:
        if trainer.state.global_step == 10:
            raise KeyboardInterrupt
        return step(trainer, *args)

    start, undisturbed, again = weights(MonoCE(folder)), train(), train()
    with mock.patch.object(ListwiseTrainer, "training_step", interrupt), contextlib.suppress(KeyboardInterrupt):
        train(checkpoint_dir=checkpoint_dir)
    checkpoints = [path.name for path in checkpoint_dir.glob("checkpoint-*")]
    resumed = train(checkpoint_dir=checkpoint_dir)
    yield {
        "checkpoints": checkpoints,
        "largest difference of weights": (resumed - undisturbed).abs().max().item(),
        "of two undisturbed runs": (again - undisturbed).abs().max().item(),
        "largest change in training": (undisturbed - start).abs().max().item(),
    }


def training(bench: Bench) -> Iterator[Row]:
    """Train, tokenizing every text, against CrossEncoderTrainer with its faster mini-batches.

    The time of a short run is subtracted, so that loading and saving don't count.
    """
    folder, tokens = bench.model(PAPER), bench.size(256, 32)
    for lists, depth, steps in bench.size(((4, 100, 23), (16, 8, 63)), ((2, 10, 5),)):
        frame = make_results(lists * steps, depth, tokens)
        short = frame.head(lists * depth * SHORT_STEPS)
        ours = fit(folder, tokens, lists, bench)
        candidates = {f"mini-batches of {size}": trainer(folder, tokens, lists, bench, size) for size in (64, -1)}
        systems = {OURS: ours, **{name: system for name, system in candidates.items() if fits(system, short)}}
        with mock.patch.object(HistoryCallback, "on_step_end", ignore):  # a long run seldom waits to log
            fixed, _ = interleaved(systems, short, short, repeats=2)
            runs, _ = interleaved(systems, frame, short, repeats=bench.size(2, 1))
            busy = busy_share(ours(frame.head(len(frame) // 2)), bench.device)
        seconds, fixed_seconds = (part.groupby("system")["seconds"].min() for part in (runs, fixed))
        rates = (len(frame) - len(short)) / (seconds - fixed_seconds)
        theirs = rates.drop(OURS)
        yield {
            "model": PAPER, "lists": lists, "documents": depth, "tokens": tokens,
            **bench.speed(folder, tokens, rates[OURS], passes=3), "busy share": busy,
            "CrossEncoderTrainer pairs/s": theirs.max(), "its faster setting": theirs.idxmax(),
            "faster by": rates[OURS] / theirs.max(),
            "peak GiB": runs.groupby("system")["peak"].max()[OURS] / 2**30,
        }  # fmt: skip


def scoring(bench: Bench) -> Iterator[Row]:
    """Score pairs, against CrossEncoder.predict in bf16 with its best batch size."""
    for name in (PAPER, "MiniLM", "ModernBERT-base"):
        for tokens in bench.size((64, 128, 256, 512), (32,)):
            folder = bench.model(name)
            frame = make_results(bench.size(2**21, 2**13) // tokens // 64, 64, tokens)
            ce = MonoCE(folder, max_length=tokens, dtype="bfloat16")
            with quiet_transformers():
                cross = cross_encoder(folder, argparse.Namespace(max_length=tokens), torch.bfloat16)
            batch = best_batch(cross, frame.head(2048), bench.size((32, 128, 512, 2048), (8, 16)))
            systems: dict[str, System] = {
                OURS: lambda frame, ce=ce: lambda: ce.transform(frame), "CrossEncoder": cross(batch)
            }  # fmt: skip
            runs, _ = interleaved(systems, frame, frame.head(1024), repeats=bench.size(3, 1))
            rates = len(frame) / runs.groupby("system")["seconds"].median()
            yield {
                "model": name, "tokens": tokens, "pairs": len(frame), **bench.speed(folder, tokens, rates[OURS]),
                "busy share": busy_share(systems[OURS](frame), bench.device),
                "CrossEncoder pairs/s": rates["CrossEncoder"], "its best batch": batch,
                "faster by": rates[OURS] / rates["CrossEncoder"],
                "peak GiB": runs.groupby("system")["peak"].max()[OURS] / 2**30, **forward_alone(ce, frame, bench),
            }  # fmt: skip


# The shortest parts first, so that a time limit cuts the least.
PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "agreement": agreement, "limited scoring": limited_scoring, "memory": memory, "second stage": second_stage,
    "resume": resume, "training": training, "scoring": scoring,
}  # fmt: skip


# ---- systems


def fit(folder: str, tokens: int, lists: int, bench: Bench) -> System:
    """Prepare MonoCE's training."""

    def prepare(frame: pd.DataFrame) -> Callable[[], Any]:
        fitter = Distillation(depth=None, batch_size=lists, epochs=1, learning_rate=5e-5, clip_norm=1.0, metric=None)
        ce = MonoCE(folder, max_length=tokens, dtype="bfloat16", fitter=fitter)
        _ = ce.cross_encoder.network  # loads it
        return lambda: (ce.fit(frame), wait_for(bench.device))

    return prepare


def trainer(folder: str, tokens: int, lists: int, bench: Bench, mini_batch_size: int) -> System:
    """Prepare CrossEncoderTrainer."""

    def prepare(frame: pd.DataFrame) -> Callable[[], Any]:
        rows = [
            {"query": group["query"].iloc[0], "docs": group["text"].tolist(), "labels": [*range(len(group), 0, -1)]}
            for _, group in frame.groupby("qid", sort=False)
        ]
        with quiet_transformers():
            model = CrossEncoder(folder, max_length=tokens, num_labels=1)
        arguments = CrossEncoderTrainingArguments(
            output_dir=str(bench.folder / "trainer"), num_train_epochs=1, per_device_train_batch_size=lists,
            learning_rate=5e-5, warmup_steps=0.1, weight_decay=0.01, max_grad_norm=1.0, bf16=True, report_to="none",
            use_cpu=bench.device.type == "cpu", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        loss = LOSSES["ranknet"][1](model, mini_batch_size)
        theirs = CrossEncoderTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), loss=loss)
        theirs.remove_callback(PrinterCallback)
        return lambda: (theirs.train(), wait_for(bench.device))

    return prepare


def fits(system: System, frame: pd.DataFrame) -> bool:
    """Whether the device has the memory for a system."""
    with contextlib.suppress(torch.OutOfMemoryError):
        system(frame)()
        return True
    return False


def paper_steps(**settings: Any) -> Distillation:
    """Return two of the paper's steps, on lists of all documents."""
    return Distillation(depth=None, batch_size=4, max_steps=2, learning_rate=5e-5, metric=None, **settings)


def best_batch(cross: Callable[[int], System], sample: pd.DataFrame, sizes: tuple[int, ...]) -> int:
    """Find CrossEncoder's fastest batch size among those that fit."""
    seconds = {}
    for size in sizes:
        if fits(cross(size), sample):  # which also warms up
            call, start = cross(size)(sample), time.perf_counter()
            call()
            seconds[size] = time.perf_counter() - start
    return min(seconds, key=seconds.__getitem__)


def forward_alone(ce: MonoCE, frame: pd.DataFrame, bench: Bench) -> Row:
    """Return the pairs/s of forward passes alone: under autocast, as in scoring, and with weights in bf16."""
    network, encoder, rates = ce.cross_encoder.clone().network, ce.pair_encoder(), {}
    sample = frame.head(65536 // encoder.max_length)
    encoded = encoder(sample["query"].tolist(), sample["text"].tolist())
    batch = {key: value.to(bench.device) for key, value in encoder.pad(encoded, range(len(sample))).items()}
    for name, dtype in {"autocast": torch.bfloat16, "bf16 weights": torch.float32}.items():
        if name == "bf16 weights":
            network.bfloat16()
        with torch.inference_mode(), autocast(bench.device, dtype), first_token_only(network):
            for repeats in (2, bench.size(10, 1)):  # the first to warm up
                start = time.perf_counter()
                for _ in range(repeats):
                    forward(network, batch)
                wait_for(bench.device)
                rates[f"forward alone, {name}, pairs/s"] = repeats * len(sample) / (time.perf_counter() - start)
    return rates


def ignore(*args: Any, **options: Any) -> None:
    """Do nothing."""


if __name__ == "__main__":
    main()
