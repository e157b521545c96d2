"""A tensor of which this process holds some rectangles."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

Offsets = tuple[int, ...]


class Pieces(torch.Tensor):
    """The whole tensor's shape and dtype, with views of the rectangles that are here.

    It computes nothing. A `DTensor` says by its mesh which one rectangle a rank holds; a rank of a
    tensor-parallel Mamba layer holds several, and the whole has the same name and shape in every
    layout.
    """

    pieces: dict[Offsets, Tensor]

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, pieces: dict[Offsets, Tensor]
    ) -> "Pieces":
        """Make one of views by the place of their first element in the whole."""
        whole = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype)
        whole.pieces = pieces
        return whole

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> NoReturn:
        raise AssertionError(f"{function} on a tensor of which only pieces are here")

    def replaced(self, pieces: dict[Offsets, Tensor]) -> "Pieces":
        """Return the same whole around other views."""
        return Pieces(self.shape, self.dtype, pieces)


def pieces_of(tensor: Tensor) -> dict[Offsets, Tensor]:
    """Return what is here of a tensor, by place; of an ordinary one that is all of it."""
    found = tensor.pieces if isinstance(tensor, Pieces) else {(0,) * tensor.ndim: tensor}
    return {offsets: piece for offsets, piece in found.items() if piece.numel()}
