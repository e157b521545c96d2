"""What a command leaves that was killed in its first write is not in the way of the next one."""

from pathlib import Path

import pytest

from nemotron.errors import UserError
from nemotron.evaluate.sample_file import check_folder
from nemotron.files import write_text
from nemotron.outputs import MARK, publish, writing_beside


def test_a_mark_that_was_not_finished_is_that_of_an_empty_folder(tmp_path: Path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / f".{MARK}.q1w2e3r4.tmp").write_text('{"made')
    with writing_beside(tmp_path / "out", "export") as folder:
        write_text(folder / "weights", "1")
        publish(folder, tmp_path / "out", "export")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", [f".{MARK}.q1w2e3r4.txt", f"{MARK}.tmp", "mine.tmp"])
def test_any_other_file_is_not_touched(tmp_path: Path, name: str):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / name).write_text("mine")
    with (
        pytest.raises(UserError, match="was not left by an earlier export"),
        writing_beside(tmp_path / "out", "export"),
    ):
        pass
    assert (partial / name).read_text() == "mine"


def test_settings_that_were_not_finished_are_those_of_an_empty_folder(tmp_path: Path):
    (tmp_path / ".samples.settings.json.q1w2e3r4.tmp").write_text("{")
    check_folder(tmp_path, resume=False)
    check_folder(tmp_path, resume=True)
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(UserError, match="is not the folder of an evaluation"):
        check_folder(tmp_path, resume=True)
