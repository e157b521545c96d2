"""`judge`: answers that another model compares or grades (a generative reward model)."""

import json
import re
from typing import Any

from nemotron.errors import UserError
from nemotron.posttrain.environments.address import Address, Failed
from nemotron.posttrain.environments.base import (
    Response,
    Row,
    Verdict,
    WithoutTools,
    messages_of,
    optional_field,
)
from nemotron.posttrain.environments.file_rows import FileRows, FromFile
from nemotron.posttrain.environments.wire import fault

GRADE = (
    "Grade an assistant's answer. First write your own answer, then compare: is the answer right, "
    "helpful, relevant and concise?\n\n"
    "[The conversation]\n{question}\n\n[The answer]\n{generated_answer}\n\n"
    "{reference}End with the grade from 1 (bad) to 5 (very good) as \\boxed{{GRADE}}."
)
"""What the judge is asked; `reference` is the expected answer where the row has one."""
PATH = "chat/completions"
LOWEST, HIGHEST = 1.0, 5.0
"""Grades, as those of NVIDIA's generative reward models; rewards are 0 to 1."""
VERDICT = re.compile(r"\\boxed\{\s*(-?\d+(?:\.\d+)?)\s*\}")


class Judge(FromFile, WithoutTools):
    """Answer as a judge likes it: a model behind an OpenAI-compatible address grades the answer.

    `base_url` is what OpenAI's clients call so, such as http://127.0.0.1:8000/v1 of
    `nemotron serve`, which serves runs, checkpoints and exported folders. The last `\\boxed{}` of
    what the judge writes is the grade. A judge that fails, is slow, or gives no grade in its range
    is a fault: the answer is left out of the loss, never scored.

    Raises:
        UserError: when `base_url` is not an address.
    """

    name = "judge"

    def __init__(
        self,
        base_url: str = "",
        data: str | None = None,
        model: str = "judge",
        prompt: str = GRADE,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_tokens: int = 1024,
        timeout_s: float = 60.0,
    ) -> None:
        """`prompt` has the fields question, generated_answer and reference."""
        self._rows = FileRows(self.name, data)
        self._prompt = _checked(prompt)
        self._address = Address(self.name, "base_url", base_url, timeout_s)
        self._body = {
            "model": model,
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_tokens,
        }

    def check(self, row: Row) -> None:
        """Check the prompt.

        Raises:
            BadRow: when there is none.
        """
        messages_of(row)

    def verify(self, row: Row, response: Response, state: Any) -> Verdict:
        """Return the grade, from 0 for the lowest to 1 for the highest."""
        if not response.text.strip():
            return Verdict(0.0)  # nothing was answered, so there is nothing to grade
        try:
            said = self._ask(self._messages(row, response))
        except Failed as problem:
            return fault(f"{self._address.name(PATH)} {problem}")
        found = VERDICT.findall(said)
        if not found or not LOWEST <= float(found[-1]) <= HIGHEST:
            return fault(
                f"the judge gave no grade from {LOWEST:g} to {HIGHEST:g} in \\boxed{{}}: "
                f"{said[-100:]!r}"
            )
        grade = float(found[-1])
        return Verdict((grade - LOWEST) / (HIGHEST - LOWEST), {"grade": grade}, extracted=found[-1])

    def _ask(self, messages: list[dict[str, str]]) -> str:
        """Return what the judge writes.

        Raises:
            Failed: when it writes nothing that can be read.
        """
        answer = self._address.post(PATH, {**self._body, "messages": messages}, {})
        answer.check_status()
        try:
            said = json.loads(answer.content)["choices"][0]["message"]["content"]
        except (ValueError, RecursionError, LookupError, TypeError):
            said = None
        if not isinstance(said, str):
            raise Failed("answered with what is not a chat completion")
        return said

    def _messages(self, row: Row, response: Response) -> list[dict[str, str]]:
        talk = "\n".join(f"{m['role']}: {m['content']}" for m in messages_of(row))
        expected = optional_field(row, "expected_answer", None)
        reference = "" if expected is None else f"[The expected answer]\n{expected}\n\n"
        text = self._prompt.format(
            question=talk, generated_answer=response.text, reference=reference
        )
        return [{"role": "user", "content": text}]


def _checked(prompt: str) -> str:
    """Return a prompt; refuse one with other fields, or without the answer.

    Raises:
        UserError: when it is none.
    """
    marks = dict.fromkeys(("question", "generated_answer", "reference"), "\0")
    try:
        if "\0" in prompt.format(**marks | {"question": "", "reference": ""}):
            return prompt
        problem = "has no {generated_answer}"
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        problem = f"cannot be filled in ({error})"
    raise UserError(
        f"{problem}; use the fields {{question}}, {{generated_answer}} and {{reference}}, and "
        "write other braces twice.",
        key="prompt",
        where=f"environments: {Judge.name}",
    )
