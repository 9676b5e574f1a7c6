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


# The names of what runs, e.g. a seed and a sequence.
_prefixes: ContextVar[tuple[str, ...]] = ContextVar("prefixes", default=())
# The messages about data so far, within `deduplicate_data_warnings`.
_issued: ContextVar[set[str] | None] = ContextVar("issued", default=None)


def shows_progress(verbose: bool | None) -> bool:
    """Whether to show progress bars: as `verbose` says, or, if it is None, where somebody sees them."""
    return _is_interactive() if verbose is None else verbose


def _is_interactive() -> bool:
    """Whether this runs in a notebook or a terminal."""
    find_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = None if find_shell is None else find_shell()
    return "IPKernelApp" in getattr(shell, "config", {}) or sys.stderr.isatty()


@contextlib.contextmanager
def message_prefix(name: str) -> Iterator[None]:
    """Put the name of what runs before the messages of warnings, and of progress bars."""
    token = _prefixes.set((*_prefixes.get(), name))
    try:
        yield
    finally:
        _prefixes.reset(token)


def with_prefix(message: str) -> str:
    """Put the names of what runs before a message."""
    prefixes = _prefixes.get()
    return f"{', '.join(prefixes)}: {message}" if prefixes else message


@contextlib.contextmanager
def deduplicate_data_warnings() -> Iterator[None]:
    """Issue each warning of `warn_of_data` once within the block."""
    if _issued.get() is not None:
        yield
        return
    token = _issued.set(set())
    try:
        yield
    finally:
        _issued.reset(token)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().split("\n", 1)[0]


def warn_of_data(message: str) -> None:
    """Issue a warning about data, which may be read once for each seed and sequence."""
    issued = _issued.get()
    if issued is None or message not in issued:
        warn(message)
    if issued is not None:
        issued.add(message)


def warn(message: str) -> None:
    """Issue a warning that points at the innermost line outside this package and the libraries it works with."""
    message = with_prefix(message)
    frame, level = sys._getframe(1), 2  # `warnings.warn` counts its own caller, this function, as 1
    while frame.f_globals.get("__name__", "").partition(".")[0] in INTERNAL_PACKAGES:
        if frame.f_back is None:  # in a thread of this package
            level = 2
            break
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
