"""What this machine can run, which backend operations and formats get, and what is missing."""

import importlib.metadata
import os
import platform

import torch
from rich.markup import escape
from rich.table import Table

from nemotron.console import PrintableConsole
from nemotron.device import GIB, find_device, host_memory
from nemotron.exit_codes import DONE
from nemotron.ops.apply import ALL
from nemotron.ops.describe import training_call
from nemotron.ops.registry import Backend, Call
from nemotron.precision.backends import FORMATS, choose, format_call, in_order

PACKAGES = {
    "torch": "",
    "numpy": "",
    "tokenizers": "",
    "safetensors": "",
    "transformers": "pip install 'nemotron-train[hf]'",
    "wandb": "",
    "tensorboard": "pip install 'nemotron-train[track]'",
    "trackio": "pip install 'nemotron-train[track]'",
    "numba": "pip install 'nemotron-train[cpu]'",
    "triton": "comes with torch for CUDA",
    "mamba-ssm": "pip install 'mamba-ssm>=2.3' --no-build-isolation",
    "causal-conv1d": "pip install 'causal-conv1d>=1.6' --no-build-isolation",
    "flash-attn": "pip install 'flash-attn>=2.8' --no-build-isolation",
    "transformer-engine": "pip install 'transformer-engine[pytorch]>=2.14' --no-build-isolation",
}
"""Packages that decide what can run, and the line that installs the optional ones."""

ONLY_CUDA = {"triton", "mamba-ssm", "causal-conv1d", "flash-attn", "transformer-engine"}


def doctor() -> int:
    """Print device, versions and every operation's and format's backends; returns the exit code."""
    console = PrintableConsole(soft_wrap=True)
    device = find_device("auto")
    for name, value in machine(device).items():
        console.print(f"{name:10s} {value}", highlight=False)
    console.print(_packages(device))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    console.print(_backends(device, dtype))
    console.print(_formats(device))
    return DONE


def machine(device: torch.device) -> dict[str, str]:
    """Return what is known of processor, memory and accelerator."""
    memory = host_memory() / GIB
    facts = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, {memory:.1f} GiB",
        "device": "cpu (torch finds no CUDA device)",
    }
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts["device"] = (
            f"{torch.cuda.device_count()} x {found.name}, {found.total_memory / GIB:.0f} GiB, "
            f"compute capability {found.major}.{found.minor}, CUDA {torch.version.cuda}"
        )
    return facts


def _packages(device: torch.device) -> Table:
    table = Table("package", "version", "install", title="Packages", title_justify="left")
    for name, install in PACKAGES.items():
        try:
            version, line = importlib.metadata.version(name), ""
        except importlib.metadata.PackageNotFoundError:
            version, line = "missing", install
            if name in ONLY_CUDA and device.type != "cuda":
                line = "useful only with a CUDA device"
        table.add_row(name, version, escape(line))
    return table


def _backends(device: torch.device, dtype: torch.dtype) -> Table:
    kind = str(dtype).removeprefix("torch.")
    title = f"Operations of a training step on {device.type} in {kind}, rows of several documents"
    table = Table("operation", "backend", "state", title=title, title_justify="left")
    for operation in ALL:
        call = training_call(operation, device, dtype, documents=True)
        chosen = operation.choose(call)
        for number, backend in enumerate(operation.backends):
            name = operation.name if number == 0 else ""
            state = "used" if backend is chosen else _state(backend, call)
            table.add_row(name, backend.name, state)
    return table


def _formats(device: torch.device) -> Table:
    title = f"Number formats of linear layers on {device.type}"
    table = Table("format", "backend", "state", title=title, title_justify="left")
    for format in FORMATS:
        call = format_call(format, device)
        chosen = choose("auto", call, "a layer")
        for number, backend in enumerate(in_order(device.type)):
            if backend is chosen:
                state = "chosen: " + ("emulated" if backend.name == "emulate" else "native")
            else:
                state = escape(backend.unfit(call) or "usable, but slower than the chosen one")
            table.add_row(format if number == 0 else "", backend.name, state)
    return table


def _state(backend: Backend, call: Call) -> str:
    if backend.by_name and backend.unfit(call) is None:
        return "usable where a recipe names it"
    return escape(backend.unfit(call) or "usable, but slower than the one in use")
