"""Megatron's token shards: `PREFIX.bin` holds the ids, `PREFIX.idx` says where documents lie.

`.bin`: ids only, little-endian, documents back to back. `.idx`, little-endian: 9 bytes of magic,
uint64 version, uint8 code of the id type, uint64 number of sequences S, uint64 length D of the
document index, int32 lengths [S] in tokens, int64 offsets [S] in bytes, int64 document index [D]
(0, then the number of sequences up to the end of each document), and int8 modes [S] in files of
several modalities.

Source: NVIDIA/Megatron-LM: megatron/core/datasets/indexed_dataset.py.
"""

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from nemotron.errors import UserError
from nemotron.files import sync, sync_folder

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
VERSION = 1
CODES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Id types; the codes 6 and 7 are floating point and hold no ids."""
LONGEST_DOCUMENT = 2**31 - 1
"""Tokens; the index holds lengths as int32."""
CHECKED_AT_ONCE = 1 << 20
"""Sequences whose offsets are checked together, so that an index never has to fit in memory."""


def id_type(vocab_size: int) -> np.dtype:
    """Return the type in which Megatron stores ids of a vocabulary of this size."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class Shard:
    """A shard mapped into memory; opening it reads and checks the index only."""

    def __init__(self, prefix: str | Path) -> None:
        """Map the two files.

        Raises:
            UserError: when one is missing, is no shard, is cut off or does not fit the other.
        """
        self.prefix = Path(prefix).absolute()
        self.bin = Path(f"{self.prefix}.bin")
        self.idx = Path(f"{self.prefix}.idx")
        self._opened = self._identities()
        code, num_sequences, num_entries = self._read_header()
        self.dtype = np.dtype(CODES[code])
        at = HEADER.size
        self.lengths = self._index("<i4", at, num_sequences)
        self.offsets = self._index("<i8", at + 4 * num_sequences, num_sequences)
        self.documents = self._index("<i8", at + 12 * num_sequences, num_entries)
        self._check_index()
        self.num_documents = num_entries - 1
        self.num_tokens = self._opened[self.bin][0] // self.dtype.itemsize
        self.tokens: NDArray[np.integer] = (
            np.memmap(self.bin, self.dtype, "r", shape=(self.num_tokens,))
            if self.num_tokens
            else np.empty(0, self.dtype)
        )

    def starts(self, documents: slice | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the position in `tokens` at which each document, or its successor, begins."""
        sequences = np.asarray(self.documents[documents])
        starts = np.full(sequences.shape, self.num_tokens, np.int64)
        inner = sequences < len(self.offsets)
        starts[inner] = self.offsets[sequences[inner]] // self.dtype.itemsize
        return starts

    def document(self, number: int) -> NDArray[np.integer]:
        """Return the tokens of one document as a view of the file."""
        start, stop = self.starts(slice(number, number + 2)).tolist()
        return self.tokens[start:stop]

    def check_unchanged(self) -> None:
        """Check that both files are still those that were opened.

        Raises:
            UserError: when one was replaced, changed or removed.
        """
        now = self._identities()
        for path, opened in self._opened.items():
            if now[path] != opened:
                raise UserError(
                    f"{path} was changed while it was in use ({opened[0]} bytes when opened, "
                    f"{now[path][0]} now); put the old file back and resume."
                )

    def _identities(self) -> dict[Path, tuple[int, int, int]]:
        """Return size in bytes, time of change and inode of both files."""
        found = {}
        for path, other in ((self.bin, self.idx), (self.idx, self.bin)):
            try:
                status = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                beside = f"though {other.name} does" if other.exists() else f"nor does {other.name}"
                raise UserError(
                    f"{path} does not exist, {beside}; "
                    "give the path of a shard without its .bin or .idx ending."
                ) from None
            found[path] = (status.st_size, status.st_mtime_ns, status.st_ino)
        return found

    def _read_header(self) -> tuple[int, int, int]:
        """Return id type code, number of sequences and length of the document index."""
        size = self._opened[self.idx][0]
        with open(self.idx, "rb") as file:
            header = file.read(HEADER.size)
        if not header.startswith(MAGIC[: len(header)]) or not header:
            raise UserError(f"{self.idx} is no shard index: it does not begin with MMIDIDX.")
        if len(header) < HEADER.size:
            raise UserError(
                f"{self.idx} is cut off: it has {size} bytes, its header alone {HEADER.size}."
            )
        _, version, code, num_sequences, num_entries = HEADER.unpack(header)
        if version != VERSION:
            raise UserError(f"{self.idx} has version {version}; only version {VERSION} is known.")
        if code not in CODES:
            raise UserError(
                f"{self.idx} has id type code {code}; "
                f"the codes of token ids are {', '.join(map(str, CODES))}."
            )
        if num_entries < 1:
            raise UserError(f"{self.idx} has an empty document index; its first entry must be 0.")
        expected = HEADER.size + 12 * num_sequences + 8 * num_entries
        if size not in (expected, expected + num_sequences):
            raise UserError(
                f"{self.idx} has {size} bytes; with {num_sequences} sequences and "
                f"{num_entries - 1} documents it must have {expected}."
            )
        return code, num_sequences, num_entries

    def _index(self, dtype: DTypeLike, offset: int, length: int) -> NDArray[np.integer]:
        if not length:
            return np.empty(0, dtype)
        return np.memmap(self.idx, dtype, "r", offset, (length,))

    def _check_index(self) -> None:
        """Check that sequences lie back to back, fill the .bin and are shared out to documents."""
        itemsize = self.dtype.itemsize
        end = 0
        for first in range(0, len(self.lengths), CHECKED_AT_ONCE):
            lengths = self.lengths[first : first + CHECKED_AT_ONCE].astype(np.int64)
            ends = end + np.cumsum(lengths) * itemsize
            wrong = self.offsets[first : first + CHECKED_AT_ONCE] != ends - lengths * itemsize
            wrong |= lengths < 0
            if wrong.any():
                i = int(wrong.argmax())
                raise UserError(
                    f"{self.idx} is damaged: sequence {first + i} with {lengths[i]} tokens starts "
                    f"at byte {self.offsets[first + i]} of the .bin, "
                    f"where byte {ends[i] - lengths[i] * itemsize} is due."
                )
            end = int(ends[-1])
        if (size := self._opened[self.bin][0]) != end:
            raise UserError(f"{self.bin} has {size} bytes; {self.idx.name} says {end}.")
        if self.documents[0] != 0 or self.documents[-1] != len(self.lengths):
            raise UserError(
                f"{self.idx} is damaged: its documents span the sequences {self.documents[0]} to "
                f"{self.documents[-1]}, but there are 0 to {len(self.lengths)}."
            )
        for first in range(0, len(self.documents) - 1, CHECKED_AT_ONCE):
            falls = np.diff(self.documents[first : first + CHECKED_AT_ONCE + 1]) < 0
            if falls.any():
                number = first + int(falls.argmax())
                raise UserError(f"{self.idx} is damaged: document {number} ends before it starts.")


class ShardWriter:
    """Writes a shard, one sequence a document; the two files appear when all is written.

    Used as a context manager; when the block raises, nothing is left behind.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike) -> None:
        """Open temporary files beside the prefix."""
        self.prefix = Path(prefix).absolute()
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.lengths: list[int] = []
        self._code = {np.dtype(name): code for code, name in CODES.items()}[self.dtype]
        self._parts = [Path(f"{self.prefix}.{end}.{os.getpid()}.tmp") for end in ("bin", "idx")]
        self._bin = open(self._parts[0], "wb")  # noqa: SIM115 - closed in __exit__

    def add(self, tokens: ArrayLike) -> None:
        """Append a document.

        Raises:
            OverflowError: when an id does not fit the type, or the length the index.
        """
        tokens = np.asarray(tokens)
        if len(tokens) > LONGEST_DOCUMENT:
            raise OverflowError(f"a document of {len(tokens)} tokens does not fit the index")
        stored = tokens.astype(self.dtype)
        if not np.array_equal(stored, tokens):
            raise OverflowError(f"ids up to {tokens.max()} do not fit {self.dtype}")
        self._bin.write(stored.tobytes())
        self.lengths.append(len(stored))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                sync(self._bin)
                with open(self._parts[1], "wb") as file:
                    self._write_index(file)
                    sync(file)
                for part, end in zip(self._parts, ("bin", "idx"), strict=True):
                    os.replace(part, f"{self.prefix}.{end}")
                sync_folder(self.prefix.parent)
        finally:
            self._bin.close()
            for part in self._parts:
                part.unlink(missing_ok=True)

    def _write_index(self, file: BinaryIO) -> None:
        count = len(self.lengths)
        lengths = np.asarray(self.lengths, np.int64)
        ends = np.cumsum(lengths) * self.dtype.itemsize
        file.write(HEADER.pack(MAGIC, VERSION, self._code, count, count + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write((ends - lengths * self.dtype.itemsize).astype("<i8").tobytes())
        file.write(np.arange(count + 1, dtype="<i8").tobytes())
