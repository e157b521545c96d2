"""Pairs to token ids: rows of aligned candidates, or conversations with marks on right tokens."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nemotron.data.chat.check import Message
from nemotron.data.chat.render import training_sequences
from nemotron.data.correct.align import columns_of, durations_of, row_durations
from nemotron.data.correct.marks import marks_of
from nemotron.data.correct.pair import Pair, PairOptions, pair_of, prompt_of
from nemotron.data.correct.pairs import PairRow
from nemotron.data.correct.sound import LANGUAGES, Sound, sound_of
from nemotron.data.indexed import LEARNED, RIGHT
from nemotron.data.prepare.encode import Ids
from nemotron.data.tokenizer import Tokenizer

Count = Callable[[str], None]
"""Counts something about a pair by the name of its field in `Counts`."""


class PairEncoder:
    """Encodes pairs with one tokenizer; remembers how its tokens sound."""

    def __init__(self, tokenizer: Tokenizer, options: PairOptions) -> None:
        """Take a tokenizer.

        Raises:
            UserError: when it lacks a special token, or the language a package.
        """
        self._tokenizer, self._options = tokenizer, options
        self._void = marks_of(tokenizer).void
        self._sounds: dict[str, Callable[[int], str]] = {}
        if options.language is not None:
            self._sound_of(options.language)

    def encode(self, row: Mapping[str, Any], count: Count) -> list[Ids]:  # Any: what a row holds
        """Return the document of a row.

        Raises:
            ValueError: when the row is not a pair, in one sentence.
            UserError: when the language of the pair needs a package that is missing.
        """
        pair = pair_of(row)
        assert pair.target is not None
        candidates = pair.exactly(self._options.candidates)
        ids = self._tokenizer.encode_batch([*candidates, pair.target])
        own = self._tokenizer.encode_batch(pair.candidates) if pair.scores else []
        pair.check_scores([len(tokens) for tokens in own])
        if len(pair.candidates) != len(candidates):
            count("repeated" if len(pair.candidates) < len(candidates) else "cut")
        if self._options.form == "chat":
            return [self._chat(pair, candidates, ids[-1])]
        size = len("".join(candidates).encode()) + len(pair.target.encode())
        return [self._row(ids[:-1], ids[-1], size, self._sound_of(pair.language))]

    def _row(
        self,
        candidates: Sequence[list[int]],
        target: list[int],
        num_bytes: int,
        sound: Callable[[int], str],
    ) -> Ids:
        lines = columns_of(candidates, sound).lines
        durations = [
            row_durations(line, durations_of(tokens, target, sound))
            for tokens, line in zip(candidates, lines, strict=True)
        ]
        voided = [[self._void if token is None else token for token in line] for line in lines]
        row = _row_of(voided, target, durations)
        sequences = row.sequences()
        return Ids(
            np.concatenate(sequences).tolist(),
            num_bytes,
            is_last=True,
            family=target,
            sequences=[len(sequence) for sequence in sequences],
        )

    def _chat(self, pair: Pair, candidates: Sequence[str], target: list[int]) -> Ids:
        """Encode question and answer; right tokens of the candidates have a role of their own."""
        prompt = prompt_of(candidates)
        messages: list[Message] = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": pair.target},
        ]
        [rendered] = training_sequences(messages, enable_thinking=False)
        [(start, stop)] = rendered.supervised
        asked, offsets = self._tokenizer.encode_offsets(rendered.text[:start])
        answer = self._tokenizer.encode(rendered.text[start:stop], specials=True)
        rest = self._tokenizer.encode(rendered.text[stop:], specials=True)
        roles = [0] * len(asked)
        at = rendered.text.index(prompt) + len(prompt)
        sound = self._sound_of(pair.language)
        for candidate in reversed([candidate.strip() for candidate in candidates]):
            inside = [
                number
                for number, (first, last) in enumerate(offsets)
                if at - len(candidate) <= first < last <= at
            ]
            for number in self._right(inside, asked, target, sound):
                roles[number] = RIGHT
            at -= len(candidate) + 1  # the line break
        return Ids(
            [*asked, *answer, *rest],
            len(rendered.text.encode()),
            is_last=True,
            learned=[*roles, *[LEARNED] * len(answer), *[0] * len(rest)],
            family=target,
        )

    def _right(
        self, inside: list[int], ids: list[int], target: list[int], sound: Callable[[int], str]
    ) -> list[int]:
        """Return which of these positions hold a token that stands for itself in the target."""
        source = [ids[number] for number in inside]
        durations = durations_of(source, target, sound)
        row = _row_of([source], target, [durations])
        return [n for n, kept in zip(inside, row.is_kept[0], strict=True) if kept]

    def _sound_of(self, language: str | None) -> Callable[[int], str]:
        """Return the sound of token ids in the language of the options, or of a pair."""
        chosen = self._options.language or (language if language in LANGUAGES else "letters")
        if chosen not in self._sounds:
            self._sounds[chosen] = _of_ids(self._tokenizer, sound_of(chosen))
        return self._sounds[chosen]


def _row_of(lines: list[list[int]], target: list[int], durations: list[list[int]]) -> PairRow:
    """Return a row; its arrays hold integers also where they are empty."""
    return PairRow(*(np.array(ids, np.int64) for ids in (lines, target, durations)))


def _of_ids(tokenizer: Tokenizer, sound: Sound) -> Callable[[int], str]:
    known: dict[int, str] = {}

    def of(token: int) -> str:
        if token not in known:
            known[token] = sound(tokenizer.decode([token]).strip())
        return known[token]

    return of
