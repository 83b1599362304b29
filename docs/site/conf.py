"""Configuration of the docs site: Sphinx over the pages as they stand in the repository, and over the docstrings.

``make docs`` builds it into build/site. A link or an anchor that leads nowhere is an error, and so is a docstring that
cannot be read. The source folder is the repository's root: a link to a file of the repository is one on the site too.
"""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

project = "bkind3d"
author = "the bkind3d authors"
version = release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",
    "sphinx.ext.viewcode",
    "myst_parser",
]
root_doc = "docs/site/index"
include_patterns = [
    "docs/*.md",
    "docs/site/*.md",
    "CONTRIBUTING.md",
    "csrc/README.md",
    "benchmarks/results/**/NOTES.md",
    "benchmarks/results/**/summary.md",
]

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # every docstring says what its arguments are
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
nitpicky = True
# Roles of docstrings that need not lead to a page; a function that is named must.
nitpick_ignore_regex = [(r"py:(class|exc|data|attr|meth|mod|obj)", ".*")]

html_theme = "furo"
html_title = f"bkind3d {release}"
html_additional_pages = {"index": "start.html"}  # the root of the site leads to its first page
templates_path = ["templates"]


def setup(app):
    """The tables of a benchmark stand in no list of pages: the notes lead to them."""

    def leave_out(app, doctree):
        if app.env.docname.endswith("/summary"):
            app.env.metadata[app.env.docname]["orphan"] = True

    app.connect("doctree-read", leave_out)
