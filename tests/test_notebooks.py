"""Execute the notebooks on few queries (`pytest -m notebook`), and check their committed outputs."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PATHS = re.compile(r"(?<![\w.~…/:-])/(home|root|tmp|usr|opt|var|content|private|Users|work|mnt)/")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a home folder of PyTerrier in which PyDocs is built once."""
    return tmp_path_factory.mktemp("home")


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text_of(output) -> str:
    """Return all text of an output, without images."""
    data = {kind: text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")}
    return "\n".join([output.get("text", ""), *map(str, data.values())])


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_executes_on_few_queries(path, tmp_path, home, monkeypatch):
    pytest.importorskip("bm25s")
    monkeypatch.syspath_prepend(FOLDER)
    from execute import execute

    notebook = execute(
        path, folder=tmp_path, small=True, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTERRIER_HOME=str(home)
    )
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    stderr = [output.text for output in outputs(notebook) if output.get("name") == "stderr"]
    assert not stderr
    committed = nbformat.read(path, as_version=4)
    assert [output_types(cell) for cell in notebook.cells] == [output_types(cell) for cell in committed.cells]


def output_types(cell):
    """Return the types of a cell's images and tables; printed output may depend on the number of queries."""
    return [] if cell.cell_type != "code" else [sorted(output.data) for output in cell.outputs if "data" in output]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # executed once, from the top
    types = {output.output_type for output in outputs(notebook)}
    assert "execute_result" in types  # a table
    assert "error" not in types
    for output in outputs(notebook):
        assert output.get("name") != "stderr"
        text = text_of(output)
        assert not PATHS.search(text), text
        assert "Traceback" not in text
        plain = output.get("text", output.get("data", {}).get("text/plain", ""))
        assert plain.count("\n") < 40  # no long logs
    assert path.stat().st_size < 1_000_000


def test_execute_removes_paths_and_progress_bars(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    from execute import execute

    source = (
        "import sys\nfrom pathlib import Path\n"
        "print('training:  50%|█████     | 3/6 [00:02<00:02]\\r', file=sys.stderr)\n"
        "print(Path(sys.prefix) / 'lib/site-packages/torch', Path.home() / 'data')"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(notebook, tmp_path / "a.ipynb")
    [output] = execute(tmp_path / "a.ipynb", folder=tmp_path).cells[0].outputs
    assert output.text == "…/site-packages/torch ~/data\n"


def test_each_notebook_installs_the_package_if_missing():
    for path in NOTEBOOKS:
        first = next(cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
        assert 'find_spec("pyterrier_msft") is None' in first.source
        assert '%pip install -q "pyterrier-msft[demo] @ git+https://' in first.source  # not on PyPI yet
