"""README.md of an exported model: what it is, and its origin according to the run."""

import hashlib
import html
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from nemotron.checkpoint.manifest import CheckpointInfo
from nemotron.checkpoint.read import read_state
from nemotron.data.fingerprint import Fingerprint, read_fingerprint
from nemotron.errors import UserError
from nemotron.files import read_regular
from nemotron.hf.hub import NAME as HUB_NAME
from nemotron.hf.names import DiskParameter
from nemotron.hf.quantized.assignment import Quantized
from nemotron.hf.quantized.layouts import FORMAT_NAMES
from nemotron.hf.readers import EAGER, fits_grouped_products
from nemotron.hf.source import CheckpointSource
from nemotron.model.build import build_on_meta
from nemotron.model.config import LAYER_KINDS, ModelConfig
from nemotron.run.files import RunFiles
from nemotron.run.metrics import read_metrics
from nemotron.run.provenance import Provenance, read_provenance
from nemotron.terminal import one_line
from nemotron.yaml_text import parse_yaml

Rows = list[tuple[str, object]]

HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags: [nemotron_h, mamba-2, mixture-of-experts]
{base}# license: name one before you publish this model
---
"""

INTENDED = """## Intended use

*To be filled in: what the model is for, what it is not for, and what it was not tested on.*
"""

USE = """## Use

```python
import math
import transformers

name = {name}
tokenizer = transformers.AutoTokenizer.from_pretrained(name)
model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype="auto"{experts})
for module in model.modules():  # up to 5.23, transformers raises small time steps to 0.001
    if hasattr(module, "time_step_limit"):
        module.time_step_limit = {limit}
{prompt}
output = model.generate(**inputs, max_new_tokens=32)
print(tokenizer.decode(output[0]))
```

or, with the package that wrote it: `{command}`.
"""

USE_QUANTIZED = """## Use

