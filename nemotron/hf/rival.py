"""transformers' NemotronH as a second opinion on an exported folder."""

import importlib.metadata
import importlib.util
from pathlib import Path

import torch
from torch import nn

from nemotron.errors import UserError
from nemotron.hf.build import shapes
from nemotron.model.config import ModelConfig


class NotComparable(Exception):
    """Says why a comparison cannot be made on this machine."""


def load_with_transformers(folder: Path, config: ModelConfig) -> tuple[nn.Module, str]:
    """Return transformers' model of the folder in float32, and the library's name and version.

    Its time step is clamped as ours is; as it comes, transformers clamps it to 0.001 or more.

    Raises:
        NotComparable: when transformers is not installed.
        UserError: when transformers finds a tensor missing, unexpected or of another shape.
    """
    if importlib.util.find_spec("transformers") is None:
        raise NotComparable("transformers is not installed: pip install 'nemotron-train[hf]'")
    import transformers  # 1 s, and only here

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, found = transformers.NemotronHForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
        local_files_only=True,
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in found.items() if names}
    if wrong:
        raise UserError(f"transformers reports {wrong}")
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = config.time_step_limit
    return model.eval(), f"transformers {importlib.metadata.version('transformers')}"


def lack_of_memory(config: ModelConfig, *, copies: int) -> None:
    """Check that so many float32 copies of the model fit into free memory.

    Raises:
        NotComparable: when they don't.
    """
    needed = copies * 4 * sum(shape.numel() for shape in shapes(config).values())
    free = _free_bytes()
    if free is not None and needed > free:
        raise NotComparable(f"needs {needed / 2**30:,.0f} GiB, {free / 2**30:,.0f} are free")


def _free_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
