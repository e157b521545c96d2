"""Reads the old checkpoint layout, whose index and tensors are pickles, without unpickling.

The opcodes of a pickle are followed by a machine that knows no function and no class: a name stays
a pair of texts, a call stays a record of its name and arguments. What it prints is plain JSON.

This file runs by its path in an isolated interpreter that sees the standard library alone:

    python -I -S pickled.py FOLDER
"""

import io
import json
import pickletools
import resource
import struct
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAX_INDEX_BYTES = 1 << 28
MAX_TENSOR_RECORD = 1 << 16
MAX_MEMORY = 8 << 30
MAX_CPU_S = 900

METADATA = "torch.distributed.checkpoint.metadata"
CLASSES = {
    *((METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((METADATA, name) for name in ("ChunkStorageMetadata", "TensorStorageMetadata")),
    (METADATA, "TensorProperties"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}
"""Classes of which an index holds instances with a state."""

CALLED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    (METADATA, "_MEM_FORMAT_ENCODING"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("collections", "OrderedDict"),
    ("builtins", "getattr"),
}
"""Names whose calls are recorded."""
GETATTR, ENCODING = ("builtins", "getattr"), (METADATA, "_MEM_FORMAT_ENCODING")
"""Some releases of Python 3.11 write a member of an enumeration as its name in the class."""


class Refused(Exception):
    """Says in one clause why a file is not read."""


@dataclass(frozen=True)
class Name:
    """A class or function, of which only the name is known."""

    module: str
    name: str

    @property
    def key(self) -> tuple[str, str]:
        """Module and name."""
        return self.module, self.name


@dataclass
class Call:
    """A name with what it would be called with, and the state that it would get."""

    name: Name
    arguments: tuple[Any, ...]  # Any: whatever the pickle holds
    state: Any = None


class Pairs(list):
    """The items of a dictionary; keys need no hash."""


MARK = object()


class Machine:
    """The stack on which the opcodes of one pickle work."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:  # Any: plain values, Name and Call
        """Follow the opcodes to the end; returns what they build.

        Raises:
            Refused: at an opcode or name that no checkpoint needs.
        """
        try:
            for opcode, argument, _ in pickletools.genops(content):
                if opcode.name == "STOP":
                    return self.stack.pop()
                self.follow(opcode.name, argument)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            raise Refused(f"is not a pickle of a checkpoint: {error}") from None
        raise Refused("is not a pickle of a checkpoint: it has no end")

    def follow(self, opcode: str, argument: Any) -> None:
        """Do what one opcode says."""
        stack = self.stack
        if opcode in ("PROTO", "FRAME"):
            return
        if opcode in VALUES:
            stack.append(argument)
        elif opcode in CONSTANTS:
            stack.append(CONSTANTS[opcode])
        elif opcode in EMPTY:
            stack.append(EMPTY[opcode]())
        elif opcode in TUPLES:
            parts = self.since_mark() if opcode == "TUPLE" else self.pop(TUPLES[opcode])
            stack.append(tuple(parts))
        elif opcode == "MARK":
            stack.append(MARK)
        elif opcode == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif opcode in ("APPEND", "APPENDS"):
            items = self.since_mark() if opcode == "APPENDS" else self.pop(1)
            self.top(list).extend(items)
        elif opcode in ("SETITEM", "SETITEMS"):
            items = self.since_mark() if opcode == "SETITEMS" else self.pop(2)
            self.top(Pairs).extend(zip(items[::2], items[1::2], strict=True))
        else:
            self.build(opcode, argument)

    def build(self, opcode: str, argument: Any) -> None:
        """Do what an opcode says that would import, call or change something."""
        if opcode == "GLOBAL":
            self.stack.append(allowed(*argument.split(" ", 1)))
        elif opcode == "STACK_GLOBAL":
            self.stack.append(allowed(*self.pop(2)))
        elif opcode == "BINPERSID":
            self.stack.append(Call(Name("", "persistent"), self.stack.pop()))
        elif opcode in ("NEWOBJ", "REDUCE"):
            name, arguments = self.pop(2)
            if not isinstance(name, Name) or name.key not in (
                CLASSES if opcode == "NEWOBJ" else CALLED
            ):
                raise Refused(f"calls {name}, which no checkpoint needs")
            if name.key == GETATTR and arguments[0] != Name(*ENCODING):
                raise Refused("looks up an attribute, which no checkpoint needs")
            self.stack.append(Call(name, tuple(arguments)))
        elif opcode == "BUILD":
            state = self.stack.pop()
            target = self.top(Call)
            if target.name.key not in CLASSES or target.state is not None:
                raise Refused(f"changes {target.name}, which no checkpoint needs")
            target.state = state
        else:
            raise Refused(f"has the opcode {opcode}, which no checkpoint needs")

    def top(self, kind: type) -> Any:
        """Return the last value, which must be of a type."""
        value = self.stack[-1]
        if type(value) is not kind:
            raise Refused(f"changes {type(value).__name__} as if it were {kind.__name__}")
        return value

    def pop(self, number: int) -> list[Any]:
        """Take the last values."""
        if len(self.stack) < number:
            raise Refused("is cut short")
        values = self.stack[-number:]
        del self.stack[-number:]
        return values

    def since_mark(self) -> list[Any]:
        """Take the values after the last mark."""
        at = max(i for i, value in enumerate(self.stack) if value is MARK)
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values


VALUES = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": Pairs}
TUPLES = {"TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

DTYPES = {"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64"}
DTYPES |= {"int32", "int16", "int8", "uint8", "bool"}
KINDS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")


def allowed(module: object, name: object) -> Name:
    """Return a name that a checkpoint needs."""
    found = Name(str(module)[:200], str(name)[:200])
    is_torch = module == "torch" and name in {*DTYPES, *(f"{kind}Storage" for kind in KINDS)}
    if (
        found.key in CLASSES | CALLED
        or is_torch
        or found.key == ("torch.storage", "UntypedStorage")
    ):
        return found
    raise Refused(f"names {found.module}.{found.name}, which no checkpoint needs")


def fields(value: Any, name: str) -> dict[str, Any]:
    """Return the state of an instance of a class as a dictionary."""
    if not isinstance(value, Call) or value.name.name != name or type(value.state) is not Pairs:
        raise Refused(f"holds no {name} where one belongs")
    return dict(value.state)


def size(value: Any) -> list[int]:
    """Return a shape as a list."""
    if isinstance(value, Call) and value.name.key == ("torch", "Size"):
        [value] = value.arguments
    if not isinstance(value, tuple) or not all(type(n) is int and n >= 0 for n in value):
        raise Refused("holds no shape where one belongs")
    return list(value)


def read_folder(folder: Path) -> dict[str, Any]:
    """Return dtype, shape and pieces of every tensor, and where their bytes lie."""
    path = folder / ".metadata"
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise Refused("is larger than any index")
    index = fields(Machine().run(path.read_bytes()), "Metadata")
    tensors = {str(name): describe(entry) for name, entry in index["state_dict_metadata"]}
    sizes = {
        (name, tuple(at)): shape for name in tensors for at, shape in tensors[name].pop("chunks")
    }
    for key, stored in index["storage_data"]:
        place, region = fields(key, "MetadataIndex"), fields(stored, "_StorageInfo")
        name, at = str(place["fqn"]), size(place["offset"])
        piece = read_piece(folder, region)
        if piece["shape"] != sizes.pop((name, tuple(at)), None):
            raise Refused(f"describes another piece of {name[:80]!r} than its file holds")
        tensors[name]["pieces"].append(piece | {"offsets": at})
    return {"tensors": tensors}


def describe(entry: Any) -> dict[str, Any]:
    """Return what the index says of a tensor."""
    values = fields(entry, "TensorStorageMetadata")
    properties = values["properties"]
    state = properties.state if isinstance(properties, Call) else None
    if not isinstance(state, tuple) or not state or not isinstance(state[0], Name):
        raise Refused("holds a tensor without a dtype")
    chunks = [fields(chunk, "ChunkStorageMetadata") for chunk in values["chunks"]]
    return {
        "dtype": state[0].name,
        "shape": size(values["size"]),
        "chunks": [(size(chunk["offsets"]), size(chunk["sizes"])) for chunk in chunks],
        "pieces": [],
    }


class Region(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + {0: 0, 1: self._at, 2: self._length}[whence])
        return self._at

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        count = left if count is None or count < 0 else min(count, left)
        self._file.seek(self._start + self._at)
        found = self._file.read(count)
        self._at += len(found)
        return found


def read_piece(folder: Path, region: dict[str, Any]) -> dict[str, Any]:
    """Return shape, strides and place of the bytes of a tensor in a file, which holds an archive.

    Source: pytorch/pytorch: docs/source/notes/serialization.md, "Serialized file format".
    """
    name, start, length = region["relative_path"], region["offset"], region["length"]
    if region.get("transform_descriptors") or type(start) is not int or type(length) is not int:
        raise Refused("holds a tensor that was transformed")
    if not isinstance(name, str) or name != Path(name).name or start < 0 or length < 0:
        raise Refused(f"points to {str(name)[:80]!r}, which is not a file beside it")
    with open(folder / name, "rb") as file, zipfile.ZipFile(Region(file, start, length)) as archive:
        members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
        if archive.read(members["byteorder"]) != b"little" or "data/1" in members:
            raise Refused(f"{name} holds an unknown kind of tensor")
        record, data = members["data.pkl"], members["data/0"]
        if record.file_size > MAX_TENSOR_RECORD or record.compress_type or data.compress_type:
            raise Refused(f"{name} holds an unknown kind of tensor")
        rebuilt = Machine().run(archive.read(record))
        head = Region(file, start + data.header_offset, 30).read()
        name_length, extra_length = struct.unpack("<HH", head[26:30])
    if not isinstance(rebuilt, Call) or not rebuilt.name.name.startswith("_rebuild_tensor"):
        raise Refused(f"{name} holds no tensor where one belongs")
    _, first, shape, strides = rebuilt.arguments[:4]
    return {
        "file": name,
        "start": start + data.header_offset + 30 + name_length + extra_length,
        "num_bytes": data.file_size,
        "first": first,
        "shape": size(shape),
        "strides": size(strides),
    }


def main(folder: Path) -> int:
    """Print the layout of a checkpoint as JSON; returns 0, or 3 when it is refused."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
    try:
        print(json.dumps(read_folder(folder)))
    except Refused as problem:
        print(f".metadata {problem}", file=sys.stderr)
        return 3
    except (
        KeyError,
        ValueError,
        TypeError,
        MemoryError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        print(f".metadata is not an index of tensors: {error!r}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
