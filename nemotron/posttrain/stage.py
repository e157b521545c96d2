"""Reinforcement learning as a stage: the trainer's own loop, on answers of the model itself."""

import torch

from nemotron.data.mixture import Phase, RowLength, Timeline
from nemotron.parallel.runtime import Ranks
from nemotron.posttrain.batches import RolloutBatches
from nemotron.posttrain.config import RlConfig
from nemotron.posttrain.objective import PolicyObjective
from nemotron.posttrain.replay import describe
from nemotron.posttrain.rollout import Sampler
from nemotron.posttrain.tasks import Tasks
from nemotron.posttrain.teacher import load_reference, load_teacher
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.build import build_local
from nemotron.train.schedule import TrainingPlan, build_schedule
from nemotron.train.setup import Setup, check_end_of_text
from nemotron.train.trainer import Trainer


class Reinforcement:
    """The stage that learns from rewards."""

    def plan(self, config: RlConfig) -> TrainingPlan:
        """Return the steps of a run and their learning rates; rows count as if they were full.

        Raises:
            UserError: when the schedule is impossible.
        """
        tokens = config.batch.global_tokens
        schedule = build_schedule(config.schedule, tokens)
        length = RowLength(config.data.seq_len, 1.0, ())
        phase = Phase("all", schedule.num_steps, tokens, (length,))
        return TrainingPlan(Timeline([phase]), (schedule,), (0,))

    def rehearse(self, config: RlConfig, plan: TrainingPlan) -> list[str]:
        """Make the environments and their held-out prompts; returns lines about them.

        Raises:
            UserError: when an environment is unknown, cannot run here or has prompts that are too
                long, when the model's end of text is not that of the answers, or when the teacher
                is absent or has another vocabulary.
        """
        tasks = Tasks(config)
        check_end_of_text(config, tasks.tokenizer, is_chat=tasks.is_chat)
        tasks.held_out()
        if config.teacher:
            load_teacher(config, tasks.tokenizer, torch.device("cpu"))
        return [*tasks.describe(), *describe(config)]

    def build(
        self,
        config: RlConfig,
        plan: TrainingPlan,
        device: torch.device,
        peak_flops: float,
        ranks: Ranks,
    ) -> Setup:
        """Make the environments and the verifiers, and build the trainer.

        Raises:
            UserError: when an environment is unknown, cannot run here or has prompts that are too
                long, or when the model's end of text is not that of the answers.
        """
        tasks = Tasks(config)
        check_end_of_text(config, tasks.tokenizer, is_chat=tasks.is_chat)
        tasks.held_out()  # prompts that do not fit are found before anything is computed
        verifiers = tasks.verifiers()
        sampler = Sampler(config, tasks, verifiers)
        local = build_local(config, device, ranks)
        reference = load_reference(config, device)
        teacher = load_teacher(config, tasks.tokenizer, device) if config.teacher else None
        batches = RolloutBatches(
            config,
            tasks,
            sampler,
            local,
            ranks,
            num_steps=plan.num_steps,
            reference=reference,
            teacher=teacher,
        )
        auxiliary = Auxiliary(config.loss, config.num_depths, bool(config.model.moe_layers))
        objective = PolicyObjective(config.policy, auxiliary, config.rollout.temperature)
        trainer = Trainer(config, local, objective, batches, plan, device, peak_flops, ranks)

        def close() -> None:
            batches.close()  # its thread needs the verifiers
            verifiers.close()

        return Setup(trainer, tasks, batches.evaluate, close)
