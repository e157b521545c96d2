"""Texts that share a cache: each grows, shrinks and leaves without a trace in the others."""

import pytest
import torch
from torch import Tensor

from nemotron.data.batch import shift_left
from nemotron.model.ahead import RowsAhead
from nemotron.model.blocks import Blocks, OutOfBlocks
from nemotron.model.cache import Cache
from nemotron.model.cached_rows import CachedRows
from nemotron.model.hybrid import HybridLM
from nemotron.model.state import Keep, KeyValues
from tests.support.models import build, tokens

# float64: another order of sums
TOLERANCE = 1e-11


@pytest.fixture(scope="module")
def model() -> HybridLM:
    """Every layer kind in float64; tests must not change it."""
    return build()


def new_cache(model: HybridLM, slots: int, **settings: object) -> Cache:
    settings = {"block_size": 4, "dtype": torch.float64} | settings
    return Cache(model.config, slots, **settings)


@torch.no_grad()
def read(model: HybridLM, cache: Cache, slots: list[int], ids: list[Tensor]) -> Tensor:
    """Append as many tokens to each slot; return their hidden states."""
    return model(torch.stack(ids), cache=CachedRows(cache, slots))


def check(found: Tensor, model: HybridLM, text: Tensor) -> None:
    """Compare hidden states with the last ones of a pass over the whole text."""
    with torch.no_grad():
        expected = model(text[None])[0, -found.shape[0] :]
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_rows_of_unequal_length_go_on_together_and_others_join(model: HybridLM) -> None:
    cache, texts = new_cache(model, 4), tokens(3, 40)
    first, second = cache.admit(), cache.admit()
    check(read(model, cache, [first], [texts[0, :13]])[0], model, texts[0, :13])
    check(read(model, cache, [second], [texts[1, :2]])[0], model, texts[1, :2])
    both = read(model, cache, [first, second], [texts[0, 13:14], texts[1, 2:3]])
    check(both[0], model, texts[0, :14])
    check(both[1], model, texts[1, :3])
    third = cache.admit()
    read(model, cache, [third], [texts[2, :7]])
    # neither in order nor neighbors, and several tokens at once
    found = read(model, cache, [third, first], [texts[2, 7:12], texts[0, 14:19]])
    check(found[0], model, texts[2, :12])
    check(found[1], model, texts[0, :19])
    assert [cache.lengths[slot] for slot in (first, second, third)] == [19, 3, 12]
    found = read(
        model, cache, [first, second, third], [texts[0, 19:20], texts[1, 3:4], texts[2, 12:13]]
    )
    for row, (text, end) in enumerate(zip(texts, (20, 4, 13), strict=True)):
        check(found[row], model, text[:end])


def test_a_slot_that_was_freed_starts_from_nothing(model: HybridLM) -> None:
    cache, texts = new_cache(model, 2), tokens(2, 30)
    kept, slot = cache.admit(), cache.admit()
    read(model, cache, [kept], [texts[0, :9]])
    read(model, cache, [slot], [texts[1]])
    assert cache.num_free_slots == 0
    cache.free(slot)
    assert (cache.num_free_slots, cache.blocks.used) == (1, 3)
    free = [block for block in range(cache.blocks.count) if block not in cache.tables[kept]]
    for layer in cache.layers:
        if isinstance(layer, KeyValues):  # as a text that ran into NaN would leave them
            layer.keys[free] = layer.values[free] = torch.nan
    again = cache.admit()
    assert again == slot
    check(read(model, cache, [again], [texts[0, :5]])[0], model, texts[0, :5])
    found = read(model, cache, [kept, again], [texts[0, 9:10], texts[0, 5:6]])
    check(found[0], model, texts[0, :10])
    check(found[1], model, texts[0, :6])
    cache.free(kept)
    cache.free(again)
    assert (cache.num_free_slots, cache.blocks.used, cache.lengths) == (2, 0, [0, 0])


@pytest.mark.parametrize("keep", ["inputs", "states"])
@pytest.mark.parametrize("slots", [[0, 1], [1, 0]])
@pytest.mark.parametrize("counts", [(0, 5), (1, 4), (3, 2), (5, 5)])
def test_each_row_keeps_the_first_tokens_of_a_call(
    model: HybridLM, counts: tuple[int, int], slots: list[int], keep: Keep
) -> None:
    cache, texts = new_cache(model, 2), tokens(2, 40)
    for text in texts:
        read(model, cache, [cache.admit()], [text[:7]])
    with torch.no_grad():
        rows = CachedRows(cache, slots, keep=keep)
        found = model(texts[slots][:, 7:12], cache=rows)
    rows.keep_first(counts)
    for row, (slot, count) in enumerate(zip(slots, counts, strict=True)):
        check(found[row], model, texts[slot, :12])
        assert cache.lengths[slot] == 7 + count
        other = torch.cat([texts[slot, : 7 + count], texts[1 - slot, 20:23]])
        check(read(model, cache, [slot], [other[-3:]])[0], model, other)


