"""Blocks of a matrix that share a scale: cut out with zeros around them, and put together again."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor


def block_amax(x: Float[Tensor, "M K"], height: int, width: int) -> Float[Tensor, "rows columns"]:
    """Return the largest magnitude in float32 of each block of `height` rows and `width` columns.

    The last blocks may be partial.
    """
    # magnitudes are in the order of their bits, of which integers find the largest much faster
    bits = x.float().contiguous().view(torch.int32) & 0x7FFFFFFF
    below, beside = -x.shape[0] % height, -x.shape[1] % width
    if below or beside:
        bits = F.pad(bits, (0, beside, 0, below))
    if height > 1:
        bits = bits.view(bits.shape[0] // height, height, bits.shape[1]).amax(1)
    if width > 1:
        bits = bits.view(bits.shape[0], bits.shape[1] // width, width).amax(2)
    return bits.view(torch.float32)


def scale_blocks(
    x: Float[Tensor, "M K"], scales: Float[Tensor, "rows columns"], height: int, width: int
) -> Float[Tensor, "M K"]:
    """Multiply every element of a matrix by the value of its block."""
    if x.shape != (scales.shape[0] * height, scales.shape[1] * width):
        return x * spread(scales, height, width, (x.shape[0], x.shape[1]))
    blocks = x.view(scales.shape[0], height, scales.shape[1], width)
    return (blocks * scales[:, None, :, None]).view(x.shape)


def spread(
    scales: Shaped[Tensor, "rows columns"], height: int, width: int, shape: tuple[int, int]
) -> Shaped[Tensor, "M K"]:
    """Give every element of a matrix of this shape the value of its block."""
    wide = scales.repeat_interleave(width, 1) if width > 1 else scales
    tall = wide.repeat_interleave(height, 0) if height > 1 else wide
    return tall[: shape[0], : shape[1]]
