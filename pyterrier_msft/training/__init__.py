"""Groups, a loss and a cross-encoder to a trained one."""

from pyterrier_msft.training.hyperparameters import Hyperparameters

__all__ = ["Hyperparameters"]
