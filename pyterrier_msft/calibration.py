"""Probabilities of relevance that follow from a re-ranker's scores."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd

from pyterrier_msft.checks import check_number
from pyterrier_msft.data.validation import validation_frames
from pyterrier_msft.ids import as_ids
from pyterrier_msft.model.record import Record
from pyterrier_msft.notices import warn

if TYPE_CHECKING:
    from pyterrier_msft.reranker import MonoCE

METHODS = ("logistic", "isotonic")
NEEDS_SKLEARN = 'MonoCE.calibrate needs the extra [calibrate]: pip install "pyterrier-msft[calibrate]"'
PROBABILITY = "probability"  # the column that a calibrated re-ranker adds


@dataclass(frozen=True)
class Calibration(Record):
    """A function from scores to probabilities, and what it was estimated from; see `MonoCE.calibrate`."""

    method: str
    queries: int
    documents: int
    relevant: int  # documents
    fingerprint: str | None  # of the model that gave the scores; None: unknown, in a record of an earlier version
    settings: dict[str, Any]  # of the re-ranker that affect its scores
    slope: float = 0.0  # logistic: 1 / (1 + exp(-(slope * score + intercept)))
    intercept: float = 0.0
    scores: list[float] = field(default_factory=list)  # isotonic: a line connects these points
    probabilities: list[float] = field(default_factory=list)
    highest: float = 1.0  # score of these documents

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Return the probability of relevance for each score."""
        if self.method == "isotonic":
            return np.interp(scores, self.scores, self.probabilities)
        return 0.5 * (1 + np.tanh((self.slope * scores + self.intercept) / 2))  # doesn't overflow

    def __str__(self) -> str:
        return (
            f"{self.method}, from {self.relevant:,} relevant among {self.documents:,} documents of {self.queries:,} "
            f"queries; probabilities of up to {float(self(np.array(self.highest))):.2f}"
        )


class CalibrationMixin:
    """The methods of a re-ranker that estimate and add probabilities."""

    calibration: Calibration | None = None
    _checked_calibration: Calibration | None = None  # the one that is known to be for the present weights

    def calibrate(
        self, results: pd.DataFrame, qrels: pd.DataFrame, *, method: str = "logistic", min_relevance: float = 1
    ) -> Self:
        """Learn how likely a document with a certain score is relevant; `transform` then adds this `probability`.

        The order of the documents stays the same. The probability holds for documents like those of `results`: use the
        first stage and the depth that you re-rank later. Documents without a label count as not relevant; queries
        without a label are left out, with a warning. Of a document's passages (docnos such as `d1%p0`), the one with
        the best score counts: the probability is that of the document, after `pt.text.max_passage()`.

        Args:
            results: A first stage's results, like those of `transform`. They must be of **other queries** than those
                that the model was trained on, which get higher scores for their relevant documents than new queries do.
            qrels: Their labels: qid, docno, label.
            method: "logistic" fits two numbers (Platt, 1999), "isotonic" any increasing function (Zadrozny and Elkan,
                KDD 2002), which needs more labels: about a thousand relevant documents.
            min_relevance: Minimum label of a relevant document.

        Returns:
            The re-ranker itself. `save` stores the calibration with the model. `fit` removes it if it changes the
            weights.

        Raises:
            ValueError: If the model is untrained, no document or every document is relevant, or `min_relevance` isn't
                positive.
            ImportError: Without scikit-learn (extra `[calibrate]`).
        """
        self.calibration = estimate(self, results, qrels, method=method, min_relevance=min_relevance)  # type: ignore[arg-type]
        return self

    def add_probability(self, results: pd.DataFrame) -> pd.DataFrame:
        """Add the probabilities to scored results; without a calibration, drop those of an earlier re-ranker."""
        if self.calibration is None:
            return results.drop(columns=PROBABILITY, errors="ignore")
        return results.assign(**{PROBABILITY: self.calibration(results["score"].to_numpy(dtype=np.float64))})

    def check_calibration(self: Any) -> None:
        """Raise a ValueError if the re-ranker has other settings or weights than those of its calibration.

        The weights are compared once: `fit` removes the calibration when it changes them.
        """
        if self.calibration is None:
            return
        advice = "Call calibrate again, or set calibration = None"
        now, before = score_settings(self), self.calibration.settings
        if changed := [name for name in now if name in before and now[name] != before[name]]:
            name = changed[0]
            raise ValueError(f"{name} must be {before[name]!r}, as in calibrate; got {now[name]!r}. {advice}")
        if self._checked_calibration is not self.calibration:
            expected = self.calibration.fingerprint
            if expected is not None and expected != (found := self.fingerprint):
                raise ValueError(
                    f"weights, tokenizer and template must be those of calibrate, with the fingerprint {expected}; got "
                    f"{found}. {advice}"
                )
            self._checked_calibration = self.calibration

    def remove_stale_calibration(self: Any) -> None:
        """Remove the calibration, with a warning, if the weights have changed since."""
        if self.calibration is not None and self.calibration.fingerprint != self.fingerprint:
            self.calibration = None
            warn("the calibration is removed, as it is for other weights: call calibrate again")


