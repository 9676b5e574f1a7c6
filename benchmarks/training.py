"""Compare training: MonoCE.fit, sentence-transformers' CrossEncoderTrainer, and a plain PyTorch loop.

All have the same initial weights, lists, loss, optimizer and schedule, and run in turn; times are medians. The trainer
runs with its defaults, and with whole batches in the order of MonoCE.fit: then, without dropout, the losses of all
steps are the same. Dropout is the backbone's unless --dropout is given.

    pip install -c constraints.txt -e ".[bench]" && python benchmarks/training.py --dropout 0
"""

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import Shape, System, arguments, candidates, interleaved, minilm, report
from datasets import Dataset
from inference import save_model
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import ListMLELoss, RankNetLoss
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    get_linear_schedule_with_warmup,
)

from pyterrier_msft import Distillation, MonoCE, losses
from pyterrier_msft.data.groups import Group
from pyterrier_msft.model.loading import quiet_transformers
from pyterrier_msft.model.precision import resolve_dtype
from pyterrier_msft.training.batches import BatchSchedule, GroupDataset
from pyterrier_msft.training.plan import plan_training

OURS = "MonoCE.fit"
# Our loss, and sentence-transformers' for a size of mini-batches (None: its default).
LOSSES = {
    "ranknet": (losses.ranknet, lambda model, size: RankNetLoss(model, reduction_log="natural", mini_batch_size=size)),
    "list_mle": (losses.list_mle, lambda model, size: ListMLELoss(model, mini_batch_size=size)),
}


def main() -> None:
    """Measure and print the table."""
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--depth", type=int, default=8, help="documents per list")
    parser.add_argument("--batch-size", type=int, default=8, help="lists per step")
    parser.add_argument("--dropout", type=float, help="default: the backbone's")
    parser.add_argument("--loss", choices=LOSSES, default="ranknet")
    args = parser.parse_args()
    results, _ = candidates(args.queries, args.depth)
    with tempfile.TemporaryDirectory() as folder:
        save_model(args.backbone or minilm(), folder)
        measure(folder, results, args)


def measure(folder: str, results: pd.DataFrame, args: Any) -> None:
    """Time one epoch of each trainer."""
    fitter = Distillation(
        depth=args.depth, batch_size=args.batch_size, dropout=args.dropout, learning_rate=5e-5, warmup=0.1,
        clip_norm=1.0, epochs=1, metric=None, loss=LOSSES[args.loss][0],
    )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype("auto", device)

    def steps(results: pd.DataFrame) -> list[list[Group]]:
        groups = fitter.groups(results, None)[0]
        dataset, plan = GroupDataset(groups, fitter.seed), plan_training(fitter, groups, width=384, head_is_new=True)
        return [dataset.__getitems__(batch) for batch in BatchSchedule(groups, plan, seed=fitter.seed)]

    def ours(results: pd.DataFrame) -> Callable[[], list[float]]:
        ce = MonoCE(folder, max_length=args.max_length, fitter=fitter)
        ce.fingerprint  # noqa: B018  (loads the weights)

        def call() -> list[float]:
            return ce.fit(results).history["loss"].tolist()

        return call

    def cross_encoder_trainer(mini_batch_size: int | None, order: Any) -> System:
        def prepare(results: pd.DataFrame) -> Callable[[], list[float]]:
            rows = [
                {"query": g.query, "docs": g.texts, "labels": g.labels.tolist()}
                for step in steps(results)
                for g in step
            ]
            with quiet_transformers():
                model = CrossEncoder(
                    folder, max_length=args.max_length, config_kwargs=dropouts(args.dropout), num_labels=1
                )
            trainer = CrossEncoderTrainer(
                model=model,
                args=CrossEncoderTrainingArguments(
                    output_dir=tempfile.mkdtemp(), num_train_epochs=1, per_device_train_batch_size=args.batch_size,
                    learning_rate=5e-5, warmup_steps=0.1, weight_decay=0.01, max_grad_norm=1.0, seed=fitter.seed,
                    bf16=dtype == torch.bfloat16, use_cpu=device.type == "cpu", report_to="none",
                    save_strategy="no", logging_steps=1, disable_tqdm=True, **order,
                ),
                train_dataset=Dataset.from_list(rows),
                loss=LOSSES[args.loss][1](model, mini_batch_size),
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)

            def call() -> list[float]:
                trainer.train()
                return [row["loss"] for row in trainer.state.log_history if "loss" in row]

            return call

        return prepare

    systems: dict[str, System] = {
        OURS: ours,
        "CrossEncoderTrainer, defaults": cross_encoder_trainer(None, {}),
        "CrossEncoderTrainer, whole batches, same order": cross_encoder_trainer(-1, {"batch_sampler": InOrder}),
        "plain Hugging Face": lambda results: plain(folder, steps(results), device, dtype, args),
    }
    warm_up = results[results["qid"].isin(results["qid"].unique()[: args.batch_size])]
    runs, curves = interleaved(systems, results, warm_up, repeats=args.repeats)
    groups = [group for step in steps(results) for group in step]
    summarize(folder, runs, curves, groups, dtype, args)


