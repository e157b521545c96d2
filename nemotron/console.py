"""A console of rich for text that others wrote."""

from typing import Any

from rich.console import Console
from rich.text import Text

from nemotron.terminal import printable

LOG_WIDTH = 150
"""Columns of a log file, which does not wrap lines."""


class PrintableConsole(Console):
    """Shows as escapes what a terminal would obey in strings: lines, titles and cells of tables.

    A `Text` is taken as it is; whoever builds one makes its parts printable.
    """

    def render_str(self, text: str, **options: Any) -> Text:  # Any: handed to rich as they are
        """Return the text that is shown for a string."""
        return super().render_str(printable(text), **options)
