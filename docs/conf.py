"""How the documentation is built: `make docs`, every warning an error."""

from fastref._version import __version__

project = "fastref"
author = "The fastref authors"
copyright = "2026, The fastref authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_custom_sections = ["Source"]

html_theme = "alabaster"
html_theme_options = {"description": "Remote references between the processes of one host", "page_width": "1080px"}
