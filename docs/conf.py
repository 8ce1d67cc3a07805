"""The documentation site: the Markdown pages as they stand, and the API reference from the docstrings. `make docs`.

The source folder is the root of the repository, so that a link that works on GitHub works here, and one that does not
stops the build.
"""

import re
import shutil
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst.states import Inliner
from sphinx.application import Sphinx
from sphinx.domains.python import PyXRefRole

PAGES = {
    "Start": ["docs/quickstart", "docs/alpha", "docs/when-it-helps", "docs/check"],
    "Train": ["docs/transformers", "docs/integrations", "docs/views", "docs/recipes", "docs/many-runs", "docs/report"],
    "Tasks": [
        "docs/tasks/README",
        "docs/tasks/translation",
        "docs/tasks/summarization",
        "docs/tasks/text_classification",
        "docs/tasks/language_modeling",
        "docs/tasks/image_classification",
    ],
    "Measured": ["docs/results", "docs/accuracy", "docs/speed", "docs/reliability"],
    "API reference": [
        "docs/api/loss",
        "docs/api/passes",
        "docs/api/check",
        "docs/api/integrations",
        "docs/api/experiments",
    ],
    "Project": ["docs/architecture", "docs/extending", "CONTRIBUTING", "CHANGELOG"],
}
"""The sidebar: a caption and its pages, below the README."""

project = "rdrop"
author = "The rdrop developers"
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "docs/**"]
smartquotes_action = "D"  # dashes alone: in a docstring, "mean" is a value

myst_heading_anchors = 4
default_role = "backticks"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_type_aliases = {name: name for name in ("Divergence", "Implementation", "Reduction", "TaskLoss")}
maximum_signature_line_length = 88
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "rdrop"
html_show_sphinx = False
html_copy_source = False


def backticks(
    role: str, source: str, text: str, line: int, inliner: Inliner, options: object = None, content: object = None
) -> tuple[list[nodes.Node], list[nodes.system_message]]:
    """Sets a name in code type, as a link where the reference has it, and anything else in code type alone."""
    if re.fullmatch(r"[A-Za-z_][\w.]*", text):
        return PyXRefRole()("py:obj", source, text, line, inliner)
    return [nodes.literal(source, text)], []


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Adds the sidebar to the first page, which on GitHub has none."""
    if page == app.config.root_doc:
        for caption, pages in PAGES.items():
            lines = ["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *(f"/{name}" for name in pages), "```"]
            source[0] += "\n".join(lines) + "\n"


def keep_colons(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keeps napoleon from reading what stands before a colon in an attribute's docstring as the attribute's type."""
    if what in ("attribute", "data", "property") and lines:
        lines[0] = f":{lines[0]}"  # before the first colon there is nothing now


def copy_first_page(app: Sphinx, error: Exception | None) -> None:
    """Makes the first page what a server shows for the folder."""
    if error is None and app.builder.name == "html":
        shutil.copyfile(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_role("backticks", backticks)
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", keep_colons, priority=0)
    app.connect("build-finished", copy_first_page)
