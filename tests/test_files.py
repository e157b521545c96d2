import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron.errors import UserError
from nemotron.files import (
    hash_file,
    locked,
    parse_json,
    read_regular,
    write_bytes,
    write_json,
    write_text,
)


def test_a_written_file_holds_what_was_written_and_nothing_lies_beside_it(tmp_path: Path):
    write_text(tmp_path / "a", "first")
    write_text(tmp_path / "a", "größer")
    assert (tmp_path / "a").read_bytes() == "größer".encode()
    assert os.listdir(tmp_path) == ["a"]


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch):
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_space)
        with pytest.raises(OSError, match="No space"):
            write_json(path, {"step": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text()) == {"step": 1}
    assert os.listdir(tmp_path) == ["state.json"]


def test_an_error_names_the_file_and_not_its_temporary_name(tmp_path: Path):
    path = tmp_path / "answers"
    program = (
        "import resource, sys, pathlib; from nemotron.files import write_bytes\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "try: write_bytes(pathlib.Path(sys.argv[1]), b'x' * 11)\n"
        "except OSError as error: print(error.filename, error.strerror)"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert done.stdout == f"{path} File too large\n"
    with pytest.raises(PermissionError) as caught:
        write_bytes(Path("/proc/answers"), b"")
    assert caught.value.filename == "/proc/answers"


def test_a_written_file_has_the_rights_of_an_ordinary_one(tmp_path: Path):
    (tmp_path / "ordinary").touch()
    write_bytes(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_the_hash_is_the_published_xxh128_of_nothing(tmp_path: Path):
    # The value that xxHash's own test table gives for an empty input with seed 0.
    (tmp_path / "empty").touch()
    assert hash_file(tmp_path / "empty") == "99aa06d3014798d86001c324468d497f"


def test_the_hash_sees_one_bit_beyond_the_first_block(tmp_path: Path):
    content = bytearray(5 * 2**20)
    (tmp_path / "a").write_bytes(content)
    content[-7] ^= 4
    (tmp_path / "b").write_bytes(content)
    assert hash_file(tmp_path / "a") != hash_file(tmp_path / "b")


def test_a_lock_keeps_another_process_out_until_it_is_released(tmp_path: Path):
    program = (
        "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "lock")]
    with locked(tmp_path / "lock"):
        refused = subprocess.run(command, capture_output=True, text=True)
    assert "BlockingIOError" in refused.stderr
    assert subprocess.run(command).returncode == 0


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("a")
    assert read_regular(tmp_path / "link", 5) == b"12345"
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match="is not a regular file"):
            read_regular(path)
    with pytest.raises(UserError, match="has 5 bytes; a file of this kind has at most 4"):
        read_regular(tmp_path / "a", 4)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "b")


def test_a_number_that_no_float_holds_is_not_read():
    assert parse_json("[1" + "0" * 299 + "]") == [10**299]
    with pytest.raises(ValueError, match="number of 401 digits, at most 300 are read"):
        parse_json("[1" + "0" * 400 + "]")
