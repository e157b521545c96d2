"""Put a built model into the recipe's number format."""

import torch
from torch import nn

from nemotron.precision.config import PrecisionConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def apply(model: nn.Module, config: PrecisionConfig) -> None:
    """Set the dtype of activations and matrix products; parameters stay float32 masters.

    Norm weights, decay, time step and router compute in float32 whatever is chosen here.
    """
    model.compute_dtype = DTYPES[config.compute]  # type: ignore[assignment]
