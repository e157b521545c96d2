"""A disk without room, or that cannot be written: one sentence and exit code 1 by every command."""

import errno
import importlib.util
import os
import pickle
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nemotron import cli, exit_codes, outputs
from nemotron.errors import UserError, exit_code
from tests.support.outputs import OUTPUTS, TRAIN, make_world
from tests.support.small_disk import Filler, small_disk


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
