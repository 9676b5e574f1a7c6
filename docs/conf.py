"""Sphinx configuration: `sphinx-build -W docs docs/_build` (extra `[docs]`). Needs no internet connection."""

import os

from pyterrier_msft import __version__

project = "pyterrier_msft"
author = "The pyterrier_msft developers"
project_copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"pyterrier_msft {version}"
html_theme_options = {"source_repository": "https://github.com/terrierteam/pyterrier_msft/", "source_branch": "main",
                      "source_directory": "docs/"}  # fmt: skip

default_role = "code"  # `name` in docstrings is code, as in Markdown
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # they are in the signatures
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
        "transformers": ("https://huggingface.co/docs/transformers/main/en", None),
        "pyterrier": ("https://pyterrier.readthedocs.io/en/latest", None),
    }
