"""Pairs of a made-up language, as shards of rows, and recipes that learn from them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from nemotron.data.bpe import SPECIALS
from nemotron.data.correct.characters import character_tokenizer, count_characters
from nemotron.data.correct.marks import Marks, marks_of
from nemotron.data.correct.pairs import PairRow
from nemotron.data.indexed import HEADER, MAGIC
from nemotron.data.tokenizer import Tokenizer
from tests.support.fine_tuning import write_recipe

LETTERS = "abcdefghijklmnop"
FIRST = len(SPECIALS)
MODEL = {
    "vocab_size": 64,
    "hidden_size": 24,
    "hybrid_override_pattern": "M*-",
    "mamba_num_heads": 4,
    "mamba_head_dim": 6,
    "n_groups": 2,
    "ssm_state_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 40,
}


def tokenizer() -> Tokenizer:
    return Tokenizer(character_tokenizer(count_characters([LETTERS])).encode())


def marks() -> Marks:
    return marks_of(tokenizer())


def noisy(random: np.random.Generator, target: list[int], void: int) -> tuple[list[int], list[int]]:
    """Return columns and durations, one of each for a token of the target, of a bad hearing."""
    ids: list[int] = []
    durations: list[int] = []
    for token in target:
        kind = random.choice(3, p=[0.8, 0.12, 0.08])
        if kind == 2 and durations and durations[-1] == 1:  # this token was not heard
            ids.append(void)
            durations[-1] += 1
            durations.append(0)
            continue
        ids.append(token ^ 1 if kind == 1 else token)
        durations.append(1)
    return ids, durations


def make_row(random: np.random.Generator, candidates: int, void: int) -> PairRow:
    """Each token of a target is one or two more than that before it."""
    length = int(random.integers(4, 11))
    steps = np.cumsum(random.integers(1, 3, length)) + random.integers(len(LETTERS))
    target = (FIRST + steps % len(LETTERS)).tolist()
    found = [noisy(random, target, void) for _ in range(candidates)]
    columns, durations = (np.array(part, np.int64) for part in zip(*found, strict=True))
    return PairRow(columns, np.array(target, np.int64), durations)


def make_rows(number: int, candidates: int, seed: int = 0) -> list[PairRow]:
    random, void = np.random.default_rng(seed), marks().void
    return [make_row(random, candidates, void) for _ in range(number)]


def write_shard(prefix: Path, rows: list[PairRow]) -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    sequences = [sequence for row in rows for sequence in row.sequences()]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    offsets = ((np.cumsum(lengths) - lengths) * 2).astype("<i8")
    ends = np.cumsum([0, *(len(row.sequences()) for row in rows)]).astype("<i8")
    Path(f"{prefix}.bin").write_bytes(np.concatenate(sequences).astype("<u2").tobytes())
    header = HEADER.pack(MAGIC, 1, 8, len(lengths), len(ends))
    arrays = [lengths.tobytes(), offsets.tobytes(), ends.tobytes()]
    Path(f"{prefix}.idx").write_bytes(b"".join([header, *arrays]))


class PairPlace:
    """A folder with shards of pairs of one and of two candidates, and their tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        (folder / "tokenizer.json").write_bytes(tokenizer().content)
        for candidates in (1, 2):
            write_shard(folder / f"pairs{candidates}/train", make_rows(300, candidates))
            write_shard(folder / f"held{candidates}/held", make_rows(40, candidates, seed=1))

    def values(self, name: str, candidates: int = 2, **changes: Any) -> dict[str, Any]:
        """Return the values of a recipe; mappings are merged into its sections."""
        source = {
            "name": "pairs",
            "path": str(self.folder / f"pairs{candidates}"),
            "validation": str(self.folder / f"held{candidates}"),
        }
        correction = {"correction": {"candidates": candidates}} if candidates > 1 else {}
        values: dict[str, Any] = {
            "name": name,
            "stage": "correct",
            "output": str(self.runs),
            "device": "cpu",
            "model": {**MODEL, **correction},
            "data": {
                "sources": [source],
                "tokenizer": str(self.folder / "tokenizer.json"),
                "seq_len": 96,
            },
            "batch": {"global_tokens": 384, "micro_batch": 2},
            "optimizer": {"eps": 1e-2},
            "schedule": {"kind": "constant", "peak": 1e-2, "total_steps": 4},
            "checkpoint": {"every_steps": 2},
        }
        for key, given in changes.items():
            known = values.get(key)
            merges = isinstance(known, dict) and isinstance(given, dict)
            values[key] = {**known, **given} if merges else given
        return values

    def recipe(self, name: str, candidates: int = 2, **changes: Any) -> Path:
        """Write such a recipe."""
        return write_recipe(self.folder / f"{name}.yaml", self.values(name, candidates, **changes))


def metrics_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]
