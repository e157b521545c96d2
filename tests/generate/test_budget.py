"""The reasoning budget: where the closing tag is put, and that an engine keeps to it."""

import pytest

from nemotron.data.tokenizer import load_tokenizer
from nemotron.errors import UserError
from nemotron.generate.budget import Reasoning, ReasoningBudget
from nemotron.generate.engine import Engine
from nemotron.generate.request import Request
from nemotron.generate.sampling import Sampling
from nemotron.generate.speculate import Speculation
from tests.support.models import build

END = (50, 51, 52)
LINE = 9


def written(budget: ReasoningBudget, model_tokens: list[int]) -> list[int]:
    """Return what an answer becomes when the model would write these tokens."""
    reasoning, answer = Reasoning(budget), []
    forced, free = list(reasoning.begin()), list(model_tokens)
    while forced or free:
        token = forced.pop(0) if forced else free.pop(0)
        answer.append(token)
        forced += reasoning.push(token)
    return answer


@pytest.mark.parametrize(
    ("tokens", "grace", "by_model", "expected"),
    [
        (3, 2, [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, *END, 6]),  # no line ends
        (3, 2, [1, LINE, 3, LINE, 5], [1, LINE, 3, LINE, *END, 5]),
        (3, 2, [1, 2, LINE, 4], [1, 2, LINE, *END, 4]),
        (3, 0, [1, 2, 3, 4], [1, 2, 3, *END, 4]),
        (0, 0, [1, 2], [*END, 1, 2]),
        (0, 1, [1, 2], [1, *END, 2]),
        (3, 2, [1, 2, *END, 4, 5, 6, LINE, 7], [1, 2, *END, 4, 5, 6, LINE, 7]),  # closed by itself
        (3, 2, [1, 2, 3, 50, 51, 6, 7], [1, 2, 3, 50, 51, 52, 6, 7]),  # half written
        (4, 0, [1, 50, 51, 52, 5, 6], [1, 50, 51, 52, 5, 6]),  # closed at the last moment
        (4, 0, [1, 50, 51, 50, 5], [1, 50, 51, 50, 51, 52, 5]),
    ],
)
def test_the_tag_is_closed_at_the_budget(
    tokens: int, grace: int, by_model: list[int], expected: list[int]
) -> None:
    assert written(ReasoningBudget(tokens, grace, END, frozenset({LINE})), by_model) == expected


@pytest.mark.parametrize(
    "speculation",
    [None, Speculation("mtp", adaptive=False), Speculation("lookup", 2, adaptive=False)],
)
@pytest.mark.parametrize(("tokens", "grace"), [(0, 0), (4, 0), (3, 4)])
def test_every_answer_of_an_engine_keeps_to_its_budget(
    tokens: int, grace: int, speculation: Speculation | None
) -> None:
    model = build(hybrid_override_pattern="ME*")
    budget = ReasoningBudget(tokens, grace, END, frozenset(range(10)))
    requests = [
        Request((3, 1, 4 + seed), 20, Sampling(1.5, seed=seed), budget=limit)
        for seed in range(6)
        for limit in (budget, None)
    ]
    ended = [e for e in Engine(model, slots=5, speculation=speculation).run(requests) if e.finish]
    answers = {event.request: event.answer for event in ended}
    for number in range(0, 12, 2):
        limited, free = answers[number], answers[number + 1]
        place = next(k for k in range(20) if tuple(limited.tokens[k : k + 3]) == END)
        assert tokens <= place <= tokens + grace
        assert limited.tokens[:place] == free.tokens[:place]
        assert limited.forced == [place <= k < place + 3 for k in range(20)]
        assert not any(free.forced)


def test_the_tokens_of_tag_and_line_ends_are_the_tokenizer_s() -> None:
    tokenizer = load_tokenizer("embedded")
    budget = ReasoningBudget.of(tokenizer, 5)
    assert tokenizer.decode(list(budget.end)) == "</think>"
    assert tokenizer.encode("\n")[-1] in budget.line_ends
    assert tokenizer.encode("a")[0] not in budget.line_ends
    for token in sorted(budget.line_ends)[:50]:
        assert tokenizer.decode([token]).endswith("\n")


def test_impossible_budgets_are_refused() -> None:
    with pytest.raises(UserError, match="budget: tokens = -1 must be at least 0"):
        ReasoningBudget(-1, 0, END)
    with pytest.raises(UserError, match="the closing tag has no token"):
        ReasoningBudget(1, 0, ())
