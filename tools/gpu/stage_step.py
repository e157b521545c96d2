"""Stage 6: a training step of one GPU's share of Nano, with the project's model, loss, optimizer.

Variants: `auto`, what the project chooses; `named`, with kernels that a recipe must name; `before`,
torch's operations alone; number formats.
The time of all 52 layers follows from a block of each kind and the head, measured by themselves.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from kernels_of import host_waits, profile
from share import ROWS, WHOLE, balanced_experts, build, random_batch, share, tokens_of, torch_alone
from stage import Stage, data_sheet, parser
from torch import Tensor

from nemotron.model.flops import head_flops, layer_flops, training_flops_per_token
from nemotron.model.hybrid import HybridLM
from nemotron.model.moe import multiplied_weights
from nemotron.model.router import RoutingStats, routers
from nemotron.ops.apply import apply
from nemotron.ops.config import OpsConfig
from nemotron.plan.build import layout_of, main_stretch, read_setting
from nemotron.plan.hardware import find_hardware
from nemotron.plan.memory import memory
from nemotron.precision.apply import Quantization
from nemotron.precision.config import PrecisionConfig
from nemotron.sol.clock import Clock, repeat
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.config import TextConfig
from nemotron.train.kinds import kinds, parameter_kinds
from nemotron.train.loss import PretrainObjective, compute_sums
from nemotron.train.optimizer import Optimizer, clip_coefficient, squares_by_kind
from nemotron.train.schedule import plan_training

VARIANTS = ("auto", "named", "before", "fp8_current", "fp8_block", "mxfp8", "nvfp4")
LR = 1e-4
HELD_MS = 8.0
"""Longer than the host takes to queue a block forward and backward, which hides behind others."""
NAMED = OpsConfig(
    topk_routing="triton",
    balance_sums="triton",
    expert_order="triton",
    grouped_mlp="triton",
    residual_rms_norm="triton",
)
"""Kernels of a training step that have not run on a GPU; AdamW's is another."""
IN_A_ROW = 12
"""Steps without any wait between them but the trainer's own."""


class Training:
    """The share's model and what a step of the trainer does to it."""

    def __init__(self, config: TextConfig, stage: Stage, variant: str) -> None:
        self.config, self.clock, self.device = config, stage.clock, stage.device
        self.model: HybridLM = build(config.model, stage.device, torch.bfloat16)
        apply(self.model, config.ops)
        # a preset leaves two blocks at either end alone, which would be all of a small model
        is_small, preset = len(config.model.hybrid_override_pattern) < 8, _preset(variant)
        rules = [{"kind": "*", "format": preset}] if is_small and preset != "bf16" else []
        values = {"compute": "bf16", "preset": preset, "rules": rules}
        chosen = PrecisionConfig.model_validate(values)
        self.quantization = Quantization(self.model, chosen, 0)
        parameters, is_before = dict(self.model.named_parameters()), variant == "before"
        kernel = "triton" if variant == "named" else "torch"
        settings = config.optimizer.model_copy(update={"kernel": kernel})
        self.optimizer = Optimizer(parameters, settings)
        if not is_before:
            self.optimizer.keep_rounded(multiplied_weights(self.model), torch.bfloat16)
        self._kinds = kinds(config.model)
        self._kind_of = parameter_kinds(self.optimizer.parameters, config.model)
        self._routers = routers(self.model)
        self.tokens = tokens_of(stage.tiny)
        batches = [random_batch(config.model, ROWS, self.tokens, seed) for seed in range(3)]
        self.batches = [b.pin() if stage.clock.is_gpu else b for b in batches]
        # no batch is looked ahead, so that nothing but the next token is predicted
        self.objective = PretrainObjective(Auxiliary(config.loss, 0, bool(config.model.moe_layers)))
        self.counts = self.objective.counts(self.batches[0])
        self.loss = 0.0

    def step(self, number: int) -> list[Any]:
        """Do a step; return the marks before forward, backward, optimizer and at the end."""
        marks = [self.clock.mark()]
        self.quantization.begin(number, 0)
        self.optimizer.zero_grad()
        batch = self.batches[number % len(self.batches)].to(self.device)
        sums, routing = compute_sums(self.objective, self.model, batch)
        loss = self.objective.combine(sums, self.counts)
        marks.append(self.clock.mark())
        loss.backward()
        marks.append(self.clock.mark())
        squares = squares_by_kind(self.optimizer.gradients(), self._kind_of, self._kinds)
        # the host waits here once a step, as in the trainer
        self.loss, norm = torch.stack([loss.detach().double(), squares.sum().sqrt()]).tolist()
        self.optimizer.step(LR, clip_coefficient(norm, self.config.optimizer.clip))
        for stats in routing:
            self._routers[stats.name].update_bias(stats.counts, 1e-3)
        marks.append(self.clock.mark())
        return marks


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--variant", choices=VARIANTS, default="auto")
    options.add_argument("--once", action="store_true", help="a step of three layers, no times")
    stage = Stage("step", options.parse_args())
    variant = stage.options.variant
    if stage.options.once:
        with balanced_experts():
            Training(_three_layers(share(stage.tiny)), stage, _preset(variant)).step(0)
        return
    with balanced_experts(), stage.attempt(variant):
        _run(stage, variant)


def _run(stage: Stage, variant: str) -> None:
    config = share(stage.tiny)
    if variant == "before":
        config = config.model_copy(update={"ops": torch_alone(stage.device)})
    elif variant == "named":
        config = config.model_copy(update={"ops": NAMED})
    stage.clock.begin_peak()
    training = Training(config, stage, variant)
    static = stage.clock.peak_gib()
    for number in range(1 if variant == "before" else 2):
        stage.clock.milliseconds(training.step(number))
    stage.clock.begin_peak()
    few = variant == "before" or stage.tiny
    times = repeat(
        lambda number: stage.clock.milliseconds(training.step(number)),
        seconds=min(6.0, stage.left() / 5),
        at_least=1 if few else 3,
        at_most=1 if few else 12,
    )
    peak = stage.clock.peak_gib()
    in_a_row = _in_a_row(training, 1 if few else IN_A_ROW)
    step = statistics.median(sum(t) for t in times)
    forward, backward, optimizer = (statistics.median(t[i] for t in times) for i in range(3))
    tokens = ROWS * training.tokens
    flops = training_flops_per_token(config.model, training.tokens, 0) * tokens
    roof = stage.roofs().flops
    planned, terms = planned_memory(config)
    stage.emit(
        variant,
        ms=round(step, 2),
        in_a_row_ms=round(in_a_row, 2),
        forward_ms=round(forward, 2),
        backward_ms=round(backward, 2),
        optimizer_ms=round(optimizer, 2),
        tokens_per_s=round(tokens / in_a_row * 1e3),
        model_tflops=round(flops / in_a_row / 1e9, 2),
        mfu=round(flops / in_a_row * 1e3 / data_sheet(stage.device).flops, 4),
        mfu_without_optimizer=round(
            flops / (forward + backward) * 1e3 / data_sheet(stage.device).flops, 4
        ),
        of_roof=round(flops / in_a_row * 1e3 / roof, 4),
        loss=round(training.loss, 4),
        static_gib=round(static, 2),
        peak_gib=round(peak, 2),
        planned_gib=round(planned, 2),
        planned_terms=terms,
        repetitions=len(times),
        formats=dict(Counter(line.format for line in training.quantization.table)),
        **({"backends": config.ops.model_dump()} if variant == "before" else {}),
    )
    with stage.attempt(f"{variant} layers"):
        _whole(stage, variant, training)
    if variant == "before":
        return
    with stage.attempt(f"{variant} kernels"):
        table = stage.out / f"kernels_{variant}.txt"
        found = profile(lambda: training.step(2), stage.clock, table)
        stage.emit(f"{variant} kernels", **found)
    with stage.attempt(f"{variant} host"):
        stage.emit(f"{variant} host", **_host(training))
    with stage.attempt(f"{variant} waits"):
        waits: Counter[str] = Counter()
        with host_waits(waits):
            training.step(3)
        lines = dict(waits.most_common(12))
        stage.emit(f"{variant} waits", total=sum(waits.values()), lines=lines)


def _in_a_row(training: Training, count: int) -> float:
    """Return the milliseconds of a step where the next one follows at once, as in training."""
    training.step(0)
    training.clock.wait()
    begin = time.perf_counter()
    for number in range(count):
        training.step(number)
    training.clock.wait()
    return (time.perf_counter() - begin) / count * 1e3


def _host(training: Training, top: int = 10) -> dict[str, Any]:
    """Return the milliseconds that the host takes to queue a step, and what of it takes longest.

    The device is held back meanwhile, so that the host never waits for it.
    """
    times = []
    for number in range(3):
        training.clock.wait()
        training.clock.hold(400.0)
        marks = [time.perf_counter()]
        training.optimizer.zero_grad()
        batch = training.batches[number].to(training.device)
        sums, _ = compute_sums(training.objective, training.model, batch)
        loss = training.objective.combine(sums, training.counts)
        marks.append(time.perf_counter())
        loss.backward()
        times.append([*marks, time.perf_counter()])
    forward, backward = (
        statistics.median(each[i + 1] - each[i] for each in times) for i in range(2)
    )
    training.clock.wait()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        training.step(3)
    rows = sorted(found.key_averages(), key=lambda row: -row.self_cpu_time_total)
    return {
        "forward_ms": round(forward * 1e3, 1),
        "backward_ms": round(backward * 1e3, 1),
        "slowest": [
            f"{row.self_cpu_time_total / 1e3:.1f} ms {row.count}x {row.key[:40]}"
            for row in rows[:top]
        ],
    }


def _three_layers(config: TextConfig) -> TextConfig:
    """Keep one layer of each kind and a part of the vocabulary: the same kernels, less memory."""
    fewer = {"hybrid_override_pattern": "M*E", "num_hidden_layers": 3}
    fewer["vocab_size"] = min(16384, config.model.vocab_size)
    return config.model_copy(update={"model": config.model.model_copy(update=fewer)})


def _preset(variant: str) -> str:
    return "bf16" if variant in ("auto", "named", "before") else variant


def planned_memory(config: TextConfig) -> tuple[float, dict[str, float]]:
    """Return what `nemotron plan` says of one GPU, in GiB, in all and by term."""
    setting = read_setting(config, plan_training(config), find_hardware("h100", 1))
    dims, _ = layout_of(setting, 1)
    found = memory(setting.job(main_stretch(list(setting.stretches)), dims))
    return found.total / 2**30, {k: round(v / 2**30, 2) for k, v in found.terms.items()}


def _whole(stage: Stage, variant: str, training: Training) -> None:
    """Time a block of each kind and the head; add them up to all of Nano's layers."""
    model, config, clock = training.model, training.config.model, stage.clock
    training.optimizer.zero_grad()
    generator = torch.Generator(stage.device).manual_seed(0)
    shape = (ROWS, training.tokens, config.hidden_size)
    drawn = [torch.randn(shape, generator=generator, device=stage.device) for _ in range(2)]
    hidden, slope = (t.to(torch.bfloat16) for t in drawn)
    labels = training.batches[0].labels.to(stage.device)
    training.quantization.begin(4, 0)
    rows: dict[str, list[float]] = {}
    for letter in WHOLE:
        # from the middle, since a preset of formats may leave the ends alone
        blocks = [b for b in model.backbone.layers if b.letter == letter]
        block = blocks[len(blocks) // 2]
        name = "backbone.layers.0" if letter == "E" else None

        def run(x: Tensor, block: torch.nn.Module = block, name: str | None = name) -> list[Tensor]:
            stats: RoutingStats | None
            y, stats = block(x, None, None, None, name)
            # the balance loss belongs to the layer
            return [y] if stats is None else [y, stats.aux_loss_sum]

        rows[letter] = _passes(clock, run, hidden, slope, block.parameters)
    rows["head"] = _passes(
        clock,
        lambda x: [model.lm_head.loss(model.backbone.norm_f(x), labels)],
        hidden,
        torch.tensor(1 / labels.numel(), device=stage.device),
        model.lm_head.parameters,
    )
    total = rows["head"][0] + rows["head"][1]
    total += sum(count * sum(rows[letter]) for letter, count in WHOLE.items())
    tokens = ROWS * training.tokens
    per_token = sum(
        count * layer_flops(config, letter, training.tokens) for letter, count in WHOLE.items()
    )
    flops = 3.0 * (per_token + head_flops(config)) * tokens
    stage.emit(
        f"{variant} layers",
        **{name: [round(ms, 3) for ms in times] for name, times in rows.items()},
        whole_ms=round(total, 1),
        whole_tokens_per_s=round(tokens / total * 1e3),
        whole_tflops=round(flops / total / 1e9, 1),
        whole_mfu=round(flops / total * 1e3 / data_sheet(stage.device).flops, 4),
    )


def _passes(
    clock: Clock,
    run: Callable[[Tensor], list[Tensor]],
    x: Tensor,
    slope: Tensor,
    parameters: Callable[[], Any],
) -> list[float]:
    """Return the median milliseconds of forward and of backward."""
    small = torch.tensor(1e-8, device=x.device)

    def once(_: int) -> list[float]:
        leaf = x.detach().requires_grad_()
        for parameter in parameters():
            parameter.grad = None
        clock.flush()
        clock.hold(HELD_MS)
        marks = [clock.mark()]
        found = run(leaf)
        marks.append(clock.mark())
        torch.autograd.backward(found, [slope, small][: len(found)])
        return clock.milliseconds([*marks, clock.mark()])

    times = repeat(once, seconds=0.5 if clock.is_gpu else 0.05, at_most=15)
    return [statistics.median(t[i] for t in times) for i in range(2)]


if __name__ == "__main__":
    main()