def score_settings(reranker: "MonoCE") -> dict[str, Any]:
    """Return the settings that affect scores; `dtype` only affects their precision."""
    settings = {name: value for name, value in reranker.scoring_settings().items() if name != "dtype"}
    return {**settings, "interpolate": reranker.first_stage_weight}


def estimate(
    reranker: "MonoCE", results: pd.DataFrame, qrels: pd.DataFrame, *, method: str, min_relevance: float
) -> Calibration:
    """Estimate the calibration of a re-ranker's scores, see `MonoCE.calibrate`."""
    if method not in METHODS:
        raise ValueError(f"method must be 'logistic' or 'isotonic'; got {method!r}")
    check_number("min_relevance", min_relevance, required=True)
    if results is None or qrels is None:
        raise ValueError(f"{'results' if results is None else 'qrels'} are required by calibrate; got None")
    frames = validation_frames(
        results, qrels, reranker.text_source, what="calibration", with_scores=reranker.interpolate is not False
    )
    assert frames is not None
    frame, labels = frames
    if reranker.cross_encoder.head_is_new:
        raise ValueError(f"calibrate needs a trained model; got {reranker!r}, whose head is untrained. Call fit first")
    uncalibrated = reranker.with_model(reranker.cross_encoder)  # shares the weights
    uncalibrated.calibration = None
    _warn_of_left_out(results, frame)
    scored = uncalibrated.transform(frame.rename(columns={"text": reranker.text_field}))
    best = scored.groupby(["qid", "docno"], sort=False)["score"].max()  # of the passages of a document
    scores = best.to_numpy()
    pairs = labels.loc[labels["label"] >= min_relevance, ["qid", "docno"]]
    relevant = best.index.isin(pd.MultiIndex.from_frame(pairs))
    if relevant.all() or not relevant.any():
        found = "only relevant ones" if relevant.all() else "none that is relevant"
        raise ValueError(f"calibration results must have relevant documents and others; got {found}")
    if scores[relevant].mean() <= scores[~relevant].mean():
        warn(
            "relevant documents don't get higher scores than others: the means are "
            f"{scores[relevant].mean():.3g} and {scores[~relevant].mean():.3g}. All probabilities are about the same"
        )
    return Calibration(
        method=method, queries=int(frame["qid"].nunique()), documents=len(best), relevant=int(relevant.sum()),
        fingerprint=reranker.fingerprint, settings=score_settings(reranker), highest=float(scores.max()),
        **(_isotonic if method == "isotonic" else _logistic)(scores, relevant),
    )  # fmt: skip


def _warn_of_left_out(results: pd.DataFrame, judged: pd.DataFrame) -> None:
    """Warn about queries without a label, and about rows with the same qid and docno."""
    pairs = pd.DataFrame({name: as_ids(results[name]).to_numpy() for name in ("qid", "docno")})
    queries = pairs["qid"].nunique()
    if missing := queries - judged["qid"].nunique():
        warn(
            f"calibrate left out {missing:,} of {queries:,} queries, which have no label. If they have no relevant "
            "document, probabilities will be too high: pass a label of 0 for each"
        )
    if repeated := int(pairs[pairs["qid"].isin(judged["qid"])].duplicated().sum()):
        warn(f"calibrate counts each document once, with its best score: {repeated:,} results are duplicates")


def _logistic(scores: np.ndarray, relevant: np.ndarray) -> dict[str, Any]:
    """Fit Platt's logistic regression, whose targets aren't quite 0 and 1, so that the slope is always finite."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(NEEDS_SKLEARN) from error
    n_relevant = int(relevant.sum())
    if scores[relevant].mean() <= scores[~relevant].mean():  # the best slope that isn't negative
        return {"slope": 0.0, "intercept": float(np.log(n_relevant / (len(relevant) - n_relevant)))}
    targets = np.where(relevant, (n_relevant + 1) / (n_relevant + 2), 1 / (len(relevant) - n_relevant + 2))
    mean, spread = scores.mean(), scores.std()
    inputs = np.tile((scores - mean) / spread, 2)[:, None]
    classes = np.repeat([1, 0], len(scores))  # each document is both, in the proportion of its target
    model = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000)
    model.fit(inputs, classes, sample_weight=np.concatenate([targets, 1 - targets]))
    slope = float(model.coef_[0, 0] / spread)
    return {"slope": slope, "intercept": float(model.intercept_[0] - slope * mean)}


def _isotonic(scores: np.ndarray, relevant: np.ndarray) -> dict[str, Any]:
    try:
        from sklearn.isotonic import IsotonicRegression
    except ImportError as error:
        raise ImportError(NEEDS_SKLEARN) from error
    model = IsotonicRegression(y_min=0.0, y_max=1.0).fit(scores, relevant.astype(float))
    return {"scores": model.X_thresholds_.tolist(), "probabilities": model.y_thresholds_.tolist()}
