"""Compare number formats with bfloat16 on this machine: whole steps, layers, blocks.

    python tools/bench/formats.py steps [--presets ...]     # what a training step costs
    python tools/bench/formats.py layers [--models ...]     # products of Nano's and Super's layers
    python tools/bench/formats.py blocks [--models ...]     # a whole block of each kind

Everything is measured in turns with bfloat16, so that the ratios hold on a machine that others use.
`steps` gives each preset a process of its own, for its peak memory. `layers` and `blocks` run
forward and backward with every backend that has the format here, and compare with the emulation.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import get_args

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.model.build import build_around, build_on_meta
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.ops.grouped_linear import grouped_linear
from nemotron.precision.apply import Quantization
from nemotron.precision.backends import FormatBackend, Layer, format_call, in_order
from nemotron.precision.config import NVFP4Config, PrecisionConfig, Preset
from nemotron.precision.policy import kind_of, linear_layers
from nemotron.precision.random_bits import Draw
from nemotron.precision.schemes import SCHEMES
from nemotron.recipe.load import load_recipe
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.loss import PretrainObjective, compute_sums
from nemotron.train.optimizer import Optimizer

ROOT = Path(__file__).parents[2]
WARM_UPS = 2
BASE = "bf16"
Results = tuple[Tensor, ...]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["steps", "layers", "blocks"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kept", type=int, default=7, help="measurements of each, after two more")
    parser.add_argument("--json", type=Path, help="append the rows to this file, a line each")
    parser.add_argument("--recipe", default=ROOT / "recipes/tiny/pretrain.yaml", help="of steps")
    presets = [name for name in get_args(Preset) if name != BASE]
    distinct = [name for name in presets if name != "nvfp4_super"]
    parser.add_argument("--presets", nargs="+", choices=presets, default=distinct, help="of steps")
    parser.add_argument("--models", nargs="+", default=["nano", "super"], help="of layers, blocks")
    parser.add_argument("--tokens", type=int, help="default: 8192 on a GPU, 256 on a CPU")
    parser.add_argument("--experts", type=int, help="at most so many; default: all, 8 on a CPU")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.tokens = options.tokens or (8192 if on_gpu else 256)
    options.experts = options.experts or (1 << 30 if on_gpu else 8)
    rows = list({"steps": steps, "layers": layers, "blocks": blocks}[options.part](options))
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    table = Table(*rows[0], title=f"{options.part} on {where}, torch {torch.__version__}")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=140).print(table)
    if options.json:
        with options.json.open("a") as file:
            for row in rows:
                line = {"part": options.part, "device": where, "torch": torch.__version__, **row}
                file.write(json.dumps(line) + "\n")


# steps


def steps(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Let processes, one for each preset, train in turns."""
    # forked from a server that has imported the model, but computed nothing: 3 s less for each
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nemotron.recipe.load", "nemotron.train.loss"])
    workers: dict[str, Connection] = {}
    for preset in [BASE, *options.presets]:
        workers[preset], there = context.Pipe()
        context.Process(
            target=serve, args=(there, str(options.recipe), preset, options.device), daemon=True
        ).start()
    found: dict[str, list[tuple[float, float]]] = {preset: [] for preset in workers}
    for _ in range(options.kept + WARM_UPS):
        for preset, worker in workers.items():
            worker.send(True)
            found[preset].append(worker.recv())
    for worker in workers.values():
        worker.send(False)
    base, base_memory = _typical(found[BASE])
    for preset, measured in found.items():
        seconds, memory = _typical(measured)
        yield {
            "preset": preset,
            "step (s)": seconds,
            "times bf16's": seconds / base,
            "peak (GiB)": memory,
            "times bf16's peak": memory / base_memory,
        }


