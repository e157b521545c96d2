"""Measure the engine: speculation, many requests at once, and what is left after thousands.

python tools/bench/generation.py speculation MODEL   acceptance, and tokens/s beside plain decoding
python tools/bench/generation.py costs MODEL         time of plain, testing and drafting passes
python tools/bench/generation.py requests            32 requests, beside transformers' two ways
python tools/bench/generation.py leaks --count 10000 slots, blocks and memory after many requests
"""

import argparse
import gc
import random
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from cases import Case
from worker import Ours, Peer

from nemotron.data.corpus import load_documents
from nemotron.generate.decode_layers import prepare_weights
from nemotron.generate.draft_length import tokens_of
from nemotron.generate.drafts import predict_ahead
from nemotron.generate.engine import Engine
from nemotron.generate.forward import new_cache
from nemotron.generate.request import Request
from nemotron.generate.sampling import Sampling
from nemotron.generate.speculate import Speculation
from nemotron.loading import load_with_tokenizer
from nemotron.model.ahead import RowsAhead
from nemotron.model.cache import Cache
from nemotron.model.cached_rows import CachedRows
from nemotron.model.hybrid import HybridLM
from nemotron.model.state import Keep

WAYS = {
    "plain": None,
    "mtp, 1 token": Speculation("mtp", 1, adaptive=False),
    "mtp, adaptive to 3": Speculation("mtp", 3),
    "mtp, 3 tokens": Speculation("mtp", 3, adaptive=False),
    "lookup, adaptive to 4": Speculation("lookup", 4),
}


@dataclass
class Best:
    """The fastest of several runs: wall seconds and those of the processor."""

    wall_s: float = float("inf")
    cpu_s: float = float("inf")

    def run(self, action: Callable[[], object]) -> None:
        """Run once and keep what was less."""
        wall, cpu = time.perf_counter(), time.process_time()
        action()
        self.wall_s = min(self.wall_s, time.perf_counter() - wall)
        self.cpu_s = min(self.cpu_s, time.process_time() - cpu)


def speculation(args: argparse.Namespace) -> None:
    """Print acceptance and time of each way, for texts of the embedded corpus."""
    model, tokenizer = load_with_tokenizer(args.model)
    model = prepare_weights(model)
    documents = [
        load_documents(domain)[-k] for k in (1, 2, 3) for domain in ("code", "docs", "verse")
    ]
    for rows in args.rows:
        prompts = [tokenizer.encode(text)[:100] for text in documents[:rows]]
        for temperature in (0.0, 0.8):
            best = {name: Best() for name in WAYS}
            engines: dict[str, Engine] = {}
            for _ in range(args.rounds):
                for name, way in WAYS.items():
                    engines[name] = engine = Engine(model, slots=rows, speculation=way)
                    gc.collect()
                    sampling = Sampling(temperature, seed=1)
                    best[name].run(partial(engine.generate, prompts, args.new, sampling))
            _print_ways(f"{rows} rows, temperature {temperature}", best, engines)


def costs(args: argparse.Namespace) -> None:
    """Print what passes of speculation cost beside a plain one, and from when on drafts pay."""
    model, _ = load_with_tokenizer(args.model)
    model = prepare_weights(model)
    text = torch.randint(3, model.config.vocab_size, (max(args.rows), 101))
    for rows in args.rows:
        cache = new_cache(model, rows, drafts=2)
        slots = [cache.admit() for _ in range(rows)]
        with torch.inference_mode():
            hidden = model(text[:rows], cache=CachedRows(cache, slots))
        best = {name: Best() for name in ("plain", "drafting")} | {
            f"testing {count}": Best() for count in (1, 2, 3)
        }
        for _ in range(args.rounds):
            for name, one in best.items():
                one.run(partial(_pass, model, cache, text[:rows], hidden, name))
        _print_costs(rows, {name: one.wall_s for name, one in best.items()})


@torch.inference_mode()
def _pass(
    model: HybridLM,
    cache: Cache,
    text: torch.Tensor,
    hidden: torch.Tensor,
    name: str,
) -> None:
    """Do one pass after the text, its product with the head included, and forget it."""
    kind, _, count = name.partition(" ")
    slots, end = list(range(text.shape[0])), text.shape[1]
    if kind == "drafting":
        rows = RowsAhead(cache, slots, [end] * len(slots))
        model.logits(predict_ahead(model, text[:, -1:], hidden[:, -1:], rows)[:, 0]).argmax(-1)
        return
    keep: Keep | None = "inputs" if kind == "testing" else None
    passed = CachedRows(cache, slots, keep=keep)
    found = model(text[:, : 1 + int(count or 0)], cache=passed)
    model.logits(found).argmax(-1)
    if keep:
        passed.keep_first([1] * len(slots))
    for slot in slots:
        cache.cut(slot, end)


def _print_costs(rows: int, seconds: dict[str, float]) -> None:
    plain, drafting = seconds["plain"], seconds["drafting"]
    print(f"{rows} rows: plain {plain * 1e6:,.0f} us, drafting {drafting / plain:.2f}x", flush=True)
    for count in (1, 2, 3):
        whole = (seconds[f"testing {count}"] + count * drafting) / plain
        rates = [rate / 1000 for rate in range(1001) if tokens_of(rate / 1000, count) >= whole]
        pays = f"from {rates[0]:.0%} accepted on" if rates else "never"
        print(
            f"  {count} drafts: testing {seconds[f'testing {count}'] / plain:.2f}x, in all "
            f"{whole:.2f}x: more tokens for the time {pays}",
            flush=True,
        )


