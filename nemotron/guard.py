"""What the outermost guard says of an error that nothing else has handled."""

import errno
import os
import platform
import re
import tempfile
import traceback
from collections.abc import Sequence

from nemotron import __version__
from nemotron.errors import FORBIDDEN, REFUSALS, is_of_name, is_of_other_ranks, is_out_of_memory
from nemotron.exit_codes import FAILED, INTERNAL_ERROR, WRONG_INPUT
from nemotron.files import FULL
from nemotron.run.redaction import redact_arguments, redact_text


def describe(error: BaseException, arguments: Sequence[str]) -> tuple[str, int]:
    """Return the sentence about an error, and the exit code.

    A place that may not be used is a mistake in the input. What is neither that, nor a refusal of
    the machine, nor a lack of memory is a fault of this program; its
    traceback is written to a file, whose path is in the sentence.
    """
    if is_of_name(error):
        if not isinstance(error, OSError):
            return f"a path cannot be used ({error}); give another.", WRONG_INPUT
        if error.errno in FORBIDDEN:
            advice = "name another place, or change who may use this one"
            return f"{error.filename} cannot be used: {error.strerror}; {advice}.", WRONG_INPUT
        of_name = f"{error.strerror}: {error.filename!r:.80}"
        return f"a path cannot be used ({of_name}); give another.", WRONG_INPUT
    if isinstance(error, OSError) and error.errno in REFUSALS:
        place = "standard output, or a file" if error.filename is None else error.filename
        return f"failed: {place}: {error.strerror}{_advice(error)}.", FAILED
    reason = str(error).partition("\n")[0].rstrip(".")
    if is_out_of_memory(error):
        return f"failed: out of memory ({reason}); use smaller sizes.", FAILED
    if is_of_other_ranks(error):
        reason = re.sub(r"^\[\S*/gloo/\S*\] |\. .*", "", reason)
        return f"failed: another rank has ended, or does not answer ({reason}).", FAILED
    what = traceback.format_exception_only(error)[-1].strip().partition("\n")[0][:300].rstrip(".")
    report = _write_report(error, arguments)
    file = f" with the file {report}" if report else ""
    return f"internal error: {redact_text(what)}; please report it{file}.", INTERNAL_ERROR


def _advice(error: OSError) -> str:
    if error.errno in FULL:
        return "; make room there and run the command again"
    if error.errno == errno.EROFS:
        return "; name another place"
    return ""


def _write_report(error: BaseException, arguments: Sequence[str]) -> str | None:
    """Write the traceback and what a reader of it must know; returns the path, None if refused."""
    text = "\n".join(
        (
            f"nemotron {__version__}, Python {platform.python_version()}, {platform.platform()}",
            f"arguments: {redact_arguments(list(arguments))}",
            redact_text("".join(traceback.format_exception(error))),
        )
    )
    try:
        descriptor, path = tempfile.mkstemp(prefix="nemotron-error-", suffix=".log")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return None
    return path
