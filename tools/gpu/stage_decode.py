"""Stage 9: decoding with the share's weights in bfloat16: milliseconds a token at batch 1, 8, 32.

Each with steps captured as CUDA graphs, and without.
"""

import time
from collections import Counter

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

PROMPT, NEW, BATCHES = 128, 64, (1, 8, 32)


def main() -> None:
    stage = Stage("decode", parser(__doc__).parse_args())
    prompt = 16 if stage.tiny else PROMPT
    with stage.attempt("model"):
        config = share(stage.tiny).model
        model = prepare_weights(build(config, stage.device, torch.bfloat16))
        generator = torch.Generator().manual_seed(0)
        for rows in BATCHES:
            prompts = torch.randint(config.vocab_size, (rows, prompt), generator=generator).tolist()
            found = [_time(stage, model, prompts, fixed=fixed) for fixed in (False, True)]
            if found[0] is not None and found[1] is not None:
                # near ties of random weights may go either way; tests compare the logits
                stage.emit(f"batch {rows} tokens", same=_same(*found))
            with stage.attempt(f"batch {rows} kernels"):
                _kernels(stage, model, prompts)


def _time(
    stage: Stage, model: HybridLM, prompts: list[list[int]], *, fixed: bool
) -> list[list[int]] | None:
    """Return the tokens generated, and emit the time of each step."""
    rows, new = len(prompts), 8 if stage.tiny else NEW
    case = f"batch {rows}" + (" graphs" if fixed else "")
    with stage.attempt(case):
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
        stage.emit(
            case,
            ms=round(1e3 * engine.timing.decode_s / (new - 1), 3),
            prefill_ms=round(1e3 * engine.timing.prefill_s, 2),
            seconds=round(seconds, 2),
            first_seconds=round(first, 2),
            tokens=sum(map(len, found)),
            floor_ms=round(_floor(stage, model, rows), 3),
            peak_gib=round(stage.clock.peak_gib(), 2),
            **(
                {"captured": f"{sum(s._graph is not None for s in steps)}/{len(steps)}"}
                if fixed
                else {}
            ),
        )
        if fixed:
            step = steps[-1]
            table = stage.out / f"kernels_graph_{rows}.txt"
            with torch.inference_mode():
                replayed = profile(step.run, stage.clock, table, top=10)
            stage.emit(f"{case} kernels", **replayed)
        return found
    return None


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
