"""What holds for every test: one thread, uninitialised memory is NaN, no GPU means a named skip."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

# read by cuBLAS when it starts; without it PyTorch's deterministic mode refuses its products
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()

if not HAS_CUDA:
    # read when a module of kernels is imported: its kernels then run on CPU tensors
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    # who starts in the background of a shell ignores it, and so would all that tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)  # the tensors are tiny, and tests share the cores
    # deterministic mode fills uninitialised memory with NaN; on a GPU not every kernel is
    # deterministic, and a test there compares with a tolerance anyway
    torch.use_deterministic_algorithms(True, warn_only=HAS_CUDA)
    if HAS_CUDA:
        config.addinivalue_line("filterwarnings", "ignore:.*deterministic.*:UserWarning")
        # the first product of a process may be one of backward's thread
        config.addinivalue_line("filterwarnings", "ignore:.*no current CUDA context:UserWarning")
        config.addinivalue_line("filterwarnings", "ignore:Synchronization debug mode:UserWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> None:
    """Fail early when something switched the mode off for the tests that follow."""
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.fixture
def no_waits() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return a context in which every wait of the host for the GPU that torch sees is an error."""

    @contextlib.contextmanager
    def forbidden() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return forbidden
