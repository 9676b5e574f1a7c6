"""What test_interruption.py runs in a process of its own: trainings that are killed and taken up again, 20 times.

Everything is imported once; each training is a fork, which SIGKILL ends at a random moment or in the midst of a write.
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

import torch
from conftest import make_part
from ir_measures import RR

from pyterrier_msft import Contrastive, Distillation, MonoCE, Stage, fit_sequences
from pyterrier_msft.training import trainer as training
from pyterrier_msft.training.trainer import _ListTrainer

KILLS = 20
MOMENTS = {"replace": 6, "weights": 9, "state": 20}  # calls of each, in one of which the process dies
TRAIN, DEV = make_part("tr", n_queries=40, seed=1), make_part("va", n_queries=10, seed=2)
TEACHER = TRAIN.results.assign(score=TRAIN.results["quality"] * 10.0 + TRAIN.results["score"])
CL = Contrastive(  # negatives drawn anew, dropout, accumulation, best weights, patience
    n_negatives=3, learning_rate=1e-2, batch_size=4, gradient_accumulation=2, epochs=3, dropout=0.2, metric=RR @ 10,
    eval_every=2, patience=5,
)  # fmt: skip
KD = Distillation(teacher=TEACHER, learning_rate=1e-2, batch_size=4, max_steps=8, eval_every=2, dropout=0.2)


def one_stage(ce: MonoCE, folder: Path | None) -> MonoCE:
    return ce.fit(TRAIN.results, TRAIN.qrels, DEV.results, DEV.qrels, fitter=CL, checkpoint_dir=folder)


def two_stages(ce: MonoCE, folder: Path | None) -> MonoCE:
    first = Contrastive(n_negatives=3, learning_rate=1e-2, batch_size=4, max_steps=8, eval_every=2)
    return ce.fit(TRAIN.results, TRAIN.qrels, fitter=first >> KD, checkpoint_dir=folder)


def sequences(ce: MonoCE, folder: Path | None) -> MonoCE:
    first = Contrastive(n_negatives=3, learning_rate=1e-2, batch_size=4, max_steps=8, eval_every=2)
    stages = {"CL": Stage(first, TRAIN.results, TRAIN.qrels), "KD": Stage(KD, TRAIN.results)}
    return fit_sequences(ce, stages, ["CL-KD"], save_dir=folder)["CL-KD"]


CASES: dict[str, Callable[[MonoCE, Path | None], MonoCE]] = {
    "one stage": one_stage, "two stages": two_stages, "sequences": sequences,
}  # fmt: skip


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(function: Callable, number: float, *, half: bool) -> Callable:
    """The function, in whose n-th call the process dies: before it, or when half of what it writes is there."""
    calls = iter(range(1, 10_000))

    def wrapped(*args, **kwargs):
        if next(calls) < number:
            return function(*args, **kwargs)
        if half:
            function(*args, **kwargs)
            written = Path(args[1])
            os.truncate(written, written.stat().st_size // 2)
        return die()

    return wrapped


def child(backbone: str, case: str, folder: Path | None, log: Path, kill: tuple[str, float] | None) -> None:
    """Train, as a process; the log has a line a step, and the fingerprint at the end."""
    original = _ListTrainer.training_step

    def training_step(self, *args, **kwargs):
        with log.open("a") as file:
            line = [os.getpid(), Path(self.args.output_dir).name, self.state.global_step, time.monotonic()]
            file.write(json.dumps(line) + "\n")
        return original(self, *args, **kwargs)

    _ListTrainer.training_step = training_step
    kind, number = kill or ("", 0)
    if kind == "replace":
        os.replace = dying(os.replace, number, half=False)
    elif kind == "weights":
        training.save_file = dying(training.save_file, number, half=True)
    elif kind == "state":
        torch.save = dying(torch.save, number, half=True)
    ce = MonoCE(backbone, max_length=24, dtype="float32", device="cpu")
    trained = CASES[case](ce, folder)
    found = {"fingerprint": trained.fingerprint, "loss": trained.history["loss"].tolist()}
    log.with_suffix(".json").write_text(json.dumps(found))


def run(backbone: str, case: str, folder: Path | None, log: Path, kill: tuple[str, float] | None = None) -> bool:
    """Train in a fork, which dies as `kill` says; whether it came to its end."""
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
            if log.exists() and log.stat().st_size > lines:  # a first step
                time.sleep(kill[1])
                os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.005)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0, "a training failed"
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
        died, finished = [], False
        while not finished:
            kill = None
            if len(died) < 4 and kills < KILLS:
                kind = rng.choice(["time", "time", *MOMENTS])
                kill = kind, rng.uniform(0, seconds[case]) if kind == "time" else rng.randint(1, MOMENTS[kind])
            finished = run(backbone, case, folder, log, kill)
            if not finished:
                kills += 1
                died.append(kill[0] if kill else "?")
        steps = [json.loads(line)[:3] for line in log.read_text().splitlines()]
        found = json.loads(log.with_suffix(".json").read_text())
        left = sorted(path.relative_to(folder).as_posix() for path in folder.glob("**/checkpoint-*"))
        equal = found == expected[case]
        report.append({"case": case, "kills": died, "steps": steps, "equal": equal, "checkpoints": left})
    (out / "report.json").write_text(json.dumps({"kills": kills, "runs": report, "seconds": seconds}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
