"""Sections of a reinforcement-learning recipe."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from nemotron.errors import RuleBroken
from nemotron.limits import MOST_TASKS
from nemotron.posttrain.loss_config import FurtherLossConfig, further_tuning
from nemotron.section import Section
from nemotron.train.config import RunConfig, TuneConfig


class AdvantageConfig(Section):
    """How the reward of an answer is compared with those of the others."""

    baseline: Literal["group", "loo", "none"] = "loo"
    """What is taken off: the mean of all answers to the prompt, of the other ones, or nothing."""
    scale: Literal["group", "loo", "mean", "batch", "none"] = "loo"
    """What it is divided by: the standard deviation of all answers to the prompt or of the other
    ones, the mean of all (MaxRL), the deviation over the whole batch (REINFORCE++), or nothing."""
    clamp: float | None = Field(None, gt=0)
    """Largest size of an advantage; absent: no limit."""


class CorrectionConfig(Section):
    """How answers of a rollout policy that differs from the trainer's are weighed.

    The weight of a token is its probability under the trainer's weights before the update, over
    the probability with which it was sampled.
    """

    kind: Literal["none", "is", "tis", "icepop", "seq-mask-tis"] = "tis"
    """none: weight 1; is: as it is; tis: clamped to the bounds; icepop: 0 outside them;
    seq-mask-tis: as it is, but 0 for answers whose geometric mean lies outside them."""
    min: float | None = Field(None, ge=0)
    """Lower bound; absent: 0."""
    max: float | None = Field(5.0, gt=0)
    """Upper bound; absent: none."""
    max_sequence_error: float | None = Field(2.0, gt=1)
    """Answers whose mean `exp |log trainer - log sampled|` is above this are left out."""
    max_prob_error: float | None = Field(1.05, gt=1)
    """The run stops at a rollout batch for which the mean over all tokens
    (`rl/token_mult_prob_error`) is above this, before it learns from it; half as far from 1, it
    warns. Absent: it goes on."""

    @model_validator(mode="after")
    def _check(self) -> "CorrectionConfig":
        if self.max is not None and (self.min or 0) > self.max:
            raise RuleBroken("min", f"is above max = {self.max}; lower it", self.min)
        return self


class PolicyConfig(Section):
    """The policy loss of each token, and how tokens are averaged."""

    kind: Literal["ppo", "gspo", "cispo", "reinforce"] = "ppo"
    """ppo: clipped ratio of each token (GRPO, DAPO); gspo: clipped ratio of each answer; cispo:
    log-probability times the clipped ratio; reinforce: log-probability, without a ratio."""
    on_policy: bool = False
    """Whether the ratio is 1 by definition, for one update per rollout batch."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """The ratio is clipped from below at 1 minus this."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio is clipped from above at 1 plus this."""
    dual_clip: float | None = Field(None, gt=1)
    """Largest loss of a token of a bad answer, in units of its advantage; absent: no limit."""
    average: Literal["token", "sequence"] = "token"
    """What has equal weight: every token of the batch (DAPO), or every answer (GRPO's paper)."""
    kl_coefficient: float = Field(0.0, ge=0)
    """Factor of the divergence from the weights that the run began with, those of `init_from`; each
    rank then holds all of them once more."""
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that divergence (Schulman 2020)."""
    correction: CorrectionConfig = CorrectionConfig()
    """Difference between the rollout policy and the trainer's."""

    @model_validator(mode="after")
    def _check(self) -> "PolicyConfig":
        if self.kind == "gspo" and self.average != "sequence":
            rule = "has one ratio for each answer; use average: sequence"
            raise RuleBroken("kind", rule, self.kind)
        if self.kind == "cispo" and self.average != "token":
            raise RuleBroken("kind", "weighs tokens; use average: token", self.kind)
        return self


class EnvironmentConfig(Section):
    """One environment, and how often its tasks come."""

    name: str = Field(min_length=1)
    """Name of a built-in environment, or of one on the server that `options.url` names."""
    label: str | None = Field(None, min_length=1)
    """Name of its tasks in rollouts, metrics and evaluations; absent: `name`. Where one environment
    stands twice, with other options, each entry needs its own."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What the environment is made with, such as the address of a server."""
    weight: float = Field(1.0, gt=0)
    """Share of the prompts, relative to the other environments."""
    level: Annotated[float, Field(ge=0)] = 0.0
    """Difficulty of the tasks, from 0 to the highest level of the environment."""

    @property
    def title(self) -> str:
        """Name of its tasks."""
        return self.label or self.name


class CurriculumConfig(Section):
    """How tasks become harder as the policy learns.

    The pass rate of a task is the mean reward of its answers, between 0 and 1.
    """

    raise_at: float = Field(0.8, gt=0, le=1)
    """Pass rate of an environment's newest level at which the next one is added to it."""
    step: float = Field(1.0, gt=0)
    """Distance of one level from the next; the first is that of the environment."""
    max_level: float = Field(10.0, gt=0)
    """Highest level; an environment whose own highest level is lower ends there."""
    window: int = Field(64, gt=0)
    """Newest tasks of a level over which its pass rate is the mean; fewer decide nothing."""
    least_weight: float = Field(0.1, gt=0, le=1)
    """How often a level or task that is always or never solved comes, relative to one that is
    solved half the time; in between, pass rate p has weight 4 p (1 - p)."""


