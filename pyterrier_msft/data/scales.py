"""Scales of a teacher's scores."""

import numpy as np
import pandas as pd

from pyterrier_msft.data.frames import require

SCALES = ("zscore", "minmax", "logit")
MIN_PROBABILITY = 1e-6  # log-odds are limited to ±13.8; those of 0 and 1 are infinite


def scale_scores(scores: np.ndarray, query: np.ndarray, scale: str | None) -> np.ndarray:
    """Scale a teacher's scores, of which `query` says the query; for the scales, see `Distillation`."""
    if scale is None:
        return scores
    if scale == "logit":
        rule = "teacher scores must be probabilities between 0 and 1 for scale='logit' (log-odds need no scale)"
        require((scores >= 0) & (scores <= 1), scores, rule)
        clipped = scores.clip(MIN_PROBABILITY, 1 - MIN_PROBABILITY)
        return np.log(clipped / (1 - clipped))
    by_query = pd.Series(scores).groupby(query)
    lowest, highest = by_query.transform("min"), by_query.transform("max")
    scaled = (scores - lowest) / (highest - lowest).replace(0, 1)  # equal scores become 0
    if scale == "zscore":  # of numbers between 0 and 1, whose squares don't overflow or vanish
        by_query = scaled.groupby(query)
        scaled = (scaled - by_query.transform("mean")) / by_query.transform("std", ddof=0).replace(0, 1)
    return scaled.to_numpy()


def check_probabilities(scores: np.ndarray) -> None:
    """Raise a ValueError unless scores can be soft labels."""
    rule = "teacher scores must be probabilities between 0 and 1, or scaled with scale='minmax', for this loss"
    require((scores >= 0) & (scores <= 1), scores, rule)
