"""What users see besides results: warnings that point at their line of code, and whether they can see progress."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from contextvars import ContextVar

# Packages whose code may run between the user's line and a warning.
INTERNAL_PACKAGES = {
    "pyterrier_msft", "pyterrier", "pyterrier_alpha", "pyterrier_caching",
    "pandas", "torch", "transformers", "accelerate",
} | sys.stdlib_module_names  # fmt: skip


# What the code that runs now belongs to, e.g. a seed and a sequence.
_names: ContextVar[tuple[str, ...]] = ContextVar("names", default=())
# The messages about data so far, where the same data may be read several times.
_said: ContextVar[set[str] | None] = ContextVar("said", default=None)


def shows_progress(verbose: bool | None) -> bool:
    """Whether to show progress bars: as `verbose` says, or, if it is None, where somebody sees them."""
    return _is_interactive() if verbose is None else verbose


def _is_interactive() -> bool:
    """Whether this runs in a notebook or a terminal."""
    find_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = None if find_shell is None else find_shell()
    return "IPKernelApp" in getattr(shell, "config", {}) or sys.stderr.isatty()


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Put a name before the messages of warnings, and of progress bars."""
    token = _names.set((*_names.get(), name))
    try:
        yield
    finally:
        _names.reset(token)


def named(message: str) -> str:
    """Put the names before a message."""
    names = _names.get()
    return f"{', '.join(names)}: {message}" if names else message


@contextlib.contextmanager
def saying_once() -> Iterator[None]:
    """Within this, `warn_of_data` gives the same warning once."""
    if _said.get() is not None:
        yield
        return
    token = _said.set(set())
    try:
        yield
    finally:
        _said.reset(token)


def warn_of_data(message: str) -> None:
    """Issue a warning about data, which may be read once for each seed and sequence."""
    said = _said.get()
    if said is None or message not in said:
        warn(message)
    if said is not None:
        said.add(message)


def warn(message: str) -> None:
    """Issue a warning that points at the innermost line outside this package and the libraries it works with."""
    message = named(message)
    frame, level = sys._getframe(1), 2  # `warnings.warn` counts its own caller, this function, as 1
    while frame.f_globals.get("__name__", "").partition(".")[0] in INTERNAL_PACKAGES:
        if frame.f_back is None:  # in a thread of this package
            level = 2
            break
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
