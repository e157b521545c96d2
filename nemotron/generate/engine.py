"""The engine: takes requests at any time, and adds a token to each of many answers in a step."""

import itertools
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.generate.exact import exact_view
from nemotron.generate.forward import PIECE, extend, new_cache, score
from nemotron.generate.graphs import Steps
from nemotron.generate.prefixes import Prefix, PrefixStore
from nemotron.generate.prompt_scores import PromptScores, score_prompts
from nemotron.generate.request import Event, Request, requests_of
from nemotron.generate.routing import keep_experts, recorded
from nemotron.generate.sample import Sample
from nemotron.generate.sampling import Sampling, fresh_seed
from nemotron.generate.scheduler import Scheduler
from nemotron.generate.selection import select
from nemotron.generate.speculate import Speculation, Speculator
from nemotron.generate.timing import Timing
from nemotron.model.cache import BLOCK_SIZE
from nemotron.model.cache_formats import UNCHANGED, CacheFormats
from nemotron.model.cached_rows import CachedRows
from nemotron.model.hybrid import HybridLM

MambaDecode = Literal["recurrent", "replay"]

SLOTS = 32
"""Answers that are written at the same time, unless another number is given."""


@dataclass(frozen=True)
class Scores:
    """Samples whose tokens have all been read, and the logits of their next ones."""

    samples: list[Sample]
    logits: Float[Tensor, "B V"]

    def without(self, ended: Collection[Sample]) -> "Scores":
        """Return those of the samples that go on."""
        rows = [row for row, sample in enumerate(self.samples) if sample not in ended]
        return Scores([self.samples[row] for row in rows], self.logits[rows])


