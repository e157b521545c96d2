"""Stage 9: decoding with the share's weights in bfloat16: milliseconds a token at batch 1 and 8."""

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
from nemotron.model.cache import CachedRows
from nemotron.model.init import STACKED

PROMPT, NEW, BATCHES = 128, 64, (1, 8)


def main() -> None:
    stage = Stage("decode", parser(__doc__).parse_args())
    prompt, new = (16, 8) if stage.tiny else (PROMPT, NEW)
    with stage.attempt("model"):
        config = share(stage.tiny).model
        engine = Engine(prepare_weights(build(config, stage.device, torch.bfloat16)))
        generator = torch.Generator().manual_seed(0)
        greedy = Sampling(temperature=0)
        for rows in BATCHES:
            with stage.attempt(f"batch {rows}"):
                drawn = torch.randint(config.vocab_size, (rows, prompt), generator=generator)
                prompts = drawn.tolist()
                engine.generate(prompts, 4, greedy)
                stage.clock.begin_peak()
                begin = time.perf_counter()
                found = engine.generate(prompts, new, greedy)
                seconds = time.perf_counter() - begin
                ms = 1e3 * engine.timing.decode_s / (new - 1)
                stage.emit(
                    f"batch {rows}",
                    ms=round(ms, 3),
                    prefill_ms=round(1e3 * engine.timing.prefill_s, 2),
                    seconds=round(seconds, 2),
                    tokens=sum(map(len, found)),
                    floor_ms=round(_floor(stage, engine, rows), 3),
                    peak_gib=round(stage.clock.peak_gib(), 2),
                )
            with stage.attempt(f"batch {rows} kernels"):
                cached, logits = read(engine.model, prompts)
                newest = logits.argmax(-1, keepdim=True)
                append(engine.model, cached, newest)
                waits: Counter[str] = Counter()
                with host_waits(waits):
                    append(engine.model, cached, newest)
                stage.clock.wait()

                def step(cached: CachedRows = cached, newest: torch.Tensor = newest) -> None:
                    append(engine.model, cached, newest)

                table = stage.out / f"kernels_decode_{rows}.txt"
                found_of = profile(step, stage.clock, table, top=6)
                stage.emit(f"batch {rows} kernels", waits=dict(waits), **found_of)


def _floor(stage: Stage, engine: Engine, rows: int) -> float:
    """Return the time to read the weights that a token of each row meets."""
    config = engine.model.config
    chosen = min(1.0, rows * config.num_experts_per_tok / config.n_routed_experts)
    count = 0.0
    for name, parameter in engine.model.named_parameters():
        if name != "backbone.embeddings.weight":
            count += parameter.numel() * (chosen if name.endswith(STACKED) else 1.0)
    _, bandwidth = stage.roofs()
    return 2e3 * count / bandwidth


if __name__ == "__main__":
    main()
