"""`nemotron chat --calculator`: calls are run and shown, and the model reads what they give."""

import dataclasses
from typing import Any

import pytest

from nemotron.commands.serve import _calculator
from nemotron.data.tokenizer import Tokenizer
from nemotron.generate.engine import Engine
from nemotron.generate.request import Request
from nemotron.generate.sampling import Sampling
from nemotron.model.hybrid import HybridLM
from nemotron.serve import console
from nemotron.serve.console import MAX_TURNS, Conversation, Manner
from nemotron.serve.conversation import ChatFormat

CALL = (
    "\n<tool_call>\n<function=calculate>\n<parameter=expression>\n{}\n</parameter>\n</function>\n"
    "</tool_call>\n<|im_end|>"
)


class Dictating(Conversation):
    """Has the model write given answers, the last one again and again."""

    def __init__(self, answers: list[str], *given: Any) -> None:
        super().__init__(*given)
        self.answers, self.asked = answers, list[str]()
        self.tokenizer: Tokenizer = self._chat.tokenizer

    def _request(self, messages: list[dict[str, Any]]) -> tuple[Request, bool]:
        request, thinks = super()._request(messages)
        self.asked.append(self.tokenizer.decode(request.prompt, skip_specials=False))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        tokens = tuple(self.tokenizer.encode(answer, specials=True))
        return dataclasses.replace(request, forced=tokens, max_tokens=len(tokens)), thinks


@pytest.fixture
def talk(model: HybridLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys):
    """Sends lines to a model that gives these answers; returns the conversation and the screen."""

    def go(answers: list[str], *lines: str) -> tuple[Dictating, str]:
        given = [*lines]
        monkeypatch.setattr(console, "_next_line", lambda prompt: given.pop(0) if given else None)
        chat = ChatFormat.of(tokenizer, None)
        assert chat is not None
        engine = Engine(model, {3}, tokenizer=tokenizer, slots=1)
        manner = Manner(Sampling(0.0), 200, tools=_calculator())
        conversation = Dictating(answers, engine, chat, manner, 2000)
        assert console.chat(conversation) == 0
        return conversation, capsys.readouterr().out

    return go


def test_a_call_is_run_shown_and_answered_by_the_model(talk):
    reasoning = "23*4=92\n92+7=99"
    answers = [
        f"{reasoning}\n</think>" + CALL.format("23*4+7"),
        "it said so\n</think>\n99<|im_end|>",
    ]
    conversation, shown = talk(answers, "What is 23*4+7?")
    assert shown == (
        f"<think>\n{reasoning}\n</think>\n"
        'calculate(expression="23*4+7") = 99\n'
        "<think>\nit said so\n</think>\n99\n"
    )
    first, second = conversation.asked
    assert "<name>calculate</name>" in first
    assert second.startswith(first)
    assert CALL.format("23*4+7") in second
    assert second.endswith(
        "<tool_response>\n99\n</tool_response>\n<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["user", "assistant", "tool", "assistant"]


def test_what_a_call_gives_and_says_cannot_harm_the_terminal_or_the_chat(talk):
    answers = ["</think>so" + CALL.format("1\x1b[2J/0"), "</think>\nno<|im_end|>"]
    _, shown = talk(answers, "hello")
    assert "\x1b" not in shown
    assert 'so\ncalculate(expression="1\\u001b[2J/0") = error: ' in shown
    assert shown.endswith("\nno\n")


def test_calls_without_end_are_stopped(talk):
    conversation, shown = talk(["</think>" + CALL.format("6*7")], "hello", "again")
    assert shown.count("= 42\n") == 2 * (MAX_TURNS - 1)
    assert len(conversation.asked) == 2 * MAX_TURNS
