"""Digests of a user's code: they change with the code and with what it refers to, and are equal in all processes."""

import dataclasses
import functools
import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import interrupted_at, interruptible_lce
from ir_measures import define_byquery

from pyterrier_msft import Contrastive, losses
from pyterrier_msft.digests import format_value

# Modules with a loss, and a change that has to change its digest.
CHANGES = {
    "a constant": ("def loss(s, l, m): return s.sum() * 2", "* 2", "* 3"),
    "an operation": ("def loss(s, l, m): return s.sum() * 2", "* 2", "+ 2"),
    "a method": ("def loss(s, l, m): return s.sum()", "sum", "mean"),
    "a default": ("def loss(s, l, m, k=1): return s.sum() * k", "k=1", "k=2"),
    "a keyword default": ("def loss(s, l, m, *, k=1): return s.sum() * k", "k=1", "k=2"),
    "an attribute": ("def loss(s, l, m): return s.sum()\nloss.labels = 'order'", "order", "binary"),
    "a global": ("K = 1\ndef loss(s, l, m): return s.sum() * K", "K = 1", "K = 2"),
    "a global of a global": ("K = 1\ndef f(): return K\ndef loss(s, l, m): return s.sum() * f()", "K = 1", "K = 2"),
    "a dictionary": ("K = {'a': {'x', 'y'}}\ndef loss(s, l, m): return s.sum() * len(K['a'])", "'y'", "'z'"),
    "bytes": ("K = b'a'\ndef loss(s, l, m): return s.sum() * K[0]", "b'a'", "b'b'"),
    "the index of a frame": (
        "import pandas\nK = pandas.DataFrame({'w': [1, 5]}, index=['p', 'n'])\ndef loss(s, l, m): return s * K",
        "['p', 'n']", "['n', 'p']",
    ),
    "an array in a cell of a frame": (
        "import numpy, pandas\nA = numpy.ones(3000)\nA[999] = 1.001\nK = pandas.DataFrame({'v': [A]})\n"
        "def loss(s, l, m): return s * K",
        "001", "002",
    ),
    "an element with a stride": (
        "import torch\nK = torch.tensor([1.0, 2.0])[::2]\ndef loss(s, l, m): return s * K", "[1", "[3",
    ),
    "a tensor": ("import torch\nK = torch.ones(2000)\nK[999] = 1.00001\ndef loss(s, l, m): return s * K", "001", "002"),
    "an array": ("import numpy\nK = numpy.ones(2000)\nK[999] = 1.00001\ndef loss(s, l, m): return s * K", "001", "002"),
    "a nested function": ("def loss(s, l, m):\n  def f(x): return x * 2\n  return f(s.sum())", "* 2", "* 3"),
    "a global of a nested function": (
        "K = 1\ndef loss(s, l, m): return sum((lambda: x * K)() for x in s)", "K = 1", "K = 2"
    ),
    "a captured value": ("def f(k): return lambda s, l, m: s.sum() * k\nloss = f(1)", "f(1)", "f(2)"),
    "a captured function": (
        "def f(g): return lambda s, l, m: g(s)\nloss = f(lambda x: x.sum())", "sum", "mean",
    ),
    "a lambda of a line": ("a, b = (lambda s, l, m: s.sum()), (lambda s, l, m: s.max())\nloss = a", "= a", "= b"),
    "a recursive function": (
        "def even(n): return n == 0 or odd(n - 1)\ndef odd(n): return n > 0 and even(n - 1)\n"
        "def loss(s, l, m): return s.sum() * even(4)", "n > 0", "n > 1",
    ),
    "a decorator": (
        "from functools import wraps\ndef twice(f):\n  @wraps(f)\n  def g(*args): return 2 * f(*args)\n  return g\n"
        "@twice\ndef loss(s, l, m): return s.sum()", "2 *", "3 *",
    ),
    "a wrapper with a library's name": (
        "from functools import wraps\nfrom pyterrier_msft.losses import ranknet\n@wraps(ranknet)\n"
        "def loss(s, l, m): return ranknet(2 * s, l, m)", "2 *", "3 *",
    ),
    "a library's decorator": (
        "import torch\n@torch.enable_grad()\ndef loss(s, l, m): return s.sum()", "s.sum", "s.mean",
    ),
    "a cached function": (
        "from functools import cache\n@cache\ndef f(x): return x + 1\ndef loss(s, l, m): return s.sum() * f(1)",
        "x + 1", "x + 2",
    ),
    "a compiled function": ("import torch\n@torch.compile\ndef loss(s, l, m): return s.sum()", "sum", "mean"),
    "a partial's function": (
        "from functools import partial\ndef f(s, l, m, k): return s.sum() * k\nloss = partial(f, k=1)", "sum", "mean",
    ),
    "a partial's argument": (
        "from functools import partial\ndef f(s, l, m, k): return s.sum() * k\nloss = partial(f, k=1)", "k=1", "k=2",
    ),
    "an object's __call__": (
        "class Loss:\n  def __call__(self, s, l, m): return s.sum()\nloss = Loss()", "sum", "mean",
    ),
    "an object's attribute": (
        "class Loss:\n  def __init__(self): self.k = 1\n  def __call__(self, s, l, m): return s.sum() * self.k\n"
        "loss = Loss()", "k = 1", "k = 2",
    ),
    "an object's slot": (
        "class Loss:\n  __slots__ = ('k',)\n  def __init__(self): self.k = 1\n"
        "  def __call__(self, s, l, m): return s.sum() * self.k\nloss = Loss()", "k = 1", "k = 2",
    ),
    "a class attribute": (
        "class Loss:\n  k = 1\n  def __call__(self, s, l, m): return s.sum() * self.k\nloss = Loss()", "k = 1", "k = 2",
    ),
    "an inherited method": (
        "class Base:\n  def f(self): return 1\nclass Loss(Base):\n"
        "  def __call__(self, s, l, m): return s.sum() * super().f()\nloss = Loss()", "return 1", "return 2",
    ),
    "properties": (
        "from functools import cached_property\nclass Loss:\n  @property\n  def k(self): return 1 + self.j\n"
        "  @cached_property\n  def j(self): return self.i()\n  @staticmethod\n  def i(): return 5\n"
        "  def __call__(self, s, l, m): return s.sum() * self.k\nloss = Loss()", "return 5", "return 6",
    ),
    "a bound method": ("class A:\n  def f(self, s, l, m): return s.sum()\nloss = A().f", "sum", "mean"),
    "a dataclass's __call__": (
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Loss:\n  k: int = 1\n"
        "  def __call__(self, s, l, m): return s.sum() * self.k\nloss = Loss()", "sum", "mean",
    ),
    "a dataclass's field": (
        "from dataclasses import dataclass, field\n@dataclass(frozen=True, slots=True)\nclass Loss:\n"
        "  k: list = field(default_factory=lambda: [1])\n"
        "  def __call__(self, s, l, m): return s.sum() * self.k[0]\nloss = Loss()", "[1]", "[2]",
    ),
    "an enumeration": (
        "from enum import Enum\nclass E(Enum):\n  A = 1\ndef loss(s, l, m): return s * E.A.value", "A = 1", "A = 2",
    ),
    "a named tuple": (
        "from typing import NamedTuple\nclass K(NamedTuple):\n  k: int = 1\n"
        "def loss(s, l, m): return s.sum() * K().k", "k: int = 1", "k: int = 2",
    ),
    "a module's forward": (
        "import torch\nclass Loss(torch.nn.Module):\n  def forward(self, s, l, m): return s.sum()\nloss = Loss()",
        "sum", "mean",
    ),
    "a module's buffer": (
        "import torch\nclass Loss(torch.nn.Module):\n  def __init__(self):\n    super().__init__()\n"
        "    self.register_buffer('k', torch.tensor(1.0))\n"
        "  def forward(self, s, l, m): return s.sum() * self.k\nloss = Loss()", "1.0", "2.0",
    ),
    "a part of a combination": (
        "from pyterrier_msft import losses\nloss = losses.combine((lambda s, l, m: s.sum(), 1.0), (losses.ranknet, 1))",
        "sum", "mean",
    ),
    "a setting of the package's losses": (
        "from pyterrier_msft import losses\nloss = losses.LambdaLoss(k=3)", "k=3", "k=4",
    ),
}  # fmt: skip