def _typical(measured: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the median seconds and the peak memory."""
    seconds = statistics.median(seconds for seconds, _ in measured[WARM_UPS:])
    return seconds, max(memory for _, memory in measured)


def serve(parent: Connection, recipe: str, preset: str, device: str) -> None:
    """Train a step for every True of the parent's; answer with seconds and peak GiB."""
    config = load_recipe(recipe, [f"precision={preset}"]).text
    model = HybridLM(config.model).to(device)
    model.init_weights(config.seed)
    model.compute_dtype = torch.bfloat16
    quantization = Quantization(model, config.precision, config.seed)
    optimizer = Optimizer(dict(model.named_parameters()), config.optimizer)
    objective = PretrainObjective(Auxiliary(config.loss, num_depths=0))  # the next token alone
    rows, length = config.batch.micro_batch, config.data.seq_len
    num_micro = config.batch.global_tokens // (rows * length)
    step = 0
    while parent.recv():
        batches = []
        for micro in range(num_micro):
            generator = torch.Generator().manual_seed(step * num_micro + micro)
            tokens = torch.randint(config.model.vocab_size, (rows, length), generator=generator)
            labels = F.pad(tokens[:, 1:], (0, 1), value=NO_LABEL)
            batches.append(Batch(tokens.to(device), labels.to(device), seq_idx=None))
        _wait(device)
        start = time.perf_counter()
        optimizer.zero_grad()
        for micro, batch in enumerate(batches):
            quantization.begin(step, micro * rows * length)
            sums, _ = compute_sums(objective, model, batch)
            objective.combine(sums, objective.counts(batch)).backward()
        optimizer.step(lr=1e-4)
        _wait(device)
        parent.send((time.perf_counter() - start, _peak_gib(device)))
        step += 1


def _peak_gib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# layers


@dataclass(frozen=True)
class Shape:
    """A matrix of a model, or those of all experts."""

    kind: str
    out: int
    width: int
    experts: int = 0


def shapes_of(config: ModelConfig) -> list[Shape]:
    """Return the distinct matrices of a model."""
    model = build_on_meta(config)
    found: dict[Shape, None] = {}
    for name in linear_layers(model):
        kind = kind_of(name) or ""
        for weight in model.get_submodule(name).parameters(recurse=False):
            *experts, out, width = weight.shape
            found[Shape(kind, out, width, *experts)] = None
    return list(found)


def layers(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Time the three products of each matrix in every format."""
    for name in options.models:
        config = _model(name, options)
        for shape in shapes_of(config):
            yield from _layer(name, shape, config.num_experts_per_tok, options)


def _layer(
    model: str, shape: Shape, copies: int, options: argparse.Namespace
) -> Iterator[dict[str, object]]:
    device, tokens = options.device, options.tokens
    rows = tokens * copies // shape.experts * shape.experts if shape.experts else tokens
    g = torch.Generator().manual_seed(0)
    stacked = (shape.experts,) if shape.experts else ()
    x = torch.randn(rows, shape.width, generator=g).bfloat16().to(device)
    dy = (torch.randn(rows, shape.out, generator=g) * 1e-3).bfloat16().to(device)
    weight = torch.randn(*stacked, shape.out, shape.width, generator=g).to(device) * 0.02
    counts = torch.full(stacked, rows // max(1, shape.experts), device=device)
    draw = Draw(1, torch.arange(rows)) if shape.experts else Draw(1)

    def passes(call: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Results]:
        def run() -> Results:
            inputs = x.detach().requires_grad_(), weight.detach().requires_grad_()
            y = call(*inputs)
            y.backward(dy)
            return (y.detach(), *(t.grad for t in inputs if t.grad is not None))

        return run

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        narrow = weight.bfloat16()
        return grouped_linear(x, narrow, counts) if shape.experts else F.linear(x, narrow)

    def quantized(layer: Layer) -> Callable[[Tensor, Tensor], Tensor]:
        if shape.experts:
            return lambda x, weight: layer.grouped(x, weight, counts, "weight", draw)
        return lambda x, weight: layer.linear(x, weight, draw)

    runs = {(BASE, ""): passes(plain)}
    for format, scheme in SCHEMES.items():
        for backend in fit(format, [(shape.out, shape.width)], device):
            layer = backend.function({"weight": scheme}, format, NVFP4Config())
            runs[format, backend.name] = passes(quantized(layer))
    experts = f"{shape.experts} x " if shape.experts else ""
    what = f"{shape.kind} {experts}{shape.out} x {shape.width}, {rows} rows"
    yield from _compared({"model": model, "layer": what}, runs, options)


# blocks


def blocks(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Time a model of one block of each kind, every linear layer of it in one format."""
    for name in options.models:
        config = _model(name, options)
        for kind in dict.fromkeys(config.hybrid_override_pattern):
            changes = {"hybrid_override_pattern": kind, "vocab_size": 1024}
            changes |= {"num_nextn_predict_layers": 0, "mtp_hybrid_override_pattern": None}
            model = HybridLM(config.model_copy(update=changes)).to(options.device)
            model.init_weights(0)
            model.compute_dtype = torch.bfloat16
            yield from _block(name, kind, model, options)
            del model


def _block(
    name: str, kind: str, model: HybridLM, options: argparse.Namespace
) -> Iterator[dict[str, object]]:
    length = min(options.tokens, 2048)
    shape = (options.tokens // length, length)
    tokens = torch.randint(1024, shape, generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(options.device)

    def passes(format: str, backend: str = "auto") -> Callable[[], Results]:
        rules = [{"kind": "*", "format": format}]
        values = {"compute": "bf16", "rules": rules, "backend": backend}
        bound = twin(model)
        quantization = Quantization(bound, PrecisionConfig.model_validate(values), seed=0)

        def run() -> Results:
            quantization.begin(1, 0)
            hidden = bound(tokens)
            hidden.backward(hidden.detach())
            gradients = [p.grad for p in bound.parameters() if p.grad is not None]
            bound.zero_grad()
            return (hidden.detach(), *gradients)

        return run

    shapes = [(s.out, s.width) for s in shapes_of(model.config)]
    runs = {(BASE, ""): passes(BASE)}
    for format in SCHEMES:
        for backend in fit(format, shapes, options.device):
            runs[format, backend.name] = passes(format, backend.name)
    what = f"{kind} of {shape[0]} x {shape[1]} tokens"
    yield from _compared({"model": name, "block": what}, runs, options)


def twin(model: HybridLM) -> HybridLM:
    """Return a model that shares the weights."""
    other = build_around(model.config, model.state_dict())
    other.compute_dtype = model.compute_dtype
    return other


# both


def fit(format: str, shapes: Sequence[tuple[int, int]], device: str) -> list[FormatBackend]:
    """Return the backends that have a format here for weights of all these shapes."""
    calls = [format_call(format, torch.device(device), shape) for shape in shapes]
    return [b for b in in_order(device) if all(b.unfit(call) is None for call in calls)]


def _model(name: str, options: argparse.Namespace) -> ModelConfig:
    config = load_recipe(ROOT / f"recipes/{name}/pretrain.yaml").config.model
    experts = min(config.n_routed_experts, options.experts)
    chosen = min(config.num_experts_per_tok, experts)
    return config.model_copy(update={"n_routed_experts": experts, "num_experts_per_tok": chosen})


def _compared(
    labels: dict[str, object],
    runs: dict[tuple[str, str], Callable[[], Results]],
    options: argparse.Namespace,
) -> Iterator[dict[str, object]]:
    """Let all take turns, and compare each with the emulation of its format."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for turn in range(options.kept + WARM_UPS):
        for key, run in runs.items():
            _wait(options.device)
            start = time.perf_counter()
            run()
            _wait(options.device)
            if turn >= WARM_UPS:
                times[key].append(time.perf_counter() - start)
    base = statistics.median(times[BASE, ""])
    for (format, backend), measured in times.items():
        seconds = statistics.median(measured)
        error: object = ""
        if backend not in ("", "emulate"):
            error = _difference(runs[format, backend](), runs[format, "emulate"]())
        yield {
            **labels,
            "format": format,
            "backend": backend,
            "ms": 1e3 * seconds,
            "times bf16's speed": base / seconds,
            "off the emulation": error,
        }


def _difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Return the largest relative difference (Frobenius) of outputs and gradients."""
    pairs = zip(ours, theirs, strict=True)
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
