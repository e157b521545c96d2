"""Entries of the data cache are replaced whole, also where a link stands for one."""

from pathlib import Path

from nemotron.data.cache import new_entry


def test_a_link_is_replaced_and_not_what_it_points_to(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "old").touch()
    entry = tmp_path / "entry"
    entry.symlink_to(tmp_path / "elsewhere")
    with new_entry(entry) as part:
        (part / "new").touch()
    assert not entry.is_symlink()
    assert [path.name for path in entry.iterdir()] == ["new"]
    assert (tmp_path / "elsewhere" / "old").exists()
