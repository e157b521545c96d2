"""A file of zstd frames, read so that one that ends inside a frame is an error."""

import io

import zstandard

READ = 1 << 13
"""Compressed bytes at a time; zstd makes at most 32,768 bytes of one."""


class ZstdFile(io.RawIOBase):
    """The decompressed bytes of a file; the library's own reader takes half a frame for a whole.

    Reading raises EOFError when the file ends inside a frame, ZstdError when it is damaged.
    """

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115, closed by `close`
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._has_begun = False
        self._ready = b""

    def readable(self) -> bool:
        """Say that this is for reading."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill a buffer as far as bytes are at hand; 0 at the end."""
        while not self._ready and (block := self._next()):
            self._has_begun = True
            self._ready = self._frame.decompress(block)
        if not self._ready and self._has_begun and not self._frame.eof:
            raise EOFError("it ends inside a zstd frame")
        taken = self._ready[: len(buffer)]
        buffer[: len(taken)] = taken
        self._ready = self._ready[len(taken) :]
        return len(taken)

    def _next(self) -> bytes:
        """Return compressed bytes of the open frame, or the first ones of the frame after it."""
        if not self._frame.eof:
            return self._file.read(READ)
        block = self._frame.unused_data or self._file.read(READ)
        if block:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        return block

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
