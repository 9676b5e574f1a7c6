"""The wheel and the source distribution: files, metadata and entry points."""

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import pyterrier_msft

pytest.importorskip("setuptools", "77")

ROOT = Path(__file__).parents[1]
MODULES = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("pyterrier_msft/**/*.py")}
DATA = ("pt_docs/*.rst", "templates/*.html")
PAGES = {path.relative_to(ROOT).as_posix() for glob in DATA for path in ROOT.glob(f"pyterrier_msft/{glob}")}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the source distribution, built from a copy of the tracked files."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff"]
    files += ["CHANGELOG.md", "constraints.txt"]
    for name in files:
        (source / name).write_bytes((ROOT / name).read_bytes())
    for name in ("docs", "examples", "tests"):
        (source / name).symlink_to(ROOT / name)
    (source / "pyterrier_msft").mkdir()
    for name in MODULES | PAGES | {"pyterrier_msft/py.typed"}:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = "import setuptools.build_meta as b, sys; out = sys.argv[1]; b.build_sdist(out); b.build_wheel(out)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", build, str(out)], cwd=source, env=environment, check=True, capture_output=True
    )
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_the_wheel_has_all_modules_and_data(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == MODULES | PAGES | {"pyterrier_msft/py.typed"}
    assert "pyterrier_msft/pt_docs/index.rst" in names  # where PyTerrier's documentation looks for plugins' pages


def test_the_wheel_has_metadata_and_entry_points(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        folder = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")).rpartition("/")[0]
        metadata = email.message_from_bytes(wheel.read(f"{folder}/METADATA"))
        groups = wheel.read(f"{folder}/entry_points.txt").decode()
        assert any(name.endswith("LICENSE") for name in wheel.namelist())
    assert metadata["Name"] == "pyterrier-msft"
    assert metadata["Version"] == pyterrier_msft.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    links = re.findall(r"\]\(([^)]*)\)", metadata.get_payload())
    assert len(links) > 10
    assert all(link.startswith(("https://", "#")) for link in links)  # PyPI doesn't have the repository's files
    required = metadata.get_all("Requires-Dist") or []
    assert all(">=" in requirement for requirement in required), "every dependency needs a lower bound"
    lines = [line for line in groups.splitlines() if " = " in line]
    assert len(lines) >= 2
    for line in lines:
        name, value = line.split(" = ")
        assert callable(EntryPoint(name, value, group="").load()), line


def test_the_source_distribution_has_tests_and_examples(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= MODULES | PAGES
    assert names >= {"README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"}
    assert names >= {"tests/conftest.py", "examples/quickstart.py"}


def test_all_links_name_one_repository() -> None:
    """The address is `REPOSITORY` of setup.py; a failure lists the places that name another one."""
    address = re.search(r'REPOSITORY = "https://(.*?)"', (ROOT / "setup.py").read_text(encoding="utf-8"))[1]
    patterns = ("*.md", "*.cff", "docs/**/*.md", "docs/conf.py", "notebooks/*.ipynb", "pyterrier_msft/**/*.py")
    found = {}
    for path in [path for pattern in patterns for path in ROOT.glob(pattern) if "_build" not in path.parts]:
        for other in re.findall(r"\bgithub\.com/[\w.-]+/pyterrier[_-]msft\b", path.read_text(encoding="utf-8")):
            found.setdefault(other, []).append(path.relative_to(ROOT).as_posix())
    assert [*found] == [address], found


def test_the_changelog_has_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", changelog, re.MULTILINE)
    assert newest[1] == pyterrier_msft.__version__
    assert f"\nversion: {newest[1]}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
