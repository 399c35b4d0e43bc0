"""Sphinx settings of the book. `make book` stages the sources and builds them: see tools/build_book.py."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "book" / "_ext")]

import minivla  # noqa: E402

project = "minivla"
author = "the minivla authors"
copyright = f"2026, {author}"
version = release = minivla.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
    "api_pages",
    "chapter_cards",
    "parity_ledger",
]
exclude_patterns = ["**.ipynb_checkpoints"]
nitpicky = False  # Tensor, Path and their like live in books that cannot be reached offline

# Chapters are shown as they were committed; `make test` proves that running them gives the same.
nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show = "Show {type}"
nb_mime_priority_overrides = [("html", "text/html", 0), ("html", "image/png", 1)]
myst_enable_extensions = [
    "amsmath",
    "attrs_block",
    "attrs_inline",
    "colon_fence",
    "deflist",
    "dollarmath",
    "smartquotes",
]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 88

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"
bibtex_reference_style = "author_year"

# One file, kept here, does all the mathematics; its menu would fetch more, so it is off.
mathjax_path = "mathjax-3.2.2-tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}, "svg": {"fontCache": "global"}}

html_theme = "sphinx_book_theme"
html_title = "minivla"
html_static_path = ["_static"]
html_css_files = ["minivla.css"]
html_favicon = "_static/mark.svg"
html_show_sourcelink = False
html_last_updated_fmt = None
html_theme_options = {
    "logo": {
        "image_light": "_static/logo-light.svg",
        "image_dark": "_static/logo-dark.svg",
        "alt_text": "minivla",
    },
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": True,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
    "pygments_light_style": "github-light",
    "pygments_dark_style": "github-dark",
    "extra_footer": "<p>Every number on these pages was printed by a cell, a command or a test.</p>",
}
copybutton_prompt_text = r">>> |\.\.\. |\$ |In \[\d*\]: "
copybutton_prompt_is_regexp = True