def _print_ways(title: str, best: dict[str, Best], engines: dict[str, Engine]) -> None:
    print(title)
    plain = best["plain"]
    for name, one in best.items():
        speculator = engines[name].speculator
        accepted = "" if speculator is None else f"; {speculator.acceptance}"
        print(
            f"  {name:<22} {one.wall_s:6.2f} s {plain.wall_s / one.wall_s:5.2f}x   processor "
            f"{one.cpu_s:6.2f} s {plain.cpu_s / one.cpu_s:5.2f}x{accepted}",
            flush=True,
        )


def requests(args: argparse.Namespace) -> None:
    """Print the time of 32 requests of unequal length and answer, for the nano proxy in fp32."""
    case = Case("requests", "decode", "nano", 32, 128, ("fp32",), 1.0, 1.0)
    ours, peer = Ours(case, "fp32").model, Peer(case, "fp32", "grouped_mm").model.eval()
    generator = random.Random(0)
    prompts = [
        [generator.randrange(3, 4096) for _ in range(generator.randint(20, 200))] for _ in range(32)
    ]
    lengths = [generator.randint(8, args.new) for _ in prompts]
    total = sum(lengths)
    best: dict[str, Best] = {}
    answers: dict[str, list[list[int]]] = {}

    def engine() -> None:
        asked = [
            Request(prompt, length, Sampling(0.0))
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        ended = [e for e in Engine(ours, slots=32).run(asked) if e.finish]
        answers["engine"] = [e.answer.tokens for e in sorted(ended, key=lambda e: e.request)]

    def generate() -> None:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        found = peer.generate(
            ids, attention_mask=mask, max_new_tokens=max(lengths), do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        rows = found[:, longest:].tolist()
        answers["generate"] = [row[:n] for row, n in zip(rows, lengths, strict=True)]

    def continuous(attention: str) -> None:
        from transformers import GenerationConfig

        peer.set_attn_implementation(attention)
        config = GenerationConfig(max_new_tokens=max(lengths), do_sample=False, eos_token_id=-1)
        found = peer.generate_batch(prompts, config)
        assert len(found) == len(prompts), f"{len(found)} answers"

    actions = {"engine": engine, "generate": generate}
    for attention in ("sdpa", "eager", "paged|eager"):
        actions[f"continuous, {attention}"] = partial(continuous, attention)
    for _ in range(args.rounds):
        for name, action in list(actions.items()):
            try:
                best.setdefault(name, Best()).run(action)
            except ValueError as error:  # what the peer cannot do is a result
                print(f"{name:<23} fails: {str(error)[:300]}", flush=True)
                del actions[name], best[name]
    for name, one in best.items():
        print(
            f"{name:<23} {one.wall_s:7.2f} s, {total / one.wall_s:7.1f} tokens/s, "
            f"{one.wall_s / best['engine'].wall_s:5.2f}x the engine's time "
            f"(processor {one.cpu_s / best['engine'].cpu_s:5.2f}x)",
            flush=True,
        )
    if "generate" in answers:
        pairs = list(zip(answers["engine"], answers["generate"], strict=True))
        same = sum(ours == theirs for ours, theirs in pairs)
        print(f"{same} of {len(pairs)} answers are those of transformers' generate")


def leaks(args: argparse.Namespace) -> None:
    """Submit many requests, cancel some, and print what is in use at the end."""
    from nemotron.model.config import ModelConfig

    config = ModelConfig(
        vocab_size=61, hidden_size=16, hybrid_override_pattern="M*", mamba_num_heads=2,
        mamba_head_dim=8, n_groups=1, ssm_state_size=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_nextn_predict_layers=1,
        mtp_hybrid_override_pattern="*",
    )  # fmt: skip
    model = HybridLM(config)
    model.init_weights(0)
    way = Speculation("mtp", 2) if args.speculate else None
    engine = Engine(
        prepare_weights(model), slots=16, blocks=40, block_size=4, prefixes=3, speculation=way
    )
    generator, ended, submitted, next_line = random.Random(1), 0, 0, args.count // 4
    while submitted < args.count or not engine.is_idle:
        while submitted < args.count and len(engine.scheduler.waiting) < 20:
            prompt = [generator.randrange(61) for _ in range(generator.randint(1, 12))]
            sampling = Sampling(generator.choice([0.0, 1.0]), seed=submitted)
            number = engine.submit(Request(prompt, generator.randint(1, 6), sampling))
            submitted += 1
            if generator.random() < 0.1:
                engine.cancel(number)
        ended += sum(event.finish is not None for event in engine.step())
        if submitted >= next_line:
            next_line += args.count // 4
            mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"{submitted} submitted, {ended} ended, peak memory {mib:.0f} MiB", flush=True)
    engine.prefixes.clear()
    cache = engine.cache
    print(
        f"{ended} of {args.count} ended, {engine.scheduler.num_preempted} preemptions; in use: "
        f"{len(cache.lengths) - cache.num_free_slots} slots, {cache.blocks.used} blocks"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("speculation")
    one.add_argument("model", type=Path)
    one.set_defaults(run=speculation)
    each = commands.add_parser("costs")
    each.add_argument("model", type=Path)
    each.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    each.add_argument("--rounds", type=int, default=200)
    each.set_defaults(run=costs)
    many = commands.add_parser("requests")
    many.set_defaults(run=requests)
    one.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    for sub in (one, many):
        sub.add_argument("--new", type=int, default=96)
        sub.add_argument("--rounds", type=int, default=3)
    left = commands.add_parser("leaks")
    left.add_argument("--count", type=int, default=10_000)
    left.add_argument("--speculate", action="store_true")
    left.set_defaults(run=leaks)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
