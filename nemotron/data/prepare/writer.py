"""Writing Megatron's token shards, as `nemotron.data.indexed` describes and reads them."""

import contextlib
import os
from array import array
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from nemotron.data.indexed import CODES, HEADER, MAGIC, VERSION
from nemotron.files import sync, sync_folder

LONGEST_DOCUMENT = 2**31 - 1
"""Tokens; the index holds lengths as int32."""


def id_type(vocab_size: int) -> np.dtype:
    """Return the type in which Megatron stores ids of a vocabulary of this size."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class ShardWriter:
    """Writes a shard; its files appear when all is written.

    A document is one sequence unless `end_sequence` divides it. Used as a context manager; when the
    block raises, nothing is left behind.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike, *, supervised: bool = False) -> None:
        """Open temporary files beside the prefix."""
        self.prefix = Path(prefix).absolute()
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.lengths = array("q")
        """Tokens of each document."""
        self._open_length = 0
        self._sequences = array("q")  # tokens of each
        self._open_sequence = 0
        self._documents = array("q", [0])  # sequences up to the end of each
        self._code = {np.dtype(name): code for code, name in CODES.items()}[self.dtype]
        ends = ("bin", "idx", *(["loss"] if supervised else []))
        self.files = {end: Path(f"{self.prefix}.{end}") for end in ends}
        self._parts = {end: Path(f"{self.prefix}.{end}.{os.getpid()}.tmp") for end in ends}
        self._open = {end: open(part, "wb") for end, part in self._parts.items()}  # noqa: SIM115

    def add(self, tokens: ArrayLike, learned: ArrayLike | None = None) -> None:
        """Append a document; raises as `extend` does."""
        self.extend(tokens, learned)
        self.end_document()

    def extend(self, tokens: ArrayLike, learned: ArrayLike | None = None) -> None:
        """Append to the open document, so that a long one never has to be there at once.

        Raises:
            OverflowError: when an id does not fit the type, or the length the index.
        """
        tokens = np.asarray(tokens)
        if self._open_length + len(tokens) > LONGEST_DOCUMENT:
            raise OverflowError(f"a document of over {LONGEST_DOCUMENT} tokens does not fit")
        stored = tokens.astype(self.dtype)
        if not np.array_equal(stored, tokens):
            raise OverflowError(f"ids up to {tokens.max()} do not fit {self.dtype}")
        self._open["bin"].write(stored.tobytes())
        if learned is not None:
            self._open["loss"].write(np.asarray(learned, np.uint8).tobytes())
        self._open_length += len(stored)
        self._open_sequence += len(stored)

    def end_sequence(self) -> None:
        """Close a sequence inside the open document, which may be empty."""
        self._sequences.append(self._open_sequence)
        self._open_sequence = 0

    def end_document(self) -> None:
        """Close the open document and what is open of its last sequence."""
        if self._open_sequence or len(self._sequences) == self._documents[-1]:
            self.end_sequence()
        self._documents.append(len(self._sequences))
        self.lengths.append(self._open_length)
        self._open_length = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._write_index(self._open["idx"])
                for file in self._open.values():
                    sync(file)
                for end, part in self._parts.items():
                    os.replace(part, self.files[end])
                sync_folder(self.prefix.parent)
        finally:
            for file in self._open.values():
                _close(file)
            for part in self._parts.values():
                part.unlink(missing_ok=True)

    def _write_index(self, file: BinaryIO) -> None:
        lengths = np.frombuffer(self._sequences, np.int64)
        documents = np.frombuffer(self._documents, np.int64)
        ends = np.cumsum(lengths) * self.dtype.itemsize
        file.write(HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(documents)))
        file.write(lengths.astype("<i4").tobytes())
        file.write((ends - lengths * self.dtype.itemsize).astype("<i8").tobytes())
        file.write(documents.astype("<i8").tobytes())


def _close(file: BinaryIO) -> None:
    """Close a file that is given up: what a full disk did not take is not a second error."""
    with contextlib.suppress(OSError):
        file.close()
