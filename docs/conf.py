"""Sphinx configuration: MyST Markdown, the API reference from the docstrings, no network needed to read."""

project = "qcompile"
author = "The qcompile developers"
project_copyright = "2026, The qcompile developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["README.md"]
html_theme = "furo"
html_title = "qcompile"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
