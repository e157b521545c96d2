"""How many tokens to draft, so that speculation never costs much more than it brings.

With probability a that a draft is accepted, k drafts bring 1 + a + … + a^k tokens in a pass, which
takes longer than one without drafts: they are drafted, and more tokens are read. No drafts at all
is one of the choices.
"""

import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np

from nemotron.generate.request import DraftedPass
from nemotron.generate.sample import Sample
from nemotron.model.config import ModelConfig
from nemotron.model.flops import linear_weights

MEMORY = 0.95
"""Weight of a pass with drafts in the estimate of acceptance, for each one after it."""
PRIOR = 3.0
"""Accepted drafts with which the estimate begins."""
REST = 8
"""Passes after which the engine checks again whether drafts pay."""
TRIALS = 3
"""Passes of each kind that are measured before times decide."""
TIMES = 9
"""Newest times of each kind whose median is used."""
PLAIN_EVERY = 64
"""Passes with drafts after which one without is measured again."""
TRY_EVERY = 32
"""Passes without drafts of an answer after which one is tried."""
MARGIN = 0.05
"""Part of the speed by which drafts must be faster than none: estimates are rough."""
HOPE = 1.2
"""Least gain of drafts that are all accepted, without which none is tried."""
COMPUTE = {"cpu": 0.15, "cuda": 0.003}
"""Time to multiply a token by a weight, in times to read a weight: measured on one core with
compiled steps in float32, and by the data sheet of an H100 in bfloat16."""
CALL = {"cpu": 600_000.0, "cuda": 0.0}
"""Time to start a pass or a product, in times to read a weight; measured likewise."""


@dataclass
class Record:
    """What became of an answer's drafts so far."""

    accepted: float = PRIOR  # much is hoped of drafts until something is known
    tested: float = PRIOR
    idle: int = 0
    """Passes since the newest one with drafts."""

    def note(self, done: DraftedPass) -> None:
        """Take note of a pass."""
        if not done.num_drafts:
            self.idle += 1
            return
        self.idle = 0
        self.accepted = MEMORY * self.accepted + done.num_accepted
        self.tested = MEMORY * self.tested + min(done.num_accepted + 1, done.num_drafts)

    @property
    def rate(self) -> float:
        """The estimated probability that the next draft is accepted."""
        return self.accepted / self.tested


def tokens_of(acceptance: float, count: int) -> float:
    """Return how many tokens a pass with `count` drafts brings on average."""
    return count + 1 if acceptance == 1 else (1 - acceptance ** (count + 1)) / (1 - acceptance)


def paying_length(
    rates: Sequence[float], reaches: Sequence[int], cost: Callable[[int], float], others: int = 0
) -> int:
    """Return the length with which answers of equal length end soonest.

    Both the last end and the mean of all count. They pass the model together, with others whose
    drafts have a given length. `reaches` are the most tokens that could be drafted of each, `rates`
    the probabilities that one is accepted; `cost` returns the time of a pass with drafts of some
    length, in passes without.
    """
    pairs = list(zip(rates, reaches, strict=True))

    def time(count: int) -> float:
        each = [1 / tokens_of(rate, min(count, reach)) for rate, reach in pairs]
        passes = sum(each) / len(each) + max(each)
        return passes * cost(max(count, others)) * (1 + MARGIN * (count > 0))

    return min(range(max(reaches) + 1), key=time)


def estimated_cost(config: ModelConfig, rows: int, device: str, *, has_block: bool) -> float:
    """Return the time that one more drafted token for each of some rows takes, by formula.

    In passes without drafts. Counted are the weights that are read, the products with them and
    the calls; `has_block` says whether the multi-token-prediction block drafts.
    """
    compute = COMPUTE[device]
    head = config.hidden_size * config.vocab_size

    def time(pattern: str, tokens: int, others: int) -> float:
        weights, read = others, float(others)
        for letter in pattern:
            own = linear_weights(config, letter)
            chosen = own.pop("experts", 0)
            read += sum(own.values())
            weights += sum(own.values()) + chosen
            if chosen:
                share = config.num_experts_per_tok / config.n_routed_experts
                read += chosen / share * (1 - (1 - share) ** tokens)
        return read + compute * tokens * weights

    plain = time(config.hybrid_override_pattern, rows, head)
    added = time(config.hybrid_override_pattern, 2 * rows, head) - plain
    if has_block:
        added += time(config.mtp_pattern, rows, head + 2 * config.hidden_size**2)
    return (added + 2 * CALL[device]) / (plain + CALL[device])