class RolloutConfig(Section):
    """What the policy is asked in each rollout batch, and how it answers."""

    environments: Annotated[tuple[EnvironmentConfig, ...], Field(strict=False, min_length=1)] = (
        EnvironmentConfig(name="arith_chain"),
    )
    """Where the prompts come from."""
    curriculum: CurriculumConfig | None = None
    """Levels that rise with the pass rate, and tasks that come less often when they teach nothing.
    Absent: levels stay. Held-out tasks have the first level in any case."""
    num_prompts_per_step: int = Field(gt=0)
    """Prompts of one rollout batch."""
    num_generations_per_prompt: int = Field(gt=1)
    """Answers to each prompt."""
    updates_per_step: int = Field(1, gt=0)
    """Optimizer steps on each rollout batch, each on an equal share of its answers."""
    max_new_tokens: int = Field(gt=0)
    """Longest answer, its end included."""
    temperature: float = Field(1.0, gt=0)
    """Temperature at which answers are sampled and scored."""
    prompt: Literal["chat", "text"] = "chat"
    """How a prompt is written: in the chat format, or as the text of its last message alone."""
    enable_thinking: bool = True
    """Whether the chat format asks for reasoning."""
    reasoning_budget: int | None = Field(None, ge=0)
    """Tokens after which reasoning is closed at the next end of a line; the closing tag is then not
    an action of the policy, and has no loss. Absent: only `max_new_tokens` ends it."""
    reasoning_grace: int = Field(0, ge=0)
    """Tokens beyond the budget after which it is closed in the middle of a line."""
    stop: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Strings that end an answer, beside the end of text or of the turn."""
    max_turns: int = Field(16, gt=0)
    """Answers in one conversation with tools, which ends with the calls of the last one. Each
    answer has at most `max_new_tokens`; all of it fits into a row of `data.seq_len`."""
    lag: int = Field(0, ge=0, le=1)
    """Rollout batches between the weights that answer and those that learn. 1: a thread answers the
    next batch while this one is learned from, with the weights as they were before; it has a copy
    of them. `policy.correction` weighs what they differ by. 0: rollouts and updates alternate."""
    in_flight_weight_updates: bool = False
    """Whether answers that are written ahead go on with new weights: after so many of its tokens
    each one waits for the next optimizer step, and all that follow the last step of the batch
    before it are written with the newest weights. Needs `lag`."""
    tokens_per_weight_update: int | None = Field(None, gt=0)
    """Tokens of an answer that are written with the same weights, those of all its turns counted.
    Absent: `max_new_tokens` over one more than `updates_per_step`, rounded up."""
    recompute_kv_cache_after_weight_updates: bool = True
    """Whether new weights read an answer again from its prompt on. Otherwise it goes on from the
    keys, values and Mamba states of the old ones, which are kept for every answer of the batch; a
    checkpoint does not hold them, so that answers are read again after each."""
    slots: int = Field(64, gt=0)
    """Answers that are written at the same time on each rank."""
    router_replay: bool = True
    """Whether the trainer sends each token to the experts that it went to when it was sampled,
    weighed by the router's scores of now. Without it a rounding may choose others."""
    truncated: Literal["keep", "mask"] = "mask"
    """Whether answers that reached `max_new_tokens` are learned from. They are compared with the
    others in any case."""
    verify_workers: int = Field(1, gt=0)
    """Processes that verify answers, on each rank."""
    verify_timeout_s: float = Field(10.0, gt=0)
    """Longest time for the verdict on an answer, or for the calls of one turn; what takes longer is
    stopped, and the answer left out."""
    evaluation_tasks: int = Field(64, gt=0, le=MOST_TASKS)
    """Prompts of each evaluation, answered once without randomness."""
    held_out_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the tasks that only evaluations ask; a hash of the prompt decides on each. 0:
    evaluations draw tasks anew, some of which training may have asked where there are few."""

    @property
    def tokens_with_same_weights(self) -> int:
        """Tokens of an answer after which it waits for new weights."""
        given = self.tokens_per_weight_update
        return given or -(-self.max_new_tokens // (self.updates_per_step + 1))

    @model_validator(mode="after")
    def _check(self) -> "RolloutConfig":
        titles = [entry.title for entry in self.environments]
        for title in titles:
            if titles.count(title) > 1:
                raise RuleBroken(
                    "environments",
                    f"names {title} twice; give each a label of its own, or mix two levels by one "
                    "such as 1.5",
                )
        return self


class RlConfig(RunConfig):
    """Everything that makes one reinforcement-learning run."""

    stage: Literal["rl"] = "rl"
    """Kind of training."""
    rollout: RolloutConfig
    """Prompts and answers."""
    teacher: str | None = None
    """Run, checkpoint or exported folder to learn from in place of rewards (on-policy
    distillation): the advantage of a token is its log-probability for the teacher minus that for
    the policy. Each rank holds all of it. Absent: rewards decide."""
    advantage: AdvantageConfig = AdvantageConfig()
    """Comparison of rewards."""
    policy: PolicyConfig = PolicyConfig()
    """Loss of the answers."""
    loss: FurtherLossConfig = FurtherLossConfig(moe_aux_loss_coeff=0.0, mtp_detach_heads=True)
    """Weights of the other terms."""
    tune: TuneConfig = TuneConfig()
    """Which parameters are trained."""

    @property
    def num_depths(self) -> int:
        """Depths of multi-token prediction that are trained: none without such a block."""
        return self.loss.mtp_num_depths if self.model.mtp_pattern else 0

    @property
    def tuning(self) -> TuneConfig:
        """What `tune` says; a block for prediction further ahead that is not unrolled is frozen."""
        return further_tuning(self, self.num_depths, self.tune)

    @property
    def rows_per_update(self) -> float:
        """Answers of an optimizer step; whole for a recipe without contradictions."""
        rollout = self.rollout
        answers = rollout.num_prompts_per_step * rollout.num_generations_per_prompt
        return answers / rollout.updates_per_step