def load(path: Path) -> Any:
    """Execute a module and return its loss."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.loss


def identity(loss: Any) -> list[str]:
    """Return a fitter's digest, and what a checkpoint records of the loss."""
    fitter = Contrastive(loss=loss)
    return [fitter.digest(), fitter.readable_settings()["loss"]]


def write(folder: Path, name: str, source: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name.replace(' ', '_')}.py"
    path.write_text(source)
    return path


@pytest.mark.parametrize("name", CHANGES)
def test_a_digest_changes_with_the_code(tmp_path, name):
    source, old, new = CHANGES[name]
    assert source.count(old) == 1
    before = load(write(tmp_path / "before", name, source))
    after = load(write(tmp_path / "after", name, source.replace(old, new)))
    assert identity(before)[0] != identity(after)[0]
    assert identity(before)[1].split()[-1] != identity(after)[1].split()[-1]


@pytest.mark.parametrize("name", CHANGES)
def test_a_digest_does_not_depend_on_the_place_of_the_code(tmp_path, name):
    source = CHANGES[name][0]
    moved = f"# A comment\nUNUSED = 3\n\n\n{source}\n\ndef unused(): ...\n"
    assert identity(load(write(tmp_path / "a", name, source))) == identity(load(write(tmp_path / "b", name, moved)))


