"""How the pages become a site: `make docs`. The pages themselves are read as they are, too, where the code is read."""

project = "execution-envelope"
author = "the execution-envelope authors"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "execution-envelope"
myst_heading_anchors = 3
exclude_patterns = ["conf.py"]
# The site holds what is in this folder; links to the code beside it lead there where the code is read.
html_show_copyright = False
html_show_sourcelink = False
