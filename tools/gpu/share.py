"""One GPU's share of training Nano: real widths, one period of the pattern, balanced experts."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from stage import ROOT
from torch import Tensor

from nemotron.data.batch import Batch
from nemotron.model.build import build_on_meta
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.model.init import draw
from nemotron.model.router import Router
from nemotron.ops.apply import ALL
from nemotron.ops.config import OpsConfig
from nemotron.ops.describe import training_call
from nemotron.recipe.load import load_recipe
from nemotron.train.config import TextConfig

ROWS, TOKENS = 2, 4096
TINY_TOKENS = 64
PATTERN = "MEMEM*EMEMEM*E"
WHOLE = {"M": 23, "E": 23, "*": 6}
"""Layers of all of Nano."""
EXPERTS = 16
"""Of 128: what each of 8 GPUs holds."""

TINY = {
    "vocab_size": 512, "hidden_size": 64, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "n_groups": 2, "ssm_state_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 64, "hybrid_override_pattern": "ME*E",
    "num_hidden_layers": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BEFORE = {"attention": "sdpa", "linear": "reference", "wide_linear": "reference"}
"""What torch does by itself, where the project has something better that needs no Triton, too."""
BIG = 1 << 20
"""Elements from which a tensor is drawn on the device and not as the project draws it."""


def share(tiny: bool) -> TextConfig:
    """Return Nano's recipe with the layers and experts of one share."""
    changes = [
        f"model.hybrid_override_pattern={PATTERN}",
        f"model.num_hidden_layers={len(PATTERN)}",
        f"model.n_routed_experts={EXPERTS}",
        f"data.seq_len={tokens_of(tiny)}",
        f"batch.global_tokens={ROWS * tokens_of(tiny)}",
        f"batch.micro_batch={ROWS}",
        "recompute=none",
        "phases=[]",
    ]
    if tiny:
        changes += [f"model.{name}={value}" for name, value in TINY.items()]
    return load_recipe(ROOT / "recipes/nano/pretrain.yaml", changes).text


def tokens_of(tiny: bool) -> int:
    """Return the tokens of a row."""
    return TINY_TOKENS if tiny else TOKENS


@torch.no_grad()
def build(config: ModelConfig, device: torch.device, dtype: torch.dtype | None) -> HybridLM:
    """Return a model with random weights of the right spread, the large ones drawn on the device.

    The project draws on the CPU, which takes minutes at this size.
    """
    model = build_on_meta(config)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.numel() < BIG:
            tensor.copy_(draw(name, tensor.shape, config, 0))
        else:
            tensor.normal_(0.0, config.initializer_range, generator=generator)
    model.compute_dtype = dtype
    return model


def random_batch(config: ModelConfig, rows: int, tokens: int, seed: int) -> Batch:
    """Return rows of one document each; every token has a label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (rows, tokens + 1), generator=generator)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), seq_idx=None)


@contextmanager
def balanced_experts() -> Iterator[None]:
    """Give every expert as many tokens as any other, whatever the router's scores."""
    given = Router._given

    def in_turn(router: Router, logits: Tensor, choice: object) -> tuple[Tensor, None]:
        return turns(logits.shape[0], router.num_experts, router.top_k, logits.device), None

    Router._given = in_turn  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Router._given = given  # type: ignore[method-assign]


@cache
def turns(tokens: int, experts: int, top_k: int, device: torch.device) -> Tensor:
    """Return the experts of each token: all in turn, the tokens in random order."""
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    chosen = (order[:, None] * top_k + torch.arange(top_k)) % experts
    return chosen.to(device)


def torch_alone(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> OpsConfig:
    """Return what torch alone has for every operation: no Triton, no package."""
    names = {}
    for operation in ALL:
        call = training_call(operation, device, dtype, documents=False)
        fit = [b for b in operation.backends if not b.packages and b.unfit(call) is None]
        names[operation.name] = BEFORE.get(operation.name, fit[0].name)
    return OpsConfig(**names)