def test_digests_are_equal_in_other_processes(tmp_path):
    paths = [str(write(tmp_path, name, source)) for name, (source, _, _) in CHANGES.items()]
    script = (
        "import json, sys; from pathlib import Path; from test_digests import identity, load; "
        "print(json.dumps([identity(load(Path(path))) for path in sys.argv[1:]]))"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "PYTHONHASHSEED": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", script, *paths], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found == [identity(load(Path(path))) for path in paths]
    assert not any("0x" in text for _, text in found)


def test_a_digest_changes_with_a_module_that_the_code_refers_to(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []
    for number in (1, 1, 2):
        (tmp_path / "part_of_loss.py").write_text(f"import part_of_loss\nK = {number}\ndef f(x): return x * K\n")
        loss = write(tmp_path, "loss", "import part_of_loss\ndef loss(s, l, m): return part_of_loss.f(s.sum())\n")
        monkeypatch.delitem(sys.modules, "part_of_loss", raising=False)
        found.append(identity(load(loss))[0])
        for cache in tmp_path.glob("__pycache__/*"):
            cache.unlink()
    assert found[0] == found[1] != found[2]


def test_code_does_not_change_when_it_runs():
    def loss(scores, labels, mask):
        return sum(score * 2 for score in scores)

    before = identity(loss)
    for _ in range(100):
        loss(torch.ones(3), None, None)
    assert identity(loss) == before


def test_a_digest_knows_a_subclass_of_a_fitter():
    def fitter(factor):
        class Own(Contrastive):
            def scaled(self):
                return factor

        return Own()

    assert fitter(1).digest() == fitter(1).digest()
    assert len({fitter(1).digest(), fitter(2).digest(), Contrastive().digest()}) == 3


def test_a_digest_changes_with_the_code_of_a_metric():
    measures = [define_byquery(impl, name="mine") for impl in (lambda q, r: 0.0, lambda q, r: 1.0, lambda q, r: 1.0)]
    first, second, third = (Contrastive(metric=measure).digest() for measure in measures)
    assert first != second == third


LOGGER = logging.getLogger("a logger")


def test_objects_that_can_be_pickled_have_digests():
    def logged(scores, labels, mask):
        LOGGER.info("called")
        return scores.sum()

    assert identity(logged) == identity(logged)
    assert identity(losses.ranknet)[1].startswith("losses.ranknet (")


class Stateful:
    """A loss with a part that can't be pickled."""

    def __init__(self, part: Any) -> None:
        self.part, self.k = part, 1

    def __call__(self, scores, labels, mask):
        return scores.sum() * self.k


class StatefulWithout(Stateful):
    def __getstate__(self):
        return {"k": self.k}


@pytest.mark.parametrize("part", [threading.Lock(), (i for i in ()), open(os.devnull)])  # noqa: SIM115
def test_what_cannot_be_known_has_no_digest(part):
    def captures(scores, labels, mask):
        return part

    for loss in (Stateful(part), functools.partial(losses.ranknet, part), captures):
        with pytest.raises(
            ValueError, match=r"^loss must consist of code and of objects that can be pickled .*cannot p"
        ):
            Contrastive(loss=loss).digest()
    one, other = StatefulWithout(part), StatefulWithout(part)
    assert identity(one) == identity(other)
    other.k = 2
    assert identity(one) != identity(other)


def test_values_are_formatted_without_addresses():
    for value in (Stateful(1), Stateful(1).__call__, functools.partial(Stateful(1)), [interruptible_lce]):
        assert "0x" in repr(value)
        assert "0x" not in format_value(value)


class Interruptible:
    """A plain object as a loss."""

    def __call__(self, scores, labels, mask):
        return interruptible_lce(scores, labels, mask)


def scaled(scores, labels, mask, *, factor):
    return factor * interruptible_lce(scores, labels, mask)


@pytest.mark.parametrize("make", [Interruptible, lambda: functools.partial(scaled, factor=2.0)])
def test_training_with_an_object_is_resumed(ce, train_part, tmp_path, make):
    fitter = Contrastive(n_negatives=3, learning_rate=1e-2, batch_size=8, max_steps=4, loss=make())
    with interrupted_at(2), pytest.raises(KeyboardInterrupt):
        ce.clone().fit(train_part.results, train_part.qrels, fitter=fitter, checkpoint_dir=tmp_path)
    again = dataclasses.replace(fitter, loss=make())
    ce.fit(train_part.results, train_part.qrels, fitter=again, checkpoint_dir=tmp_path)
    assert ce.history["step"].tolist() == [1, 2, 3, 4]
