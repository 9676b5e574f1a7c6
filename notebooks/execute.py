"""Execute the notebooks and save their outputs: `python notebooks/execute.py [name …]`."""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
SIZE = re.compile(r"(\.head\(|max_steps=)(\d\d+)")  # a number of queries or steps
BAR = re.compile(r"(.*\d+%\|.*|\s*)")  # a progress bar of tqdm as text


def execute(path: Path, *, folder: Path = FOLDER, small: bool = False, **environment: str) -> nbformat.NotebookNode:
    """Return the notebook with the outputs of an execution in `folder`; with `small`, on few queries, as a test.

    Raises:
        CellExecutionError: If a cell raises an error.
    """
    notebook = nbformat.read(path, as_version=4)
    if small:
        for cell in notebook.cells:
            cell.source = SIZE.sub(lambda size: f"{size[1]}{max(6, int(size[2]) // 20)}", cell.source)
    client = NotebookClient(
        notebook, timeout=None, record_timing=False, store_widget_state=False, resources={"metadata": {"path": folder}}
    )
    client.execute(env={**os.environ, **environment})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_bar(output)]
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec", "language_info")}
    # Don't publish the paths of this machine.
    text = re.sub(rf"{re.escape(sys.prefix)}/[\w./-]*site-packages", "…/site-packages", nbformat.writes(notebook))
    return nbformat.reads(text.replace(str(Path.home()), "~"), as_version=4)


def is_bar(output: nbformat.NotebookNode) -> bool:
    """Return whether an output is only a progress bar."""
    if output.output_type == "stream":
        return output.name == "stderr" and all(map(BAR.fullmatch, re.split(r"[\r\n]", output.text)))
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def main() -> None:
    """Execute the named notebooks in turn and write each when it is done."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("names", nargs="*", help="for example 01-rerank; default: all")
    names = parser.parse_args().names or sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    for name in names:
        path, started = FOLDER / f"{name}.ipynb", time.monotonic()
        path.write_text(nbformat.writes(execute(path)) + "\n", encoding="utf-8")
        print(f"{name}: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
