"""Systems that a run may be planned for: peaks, memory and links of one accelerator."""

from dataclasses import dataclass

import torch

from nemotron.device import host_memory, matmul_peak
from nemotron.errors import UserError

T = 1e12
GB = 1e9


@dataclass(frozen=True)
class Hardware:
    """One kind of accelerator and how many of them share the fast link.

    Peaks are dense FLOP/s of matrix products, bandwidths bytes per second in one direction for
    one accelerator; all are the vendor's figures, not what a program reaches.
    """

    name: str
    peaks: dict[str, float]
    """By number format: fp32 (without TF32), bf16, fp8, fp4; a missing one is as the one before."""
    memory: float
    """Bytes that a program may use."""
    bandwidth: float
    """Bytes per second between memory and processor."""
    fast_link: float
    """Within a domain: NVLink."""
    slow_link: float
    """Between domains: each accelerator's share of the network."""
    domain: int
    """Accelerators that the fast link joins."""
    source: str

    def peak(self, number_format: str) -> float:
        """Return the peak of a format, or of the next wider one that the system has."""
        order = ["fp4", "fp8", "bf16", "fp32"]
        wider = order[order.index(number_format) :]
        return next(self.peaks[name] for name in wider if name in self.peaks)


SYSTEMS = {
    system.name: system
    for system in (
        Hardware(
            "h100",
            {"fp32": 67 * T, "bf16": 989 * T, "fp8": 1979 * T},
            memory=80 * GB,
            bandwidth=3.35e12,
            fast_link=450 * GB,
            slow_link=50 * GB,
            domain=8,
            source="NVIDIA H100 SXM data sheet; HGX with 400 Gb/s of network for each GPU",
        ),
        Hardware(
            "h200",
            {"fp32": 67 * T, "bf16": 989 * T, "fp8": 1979 * T},
            memory=141 * GB,
            bandwidth=4.8e12,
            fast_link=450 * GB,
            slow_link=50 * GB,
            domain=8,
            source="NVIDIA H200 SXM data sheet; HGX with 400 Gb/s of network for each GPU",
        ),
        Hardware(
            "b200",
            {"fp32": 75 * T, "bf16": 2250 * T, "fp8": 4500 * T, "fp4": 9000 * T},
            memory=180 * GB,
            bandwidth=7.7e12,
            fast_link=900 * GB,
            slow_link=50 * GB,
            domain=8,
            source="NVIDIA HGX B200 data sheet; 400 Gb/s of network for each GPU",
        ),
        Hardware(
            "b300",
            {"fp32": 75 * T, "bf16": 2250 * T, "fp8": 4500 * T, "fp4": 14000 * T},
            memory=270 * GB,
            bandwidth=7.7e12,
            fast_link=900 * GB,
            slow_link=100 * GB,
            domain=8,
            source="NVIDIA HGX B300 data sheet; 800 Gb/s of network for each GPU",
        ),
        Hardware(
            "gb200",
            {"fp32": 80 * T, "bf16": 2500 * T, "fp8": 5000 * T, "fp4": 10000 * T},
            memory=186 * GB,
            bandwidth=8e12,
            fast_link=900 * GB,
            slow_link=50 * GB,
            domain=72,
            source="NVIDIA GB200 NVL72 data sheet; 400 Gb/s of network for each GPU",
        ),
        Hardware(
            "gb300",
            {"fp32": 80 * T, "bf16": 2500 * T, "fp8": 5000 * T, "fp4": 15000 * T},
            memory=279 * GB,
            bandwidth=8e12,
            fast_link=900 * GB,
            slow_link=100 * GB,
            domain=72,
            source="NVIDIA GB300 NVL72 data sheet; 800 Gb/s of network for each GPU",
        ),
    )
}
"""Every system by the name that the command line takes."""
NAMES = [*SYSTEMS, "cpu"]


def find_hardware(name: str, processes: int) -> Hardware:
    """Return the system of that name; `cpu` is this machine, shared by so many processes.

    Raises:
        UserError: when there is none.
    """
    if name == "cpu":
        return _this_machine(processes)
    if name not in SYSTEMS:
        rule = f"is unknown; use one of {', '.join(NAMES)}."
        raise UserError(rule, key="--hardware", value=name)
    return SYSTEMS[name]


def _this_machine(processes: int) -> Hardware:
    """Measure this machine's matrix product; its links are a guess at what gloo moves."""
    device = torch.device("cpu")
    memory = host_memory()
    peaks = {
        name: matmul_peak(device, dtype) / processes
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    return Hardware(
        "cpu",
        peaks,
        memory=memory / processes,
        bandwidth=10 * GB / processes,
        fast_link=1 * GB,
        slow_link=1 * GB,
        domain=processes,
        source="products measured here and now; memory and links are guesses",
    )
