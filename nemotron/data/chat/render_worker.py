"""Renders one conversation a line, from standard input to standard output, within limits.

A template of another model can loop without end or ask for any memory. What ends this process in
the middle of a line is read by the process that started it (`nemotron.data.chat.foreign`).
"""

import json
import os
import resource
import signal
import sys

from nemotron.data.chat.template import fill, load_template

LIMIT_S = 5.0
"""Time for one conversation."""
LIMIT_BYTES = 1 << 30
"""Address space of this process."""
LONGEST = 1 << 24
"""Characters of a text."""


def main() -> None:
    """Answer until the input ends; the first line is the template."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source = json.loads(sys.stdin.readline())
    for line in sys.stdin:
        # nobody handles the signal, so that it ends this process whatever it does
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
        answers.write(json.dumps(_answer(source, line)) + "\n")
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.flush()


def _answer(source: str, line: str) -> dict[str, str]:
    try:
        text, _ = fill(load_template(source), **json.loads(line))
        # a text that no file or screen takes, because it holds half a letter
        text.encode()
    except MemoryError:
        return {"problem": f"it wants more than {LIMIT_BYTES >> 30} GiB"}
    except Exception as error:  # a template may raise whatever Python can
        return {"problem": str(error)[:500] or type(error).__name__}
    return {"text": text} if len(text) <= LONGEST else {"problem": f"it writes {len(text)} letters"}


if __name__ == "__main__":
    main()