@dataclass
class Times:
    """Seconds of passes with one number of rows, by the length of the longest draft."""

    seconds: defaultdict[int, deque[float]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=TIMES))
    )
    num_drafted: int = 0
    """Passes with drafts since the newest one without."""

    def note(self, longest: int, seconds: float) -> None:
        """Take note of a pass."""
        self.seconds[longest].append(seconds)
        self.num_drafted = self.num_drafted + 1 if longest else 0

    def lacks(self, longest: int) -> bool:
        """Say whether passes with drafts of a length were not measured often enough."""
        return len(self.seconds[longest]) < TRIALS

    def cost(self, longest: int) -> float:
        """Return the time of a pass in passes without drafts, from those of other lengths."""
        known = sorted(n for n, times in self.seconds.items() if len(times) >= TRIALS)
        medians = [statistics.median(self.seconds[number]) for number in known]
        return float(np.interp(longest, known, medians)) / medians[0]


class DraftLengths:
    """Chooses the lengths of drafts, for all answers that a pass continues.

    Drafts that change no answer are as long as the measured times make them pay. Where a drawn
    token depends on its draft, and a seed was given, times and neighbors must not matter: then the
    answer's own drafts and a formula decide, for as many rows as there are slots.
    """

    def __init__(
        self, config: ModelConfig, slots: int, device: str, *, longest: int, is_drawn: bool,
        has_block: bool,
    ) -> None:  # fmt: skip
        self._longest, self._is_drawn = longest, is_drawn
        self._times: defaultdict[int, Times] = defaultdict(Times)
        self._records: WeakKeyDictionary[Sample, Record] = WeakKeyDictionary()
        self._fixed_cost = estimated_cost(config, slots, device, has_block=has_block)
        self._resting: list[Sample] = []
        self._rest = 0
        """Passes for which the resting samples get no drafts."""

    def choose(self, samples: Sequence[Sample], reaches: Sequence[int]) -> list[int]:
        """Return the length of each sample's draft, at most its reach."""
        if self._rest and samples == self._resting:
            self._rest -= 1
            return [0] * len(samples)
        counts = [0] * len(samples)
        free = []
        for row, (sample, reach) in enumerate(zip(samples, reaches, strict=True)):
            if reach and self._depends_on_drafts(sample):
                counts[row] = self._paying([sample], [reach], self._by_formula)
            elif reach:
                free.append(row)
        if free:
            parts = [samples[row] for row in free], [reaches[row] for row in free]
            common = self._common(*parts, len(samples), max(counts))
            for row in free:
                counts[row] = min(common, reaches[row])
        return counts

    def note(
        self, samples: Sequence[Sample], passes: Sequence[DraftedPass], seconds: float
    ) -> None:
        """Take note of what became of the drafts in a pass, and of how long it took."""
        for sample, done in zip(samples, passes, strict=True):
            self._record(sample).note(done)
        self._times[len(samples)].note(max(done.num_drafts for done in passes), seconds)

    def _common(
        self, samples: Sequence[Sample], reaches: Sequence[int], rows: int, others: int
    ) -> int:
        """Return the length for samples that depend on no draft, among `rows` of a pass."""
        if self._times[rows].num_drafted >= PLAIN_EVERY:
            return others
        times = self._known(rows)
        for length in (0, 1, self._longest):
            if times.lacks(length):
                return max(length, others)
        count = self._paying(samples, reaches, times.cost, others)
        if not count and len(samples) == rows:
            self._resting, self._rest = list(samples), REST
        return count

    def _known(self, rows: int) -> Times:
        """Return measured times with about so many rows, or those to be measured."""
        ends = (0, 1, self._longest)
        known = [n for n, times in self._times.items() if not any(map(times.lacks, ends))]
        return self._times[min(known, key=lambda number: abs(number - rows), default=rows)]

    def _paying(
        self,
        samples: Sequence[Sample],
        reaches: Sequence[int],
        cost: Callable[[int], float],
        others: int = 0,
    ) -> int:
        """Return the length that pays; 1 now and then where none did, but one could."""
        if max((1 + count) / cost(count) for count in (1, self._longest)) < HOPE:
            return 0
        records = [self._record(sample) for sample in samples]
        count = paying_length([record.rate for record in records], reaches, cost, others)
        return count or int(any(record.idle >= TRY_EVERY for record in records))

    def _by_formula(self, count: int) -> float:
        return 1 + self._fixed_cost * count

    def _record(self, sample: Sample) -> Record:
        return self._records.setdefault(sample, Record())

    def _depends_on_drafts(self, sample: Sample) -> bool:
        sampling = sample.request.sampling
        return self._is_drawn and sampling.temperature > 0 and sampling.seed is not None
