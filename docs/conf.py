"""Settings of the site: `sphinx-build -n -W docs build/docs` from the repository's root. Needs no network."""

import pathlib
import re
import sys
from typing import Any

from docutils import nodes

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import generated  # noqa: E402

import memjax  # noqa: E402

project = "memjax"
author = "The memjax authors"
project_copyright = author
release = version = memjax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
nb_execution_mode = (
    "off"  # notebooks are committed with the output of a real run; tests/docs/test_notebooks.py runs them
)
exclude_patterns = ["_build", "inventories"]
# Committed, so that the build needs no network; docs/inventories/README.md says what they are.
intersphinx_mapping = {
    name: (f"https://{site}/", f"inventories/{name}.txt")
    for name, site in {
        "flax": "flax.readthedocs.io/en/latest",
        "jax": "docs.jax.dev/en/latest",
        "numpy": "numpy.org/doc/stable",
        "optax": "optax.readthedocs.io/en/latest",
        "python": "docs.python.org/3",
    }.items()
}
copybutton_prompt_text = "$ "  # not copied, and neither is what a command prints
html_search_scorer = str(HERE / "static" / "scorer.js")
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"memjax {release}"
html_static_path = ["static"]
html_css_files = ["memjax.css"]
html_copy_source = False
html_show_copyright = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"

# Docstrings are written for readers of the source: single backticks are code there.
default_role = "code"
autodoc_member_order = "bysource"
# Modules of Flax are made by a metaclass, behind which the class's own signature is not seen; that of __init__ is.
autodoc_class_signature = "separated"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True

# Types of other libraries have no page here; docs/inventories knows where those in signatures are described.
nitpick_ignore_regex = [
    (r"py:.*", r"(jax|jaxlib|jaxtyping|flax|numpy|optax|collections|typing|os|pathlib)\..*"),
    (r"py:class", "Array"),
    # Types in signatures of the reference that it does not describe: nobody needs to make one.
    (r"py:class", r"memjax\.(ops\.table\.Table|inference\.sampling\.Mode|memory\.(read\.TableName|sharded\.RowSum))"),
    (r"py:class", r"memjax\.ops\.row_formats\.formats\.RowFormat"),
]


SHORT_TYPES = {
    "~jaxlib._jax.Array": "~jax.Array",
    "jaxlib._jax.Array": "Array",
    "str | type[~typing.Any] | ~numpy.dtype | ~jax._src.typing.SupportsDType": "~jax.typing.DTypeLike",
    "~jax.Array | ~numpy.ndarray | ~numpy.bool | ~numpy.number | bool | int | float | complex": "~jax.typing.ArrayLike",
    "~flax.nnx.rnglib.Rngs": "~flax.nnx.Rngs",
    "~flax.nnx.module.Module": "~flax.nnx.Module",
    "~flax.nnx.statelib.State": "~flax.nnx.State",
    "~optax._src.base.": "~optax.",
    "<class 'jax.numpy.float32'>": "jnp.float32",
    "<factory>": "...",
}
"""What signatures say once names that stand for several types are spelt out, and what the source says."""


def shorten(app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returned: str) -> tuple[Any, Any]:
    """A signature with the names of the source."""
    for long, short in SHORT_TYPES.items():
        signature, returned = (text and text.replace(long, short) for text in (signature, returned))
    return signature, returned


def skip(app: Any, what: str, name: str, obj: Any, would_skip: bool, options: Any) -> bool | None:
    """Leaves out what metaclasses and named tuples add; the signature of __init__ says it better."""
    return True if name == "__new__" else None


def shorten_attributes(app: Any, doctree: Any) -> None:
    """The same for the types of attributes, which are no signatures."""
    for text in list(doctree.findall(nodes.Text)):
        if "jaxlib._jax.Array" in text:
            text.parent.replace(text, nodes.Text(text.replace("jaxlib._jax.Array", "Array")))


def keep_colons(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keeps an attribute's sentence whole: napoleon takes what is before a colon as a type, so it gets none."""
    if what == "attribute" and lines:
        lines[0] = f": {lines[0]}"


def literal_blocks(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Makes an indented block below a line that ends in a colon code; in the source one colon is enough."""
    for number in range(len(lines) - 2):
        opens_block = lines[number].endswith(":") and not lines[number].endswith("::")
        if opens_block and not lines[number + 1].strip() and re.match(r" {4}\S", lines[number + 2]):
            lines[number] += ":"


def fill_in(app: Any, docname: str, source: list[str]) -> None:
    """Puts what is made from the code into the page, which is read again when that code has changed."""
    filled = generated.fill_in(source[0])
    if filled != source[0]:
        for path in (*HERE.glob("*.py"), *(HERE.parent / "memjax" / "config").glob("*.py")):
            app.env.note_dependency(path)
    source[0] = filled


def setup(app: Any) -> None:
    """Connects the steps above."""
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-skip-member", skip)
    app.connect("doctree-read", shorten_attributes)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # before napoleon's
    app.connect("autodoc-process-docstring", literal_blocks)
    app.connect("source-read", fill_in)
