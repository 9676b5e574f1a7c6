"""Warnings that point at the user's line of code, however deep in a pipeline or a training run they are raised."""

import sys
import warnings

# Packages whose code may run between the user's line and a warning.
INTERNAL_PACKAGES = {
    "pyterrier_msft", "pyterrier", "pyterrier_alpha", "pyterrier_caching",
    "pandas", "torch", "transformers", "accelerate",
} | sys.stdlib_module_names  # fmt: skip


def warn(message: str) -> None:
    """Issue a warning that points at the innermost line outside this package and the libraries it works with."""
    frame, level = sys._getframe(1), 2  # `warnings.warn` counts its own caller, this function, as 1
    while frame.f_globals.get("__name__", "").partition(".")[0] in INTERNAL_PACKAGES:
        if frame.f_back is None:  # in a thread of this package
            level = 2
            break
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
