"""Megatron's token shards: `PREFIX.bin` holds the ids, `PREFIX.idx` says where documents lie.

`.bin`: ids only, little-endian, documents back to back. `.idx`, little-endian: 9 bytes of magic,
uint64 version, uint8 code of the id type, uint64 number of sequences S, uint64 length D of the
document index, int32 lengths [S] in tokens, int64 offsets [S] in bytes, int64 document index [D]
(0, then the number of sequences up to the end of each document), and int8 modes [S] in files of
several modalities. Shards of conversations have a third file, ours alone: `PREFIX.loss` holds a
byte for each token, its role: 1 if it is learned, 2 if it belongs to a source that a model corrects
and is right, else 0. A document of a pair of answers is two conversations, the better one first;
the tokens of the second have 4 more.

Source: NVIDIA/Megatron-LM: megatron/core/datasets/indexed_dataset.py.
"""

import mmap
import os
import struct
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from nemotron.errors import UserError

LEARNED = 1
RIGHT = 2
"""Roles of tokens; all others are 0."""
REJECTED = 4
"""Added to the role of each token of the second conversation of a pair."""
ENDS_READ = 4096
"""Bytes at each end of a shard's files that, with the sizes, identify the shard."""
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
VERSION = 1
CODES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Id types; the codes 6 and 7 are floating point and hold no ids."""
MAPPED_AT_ONCE = 512
"""Files that stay mapped, of all shards together."""
Identity = tuple[int, int, int]
"""Size, time of change and inode of a file."""
CHECKED_AT_ONCE = 1 << 20
"""Sequences whose offsets are checked together, so that an index never has to fit in memory."""


class Shard:
    """A shard whose files are mapped into memory when they are first read.

    Opening it reads the header and the ends of the index, whatever its size; `check` reads the
    whole index.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Look at the two files.

        Raises:
            UserError: when one is missing, is not a shard, is cut off or does not fit the other.
        """
        self.prefix = Path(prefix).absolute()
        self.bin = Path(f"{self.prefix}.bin")
        self.idx = Path(f"{self.prefix}.idx")
        self.loss = Path(f"{self.prefix}.loss")
        self._opened = self._identities()
        with open(self.idx, "rb") as file:
            code, self.num_sequences, num_entries = self._read_header(file.read(HEADER.size))
            self._num_entries = num_entries
            self.num_documents = num_entries - 1
            self.dtype = np.dtype(CODES[code])
            self.num_tokens = self._opened[self.bin][0] // self.dtype.itemsize
            self._check_ends(file.fileno())

    @property
    def tokens(self) -> NDArray[np.integer]:
        """The ids of all documents, end to end, as a view of the file."""
        return _view(self.bin, self._opened[self.bin], self.dtype.str, 0, self.num_tokens)

    @property
    def is_supervised(self) -> bool:
        """Whether the shard says which of its tokens are learned."""
        return self.loss.exists()

    @property
    def roles(self) -> NDArray[np.integer]:
        """The role of each token, as a view of the file.

        Raises:
            UserError: when the file does not fit the tokens.
        """
        if (size := self.loss.stat().st_size) != self.num_tokens:
            raise UserError(
                f"has {size} bytes for {self.num_tokens} tokens; prepare the conversations again.",
                where=str(self.loss),
            )
        return _view(self.loss, self._opened[self.bin], "<u1", 0, self.num_tokens)

    @property
    def lengths(self) -> NDArray[np.integer]:
        """Tokens in each sequence."""
        return self._index("<i4", 0, self.num_sequences)

    @property
    def offsets(self) -> NDArray[np.integer]:
        """Byte of the `.bin` at which each sequence begins."""
        return self._index("<i8", 4 * self.num_sequences, self.num_sequences)

    @property
    def documents(self) -> NDArray[np.integer]:
        """0, then the number of sequences up to the end of each document."""
        return self._index("<i8", 12 * self.num_sequences, self._num_entries)

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
                    f"was changed while it was in use ({opened[0]} bytes when opened, "
                    f"{now[path][0]} now); restore the old file and resume.",
                    where=str(path),
                )

    def _identities(self) -> dict[Path, Identity]:
        """Return size in bytes, time of change and inode of both files."""
        found = {}
        for path, other in ((self.bin, self.idx), (self.idx, self.bin)):
            try:
                status = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                rule = f"does not exist, though {other.name} does; give both files of the shard."
                if not other.exists():
                    path, rule = (
                        self.prefix,
                        (
                            f"does not exist, nor does a shard of that name ({self.bin.name} and "
                            f"{self.idx.name}); give the path of text, of a folder, or of a shard "
                            "without its .bin or .idx ending."
                        ),
                    )
                raise UserError(rule, where=str(path)) from None
            found[path] = (status.st_size, status.st_mtime_ns, status.st_ino)
        return found

    def _read_header(self, header: bytes) -> tuple[int, int, int]:
        """Return id type code, number of sequences and length of the document index."""
        size = self._opened[self.idx][0]
        if not header.startswith(MAGIC[: len(header)]) or not header:
            raise UserError(
                "is not a shard index: it does not begin with MMIDIDX.", where=str(self.idx)
            )
        if len(header) < HEADER.size:
            raise UserError(
                f"is truncated: it has {size} bytes, but its header alone has {HEADER.size}.",
                where=str(self.idx),
            )
        _, version, code, num_sequences, num_entries = HEADER.unpack(header)
        if version != VERSION:
            raise UserError(
                f"has version {version}; only version {VERSION} is known.", where=str(self.idx)
            )
        if code not in CODES:
            raise UserError(
                f"has id type code {code}; "
                f"the codes of token ids are {', '.join(map(str, CODES))}.",
                where=str(self.idx),
            )
        if num_entries < 1:
            raise UserError(
                "has an empty document index; its first entry must be 0.", where=str(self.idx)
            )
        expected = HEADER.size + 12 * num_sequences + 8 * num_entries
        if size not in (expected, expected + num_sequences):
            raise UserError(
                f"has {size} bytes; with {num_sequences} sequences and "
                f"{num_entries - 1} documents it must have {expected}.",
                where=str(self.idx),
            )
        return code, num_sequences, num_entries

    def _index(self, dtype: str, offset: int, length: int) -> NDArray[np.integer]:
        return _view(self.idx, self._opened[self.idx], dtype, HEADER.size + offset, length)

    def _check_ends(self, index: int) -> None:
        """Check that the last sequence ends with the .bin and the last document with it."""
        count, at = self.num_sequences, HEADER.size
        end = 0
        if count:
            (length,) = struct.unpack("<i", os.pread(index, 4, at + 4 * (count - 1)))
            (offset,) = struct.unpack("<q", os.pread(index, 8, at + 4 * count + 8 * (count - 1)))
            end = offset + length * self.dtype.itemsize
        if (size := self._opened[self.bin][0]) != end:
            raise UserError(f"has {size} bytes; {self.idx.name} says {end}.", where=str(self.bin))
        at += 12 * count
        (first,) = struct.unpack("<q", os.pread(index, 8, at))
        (last,) = struct.unpack("<q", os.pread(index, 8, at + 8 * (self._num_entries - 1)))
        if first != 0 or last != count:
            raise UserError(
                f"is damaged: its documents span the sequences {first} to "
                f"{last}, but there are 0 to {count}.",
                where=str(self.idx),
            )

    def check(self) -> None:
        """Check that sequences lie back to back and are shared out to documents.

        Raises:
            UserError: when they do not, with the first sequence or document that is wrong.
        """
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
                    f"is damaged: sequence {first + i} with {lengths[i]} tokens starts "
                    f"at byte {self.offsets[first + i]} of the .bin, "
                    f"where byte {ends[i] - lengths[i] * itemsize} is expected.",
                    where=str(self.idx),
                )
            end = int(ends[-1])
        for first in range(0, len(self.documents) - 1, CHECKED_AT_ONCE):
            falls = np.diff(self.documents[first : first + CHECKED_AT_ONCE + 1]) < 0
            if falls.any():
                number = first + int(falls.argmax())
                raise UserError(
                    f"is damaged: document {number} ends before it starts.", where=str(self.idx)
                )


class Stream:
    """Shards end to end; positions count tokens from the first one on."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        """Take open shards; empty ones are left out.

        Raises:
            UserError: when some shards hold conversations and others do not.
        """
        self.shards = [shard for shard in shards if shard.num_tokens]
        self.ends = np.cumsum([0, *(shard.num_tokens for shard in self.shards)])[1:]
        self.num_tokens = int(self.ends[-1]) if self.shards else 0
        self.num_documents = sum(shard.num_documents for shard in self.shards)
        supervised = [shard.is_supervised for shard in self.shards]
        self.is_supervised = any(supervised)
        if self.is_supervised and not all(supervised):
            missing = self.shards[supervised.index(False)].loss
            raise UserError(
                "is missing, but other shards have theirs; prepare the data again.",
                where=str(missing),
            )

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Return `count` tokens from a position on, around the end if need be.

        Raises:
            UserError: when a shard was changed since it was opened.
        """
        found = np.empty(count, np.int64)
        for number, here, into in self._pieces(start, count):
            self.shards[number].check_unchanged()
            found[into] = self.shards[number].tokens[here]
        return found

    def read_learned(self, start: int, count: int) -> NDArray[np.bool_]:
        """Return for each of these tokens whether it is learned: all of them, but in chats."""
        return self.read_roles(start, count) == LEARNED

    def read_roles(self, start: int, count: int) -> NDArray[np.uint8]:
        """Return the role of each of these tokens: all are learned, but in chats."""
        found = np.full(count, LEARNED, np.uint8)
        if self.is_supervised:
            for number, here, into in self._pieces(start, count):
                found[into] = self.shards[number].roles[here]
        return found

    def _pieces(self, start: int, count: int) -> list[tuple[int, slice, slice]]:
        """Return shard, place in the shard and place in the answer of each piece."""
        pieces, filled = [], 0
        while filled < count:
            position = (start + filled) % self.num_tokens
            number = int(np.searchsorted(self.ends, position, side="right"))
            shard = self.shards[number]
            at = position - (int(self.ends[number]) - shard.num_tokens)
            length = min(shard.num_tokens - at, count - filled)
            pieces.append((number, slice(at, at + length), slice(filled, filled + length)))
            filled += length
        return pieces

    def identity(self) -> str:
        """Return a hash of the files' sizes and of their first and last bytes."""
        digest = xxhash.xxh128()
        for shard in self.shards:
            for path in (shard.bin, shard.idx):
                with open(path, "rb") as file:
                    size = file.seek(0, 2)
                    digest.update(size.to_bytes(8, "little"))
                    for at in (0, max(0, size - ENDS_READ)):
                        file.seek(at)
                        digest.update(file.read(ENDS_READ))
        return digest.hexdigest()


def _view(
    path: Path, identity: Identity, dtype: str, offset: int, length: int
) -> NDArray[np.integer]:
    return (
        np.frombuffer(_map(path, identity), dtype, length, offset) if length else np.empty(0, dtype)
    )


@lru_cache(MAPPED_AT_ONCE)
def _map(path: Path, identity: Identity) -> mmap.mmap:
    """Map a file; those used last stay mapped, because each takes a file descriptor."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