class Engine:
    """Continues prompts with one model; an answer does not depend on the others beside it.

    - `model`: its weights must not be packed if `mamba_decode` is "replay".
    - `stop`: tokens that end every answer.
    - `prefill_tokens`: a step reads at most so many tokens of prompts, in pieces of at most 512.
    - `tokenizer`: answers as text, and stop strings, need it.
    - `slots`: at most so many answers are written at a time.
    - `blocks`: number of blocks, of `block_size` tokens each, for the keys and values of attention
      layers; default: as many as needed. If they run out, the youngest answer waits and is read
      again later.
    - `prefixes`: the engine keeps so many states after beginnings of texts, for texts that begin
      alike.
    - `row_by_row`: every text passes the model by itself. Its answer then has the same bits
      whatever others there are, unless they take its blocks; this is slower.
    - `common_pieces`: pieces of prompts have powers of two as lengths, and longer ones go first.
      Prompts of many lengths then pass the model together, which is faster for many prompts, and
      later for the first of them.
    - `fixed_sizes`: steps of one token are captured as CUDA graphs; default: on a GPU, where
      possible.
    - `speculation`: a step may bring several tokens of an answer.
    - `formats`: those of the cache.
    - `mamba_decode`: with "replay", the engine computes by the operations of `exact_view` and scans
      the newest chunk of a text again for each token. Its probabilities have the same bits as one
      pass of `exact_view(model)` over the text.

    Raises:
        UserError: when the options exclude each other, or the model cannot make such drafts.
    """

    def __init__(
        self,
        model: HybridLM,
        stop: Collection[int] = (),
        prefill_tokens: int = PIECE,
        *,
        tokenizer: Tokenizer | None = None,
        slots: int = SLOTS,
        blocks: int | None = None,
        block_size: int = BLOCK_SIZE,
        prefixes: int = 0,
        row_by_row: bool = False,
        common_pieces: bool = False,
        fixed_sizes: bool | None = None,
        speculation: Speculation | None = None,
        formats: CacheFormats = UNCHANGED,
        mamba_decode: MambaDecode = "recurrent",
    ) -> None:
        is_exact = mamba_decode == "replay"
        self._prepare = exact_view if is_exact else _unchanged
        self.model, self.tokenizer = self._prepare(model), tokenizer
        self.stop = frozenset(stop)
        self.prefill_tokens, self._row_by_row = prefill_tokens, row_by_row
        self._piece, self._common_pieces = min(prefill_tokens, PIECE), common_pieces
        self.version = 0
        """Of the weights, as `Answer.versions` names it."""
        self.timing = Timing()
        if is_exact and (speculation is not None or formats != UNCHANGED):
            raise UserError(
                "mamba_decode = replay goes with neither speculation nor other formats of the "
                "cache; leave them out."
            )
        if fixed_sizes is None:
            is_cuda = model.backbone.embeddings.weight.device.type == "cuda"
            is_plain = speculation is None and formats.state != "fp16_sr" and not is_exact
            fixed_sizes = is_cuda and is_plain
        assert not fixed_sizes or formats.state != "fp16_sr", "a graph does not know the step"
        assert not (fixed_sizes and speculation), "passes over drafts have many sizes"
        self._room, more = blocks, int(fixed_sizes)
        blocks = None if blocks is None else blocks + more
        drafts = 0
        if speculation is not None:
            speculation.check(model.config)
            drafts = speculation.num_unread
        self.cache = new_cache(
            model,
            slots + more,
            blocks,
            block_size,
            drafts=drafts,
            formats=formats,
            replay=is_exact,
        )
        self.speculator = None
        if speculation is not None:
            self.speculator = Speculator(self.cache, model.config, speculation)
        self._steps = Steps(self.cache) if fixed_sizes else None
        self.prefixes = PrefixStore(self.cache, prefixes)
        self.scheduler = Scheduler(self.cache, self.prefixes)
        self._next_number, self._orders = 0, itertools.count()
        self._live: dict[int, list[Sample]] = {}
        """Samples by request, until their last event."""
        self._ended: list[Event] = []
        """Events that the next step returns."""
        self._rows: CachedRows | None = None

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._live and not self._ended

    def submit(self, request: Request) -> int:
        """Take a request; its events bear the number that is returned.

        Raises:
            UserError: when the request is impossible, or too long for the blocks of the cache.
        """
        self._check(request)
        assert request.begun is None or request.num_samples == 1, "one sample has begun"
        number, seed = self._next_number, request.sampling.seed
        self._next_number += 1
        seed = fresh_seed() if seed is None else seed
        stop_ids, scores = self._stop_ids(request), PromptScores.of(request)
        samples = [
            Sample(
                *(number, k, next(self._orders), request, seed + k, stop_ids, self.tokenizer),
                prompt_scores=scores,
            )
            for k in range(request.num_samples)
        ]
        self._live[number] = samples
        samples[0].followers = samples[1:]
        self.scheduler.wait(samples[0])
        return number

    def cancel(self, number: int) -> None:
        """End a request; the next step returns its last events. Nothing if it has ended."""
        for sample in self._live.get(number, [])[:]:
            self._ended.append(sample.cancel())
            self._leave(sample)

    def step(self) -> list[Event]:
        """Add a token to every answer that can continue; return what happened."""
        begin, (events, self._ended) = time.perf_counter(), (self._ended, [])
        admitted = [(sample, sample.logits) for sample in self.scheduler.admit()]
        known = [Scores([s], logits[None]) for s, logits in admitted if logits is not None]
        verified = self._speculate()
        decoded = self._decode()
        read_s = -time.perf_counter()
        read = self._prefill()
        read_s += time.perf_counter()
        further = [bool(s.answer.tokens) for scores in decoded for s in scores.samples]
        further += [True] * len(verified)
        events += verified
        events += self._choose([*known, *decoded, *read])
        self.timing.new_tokens += sum(event.token is not None for event in events)
        self._count(further, read_s, time.perf_counter() - begin - read_s)
        return events

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Submit the requests and yield their events until all have ended.

        Events of other requests are left to the next `step`; whoever stops asking for events
        cancels the requests.

        Raises:
            UserError: as `submit`, before any request is taken.
        """
        requests = list(requests)
        for number, request in enumerate(requests, 1):
            self._check(request, f"prompt {number}")
        numbers = {self.submit(request) for request in requests}
        try:
            while numbers & self._live.keys():
                events = self.step()
                self._ended += (event for event in events if event.request not in numbers)
                yield from (event for event in events if event.request in numbers)
        finally:
            for left in numbers & self._live.keys():
                self.cancel(left)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling
    ) -> list[list[int]]:
        """Return the new tokens of each prompt, the stop token included where one was reached.

        Raises:
            UserError: when a prompt is empty or has a token that the model does not have.
        """
        requests = requests_of(prompts, max_new_tokens, sampling)
        first = self._next_number
        self.timing = Timing()
        answers: dict[int, list[int]] = {}
        for event in self.run(requests):
            answers[event.request - first] = event.answer.tokens
        return [answers[index] for index in range(len(requests))]

    def update(self, model: HybridLM, version: int, *, keep_states: bool = False) -> None:
        """Go on with new weights, between two steps.

        `model` is the same one if its parameters changed in place. What was computed with the old
        weights is computed again, unless `keep_states`: texts then go on from the states they have,
        and new ones from stored prefixes. Tokens chosen from now on bear `version`.
        """
        assert version > self.version, f"version {version} does not follow {self.version}"
        assert model.config == self.model.config, "the cache is made for another model"
        self.model, self.version = self._prepare(model), version
        self.prefixes.clear(only_shared=keep_states)
        for sample in [] if keep_states else self.scheduler.running[:]:
            self.scheduler.preempt(sample)

    def _check(self, request: Request, name: str = "prompt") -> None:
        request.check(self.model.config.vocab_size, name)
        if request.stop and self.tokenizer is None:
            raise UserError("stop strings need an engine with a tokenizer; give it one.")
        if request.min_tokens and len(self._stop_ids(request)) >= self.model.config.vocab_size:
            raise UserError(
                "every token ends the answer, so none can come before; name fewer, or ask for no "
                "shortest length."
            )
        limit = self._room
        longest, drafts = len(request.prompt) + request.max_tokens, ""
        if self.speculator is not None:
            longest += self.speculator.room - 1
            drafts = " with drafts"
        if limit is not None and self.cache.blocks_of(longest) > limit:
            raise UserError(
                f"{name} and an answer of {request.max_tokens} are {longest} tokens{drafts}, "
                f"but the cache has room for {limit * self.cache.block_size}; ask for fewer."
            )

    def _stop_ids(self, request: Request) -> frozenset[int]:
        return request.stop_ids if request.ignore_eos else self.stop | request.stop_ids

    def _decode(self) -> list[Scores]:
        """Read the last token of each sample of which only that one is not yet read."""
        if self.speculator is not None:
            return []
        samples = [sample for sample in self.scheduler.running if self._num_left(sample) == 1]
        samples = self.scheduler.make_room(samples, 1)
        if not samples:
            return []
        if self._row_by_row:
            return [self._append([sample], 1) for sample in samples]
        return [self._append(samples, 1)]

    def _speculate(self) -> list[Event]:
        """Add tokens, by drafts, to every sample of which only the newest is not yet read."""
        if self.speculator is None:
            return []
        ready = [s for s in self.scheduler.running if s.answer.tokens and self._num_left(s) == 1]
        ready = self.scheduler.make_room(ready, self.speculator.room)
        groups = [[sample] for sample in ready] if self._row_by_row else [ready] if ready else []
        events = []
        for samples in groups:
            events += self.speculator.step(self.model, samples, self.version)
        for sample in ready:
            if sample.answer.finish is not None:
                self._leave(sample)
        return events

    def _prefill(self) -> list[Scores]:
        """Read pieces of prompts, the oldest first; pieces of one length are read together."""
        room, ready = self.prefill_tokens, []
        pieces = self._pieces()
        while pieces:
            size = max(pieces.values()) if self._common_pieces else next(iter(pieces.values()))
            if size > room:
                break
            most = 1 if self._row_by_row else room // size
            alike = [s for s, other in pieces.items() if other == size][:most]
            # a stored prefix may share the block that is written next
            if here := self.scheduler.make_room(alike, size):
                ready.append(self._append(here, size))
            room -= size * len(here)
            self.timing.prompt_tokens += size * len(here)
            if self._common_pieces:
                pieces = self._pieces()
            else:
                left = pieces.items()
                pieces = {s: other for s, other in left if s not in alike and s.slot is not None}
        return ready

    def _pieces(self) -> dict[Sample, int]:
        """Return how many tokens of each prompt are to be read next, the oldest prompt first."""
        pieces: dict[Sample, int] = {}
        for sample in self.scheduler.running:
            if left := self._num_to_prefill(sample):
                assert sample.slot is not None
                size = min(left, self._piece - self.cache.lengths[sample.slot] % self._piece)
                pieces[sample] = 1 << size.bit_length() - 1 if self._common_pieces else size
        return pieces

    def _append(self, samples: list[Sample], size: int) -> Scores:
        """Read the next `size` tokens of each sample; return those now read whole, with logits."""
        by_slot = {sample.slot: sample for sample in samples if sample.slot is not None}
        slots = sorted(by_slot)  # neighboring slots need no copies of their states
        samples = [by_slot[slot] for slot in slots]
        logits = self._pass(samples, slots, size)
        for slot, sample, row in zip(slots, samples, logits, strict=True):
            length = self.cache.lengths[slot]
            if sample.followers and length == len(sample.tokens):
                self._share(sample, row)
            is_end = not length % self._piece or not self._num_left(sample)
            if size > 1 and is_end:
                self.prefixes.store(sample.tokens[:length], slot, sample.experts)
        rows = [row for row, sample in enumerate(samples) if not self._num_left(sample)]
        if len(rows) == len(samples):
            return Scores(samples, logits)
        return Scores([samples[row] for row in rows], logits[rows])

    def _pass(self, samples: list[Sample], slots: list[int], size: int) -> Float[Tensor, "B V"]:
        """Pass the next `size` tokens of each sample through the model; return the last logits."""
        starts = [self.cache.lengths[slot] for slot in slots]
        ids = [s.tokens[at : at + size] for at, s in zip(starts, samples, strict=True)]
        has_experts = any(sample.request.experts for sample in samples)
        reads_all = any(sample.reads_all for sample in samples)
        if self._steps is not None and size == 1 and not reads_all:
            first = [first for first, *_ in ids]
            found = self._steps.append(self.model, slots, first, has_experts=has_experts)
            if found.experts is not None:
                keep_experts(found.experts, samples, starts)
            return found.logits
        if self._rows is None or self._rows.slots != slots:
            self._rows = CachedRows(self.cache, slots)
        tokens = torch.tensor(ids, device=self.cache.device)
        with recorded(self.model, on=has_experts) as record:
            only_last = self.speculator is None and not reads_all
            hidden = extend(self.model, self._rows, tokens, only_last=only_last)
        if record.layers:
            keep_experts(record.experts(len(samples)), samples, starts)
        if self.speculator is not None:
            self.speculator.drafter.follow(self.model, samples, hidden)
        if reads_all:
            score_prompts(self.model, hidden, [s.prompt_scores for s in samples], starts)
        return score(self.model, hidden)

    def _share(self, sample: Sample, logits: Float[Tensor, " V"]) -> None:
        """Let the other samples of a request begin after the prompt, which was just read."""
        assert sample.slot is not None
        snapshot = self.cache.snapshot(sample.slot)
        prefix = Prefix(snapshot, logits, sample.experts, users=len(sample.followers))
        self.prefixes.share(prefix)
        for follower in sample.followers:
            follower.prefix = prefix
            self.scheduler.wait(follower)
        sample.followers = []

    def _choose(self, ready: list[Scores]) -> list[Event]:
        """Add a token to each sample that has been read, or end the answer that has none."""
        empty = [s for scores in ready for s in scores.samples if not s.request.max_tokens]
        ended = []
        for sample in empty:
            ended.append(sample.end())
            self._leave(sample)
        if empty:
            ready = [scores.without(empty) for scores in ready]
        samples = [sample for scores in ready for sample in scores.samples]
        if not samples:
            return ended
        events, logits = ended, [scores.logits for scores in ready]
        chosen = select(samples, logits[0] if len(logits) == 1 else torch.cat(logits))
        for sample, token in zip(samples, chosen, strict=True):
            sample.logits = None
            events.append(sample.push(token, self.version))
            if events[-1].finish is not None:
                self._leave(sample)
        return events

    def _leave(self, sample: Sample) -> None:
        """Let go of a sample whose answer has ended, once its newest pass is recorded."""
        sample.answer.experts = sample.experts
        samples = self._live[sample.request_id]
        samples.remove(sample)
        if not samples:
            del self._live[sample.request_id]
        if sample.slot is not None:
            length = self.cache.lengths[sample.slot]
            self.prefixes.store(sample.tokens[:length], sample.slot, sample.experts)
        self.scheduler.leave(sample)

    def _count(self, further: list[bool], read_s: float, other_s: float) -> None:
        """Note tokens and time of a step.

        `further` says of each token that was read alone whether it belongs to an answer. Choosing
        the first token of an answer belongs to reading the prompt.
        """
        self.timing.further_tokens += sum(further)
        self.timing.prompt_tokens += len(further) - sum(further)
        self.timing.prefill_s += read_s if any(further) else read_s + other_s
        self.timing.decode_s += other_s if any(further) else 0.0

    def _num_left(self, sample: Sample) -> int:
        """Tokens of a sample that the model has not read."""
        assert sample.slot is not None
        return len(sample.tokens) - self.cache.lengths[sample.slot]

    def _num_to_prefill(self, sample: Sample) -> int:
        """Tokens of a sample that are read like a prompt; decoding reads the newest one."""
        left = self._num_left(sample)
        if self.speculator is not None:  # also again: drafts follow the same token as before
            return left - bool(sample.answer.tokens)
        return left if left > 1 else 0


def _unchanged(model: HybridLM) -> HybridLM:
    return model
