"""The trainer's own sections, and the configuration of a whole run of a stage."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from nemotron.data.config import BlendConfig, DataConfig, LengthConfig, check_lengths
from nemotron.errors import RuleBroken
from nemotron.limits import MOST_SAMPLES, MOST_TASKS
from nemotron.model.config import MTP_DEPTHS, ModelConfig
from nemotron.ops.config import RECOMPUTED, OpsConfig, Recomputed
from nemotron.parallel.config import ParallelConfig
from nemotron.precision.config import PrecisionConfig
from nemotron.section import Section

LayerKind = Literal["mamba", "attention", "moe", "mlp"]
"""Kinds of layers, as `LAYER_KINDS` names them."""

LENGTHS = ("total", "warmup", "decay")
"""Lengths of a schedule, each of which is given in one unit."""


def length_keys(length: str) -> list[str]:
    """Return the keys of `ScheduleConfig` that give a length, one for each of its units."""
    keys = [f"{length}_{unit}" for unit in ("tokens", "steps", "fraction")]
    return [key for key in keys if key in ScheduleConfig.model_fields]


class BatchConfig(Section):
    """How many tokens make one optimizer step, and how many rows are computed at once."""

    global_tokens: int = Field(gt=0)
    """Tokens of one optimizer step."""
    micro_batch: int = Field(1, gt=0)
    """Rows computed at a time; changes memory and speed, not which rows a step sees."""


class MuonConfig(Section):
    """How Muon updates matrices."""

    momentum: float = Field(0.95, ge=0, lt=1)
    """Decay rate of the average of the gradients."""
    nesterov: bool = True
    """Whether the newest gradient counts once more."""
    steps: int = Field(5, gt=0, lt=100)
    """Newton-Schulz iterations that make the update orthogonal."""
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Size of an update: as AdamW's, so that both have one learning rate, or as first published."""


class OptimizerConfig(Section):
    """Update rule, gradient clipping and the router's bias."""

    name: Literal["adamw", "muon"] = "adamw"
    """Update rule. muon: the matrices inside layers, each expert's by itself, are updated by Muon,
    and embedding, head, convolutions and vectors by AdamW."""
    muon: MuonConfig = MuonConfig()
    """Settings of Muon."""
    kernel: Literal["torch", "triton"] = "torch"
    """AdamW's implementation: torch's fused one; triton: ours, on a GPU."""
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.95)
    """Decay rates of the two moments of AdamW."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Decay of matrices and convolution weights; vectors are never decayed."""
    clip: float | None = Field(1.0, gt=0)
    """Largest global gradient norm; absent: no clipping."""
    router_bias_update_rate: float = Field(1e-3, ge=0)
    """Step of the router's correction bias, once per optimizer step."""

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise RuleBroken("betas", "must lie in [0, 1)", list(self.betas))
        return self


class ScheduleConfig(Section):
    """Learning rate over training; every length in tokens, in steps or as a share of the run."""

    kind: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """Shape: warm-up then stable then decay, or decay from the end of the warm-up, or none."""
    peak: float = Field(gt=0)
    """Highest learning rate."""
    min: float = Field(0.0, ge=0)
    """Learning rate at the end of the decay."""
    total_tokens: float | None = Field(None, gt=0)
    """Length of the run, in tokens."""
    total_steps: int | None = Field(None, gt=0)
    """Length of the run, in optimizer steps, whatever their size in each phase."""
    warmup_tokens: float | None = Field(None, ge=0)
    """Length of the linear warm-up from zero, in tokens."""
    warmup_steps: int | None = Field(None, ge=0)
    """Length of the linear warm-up from zero, in optimizer steps."""
    warmup_fraction: float | None = Field(None, ge=0, le=1)
    """Length of the linear warm-up from zero, as a share of the run's length."""
    decay_tokens: float | None = Field(None, gt=0)
    """Length of the final decay (kind wsd), in tokens."""
    decay_steps: int | None = Field(None, gt=0)
    """Length of the final decay (kind wsd), in optimizer steps."""
    decay_fraction: float | None = Field(None, gt=0, le=1)
    """Length of the final decay (kind wsd), as a share of the run's length."""
    decay: Literal["minus_sqrt", "linear", "cosine", "exponential"] = "minus_sqrt"
    """Shape of the final decay (kind wsd)."""


