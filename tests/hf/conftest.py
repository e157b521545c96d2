"""A run whose model has every layer kind and no weight at a special value."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron.checkpoint.state import SavedState
from nemotron.checkpoint.write import Content, save
from nemotron.data.tokenizer import load_tokenizer
from nemotron.hf.export import export
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.train.state import TrainerState

torch.set_num_threads(1)  # the tensors are tiny, and tests share the cores

TOKENIZER = load_tokenizer("embedded")

STATE = SavedState(
    trainer=replace(TrainerState.fresh(), step=10, tokens=123456),
    data={
        "seed": 5,
        "data.seq_len": 64,
        "data.packing": None,
        "data.objective": "pretrain",
        "data.mask_eod_loss": False,
        "data.tokenizer": TOKENIZER.hash,
        "data.eod_token": 3,
        "sources": {"verse": {"tokens": 777, "content": "abc"}},
        "phases": [],
    },
)


def build_config(**changes: Any) -> ModelConfig:  # Any: values of any field
    values = {
        "vocab_size": TOKENIZER.vocab_size,
        "hidden_size": 20,
        "hybrid_override_pattern": "MEM*E-M",
        "mamba_num_heads": 6,
        "mamba_head_dim": 7,
        "n_groups": 3,
        "ssm_state_size": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 30,
        "n_routed_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 9,
        "moe_shared_expert_intermediate_size": 13,
        "moe_latent_size": 11,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "mtp_hybrid_override_pattern": "*E",
    }
    return ModelConfig(**(values | changes))


def write_run(run: Path, config: ModelConfig) -> Path:
    """Write a run with a checkpoint of a perturbed model; its float32 weights are no bfloat16."""
    model = HybridLM(config)
    model.init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
            if name.endswith("dt_bias"):
                tensor.uniform_(-8, 1, generator=generator)
    run.mkdir()
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save(run / "checkpoints", Content(10, tensors, STATE, config), keep=2)
    TOKENIZER.save(run / "tokenizer.json")
    (run / "recipe.yaml").write_text("name: test\n")
    return run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of this model; tests must not change it."""
    return write_run(tmp_path_factory.mktemp("runs") / "hybrid", build_config())


@pytest.fixture(scope="session")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export in several shards, unchecked; tests must not change it."""
    out = tmp_path_factory.mktemp("exports") / "plain"
    assert export(run, out, check=False, max_shard_bytes=50_000) == 0
    return out


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """Return a function that writes a run of a changed model into a new folder."""
    return lambda run, **changes: write_run(run, build_config(**changes))
