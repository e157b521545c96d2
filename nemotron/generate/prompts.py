"""Files of prompts, and files of answers: one JSON object a line, in the order of the prompts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nemotron.errors import UserError
from nemotron.files import naming, open_lines, parse_json, read_text_file, sync, try_lock
from nemotron.generate.request import Answer

OWN_KEYS = ("line", "answer", "finish", "num_tokens")
"""What a line of the output has beside the fields of the prompt's line."""


@dataclass(frozen=True)
class PromptLine:
    """A prompt, and where it stands."""

    number: int
    """Of its line in the file, from 1 on."""
    prompt: str
    fields: dict[str, Any]  # Any: JSON
    """All that the line holds."""


def read_prompts(path: Path) -> list[PromptLine]:
    """Return the prompts of a file: the field `prompt` of JSON lines, else each line of text.

    Raises:
        UserError: when the file is absent, has no prompt, or a line is wrong.
    """
    text = read_text_file(path)
    read = _read_json if path.suffix == ".jsonl" else _read_plain
    lines = enumerate(text.split("\n"), 1)
    found = [read(path, number, line.rstrip("\r")) for number, line in lines if line.strip()]
    if not found:
        raise UserError("has no prompt; give at least one line.", where=str(path))
    return found


def _read_plain(path: Path, number: int, line: str) -> PromptLine:
    return PromptLine(number, line, {"prompt": line})


def _read_json(path: Path, number: int, line: str) -> PromptLine:
    where = f"{path}, line {number}"
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"is not JSON: {error}; give an object a line.", where=where) from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError("has no prompt; give an object with the text prompt.", where=where)
    if taken := [key for key in OWN_KEYS if key in row]:
        rule = "is a field of the output; give it another name."
        raise UserError(rule, key=taken[0], where=where)
    return PromptLine(number, row["prompt"], row)


class AnswerFile:
    """The output while it is written; a line that was cut by a crash is written again."""

    def __init__(self, path: Path, prompts: Sequence[PromptLine], *, resume: bool) -> None:
        """Open the file and find how many of the prompts it answers.

        Raises:
            UserError: when it may not be continued, holds anything else, or is being written.
        """
        self._path = path
        if not resume and (path.exists() or path.is_symlink()):
            raise UserError(
                "exists; give another name, or continue it with --resume.", where=str(path)
            )
        self._file: BinaryIO = open_lines(path)
        try:
            if not try_lock(self._file.fileno(), path):
                raise UserError(
                    "is being written by another process; wait for its end.", where=str(path)
                )
            self.num_done = self._continue(path, prompts)
        except BaseException:
            self._file.close()
            raise

    def _continue(self, path: Path, prompts: Sequence[PromptLine]) -> int:
        """Return the number of whole lines, and cut what follows them."""
        self._file.seek(0)
        *whole, rest = self._file.read().split(b"\n")
        foreign = UserError(
            "holds other lines than answers to these prompts; name another.", where=str(path)
        )
        if len(whole) > len(prompts):
            raise foreign
        for line, prompt in zip(whole, prompts, strict=False):
            if not line.startswith(_begin(prompt)) or not _holds(line, prompt):
                raise foreign
        if rest:
            begin = _begin(prompts[len(whole)]) if len(whole) < len(prompts) else b""
            if not begin or not (rest.startswith(begin) or begin.startswith(rest)):
                raise foreign
            self._file.truncate(self._file.tell() - len(rest))
        return len(whole)

    def write(self, prompt: PromptLine, answer: Answer) -> None:
        """Add the answer to the next prompt."""
        with naming(self._path):
            self._file.write(answer_line(prompt, answer).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Put the file onto the disk."""
        with naming(self._path):
            try:
                sync(self._file)
            finally:
                self._file.close()


def answer_line(prompt: PromptLine, answer: Answer) -> str:
    """Return an answer with the fields of its prompt, as JSON."""
    own = {
        "answer": answer.text,
        "finish": answer.finish,
        "num_tokens": len(answer.tokens),
    }
    return json.dumps({"line": prompt.number, **prompt.fields, **own}, ensure_ascii=False)


def _begin(prompt: PromptLine) -> bytes:
    return b'{"line": %d, ' % prompt.number


def _holds(line: bytes, prompt: PromptLine) -> bool:
    try:
        row = parse_json(line)
    except ValueError:
        return False
    return all(key in row and row[key] == value for key, value in prompt.fields.items())
