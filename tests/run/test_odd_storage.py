"""File systems and machines that lack something, and files in a run's folder that are no files."""

import ctypes
import errno
import fcntl
import json
import os
import subprocess
from pathlib import Path

import pytest

from nemotron.data.prepare import inputs
from nemotron.errors import UserError
from nemotron.files import locked, open_regular, sync_folder
from nemotron.run.folder import RunFolder
from nemotron.run.metrics import MetricsFile
from nemotron.run.screen import Screen
from nemotron.train.config import PretrainConfig
from tests.support import forked
from tests.support.tiny_run import build_recipe


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    return build_recipe(tmp_path, {"prose": "prose", "numbers": "numbers"}, "run")


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_lock_log_and_metrics_are_files_of_the_folder_or_refused(config, tmp_path, kind):
    foreign, folder = tmp_path / "foreign", config.run_path
    foreign.write_text("not ours\n")
    folder.mkdir(parents=True)

    def put(name: str) -> None:
        if kind == "link":
            (folder / name).symlink_to(foreign)
        else:
            os.mkfifo(folder / name)

    put("lock")
    with pytest.raises(UserError, match=r"lock: it is (a link|not a regular file); remove it"):
        RunFolder(folder, config).__enter__()
    for name in ("log.txt", "metrics.jsonl", "metrics.damaged.jsonl"):
        put(name)
    screen = Screen(is_silent=True)
    with pytest.raises(UserError, match=r"log\.txt: is a link, or not a regular file; move it"):
        screen.open_log(folder / "log.txt")
    screen.close()
    with pytest.raises(UserError, match=r"metrics\.jsonl: is a link"):
        MetricsFile(folder / "metrics.jsonl", 0)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.damaged\.jsonl: is a link"):
        MetricsFile(folder / "metrics.jsonl", 0)
    assert foreign.read_text() == "not ours\n"


def test_a_deleted_lock_does_not_let_a_second_run_in(config):
    with RunFolder(config.run_path, config) as folder:
        (folder.path / "lock").unlink()
        second = RunFolder(config.run_path, config)
        with pytest.raises(UserError, match="is in use by another process"):
            second.check(8, resume=True)
        with pytest.raises(UserError, match="is in use by another process"):
            second.__enter__()
        assert folder.is_held()


def refuse(number: int):
    def call(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_a_run_is_warned_and_begins(config, monkeypatch, caplog, number):
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    with RunFolder(config.run_path, config) as folder, locked(folder.path / "other"):
        folder.write_status("running", 3)
    assert "lock cannot be locked" in caplog.text
    assert "make sure yourself that no other process uses" in caplog.text
    assert json.loads(folder.status.read_text())["step"] == 3


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES])
def test_a_folder_that_cannot_be_synced_is_no_fault(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", refuse(number))
    sync_folder(tmp_path)


def test_a_disk_that_breaks_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)


def test_a_file_that_is_opened_for_writing_is_never_a_device():
    with pytest.raises(OSError, match="it is not a regular file"):
        open_regular(Path("/dev/null"), os.O_WRONLY)


CLONE_NEWNS = 0x20000
"""Of unshare(2): mounts of this process are seen by no other."""
NOT_ALLOWED = 99


def without_shared_memory(arguments: list[str]) -> int | None:
    if ctypes.CDLL(None).unshare(CLONE_NEWNS):
        return NOT_ALLOWED
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", "/dev/shm"], check=True)
    inputs.SMALLEST_UNIT = 1000  # so that there is work for two
    return forked.run_module(arguments, None)


def test_without_dev_shm_workers_are_blamed_on_it(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "the river runs to the sea"}\n' * 90)
    arguments = ["data", "prepare", str(tmp_path), "--out", str(tmp_path / "out"), "--workers", "2"]
    run = forked.Forked(without_shared_memory, arguments, output=tmp_path / "said.txt")
    if (code := run.wait()) == NOT_ALLOWED:
        pytest.skip("a mount namespace needs root")
    assert code == 1, run.text
    assert "worker processes cannot share memory: Read-only file system in /dev/shm" in run.text
    assert "use --workers 1" in run.text
