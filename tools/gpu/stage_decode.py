"""Stage 9: decoding with the share's weights in bfloat16: milliseconds a token at batch 1, 8, 32.

Each with steps captured as CUDA graphs, without and with the kernels for steps of one token, and
with these kernels one by one.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from kernels_of import host_waits, profile
from share import build, share
from stage import Stage, parser

from nemotron.generate.decode_layers import prepare_weights
from nemotron.generate.engine import Engine
from nemotron.generate.forward import append, read
from nemotron.generate.sampling import Sampling
from nemotron.model.hybrid import HybridLM
from nemotron.model.init import STACKED
from nemotron.ops.apply import apply
from nemotron.ops.config import OpsConfig
from nemotron.ops.expert_step import expert_step
from nemotron.ops.mamba_step import mamba_step
from nemotron.ops.router_step import router_step

PROMPT, NEW, BATCHES, REPLAYS = 128, 64, (1, 8, 32), 50
STEPS = (expert_step, mamba_step, router_step)
WITH = OpsConfig(token_step="reference", **{step.name: "triton" for step in STEPS})
WITHOUT = OpsConfig(token_step="reference", **{step.name: "reference" for step in STEPS})
"""As decoding was before there were these kernels."""


def main() -> None:
    stage = Stage("decode", parser(__doc__).parse_args())
    prompt = 16 if stage.tiny else PROMPT
    if stage.tiny:
        _interpret()
    with stage.attempt("model"):
        config = share(stage.tiny).model
        model = build(config, stage.device, torch.bfloat16)
        apply(model, WITH)
        prepare_weights(model)
        generator = torch.Generator().manual_seed(0)
        for rows in BATCHES[:1] if stage.tiny else BATCHES:
            prompts = torch.randint(config.vocab_size, (rows, prompt), generator=generator).tolist()
            before = _time(stage, model, prompts, WITHOUT, " graphs before", fixed=True)
            after = _time(stage, model, prompts, WITH, " graphs", fixed=True)
            plain = _time(stage, model, prompts, WITH, "", fixed=False)
            # near ties of random weights may go either way; tests compare the logits
            if after is not None and plain is not None:
                stage.emit(f"batch {rows} tokens", same=_same(plain, after))
            if after is not None and before is not None:
                stage.emit(f"batch {rows} tokens before", same=_same(before, after))
            with stage.attempt(f"batch {rows} kernels"):
                _kernels(stage, model, prompts)


def _interpret() -> None:
    """Let the kernels for steps take CPU tensors where Triton interprets them."""
    try:
        from nemotron.ops.launch import INTERPRETED
    except ImportError:  # no Triton here: steps are the layers' own code
        return
    if INTERPRETED:
        for step in STEPS:
            step.backends = [replace(b, devices=b.devices | {"cpu"}) for b in step.backends]


def _time(
    stage: Stage,
    model: HybridLM,
    prompts: list[list[int]],
    ops: OpsConfig,
    label: str,
    *,
    fixed: bool,
) -> list[list[int]] | None:
    """Return the tokens generated, and emit the time of each step and what it launches."""
    rows, new = len(prompts), 4 if stage.tiny else NEW
    case = f"batch {rows}{label}"
    with stage.attempt(case):
        apply(model, ops)
        engine = Engine(model, slots=rows, fixed_sizes=fixed)
        greedy = Sampling(temperature=0)
        begin = time.perf_counter()
        engine.generate(prompts, new, greedy)
        first = time.perf_counter() - begin
        stage.clock.begin_peak()
        begin = time.perf_counter()
        found = engine.generate(prompts, new, greedy)
        seconds = time.perf_counter() - begin
        steps = [] if engine._steps is None else list(engine._steps._steps.values())
        ms, floor = 1e3 * engine.timing.decode_s / (new - 1), _floor(stage, model, rows)
        captured = f"{sum(s._graph is not None for s in steps)}/{len(steps)}"
        stage.emit(
            case,
            ms=round(ms, 3),
            prefill_ms=round(1e3 * engine.timing.prefill_s, 2),
            seconds=round(seconds, 2),
            first_seconds=round(first, 2),
            tokens=sum(map(len, found)),
            floor_ms=round(floor, 3),
            of_floor=round(floor / ms, 3),
            peak_gib=round(stage.clock.peak_gib(), 2),
            **({"captured": captured} if fixed else {}),
        )
        if fixed:
            step = steps[-1]
            table = stage.out / f"kernels{label.replace(' ', '_')}_{rows}.txt"
            with torch.inference_mode():
                alone = _replayed(stage, step.run)
                replayed = profile(step.run, stage.clock, table, top=24)
            stage.emit(
                f"{case} kernels",
                step_ms=round(alone, 3),
                of_floor=round(floor / alone, 3),
                **replayed,
            )
        return found
    return None


def _replayed(stage: Stage, run: Callable[[], object]) -> float:
    """Return milliseconds of a step by itself, without what the host does between two."""
    count = 1 if stage.tiny else REPLAYS
    run()
    stage.clock.wait()
    marks = [stage.clock.mark()]
    for _ in range(count):
        run()
    marks.append(stage.clock.mark())
    return stage.clock.milliseconds(marks)[0] / count


def _same(one: list[list[int]], other: list[list[int]]) -> float:
    """Return the share of equal tokens before the first difference of each row."""
    equal = total = 0
    for a, b in zip(one, other, strict=True):
        total += len(a)
        equal += next((k for k, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return round(equal / total, 3)


def _kernels(stage: Stage, model: HybridLM, prompts: list[list[int]]) -> None:
    """Emit the kernels and the host's waits of a step that is not captured."""
    rows = len(prompts)
    cached, logits = read(model, prompts)
    newest = logits.argmax(-1, keepdim=True)
    append(model, cached, newest)
    waits: Counter[str] = Counter()
    with host_waits(waits):
        append(model, cached, newest)
    stage.clock.wait()
    table = stage.out / f"kernels_decode_{rows}.txt"
    found = profile(lambda: append(model, cached, newest), stage.clock, table, top=6)
    stage.emit(f"batch {rows} kernels", waits=dict(waits), **found)


def _floor(stage: Stage, model: HybridLM, rows: int) -> float:
    """Return the time to read the weights that a token of each row meets."""
    config = model.config
    chosen = min(1.0, rows * config.num_experts_per_tok / config.n_routed_experts)
    count = 0.0
    for name, parameter in model.named_parameters():
        if name != "backbone.embeddings.weight":
            count += parameter.numel() * (chosen if name.endswith(STACKED) else 1.0)
    bandwidth = stage.roofs().bandwidth
    return 2e3 * count / bandwidth


if __name__ == "__main__":
    main()
