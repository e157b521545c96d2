"""Pre-training as a stage: text, its rows and its objective."""

import logging
from collections.abc import Sequence

import torch

from nemotron.data.config import MIXED
from nemotron.data.languages import Languages, ScriptLanguages, SourceLanguages
from nemotron.data.loader import TextBatches, TrainingData
from nemotron.data.rehearsal import rehearse
from nemotron.data.scripts import languages_by_script
from nemotron.model.language import UNKNOWN
from nemotron.parallel.dims import resolve_dims
from nemotron.parallel.runtime import Ranks
from nemotron.train.build import build_local
from nemotron.train.checksums import verify_checksums
from nemotron.train.config import TextConfig
from nemotron.train.layout import MeshCoordinate
from nemotron.train.loss import PretrainObjective
from nemotron.train.schedule import TrainingPlan, plan_training
from nemotron.train.setup import Setup, check_end_of_text
from nemotron.train.trainer import Trainer
from nemotron.train.validation import evaluate

log = logging.getLogger(__name__)


class Pretraining:
    """The stage that learns from text."""

    def plan(self, config: TextConfig) -> TrainingPlan:
        """Return the phases of a run and their learning rates.

        Raises:
            UserError: when they contradict each other.
        """
        return plan_training(config)

    def rehearse(self, config: TextConfig, plan: TrainingPlan) -> list[str]:
        """Open the text without writing into the cache; returns lines about it.

        Raises:
            UserError: when the text is unfit, or too short.
        """
        return rehearse_data(config, plan)

    def build(
        self,
        config: TextConfig,
        plan: TrainingPlan,
        device: torch.device,
        peak_flops: float,
        ranks: Ranks,
    ) -> Setup:
        """Open the text, and build its trainer.

        Raises:
            UserError: when the text is unfit, or too short.
        """
        data = open_data(config, plan, ranks)
        data.check_length()
        trainer = build_trainer(config, plan, data, device, peak_flops, ranks)
        has_held_out = bool(data.validation_domains)
        return Setup(trainer, data, (lambda: validate(trainer, data)) if has_held_out else None)


def rehearse_data(config: TextConfig, plan: TrainingPlan) -> list[str]:
    """Open the data of a run without writing into the cache; returns lines about it.

    Raises:
        UserError: when it is unfit, or too short.
    """
    return rehearse(
        config.data,
        plan.timeline,
        seed=config.seed,
        vocab_size=config.model.vocab_size,
        check=lambda tokenizer, is_chat: check_end_of_text(config, tokenizer, is_chat=is_chat),
    )


def open_data(config: TextConfig, plan: TrainingPlan, ranks: Ranks | None = None) -> TrainingData:
    """Open the data of a run; the ranks that train on it verify its checksums if it says so.

    Raises:
        UserError: when it is unfit.
    """
    data = TrainingData(
        config.data, plan.timeline, seed=config.seed, vocab_size=config.model.vocab_size
    )
    check_end_of_text(config, data.tokenizer, is_chat=data.has_conversations)
    if ranks is not None and config.data.verify_checksums:
        streams = [tokens.train for tokens in data.tokens.values()]
        verify_checksums([*streams, *data.held_out.values()], ranks)
    return data


def build_trainer(
    config: TextConfig,
    plan: TrainingPlan,
    data: TrainingData,
    device: torch.device,
    peak_flops: float,
    ranks: Ranks,
) -> Trainer:
    """Build what pre-trains: its objective, the rows that this rank reads, and the trainer."""
    objective = PretrainObjective.of(config)
    batches = text_batches(config, plan, data, device, ranks)
    local = build_local(config, device, ranks)
    return Trainer(config, local, objective, batches, plan, device, peak_flops, ranks)


def text_batches(
    config: TextConfig,
    plan: TrainingPlan,
    data: TrainingData,
    device: torch.device,
    ranks: Ranks,
) -> TextBatches:
    """Return the rows that this rank reads."""
    dims = resolve_dims(config.parallel, ranks.world)
    return TextBatches(
        config.data,
        data,
        reader=MeshCoordinate(ranks.rank, dims).batch,
        num_readers=dims.batch,
        num_steps=plan.num_steps,
        num_depths=config.num_depths,
        pin=device.type == "cuda",
        languages=_languages(config, plan, data) if config.knows_languages else None,
    )


def _languages(config: TextConfig, plan: TrainingPlan, data: TrainingData) -> Languages:
    """Return what says which language tokens are."""
    assert config.model.language_experts is not None, "asked before"
    known, oracle = config.model.language_experts.languages, config.loss.lid_oracle_steps
    if config.data.language_of == "source":
        return SourceLanguages(_by_source(known, plan), oracle)
    numbers = torch.full((config.model.vocab_size,), UNKNOWN)
    found = torch.from_numpy(languages_by_script(data.tokenizer, known))
    numbers[: len(found)] = found[: len(numbers)]
    return ScriptLanguages(numbers, oracle)


def _by_source(known: Sequence[str], plan: TrainingPlan) -> dict[str, int]:
    """Return the language of each source, and warn where no source has rows that switch."""
    sources = {leaf.source.name: leaf.source.language for leaf in plan.timeline.leaves}
    if MIXED not in sources.values():
        log.warning(
            "no source has language: %s, so that the gate never sees a switch of languages, and "
            "will be wrong after one",
            MIXED,
        )
    return {
        name: known.index(language) if language in known else UNKNOWN
        for name, language in sources.items()
    }


def validate(trainer: Trainer, data: TrainingData) -> dict[str, float]:
    """Return the metrics of the held-out text."""
    return evaluate(
        trainer.local,
        data,
        trainer.ranks,
        tokens=trainer.config.evaluation.tokens,
        rows=trainer.config.batch.micro_batch,
        progress=trainer.progress,
    )
