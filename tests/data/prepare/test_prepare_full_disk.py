"""Preparation on a disk without room: one sentence, and the same command goes on later."""

import random
import subprocess

from tests.support import forked
from tests.support.small_disk import small_disk


def test_a_preparation_that_a_full_disk_ends_goes_on_when_there_is_room(tmp_path):
    draw = random.Random(3)
    words = ["river", "sea", "stone", "and", "runs", "stays"]
    for name in ("a", "b", "c"):
        text = " ".join(draw.choices(words, k=60_000))
        (tmp_path / f"{name}.txt").write_text(text)
    with small_disk(tmp_path / "disk", size="250k") as disk:

        def prepare(out) -> forked.Forked:
            sources = [tmp_path / f"{name}.txt" for name in ("a", "b", "c")]
            words = ("data", "prepare", *sources, "--out", out, "--workers", "1")
            return forked.command(*words, output=tmp_path / f"{out.name}.txt")

        first = prepare(disk / "out")
        assert first.wait() == 1, first.text
        sentence = first.text.splitlines()[-1]
        assert sentence.startswith(f"nemotron: {disk / 'out'}: ")
        assert "No space left on device; free some space and run the same command" in sentence
        assert not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        assert prepare(disk / "out").wait() == 0
        whole = prepare(tmp_path / "whole")
        assert whole.wait() == 0, whole.text
        for file in sorted((tmp_path / "whole").glob("*.bin")):
            assert file.read_bytes() == (disk / "out" / file.name).read_bytes()
