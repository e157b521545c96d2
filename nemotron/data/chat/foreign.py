"""Chat templates of other models, which run in a process of their own within limits."""

import json
import subprocess
import threading
import weakref
from typing import IO, Any

from jinja2 import TemplateError

from nemotron.children import module_command


class ForeignTemplate:
    """A template that others wrote; threads may share one.

    Its process is started when it is first needed, and again after its end.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._process: subprocess.Popen[str] | None = None
        self._ending: weakref.finalize[..., ForeignTemplate] | None = None
        self._lock = threading.Lock()

    def fill(self, **values: Any) -> str:  # Any: nested JSON
        """Return the text of a conversation.

        Raises:
            TemplateError: when the template refuses it, is damaged, or takes too long or too much.
        """
        with self._lock:
            try:
                answer = _ask(self._start(), json.dumps(values))
            except BaseException:  # Ctrl-C, after which the answer would be taken for the next one
                self._close()
                raise
            if not answer.endswith("\n"):
                self._close()
                raise TemplateError("it takes too long")
        found = json.loads(answer)
        if "text" not in found:
            raise TemplateError(found["problem"])
        return str(found["text"])

    def _start(self) -> "subprocess.Popen[str]":
        if self._process is None:
            self._process = subprocess.Popen(
                module_command("nemotron.data.chat.render_worker"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for the conversation
            )
            self._ending = weakref.finalize(self, _end, self._process)
            _write(self._process.stdin, json.dumps(self.source))
        return self._process

    def _close(self) -> None:
        if self._ending is not None:
            self._ending()
        self._process = self._ending = None


def _ask(process: "subprocess.Popen[str]", line: str) -> str:
    """Return the line that answers, less than a line if the process ends before."""
    _write(process.stdin, line)
    assert process.stdout is not None
    return process.stdout.readline()


def _write(pipe: IO[str] | None, line: str) -> None:
    assert pipe is not None
    try:
        pipe.write(line + "\n")
        pipe.flush()
    except BrokenPipeError:  # then there is no answer either
        return


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        try:
            pipe.close()
        except BrokenPipeError:  # what was not written is lost with the process
            continue
