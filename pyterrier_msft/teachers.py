"""A teacher in any of its forms to a ranking with an order: a frame of qid, docno and score or rank."""

from pathlib import Path
from typing import Any

import pandas as pd
import pyterrier as pt


def check(teacher: Any) -> None:
    """Raise a ValueError for what can't be a teacher, before anything is read or run."""
    if teacher is None or isinstance(teacher, pd.DataFrame):
        return
    if isinstance(teacher, str | Path):
        if not Path(teacher).is_file():
            raise ValueError(f"expected the path of a TREC run as teacher, found no file {str(teacher)!r}")
        return
    raise ValueError(f"expected a teacher that is a frame, the path of a TREC run or None, found {teacher!r}")


def ranking(teacher: Any, results: pd.DataFrame) -> pd.DataFrame | None:
    """The teacher's ranking of the results' queries; None where the results are the teacher's own."""
    if isinstance(teacher, str | Path):
        frame: pd.DataFrame = pt.io.read_results(str(teacher))
        return frame
    return teacher
