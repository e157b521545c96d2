"""Reading a source twice with the models that are trained: what a slot sees, and the cache."""

from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.generate.forward import new_cache
from nemotron.model.cached_rows import CachedRows
from nemotron.model.hybrid import HybridLM
from nemotron.recipe.load import load_recipe
from tests.support.pages import ROOT

SEP = 3


@dataclass(frozen=True)
class Case:
    """A model, and two sources with the slots behind them."""

    model: HybridLM
    sources: list[Int[Tensor, "1 T"]]
    slots: list[Int[Tensor, "1 T"]]

    @torch.no_grad()
    def answers(
        self, source: Int[Tensor, "1 T"], slots: Int[Tensor, "1 T"], padding: int = 0
    ) -> Float[Tensor, "T V"]:
        """Return the logits at the slots, of one pass over the row."""
        row = torch.cat([source, slots, torch.full((1, padding), 2)], 1)
        return self.model.logits(self.model(row))[0, source.shape[1] :][: slots.shape[1]]


@pytest.fixture(scope="module", params=["correct/tag", "tiny/pretrain"])
def case(request: pytest.FixtureRequest) -> Case:
    config = load_recipe(ROOT / f"recipes/{request.param}.yaml").config
    model = HybridLM(config.model)
    model.init_weights(1)
    generator = torch.Generator().manual_seed(2)
    tokens = [torch.randint(30, 460, (1, n), generator=generator) for n in (9, 6)]
    mark = torch.tensor([[SEP]])
    return Case(model, [torch.cat([mark, own, mark], 1) for own in tokens], tokens)


def test_the_first_slot_sees_the_last_token_of_the_source(case: Case) -> None:
    for source, slots in zip(case.sources, case.slots, strict=True):
        changed = source.clone()
        changed[0, -2] = 461
        moved = case.answers(changed, slots) - case.answers(source, slots)
        assert moved[0].abs().max() > 1e-2


def test_a_slot_sees_neither_later_slots_nor_padding(case: Case) -> None:
    for source, slots in zip(case.sources, case.slots, strict=True):
        plain = case.answers(source, slots)
        later = slots.clone()
        later[0, -1] = 461
        # float32; sums of another length are rounded otherwise
        close = {"rtol": 0, "atol": 1e-5}
        torch.testing.assert_close(case.answers(source, later)[:-1], plain[:-1], **close)
        torch.testing.assert_close(case.answers(source, slots, padding=4), plain, **close)


def test_two_passes_with_a_cache_over_uneven_rows_are_one_pass_over_each(case: Case) -> None:
    cache = new_cache(case.model, 2)
    rows = [cache.admit() for _ in case.sources]
    with torch.no_grad():
        for row, source in zip(rows, case.sources, strict=True):
            case.model(source, cache=CachedRows(cache, [row]))
        longest = max(slots.shape[1] for slots in case.slots)
        padded = torch.full((2, longest), 2)
        for own, slots in zip(padded, case.slots, strict=True):
            own[: slots.shape[1]] = slots[0]
        found = case.model.logits(case.model(padded, cache=CachedRows(cache, rows)))
    for own, source, slots in zip(found, case.sources, case.slots, strict=True):
        expected = case.answers(source, slots)
        # float32, as above
        torch.testing.assert_close(own[: slots.shape[1]], expected, rtol=0, atol=1e-5)
