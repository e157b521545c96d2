"""Writing a safetensors file piece by piece: no more than one is copied, and each is hashed."""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from nemotron.checkpoint.index import NAMES
from nemotron.checkpoint.manifest import FileEntry
from nemotron.files import sync


def write_tensor_file(
    path: Path, tensors: Mapping[str, Tensor], read: Callable[[str], Tensor] | None = None
) -> FileEntry:
    """Write tensors of any device and stride; returns size and hash of the file.

    `read` gives the content of those that have no memory of their own, by their names, when its
    turn to be written has come.

    The library's own writer needs contiguous copies of all of them at once, and a second pass over
    the file for the hash.

    Source: huggingface/safetensors: README.md, "Format".
    """
    # large elements first, so that each tensor begins at a multiple of its element's size
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    contents = (tensor if read is None else read(name) for name, tensor in ordered)
    digest, size = xxhash.xxh128(), 0
    with open(path, "wb") as file:
        for block in itertools.chain([_header(ordered)], map(_bytes, contents)):
            file.write(block)
            digest.update(block)
            size += len(block)
        sync(file)
    return FileEntry(bytes=size, xxh128=digest.hexdigest())


def _header(tensors: list[tuple[str, Tensor]]) -> memoryview:
    entries, start = {}, 0
    for key, tensor in tensors:
        end = start + tensor.numel() * tensor.element_size()
        entries[key] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(len(text).to_bytes(8, "little") + text)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
