"""A fitter declares a stage of fine-tuning: `Contrastive` or `Distillation`."""

from pyterrier_msft.fitters.base import Fitter
from pyterrier_msft.fitters.contrastive import Contrastive
from pyterrier_msft.fitters.distillation import Distillation

__all__ = ["Contrastive", "Distillation", "Fitter"]
