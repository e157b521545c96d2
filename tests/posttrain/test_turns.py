"""Conversations with tools, by a stand-in that says what it is given to say."""

import json
from dataclasses import dataclass, field
from typing import Any

from nemotron.data.tokenizer import load_tokenizer
from nemotron.generate.request import Answer
from nemotron.generate.sampling import Sampling
from nemotron.posttrain import turns
from nemotron.posttrain.answering import Asked
from nemotron.posttrain.environments.registry import find_environment
from nemotron.posttrain.prompts import Prompts
from nemotron.posttrain.turns import Conversation, converse

TOKENIZER = load_tokenizer("embedded")
PROMPTS = Prompts(TOKENIZER, frozenset({TOKENIZER.id("<|im_end|>")}), is_chat=True)


@dataclass
class StandIn:
    """Answers the turns of each conversation with its texts, in the order of conversations."""

    texts: list[list[str]]
    prompts: Prompts = PROMPTS
    asked: list[list[Asked]] = field(default_factory=list)

    def answer(self, asked: list[Asked]) -> list[Answer]:
        self.asked.append(asked)
        waiting = [texts for texts in self.texts if texts]
        return [
            Answer(TOKENIZER.encode(f"</think>{texts.pop(0)}", specials=True), finish="stop")
            for texts, _ in zip(waiting, asked, strict=True)
        ]


def call_text(name: str, arguments: dict[str, Any]) -> str:
    values = "".join(
        f"<parameter={key}>\n{v if isinstance(v, str) else json.dumps(v)}\n</parameter>\n"
        for key, v in arguments.items()
    )
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


def talk(rows: list, texts: list[list[str]]) -> tuple[list[Conversation], StandIn]:
    environment, model = find_environment("tool_calc_db"), StandIn(texts)
    pairs = [(environment, row) for row in rows]
    return converse(model, pairs, [Sampling(1.0, seed=4)] * len(rows)), model  # type: ignore[arg-type]


def test_right_calls_and_numbers_earn_the_reward_and_wrong_ones_do_not():
    environment = find_environment("tool_calc_db")
    rows = list(environment.rows(12, 3, 1))
    right = []
    for row in rows:
        texts = [call_text(call["name"], call["arguments"]) for call in row["ground_truth"]]
        answer = row.get("expected_answer")
        right.append([*texts, "Done." if answer is None else f"\\boxed{{{answer}}}"])
    talks, model = talk(rows, [list(texts) for texts in right])
    for row, found, texts in zip(rows, talks, right, strict=True):
        assert environment.verify(row, found.response, None).reward == 1, texts
        made = [item for item in found.response.output if item["type"] == "function_call"]
        assert len(made) == len(texts) - 1
    # what a tool answered stands in the next prompt
    spoken = TOKENIZER.decode(model.asked[1][0].prompt)
    assert "<tool_response>" in spoken
    lazy, _ = talk(rows, [["Done."] for _ in rows])
    rewards = [
        environment.verify(r, t.response, None).reward for r, t in zip(rows, lazy, strict=True)
    ]
    assert sum(rewards) == 0


def test_a_conversation_of_calls_alone_ends():
    [row] = find_environment("tool_calc_db").rows(1, 3, 0)
    words = [call_text("no_such_tool", {})] * 2 + [call_text("calculate", {})] * 50
    [found], model = talk([row], [words[2:]])
    assert found.is_over
    assert len(model.asked) <= turns.MAX_TURNS
    seeds = [asked.sampling.seed for [asked] in model.asked]
    assert len(set(seeds)) == len(seeds)
