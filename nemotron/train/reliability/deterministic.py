"""The same bits every time: only operations whose result does not depend on timing."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from nemotron.errors import UserError

WORKSPACE, SIZES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
"""cuBLAS gives the same bits only with a workspace of fixed size, which it reads from here.

Source: NVIDIA, cuBLAS documentation, section "Results Reproducibility".
"""


@contextmanager
def deterministic(device: torch.device, *, on: bool) -> Iterator[None]:
    """Refuse other operations while entered, if `on`.

    Raises:
        UserError: when the environment does not ask cuBLAS for it; it is read once, at the start.
    """
    if not on:
        yield
        return
    if device.type == "cuda" and os.environ.get(WORKSPACE) not in SIZES:
        raise UserError(
            f"needs {WORKSPACE}={SIZES[0]} in the environment; set it before the start.",
            key="reliability.deterministic",
            value=True,
        )
    with ExitStack() as stack:
        was_on = torch.are_deterministic_algorithms_enabled()
        stack.callback(torch.use_deterministic_algorithms, was_on)
        torch.use_deterministic_algorithms(True)
        for module, name, value in (
            (torch.backends.cudnn, "deterministic", True),
            (torch.backends.cudnn, "benchmark", False),
            # what is never read need not be written
            (torch.utils.deterministic, "fill_uninitialized_memory", False),
        ):
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield
