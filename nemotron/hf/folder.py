"""Reading a folder in Hugging Face's layout: every tensor must be there, and no other."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import Tensor

from nemotron.checkpoint.read import EMBEDDING, TIED_HEAD
from nemotron.errors import UserError
from nemotron.files import hash_file
from nemotron.hf.config import HFConfig, from_hf
from nemotron.hf.formats import FORMATS, DiskFormat, DiskTensor
from nemotron.hf.names import DiskParameter, count_parameters, disk_parameters, disk_tensors
from nemotron.hf.quantized.declaration import Declaration, check_constants, check_scales
from nemotron.hf.quantized.read import read_declaration
from nemotron.hf.shards import ShardedFolder, StoredTensor, read_json
from nemotron.model.build import shapes
from nemotron.model.config import ModelConfig

CONFIG = "config.json"
REPORT = "export_report.json"

MOST_MISSING = 100_000
"""Tensors that are looked for by name although they cannot all be there."""

PACKED_DTYPES = {"U8": "NVFP4", "F8_E4M3": "FP8", "F8_E5M2": "FP8", "U32": "MLX"}
SCALES = ("_scale", "_scale_2", "_scale_inv", "_packed", ".scales", ".biases")


@dataclass(frozen=True)
class LoadedFolder:
    """A model read from a folder.

    `weights` are float32 under the names of `HybridLM.state_dict()`; `notes` says, one clause
    each, what in the folder was passed over.
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    notes: tuple[str, ...]
    stop_ids: tuple[int, ...]
    """Ends of text that `config.json` names."""
    formats: dict[str, JsonValue]
    """The most common format (`default`), and those of `others` by the name of the parameter."""


def is_exported(path: Path) -> bool:
    """Say whether `path` is a folder in Hugging Face's layout."""
    return (path / CONFIG).is_file()


def read_folder(folder: Path, formats: Sequence[DiskFormat] = FORMATS) -> LoadedFolder:
    """Read configuration and weights; values on disk become the equal float32 ones.

    Each parameter has the format among `formats` that fits its tensors best.

    Raises:
        UserError: when a tensor is missing, too many, of another shape or format, when a scale is
            no positive number or the declaration of quantized layers contradicts their tensors,
            when a file is damaged, or when the configuration asks for what the model cannot do.
    """
    read, declared, parameters, stored = _open(folder, formats)
    weights = _collect(read.model, parameters, stored, str(folder))
    if read.model.tie_word_embeddings:
        _tie(folder, weights)
    notes = (*read.notes, *(declared.notes(parameters) if declared else ()))
    return LoadedFolder(read.model, weights, notes, read.stop_ids, _note_formats(parameters))


def check_folder(folder: Path) -> None:
    """Check all of a folder but the numbers that its weights hold, reading no more than scales.

    Raises:
        UserError: as `read_folder`.
    """
    _, _, parameters, stored = _open(folder, FORMATS)
    for parameter in parameters:
        check_scales(parameter, stored.read, str(folder))


def _open(
    folder: Path, formats: Sequence[DiskFormat]
) -> tuple[HFConfig, Declaration | None, list[DiskParameter], ShardedFolder]:
    """Return what a folder describes, once its files fit the description."""
    values, declared = read_json(folder / CONFIG), read_declaration(folder)
    if declared is not None:
        values.pop("quantization_config", None)
    read = from_hf(values, str(folder / CONFIG))
    stored = ShardedFolder(folder)
    if (named := count_parameters(read.model)) > MOST_MISSING + len(stored.tensors):
        raise UserError(
            f"{CONFIG} describes {named:,} tensors, but there are "
            f"{len(stored.tensors):,}; the tensors must be those of {CONFIG}.",
            where=str(folder),
        )
    parameters = [
        replace(parameter, format=_format_of(parameter, formats, stored))
        for parameter in disk_parameters(read.model)
        if not (read.model.tie_word_embeddings and _is_left_out(parameter, stored))
    ]
    if declared is not None:
        parameters = declared.formatted(parameters, stored.tensors)
    tensors = disk_tensors(parameters)
    _refuse_packed(stored, tensors)
    _check_names(folder, tensors, list(stored.tensors))
    _check_stored(folder, parameters, formats, stored.tensors)
    _check_hashes(folder, {entry.file for entry in stored.tensors.values()})
    return read, declared, parameters, stored


def _note_formats(parameters: Sequence[DiskParameter]) -> dict[str, JsonValue]:
    """Return what `imported_formats` reads again at an export."""
    counts: Counter[str] = Counter()
    for parameter in parameters:
        counts[parameter.format.name] += prod(parameter.shape)
    default = counts.most_common(1)[0][0]
    others = {p.name: p.format.name for p in parameters if p.format.name != default}
    return {"default": default, "others": dict[str, JsonValue](others)}


def _collect(
    config: ModelConfig, parameters: Sequence[DiskParameter], stored: ShardedFolder, where: str
) -> dict[str, Tensor]:
    """Fill the model's tensors one parameter at a time."""
    shape_of, weights = shapes(config), dict[str, Tensor]()
    for parameter in parameters:
        source = parameter.source
        if source not in weights:
            weights[source] = torch.empty(shape_of[source])
        own = {tensor.name: stored.read(tensor.name) for tensor in parameter.tensors}
        check_constants(parameter, own, where)
        parameter.part_of(weights[source]).copy_(parameter.decode(own))
    return weights