class PhaseConfig(Section):
    """A stretch of the run; what it leaves out is as in the rest of the recipe."""

    name: str = Field(min_length=1)
    """Label in logs."""
    tokens: float | None = Field(None, gt=0)
    """Length in tokens, whole steps; absent in the last one: to the end of the schedule."""
    steps: int | None = Field(None, gt=0)
    """Length in optimizer steps."""
    blend: BlendConfig | None = None
    """What is read, in which proportion; in a recipe also the path of a blend file."""
    seq_len: int | None = Field(None, gt=1)
    """Tokens in a row."""
    lengths: Annotated[tuple[LengthConfig, ...], Field(strict=False)] = ()
    """Lengths of row that alternate from step to step."""
    global_tokens: int | None = Field(None, gt=0)
    """Tokens of one optimizer step."""
    schedule: ScheduleConfig | None = None
    """Learning rate over this phase alone; absent: the run's schedule goes on."""

    @model_validator(mode="after")
    def _check(self) -> "PhaseConfig":
        check_lengths(self.lengths)
        if self.lengths and self.seq_len is not None:
            raise RuleBroken("seq_len", "and lengths are both given; keep one of them")
        total = self.schedule and (self.schedule.total_tokens or self.schedule.total_steps)
        if total:
            raise RuleBroken(
                "schedule", "has a total length; remove it, the phase's own length counts"
            )
        return self


class LossConfig(Section):
    """Weights of the terms beside next-token cross entropy."""

    moe_aux_loss_coeff: float = Field(1e-4, ge=0)
    """Factor of the sequence-level load-balancing loss, per mixture layer."""
    mtp_num_depths: int = Field(MTP_DEPTHS, gt=0)
    """How many tokens ahead the multi-token-prediction block is unrolled in training."""
    mtp_loss_factor: float = Field(0.3, ge=0)
    """Factor of the mean multi-token-prediction loss over depths."""
    mtp_detach_heads: bool = False
    """Whether the multi-token-prediction loss leaves trunk, embedding and head untouched."""
    lid_coeff: float = Field(0.1, ge=0)
    """Factor of the cross entropy of the gate over languages (model.language_experts)."""
    lid_oracle_steps: int = Field(0, ge=0)
    """First steps in which the known language of a token chooses its experts, not the gate."""


class SuitesConfig(Section):
    """Tasks that the model answers during training, to see what it can do."""

    names: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Suites, or environments with their level behind an @, such as arithmetic or mcqa@2."""
    every_steps: int | None = Field(None, gt=0)
    """Optimizer steps between evaluations; absent: only at the end."""
    tasks: int = Field(32, gt=0, le=MOST_TASKS)
    """Rows of each task, the same every time."""
    samples: int = Field(1, gt=0, le=MOST_SAMPLES)
    """Answers to each row."""
    temperature: float = Field(0.0, ge=0)
    """Temperature of the answers; 0 takes the likeliest token."""
    max_new_tokens: int = Field(128, gt=0)
    """Longest answer, its end included."""
    prompt: Literal["auto", "chat", "text"] = "auto"
    """How a task is written; auto: in the chat format if the run learns conversations."""
    enable_thinking: bool = True
    """Whether the chat format asks for reasoning."""
    stop: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Strings that end an answer, beside the end of text or of the turn."""
    slots: int = Field(32, gt=0)
    """Answers that are written at the same time on each rank."""

    @model_validator(mode="after")
    def _check(self) -> "SuitesConfig":
        if self.samples > 1 and not self.temperature:
            rule = "are all the same at temperature 0; raise the temperature, or use 1"
            raise RuleBroken("samples", rule, self.samples)
        return self


class EvaluationConfig(Section):
    """Validation during training."""

    every_steps: int | None = Field(None, gt=0)
    """Optimizer steps between validations; absent: only at the end."""
    tokens: int = Field(65536, gt=0)
    """Tokens evaluated, shared over the sources."""
    suites: SuitesConfig = SuitesConfig()
    """Tasks to answer."""


class CheckpointConfig(Section):
    """When the run is saved and how many checkpoints stay."""

    every_steps: int | None = Field(None, gt=0)
    """Optimizer steps between checkpoints; absent: only at the end or when stopped."""
    keep: int = Field(3, ge=2)
    """Newest checkpoints kept; at least two, so that a damaged one has a predecessor."""
    background: bool = False
    """Whether checkpoints are written beside training, from a copy in the host's memory."""


