"""A tensor of which this process holds some rectangles, as distributed checkpoints see it."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

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

    @property
    def num_local_bytes(self) -> int:
        """Size of what is here."""
        return sum(piece.numel() * piece.element_size() for piece in self.pieces.values())

    def replaced(self, pieces: dict[Offsets, Tensor]) -> "Pieces":
        """Return the same whole around other views."""
        return Pieces(self.shape, self.dtype, pieces)

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties(dtype=self.dtype),
                    size=self.shape,
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=piece.shape)
            for offsets, piece in self.pieces.items()
            if piece.numel()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None, index
        return self.pieces[tuple(index.offset)]
