"""The documentation: `sphinx-build -W docs docs/_build` (extra `[docs]`), without the internet."""

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

default_role = "code"  # docstrings write `names` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures have them, and a page for each class of torch's isn't wanted
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
myst_heading_anchors = 3

# Links to other projects' pages need the internet: where there is some, DOCS_INTERSPHINX=1 makes them.
if os.environ.get("DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "pandas": ("https://pandas.pydata.org/docs", None),
        "torch": ("https://pytorch.org/docs/stable", None),
        "transformers": ("https://huggingface.co/docs/transformers/main/en", None),
        "pyterrier": ("https://pyterrier.readthedocs.io/en/latest", None),
    }
