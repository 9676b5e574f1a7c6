"""Run by test_distributed.py in two processes with torchrun, and in one; each case writes its result to a file."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
import warnings
from pathlib import Path

import tiny_models
import torch
from conftest import make_part
from interruptions import interrupted_at, interruptible_lce
from ir_measures import RR

from pyterrier_msft import Contrastive, Distillation, MonoCE, Stage, fit_sequences
from pyterrier_msft.training import batches, distributed

SGD = {"optim": "sgd"}  # AdamW would take steps along gradients that are 0 up to rounding
QUERIES = 37  # divisible by neither the number of processes nor the batch size
FIT = {"learning_rate": 0.3, "batch_size": 5, "epochs": 2, "dropout": 0.0, "warmup": 0, "clip_norm": None}
CASES = {
    "lce": Contrastive(n_negatives=3, trainer_args=SGD, **FIT),
    # a mean over pairs, whose number differs between lists
    "ranknet": Distillation(depth=8, trainer_args=SGD, **{**FIT, "learning_rate": 3.0}),
    "accumulated": Distillation(depth=8, gradient_accumulation=3, trainer_args=SGD, **{**FIT, "learning_rate": 3.0}),
    "bounded": Contrastive(n_negatives=3, gradient_accumulation=2, pairs_per_pass=3, trainer_args=SGD, **FIT),
    # the second part has batches of one query, so that rank 1 has none
    "joint": Contrastive(n_negatives=3, trainer_args=SGD, **FIT) + 0.5 * Distillation(depth=8, batch_size=1),
    # batches of one query, so that rank 1 has none
    "alone": Contrastive(n_negatives=3, trainer_args=SGD, **{**FIT, "batch_size": 1, "epochs": 1}),
    "adamw": Contrastive(n_negatives=3, **{**FIT, "learning_rate": 1e-2, "clip_norm": 10.0}),
}
NETWORKS = {"decoder": tiny_models.write_qwen_reranker}  # of other kinds
if importlib.util.find_spec("sentence_transformers"):
    NETWORKS["modular"] = tiny_models.write_modular


class Stopped(BaseException):
    """Stands for killed processes."""


def main(backbone: str, out: Path) -> None:
    part, dev = make_part("tr", n_queries=QUERIES, seed=1), make_part("va", n_queries=21, seed=2)
    # RankNet learns from lists of different lengths.
    uneven = part.results[(part.results["rank"] < 5) | (part.results["qid"].str[-1] < "5")]
    uneven = uneven.assign(score=uneven["quality"] * 10.0 + uneven["score"])
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu")
    folders = {name: out / f"{name}-{os.environ.get('RANK')}" for name in NETWORKS}
    for name, write_network in NETWORKS.items():  # before there is a process group, in which only rank 0 would write
        write_network(folders[name], backbone)

    def data(fitter):
        return (uneven, None) if isinstance(fitter, Distillation) else (part.results, part.qrels)

    def write(name: str, model: MonoCE, **more) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scores = model(dev.results)["score"].tolist()
        result = {
            "scores": scores,
            "fingerprint": model.fingerprint,
            "loss": model.history["loss"].tolist(),
            "metric": model.history["RR@10"].dropna().tolist() if "RR@10" in model.history else [],
            "head_is_new": any("random" in str(warning.message) for warning in caught),
            **more,
        }
        (out / f"{name}.{distributed.rank()}.json").write_text(json.dumps(result))

    for name, fitter in CASES.items():
        write(name, ce.clone().fit(*data(fitter), fitter=fitter))

    brief = dataclasses.replace(CASES["lce"], max_steps=3, learning_rate=0.1)
    for name in NETWORKS:
        network = MonoCE(folders[name], max_length=192 if name == "decoder" else 24, dtype="float32", device="cpu")
        write(name, network.fit(part.results, part.qrels, fitter=brief))

    # Several passes per step, a different number on each rank
    batches.TOKENS_PER_PASS["cpu"], before = 100, batches.TOKENS_PER_PASS["cpu"]
    write("passes", ce.clone().fit(*data(CASES["ranknet"]), fitter=CASES["ranknet"]))
    batches.TOKENS_PER_PASS["cpu"] = before

    # Validation, and patience that runs out
    stopping = dataclasses.replace(
        CASES["adamw"], metric=RR @ 10, eval_every=1, patience=2, epochs=9, learning_rate=0.01
    )
    write("stopping", ce.clone().fit(part.results, part.qrels, dev.results, dev.qrels, fitter=stopping))

    # Dropout and checkpoints, resumed after an interruption in a later epoch
    dropping = dataclasses.replace(
        CASES["adamw"], metric=RR @ 10, eval_every=2, dropout=0.2, epochs=3, loss=interruptible_lce
    )
    arguments = (part.results, part.qrels, dev.results, dev.qrels)
    write("whole", ce.clone().fit(*arguments, fitter=dropping))
    with contextlib.suppress(Stopped), interrupted_at(19, error=Stopped):
        ce.clone().fit(*arguments, fitter=dropping, checkpoint_dir=out / "checkpoints")
    files = sorted(file.name for file in (out / "checkpoints").glob("*/rng_state*"))
    distributed.wait_for_everyone()
    resumed = ce.clone().fit(*arguments, fitter=dropping, checkpoint_dir=out / "checkpoints")
    write("resumed", resumed, rng_states=files)

    # Data that differ between the ranks
    if distributed.world_size() > 1:
        other = part.results.iloc[: len(part.results) - 8 * distributed.rank()]
        try:
            ce.clone().fit(other, part.qrels, fitter=CASES["lce"])
        except ValueError as error:
            (out / f"differs.{distributed.rank()}.txt").write_text(str(error))

    # Stages: rank 0 saves them, and a second call reuses them
    stages = {"CL": Stage(CASES["lce"], *data(CASES["lce"])), "KD": Stage(CASES["ranknet"], *data(CASES["ranknet"]))}
    for name in ("sequence", "reused"):
        rerankers = fit_sequences(ce, stages, ["CL", "CL-KD"], save_dir=out / "models")
        write(name, rerankers["CL-KD"])
    distributed.wait_for_everyone()
    if distributed.rank() == 0:
        (out / "models.json").write_text(
            json.dumps(sorted(path.name.rpartition("-")[0] for path in (out / "models").glob("[!.]*")))
        )

    # One warning, on rank 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ce.clone().fit(part.results, part.qrels.head(30), fitter=dataclasses.replace(CASES["lce"], max_steps=1))
    messages = [str(warning.message) for warning in caught if "dropped" in str(warning.message)]
    (out / f"warnings.{distributed.rank()}.json").write_text(json.dumps(messages))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
