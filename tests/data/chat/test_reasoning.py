"""Reasoning that is left out or cut off in a share of the conversations."""

import random

import pytest

from nemotron.data.chat.reasoning import cut_reasoning
from nemotron.data.chat.render import render, training_sequences
from nemotron.data.config import ChatOptions
from nemotron.data.prepare.conversations import encode_conversation
from nemotron.data.tokenizer import load_tokenizer
from tests.support.conversations import GARDEN, GARDEN_TOOLS

LINES = ["7*8=56", "56-6=50", "50+1=51"]
SUM = [
    {"role": "user", "content": "7*8-6+1="},
    {"role": "assistant", "content": "51", "reasoning_content": "\n".join(LINES)},
]


def spans(rendered) -> list[str]:
    return [rendered.text[start:stop] for start, stop in rendered.supervised]


def test_any_number_of_lines_stays_but_never_all() -> None:
    [whole] = training_sequences(SUM)
    prompt = render(SUM[:1], add_generation_prompt=True).text
    found = {cut_reasoning(whole, random.Random(seed)) for seed in range(40)}
    expected = {prompt + "".join(f"{line}\n" for line in LINES[:count]) for count in range(3)}
    answer = "</think>\n51<|im_end|>\n"
    assert {each.text for each in found} == {text + answer for text in expected}
    assert all(spans(each) == [answer] for each in found)


def test_every_turn_of_a_conversation_with_tools_keeps_its_answer() -> None:
    for whole in training_sequences(GARDEN, GARDEN_TOOLS):
        cut = cut_reasoning(whole, random.Random(1))
        for turn, kept in zip(spans(whole), spans(cut), strict=True):
            tag = turn.find("</think>")
            assert kept == turn[max(tag, 0) :]


def test_a_turn_without_reasoning_stays_as_it_is() -> None:
    [whole] = training_sequences(SUM, enable_thinking=False)
    assert cut_reasoning(whole, random.Random(1)) == whole


def test_shares_of_the_conversations_are_the_rates_and_the_same_every_time() -> None:
    tokenizer = load_tokenizer("embedded")
    options = ChatOptions(reasoning_off_rate=0.2, reasoning_budget_rate=0.3)
    kinds = []
    for number in range(300):
        row = {"messages": [{"role": "user", "content": f"{number}?"}, SUM[1]]}
        [ids] = encode_conversation(row, tokenizer, options)
        assert [ids] == encode_conversation(row, tokenizer, options)
        text = tokenizer.decode(ids.ids)
        learned = tokenizer.decode([i for i, k in zip(ids.ids, ids.learned, strict=True) if k])
        if "<think></think>" in text:
            kinds.append("off")
        else:
            assert learned.endswith("</think>\n51<|im_end|>\n")
            kinds.append("whole" if LINES[2] in learned else "cut")
    shares = {kind: kinds.count(kind) / 300 for kind in ("off", "cut")}
    # three standard deviations of 300 draws are 0.07 and 0.08
    assert shares == {"off": pytest.approx(0.2, abs=0.07), "cut": pytest.approx(0.3, abs=0.08)}
