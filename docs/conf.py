"""Sphinx configuration: `sphinx-build -W docs docs/_build` (extra `[docs]`). Needs no internet connection."""

import os
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.inspect import signature, stringify_signature

from pyterrier_msft import __version__

project = "pyterrier_msft"
author = "The pyterrier_msft developers"
project_copyright = author
version = release = __version__

extensions = [
    "myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx.ext.viewcode",
    "sphinx_copybutton",
]  # fmt: skip
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "off"  # show the outputs that the notebooks have
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path, html_css_files = ["_static"], ["notebooks.css"]
html_title = f"pyterrier_msft {version}"
html_theme_options = {"source_repository": "https://github.com/terrierteam/pyterrier_msft/", "source_branch": "main",
                      "source_directory": "docs/"}  # fmt: skip

default_role = "code"  # `name` in docstrings is code, as in Markdown
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings describe the arguments
maximum_signature_line_length = 76
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
myst_heading_anchors = 3

# Links to the documentation of other projects need the internet; set DOCS_INTERSPHINX=1 to add them.
if os.environ.get("DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "pandas": ("https://pandas.pydata.org/docs", None),
        "torch": ("https://pytorch.org/docs/stable", None),
        "transformers": (
            "https://huggingface.co/docs/transformers/main/en",
            None,
        ),
        "pyterrier": ("https://pyterrier.readthedocs.io/en/latest", None),
    }


def init_signature(
    app: Sphinx,
    what: str,
    name: str,
    obj: Any,
    options: Any,
    shown: str | None,
    returns: str | None,
) -> tuple[str, None] | None:
    """Show the arguments of a transformer's `__init__`; autodoc finds those of PyTerrier's `__new__`."""
    if what != "class" or shown != "(*args, **kwargs)":
        return None
    return stringify_signature(
        signature(obj.__init__, bound_method=True), show_annotation=False
    ), None


def copy_notebooks(app: Sphinx, config: Config) -> None:
    """Copy the notebooks to docs/notebooks, because Sphinx reads only files below docs. Git ignores the copies."""
    target = Path(app.srcdir, "notebooks")
    target.mkdir(exist_ok=True)
    for path in Path(app.srcdir).parent.glob("notebooks/*.ipynb"):
        content, copy = path.read_bytes(), target / path.name
        # Sphinx builds a page again if its file is newer.
        if not copy.is_file() or copy.read_bytes() != content:
            copy.write_bytes(content)


def adapt_links(app: Sphinx, docname: str, content: list[str]) -> None:
    """Adapt links between pages and notebooks, which are those of the repository, to the place of the copies."""
    if docname.startswith("notebooks/"):
        content[0] = content[0].replace("](../docs/", "](../")
    else:
        link = r"(\]\((?:\.\./)*)\.\./notebooks/"
        content[0] = re.sub(link, r"\1notebooks/", content[0])


def setup(app: Sphinx) -> None:
    """Register the handlers of this project."""
    app.connect("config-inited", copy_notebooks)
    app.connect("source-read", adapt_links)
    app.connect("autodoc-process-signature", init_signature)
