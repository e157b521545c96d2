"""A checkpoint whose tensors were changed, with an index and hashes that agree with them."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from nemotron.checkpoint.find import locate
from nemotron.checkpoint.index import NAMES, Index, SavedPiece, SavedTensor
from nemotron.checkpoint.manifest import FORMAT, INDEX
from nemotron.checkpoint.read import SavedTensors
from nemotron.checkpoint.tensor_file import write_tensor_file
from tests.support.old_checkpoint import seal

FILE = "rank-00000.safetensors"


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Let `change` change the tensors of the newest checkpoint of a run."""
    info = locate(path).info
    assert info is not None
    saved = SavedTensors(info)
    tensors = saved.empty()
    saved.load(tensors)
    change(tensors)
    write_tensor_file(info.folder / FILE, tensors)
    index = Index(tensors={name: _entry(tensor) for name, tensor in tensors.items()})
    (info.folder / INDEX).write_text(index.dump())
    seal(info.folder, info.step, FORMAT)


def _entry(tensor: Tensor) -> SavedTensor:
    shape = tuple(tensor.shape)
    piece = SavedPiece(file=FILE, offsets=(0,) * tensor.ndim, shape=shape)
    return SavedTensor(dtype=NAMES[tensor.dtype], shape=shape, pieces=(piece,))
