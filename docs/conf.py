"""The documentation site. `make docs` builds it."""

import re
from importlib.metadata import version as version_of
from pathlib import Path

import jax
from docutils import nodes
from flax import nnx
from sphinx import addnodes
from sphinx.util import inspect
from sphinx.util.typing import stringify_annotation

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/ttame-jax/ttame-jax"
INCLUDED = {"README": "index", "CONTRIBUTING": "contributing", "CHANGELOG": "changelog"}
"""Files outside this folder, by stem, and the pages that include them."""
ARRAY_LIKE = stringify_annotation(jax.typing.ArrayLike, "smart")

project = "ttame-jax"
author = copyright = "The ttame-jax authors"
release = version_of("ttame-jax")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
highlight_language = "default"
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are stored with their outputs

default_role = "py:obj"  # a name in single backticks leads to its entry in the API reference
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 80

html_theme = "sphinx_book_theme"
html_title = "ttame-jax"
html_theme_options = {
    "repository_url": REPOSITORY,
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the sidebar has the search
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
}


def setup(app):
    app.connect("doctree-read", lead_outside)
    app.connect("autodoc-process-signature", readable_signature)


def lead_outside(app, document):
    """Links out of this folder lead to the page that includes the file, or else to GitHub."""
    for link in list(document.findall(addnodes.pending_xref)):
        target = link["reftarget"]
        if link["reftype"] != "myst" or target in app.env.found_docs:
            continue
        if page := INCLUDED.get(Path(target).stem):
            link["refdomain"], link["reftarget"], link["reftargetid"] = "doc", page, None
        elif (ROOT / target).exists():
            address = f"{REPOSITORY}/blob/main/{target}"
            link.replace_self(nodes.reference("", "", *link.children, refuri=address))


def readable_signature(app, what, name, obj, options, signature, result):
    """Shows the arguments of an NNX module, which its metaclass hides, and JAX's alias of arrays."""
    if what == "class" and issubclass(obj, nnx.Module):
        arguments = inspect.signature(obj.__init__, bound_method=True)
        signature = inspect.stringify_signature(arguments, unqualified_typehints=True)
        signature = re.sub(r"<class '([\w.]+)'>", r"\1", signature)
    return signature and signature.replace(ARRAY_LIKE, "~jax.typing.ArrayLike"), result
