"""Reading the index of torch's distributed checkpoints without running what it may contain.

torch writes the index as a pickle and reads it back with a plain `pickle.load`, which executes
whatever the file says. Here only the dozen types that such an index is made of can be built.
"""

import pathlib
import pickle
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import FileSystemReader, filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from nemotron.checkpoint.manifest import CheckpointInfo, DamagedCheckpoint

ALLOWED: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): pathlib.PosixPath,
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
} | {
    (metadata.__name__, name): getattr(metadata, name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "ChunkStorageMetadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    )
}
"""Everything that an index may name, besides the dtypes of torch."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise DamagedCheckpoint(
            f".metadata names {module}.{name}, which no checkpoint needs; nothing was executed"
        )


def read_index(file: BinaryIO) -> Metadata:
    """Read the index of a checkpoint.

    Raises:
        DamagedCheckpoint: when it is no index, or names anything outside `ALLOWED`.
    """
    try:
        index = _IndexUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(f".metadata is not an index of tensors: {error}") from None
    if not isinstance(index, Metadata):
        raise DamagedCheckpoint(".metadata is not an index of tensors")
    return index


class SafeReader(FileSystemReader):
    """torch's file reader with the safe index, confined to the files of the manifest."""

    def __init__(self, info: CheckpointInfo) -> None:
        super().__init__(info.folder)
        self._info = info

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index; called by torch."""
        with open(self._info.folder / ".metadata", "rb") as file:
            index = read_index(file)
        for storage in index.storage_data.values():
            if storage.relative_path not in self._info.files:
                raise DamagedCheckpoint(
                    f".metadata points to {storage.relative_path!r}, "
                    f"which the manifest does not list"
                )
        if index.storage_meta is None:
            index.storage_meta = StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index
