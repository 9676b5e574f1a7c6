"""Train a cross-encoder on groups of documents with a listwise loss."""

from pyterrier_msft.training.hyperparameters import Hyperparameters

__all__ = ["Hyperparameters"]
