"""`CachedMonoCE`: a re-ranker that keeps its scores on disk."""

import contextlib
import hashlib
import json
import sqlite3
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pandas as pd
import pyterrier as pt

from pyterrier_msft.data.frames import with_scores
from pyterrier_msft.model.encoding import clean

if TYPE_CHECKING:
    from pyterrier_msft.reranker import MonoCE

# Increase it if the same weights and settings give other scores than before.
SCORING_VERSION = 2


class CachedMonoCE(pt.Estimator):
    """A `MonoCE` with a cache of scores, see `MonoCE.cached`."""

    __hash__ = object.__hash__

    def __init__(self, reranker: "MonoCE", folder: Path) -> None:
        super().__init__()
        try:
            import pyterrier_caching  # noqa: F401
        except ImportError as error:
            raise ImportError('MonoCE.cached needs the extra [cache]: pip install "pyterrier-msft[cache]"') from error
        self.reranker = reranker
        self.folder = folder
        self.schematic = {**reranker.schematic, "label": "MonoCE (cached)"}

    def fit(self, *args: Any, **options: Any) -> Self:
        """Train the re-ranker, see `MonoCE.fit`. New scores are cached separately from old ones."""
        self.reranker.fit(*args, **options)
        return self

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Score and rank documents as `MonoCE.transform` does, computing only scores that aren't cached."""
        inp = self.reranker.prepare(inp)
        if not len(inp):
            return self.reranker.transform(inp)
        # Keyed by content rather than by ids: the query's text and a digest of the document's.
        queries = [clean(query) for query in inp["query"]]
        texts = [clean(text) for text in inp[self.reranker.text_field]]
        keys = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        pairs = pd.DataFrame({"qid": queries, "query": queries, "docno": keys, self.reranker.text_field: texts})
        pairs = pairs.drop_duplicates(["query", "docno"])
        # Without padding, a model that reads it gives other scores.
        version = [SCORING_VERSION, *["unpadded"] * (self.reranker.batch_size == 1)]
        settings = json.dumps([*version, self.reranker.scoring_settings()], sort_keys=True)
        path = self.folder / f"{self.reranker.fingerprint}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
        while True:
            # Opened for each call, since a connection belongs to one thread and can't be pickled. On an IntegrityError
            # another process has written some of these scores in the meantime; the next attempt finds them.
            with contextlib.suppress(sqlite3.IntegrityError), contextlib.closing(self._open(path)) as cache:
                scored = cache(pairs).set_index(["query", "docno"])["score"]
                break
        return self.reranker.with_scores(inp, scored.loc[pd.MultiIndex.from_arrays([queries, keys])].to_numpy())

    def _open(self, path: Path) -> Any:
        """Open the cache in a folder. A new one is made elsewhere and renamed, as other processes may open it too."""
        from pyterrier_caching import Sqlite3ScorerCache

        if not path.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder) as partial:
                Sqlite3ScorerCache(Path(partial) / "new").close()
                with contextlib.suppress(OSError):  # another process was faster
                    (Path(partial) / "new").rename(path)
        return Sqlite3ScorerCache(path, pt.apply.generic(self._score))

    def _score(self, pairs: pd.DataFrame) -> pd.DataFrame:
        return with_scores(pairs, self.reranker.score(pairs))
