"""A server of the tests, and answers that are dictated to its model."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

from nemotron.generate.request import Request
from nemotron.serve.limits import Limits
from nemotron.serve.schemas import ChatRequest
from nemotron.serve.translate import Translator
from nemotron.serve.worker import Worker

LIMITS = Limits(
    *(2000, 40),
    body_bytes=20_000,
    body_s=1.0,
    stall_s=1.0,
    open_answers=60,
    samples=4,
)
KEY = "a key"

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "exact": {"type": "boolean"},
                    "near": {"type": "array"},
                    "free": {},
                },
            },
        },
    }
]
ARGUMENTS = {"city": "12", "days": 3, "exact": True, "near": ["a\nb", 1.5], "free": "True\nwords"}


@dataclass(frozen=True)
class Dictated(Translator):
    """Lets the model write a given answer, each token forced, where there is one."""

    answers: list[str] = dataclasses.field(default_factory=list)

    def answer(self, asked: ChatRequest) -> tuple[Request, bool]:
        request, thinks = super().answer(asked)
        if self.answers:
            tokens = self.tokenizer.encode(self.answers[0], specials=True)
            request = dataclasses.replace(request, forced=tuple(tokens), max_tokens=len(tokens))
        return request, thinks


@dataclass
class Running:
    """A server that answers at `url`."""

    url: str
    worker: Worker
    answers: list[str]
    is_broken: bool = False
    """Whether a test broke its engine."""

    @property
    def is_empty(self) -> bool:
        """Whether no slot and no block is in use."""
        cache = self.worker.engine.cache
        return (
            cache.num_free_slots == len(cache.lengths)
            and not any(cache.tables)
            and not self.worker.engine.scheduler.waiting
            and self.worker.engine.is_idle
            and not self.worker.num_open
        )

    def wait_until_empty(self) -> None:
        deadline = time.monotonic() + 20
        while not self.is_empty:
            assert time.monotonic() < deadline, "slots or blocks stay in use"
            time.sleep(0.02)


Start = Callable[..., Running]