def _tie(folder: Path, weights: dict[str, Tensor]) -> None:
    embedding = weights[EMBEDDING]
    if not torch.equal(weights.setdefault(TIED_HEAD, embedding), embedding):
        rule = f"is wrong: {TIED_HEAD} differs from {EMBEDDING}; set it to false."
        where = str(folder / CONFIG)
        raise UserError(rule, key="tie_word_embeddings", value=True, where=where)
    weights[TIED_HEAD] = embedding


def _is_left_out(parameter: DiskParameter, stored: ShardedFolder) -> bool:
    """Return whether the parameter is a head that the folder does not hold separately."""
    return parameter.name == TIED_HEAD and TIED_HEAD not in stored.tensors


def _format_of(
    parameter: DiskParameter, formats: Sequence[DiskFormat], stored: ShardedFolder
) -> DiskFormat:
    """Return the format with most tensors that are there and fewest that are not."""

    def fit(form: DiskFormat) -> int:
        tensors = form.tensors(parameter.name, parameter.shape)
        return sum(1 if _is_there(tensor, stored.tensors) else -1 for tensor in tensors)

    can_hold = [form for form in formats if form.tensors(parameter.name, parameter.shape)]
    return max(can_hold, key=fit)


def _is_there(tensor: DiskTensor, found: dict[str, StoredTensor]) -> bool:
    entry = found.get(tensor.name)
    return entry is not None and (entry.shape, entry.dtype) == (tensor.shape, tensor.stored_dtype)


def _refuse_packed(stored: ShardedFolder, expected: Sequence[DiskTensor]) -> None:
    """Refuse packed tensors that no format has asked for."""
    wanted = {tensor.name: tensor.stored_dtype for tensor in expected}
    dtypes = {entry.dtype for entry in stored.tensors.values()}
    others = {k: entry for k, entry in stored.tensors.items() if wanted.get(k) != entry.dtype}
    strange = {entry.dtype for entry in others.values()}
    kinds = [kind for dtype, kind in PACKED_DTYPES.items() if dtype in strange]
    scales = [name for name in others if name.endswith(SCALES)]
    if kinds or scales:
        sign = f"it has {scales[0]}" if scales else f"its tensors are {', '.join(sorted(dtypes))}"
        raise UserError(
            f"is a packed {' or '.join(kinds) or 'quantized'} checkpoint "
            f"({sign}); use the bfloat16 checkpoint of this model.",
            where=str(stored.folder),
        )


def _check_names(folder: Path, expected: Sequence[DiskTensor], found: Sequence[str]) -> None:
    names, there = {tensor.name for tensor in expected}, set(found)
    missing = [tensor.name for tensor in expected if tensor.name not in there]
    extra = sorted(there - names)
    problems = []
    for what, some in (("missing", missing), ("not in the model", extra)):
        mtp = [name for name in some if name.startswith("mtp.")]
        others = [name for name in some if not name.startswith("mtp.")]
        if mtp:
            problems.append(f"{len(mtp)} tensors of multi-token prediction are {what} ({mtp[0]} …)")
        if others:
            listed = ", ".join(others[:10]) + (" …" if len(others) > 10 else "")
            problems.append(f"{len(others)} tensors are {what}: {listed}")
    if not problems:
        return
    advice = f"the tensors must be those of {CONFIG}"
    if missing and all(name.startswith("mtp.") for name in missing):
        advice = (
            "transformers drops them when it saves: take the original folder, or set "
            f"num_nextn_predict_layers to 0 in {CONFIG}"
        )
    raise UserError(f"{'; '.join(problems)}; {advice}.", where=str(folder))


def _check_stored(
    folder: Path,
    parameters: Sequence[DiskParameter],
    formats: Sequence[DiskFormat],
    found: dict[str, StoredTensor],
) -> None:
    """Compare shapes and dtypes with those of each parameter's format."""
    problems = []
    for parameter in parameters:
        for tensor in parameter.tensors:
            entry = found[tensor.name]
            if entry.shape != tensor.shape:
                shapes = f"{list(entry.shape)} instead of {list(tensor.shape)}"
                problems.append(f"{tensor.name} has shape {shapes}")
            elif entry.dtype != tensor.stored_dtype:
                known = " or ".join(form.name for form in formats)
                problems.append(f"{tensor.name} is {entry.dtype} instead of {known}")
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(f"{'; '.join(problems[:10])}{more}.", where=str(folder))


def _check_hashes(folder: Path, files: set[str]) -> None:
    """Compare the files with the hashes that our own export wrote beside them, if it did."""
    if not (folder / REPORT).is_file():
        return
    hashes = read_json(folder / REPORT).get("xxh128", {})
    if not isinstance(hashes, dict):
        raise UserError("is not a report of an export; remove it.", where=str(folder / REPORT))
    for name in sorted(files):
        if name in hashes and hash_file(folder / name) != hashes[name]:
            raise UserError(
                f"is not what was exported: its content does not match its hash in "
                f"{REPORT}; remove that file if the change was intentional.",
                where=str(folder / name),
            )