Inference engines read this layout: `vllm serve {shell}`, for instance. The package that wrote it
computes with the decoded weights: `{command}`.
"""

TEXT_COMMAND = 'nemotron generate {name} --prompt "def read("'
TEXT_PROMPT = 'inputs = tokenizer("def read(", return_tensors="pt")'
CHAT_PROMPT = """messages = [{"role": "user", "content": "Who wrote this?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""

HERE = "."
"""The folder of the card, as a name of the model."""

HYPER_PARAMETERS = (
    *("stage", "data.seq_len", "batch", "schedule", "optimizer", "loss", "precision.compute"),
    *(
        "precision.preset",
        "tune",
        "teacher",
        "distillation",
        "reference",
        "dpo",
        "advantage",
        "policy",
    ),
    *(f"rollout.num_{counted}" for counted in ("prompts_per_step", "generations_per_prompt")),
    *(f"rollout.{key}" for key in ("updates_per_step", "max_new_tokens", "temperature", "lag")),
)
"""Keys of a recipe, and sections, that the card lists."""


def model_card(
    source: CheckpointSource,
    parameters: Sequence[DiskParameter],
    name: str = HERE,
    quantized: Quantized | None = None,
) -> str:
    """Return the text of the model card; `parameters` are those of the folder.

    `name` is what the card's program calls the model: its name on the Hub, or its own folder.
    """
    run = source.run
    recipe = _recipe(run)
    sections = [
        f"# {_plain(run.path.name if run else source.info.folder.name)}\n",
        "A language model with the NemotronH architecture, written by `nemotron-train`.\n",
        INTENDED,
        _table("Architecture", [*_architecture(source.config), *_formats(parameters)]),
        _table("Quantization", _quantization(quantized)),
        _table("Training", [*_base(recipe), *_training(source.info, run)]),
        _table("Hyper-parameters", _hyper_parameters(recipe)),
        _table("Results", _results(source.info, run)),
        _use(source, name, USE if quantized is None else USE_QUANTIZED),
    ]
    return _header(recipe) + "\n" + "\n".join(section for section in sections if section)


def _header(recipe: Mapping[str, object]) -> str:
    """Return the card's metadata; only a model of the Hub is a base model that readers can find."""
    origin = str(recipe.get("init_from") or "")
    named = HUB_NAME.fullmatch(origin) if not Path(origin).exists() else None
    return HEADER.replace("{base}", f"base_model: {named['repo']}\n" if named else "")


def _use(source: CheckpointSource, name: str, text: str) -> str:
    is_chat = source.run is not None and source.run.chat_template.is_file()
    comment = "  # the folder of this file" if name == HERE else ""
    values = {
        "name": f'"{name}"{comment}',
        "shell": name,
        "command": f"nemotron chat {name}" if is_chat else TEXT_COMMAND.format(name=name),
        "limit": _python(source.config.time_step_limit),
        "prompt": CHAT_PROMPT if is_chat else TEXT_PROMPT,
        "experts": "" if fits_grouped_products(source.config) else EAGER,
    }
    for key, value in values.items():
        text = text.replace(f"{{{key}}}", value)
    return text


def _recipe(run: RunFiles | None) -> Mapping[str, object]:
    """Return the values of a run's recipe; none where an import left no recipe."""
    if run is None or not run.recipe.is_file():
        return {}
    try:
        text = read_regular(run.recipe).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"is damaged: {error}.", where=str(run.recipe)) from None
    read = parse_yaml(text, str(run.recipe), {})
    return read if isinstance(read, Mapping) else {}


def _base(recipe: Mapping[str, object]) -> Rows:
    origin = recipe.get("init_from")
    return [("base model", _plain(origin))] if origin else []


def _hyper_parameters(recipe: Mapping[str, object]) -> Rows:
    """Return each key of the sections with its value; what is absent or null is left out."""
    flat = dict(_flat(recipe, ""))
    if flat.get("optimizer.name") != "muon":  # its settings have had no effect
        flat = {key: v for key, v in flat.items() if not key.startswith("optimizer.muon.")}
    return [
        (key, _plain(value))
        for wanted in HYPER_PARAMETERS
        for key, value in flat.items()
        if (key == wanted or key.startswith(f"{wanted}.")) and value not in (None, [])
    ]


def _flat(values: Mapping[str, object], start: str) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{start}{key}.")
        else:
            yield f"{start}{key}", value


def _results(info: CheckpointInfo, run: RunFiles | None) -> Rows:
    """Return the run's own validation at the step of the checkpoint, or before it."""
    if run is None or not run.metrics.is_file():
        return []
    records = [
        record
        for record in read_metrics(run.metrics)
        if record["kind"] == "validation" and int(record["step"] or 0) <= info.step
    ]
    if not records:
        return []
    values = [
        (f"{_plain(key)}", f"{value:.4f}")
        for key, value in records[-1].items()
        if key.startswith("validation/") and isinstance(value, float)
    ]
    return [("held-out text, at step", records[-1]["step"]), *values] if values else []


def _architecture(config: ModelConfig) -> Rows:
    kinds = {LAYER_KINDS[k]: config.hybrid_override_pattern.count(k) for k in LAYER_KINDS}
    layers = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    meta = build_on_meta(config)
    mtp = sum(p.numel() for p in meta.mtp.parameters()) if meta.mtp else 0
    rows: Rows = [
        ("layers", f"`{config.hybrid_override_pattern}` ({layers})"),
        ("parameters", f"{sum(p.numel() for p in meta.parameters()) - mtp:,}"),
    ]
    if mtp:
        rows.append(("multi-token prediction", f"`{config.mtp_pattern}`, {mtp:,} parameters"))
    return [*rows, ("vocabulary", f"{config.vocab_size:,}"), ("hidden size", config.hidden_size)]


def _formats(parameters: Sequence[DiskParameter]) -> Rows:
    """Say how many values lie on disk in each format."""
    counts: Counter[str] = Counter()
    for parameter in parameters:
        counts[parameter.format.name] += prod(parameter.shape)
    listed = ", ".join(f"{name} ({count:,} values)" for name, count in counts.most_common())
    return [("stored as", listed)]


def _quantization(quantized: Quantized | None) -> Rows:
    """Say in which layout layers are quantized, how many, and whether their inputs are."""
    if quantized is None:
        return []
    counts = Counter(
        (FORMAT_NAMES[scales.format], scales.input_scale is not None)
        for scales in quantized.layers.values()
    )
    rows: Rows = [("layout", quantized.layout)]
    for (format, has_inputs), count in counts.items():
        inputs = "weights and inputs" if has_inputs else "weights"
        rows.append((f"layers in {format}", f"{count:,} ({inputs})"))
    cache = "FP8, with scales of each layer" if quantized.cache_scales else "not quantized"
    return [*rows, ("cache of keys and values", cache)]


def _training(info: CheckpointInfo, run: RunFiles | None) -> Rows:
    rows: Rows = [("step", f"{info.step:,}")]
    state = read_state(info)
    if state.trainer is not None:
        rows.append(("tokens seen", f"{state.trainer.tokens:,}"))
    if state.merged is not None:
        rows += _average(state.merged)
    # runs on pairs or rollouts have other states, which say little of the model
    if state.data is not None and any(key.startswith("data.") for key in state.data):
        rows += _data(read_fingerprint(state.data))
    if run is None:
        return rows
    recipe, provenance = run.recipe, run.provenance
    if recipe.is_file():
        rows.append(("recipe (sha256)", f"`{hashlib.sha256(read_regular(recipe)).hexdigest()}`"))
    if provenance.is_file():
        rows += _provenance(read_provenance(provenance))
    return rows


def _average(merged: Mapping[str, Any]) -> Rows:  # Any: JSON
    """Say which checkpoints the weights are the average of, and which of the run were damaged."""
    rows: Rows = []
    for key, name in (("steps", "average of steps"), ("damaged", "left out, damaged: steps")):
        steps = merged.get(key)
        if isinstance(steps, list) and steps and all(type(step) is int for step in steps):
            rows.append((name, ", ".join(f"{step:,}" for step in steps)))
    return rows


def _data(data: Fingerprint) -> Rows:
    rows: Rows = [
        (f"data: {_plain(name)}", f"{source.tokens:,} tokens, hash {_code(source.content)}")
        for name, source in data.sources.items()
    ]
    for phase in data.phases:
        for length in phase.lengths:
            whole = sum(length.sources.values())
            shares = (f"{name} {share / whole:.1%}" for name, share in length.sources.items())
            rows.append((f"blend of phase {_plain(phase.name)}", _plain(", ".join(shares))))
    named = {"seed": data.seed, "data.tokenizer": data.tokenizer, "data.seq_len": data.seq_len}
    return [*rows, *((key, _plain(value)) for key, value in named.items())]


def _provenance(known: Provenance) -> Rows:
    """Return what is there of the entries; which facts a run noted depends on its version."""
    rows: Rows = [("run", _plain(known.id))]
    if known.imported is not None:
        rows.append(("imported from", _plain(known.imported.get("from"))))
    if known.starts:
        last = known.starts[-1]
        rows.append(("last start", _plain(last.get("time"))))
        for part in (last.get("code"), last.get("versions")):
            if isinstance(part, dict):
                rows += [(_plain(name), _plain(value)) for name, value in part.items()]
    return rows


def _table(title: str, rows: Rows) -> str:
    """Return a section with a table; nothing without rows."""
    if not rows:
        return ""
    lines = [
        f"## {title}\n",
        "| | |",
        "|---|---|",
        *(f"| {key} | {_cell(value)} |" for key, value in rows),
    ]
    return "\n".join(lines) + "\n"


def _plain(value: object) -> str:
    """Return a text of the run, escaped so that it is neither HTML nor Markdown."""
    text = re.sub(r"([\\`*\[\]!])", r"\\\1", one_line(str(value)))
    return html.escape(text, quote=False)


def _code(value: object) -> str:
    return f"`{one_line(str(value)).replace('`', chr(39))}`"


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _python(limit: tuple[float, float]) -> str:
    low, high = limit
    return f"({low}, {'math.inf' if high == float('inf') else high})"
