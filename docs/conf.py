"""Sphinx's configuration: MyST Markdown, with the reference pages generated from the code.

sphinx-build -n -W --keep-going docs docs/_build
"""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import reference  # noqa: E402

import gptjax  # noqa: E402

project = "gptjax"
author = "The gptjax authors"
copyright = author
release = gptjax.__version__

extensions = ["myst_nb", "sphinx_copybutton"]
exclude_patterns = ["_build"]
nitpicky = True

html_theme = "sphinx_book_theme"
html_title = "gptjax"
html_theme_options = {"show_navbar_depth": 2, "home_page_in_toc": True}

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
# The pages show commands and their recorded output; tests/docs runs the Python blocks.
nb_execution_mode = "off"
copybutton_exclude = ".linenos, .gp, .go"

linkcheck_anchors = False
linkcheck_timeout = 20

reference.write(DOCS / "reference")
