"""Writing the adapters of a run in the layout of PEFT, which attaches them to the base again."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nemotron.checkpoint.read import MODEL_PREFIX, SavedTensors, refusing_adapters
from nemotron.errors import UserError
from nemotron.exit_codes import DONE
from nemotron.files import write_json
from nemotron.hf.export import check_target
from nemotron.hf.folder import is_exported
from nemotron.hf.hub import check_name, is_name, push_folder
from nemotron.hf.shards import write_tensors
from nemotron.hf.source import CheckpointSource, open_checkpoint
from nemotron.model.adapter import MARK, by_weight
from nemotron.model.build import shapes
from nemotron.outputs import output_folder, publish, writing_beside
from nemotron.terminal import print_text

COMMAND = "export --adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""PEFT's names of tensors begin with this, before the name of a module in memory."""
BACKBONE = "model."
"""transformers calls the backbone so in memory."""
REFUSED = ".out_proj"
"""Kernels read the weight of this module past an adapter, so PEFT takes none.
Source: huggingface/peft: src/peft/tuners/tuners_utils.py,
_check_lora_target_modules_mamba."""


def export_adapter(
    run: Path,
    out: Path | None = None,
    *,
    base: str | None = None,
    overwrite: bool = False,
    push: str | None = None,
) -> int:
    """Write the adapters of a run's newest checkpoint; `base` is the model that they adapt.

    `out` is the run's folder `adapter` when absent. `push` is a name on the Hub, to which the
    folder is then uploaded.

    Raises:
        UserError: when the run has no adapters, `base` is neither a model of Hugging Face's layout
            nor a name on the Hub, or the target may not be written; nothing is.
    """
    if push is not None:
        check_name(push)
    if base is not None and not is_exported(Path(base)) and not is_name(base):
        raise UserError(
            "is neither an exported folder nor OWNER/NAME of the Hub; PEFT could not read it.",
            key="--base",
            value=base,
        )
    if is_exported(run):
        raise UserError(
            "is an exported folder, whose adapters are merged; give the run.", where=str(run)
        )
    source = open_checkpoint(run)
    for skipped in source.skipped:
        print_text(str(skipped))
    found = read_adapters(source)
    if not found:
        raise UserError("has no adapters; export it without --adapter.", where=str(run))
    if any(name.endswith(REFUSED) for name in found):
        raise UserError(
            "PEFT reads no adapters of Mamba's out_proj; export the merged model without "
            "--adapter, or train with tune.adapter.targets that leave it out.",
            where=str(run),
        )
    home = run if source.run is None else source.run.path
    target = output_folder(out if out is not None else home / "adapter")
    check_target(target, source, overwrite=overwrite, command=COMMAND)
    with writing_beside(target, COMMAND) as partial:
        tensors = {k: t.contiguous() for k, t in peft_tensors(found).items()}
        write_tensors(partial / WEIGHTS, tensors)
        write_json(partial / CONFIG, peft_config(found, base))
        publish(partial, target, COMMAND)
    print_text(f"wrote {len(tensors):,} tensors of adapters to {target}")
    if base is None:
        print_text("note: --base would name the model in it; give that model to PEFT yourself")
    if push is not None:
        print_text(f"uploaded to {push_folder(target, push)}")
    return DONE


def read_adapters(source: CheckpointSource) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of all adapters, by the weight that each adapts, as PEFT names it.

    Raises:
        UserError: when one of them does not fit its weight.
    """
    saved = SavedTensors(source.info)
    names = {n: m for n in saved.index.tensors if (m := MARK.fullmatch(n))}
    tensors = {name: t for name, t in saved.empty(MODEL_PREFIX).items() if name in names}
    saved.load(tensors)
    with refusing_adapters(source.info):
        own = {name.removeprefix(MODEL_PREFIX): tensor for name, tensor in tensors.items()}
        by_weight(shapes(source.config), own)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, adapter, leaf = names[name].groups()
        module = module.removeprefix(MODEL_PREFIX).replace("backbone.", BACKBONE, 1)
        target = module if adapter == "adapter" else f"{module}.{adapter[:-8]}_proj"
        found.setdefault(target, {})[leaf] = tensor
    return found


def peft_config(found: Mapping[str, Mapping[str, Tensor]], base: str | None) -> dict[str, object]:
    """Return what PEFT needs to know of adapters."""
    first = next(iter(found.values()))
    rank = first["lora_A"].shape[-2]
    alpha = float(first["scaling"]) * rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": round(alpha, 6),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": any("magnitude" in tensors for tensors in found.values()),
        "target_modules": [name for name, t in found.items() if t["lora_A"].ndim == 2],
        "target_parameters": [name for name, t in found.items() if t["lora_A"].ndim == 3],
        "inference_mode": True,
    }


def peft_tensors(found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors under PEFT's names.

    Of stacked experts PEFT keeps two-dimensional matrices, and wraps the second parameter of a
    module around the first.
    Source: huggingface/peft: src/peft/tuners/lora/layer.py, ParamWrapper.
    """
    named: dict[str, Tensor] = {}
    for target, tensors in found.items():
        A, B = tensors["lora_A"], tensors["lora_B"]
        start = PREFIX + target
        if A.ndim == 3:
            module, _, leaf = start.rpartition(".")
            start = f"{module}.base_layer" if leaf == "up_proj" else module
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        named |= {f"{start}.lora_A.weight": A, f"{start}.lora_B.weight": B}
        if (magnitude := tensors.get("magnitude")) is not None:
            named[f"{start}.lora_magnitude_vector"] = magnitude
    return {name: tensor.to(torch.float32) for name, tensor in named.items()}
