"""The examples as a user runs them, at a small scale."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import write_tiny_bert

from pyterrier_msft import MonoCE

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTERRIER_HOME": str(cwd / "home")}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True, timeout=600)


def test_quickstart(tmp_path):
    pytest.importorskip("pyterrier_pisa")
    backbone = write_tiny_bert(tmp_path / "tiny")
    arguments = ["--queries", "48", "--test-queries", "20", "--backbone", backbone]
    first = run("quickstart.py", *arguments, cwd=tmp_path)
    out = tmp_path / "quickstart-out"
    results = pd.read_csv(out / "results.csv")
    assert results["name"].tolist() == ["BM25", "teacher", "CL", "KD", "CL-KD", "KD-CL"]
    assert {"nDCG@10", "RR@10", "AP", "R@100", "nDCG@10 p-value"} <= set(results.columns)
    perquery = pd.read_csv(out / "perquery.csv")
    assert [*perquery.columns] == ["name", "qid", "measure", "value"]
    assert len(perquery) == 6 * 20 * 4
    history = pd.read_csv(out / "history.csv")
    assert history.groupby("system")["stage"].max().to_dict() == {"CL": 1, "KD": 1, "CL-KD": 2, "KD-CL": 2}
    for plot in ("learning-curve.png", "query-differences.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
    assert len({MonoCE.load(folder).fingerprint for folder in (out / "models").iterdir()}) == 4
    assert "BM25" in first.stdout
    assert "PISA" not in first.stdout + first.stderr

    again = run("quickstart.py", *arguments, cwd=tmp_path)
    assert "training by" in first.stderr
    assert "training by" not in again.stderr
    pd.testing.assert_frame_equal(pd.read_csv(out / "results.csv"), results)
