"""Suites while a model is trained: any stage, with tasks that the model answers now and then."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from nemotron.data.chat.template import TURN_END
from nemotron.data.tokenizer import Tokenizer, load_tokenizer
from nemotron.errors import UserError
from nemotron.files import write_text
from nemotron.parallel.runtime import Ranks
from nemotron.posttrain.answering import Answerer, Answering
from nemotron.posttrain.gather import whole_model
from nemotron.posttrain.prompts import Prompts
from nemotron.posttrain.suites.definition import PERPLEXITY, RULER, find_tasks
from nemotron.posttrain.suites.results import Result, summarize
from nemotron.posttrain.suites.samples import Sample
from nemotron.posttrain.suites.suites import Suites, SuiteSettings
from nemotron.posttrain.verify import Verifiers
from nemotron.run.files import RunFiles
from nemotron.train.config import RunConfig, SuitesConfig
from nemotron.train.schedule import TrainingPlan
from nemotron.train.setup import Setup, Stage
from nemotron.train.trainer import Trainer

KEY = "evaluation.suites.names"


class WithSuites:
    """A stage whose runs also answer the tasks of `evaluation.suites`."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def plan(self, config: RunConfig) -> TrainingPlan:
        """Return that of the stage.

        Raises:
            UserError: as the stage does.
        """
        return self._stage.plan(config)

    def rehearse(self, config: RunConfig, plan: TrainingPlan) -> list[str]:
        """Rehearse the stage, and make the tasks.

        Raises:
            UserError: as the stage does, or when a task is unknown or cannot run here.
        """
        lines = self._stage.rehearse(config, plan)
        suites = open_suites(config, load_tokenizer(config.data.tokenizer), _learns_chats(config))
        return [*lines, *(f"suite: {task.name}" for task in suites.tasks)]

    def build(
        self,
        config: RunConfig,
        plan: TrainingPlan,
        device: torch.device,
        peak_flops: float,
        ranks: Ranks,
    ) -> Setup:
        """Build the stage, and what answers the tasks.

        Raises:
            UserError: as the stage does, or when a task is unknown or cannot run here.
        """
        tokenizer = load_tokenizer(config.data.tokenizer)
        suites = open_suites(config, tokenizer, _learns_chats(config))
        setup = self._stage.build(config, plan, device, peak_flops, ranks)
        verifiers = suites.verifiers()
        folder = RunFiles(config.run_path).suites
        examination = Examination(setup.trainer, suites, verifiers, folder)

        def close() -> None:
            verifiers.close()
            setup.close()

        return dataclasses.replace(setup, examine=examination.run, close=close)


class Examination:
    """Answers the same rows each time, shared over the ranks."""

    def __init__(
        self, trainer: Trainer, suites: Suites, verifiers: Verifiers, folder: Path | None
    ) -> None:
        """`folder` gets the answers; None: nobody does."""
        self._trainer, self._suites, self._verifiers = trainer, suites, verifiers
        self._config: SuitesConfig = trainer.config.evaluation.suites
        self._folder = folder

    def run(self) -> dict[str, float]:
        """Return the metrics of the present weights; the first rank writes the answers."""
        trainer, ranks = self._trainer, self._trainer.ranks
        how = Answering(self._config.max_new_tokens, self._config.slots)
        samples: list[Sample] = []
        # a copy, since layers of the trained one may be quantized or have adapters
        with whole_model(trainer.local, ranks, plain=True) as model:
            answerer = Answerer(model.requires_grad_(False), self._suites.prompts, how)
            for group in self._suites.groups(self._config.slots):
                trainer.progress.move()
                items = self._suites.items(group)
                own = items[ranks.rank :: ranks.world]
                parts = ranks.gather(self._suites.answer(answerer, self._verifiers, own))
                found = [sample for part in parts for sample in part]
                samples += sorted(found, key=lambda sample: (sample.number, sample.sample))
        trainer.local.drop_gathered()
        if ranks.is_first and self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"step-{trainer.state.step:08}.jsonl"
            write_text(path, "".join(sample.as_line() for sample in samples))
        keys = {task.name: task.key for task in self._suites.tasks}
        return {k: v for r in summarize(samples) for k, v in metrics(keys[r.task], r).items()}


def metrics(key: str, result: Result) -> dict[str, float]:
    """Return a result as metrics; what is not known is absent."""
    values: dict[str, float | None] = {"reward": result.reward, "error": result.error}
    if result.samples > 1:
        values |= {f"pass@{k}": found.mean for k, found in result.pass_at.items()}
        values["majority"] = result.majority.mean if result.majority is not None else None
    values["answer_tokens"] = result.answer_tokens
    values["truncated"] = result.truncated
    values["verifier_faults"] = float(result.verifier_faults)
    return {f"suites/{key}/{name}": value for name, value in values.items() if value is not None}


def open_suites(config: RunConfig, tokenizer: Tokenizer, learns_chats: bool) -> Suites:
    """Return the tasks of a recipe.

    Raises:
        UserError: when one is unknown or cannot run here.
    """
    own = config.evaluation.suites
    for name in (RULER, PERPLEXITY):
        if name in own.names:
            rule = "is for finished models: nemotron evaluate --suite; remove it."
            raise UserError(rule, key=KEY, value=name)
    is_chat = learns_chats if own.prompt == "auto" else own.prompt == "chat"
    ends = [config.data.eod_token, *([TURN_END] if is_chat else [])]
    prompts = Prompts(
        tokenizer,
        frozenset(tokenizer.id(token) for token in ends),
        is_chat,
        own.enable_thinking,
        own.stop,
    )
    settings = SuiteSettings(own.tasks, own.samples, own.temperature, config.seed)
    try:
        tasks = find_tasks(own.names, config.data.tokenizer)
        return Suites(tasks, prompts, settings)
    except UserError as problem:
        if problem.finding.key != "suite":
            raise
        raise UserError.of(dataclasses.replace(problem.finding, key=KEY)) from None


def examined(trainer: Trainer, tokenizer: Tokenizer) -> dict[str, float]:
    """Return the metrics of the suites that a trainer's recipe names, and write nothing.

    Raises:
        UserError: when one is unknown or cannot run here.
    """
    suites = open_suites(trainer.config, tokenizer, _learns_chats(trainer.config))
    with suites.verifiers() as verifiers:
        return Examination(trainer, suites, verifiers, None).run()


def _learns_chats(config: Any) -> bool:  # Any: the configuration of any stage
    if config.stage == "rl":
        return bool(config.rollout.prompt == "chat")
    return config.stage in ("sft", "distill")
