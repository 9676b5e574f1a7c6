"""The notebooks: executed on few queries (`pytest -m notebook`), and their outputs as they are committed."""

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
    """PyTerrier's home, with PyDocs built once."""
    return tmp_path_factory.mktemp("home")


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def written(output) -> str:
    """All text of an output, pictures aside."""
    data = {kind: text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")}
    return "\n".join([output.get("text", ""), *map(str, data.values())])


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_executes_on_few_queries(path, tmp_path, home, monkeypatch):
    pytest.importorskip("pyterrier_pisa")
    monkeypatch.syspath_prepend(FOLDER)
    from execute import execute

    notebook = execute(
        path, folder=tmp_path, MSFT_SMALL="1", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTERRIER_HOME=str(home)
    )
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    said = [output.text for output in outputs(notebook) if output.output_type == "stream" and output.name == "stderr"]
    assert not said
    assert [kinds(cell) for cell in notebook.cells] == [kinds(cell) for cell in nbformat.read(path, as_version=4).cells]


def kinds(cell):
    """The pictures and tables that a cell gives; what it prints may depend on the size."""
    return [] if cell.cell_type != "code" else [sorted(output.data) for output in cell.outputs if "data" in output]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # at one go, from the top
    kinds = {output.output_type for output in outputs(notebook)}
    assert "execute_result" in kinds  # a table
    assert "error" not in kinds
    for output in outputs(notebook):
        assert output.get("name") != "stderr"
        text = written(output)
        assert not PATHS.search(text), text
        assert "Traceback" not in text
        plain = output.get("text", output.get("data", {}).get("text/plain", ""))
        assert plain.count("\n") < 40  # no walls of log lines
    assert path.stat().st_size < 1_000_000


def test_paths_and_bars_are_left_out(tmp_path, monkeypatch):
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


def test_each_notebook_installs_what_is_missing():
    for path in NOTEBOOKS:
        first = next(cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
        assert 'find_spec("pyterrier_msft") is None' in first.source
        assert '%pip install -q "pyterrier-msft[demo]"' in first.source
