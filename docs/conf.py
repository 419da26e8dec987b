"""The documentation as a site: `make docs` builds it into build/site, and any warning is an error."""

import re

project = "twostep"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "twostep"
html_show_copyright = html_show_sphinx = False
myst_heading_anchors = 3  # #headings may be linked to, as in the repository's own pages
nitpicky = True


def setup(app):
    """Pages are written with the links of the repository. README.md is this site's index, one folder deeper there."""
    app.connect("include-read", lambda app, path, parent, text: _replace(text, OUTSIDE, r"{download}`\1 <../\2>`"))
    app.connect("source-read", lambda app, name, text: _replace(text, r"\]\(\.\./README\.md", "](index.md"))


# A link of the README to a file that is no page: it is copied along.
OUTSIDE = r"\[([^\]]+)\]\(((?:examples|benchmarks)/[^)]+)\)"


def _replace(text: list[str], pattern: str, by: str) -> None:
    text[0] = re.sub(pattern, by, text[0])
