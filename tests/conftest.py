"""What holds for every test: one thread, uninitialized memory is NaN, no GPU means a named skip."""

import contextlib
import gc
import os
import resource
import signal
from collections.abc import Callable, Generator, Iterator

# read by cuBLAS when it starts; without it PyTorch's deterministic mode refuses its products
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# read by torch when it is imported: processes that tests start share the cores, too
os.environ.setdefault("OMP_NUM_THREADS", "1")
# read when the hub's package is imported: what a test does not find must not be waited for
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.support.order import in_order, is_long

HAS_CUDA = torch.cuda.is_available()

if not HAS_CUDA:
    # read when a module of kernels is imported: its kernels then run on CPU tensors
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="run the tests marked nightly, too")


def pytest_configure(config: pytest.Config) -> None:
    # who starts in the background of a shell ignores it, and so would all that tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)  # the tensors are tiny, and tests share the cores
    gc.disable()  # until tests are collected: next to nothing of that is garbage
    # deterministic mode fills uninitialized memory with NaN; on a GPU not every kernel is
    # deterministic, and a test there compares with a tolerance anyway
    torch.use_deterministic_algorithms(True, warn_only=HAS_CUDA)
    if HAS_CUDA:
        config.addinivalue_line("filterwarnings", "ignore:.*deterministic.*:UserWarning")
        # the first product of a process may be one of backward's thread
        config.addinivalue_line("filterwarnings", "ignore:.*no current CUDA context:UserWarning")
        config.addinivalue_line("filterwarnings", "ignore:Synchronization debug mode:UserWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--nightly"):
        for item in items:
            if item.get_closest_marker("nightly"):
                item.add_marker(pytest.mark.skip(reason=NIGHTLY))
    places = in_order(items)
    items.sort(key=lambda item: places[item.path])
    if HAS_CUDA:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))


def pytest_collection_finish() -> None:
    # modules and tests stay; a collection of garbage need not visit their million objects
    gc.collect()
    gc.freeze()
    gc.enable()


NIGHTLY = "more cases of what another test shows: make test-all"

SLOW_S = 2.0
"""Seconds of a core from which on a test must be marked as slow."""

CPU_S = "seconds of a core, not marked slow"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    before = cpu_seconds()
    result = yield
    spent = cpu_seconds() - before
    if spent > SLOW_S and not is_long(item):
        item.user_properties.append((CPU_S, spent))
    return result


def cpu_seconds() -> float:
    """Return what this process and those that it waited for have computed."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == CPU_S:
                terminalreporter.write_line(f"SLOW {report.nodeid}: {value:.0f} {CPU_S}")


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan() -> None:
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
