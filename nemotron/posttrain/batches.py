"""Rollouts as a source of batches: the policy's own answers, compared and scored."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.errors import UserError
from nemotron.files import write_text
from nemotron.model.hybrid import HybridLM
from nemotron.parallel.local import LocalModel
from nemotron.parallel.runtime import Ranks
from nemotron.posttrain.ahead import NUMBER, PAUSED, ROLLOUTS, RolloutsAhead, by_group
from nemotron.posttrain.config import RlConfig
from nemotron.posttrain.contents import KEY, check_contents, model_contents
from nemotron.posttrain.curriculum import Curriculum
from nemotron.posttrain.gather import whole_model
from nemotron.posttrain.grading import Grading, compare
from nemotron.posttrain.metrics import (
    CURRENT_ERROR,
    batch_metrics,
    check_agreement,
    current_error,
    mean_lag,
)
from nemotron.posttrain.objective import ADVANTAGE, OLD, REFERENCE, SAMPLED
from nemotron.posttrain.paused import PausedAnswers
from nemotron.posttrain.replay import Differences, Experts
from nemotron.posttrain.rollout import Draft, Rollout, Sampler, rollout_lines
from nemotron.posttrain.rows import Rows, pack_answers
from nemotron.posttrain.saved_rollouts import (
    AHEAD,
    BATCH,
    CURRICULUM,
    REPLAYED,
    check_saved,
    check_saved_ahead,
    read_differences,
    read_rollouts,
    refusing_damage,
)
from nemotron.posttrain.suites.examine import examine
from nemotron.posttrain.suites.results import summarize
from nemotron.posttrain.tasks import Tasks, held_out_drawing, held_out_items
from nemotron.run.files import RunFiles


class RolloutBatches:
    """Batches of a run whose text is written by the model in training.

    Every `updates_per_step` steps the ranks answer a new batch of tasks together; each of them
    knows all answers, and takes its share of the rows of every step. With `rollout.lag` a thread
    answers the next batch meanwhile, with the weights as they were before these steps; or, if
    weights are updated in flight, so many tokens of each answer with the weights of each step.
    """

    def __init__(
        self,
        config: RlConfig,
        tasks: Tasks,
        sampler: Sampler,
        local: LocalModel,
        ranks: Ranks,
        *,
        num_steps: int,
        reference: HybridLM | None = None,
        teacher: HybridLM | None = None,
    ) -> None:
        """`num_steps` is the length of the run.

        `reference` has the weights that the run began with, if the loss compares with them.
        """
        self._config, self._tasks, self._sampler = config, tasks, sampler
        self._local, self._ranks, self._num_steps = local, ranks, num_steps
        self._reference = reference
        self._eod_id = tasks.tokenizer.id(config.data.eod_token)
        self._contents = {
            **tasks.contents(),
            **model_contents("init_from", config.init_from, reference),
            **model_contents("teacher", config.teacher, teacher),
        }
        self._folder = RunFiles(config.run_path).rollouts
        self._experts = Experts.of(config)
        self._grading = Grading(
            config, local, ranks, self._eod_id, self._experts, reference, teacher
        )
        plan = config.rollout.curriculum
        highest = {title: own.max_level for title, own in tasks.environments.items()}
        self._curriculum = None if plan is None else Curriculum(plan, config.rollout, highest)
        self._paused = PausedAnswers(sampler, self._experts)
        self._ahead = RolloutsAhead(ranks, sampler, self._paused) if config.rollout.lag else None
        self._in_flight = config.rollout.in_flight_weight_updates
        self._number = -1
        """Number of the rollout batch at hand."""
        self._rollouts: list[Rollout] = []
        self._metrics: dict[str, float] = {}
        self._differences = Differences()
        """Between the experts of its answers and those that the trainer would have chosen."""
        self._seconds: dict[str, float] = {}
        """What the rollout batch at hand took; of the step that began with it."""

    def take(self, step: int) -> Batch:
        """Return this rank's rows of a step; first of all let the policy write them, if due."""
        updates = self._config.rollout.updates_per_step
        number, update = divmod(step, updates)
        if number != self._number:
            self._begin(number, step)
        elif update and self._in_flight and self._ahead is not None:
            self._ahead_with_new_weights(step, self._until(update))
        # the answers to one prompt are spread over the updates
        answers = self._rollouts[update::updates]
        readers = 1 if self._local.mesh is None else self._local.mesh.dims.batch
        rows = pack_answers(answers, self._config, readers)
        share = len(rows.answers) // readers
        return self._batch(rows.part(self._local.batch_rank * share, share))

    def state(self) -> dict[str, Any]:  # Any: nested JSON
        """Return the number of the rollout batch at hand, and its answers if some are left.

        Beside them stands what identifies files and models that the recipe names.
        """
        return {
            KEY: self._contents,
            BATCH: self._number,
            ROLLOUTS: [json.loads(rollout.as_line()) for rollout in self._rollouts],
            **({} if self._curriculum is None else {CURRICULUM: self._curriculum.state()}),
            **({} if self._ahead is None else {AHEAD: self._ahead.state()}),
            REPLAYED: asdict(self._differences),
        }

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """Go on after so many steps, with the answers that are not learned from yet.

        Raises:
            UserError: when the checkpoint is of another kind of run, or files or models changed.
        """
        check_saved(saved, step)
        check_contents(saved, self._contents, step)
        self._rollouts = self._read_rollouts(saved[ROLLOUTS], step)
        if self._curriculum is not None:
            try:
                self._curriculum.restore(saved.get(CURRICULUM))
            except ValueError as error:
                raise UserError(
                    f"rollout.curriculum cannot go on from the checkpoint of step {step}: {error}; "
                    "resume with the recipe of the run, or begin a new run with init_from."
                ) from None
        self._number = saved[BATCH]
        self._restore_ahead(saved.get(AHEAD), step)
        self._differences = read_differences(saved.get(REPLAYED, {}), step)
        self._metrics = self._figures() if self._rollouts else {}

    def _restore_ahead(self, saved: Any, step: int) -> None:  # Any: JSON
        """Take the rollouts of the next batch, if some were written.

        Raises:
            UserError: when they are none.
        """
        if self._ahead is None or saved is None:
            return
        check_saved_ahead(saved, step)
        if saved[NUMBER] in (None, self._number + 1):
            draft = (
                self._read_draft(saved[PAUSED], saved[NUMBER], step) if PAUSED in saved else None
            )
            rollouts = self._read_rollouts(saved[ROLLOUTS], step)
            self._ahead.restore(saved[NUMBER], rollouts, draft)

    def _read_draft(self, saved: list[Any], number: int, step: int) -> Draft:  # Any: JSON
        ranks, vocab_size = self._ranks, self._config.model.vocab_size
        with refusing_damage("the answers that wait", step):
            return self._paused.restore(
                saved, self._seed(number), ranks.rank, ranks.world, vocab_size
            )

    def _read_rollouts(self, saved: list[Any], step: int) -> list[Rollout]:  # Any: JSON
        return read_rollouts(saved, step, self._config.model.vocab_size, self._experts)

    def metrics(self, step: int) -> dict[str, float]:
        """Return the figures of the rollout batch of the last of so many steps.

        Its seconds stand beside them only if that step began with it.
        """
        begins = (step - 1) % self._config.rollout.updates_per_step == 0
        return self._metrics | (self._seconds if begins else {})

    def evaluate(self) -> dict[str, float]:
        """Return the mean reward of the likeliest answers to held-out tasks, by environment."""
        if self._ahead is not None:
            self._ahead.wait()
        ranks, drawing = self._ranks, held_out_drawing(self._config)
        items = held_out_items(self._tasks)[ranks.rank :: ranks.world]
        with whole_model(self._local, ranks) as model:
            own = examine(self._sampler.answerer(model), self._sampler.verifiers, items, drawing)
        samples = [sample for part in ranks.gather(own) for sample in part]
        means = {
            f"validation/{result.task}/reward": result.reward
            for result in summarize(samples)
            if result.reward is not None
        }
        judged = [s.verdict.reward for s in samples if s.verdict.error is None]
        return means | ({"validation/reward": float(np.mean(judged))} if judged else {})

    def _begin(self, number: int, step: int) -> None:
        """Roll out, verify, score and compare a batch; all ranks then have all of it."""
        start = time.perf_counter()
        written = None if self._ahead is None else self._take_ahead(self._ahead, number, step)
        self._rollouts = self._write(number, step) if written is None else written
        # what was written ahead to its end was judged ahead
        verify_s = self._sampler.verify_s if written is None or self._in_flight else 0.0
        rollout_s = time.perf_counter() - start - verify_s
        start = time.perf_counter()
        self._differences = self._grading.score(self._rollouts)
        compare(self._rollouts, self._config)
        score_s = time.perf_counter() - start
        self._number = number
        self._learn()
        self._metrics = self._figures()
        self._seconds = {
            "rl/rollout_s": rollout_s,
            "rl/verify_s": verify_s,
            "rl/score_s": score_s,
        }
        if self._ranks.is_first:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"step-{step:08}.jsonl"
            write_text(path, rollout_lines(self._rollouts))
        # tokens of other weights differ from the trainer by what was learned since
        if (error := current_error(self._rollouts, step, self._config)) is not None:
            check_agreement(error, self._config, step)
        self._go_ahead(number + 1, step)

    def _write(self, number: int, step: int) -> list[Rollout]:
        """Return the rollouts of a batch with the weights of now."""
        draft = self._draft(number)
        with whole_model(self._local, self._ranks) as model:
            self._sampler.write(draft, model, step)
        return by_group(self._ranks.gather(self._sampler.judge(draft)))

    def _go_ahead(self, number: int, step: int) -> None:
        """Let the thread write the rollouts of the next batch with the weights of now."""
        if self._ahead is None or number * self._config.rollout.updates_per_step >= self._num_steps:
            return
        draft, until = self._draft(number), self._until(0) if self._in_flight else None
        with whole_model(self._local, self._ranks, plain=True) as copy:
            self._ahead.begin(number, draft, copy, step, until)

    def _until(self, update: int) -> int:
        """Return how many tokens answers have before the weights after this update are needed."""
        return (update + 1) * self._config.rollout.tokens_with_same_weights

    def _ahead_with_new_weights(self, step: int, until: int | None) -> None:
        """Let the thread go on with the weights of now, if some answers are written ahead."""
        if self._ahead is not None and self._ahead.number is not None:
            with whole_model(self._local, self._ranks, plain=True) as copy:
                self._ahead.go_on(copy, step, until)

    def _take_ahead(self, ahead: RolloutsAhead, number: int, step: int) -> list[Rollout] | None:
        """Return the rollouts of a batch that were begun before, if any were, once all have ended.

        What answers still lack is written with the weights of now.
        """
        if self._in_flight:
            self._ahead_with_new_weights(step, None)
        return ahead.take(number)

    def _draft(self, number: int) -> Draft:
        """Return this rank's rollouts of a batch before they begin; the tasks are chosen."""
        tasks = list(enumerate(self._tasks.batch(number, self._curriculum)))
        return self._sampler.draft(tasks[self._ranks.rank :: self._ranks.world], self._seed(number))

    def _seed(self, number: int) -> str:
        return f"{self._config.seed} {number}"

    def close(self) -> None:
        """End the thread that writes ahead."""
        if self._ahead is not None:
            self._ahead.close()

    def _figures(self) -> dict[str, float]:
        figures = batch_metrics(self._rollouts, self._config) | self._differences.metrics()
        if self._ahead is not None:
            begin = self._number * self._config.rollout.updates_per_step
            figures["rl/lag"] = mean_lag(self._rollouts, begin)
            error = current_error(self._rollouts, begin, self._config)
            if self._in_flight and error is not None:
                figures[CURRENT_ERROR] = error
        return figures | ({} if self._curriculum is None else self._curriculum.metrics())

    def _learn(self) -> None:
        """Let the curriculum see how often each task was solved; faults say nothing."""
        if self._curriculum is None:
            return
        size = self._config.rollout.num_generations_per_prompt
        for first in range(0, len(self._rollouts), size):
            answers = self._rollouts[first : first + size]
            rewards = [a.verdict.reward for a in answers if a.verdict.error is None]
            if rewards:
                task = answers[0].task
                rate = float(np.mean(rewards))
                self._curriculum.learn(task.environment, task.level, task.row, rate)

    def _batch(self, rows: Rows) -> Batch:
        batch = rows.batch(self._eod_id, self._config.policy.average, self._experts)
        mask = batch.labels != NO_LABEL
        own = [rollout for answers in rows.answers for rollout in answers]
        found = {
            ADVANTAGE: {id(r): r.token_advantages for r in own},
            OLD: {id(r): r.old_logprobs for r in own},
            SAMPLED: {id(r): r.logprobs for r in own},
        }
        if self._reference is not None:
            found[REFERENCE] = {id(r): r.reference_logprobs for r in own}
        extras = {n: torch.where(mask, rows.line_up(values), 0) for n, values in found.items()}
        return replace(batch, extras=extras).look_ahead(self._config.num_depths)
