"""What test_distributed.py runs in two processes by torchrun, and in one: each case writes what it found."""

import contextlib
import dataclasses
import json
import os
import sys
import warnings
from pathlib import Path

import torch
from conftest import make_part
from ir_measures import RR

from pyterrier_msft import Contrastive, Distillation, MonoCE, Stage, fit_sequences
from pyterrier_msft.training import distributed as processes
from pyterrier_msft.training import trainer as training
from pyterrier_msft.training.trainer import _ListTrainer

SGD = {"optim": "sgd"}  # where weights are compared: AdamW turns gradients that are 0 but for rounding into steps
QUERIES = 37  # neither the processes nor the batches divide them
FIT = {"learning_rate": 0.3, "batch_size": 5, "epochs": 2, "dropout": 0.0, "warmup": 0, "clip_norm": None}
CASES = {
    "lce": Contrastive(n_negatives=3, trainer_args=SGD, **FIT),
    # a mean over pairs, whose number differs between lists
    "ranknet": Distillation(depth=8, trainer_args=SGD, **{**FIT, "learning_rate": 3.0}),
    "accumulated": Distillation(depth=8, gradient_accumulation=3, trainer_args=SGD, **{**FIT, "learning_rate": 3.0}),
    "bounded": Contrastive(n_negatives=3, gradient_accumulation=2, pairs_per_pass=3, trainer_args=SGD, **FIT),
    # batches of one query: one of the processes never has any
    "alone": Contrastive(n_negatives=3, trainer_args=SGD, **{**FIT, "batch_size": 1, "epochs": 1}),
    "adamw": Contrastive(n_negatives=3, **{**FIT, "learning_rate": 1e-2, "clip_norm": 10.0}),
}


class Stopped(BaseException):
    """As if the processes had been killed."""


def stopped_at(step: int):
    original = _ListTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Stopped
        return original(self, *args, **kwargs)

    _ListTrainer.training_step = training_step
    return original


def main(backbone: str, out: Path) -> None:
    part, dev = make_part("tr", n_queries=QUERIES, seed=1), make_part("va", n_queries=21, seed=2)
    # RankNet learns from lists of different lengths.
    uneven = part.results[(part.results["rank"] < 5) | (part.results["qid"].str[-1] < "5")]
    uneven = uneven.assign(score=uneven["quality"] * 10.0 + uneven["score"])
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu")

    def data(fitter):
        return (uneven, None) if isinstance(fitter, Distillation) else (part.results, part.qrels)

    def kept(name: str, model: MonoCE, **more) -> None:
        scores = model(dev.results)["score"].tolist()
        found = {
            "scores": scores,
            "fingerprint": model.fingerprint,
            "loss": model.history["loss"].tolist(),
            "metric": model.history["RR@10"].dropna().tolist() if "RR@10" in model.history else [],
            "head_is_new": model._head_is_new,
            **more,
        }
        (out / f"{name}.{processes.rank()}.json").write_text(json.dumps(found))

    for name, fitter in CASES.items():
        kept(name, ce.clone().fit(*data(fitter), fitter=fitter))

    # Several passes a step, and not equally many in both processes
    training.TOKENS_PER_PASS["cpu"], before = 100, training.TOKENS_PER_PASS["cpu"]
    kept("passes", ce.clone().fit(*data(CASES["ranknet"]), fitter=CASES["ranknet"]))
    training.TOKENS_PER_PASS["cpu"] = before

    # Validation, and patience that runs out
    stopping = dataclasses.replace(
        CASES["adamw"], metric=RR @ 10, eval_every=1, patience=2, epochs=9, learning_rate=0.1
    )
    kept("stopping", ce.clone().fit(part.results, part.qrels, dev.results, dev.qrels, fitter=stopping))

    # Dropout, a checkpoint, and the same once more after an interruption in a later epoch
    dropping = dataclasses.replace(CASES["adamw"], metric=RR @ 10, eval_every=2, dropout=0.2, epochs=3)
    arguments = (part.results, part.qrels, dev.results, dev.qrels)
    kept("whole", ce.clone().fit(*arguments, fitter=dropping))
    original = stopped_at(19)
    with contextlib.suppress(Stopped):
        ce.clone().fit(*arguments, fitter=dropping, checkpoint_dir=out / "checkpoints")
    _ListTrainer.training_step = original
    files = sorted(file.name for file in (out / "checkpoints").glob("*/rng_state*"))
    processes.wait()
    resumed = ce.clone().fit(*arguments, fitter=dropping, checkpoint_dir=out / "checkpoints")
    kept("resumed", resumed, rng_states=files)

    # What is wrong in one process is said in all, and what differs between them too
    if processes.count() > 1:
        other = part.results.iloc[: len(part.results) - 8 * processes.rank()]
        try:
            ce.clone().fit(other, part.qrels, fitter=CASES["lce"])
        except ValueError as error:
            (out / f"differs.{processes.rank()}.txt").write_text(str(error))

    # Stages: one process writes, and a second call finds them
    stages = {"CL": Stage(CASES["lce"], *data(CASES["lce"])), "KD": Stage(CASES["ranknet"], *data(CASES["ranknet"]))}
    for name in ("sequence", "found"):
        rerankers = fit_sequences(ce, stages, ["CL", "CL-KD"], save_dir=out / "models")
        kept(name, rerankers["CL-KD"])
    processes.wait()
    if processes.rank() == 0:
        (out / "models.json").write_text(
            json.dumps(sorted(path.name.rpartition("-")[0] for path in (out / "models").iterdir()))
        )

    # Warnings once
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ce.clone().fit(part.results, part.qrels.head(30), fitter=dataclasses.replace(CASES["lce"], max_steps=1))
    said = [str(warning.message) for warning in caught if "leaves out" in str(warning.message)]
    (out / f"warnings.{processes.rank()}.json").write_text(json.dumps(said))

    if processes.count() > 1:
        fully_sharded(ce, (part.results, part.qrels), (dev.results, dev.qrels), kept, out)


def fully_sharded(ce: MonoCE, part: tuple, dev: tuple, kept, out: Path) -> None:
    """FSDP by a stand-in: accelerate has it on GPUs alone, so it's told that gloo joins some."""
    import accelerate.state
    from accelerate.utils import DistributedType

    accelerate.state.PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    sharded = dataclasses.replace(CASES["bounded"], trainer_args={**SGD, "fsdp": True, "use_cpu": False})
    kept("fsdp-bounded", ce.clone().fit(*part, fitter=sharded))
    validated = dataclasses.replace(
        CASES["adamw"], metric=RR @ 10, eval_every=2, dropout=0.2, trainer_args={"fsdp": True, "use_cpu": False}
    )
    kept("fsdp-whole", ce.clone().fit(*part, *dev, fitter=validated))
    original = stopped_at(11)
    with contextlib.suppress(Stopped):
        ce.clone().fit(*part, *dev, fitter=validated, checkpoint_dir=out / "sharded")
    _ListTrainer.training_step = original
    kept("fsdp-resumed", ce.clone().fit(*part, *dev, fitter=validated, checkpoint_dir=out / "sharded"))
    assert not any(name.startswith("FSDP_") for name in os.environ)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
