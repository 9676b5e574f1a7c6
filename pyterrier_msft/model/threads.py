"""What several threads share: settings of the whole process, and weights that one of them trains."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

# Held by whoever seeds torch's global random state or draws from it: a training run, and loading a model with a new
# head. Take it before any other lock.
RANDOM_STATE = threading.RLock()


class SharedContext(AbstractContextManager[Any]):
    """A context manager that the first of several threads enters for all of them, and the last one exits.

    If each thread saved and restored a setting on its own, one would save what another has set, and restore that.
    """

    def __init__(self, make_context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make_context = make_context
        self._lock = threading.Lock()
        self._users = 0

    def __enter__(self) -> Any:
        with self._lock:
            if self._users == 0:
                self._context = self._make_context()
                self._value = self._context.__enter__()
            self._users += 1
            return self._value

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._context.__exit__(None, None, None)


class TrainingGuard:
    """Keeps threads from scoring with weights that another thread trains, and from training them, too."""

    def __init__(self, name: str) -> None:
        self._name = name  # of the model, for the error message
        self._trained_by: int | None = None  # the thread that trains it now
        self._n_trainings = 0

    @contextmanager
    def training(self) -> Iterator[None]:
        """Train inside the block; a RuntimeError if another thread does."""
        self.check()
        self._trained_by, self._n_trainings = threading.get_ident(), self._n_trainings + 1
        try:
            yield
        finally:
            self._trained_by = None

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Score inside the block; a RuntimeError if another thread trains before its end."""
        n_trainings = self._n_trainings
        self.check()
        yield
        if self._n_trainings > n_trainings:
            raise self._error()

    def check(self) -> None:
        """Raise a RuntimeError if another thread trains the weights."""
        if self._trained_by not in {None, threading.get_ident()}:
            raise self._error()

    def _error(self) -> RuntimeError:
        return RuntimeError(
            f"the re-ranker of {self._name} must not be used while another thread trains it. Wait for fit to return, "
            "or use a clone() that was made before"
        )
