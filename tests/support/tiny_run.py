"""The configuration of a tiny run."""

from pathlib import Path

import torch

from nemotron.parallel.runtime import Ranks
from nemotron.train import pretraining
from nemotron.train.config import PretrainConfig
from nemotron.train.record import StepResult
from nemotron.train.schedule import plan_training
from nemotron.train.trainer import Trainer

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


def build_recipe(folder: Path, shards: dict[str, str], name: str, **changes) -> PretrainConfig:
    """Build the configuration of a run of 8 steps; keyword arguments replace whole sections."""
    values = {
        "name": name,
        "output": str(folder / "runs"),
        "device": "cpu",
        "model": MODEL,
        "data": {
            "sources": [
                {"name": "prose", "weight": 0.6, "path": shards["prose"]},
                {"name": "numbers", "weight": 0.4, "path": shards["numbers"]},
            ],
            "cache": str(folder / "cache"),
            "seq_len": 31,
        },
        "batch": {"global_tokens": 31 * 5, "micro_batch": 2},
        "schedule": {"peak": 1e-2, "total_steps": 8, "warmup_steps": 2, "decay_steps": 3},
        "checkpoint": {"every_steps": 2, "keep": 2},
        "evaluation": {"every_steps": 3, "tokens": 31 * 4},
    }
    return PretrainConfig.model_validate(values | changes)


# more than any machine reaches: a step that is faster than the peak logs a line of its own
PEAK_FLOPS = 1e18


def build_trainer(config: PretrainConfig, ranks: Ranks | None = None) -> Trainer:
    """Build the trainer of a run on the CPU."""
    plan = plan_training(config)
    data = pretraining.open_data(config, plan)
    return pretraining.build_trainer(
        config, plan, data, torch.device("cpu"), PEAK_FLOPS, ranks or Ranks()
    )


def do_step(trainer: Trainer, step: int) -> StepResult:
    """Do a step on the rows that the trainer's source has for it."""
    return trainer.update(step, trainer.batches.take(step))
