"""The same bits every time: only operations whose result does not depend on timing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

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
        UserError: when cuBLAS was not told to join in; it reads the environment once, at the start.
    """
    if not on:
        yield
        return
    if device.type == "cuda" and os.environ.get(WORKSPACE) not in SIZES:
        raise UserError(
            f"reliability.deterministic = true needs {WORKSPACE}={SIZES[0]} in the environment; "
            "set it before the start."
        )
    cudnn, fill = torch.backends.cudnn, torch.utils.deterministic
    was_on = torch.are_deterministic_algorithms_enabled()
    was_set = cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    fill.fill_uninitialized_memory = False  # what is never read need not be written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on)
        cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory = was_set