def summarize(
    folder: str, runs: pd.DataFrame, curves: dict[str, list[float]], groups: list[Group], dtype: torch.dtype, args: Any
) -> None:
    """Compare the losses with those of the plain loop, and print the table."""
    reference = np.array(curves["plain Hugging Face"])
    agreement = pd.DataFrame(
        {
            "last loss": {name: curve[-1] for name, curve in curves.items()},
            "largest difference of losses": {
                name: np.abs(np.array(curve) - reference).max() for name, curve in curves.items()
            },
        }
    )
    encoded = AutoTokenizer.from_pretrained(folder)(
        [g.query for g in groups for _ in g.texts], [text for g in groups for text in g.texts],
        truncation=True, max_length=args.max_length,
    )["input_ids"]  # fmt: skip
    lengths = [len(ids) for ids in encoded]
    print(f"{len(lengths)} pairs of {np.mean(lengths):.0f} tokens on average in {len(reference)} steps")
    report(
        runs, ours=OURS, pairs=len(lengths), operations=3 * sum(map(Shape.of(folder).operations, lengths)),
        dtypes=dict.fromkeys(curves, dtype), agreement=agreement, args=args,
    )  # fmt: skip


def plain(
    folder: str, order: list[list[Group]], device: torch.device, dtype: torch.dtype, args: Any
) -> Callable[[], list[float]]:
    """Prepare a plain PyTorch loop."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, **dropouts(args.dropout)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, int(np.ceil(0.1 * len(order))), len(order))

    def call() -> list[float]:
        values = []
        for batch in order:
            queries = [g.query for g in batch for _ in g.texts]
            texts = [text for g in batch for text in g.texts]
            tokens = tokenizer(
                queries, texts, truncation=True, max_length=args.max_length, padding=True, return_tensors="pt"
            )
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                flat = model(**tokens.to(device)).logits[:, 0].float()
            width = max(len(g.texts) for g in batch)
            labels, mask = torch.zeros(len(batch), width), torch.zeros(len(batch), width, dtype=torch.bool)
            for row, group in enumerate(batch):
                labels[row, : len(group.texts)] = torch.from_numpy(group.labels)
                mask[row, : len(group.texts)] = True
            mask = mask.to(device)
            scores = flat.new_zeros(mask.shape).masked_scatter(mask, flat)
            loss = LOSSES[args.loss][0](scores, labels.to(device), mask)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    return call


def dropouts(p: float | None) -> dict[str, float]:
    """Return a configuration's dropout probabilities; None: unchanged."""
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    return {} if p is None else dict.fromkeys(names, p)


class InOrder(torch.utils.data.BatchSampler):
    """Batches in the order of the rows."""

    def __init__(self, dataset: Any, batch_size: int, drop_last: bool = False, **_: Any) -> None:
        super().__init__(torch.utils.data.SequentialSampler(dataset), batch_size, drop_last)
        self.dataset = dataset

    def __iter__(self) -> Iterator[list[int]]:
        """Iterate over batches of indices."""
        return super().__iter__()


if __name__ == "__main__":
    main()
