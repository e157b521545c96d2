"""Train hybrid Mamba-2 / attention / mixture-of-experts language models as Nemotron 3 was."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemotron.loading import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:  # Any: the function, imported when first asked for
    if name == "load":
        from nemotron.loading import load

        return load
    raise AttributeError(f"module 'nemotron' has no attribute {name!r}")
