"""Our model beside transformers' NemotronH, with the same weights and none at a special value."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")

torch.set_num_threads(1)  # the tensors are tiny, and tests share the cores

SIZES = {
    "nano": {
        "hybrid_override_pattern": "MEM*EME",
        "routed_scaling_factor": 2.5,
    },
    "super": {
        "hybrid_override_pattern": "MEM*EM*E",
        "moe_latent_size": 20,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 5.0,
        "n_groups": 4,
    },
    "every block": {
        "hybrid_override_pattern": "MEM*E-M*",
        "intermediate_size": 44,
        "moe_latent_size": 36,
        "conv_kernel": 3,
        "mamba_num_heads": 6,
        "mamba_head_dim": 10,
        "n_groups": 3,
        "layer_norm_epsilon": 1e-3,
        "norm_topk_prob": False,
        "routed_scaling_factor": 0.7,
    },
}
"""Inner widths differ from 2 x hidden and from each other; a swapped dimension cannot pass."""

COMMON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "mamba_num_heads": 8,
    "mamba_head_dim": 7,
    "n_groups": 2,
    "ssm_state_size": 11,
    "chunk_size": 16,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "n_routed_experts": 9,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 14,
    "moe_shared_expert_intermediate_size": 26,
}


@dataclass(frozen=True)
class Pair:
    """The two models, float32, with equal weights; the time step of transformers is not clamped."""

    ours: HybridLM
    theirs: nn.Module

    def logits(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of both."""
        return self.ours.logits(self.ours(input_ids)), self.theirs(input_ids=input_ids).logits

    def difference(self, input_ids: Tensor) -> float:
        """Return the largest difference of logits, relative to the largest logit."""
        with torch.no_grad():
            ours, theirs = self.logits(input_ids)
        return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def perturb(model: nn.Module, seed: int) -> None:
    """Give every parameter and buffer a value that no default would give it."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.empty(like.shape).uniform_(low, high, generator=generator)

    def normal(like: Tensor, std: float, mean: float = 0.0) -> Tensor:
        return torch.empty(like.shape).normal_(mean, std, generator=generator)

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            leaf = name.rsplit(".", 1)[-1]
            if leaf == "dt_bias":
                value = uniform(tensor, -8.0, 1.0)
            elif leaf == "A_log":
                value = uniform(tensor, 0.5, 16.0).log()
            elif leaf == "D":
                value = normal(tensor, 1.0, mean=0.5)
            elif leaf == "e_score_correction_bias":
                value = normal(tensor, 0.2)
            elif "conv1d" in name:
                value = uniform(tensor, -0.8, 0.8)
            elif tensor.ndim == 1:
                value = normal(tensor, 0.3, mean=1.0)
            elif "embeddings" in name:
                value = normal(tensor, 1.0)
            else:
                value = normal(tensor, 1.0 / math.sqrt(tensor.shape[-1]))
            tensor.copy_(value)


def build_ours(size: str, seed: int = 1, **changes: object) -> HybridLM:
    """Return our model of this size with every weight perturbed."""
    model = HybridLM(ModelConfig(**(COMMON | SIZES[size] | changes)))
    perturb(model, seed)
    return model


def build_theirs(size: str) -> nn.Module:
    """Return transformers' model as it comes, with its plainest attention and experts."""
    config = transformers.NemotronHConfig(
        **(COMMON | SIZES[size]), attn_implementation="eager", experts_implementation="eager"
    )
    return transformers.NemotronHForCausalLM(config).eval()


def copy_weights(ours: HybridLM, theirs: nn.Module) -> None:
    """Copy every tensor; transformers calls the backbone `model` in memory."""
    weights = {
        name.replace("backbone.", "model.", 1): tensor
        for name, tensor in ours.state_dict().items()
        if not name.startswith("mtp.")
    }
    theirs.load_state_dict(weights, strict=True)


def unclamp(theirs: nn.Module) -> None:
    """Remove the lower limit of 0.001 on the time step, which only transformers has."""
    for module in theirs.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, math.inf)


def build_pair(size: str) -> Pair:
    """Return both models with the same perturbed weights."""
    pair = Pair(build_ours(size), build_theirs(size))
    copy_weights(pair.ours, pair.theirs)
    unclamp(pair.theirs)
    return pair


@pytest.fixture(scope="session", params=list(SIZES))
def pair(request: pytest.FixtureRequest) -> Pair:
    """Both models, for each size; tests must not change them."""
    return build_pair(request.param)


@pytest.fixture(scope="session")
def pair_of() -> Callable[[str], Pair]:
    """Return a function that builds a pair of its own, to be changed."""
    return build_pair


@pytest.fixture(scope="session")
def tokens() -> Callable[..., Tensor]:
    """Return a function that draws token ids."""

    def draw(rows: int, length: int, seed: int = 3) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(COMMON["vocab_size"], (rows, length), generator=generator)

    return draw
