"""A tiny run over a tiny shard, for every test of the trainer."""

import random
from pathlib import Path

import pytest
import torch

from nemotron.train.config import PretrainConfig
from nemotron.train.start import train
from tests.support.prepared import write_prepared
from tests.support.tiny_run import build_recipe


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> dict[str, str]:
    """Two sources of invented text, as prepared folders."""
    folder = tmp_path_factory.mktemp("shards")
    draw = random.Random(5)
    words = ["the", "river", "runs", "to", "sea", "and", "stone", "stays", "0", "1", "if", "else"]
    prefixes = {}
    for name in ("prose", "numbers"):
        texts = [" ".join(draw.choices(words, k=draw.randint(5, 60))) for _ in range(120)]
        prefixes[name] = str(write_prepared(texts, folder / name, validation_fraction=0.1))
    return prefixes


@pytest.fixture
def recipe(tmp_path: Path, shards: dict[str, str]):
    """Return `build_recipe` for a folder of the test's own."""

    def build(name: str = "run", **changes) -> PretrainConfig:
        return build_recipe(tmp_path, shards, name, **changes)

    return build


@pytest.fixture
def on_two(recipe):
    """The tiny run with rows that two ranks can share."""

    def build(name: str, *, steps: int = 8, faults: tuple = (), **changes) -> PretrainConfig:
        values = {
            "batch": {"global_tokens": 31 * 4, "micro_batch": 2},
            "schedule": {"kind": "constant", "peak": 1e-3, "total_steps": steps},
            "evaluation": {"tokens": 62},
            "reliability": {"faults": list(faults)},
            "parallel": {"timeout_s": 60.0, "start_timeout_s": 60.0},
        }
        return recipe(name, **(values | changes))

    return build


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, shards: dict[str, str]) -> Path:
    """Return the folder of a run that nothing interrupted."""
    config = build_recipe(tmp_path_factory.mktemp("undisturbed"), shards, "undisturbed")
    assert train(config) == 0
    return Path(config.output) / config.name
