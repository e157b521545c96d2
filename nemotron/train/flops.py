"""What a token costs, and what the machine could do at best: the two sides of utilisation."""

import time
from dataclasses import dataclass

import torch
from torch import nn

from nemotron.model.config import ModelConfig

MEASURED_SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices whose product measures a device."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model; the multi-token-prediction block is counted apart."""

    total: int
    active: int
    """Those that one token meets: of the routed experts only the chosen ones."""
    mtp: int


def count_parameters(model: nn.Module, config: ModelConfig) -> ParameterCount:
    """Count the parameters of a model, which may lie on the meta device."""
    total = experts = mtp = 0
    for name, parameter in model.named_parameters():
        if name.startswith("mtp."):
            mtp += parameter.numel()
            continue
        total += parameter.numel()
        if ".mixer.experts." in name:
            experts += parameter.numel()
    idle = experts * (config.n_routed_experts - config.num_experts_per_tok)
    return ParameterCount(total, total - idle // config.n_routed_experts, mtp)


def training_flops_per_token(config: ModelConfig, seq_len: int, num_mtp_depths: int) -> float:
    """Return the FLOPs of forward and backward for one token of a row of `seq_len` tokens.

    Backward counts twice the forward; recomputation is not counted. The causal half of attention
    is counted, and the scan with the published chunk length whatever the kernel uses.
    """
    forward = sum(
        _layer_flops(config, letter, seq_len) for letter in config.hybrid_override_pattern
    )
    head = 2 * config.hidden_size * config.vocab_size
    depth = sum(_layer_flops(config, letter, seq_len) for letter in config.mtp_pattern)
    depth += 4 * config.hidden_size**2 + head
    return 3.0 * (forward + head + num_mtp_depths * depth)


def _layer_flops(config: ModelConfig, letter: str, seq_len: int) -> float:
    h = config.hidden_size
    if letter == "M":
        inner, groups, states = config.mamba_inner_size, config.n_groups, config.ssm_state_size
        projections = 2 * h * (2 * inner + 2 * groups * states + config.mamba_num_heads)
        projections += 2 * inner * h
        convolution = 2 * config.conv_kernel * config.conv_channels
        chunk = config.chunk_size
        scan = chunk * groups * states + chunk * inner + 4 * inner * states
        return projections + convolution + scan
    if letter == "*":
        queries, keys = config.num_attention_heads, config.num_key_value_heads
        projections = 2 * h * config.head_dim * (2 * queries + 2 * keys)
        return projections + 2 * seq_len * queries * config.head_dim
    if letter == "-":
        return 4 * h * (config.intermediate_size or 0)
    flops = 2 * h * config.n_routed_experts
    flops += 4 * h * config.moe_shared_expert_intermediate_size
    if config.moe_latent_size is not None:
        flops += 4 * h * config.moe_latent_size
    width = config.expert_input_size
    return flops + 4 * config.num_experts_per_tok * width * config.moe_intermediate_size


def measure_matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Return the FLOP/s of the best of a few large matrix products in `dtype`."""
    size = MEASURED_SIZE[device.type]
    a = torch.full((size, size), 0.5, device=device, dtype=dtype)
    b, out = a.clone(), torch.empty_like(a)
    torch.mm(a, b, out=out)  # the first product sets up the library
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
