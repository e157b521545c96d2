"""Parallel correction as a stage: pairs laid out in rows, and held-out ones corrected."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from nemotron.data.correct.marks import marks_of
from nemotron.data.correct.pairs import PairRow
from nemotron.data.folder import open_source
from nemotron.data.mixture import Phase, RowLength, Timeline
from nemotron.data.tokenizer import Tokenizer, load_tokenizer
from nemotron.errors import UserError
from nemotron.files import parse_json, read_regular, write_json
from nemotron.model.hybrid import HybridLM
from nemotron.parallel.dims import resolve_dims
from nemotron.parallel.local import LocalModel
from nemotron.parallel.runtime import Ranks
from nemotron.posttrain.correct.batches import PairBatches
from nemotron.posttrain.correct.config import CorrectConfig, CorrectOptions
from nemotron.posttrain.correct.evaluate import (
    Errors,
    correct_rows,
    errors_of,
    find_threshold,
    judged,
)
from nemotron.posttrain.correct.layout import Specials, least_length
from nemotron.posttrain.correct.objective import CorrectObjective
from nemotron.posttrain.correct.pairs import PairSource
from nemotron.posttrain.correct.run import Corrector, text_ids
from nemotron.posttrain.correct.threshold import NOTHING
from nemotron.posttrain.gather import whole_model
from nemotron.run.files import RunFiles
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.build import build_local
from nemotron.train.checksums import verify_checksums
from nemotron.train.layout import MeshCoordinate
from nemotron.train.schedule import TrainingPlan, build_schedule
from nemotron.train.setup import Setup, check_end_of_text
from nemotron.train.trainer import Trainer

START = "<s>"
"""Token before each source."""


class CorrectionData:
    """The tokenizer and the pairs of a run."""

    has_conversations = False

    def __init__(self, config: CorrectConfig) -> None:
        """Open every source.

        Raises:
            UserError: when the tokenizer lacks a mark, or a source is unfit.
        """
        data = config.data
        self.tokenizer: Tokenizer = load_tokenizer(data.tokenizer)
        vocab_size = config.model.vocab_size
        self.specials = specials_of(self.tokenizer, data.eod_token, vocab_size)
        limit = min(vocab_size, self.tokenizer.vocab_size)
        opened = {s.name: open_source(s, data, self.tokenizer, limit) for s in data.sources}
        self.streams = [s for tokens in opened.values() for s in (tokens.train, tokens.validation)]
        self.sources = [PairSource(name, tokens, config) for name, tokens in opened.items()]
        self._config = config

    def describe(self) -> list[str]:
        """Return a line for each source."""
        return [
            f"{source.name}: {len(source.pairs):,} pairs to train on, "
            f"{len(source.held_out):,} held out"
            for source in self.sources
        ]

    @cached_property
    def held_out(self) -> list[PairRow]:
        """Held-out pairs up to `evaluation.tokens`, of each source the same number."""
        config, found, room = self._config, list[PairRow](), self._config.evaluation.tokens
        most = max((len(source.held_out) for source in self.sources), default=0)
        for number in range(most):
            for source in self.sources:
                if number < len(source.held_out):
                    row = source.held_out[number]
                    room -= least_length(row.num_columns, len(row.target), config.correct)
                    if room < 0 and found:
                        return found
                    found.append(row)
        return found


def specials_of(tokenizer: Tokenizer, end: str, vocab_size: int) -> Specials:
    """Return the ids of all tokens that a row has beside text.

    Raises:
        UserError: when the tokenizer lacks one, or the vocabulary ends before it.
    """
    return Specials(tokenizer.id(START), tokenizer.id(end), marks_of(tokenizer, vocab_size))


class Correction:
    """The stage that learns from pairs."""

    def plan(self, config: CorrectConfig) -> TrainingPlan:
        """Return the steps of a run and their learning rates; rows count as if they were full.

        Raises:
            UserError: when the schedule is impossible.
        """
        tokens = config.batch.global_tokens
        length = RowLength(config.data.seq_len, 1.0, ())
        schedule = build_schedule(config.schedule, tokens)
        phase = Phase("all", schedule.num_steps, tokens, (length,))
        return TrainingPlan(Timeline([phase]), (schedule,), (0,))

    def rehearse(self, config: CorrectConfig, plan: TrainingPlan) -> list[str]:
        """Open the pairs; returns lines about them.

        Raises:
            UserError: when they are unfit.
        """
        data = CorrectionData(config)
        check_end_of_text(config, data.tokenizer, is_chat=False)
        return data.describe()

    def build(
        self,
        config: CorrectConfig,
        plan: TrainingPlan,
        device: torch.device,
        peak_flops: float,
        ranks: Ranks,
    ) -> Setup:
        """Open the pairs, and build the trainer.

        Raises:
            UserError: when they are unfit.
        """
        data = CorrectionData(config)
        check_end_of_text(config, data.tokenizer, is_chat=False)
        if config.data.verify_checksums:
            verify_checksums(data.streams, ranks)
        dims = resolve_dims(config.parallel, ranks.world)
        batches = PairBatches(
            config,
            data.sources,
            data.specials,
            reader=MeshCoordinate(ranks.rank, dims).batch,
            num_readers=dims.batch,
        )
        auxiliary = Auxiliary(config.loss, 0, bool(config.model.moe_layers))
        objective = CorrectObjective(config.correct, auxiliary, data.specials.marks)
        local = build_local(config, device, ranks)
        trainer = Trainer(config, local, objective, batches, plan, device, peak_flops, ranks)
        validation = Validation(config, data, local, ranks)
        return Setup(trainer, data, validation if data.held_out else None)


@dataclass(frozen=True)
class Validation:
    """Corrects held-out pairs with the model in training."""

    config: CorrectConfig
    data: CorrectionData
    local: LocalModel
    ranks: Ranks

    def __call__(self) -> dict[str, float]:
        """Return error rates; of kind soft also the threshold, which the run then keeps."""
        own = self.data.held_out[self.ranks.rank :: self.ranks.world]
        values: dict[str, float] = {}
        with whole_model(self.local, self.ranks) as model:
            threshold = self.config.correct.threshold
            if self.config.correct.kind == "soft" and threshold is None:
                never = self._corrector(model, NOTHING)
                marks = self.data.specials.marks
                found = list(judged(own, correct_rows(never, own), marks))
                every = [pair for part in self.ranks.gather(found) for pair in part]
                best = find_threshold(every)
                threshold = best.value
                values = {"validation/threshold": best.value, "validation/detection_f1": best.f1}
                if self.ranks.is_first:
                    write_threshold(self.config.run_path, best.value)
            corrector = self._corrector(model, threshold or 0.0)
            errors = self._errors(corrector, own)
        return errors.metrics() | values

    def _corrector(self, model: HybridLM, threshold: float) -> Corrector:
        tokenizer = self.data.tokenizer
        known = tokenizer.vocab_size, tokenizer.special_ids
        allowed = text_ids(self.config.model.vocab_size, *known).to(self.local.device)
        options, specials = self.config.correct, self.data.specials
        return Corrector(model, options, specials, allowed, threshold)

    def _errors(self, corrector: Corrector, own: Sequence[PairRow]) -> Errors:
        marks = self.data.specials.marks
        answers, longest = correct_rows(corrector, own), self.config.correct.max_duration
        found = sum(
            (
                errors_of(row, answer, marks, longest)
                for row, answer in zip(own, answers, strict=True)
            ),
            Errors(),
        )
        return sum(self.ranks.gather(found), Errors())


def read_threshold(run: Path, options: CorrectOptions) -> float:
    """Return the threshold of a run: that of its recipe, or the one that an evaluation found.

    Raises:
        UserError: when there is none.
    """
    if options.threshold is not None:
        return options.threshold
    path = RunFiles(run).threshold
    try:
        value = float(parse_json(read_regular(path))["threshold"])
    except FileNotFoundError:
        raise UserError(
            "has found no threshold, because no pairs were held out; give --threshold.",
            where=str(run),
        ) from None
    except (ValueError, KeyError, TypeError):
        value = math.nan
    if not value <= 0:
        raise UserError("is damaged; give --threshold.", where=str(path))
    return value


def write_threshold(run: Path, value: float) -> None:
    """Keep the threshold in the folder of a run."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(RunFiles(run).threshold, {"threshold": value})
