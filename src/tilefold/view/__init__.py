"""Pictures of what attention looked at: one HTML page that needs no network, or a PNG or SVG for a paper.

`statistics` says what to probe for, `page` and `write` make the page, `picture` the figure, `save` and `load` keep what
was seen in a file. Plotly and matplotlib are imported only when something is drawn: ``pip install 'tilefold[view]'``.
"""

from .ask import statistics
from .figure import picture
from .files import load, save
from .page import page, write

__all__ = ["load", "page", "picture", "save", "statistics", "write"]
