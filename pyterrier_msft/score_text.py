"""`PrependScore`: the first stage's score as part of the text that a re-ranker reads."""

import numpy as np
import pandas as pd
import pyterrier as pt

from pyterrier_msft.data.frames import as_texts, is_blank
from pyterrier_msft.data.rankings import first_stage_scores


class PrependScore(pt.Transformer):
    """Write the first stage's score in front of each document's text, so that a re-ranker can read it.

    The score becomes a whole number from 0 to 100: 0 is the lowest score of the query's documents, and 100 the highest.
    A cross-encoder that is trained on such texts learns to combine the number with what it reads (Askari et al., ECIR
    2023). So the re-ranker must always be used behind this transformer, with lists of about the same length.

    It needs the columns qid, score and the text, and changes only the text; an empty text stays empty. If a re-ranker
    that interpolates came before, the score is that of the column `first_stage_score`.

    Args:
        text_field: The column with the documents' text.

    Raises:
        ValueError: When called, if a score isn't a finite number.

    Example:
        >>> pipeline = bm25 % 20 >> dataset.text_loader() >> PrependScore() >> MonoCE()
    """

    reads_score = True  # for `teachers.cached`

    def __init__(self, *, text_field: str = "text") -> None:
        super().__init__()
        self.text_field = text_field

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Change the texts of results."""
        pt.validate.result_frame(inp, extra_columns=["score", self.text_field])
        scores = pd.Series(first_stage_scores(inp, "results"))
        by_query = scores.groupby(inp["qid"].to_numpy())
        lowest, highest = by_query.transform("min"), by_query.transform("max")
        share = ((scores - lowest) / (highest - lowest).where(highest > lowest)).fillna(1.0)
        texts = np.round(100 * share).astype(int).astype(str) + " " + as_texts(inp[self.text_field])
        texts[is_blank(inp[self.text_field])] = ""  # so that the re-ranker notices
        return inp.assign(**{self.text_field: texts.to_numpy()})
