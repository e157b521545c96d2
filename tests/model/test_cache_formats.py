"""Formats of a cache: rounding that is right on average, and what is read again."""

import pytest
import torch

from nemotron.errors import UserError
from nemotron.generate.engine import Engine
from nemotron.generate.sampling import Sampling
from nemotron.generate.speculate import Speculation
from nemotron.model.cache import Cache
from nemotron.model.cache_formats import (
    CacheFormats,
    load_values,
    philox,
    round_by_chance,
    store_values,
)
from tests.support.models import build


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0), 0, (0xFF1DAE59, 0x6CD10DF2)),
        ((0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF, (0x2C3F628B, 0xAB4FD7AD)),
        ((0x243F6A88, 0x85A308D3), 0x13198A2E, (0xDD7CE038, 0xF62A4C12)),
    ],
)
def test_philox_gives_the_published_numbers(
    counter: tuple[int, int], key: int, expected: tuple[int, int]
) -> None:
    """Source: Random123's kat_vectors."""
    first, second = (torch.tensor([number]) for number in counter)
    assert tuple(int(part) for part in philox(first, second, key)) == expected


@pytest.mark.parametrize("value", [0.1, -3.3337, 1234.567, 3e-6, -2e-7, 6.2e-5, 65503.9])
def test_rounding_by_chance_is_right_on_average_and_repeats(value: float) -> None:
    count = 100_000
    values, steps = torch.full((count // 100, 100), value), torch.arange(count // 100)
    found = round_by_chance(values, 7, steps)
    assert found.equal(round_by_chance(values, 7, steps))
    assert not found.equal(round_by_chance(values, 8, steps))
    # a row's choice does not depend on the others
    assert found[3:5].equal(round_by_chance(values[3:5], 7, steps[3:5]))
    levels = found.double().unique()
    assert len(levels) == 2
    unit = float(levels[1] - levels[0])
    assert levels[0] < value < levels[1]
    share = (value - float(levels[0])) / unit
    deviation = unit * (share * (1 - share) / count) ** 0.5
    assert abs(found.double().mean() - values.double()[0, 0]) <= 3 * deviation + 1e-9 * unit


def test_what_float16_holds_is_not_changed_and_nothing_becomes_infinite() -> None:
    exact = torch.tensor([[0.0, 1.0, -2.5, 65504.0, 2.0**-24, -(2.0**-14), 1e30, -1e30]])
    found = round_by_chance(exact, 1, torch.tensor([3]))[0]
    assert found.tolist() == [0.0, 1.0, -2.5, 65504.0, 2.0**-24, -(2.0**-14), 65504.0, -65504.0]


def test_a_state_drifts_less_when_it_is_rounded_by_chance() -> None:
    """4,096 steps of a slow recurrence, against float64."""
    generator = torch.Generator().manual_seed(0)
    decay, inputs = 0.9995, 0.002 * torch.rand(4096, 4, 16, generator=generator)
    true = torch.zeros(4, 16, dtype=torch.float64)
    nearest, chance = torch.zeros(4, 16).half(), torch.zeros(4, 16).half()
    for step, new in enumerate(inputs):
        true = decay * true + new.double()
        nearest = (decay * nearest.float() + new).half()
        steps = torch.full((4,), step)
        chance = round_by_chance(decay * chance.float() + new, 1, steps)
    drift = [(found.double() - true).mean().abs() for found in (nearest, chance)]
    assert drift[1] < 0.2 * drift[0]


def test_keys_and_values_are_read_as_float8_rounds_them() -> None:
    values = torch.tensor([[0.3, -7.7, 1e-4, 500.0, -1e9]])
    found = load_values(store_values(values, torch.uint8), torch.float32)
    expected = values.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert found.equal(expected)


def test_smaller_formats_take_less_memory() -> None:
    config = build(hybrid_override_pattern="M*").config
    full, half = (
        Cache(config, 3, formats=CacheFormats(*formats), dtype=torch.bfloat16)
        for formats in (("fp32", "model"), ("fp16_sr", "fp8"))
    )
    conv = 3 * config.conv_channels * 2
    assert half.slot_bytes - conv == (full.slot_bytes - conv) // 2
    assert half.block_bytes == full.block_bytes // 2
    with pytest.raises(UserError, match="state_dtype = bf16 is not known; use one of fp32, fp16"):
        CacheFormats("bf16")
    with pytest.raises(UserError, match="kv_dtype = fp4 is not known; use one of model, bf16, fp8"):
        CacheFormats(keys_values="fp4")


@pytest.mark.parametrize(
    "speculation",
    [
        None,
        Speculation("mtp", 2, adaptive=False),
        Speculation("mtp", 2, rollback="store", adaptive=False),
    ],
)
@pytest.mark.parametrize("formats", [("fp16", "bf16"), ("fp16_sr", "fp8")])
def test_an_engine_with_small_formats_stays_close(
    formats: tuple[str, str], speculation: Speculation | None
) -> None:
    model = build(hybrid_override_pattern="M*EM", dtype=torch.float32)
    prompts = [[5, 3, 60, 1, 17, 9], [4, 4, 2], [8, 1, 30, 2]]
    engine = Engine(model, slots=3, formats=CacheFormats(*formats), speculation=speculation)
    small = engine.generate(prompts, 12, Sampling(0.0))
    whole = Engine(model, slots=3).generate(prompts, 12, Sampling(0.0))
    assert engine.cache.blocks.used == 0
    # the first tokens are far from ties; later ones follow from the first that differs
    assert [text[:2] for text in small] == [text[:2] for text in whole]
    if speculation is None:
        again = Engine(model, slots=1, formats=CacheFormats(*formats))
        assert again.generate(prompts[:1], 12, Sampling(0.0)) == small[:1]
