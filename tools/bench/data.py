"""Measure the data path: preparing, opening, indexing, loading. Prints a table, ratios in one run.

python tools/bench/data.py prepare [--mb 100]   MB/s against Megatron-LM's way of doing it
python tools/bench/data.py memory               peak memory of the preparation, 10 MB to 2 GB
python tools/bench/data.py open                 ten thousand shards: seconds and memory
python tools/bench/data.py horizon              a run of 25 T tokens: seconds and memory
python tools/bench/data.py loader               tokens/s of the loader alone
python tools/bench/data.py wait                 share of a tiny run's steps spent waiting for rows
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from nemotron.data.config import DataConfig, SourceConfig, leaves
from nemotron.data.corpus import load_documents
from nemotron.data.indexed import Shard
from nemotron.data.mixture import Phase, RowLength, Timeline, single_phase
from nemotron.data.prepare.writer import ShardWriter
from nemotron.data.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
EOD = 2
NANO_STEP = 25_165_824
"""Tokens of one optimizer step of Nano and Super."""

Rows = list[tuple[str, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=BENCHES)
    parser.add_argument("--mb", type=int, default=60, help="input of `prepare`")
    parser.add_argument("--trials", type=int, default=3, help="of `prepare`, in turn")
    parser.add_argument("--shards", type=int, default=10_000, help="of `open`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        headings, rows = BENCHES[options.what](Path(folder), options)
    table = Table(*headings, title=options.what, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def bench_prepare(folder: Path, options: argparse.Namespace) -> tuple[tuple[str, ...], Rows]:
    """Ours and Megatron's way, in turn, each with as many processes as there are cores."""
    size = write_text(folder / "text.jsonl", options.mb)
    (folder / "line.jsonl").write_text('{"text": "start"}\n')
    cores = str(len(os.sched_getaffinity(0)))
    commands = {
        OURS: lambda source, out: [*PREPARE, source, "--out", f"ours-{out}", "--hold-out", "0"],
        PEER: lambda source, out: [
            sys.executable,
            __file__,
            "--peer",
            source,
            f"peer-{out}",
            cores,
        ],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    starts = {name: timed(command("line.jsonl", "line"))[0] for name, command in commands.items()}
    for trial in range(options.trials):
        for name, command in commands.items():
            times[name].append(timed(command("text.jsonl", str(trial)))[0])
    same_documents(folder / "ours-0", folder / "peer-0")
    best = {name: min(found) for name, found in times.items()}
    work = {name: best[name] - starts[name] for name in times}
    rows: Rows = [
        (
            name,
            f"{best[name]:.1f}",
            f"{max(times[name]):.1f}",
            f"{starts[name]:.1f}",
            f"{size / 1e6 / work[name]:.2f}",
            f"{work[PEER] / work[name]:.2f}x",
        )
        for name in times
    ]
    headings = ("", "best s", "worst s", "start s", "MB/s without start", "speed without start")
    return headings, rows


def bench_memory(folder: Path, options: argparse.Namespace) -> tuple[tuple[str, ...], Rows]:
    """Peak memory of the largest process, over many documents and over one."""
    rows: Rows = []
    for mb in (10, 100, 2000):
        size = write_text(folder / "text.jsonl", mb)
        seconds, peak = timed([*PREPARE, "text.jsonl", "--out", f"out-{mb}"])
        rows.append(("documents", f"{size / 1e6:,.0f}", f"{peak:.0f}", f"{seconds:.0f}"))
        (folder / "text.jsonl").unlink()
    for mb in (10, 200):
        with open(folder / "one.txt", "w") as file:
            for text in texts(mb * 1_000_000):
                file.write(text)
        seconds, peak = timed([*PREPARE, "one.txt", "--out", f"one-{mb}", "--hold-out", "0"])
        rows.append(("one document", f"{mb}", f"{peak:.0f}", f"{seconds:.0f}"))
    return ("input", "MB", "peak MiB of a process", "s"), rows


def bench_open(folder: Path, options: argparse.Namespace) -> tuple[tuple[str, ...], Rows]:
    """A source of many shards, and a blend of as many sources, each in a fresh process."""
    (folder / "shards").mkdir()
    prefixes = []
    for number in range(options.shards):
        prefix = folder / "shards" / f"s{number:05d}"
        with ShardWriter(prefix, np.uint16) as writer:
            for length in (700, 900, 600):
                writer.add(np.full(length, 3 + number % 4000))
        prefixes.append(str(prefix))
    (folder / "blend.json").write_text(json.dumps([x for p in prefixes for x in (1.0, p)]))
    rows: Rows = []
    for name, blend in (("one source", None), ("Megatron's list of as many sources", "blend.json")):
        command = [sys.executable, __file__, "--open", *([blend] if blend else ["shards"])]
        seconds, peak = timed(command)
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        rows.append((name, f"{options.shards:,}", *answer, f"{peak:.0f}", f"{seconds:.1f}"))
    headings = ("", "shards", "recipe s", "open s", "first step s", "peak MiB", "whole process s")
    return headings, rows


def bench_horizon(folder: Path, options: argparse.Namespace) -> tuple[tuple[str, ...], Rows]:
    """25 T tokens in two phases over 30 sources: nothing of that size is built."""
    from nemotron.data.loader import TrainingData

    sources = []
    for number in range(30):
        with ShardWriter(folder / f"s{number}", np.int32) as writer:
            for _ in range(20):
                writer.add(np.full(9_000, number))
        weight = 1 + number % 7 / 3
        sources.append(SourceConfig(name=f"s{number}", weight=weight, path=f"{folder}/s{number}"))
    config = DataConfig(sources=tuple(sources), seq_len=8192, cache=str(folder / "cache"))
    length = RowLength(8192, 1.0, tuple(leaves(config.blend)))
    phases = [Phase("1", 933_806, NANO_STEP, (length,)), Phase("2", 59_605, NANO_STEP, (length,))]
    before = rss()
    start = time.perf_counter()
    data = TrainingData(config, Timeline(phases), seed=1, vocab_size=1 << 30)
    opened = time.perf_counter() - start
    rows: Rows = [("open", f"{opened:.3f} s"), ("steps", f"{data.timeline.num_steps:,}")]
    rows.append(("tokens", f"{data.timeline.num_tokens:,}"))
    for name, ask in (
        ("sample ids of the last step (3,072 rows)", lambda: data.sample_ids(993_410)),
        ("tokens by source of the whole run", lambda: data.tokens_read(993_411)),
        ("rows of a rank of 64 in the last step", lambda: data.batch(993_410, slice(0, 48))),
    ):
        start = time.perf_counter()
        ask()
        rows.append((name, f"{1e3 * (time.perf_counter() - start):.1f} ms"))
    rows.append(("memory added", f"{rss() - before:.0f} MiB"))
    return ("25 T tokens", ""), rows


def bench_loader(folder: Path, options: argparse.Namespace) -> tuple[tuple[str, ...], Rows]:
    """Rows of Nano's length from shards of two billion tokens on the disk's cache."""
    from nemotron.data.loader import TrainingData, rows_of_rank

    draw = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        with ShardWriter(folder / name, np.int32) as writer:
            for _ in range(40_000):
                writer.add(np.append(draw.integers(3, 4_000, draw.integers(50, 3000)), EOD))
    sources = [SourceConfig(name=name, path=str(folder / name)) for name in "abc"]
    rows: Rows = []
    for kind in ("concatenate", "sequential", "best_fit"):
        config = DataConfig.model_validate(
            {
                "sources": [source.model_dump() for source in sources],
                "seq_len": 8192,
                "cache": str(folder / "cache"),
                "packing": {"kind": kind},
            }
        )
        timeline = single_phase(leaves(config.blend), 8192, NANO_STEP, 100)
        start = time.perf_counter()
        data = TrainingData(config, timeline, seed=1, vocab_size=1 << 30)
        opened = time.perf_counter() - start
        share = rows_of_rank(3072, 0, 64)
        data.batch(0, share)
        start, steps = time.perf_counter(), 20
        for step in range(steps):
            data.batch(step, share)
        seconds = time.perf_counter() - start
        tokens = steps * 48 * 8192
        rows.append((kind, f"{opened:.2f}", f"{tokens / seconds:,.0f}"))
    return ("packing", "open s", "tokens/s of one process"), rows


def bench_wait(folder: Path, options: argparse.Namespace) -> tuple[tuple[str, ...], Rows]:
    """The tiny recipe, with and without reading ahead."""
    rows: Rows = []
    for steps_ahead in (2, 0):
        name = f"ahead-{steps_ahead}"
        command = [
            sys.executable,
            "-m",
            "nemotron",
            "train",
            str(ROOT / "recipes/tiny/pretrain.yaml"),
        ]
        command += [f"name={name}", "schedule.total_steps=40", "schedule.decay_steps=10"]
        command += ["evaluation.every_steps=null", f"data.prefetch_steps={steps_ahead}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines if '"train"' in line][1:]
        waited = sum(step["perf/data_s"] for step in steps)
        whole = sum(step["perf/step_s"] for step in steps)
        rows.append((str(steps_ahead), f"{1e3 * waited / len(steps):.2f}", f"{waited / whole:.3%}"))
    return ("steps read ahead", "waiting ms a step", "share of the step"), rows


BENCHES: dict[str, Callable[[Path, argparse.Namespace], tuple[tuple[str, ...], Rows]]] = {
    "prepare": bench_prepare,
    "memory": bench_memory,
    "open": bench_open,
    "horizon": bench_horizon,
    "loader": bench_loader,
    "wait": bench_wait,
}
OURS, PEER = "ours", "Megatron's way"
PREPARE = [sys.executable, "-m", "nemotron", "data", "prepare"]


def texts(size: int) -> Iterator[str]:
    """Yield documents of the embedded corpus in a random order until there is enough."""
    documents = [text for domain in ("code", "docs", "verse") for text in load_documents(domain)]
    draw = random.Random(0)
    while size > 0:
        text = draw.choice(documents)
        size -= len(text)
        yield text


def write_text(path: Path, mb: int) -> int:
    """Write JSON lines of about so many megabytes; returns the exact size."""
    with open(path, "w") as file:
        for text in texts(mb * 1_000_000):
            file.write(json.dumps({"text": text}) + "\n")
    return path.stat().st_size


def timed(command: list[str]) -> tuple[float, float]:
    """Run a command; returns seconds and the peak memory of its largest process in MiB."""
    script = (
        "import resource, subprocess, sys, time; start = time.perf_counter();"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL);"
        "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss;"
        "print(time.perf_counter() - start, peak / 1024); sys.exit(done.returncode)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, *command], stdout=subprocess.PIPE, text=True, check=True
    )
    seconds, peak = answer.stdout.split()
    return float(seconds), float(peak)


def rss() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MIB


def same_documents(ours: Path, peer: Path) -> None:
    """Check that both wrote the same tokens."""
    theirs = Shard(peer).tokens
    shards = sorted(ours.glob("train-*.idx"))
    mine = np.concatenate([Shard(path.with_suffix("")).tokens for path in shards])
    assert np.array_equal(mine, theirs), "the two ways wrote different tokens"


_encoder: Tokenizer


def start_peer() -> None:
    global _encoder
    _encoder = load_tokenizer("embedded")


def encode_for_peer(line: str) -> list[int]:
    return _encoder.encode(json.loads(line)["text"])


def run_peer(source: str, out: str, workers: int) -> None:
    """Do as Megatron-LM's tools/preprocess_data.py: a pool encodes, one process writes."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{out}.bin", dtype=np.uint16)
    with open(source) as lines, multiprocessing.Pool(workers, start_peer) as pool:
        for ids in pool.imap(encode_for_peer, lines, 32):
            if ids:
                document = torch.tensor([*ids, EOD])
                builder.add_document(document, [len(document)])
    builder.finalize(f"{out}.idx")


def open_blend(name: str) -> None:
    """Open a folder of shards or a blend as a run does, read one step, print the seconds."""
    from nemotron.recipe.load import load_recipe
    from nemotron.train.pretraining import open_data
    from nemotron.train.schedule import plan_training

    start = time.perf_counter()
    source = f"data.blend={name}" if name.endswith(".json") else None
    inline = f"data.sources=[{{name: all, path: {name}}}]"
    config = load_recipe(ROOT / "recipes/tiny/pretrain.yaml", [source or inline]).text
    laps = [time.perf_counter()]
    data = open_data(config, plan_training(config))
    laps.append(time.perf_counter())
    data.batch(0)
    laps.append(time.perf_counter())
    print(*(f"{b - a:.2f}" for a, b in zip([start, *laps], laps, strict=False)))


def start() -> None:
    if sys.argv[1:2] == ["--peer"]:
        run_peer(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    elif sys.argv[1:2] == ["--open"]:
        open_blend(sys.argv[2])
    else:
        main()


if __name__ == "__main__":
    start()
