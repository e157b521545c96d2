"""What a token costs, and what the machine could do at best: the two sides of utilisation."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

from nemotron.model.config import ModelConfig
from nemotron.model.flops import training_flops_per_token as training_flops_per_token

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


def measure_matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Return the FLOP/s of large matrix products in `dtype`: the median, on random numbers.

    A GPU multiplies constant matrices up to 13 % faster, since their bits hardly toggle.
    """
    size = MEASURED_SIZE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)  # the first product sets up the library
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while not times or time.perf_counter() < deadline:
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(device)
        times.append(time.perf_counter() - start)
    return 2.0 * size**3 / statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
