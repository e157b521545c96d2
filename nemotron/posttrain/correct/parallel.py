"""Lines corrected in parallel, by a model of the stage correct."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from nemotron.data.correct.align import columns_of
from nemotron.data.correct.sound import KEPT, LANGUAGES, sound_of
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.posttrain.correct.answers import Corrected, Counts, Line
from nemotron.posttrain.correct.run import Answer, Corrector, Source


@dataclass(frozen=True)
class InParallel:
    """Aligns the candidates of each line, and corrects them."""

    corrector: Corrector
    tokenizer: Tokenizer
    language: str | None = None
    """How tokens sound, by which candidates are aligned; absent: as the language of each line."""
    _sounds: dict[str, Callable[[int], str]] = field(default_factory=dict, init=False, repr=False)
    """Of each language that lines had so far, with the sounds of their tokens."""

    def __call__(self, lines: Sequence[Line], counts: Counts) -> list[Corrected]:
        """Return the corrected text of each line.

        Raises:
            UserError: when a line has scores for another number of tokens, or its language needs a
                package that is missing.
        """
        answers = self.corrector.correct([self._source(line, counts) for line in lines])
        decode = self.tokenizer.decode
        return [
            Corrected(decode(answer.tokens), decode(answer.selected), self._judged(answer))
            for answer in answers
        ]

    def _judged(self, answer: Answer) -> tuple[tuple[str, float], ...]:
        if answer.columns is None or answer.scores is None:
            return ()
        void = self.corrector.specials.marks.void
        pairs = zip(answer.columns.tolist(), answer.scores.tolist(), strict=True)
        return tuple((self.tokenizer.decode([t]), score) for t, score in pairs if t != void)

    def _source(self, line: Line, counts: Counts) -> Source:
        pair, wanted = line.pair, self.corrector.model.config.num_candidates
        counts.repeated += len(pair.candidates) < wanted
        counts.cut += len(pair.candidates) > wanted
        # one by one: to wake other cores would take longer
        ids = [self.tokenizer.encode(text) for text in pair.exactly(wanted)]
        columns = columns_of(ids, self._sound(pair.language)).lines
        void = self.corrector.specials.marks.void
        filled = np.array([[void if t is None else t for t in own] for own in columns], np.int64)
        if pair.scores is None:
            return Source(filled)
        try:
            pair.check_scores(
                [len(tokens) for tokens in self.tokenizer.encode_batch(pair.candidates)]
            )
        except ValueError as error:
            raise UserError(f"{error}.", where=line.where) from None
        scores = [*pair.scores, *[pair.scores[0]] * wanted][:wanted]
        placed = np.zeros(filled.shape)
        for place, own, values in zip(placed, filled, scores, strict=True):
            place[own != void] = values
        return Source(filled, placed)

    def _sound(self, language: str | None) -> Callable[[int], str]:
        known = language if language in LANGUAGES else "letters"
        name = self.language or known
        if name not in self._sounds:
            sound, decode = sound_of(name), self.tokenizer.decode
            self._sounds[name] = functools.lru_cache(KEPT)(
                lambda token: sound(decode([token]).strip())
            )
        return self._sounds[name]
