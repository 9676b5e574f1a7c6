"""Settings of the whole process that several threads change at once."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
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
