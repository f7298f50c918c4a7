"""Configuration of Sphinx."""

from lightning_memtrain import __version__

project = "lightning-memtrain"
author = "The lightning-memtrain developers"
copyright = "The lightning-memtrain developers"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

# Types stand in signatures only, so descriptions keep to what a number means.
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_preprocess_types = False

html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
