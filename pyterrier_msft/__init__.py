"""Declarative multi-stage fine-tuning of cross-encoder re-rankers in PyTerrier."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The module of each public name, imported at first use, so that `import pyterrier_msft` (and PyTerrier's list of
# datasets, which imports this package) doesn't load torch and transformers.
_MODULE_OF = {
    "Contrastive": "fitters",
    "Distillation": "fitters",
    "MonoCE": "reranker",
    "PrependScore": "score_text",
    "Stage": "sequences",
    "explain": "explanation",
    "fit_grid": "grid",
    "fit_sequences": "sequences",
    "report": "study_report",
    "tost": "significance",
}
_MODULES = ("losses", "plots", "significance", "teachers", "unlabelled")

if TYPE_CHECKING:
    from pyterrier_msft import losses, plots, significance, teachers, unlabelled
    from pyterrier_msft.explanation import explain
    from pyterrier_msft.fitters import Contrastive, Distillation
    from pyterrier_msft.grid import fit_grid
    from pyterrier_msft.reranker import MonoCE
    from pyterrier_msft.score_text import PrependScore
    from pyterrier_msft.sequences import Stage, fit_sequences
    from pyterrier_msft.significance import tost
    from pyterrier_msft.study_report import report

__all__ = [
    "Contrastive", "Distillation", "MonoCE", "PrependScore", "Stage", "explain", "fit_grid", "fit_sequences", "losses",
    "plots", "report", "significance", "teachers", "tost", "unlabelled",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
