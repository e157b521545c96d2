"""How mamba-ssm's kernels search their configurations, kept short without leaving any out."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

MODULE = "mamba_ssm.ops.triton.ssd_combined"
WARM_UP_MS, REPEAT_MS = 2, 12
"""For each configuration: a hundred of them at Triton's 25 and 100 ms take half a minute."""


def searches() -> list[Any]:  # Any: triton may be absent
    """Return every search of mamba-ssm's; none where the package cannot be imported."""
    try:
        importlib.import_module(MODULE)
        from triton.runtime.autotuner import Autotuner
    except ImportError:
        return []
    modules = [module for name, module in sys.modules.items() if name.startswith("mamba_ssm.")]
    found = {id(v): v for m in modules for v in vars(m).values() if isinstance(v, Autotuner)}
    return list(found.values())


def shorten_search(on_each: Callable[[], object] = lambda: None) -> None:
    """Time each configuration for a few milliseconds; `on_each` is called for each."""

    def do_bench(call: Any, quantiles: Any) -> Any:
        import triton

        on_each()
        return triton.testing.do_bench(call, warmup=WARM_UP_MS, rep=REPEAT_MS, quantiles=quantiles)

    for search in searches():
        search._do_bench = do_bench


def keep_part(part: str) -> None:
    """Keep every n-th configuration from the i-th, for `i/n`: so processes compile in parallel."""
    number, count = map(int, part.split("/"))
    if count > 1:
        for search in searches():
            search.configs = search.configs[number::count] or search.configs[:1]
