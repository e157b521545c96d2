"""Pairs of answers of different lengths, in the forms that data sets have."""

from typing import Any

from tests.support.conversations import GARDEN, GARDEN_TOOLS


def pairs() -> list[dict[str, Any]]:
    """One pair with tools and reasoning, and short ones with and without a prompt of their own."""
    worse = {"role": "assistant", "reasoning_content": "No.", "content": "I cannot say."}
    rows: list[dict[str, Any]] = [
        {
            "prompt": GARDEN[:9],
            "chosen": GARDEN[9:],
            "rejected": [worse],
            "tools": GARDEN_TOOLS,
        }
    ]
    for number in range(30):
        question = {"role": "user", "content": f"What is {number} and {number}?"}
        right = {"role": "assistant", "content": f"It is {2 * number}."}
        wrong = {"role": "assistant", "content": "Who knows?" + " Well." * (number % 6)}
        if number % 2:
            rows.append({"chosen": [question, right], "rejected": [question, wrong]})
        else:
            rows.append({"prompt": [question], "chosen": [right], "rejected": [wrong]})
    return rows
