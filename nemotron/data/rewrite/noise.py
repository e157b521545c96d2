"""The command `nemotron data noise`: texts to pairs whose candidates have errors."""

import contextlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemotron.data.correct.mixed import join_mixed, split_mixed
from nemotron.data.correct.noise import Confusions, Noise
from nemotron.data.correct.sound import Sound, sound_of
from nemotron.data.rewrite.rows import Row, Rows, check_file, print_bad, rewrite, text_of
from nemotron.exit_codes import DONE
from nemotron.terminal import print_text


def add_noise(
    sources: Sequence[str],
    out: Path,
    *,
    language: str,
    candidates: int,
    rate: float,
    seed: int,
    sounds: bool,
    column: str,
    max_bad_rows: int,
    overwrite: bool,
) -> int:
    """Write a pair for each text, and print what was made.

    Raises:
        UserError: when a source, the language or the output is not fit.
    """
    sound = sound_of(language)
    check_file(out, sources, overwrite=overwrite)
    rows = Rows(sources, (column, "id"), max_bad_rows)
    maker = _Maker(column, language, seed)
    if sounds:
        done = rewrite(rows, out, maker.sounds(sound), overwrite=overwrite)
    else:
        counts = _tokens(rows, column)
        noise = Noise(Confusions(counts, sound), candidates, rate)
        done = rewrite(rows, out, maker.noised(noise), overwrite=overwrite)
    print_text(f"{out}: {done.written:,} pairs from {done.read:,} rows")
    print_bad(rows)
    return DONE


def _tokens(rows: Rows, column: str) -> Counter[str]:
    """Count the tokens of all texts; what is unfit is named when it is written."""
    counts: Counter[str] = Counter()
    for _, row in rows:
        with contextlib.suppress(ValueError):
            counts.update(split_mixed(text_of(row, column)))
    return counts


class _Maker:
    """Makes a pair of each row; the number of the row and the seed decide its errors."""

    def __init__(self, column: str, language: str, seed: int) -> None:
        self._column, self._language, self._seed = column, language, seed

    def noised(self, noise: Noise) -> Any:  # Any: what `rewrite` calls
        """Return what makes candidates with errors."""

        def make(number: int, row: Row) -> Iterator[Row]:
            tokens = split_mixed(text_of(row, self._column))
            rng = random.Random(f"noise {self._seed} {number}")
            drawn = noise.draw(tokens, rng)
            while not any(drawn):  # a short text may lose all its tokens in all candidates
                drawn = noise.draw(tokens, rng)
            yield self._pair(number, row, tokens, [join_mixed(line) for line in drawn])

        return make

    def sounds(self, sound: Sound) -> Any:  # Any: what `rewrite` calls
        """Return what makes the sounds the only candidate."""

        def make(number: int, row: Row) -> Iterator[Row]:
            tokens = split_mixed(text_of(row, self._column))
            yield self._pair(number, row, tokens, [" ".join(map(sound, tokens))])

        return make

    def _pair(self, number: int, row: Row, tokens: list[str], candidates: list[str]) -> Row:
        return {
            "id": str(row.get("id", number)),
            "target": join_mixed(tokens),
            "candidates": candidates,
            "language": self._language,
        }
