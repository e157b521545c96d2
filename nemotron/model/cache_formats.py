"""Number formats of what a cache holds: of Mamba-2 states, and of keys and values.

A state is read, changed a little and rounded again for every token. Rounding to nearest loses what
is less than half a unit each time, so a small state of 16 bits drifts; rounding up or down by
chance is right on average.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.errors import UserError

StateFormat = Literal["fp32", "fp16", "fp16_sr"]
KeyValueFormat = Literal["model", "bf16", "fp8"]

ROUNDS = 5
"""Of Philox, as serving engines take for this (vLLM PR 35753)."""
FP8_LARGEST = 448.0
FP16_LARGEST = 65504.0
FP16_SMALLEST_NORMAL, FP16_SMALLEST = 2.0**-14, 2.0**-24
DROPPED_BITS = 13
"""Bits of a float32's fraction that float16 lacks."""


@dataclass(frozen=True)
class CacheFormats:
    """How a cache holds what it remembers; the default loses nothing, and is what RL needs.

    `state`: float32, float16 rounded to nearest, or float16 rounded stochastically. `keys_values`:
    those of the model, bfloat16, or float8 (e4m3, unscaled).
    """

    state: StateFormat = "fp32"
    keys_values: KeyValueFormat = "model"

    def __post_init__(self) -> None:
        kinds = {
            "state_dtype": (self.state, StateFormat),
            "kv_dtype": (self.keys_values, KeyValueFormat),
        }
        for name, (value, known) in kinds.items():
            if value not in get_args(known):
                rule = f"is not known; use one of {', '.join(get_args(known))}."
                raise UserError(rule, key=name, value=value)

    def state_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of stored states; in full precision at least float32."""
        if self.state == "fp32":
            return torch.promote_types(model_dtype, torch.float32)
        return torch.float16

    def keys_values_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of stored keys and values; float8 is stored as bytes."""
        return {"model": model_dtype, "bf16": torch.bfloat16, "fp8": torch.uint8}[self.keys_values]


UNCHANGED = CacheFormats()
"""Nothing is rounded."""


def store_values(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return keys or values as they are stored."""
    if dtype != torch.uint8:
        return values.to(dtype)
    clipped = values.float().clamp(-FP8_LARGEST, FP8_LARGEST)
    return clipped.to(torch.float8_e4m3fn).view(torch.uint8)


def load_values(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Return stored keys or values in the dtype of the model."""
    if stored.dtype == torch.uint8:
        stored = stored.contiguous().view(torch.float8_e4m3fn)
    return stored.to(dtype)


def round_by_chance(
    values: Float[Tensor, "B *rest"], seed: int, steps: Int[Tensor, " B"]
) -> Float[Tensor, "B *rest"]:
    """Round to float16, up or down so that the mean is the value; infinities become the largest.

    The choice depends on the seed, the row's step and the place in the row alone.
    """
    values = values.float().clamp(-FP16_LARGEST, FP16_LARGEST)
    places = torch.arange(values[0].numel(), device=values.device).expand(values.shape[0], -1)
    bits = philox(places, steps[:, None].expand_as(places), seed, ROUNDS)[0].view_as(values)
    is_normal = values.abs() >= FP16_SMALLEST_NORMAL
    raised = values.view(torch.int32) + (bits & ((1 << DROPPED_BITS) - 1)).int()
    normal = (raised & -(1 << DROPPED_BITS)).view(torch.float32)
    shift = (bits >> 8).float() * 2.0**-24  # [0, 1)
    tiny = (values / FP16_SMALLEST + shift).floor() * FP16_SMALLEST
    return torch.where(is_normal, normal, tiny).to(torch.float16)


def philox(
    first: Int[Tensor, "*shape"], second: Int[Tensor, "*shape"], key: int, rounds: int = 10
) -> tuple[Int[Tensor, "*shape"], Int[Tensor, "*shape"]]:
    """Return Philox-2x32 of each counter: two numbers of 32 bits, in int64.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    mask = 0xFFFFFFFF
    for _ in range(rounds):
        product = first * 0xD256D193  # overflows into the sign, of which the mask keeps the bits
        first, second = ((product >> 32) & mask) ^ key ^ second, product & mask
        key = (key + 0x9E3779B9) & mask
    return first, second
