"""Inputs of a causal convolution."""

import torch
from torch import Tensor


def draw(rows: int, length: int, channels: int = 10, width: int = 4) -> list[Tensor | None]:
    """Return the input [B, T, C], the kernel [C, W], the bias [C] and the state [B, W-1, C]."""
    g = torch.Generator().manual_seed(length)
    return [
        torch.randn(rows, length, channels, generator=g),
        torch.randn(channels, width, generator=g),
        torch.randn(channels, generator=g),
        torch.randn(rows, width - 1, channels, generator=g),
    ]


def documents(rows: int, length: int) -> Tensor:
    """Return the number of each token's document [B, T]; one token in five begins a document."""
    g = torch.Generator().manual_seed(length + 1)
    return (torch.rand(rows, length, generator=g) < 0.2).int().cumsum(1).int()
