"""The standard streams: always open, never stopped by a letter, and free of hidden commands."""

import os
import re
import sys
from typing import TextIO

_HIDDEN = re.compile(
    # control characters, which a terminal obeys; marks that reorder a line; halves of a letter
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Return text in which whatever a terminal would obey is an escape such as `\\x1b`.

    Line ends and tabs stay. Every text of data, names and configurations passes here on its way to
    a screen.
    """
    return _HIDDEN.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """Return printable text without line ends and tabs."""
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def print_text(text: str, stream: TextIO | None = None) -> None:
    """Print printable text and a line end, by default to the output."""
    print(printable(text), file=stream)


def open_streams() -> None:
    """Give the descriptors 0 to 2 a file where the shell closed them, and let any text be written.

    The next file that is opened would be that descriptor, and receive what libraries write there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # the lowest free number, which is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = _any_text(sys.stdout, 1)
    sys.stderr = _any_text(sys.stderr, 2)


def _any_text(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:
        return open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return stream


def say(sentence: str) -> None:
    """Write one line to the error stream, if it can still be written."""
    try:
        print(one_line(sentence), file=sys.stderr, flush=True)
    except OSError:
        mute(sys.stderr)


def fault_of(stream: TextIO) -> OSError | None:
    """Return why what was printed cannot be written, or None."""
    try:
        stream.flush()
    except OSError as error:
        return error
    return None


def mute(stream: TextIO) -> None:
    """Let a stream write to nowhere, so that the interpreter can flush it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
