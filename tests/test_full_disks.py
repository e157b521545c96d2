"""Places that take nothing: one sentence by every command.

The exit code is 1 for a disk without room or one that cannot be written, and 2 for a folder that
the user may not write to.
"""

import errno
import importlib.util
import os
import pickle
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nemotron import cli, exit_codes, outputs
from nemotron.data.rewrite.rows import check_file
from nemotron.errors import UserError, exit_code
from nemotron.evaluate.sample_file import check_folder
from nemotron.guard import describe
from nemotron.outputs import check_new, check_output
from tests.support.outputs import OUTPUTS, TRAIN, make_world
from tests.support.small_disk import Filler, small_disk
from tests.support.unprivileged import bound_by_permissions


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@contextmanager
def full(folder: Path) -> Iterator[Path]:
    with small_disk(folder, size="64k") as disk:
        Filler(disk)
        yield disk


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    with small_disk(folder) as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        yield disk


@contextmanager
def forbidden(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    folder.chmod(0o555)
    with bound_by_permissions():
        yield folder


KINDS = {"No space left on device": full, "Read-only file system": read_only}


WRITING = {
    "train output": [*TRAIN[:2], "output=OUT", *TRAIN[3:]],
    "train cache": [*TRAIN[:2], "output=new", *TRAIN[3:-1], "data.cache=OUT"],
} | {
    f"{output.words} {output.option}{' (file)' * bool(output.inside)}": [
        *output.words.split(),
        output.option,
        "OUT" if output.inside else "OUT.txt",
    ]
    for output in OUTPUTS
    # so small a model keeps no pivots, and without one nothing is written
    if not output.words.startswith("rl pivots")
}


@pytest.mark.slow
@pytest.mark.parametrize("said", KINDS)
@pytest.mark.parametrize("words", WRITING.values(), ids=WRITING)
def test_every_command_that_cannot_write_fails_with_one_sentence(
    words: list[str],
    said: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    if words[0] == "lm-eval" and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed")
    monkeypatch.chdir(world)
    with KINDS[said](tmp_path / "disk") as disk:
        capsys.readouterr()
        code = cli.run([word.replace("OUT", str(disk / "out")) for word in words])
        answer = capsys.readouterr().err.splitlines()
    assert (code, said in answer[-1], str(disk) in answer[-1]) == (1, True, True), answer
    assert sum("nemotron:" in line for line in answer) == 1


@pytest.mark.slow
@pytest.mark.parametrize("words", WRITING.values(), ids=WRITING)
def test_a_folder_that_takes_nothing_is_a_mistake_for_every_command(
    words: list[str],
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    if words[0] == "lm-eval" and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed")
    monkeypatch.chdir(world)
    with forbidden(tmp_path / "theirs") as folder:
        capsys.readouterr()
        code = cli.run([word.replace("OUT", str(folder / "out")) for word in words])
        answer = capsys.readouterr().err.splitlines()
    last = answer[-1]
    assert (code, "Permission denied" in last, str(folder) in last) == (2, True, True), answer
    assert sum("nemotron:" in line for line in answer) == 1


CHECKS = [
    lambda out: check_new(out, "--out"),
    lambda out: check_output(out, "test", overwrite=False),
    lambda out: check_file(out, [], overwrite=False),
    lambda out: check_folder(out, resume=False),
]


@pytest.mark.parametrize("check", CHECKS, ids=["file", "folder", "lines", "evaluation"])
def test_a_place_is_looked_at_before_any_work(check: Callable[[Path], object], tmp_path: Path):
    with forbidden(tmp_path / "theirs") as folder:
        with pytest.raises(UserError, match="Permission denied") as caught:
            check(folder / "out")
        assert not list(folder.iterdir())
    assert exit_code(caught.value) == exit_codes.WRONG_INPUT


MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)


@pytest.mark.parametrize("number", [*MACHINE, errno.EMFILE, errno.ENOMEM])
def test_a_refusal_of_the_machine_is_1_with_a_sentence_of_its_own_and_without(number: int):
    refusal = OSError(number, os.strerror(number), "/data/x")
    sentences = (
        refusal,
        outputs.unwritable(refusal, Path("/data"), "nothing was replaced"),
        UserError("cannot be read.", because=refusal).at("a place"),
        pickle.loads(pickle.dumps(UserError("cannot be read.", because=refusal))),
    )
    assert [exit_code(error) for error in sentences] == [exit_codes.FAILED] * len(sentences)
    assert str(sentences[-1]) == "cannot be read."


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT, errno.ENOTDIR])
def test_a_place_that_another_name_would_replace_is_a_mistake(number: int):
    refusal = OSError(number, os.strerror(number), "/data/x")
    error = outputs.unwritable(refusal, Path("/data"), "nothing was replaced")
    assert exit_code(error) == exit_codes.WRONG_INPUT


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_place_that_may_not_be_used_is_a_mistake_wherever_it_is_met(number: int):
    refusal = OSError(number, os.strerror(number), "/data/x")
    assert exit_code(refusal) == exit_codes.WRONG_INPUT
    said, code = describe(refusal, [])
    assert code == exit_codes.WRONG_INPUT
    assert said == (
        f"/data/x cannot be used: {os.strerror(number)}; name another place, or change who may "
        "use this one."
    )
    # nobody named the place that this is about
    unnamed = OSError(number, os.strerror(number))
    assert exit_code(unnamed) == describe(unnamed, [])[1] == exit_codes.FAILED
