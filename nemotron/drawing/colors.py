"""Colors of drawings, light and dark, and the rules that use them."""

from dataclasses import dataclass
from html import escape

INK = {"light": ("#dde1e6", "#5d6670", "#fff"), "dark": ("#2b323b", "#97a1ad", "#0f1216")}
"""Lines of a grid, text, background."""
_LINES = {
    "light": "#1668b8 #d1540a #1c8546 #8b44ac #b3261e #00828c #a06a00 #5a6270",
    "dark": "#5aa9f0 #f08c4a #57c281 #c48be0 #f2776f #3fc3cc #dcab45 #a7b0bb",
}
_LEVELS = {
    "light": "#eef3f9 #d6e4f2 #b8d2ea #93bbdf #6aa0d1 #4484c0 #2768aa #154d8a #0a3263",
    "dark": "#18222e #1b3047 #1e4063 #235380 #2c699f #3d83bf #5f9fd8 #8dbfec #c4e0fb",
}
_AROUND = {
    "light": "#1f5fa8 #5a8cc4 #94b6db #cbdbee #f0f0f0 #f4d5c3 #e8a680 #d6733f #b3450d",
    "dark": "#7ab8f5 #5590c8 #3a6893 #2a4460 #2a2e34 #59402f #8f5a35 #c9773c #f5a05f",
}


def _variables(shade: str) -> str:
    palettes = {"c": _LINES, "h": _LEVELS, "v": _AROUND}
    return " ".join(
        f"--{letter}{place}: {color};"
        for letter, colors in palettes.items()
        for place, color in enumerate(colors[shade].split())
    )


@dataclass(frozen=True)
class Colors:
    """Parts of a style sheet: variables for a light and a dark page, and rules."""

    light: str
    dark: str
    rules: str


COLORS = Colors(
    _variables("light"),
    _variables("dark"),
    "\n".join(
        [
            "svg text { font-size: 10.5px; fill: var(--muted); }",
            "svg .e { text-anchor: end; } svg .m { text-anchor: middle; }",
            "svg .s { font-size: 9.5px; }",
            ".g { stroke: var(--line); fill: none; }",
            ".a { stroke: var(--muted); stroke-width: .7; fill: none; }",
            ".l { fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round; }",
            ".b { fill: currentColor; opacity: .2; }",
            ".d { fill: none; stroke: currentColor; stroke-width: 5; stroke-linecap: round; }",
            *(f".c{i} {{ color: var(--c{i}); }}" for i in range(8)),
            *(f".{letter}{i} {{ fill: var(--{letter}{i}); }}" for letter in "hv" for i in range(9)),
        ]
    ),
)


def standalone(
    svg: str, height: float, title: str, legend: dict[str, str], width: int = 400
) -> str:
    """Return a drawing of such a size as a file of its own, with a title and a legend below it.

    `legend` maps texts to the class of their color.
    """
    shades = {
        shade: f"--line: {line}; --muted: {muted}; --page: {page}; {variables}"
        for (shade, (line, muted, page)), variables in zip(
            INK.items(), (COLORS.light, COLORS.dark), strict=True
        )
    }
    style = (
        f"svg {{ {shades['light']} font-family: sans-serif; }}\n"
        f"@media (prefers-color-scheme: dark) {{ svg {{ {shades['dark']} }} }}\n"
        f".page {{ fill: var(--page); }} .dot {{ fill: currentColor; }}\n{COLORS.rules}"
    )
    below = height + 20
    rows = [
        f'<rect class="dot {color}" x="12" y="{below + 16 * place:g}" width="9" height="9" rx="2"/>'
        f'<text x="26" y="{below + 16 * place + 8:g}">{escape(text)}</text>'
        for place, (text, color) in enumerate(legend.items())
    ]
    whole = below + 16 * len(legend) + 6
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -22 {width} {whole + 22:g}" '
        f'width="{2 * width}">\n<style>{style}</style>\n'
        f'<rect class="page" y="-22" width="{width}" height="{whole + 22:g}"/>'
        f'<text x="12" y="-6">{escape(title)}</text>\n'
        f'{svg.replace("<svg ", f"""<svg width="{width}" height="{height:g}" """, 1)}\n'
        f"{''.join(rows)}</svg>\n"
    )
