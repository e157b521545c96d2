"""Folders of safetensors files: written shard by shard, read once every header was checked."""

import os
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemotron.errors import UserError
from nemotron.files import parse_json, sync, write_json
from nemotron.hf.inside import inside, read_inside
from nemotron.hf.names import DiskParameter

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

HEADER_LIMIT = 100_000_000
"""Longest header that the format allows, in bytes."""

LONGEST_NAME = 255
"""Bytes of a file's name that file systems take."""

NOT_SAFETENSORS = {
    b"<": "is an HTML page; the download failed",
    b"version https://git-lfs": "is a Git LFS pointer; fetch the file itself with git lfs pull",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a folder; `dtype` is the format's own name, such as BF16."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def write_shards(
    folder: Path,
    parameters: Sequence[DiskParameter],
    read: Callable[[DiskParameter], dict[str, Tensor]],
    max_shard_bytes: int,
) -> int:
    """Write the parameters as numbered shards with an index; returns their size in bytes.

    `read` gives the tensors of one parameter at a time, so that no more than one shard is in
    memory.
    """
    shards = _plan(parameters, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        content = {key: tensor for parameter in shard for key, tensor in read(parameter).items()}
        weight_map |= dict.fromkeys(content, name)
        write_tensors(folder / name, content)
    total = sum(parameter.num_bytes for parameter in parameters)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)
    return total


def write_tensors(path: Path, content: dict[str, Tensor]) -> None:
    """Write one file of tensors, and put it onto the disk.

    Raises:
        OSError: as other writing does, when the disk does not take it.
    """
    try:
        save_file(content, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from None
    # safetensors makes the file private; give it the rights that open() would have given
    path.chmod(path.parent.stat().st_mode & 0o666)
    with open(path, "rb") as file:
        sync(file)


def _plan(parameters: Sequence[DiskParameter], max_shard_bytes: int) -> list[list[DiskParameter]]:
    """Cut the list into shards; the tensors of a parameter lie in one.

    A parameter that is larger than a shard gets one of its own.
    """
    shards: list[list[DiskParameter]] = []
    size = 0
    for parameter in parameters:
        if not shards or size + parameter.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(parameter)
        size += parameter.num_bytes
    return shards


class ShardedFolder:
    """The safetensors files of a folder, opened by memory map.

    Raises:
        UserError: when a file is missing, cut short, no safetensors, or lies outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.total_size: int | None = None
        weight_map = self._read_index()
        self.tensors: dict[str, StoredTensor] = {}
        for name in dict.fromkeys(weight_map.values()) if weight_map else [SINGLE]:
            for key, stored in _read_header(_inside(folder, name)).items():
                if key in self.tensors:
                    rule = f"is in {self.tensors[key].file} and {name}."
                    raise UserError(rule, key=key, where=str(folder))
                self.tensors[key] = stored
        for key, name in weight_map.items():
            if key not in self.tensors or self.tensors[key].file != name:
                rule = f"is not in {name}, where it should be."
                raise UserError(rule, key=key, where=str(folder / INDEX))
        self._files = {
            name: _open(folder / name) for name in {stored.file for stored in self.tensors.values()}
        }

    def read(self, name: str) -> Tensor:
        """Return a tensor in its stored shape and dtype.

        Raises:
            UserError: when the file cannot be read.
        """
        try:
            return self._files[self.tensors[name].file].get_tensor(name)
        except SafetensorError as error:
            file = self.folder / self.tensors[name].file
            raise UserError(f"cannot be read: {error}.", key=name, where=str(file)) from None

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX
        if not path.exists():
            if not (self.folder / SINGLE).exists():
                raise UserError(f"holds neither {INDEX} nor {SINGLE}.", where=str(self.folder))
            return {}
        index = read_json(path)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(
                "has no weight_map; it is not an index of safetensors files.", where=str(path)
            )
        for key, name in weight_map.items():
            if not isinstance(name, str):
                raise UserError(
                    f"weight_map.{key} = {name!r} is not a plain file name.", where=str(path)
                )
        metadata = index.get("metadata")
        if isinstance(metadata, dict):
            self.total_size = metadata.get("total_size")
        return weight_map


def read_json(path: Path) -> dict:
    """Return the JSON object in a file.

    Raises:
        UserError: when there is none.
    """
    try:
        content = parse_json(read_inside(path))
    except FileNotFoundError:
        raise UserError(
            "does not exist; give a folder in Hugging Face's layout.", where=str(path)
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"is not valid JSON: {error}; download it again.", where=str(path)
        ) from None
    if not isinstance(content, dict):
        raise UserError("is not a JSON object.", where=str(path))
    return content


def _inside(folder: Path, name: object) -> Path:
    """Return the file of that name.

    Raises:
        UserError: when it is missing, or not a regular file of the folder.
    """
    if not isinstance(name, str) or not _is_plain(name) or name in ("", ".", ".."):
        raise UserError(
            f"{str(name)[:80]!r} is not a plain file name inside the folder.",
            where=str(folder / INDEX),
        )
    try:
        return inside(folder / name)
    except FileNotFoundError:
        raise UserError("is missing; the index names it.", where=str(folder / name)) from None


def _is_plain(name: str) -> bool:
    return name == Path(name).name and "\0" not in name and len(name.encode()) <= LONGEST_NAME


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(f"is not a safetensors file: {error}.", where=str(path)) from None


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Read and check the header of a safetensors file against the file's size."""
    size = path.stat().st_size
    if size == 0:
        raise UserError("is empty; download it again.", where=str(path))
    with open(path, "rb") as file:
        start = file.read(8)
        beginning = start + file.read(24)
        for mark, meaning in NOT_SAFETENSORS.items():
            if beginning.lstrip().startswith(mark):
                raise UserError(f"{meaning}.", where=str(path))
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else HEADER_LIMIT
        if length >= HEADER_LIMIT:
            raise UserError(f"is not a safetensors file: it has {size} bytes.", where=str(path))
        if size < 8 + length:
            raise UserError(
                f"is truncated: {size} bytes, the header alone is {8 + length}; download it again.",
                where=str(path),
            )
        file.seek(8)
        header = file.read(length)
    try:
        entries = parse_json(header)
        entries.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        tensors = {
            name: StoredTensor(path.name, entry["dtype"], tuple(entry["shape"]))
            for name, entry in entries.items()
        }
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        raise UserError(
            "is not a safetensors file: its header is damaged; download it again.", where=str(path)
        ) from None
    if size != end:
        raise UserError(
            f"is truncated: {size} bytes instead of {end}; download it again.", where=str(path)
        )
    return tensors
