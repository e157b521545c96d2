"""A tiny run over a tiny shard, for every test of the trainer."""

import random
from pathlib import Path

import pytest
import torch

from nemotron.data.prepare import write_shard
from nemotron.data.tokenizer import load_tokenizer
from nemotron.train.config import PretrainConfig
from nemotron.train.run import train

MODEL = {
    "vocab_size": 4096,
    "hidden_size": 24,
    "hybrid_override_pattern": "ME*-",
    "mamba_num_heads": 4,
    "mamba_head_dim": 6,
    "n_groups": 2,
    "ssm_state_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 40,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 28,
    "moe_latent_size": 12,
    "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "*E",
}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> dict[str, str]:
    """Two sources of invented text, as prefixes of Megatron shards."""
    folder = tmp_path_factory.mktemp("shards")
    tokenizer = load_tokenizer("embedded")
    draw = random.Random(5)
    words = ["the", "river", "runs", "to", "sea", "and", "stone", "stays", "0", "1", "if", "else"]
    prefixes = {}
    for name in ("prose", "numbers"):
        texts = [" ".join(draw.choices(words, k=draw.randint(5, 60))) for _ in range(120)]
        prefixes[name] = str(write_shard(texts, folder / name, tokenizer))
    return prefixes


def build_recipe(folder: Path, shards: dict[str, str], name: str, **changes) -> PretrainConfig:
    """Build the configuration of a run of 8 steps; keyword arguments replace whole sections."""
    values = {
        "name": name,
        "output": str(folder / "runs"),
        "device": "cpu",
        "model": MODEL,
        "data": {
            "sources": [
                {"name": "prose", "weight": 0.6, "prefix": shards["prose"]},
                {"name": "numbers", "weight": 0.4, "prefix": shards["numbers"]},
            ],
            "cache": str(folder / "cache"),
            "seq_len": 31,
            "validation_fraction": 0.1,
        },
        "batch": {"global_tokens": 31 * 5, "micro_batch": 2},
        "schedule": {"peak": 1e-2, "total_steps": 8, "warmup_steps": 2, "decay_steps": 3},
        "checkpoint": {"every_steps": 2, "keep": 2},
        "evaluation": {"every_steps": 3, "tokens": 31 * 4},
    }
    return PretrainConfig.model_validate(values | changes)


@pytest.fixture
def recipe(tmp_path: Path, shards: dict[str, str]):
    """Return `build_recipe` for a folder of the test's own."""

    def build(name: str = "run", **changes) -> PretrainConfig:
        return build_recipe(tmp_path, shards, name, **changes)

    return build


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, shards: dict[str, str]) -> Path:
    """Return the folder of a run that nothing interrupted."""
    config = build_recipe(tmp_path_factory.mktemp("undisturbed"), shards, "undisturbed")
    assert train(config) == 0
    return Path(config.output) / config.name
