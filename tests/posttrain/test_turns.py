"""Conversations with tools, by a stand-in that says what it is given to say."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from nemotron.data.chat.render import render
from nemotron.data.tokenizer import load_tokenizer
from nemotron.generate.request import Answer
from nemotron.generate.sampling import Sampling
from nemotron.posttrain.answering import Asked
from nemotron.posttrain.environments.base import Row, build_row, messages_of
from nemotron.posttrain.environments.registry import find_environment
from nemotron.posttrain.prompts import Prompts
from nemotron.posttrain.turns import MAX_TURNS, Conversation, Limits, converse
from nemotron.posttrain.verify import Beginning, Called, Verifiers
from tests.support.cases import further

TOKENIZER = load_tokenizer("embedded")
TURN_END = TOKENIZER.id("<|im_end|>")
PROMPTS = Prompts(TOKENIZER, frozenset({TURN_END}), is_chat=True)


@dataclass
class StandIn:
    """Answers the turns of each conversation, known by its prompt, with its texts."""

    texts: dict[tuple[int, ...], list[str]] = field(default_factory=dict)
    prompts: Prompts = PROMPTS
    asked: list[list[Asked]] = field(default_factory=list)

    def answer(self, asked: list[Asked]) -> list[Answer]:
        if asked:
            self.asked.append(asked)
        return [self._say(each.prompt) for each in asked]

    def _say(self, prompt: tuple[int, ...]) -> Answer:
        [texts] = [texts for begin, texts in self.texts.items() if prompt[: len(begin)] == begin]
        return answer_of(TOKENIZER.encode(f"</think>{texts.pop(0)}<|im_end|>", specials=True))


def answer_of(tokens: list[int]) -> Answer:
    count = len(tokens)
    return Answer(tokens, forced=[False] * count, logprobs=[-1.0] * count, finish="stop")


@pytest.fixture(scope="module")
def verifiers() -> Iterator[Verifiers]:
    with Verifiers(1) as made:
        yield made


def call_text(name: str, arguments: dict[str, Any]) -> str:
    values = "".join(
        f"<parameter={key}>\n{v if isinstance(v, str) else json.dumps(v)}\n</parameter>\n"
        for key, v in arguments.items()
    )
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


def talk(
    verifiers: Verifiers, rows: list[Row], texts: list[list[str]], **limits: int
) -> tuple[list[Conversation], StandIn]:
    model, found = StandIn(), []
    for row, own in zip(rows, texts, strict=True):
        prompt = PROMPTS.write(messages_of(row), row["responses_create_params"]["tools"])
        model.texts[prompt] = list(own)
        found.append(Conversation.about(row, prompt, Sampling(1.0, seed=4), Limits(**limits)))
    converse(model, verifiers, found, 1)  # type: ignore[arg-type]
    return found, model


def test_right_calls_and_numbers_earn_the_reward_and_wrong_ones_do_not(verifiers: Verifiers):
    environment = find_environment("tool_calc_db")
    rows = list(environment.rows(12, 3, 1))
    right = []
    for row in rows:
        texts = [call_text(call["name"], call["arguments"]) for call in row["ground_truth"]]
        answer = row.get("expected_answer")
        right.append([*texts, "Done." if answer is None else f"\\boxed{{{answer}}}"])
    talks, model = talk(verifiers, rows, right)
    for row, found, texts in zip(rows, talks, right, strict=True):
        assert environment.verify(row, found.response, None).reward == 1, texts
        made = [item for item in found.response.output if item["type"] == "function_call"]
        assert len(made) == found.num_calls == len(texts) - 1
        said = [i for i in found.response.output if i["type"] == "function_call_output"]
        assert [item["call_id"] for item in said] == [item["call_id"] for item in made]
    # what a tool answered stands in the next prompt, and is not the model's
    spoken = TOKENIZER.decode(model.asked[1][0].prompt)
    assert "<tool_response>" in spoken
    lazy, _ = talk(verifiers, rows, [["Done."] for _ in rows])
    rewards = [
        environment.verify(r, t.response, None).reward for r, t in zip(rows, lazy, strict=True)
    ]
    assert sum(rewards) == 0


def test_what_tools_say_is_forced_and_the_rest_is_the_models(verifiers: Verifiers):
    [row] = find_environment("tool_calc_db").rows(1, 3, 0)
    texts = [call_text("calculate", {"expression": "6*7"}), "Done."]
    [found], model = talk(verifiers, [row], [texts])
    said = found.transcript
    _, second = model.asked
    assert second[0].prompt == said.ids[: len(second[0].prompt)]
    own = [t for t, forced in zip(said.tokens, said.forced, strict=True) if not forced]
    spoken = [t for t, forced in zip(said.tokens, said.forced, strict=True) if forced]
    assert TOKENIZER.decode(own) == "".join(f"</think>{text}<|im_end|>" for text in texts)
    assert TOKENIZER.decode(spoken) == (
        "\n<|im_start|>user\n<tool_response>\n42\n</tool_response>\n<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )
    assert said.logprobs == [0.0 if forced else -1.0 for forced in said.forced]
    assert said.num_sampled == len(own)


def test_a_conversation_of_calls_alone_ends(verifiers: Verifiers):
    [row] = find_environment("tool_calc_db").rows(1, 3, 0)
    [found], model = talk(verifiers, [row], [[call_text("calculate", {})] * 50])
    assert found.is_over
    assert found.turns == len(model.asked) == MAX_TURNS
    seeds = [asked.sampling.seed for [asked] in model.asked]
    assert len(set(seeds)) == len(seeds)
    [short], model = talk(verifiers, [row], [[call_text("calculate", {})] * 50], max_turns=3)
    assert (short.turns, short.response.is_truncated) == (3, False)
    room = len(model.asked[2][0].prompt)
    [full], _ = talk(verifiers, [row], [[call_text("calculate", {})] * 50], max_tokens=room)
    assert (full.turns, full.response.is_truncated) == (2, True)
    assert len(full.transcript) <= room
    assert not full.transcript.forced[-1]


def test_a_tool_that_fails_is_a_fault_of_that_conversation_alone(verifiers: Verifiers):
    good, bad = find_environment("tool_calc_db").rows(2, 3, 0)
    broken = {**bad, "tables": {"email": "no list"}}
    texts = [call_text("calculate", {"expression": "1"}), "Done."]
    talks, _ = talk(verifiers, [good, broken], [texts, texts])
    assert talks[0].fault is None
    assert talks[1].fault is not None
    assert talks[1].fault.startswith("a tool ended: ")
    rows, responses = [good, broken], [each.response for each in talks]
    faults = [each.fault for each in talks]
    before = verifiers.faults.total()
    kept, masked = verifiers.verify(rows, responses, [None, None], 20.0, faults)
    assert not kept.mask
    assert masked.mask
    assert masked.error == talks[1].fault
    assert verifiers.faults.total() == before + 1


WORDS = ("sum", "order 7", "Zürich", "東京", "🙂", "a\nb", "3.50", "true", '"', "{x: 1}", "  two")
TOOLS = [
    {
        "type": "function",
        "name": name,
        "description": f"Does {name}.",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string"}, "count": {"type": "integer"}},
            "required": ["text"],
        },
    }
    for name in ("find", "send")
]


def words(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 6))).strip()


def assistant(rng: random.Random, *, calls: bool, thinking: bool) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": "assistant", "content": words(rng)}
    if thinking:
        turn["reasoning_content"] = words(rng)
    if calls:
        turn["content"] = rng.choice(["", turn["content"]])
        turn["tool_calls"] = [
            {
                "type": "function",
                "function": {
                    "name": rng.choice(("find", "send")),
                    "arguments": {"text": words(rng), "count": rng.randrange(100)},
                },
            }
            for _ in range(rng.randint(1, 3))
        ]
    return turn


def sampled(messages: list[dict[str, Any]], thinking: bool) -> list[int]:
    """Return the newest turn as a model would have sampled it."""
    whole = render(messages, TOOLS, enable_thinking=thinking)
    start, stop = whole.supervised[-1]
    return TOKENIZER.encode(whole.text[start:stop].removesuffix("\n"), specials=True)


@pytest.mark.slow
@pytest.mark.parametrize("count", [200, further(1000)])
def test_ids_of_many_conversations_are_those_of_the_rendered_whole(count: int):
    rng = random.Random(5)
    turns = calls = 0
    for number in range(count):
        thinking = number % 2 == 0
        prompts = Prompts(TOKENIZER, frozenset({TURN_END}), True, thinking)
        row = build_row("any", words(rng))
        row["responses_create_params"]["tools"] = TOOLS
        messages = messages_of(row)
        found = Conversation.about(row, prompts.write(messages, TOOLS), Sampling(1.0), Limits())
        found.begin(Beginning({}, has_tools=True))
        for left in reversed(range(rng.randint(1, 5))):
            messages.append(assistant(rng, calls=left > 0, thinking=thinking))
            tokens = sampled(messages, thinking)
            response = prompts.response(tokens, is_truncated=False)
            made = found.take(answer_of(tokens), response)
            turns += 1
            if left:
                assert made is not None
                assert len(made.calls) == len(messages[-1]["tool_calls"])
                calls += len(made.calls)
                said = [words(rng) for _ in made.calls]
                messages += [{"role": "tool", "content": each} for each in said]
                found.hear(made, Called(said, {}), prompts)
        assert found.is_over
        whole = render(messages, TOOLS, enable_thinking=thinking).text
        assert [*found.transcript.ids] == TOKENIZER.encode(whole.removesuffix("\n"), specials=True)
    assert turns > 2.5 * count
    assert calls > 2.5 * count


def test_an_answer_that_the_format_would_write_otherwise_stays_as_it_was_sampled():
    """Here with blanks around a call; the turn also ended at another token."""
    [row] = find_environment("tool_calc_db").rows(1, 3, 0)
    prompt = PROMPTS.write(messages_of(row), row["responses_create_params"]["tools"])
    found = Conversation.about(row, prompt, Sampling(1.0), Limits())
    found.begin(Beginning({}, has_tools=True))
    odd = f"</think>\n\n  {call_text('calculate', {'expression': '1'})}   \n\n"
    tokens = TOKENIZER.encode(odd, specials=True)
    made = found.take(answer_of(tokens), PROMPTS.response(tokens, is_truncated=False))
    assert made is not None
    found.hear(made, Called(["1"], {}), PROMPTS)
    said = found.transcript
    assert said.tokens[: len(tokens)] == tokens
    assert said.tokens[len(tokens)] == TURN_END
    assert said.forced[len(tokens) - 1 : len(tokens) + 1] == [False, True]
