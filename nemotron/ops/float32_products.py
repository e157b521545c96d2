"""Products of bfloat16 on CPUs that have no instructions for it: in float32, rounded once.

A product of two bfloat16 numbers is exact in float32, and sums are taken in float32 by any unit for
bfloat16 too. torch's own products of bfloat16 take five times as long there.
"""

from collections.abc import Callable
from typing import Any

import torch

from nemotron.device import cpu_multiplies_bfloat16
from nemotron.ops.registry import Backend


def backend(function: Callable[..., Any], features: frozenset[str] = frozenset()) -> Backend:
    """Return the backend `float32_products` of an operation, which other CPUs use by name."""
    return Backend(
        "float32_products",
        function,
        devices=frozenset({"cpu"}),
        dtypes=frozenset({torch.bfloat16}),
        features=features,
        by_name=cpu_multiplies_bfloat16(),
    )