class StopConfig(Section):
    """When a start of the run saves and stops before the end of its schedule, with exit code 75.

    A start does at least one step; the same command with --resume continues the run.
    """

    after_minutes: float | None = Field(None, gt=0)
    """Minutes after the start of training, loading and waiting for other ranks included, from which
    the run stops at the end of a step; absent: no limit. Leave time for a step, an evaluation and
    the saving."""
    every_steps: int | None = Field(None, gt=0)
    """The run stops whenever the number of its steps is a multiple of this; absent: never."""


class LoggingConfig(Section):
    """What mirrors metrics.jsonl."""

    trackers: Annotated[
        tuple[Literal["wandb", "tensorboard", "trackio"], ...], Field(strict=False)
    ] = ()
    """Mirrors of the metrics; metrics.jsonl is always written."""
    project: str = Field("nemotron", min_length=1)
    """Project name in the trackers."""
    every_steps: int = Field(1, gt=0)
    """Optimizer steps between lines in metrics.jsonl and on the screen."""


class ProfileConfig(Section):
    """Steps whose time and memory are recorded, by PyTorch's profiler."""

    steps: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(strict=False)] = ()
    """Steps to record, as metrics count them, from 1; none: nothing is recorded."""
    ranks: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1)] = (
        0,
    )
    """Ranks that record."""
    memory: bool = False
    """Whether allocations are recorded too; on a GPU also a snapshot of its memory."""


class FaultConfig(Section):
    """A fault that is injected on purpose, to see how the run reacts."""

    kind: Literal["nan_gradient", "spike", "sleep", "hang", "kill", "raise", "flip_bit"]
    """A gradient that is NaN, gradients far too large, a pause, a rank that waits for ever, one
    that dies, one that fails, one bit of a tensor."""
    step: int = Field(gt=0)
    """Step in which it happens, as metrics count them, from 1."""
    last_step: int | None = Field(None, gt=0)
    """Last step in which it happens; absent: in one only."""
    rank: int | None = Field(None, ge=0)
    """Rank to which it happens; absent: all."""
    seconds: float = Field(1.0, gt=0)
    """Length of the pause (kind sleep)."""
    tensor: str | None = None
    """Parameter or buffer that is changed (kind flip_bit); absent: the first parameter."""


class ReliabilityConfig(Section):
    """What is watched, and what happens to steps, ranks and replicas that go wrong."""

    spike_sigmas: float | None = Field(None, gt=0)
    """Standard deviations above the mean of 128 updates from which a loss or gradient norm is a
    spike, whose update is skipped; absent: a loss 6 above it is reported, and nothing skipped."""
    rollback_after: int | None = Field(None, gt=0)
    """Skipped steps within `rollback_window` after which the run goes back to a checkpoint before
    the first of them, and then passes over the data from the first to the last."""
    rollback_window: int = Field(128, gt=0)
    """Steps over which skipped ones are counted."""
    check_replicas_every_steps: int | None = Field(None, gt=0)
    """Steps between comparisons of the tensors that several ranks hold alike; they are also
    compared before each checkpoint. Absent: never."""
    deterministic: bool = False
    """Whether only operations run that give the same bits every time, slower on a GPU."""
    straggler_factor: float | None = Field(1.2, gt=1)
    """A rank is reported whose own time is so many times the median; absent: nothing measured."""
    straggler_after: int = Field(3, gt=0)
    """Intervals of logging in a row that it must be slow for."""
    faults: Annotated[tuple[FaultConfig, ...], Field(strict=False)] = ()
    """Faults to inject; for tests only."""


Part = Literal[
    "embed",
    "mamba",
    "attention",
    "mlp",
    "router",
    "experts",
    "shared",
    "latent",
    "head",
    "mtp",
    "correction",
    "language",
]
"""Parts of a model, as gradient norms are reported by."""


Role = Literal[
    "in_proj",
    "out_proj",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "mlp",
    "experts",
    "shared",
    "latent",
]
"""Roles of the layers of the backbone that an adapter can change; a router has none."""


class AdapterConfig(Section):
    """Low-rank adapters, which are trained in place of the weights."""

    kind: Literal["lora", "dora"] = "lora"
    """lora: a product of two narrow matrices is added; dora: rows get norms of their own, too."""
    rank: int = Field(16, gt=0)
    """Width between the two matrices."""
    alpha: float = Field(32.0, gt=0)
    """The product is multiplied by this over `rank`."""
    targets: Annotated[tuple[Role, ...], Field(strict=False)] = ()
    """Layers that get one, by their role; absent: all that the model has (dora: but experts)."""


