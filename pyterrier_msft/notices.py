"""Warnings that point at the user's line, however deep in a pipeline or a training they come up."""

import sys
import warnings

# What may stand between the user's call and the warning.
BETWEEN = {
    "pyterrier_msft", "pyterrier", "pyterrier_alpha", "pyterrier_caching",
    "pandas", "torch", "transformers", "accelerate",
} | sys.stdlib_module_names  # fmt: skip


def warn(message: str) -> None:
    """Warn at the innermost line that is neither ours nor a library's that calls us."""
    frame, level = sys._getframe(1), 2  # `warnings.warn` counts its own caller, this function, as 1
    while frame.f_globals.get("__name__", "").partition(".")[0] in BETWEEN:
        if frame.f_back is None:  # a thread of our own
            level = 2
            break
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
