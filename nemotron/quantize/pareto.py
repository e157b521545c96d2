"""The curve of a search as a drawing that stands alone."""

import numpy as np

from nemotron.drawing.chart import Line, Mark, line_chart
from nemotron.drawing.series import Series
from nemotron.quantize.search import Found

STYLE = (
    "<style>text{font:10px system-ui,sans-serif;fill:#57606a}.e{text-anchor:end}"
    ".m{text-anchor:middle}.g{stroke:#8c959f;stroke-opacity:.3}.a{stroke:#8c959f;fill:none}"
    ".l{stroke:#0969da;fill:none;stroke-width:1.5}.b{fill:#0969da;fill-opacity:.2}"
    ".d{stroke:#0969da;stroke-width:4;stroke-linecap:round}"
    ".k{stroke:#cf222e;stroke-dasharray:3 3}</style>"
)


def draw(found: Found) -> str:
    """Return the frontier as an SVG file, with the choice as a vertical line."""
    bits, scores = (
        np.array([getattr(point, key) for point in found.curve]) for key in ("bits", "score")
    )
    line = Line("score", Series(bits, scores), 0, has_dots=True)
    mark = Mark(found.chosen.bits, f"chosen: {found.chosen.bits:.4g} bits", "chosen")
    drawing = line_chart(
        [line],
        title="score of the best choice at each size",
        x_label="bits per weight",
        scale="auto",
        marks=[mark],
    )
    start = '<svg xmlns="http://www.w3.org/2000/svg" width="800" height="420" '
    return drawing.replace("<svg ", start, 1).replace(">", f">{STYLE}", 1) + "\n"