@pytest.mark.parametrize("slots", [[0, 1], [1, 0]])
@pytest.mark.parametrize("kept", range(6))
def test_a_text_can_be_cut_after_every_token_of_a_call(
    model: HybridLM, kept: int, slots: list[int]
) -> None:
    cache, texts = new_cache(model, 2), tokens(2, 40)
    for text in texts:
        read(model, cache, [cache.admit()], [text[:7]])
    with torch.no_grad():
        rows = CachedRows(cache, slots, keep="states")
        drafts = texts[slots][:, 7:12]
        found = model(drafts, cache=rows)
    for row, slot in enumerate(slots):
        check(found[row], model, texts[slot, :12])
    cache.truncate(0, 7 + kept)
    assert cache.lengths == [7 + kept, 12]
    other = torch.cat([texts[0, : 7 + kept], texts[1, 20:23]])
    check(read(model, cache, [0], [other[-3:]])[0], model, other)
    check(read(model, cache, [1], [texts[1, 12:14]])[0], model, texts[1, :14])


def test_a_text_can_be_cut_to_nothing_but_not_to_a_state_that_is_lost(model: HybridLM) -> None:
    cache, text = new_cache(model, 1), tokens(1, 20)[0]
    slot = cache.admit()
    read(model, cache, [slot], [text[:9]])
    with pytest.raises(AssertionError, match="after every token were not kept"):
        cache.truncate(slot, 8)
    with pytest.raises(AssertionError, match="slot 0 has 9 tokens"):
        cache.truncate(slot, 10)
    assert cache.lengths == [9]
    cache.truncate(slot, 0)
    assert cache.blocks.used == 0
    check(read(model, cache, [slot], [text[3:9]])[0], model, text[3:9])


def test_a_call_that_does_not_fit_into_the_blocks_changes_no_text(model: HybridLM) -> None:
    cache, texts = new_cache(model, 2, blocks=4), tokens(2, 40)
    first, second = cache.admit(), cache.admit()
    read(model, cache, [first], [texts[0, :8]])
    read(model, cache, [second], [texts[1, :6]])
    assert cache.blocks.num_free == 0
    with pytest.raises(OutOfBlocks, match="all 4 blocks"):
        read(model, cache, [second, first], [texts[1, 6:9], texts[0, 8:11]])
    assert cache.lengths == [8, 6]
    cache.free(second)
    check(read(model, cache, [first], [texts[0, 8:11]])[0], model, texts[0, :11])


def test_the_prediction_block_remembers_what_it_read_beside_the_backbone(model: HybridLM) -> None:
    texts = tokens(2, 30)
    cache = new_cache(model, 2, drafts=1)
    slots = [cache.admit(), cache.admit()]
    with torch.no_grad():
        hidden, after = model(texts), shift_left(texts, None, vacated=0)
        [expected] = model.mtp_hidden(hidden, [after], None)
        embedded = model.embed(after)

        def predict(slots: list[int], begin: int, end: int) -> Tensor:
            rows = RowsAhead(cache, slots, [begin + 1] * len(slots))
            return model.mtp(
                embedded[slots, begin:end], hidden[slots, begin:end], None, cache=rows
            )[0]

        for slot, end in zip(slots, (11, 5), strict=True):
            assert (predict([slot], 0, end) - expected[slot, :end]).abs().max() <= TOLERANCE
        predict([0], 11, 16)
        # what was read before is replaced
        assert (predict([0], 11, 14) - expected[0, 11:14]).abs().max() <= TOLERANCE
        predict([1], 5, 12)
        found = predict(slots, 12, 13)
    assert (found - expected[:, 12:13]).abs().max() <= TOLERANCE


def test_blocks_follow_each_other_where_they_can() -> None:
    blocks = Blocks(4)
    first = blocks.take()
    assert blocks.take(first) == first + 1
    other = blocks.take()
    assert blocks.take(other) == other + 1
    blocks.share(other)
    blocks.release(other)
    assert not blocks.is_shared(other)
    assert blocks.num_free == 0
    blocks.release(first)
    assert blocks.take(other) == first  # the next one is in use
    with pytest.raises(OutOfBlocks):
        blocks.take()


def test_blocks_are_given_out_once_whatever_the_order() -> None:
    blocks, generator = Blocks(), torch.Generator().manual_seed(0)
    held: list[int] = []
    for number in torch.randint(5, (400,), generator=generator).tolist():
        if number or not held:
            block = blocks.take(held[-1] if held and number > 2 else None)
            assert block not in held
            held.append(block)
        else:
            blocks.release(held.pop(len(held) // 2))
        assert blocks.used == len(held) <= blocks.count