class TuneConfig(Section):
    """Which parameters are trained."""

    freeze: Annotated[tuple[Part, ...], Field(strict=False)] = ()
    """Parts that stay as they are. A frozen router keeps its bias as well."""
    adapter: AdapterConfig | None = None
    """Adapters; with them all other parameters stay as they are."""


class RunConfig(Section):
    """What the recipe of every stage of training has."""

    version: Literal[1] = 1
    """Version of the recipe format."""
    stage: str
    """Kind of training."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)
    """Name of the run: its folder under `output`."""
    output: str = "runs"
    """Folder that holds the run's folder."""
    seed: int = Field(1234, ge=0, lt=2**63)
    """Seed of the initial weights and of the data order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes a GPU when there is one."""
    init_from: str | None = None
    """Run, checkpoint, exported folder or OWNER/NAME[@REVISION] of the Hub to start from."""
    recompute: (
        Literal["none", "block"]
        | Annotated[
            tuple[Literal[LayerKind, Recomputed, "selective"], ...],
            Field(strict=False, min_length=1),
        ]
    ) = "none"
    """What backward computes again to save memory: nothing, all blocks, those of some kinds of
    layers, results of some operations; `selective`: those of all operations that are cheap."""
    nonfinite_limit: int = Field(10, gt=0)
    """Consecutive skipped steps, not finite or spikes, that end the run."""
    model: ModelConfig
    """Architecture."""
    data: DataConfig = DataConfig()
    """Text and rows."""
    batch: BatchConfig
    """Tokens per step."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Update rule."""
    schedule: ScheduleConfig
    """Learning rate and length of the run."""
    precision: PrecisionConfig = PrecisionConfig()
    """Number formats."""
    ops: OpsConfig = OpsConfig()
    """Implementations."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout over processes."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""
    stop: StopConfig = StopConfig()
    """Stopping before the end."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Validation."""
    logging: LoggingConfig = LoggingConfig()
    """Trackers."""
    profile: ProfileConfig = ProfileConfig()
    """Recording of time and memory."""
    reliability: ReliabilityConfig = ReliabilityConfig()
    """Steps, ranks and replicas that go wrong."""

    @property
    def run_path(self) -> Path:
        """The run's folder."""
        return Path(self.output) / self.name

    @property
    def num_depths(self) -> int:
        """Depths of multi-token prediction that are trained."""
        return 0

    @property
    def tuning(self) -> TuneConfig:
        """Which parameters are trained."""
        return TuneConfig()

    def rows_at_once(self, seq_len: int, micro_batch: int | None = None) -> int:
        """Return the rows of a micro-batch: as many tokens as `micro_batch` of `data.seq_len`."""
        tokens = (micro_batch or self.batch.micro_batch) * self.data.seq_len
        return max(1, tokens // seq_len)

    def recomputes(self, kind: str) -> bool:
        """Say whether the activations of layers of this kind are computed again."""
        return self.recompute == "block" or kind in self.recompute

    @property
    def recomputed_operations(self) -> frozenset[Recomputed]:
        """Operations whose results are computed again, in blocks that are not as a whole."""
        if self.recompute == "block":
            return frozenset()
        named = RECOMPUTED.keys() if "selective" in self.recompute else self.recompute
        return frozenset(name for name in RECOMPUTED if name in named)

    @property
    def unshared_axes(self) -> tuple[str, ...]:
        """Axes of the mesh that must be 1, because no part of the objective is shared there."""
        return () if self.model.language_experts is None else ("pp",)


class TextConfig(RunConfig):
    """What the recipe of every stage has that learns from text, conversations included."""

    phases: Annotated[tuple[PhaseConfig, ...], Field(strict=False)] = ()
    """Stretches with another blend, length of row, batch or schedule; absent: all is one."""
    loss: LossConfig = LossConfig()
    """Weights of the loss terms."""

    @property
    def num_depths(self) -> int:
        """Depths of multi-token prediction that are trained: none without such a block."""
        return self.loss.mtp_num_depths if self.model.mtp_pattern else 0

    @property
    def knows_languages(self) -> bool:
        """Whether experts belong to languages, and the data says which tokens are of which."""
        return self.model.language_experts is not None and self.data.language_of != "none"


class PretrainConfig(TextConfig):
    """Everything that makes one pre-training run."""

    stage: Literal["pretrain"] = "pretrain"
    """Kind of training."""
