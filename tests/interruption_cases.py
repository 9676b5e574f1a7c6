"""Run by test_interruption.py in a process of its own: training runs that are killed 20 times and repeated.

Everything is imported once; each run is a fork, which SIGKILL ends at a random moment or in the middle of a write.
Without a second thread before the fork, that is safe.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from conftest import make_part
from interruptions import interruptible_lce, interruptible_ranknet, on_each_step
from ir_measures import RR
from transformers import TrainerState

from pyterrier_msft import Contrastive, Distillation, MonoCE, Stage, fit_sequences

KILLS = 20
# The parts of a checkpoint, and for each the last write at which the process may be killed.
WRITES = {"weights": 9, "random state": 20, "state": 6}
TRAIN, DEV = make_part("tr", n_queries=40, seed=1), make_part("va", n_queries=10, seed=2)
TEACHER = TRAIN.results.assign(score=TRAIN.results["quality"] * 10.0 + TRAIN.results["score"])
CL = Contrastive(  # resampled negatives, dropout, accumulation, best weights, patience
    n_negatives=3, learning_rate=1e-2, batch_size=4, gradient_accumulation=2, epochs=3, dropout=0.2, metric=RR @ 10,
    eval_every=2, patience=5, loss=interruptible_lce,
)  # fmt: skip
FIRST = Contrastive(
    n_negatives=3, learning_rate=1e-2, batch_size=4, max_steps=8, eval_every=2, loss=interruptible_lce
)  # fmt: skip
KD = Distillation(
    teacher=TEACHER, learning_rate=1e-2, batch_size=4, max_steps=8, eval_every=2, dropout=0.2,
    loss=interruptible_ranknet,
)  # fmt: skip


def one_stage(ce: MonoCE, folder: Path | None) -> MonoCE:
    return ce.fit(TRAIN.results, TRAIN.qrels, DEV.results, DEV.qrels, fitter=CL, checkpoint_dir=folder)


def two_stages(ce: MonoCE, folder: Path | None) -> MonoCE:
    return ce.fit(TRAIN.results, TRAIN.qrels, fitter=FIRST >> KD, checkpoint_dir=folder)


def sequences(ce: MonoCE, folder: Path | None) -> MonoCE:
    stages = {"CL": Stage(FIRST, TRAIN.results, TRAIN.qrels), "KD": Stage(KD, TRAIN.results)}
    return fit_sequences(ce, stages, ["CL-KD"], save_dir=folder)["CL-KD"]


CASES: dict[str, Callable[[MonoCE, Path | None], MonoCE]] = {
    "one stage": one_stage, "two stages": two_stages, "sequences": sequences,
}  # fmt: skip


def dying(function: Callable, call: float) -> Callable:
    """Make a function that writes a file kill the process in its n-th call, when half of the file is written."""
    calls = iter(range(1, 10_000))

    def wrapped(*args, **kwargs):
        result = function(*args, **kwargs)
        if next(calls) >= call:
            written = next(Path(arg) for arg in args if isinstance(arg, str | Path))
            os.truncate(written, written.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


def child(backbone: str, case: str, folder: Path | None, log: Path, kill: tuple[str, float] | None) -> None:
    """Train, as a process of its own; the log has a line for each batch, and the result at the end."""

    def write_step(stage: str, batch: int) -> None:
        with log.open("a") as file:
            file.write(json.dumps([os.getpid(), stage, batch, time.monotonic()]) + "\n")

    kind, number = kill or ("", 0)
    if kind == "weights":
        safetensors.torch.serialize_file = dying(safetensors.torch.serialize_file, number)
    elif kind == "random state":
        torch.save = dying(torch.save, number)
    elif kind == "state":
        TrainerState.save_to_json = dying(TrainerState.save_to_json, number)
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu")
    with on_each_step(write_step):
        trained = CASES[case](ce, folder)
    result = {"fingerprint": trained.fingerprint, "loss": trained.history["loss"].tolist()}
    log.with_suffix(".json").write_text(json.dumps(result))


def run(backbone: str, case: str, folder: Path | None, log: Path, kill: tuple[str, float] | None = None) -> bool:
    """Train in a fork, which dies as `kill` says; return whether it finished."""
    lines = log.stat().st_size if log.exists() else 0
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            child(backbone, case, folder, log, kill)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if kill is not None and kill[0] == "time":
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if log.exists() and log.stat().st_size > lines:  # after the first step
                time.sleep(kill[1])
                os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.005)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0, "training failed"
    return True


def main(backbone: str, out: Path) -> None:
    rng = random.Random(7)
    expected, seconds, report, kills = {}, {}, [], 0
    for case in CASES:
        log = out / f"{case}.log"
        assert run(backbone, case, out / "undisturbed" if case == "sequences" else None, log)
        moments = [json.loads(line)[-1] for line in log.read_text().splitlines()]
        expected[case], seconds[case] = json.loads(log.with_suffix(".json").read_text()), moments[-1] - moments[0]
    while kills < KILLS:
        case = list(CASES)[len(report) % len(CASES)]
        folder, log = out / f"run-{len(report)}", out / f"run-{len(report)}.log"
        killed_in, finished = [], False
        while not finished:
            kill = None
            if len(killed_in) < 4 and kills < KILLS:
                kind = rng.choice(["time", "time", *WRITES])
                kill = kind, rng.uniform(0, seconds[case]) if kind == "time" else rng.randint(1, WRITES[kind])
            finished = run(backbone, case, folder, log, kill)
            if not finished:
                kills += 1
                killed_in.append(kill[0] if kill else "?")
        result = json.loads(log.with_suffix(".json").read_text())
        checkpoints = sorted(path.relative_to(folder).as_posix() for path in folder.glob("**/checkpoint-*"))
        pids = [json.loads(line)[0] for line in log.read_text().splitlines()]
        batches = [pids.count(pid) for pid in dict.fromkeys(pids)]  # of each process
        equal = result == expected[case]
        report.append(
            {"case": case, "kills": killed_in, "batches": batches, "equal": equal, "checkpoints": checkpoints}
        )
    (out / "report.json").write_text(json.dumps({"kills": kills, "runs": report}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
