"""Parts of a picture as SVG text: words, lines and how they look.

Why: all pictures of the house are drawn alike, and a plotting library would weigh more than the
device runtime.

Invariants: the same arguments give the same text; what people wrote is escaped.

Knows nothing about what is drawn.
"""

from __future__ import annotations

from typing import NamedTuple
from xml.sax.saxutils import escape

STYLE = """
text{font:13px system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;fill:#1b1f24}
.title{font-size:19px;font-weight:650}.sub,.tick,.note{fill:#4a515a}.tick,.note{font-size:12px}
.name{font-weight:600}.grid{stroke:#e3e6ea}.axis{stroke:#8b929b}.end{text-anchor:end}
.mid{text-anchor:middle}.lead{stroke:#8b929b;fill:none}.line{fill:none;stroke-linejoin:round;stroke-linecap:butt}
""".strip()


class Look(NamedTuple):
    """How a line is drawn; the Okabe-Ito hues, darkened to at least 4.5:1 on the background."""

    name: str
    note: str
    colour: str
    dash: str
    width: float


def curve(steps: str, look: Look) -> str:
    """A line along the `steps` of a path."""
    pen = f'stroke="{look.colour}" stroke-width="{look.width}" stroke-dasharray="{look.dash}"'
    return f'<path class="line" d="{steps}" {pen}/>'


def stroke(name: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """A straight line of the class `name`."""
    return f'<line class="{name}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'


def text(x: float, y: float, words: str, name: str) -> str:
    """Words of the class `name`, on the base line y."""
    return f'<text x="{x}" y="{round(y, 1)}" class="{name}">{escape(words)}</text>'
