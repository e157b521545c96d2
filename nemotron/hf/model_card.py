"""README.md of an exported model: what it is, and its origin according to the run."""

import hashlib
import html
import re
from collections import Counter
from collections.abc import Sequence
from math import prod

from nemotron.checkpoint.manifest import CheckpointInfo
from nemotron.checkpoint.read import read_state
from nemotron.data.fingerprint import Fingerprint, read_fingerprint
from nemotron.hf.names import DiskParameter
from nemotron.hf.source import CheckpointSource
from nemotron.model.build import build_on_meta
from nemotron.model.config import LAYER_KINDS, ModelConfig
from nemotron.run.files import RunFiles
from nemotron.run.provenance import Provenance, read_provenance
from nemotron.terminal import one_line

HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags: [nemotron_h, mamba-2, mixture-of-experts]
# license: name one before you publish this model
---
"""

USE = """## Use

```python
import math
import transformers

model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")
tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
for module in model.modules():  # up to 5.23, transformers raises small time steps to 0.001
    if hasattr(module, "time_step_limit"):
        module.time_step_limit = {limit}
```

or, with the package that wrote it: `model = nemotron.load(FOLDER)`, then
`model.logits(model(input_ids))`.
"""


def model_card(source: CheckpointSource, parameters: Sequence[DiskParameter]) -> str:
    """Return the text of the model card; `parameters` are those of the folder."""
    sections = [
        f"# {_plain(source.run.path.name if source.run else source.info.folder.name)}\n",
        "A language model with the NemotronH architecture, written by `nemotron-train`.\n",
        _table("Architecture", [*_architecture(source.config), _formats(parameters)]),
        _table("Training", _training(source.info, source.run)),
        USE.replace("{limit}", _python(source.config.time_step_limit)),
    ]
    return HEADER + "\n" + "\n".join(sections)


def _architecture(config: ModelConfig) -> list[tuple[str, object]]:
    kinds = {LAYER_KINDS[k]: config.hybrid_override_pattern.count(k) for k in LAYER_KINDS}
    layers = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    meta = build_on_meta(config)
    mtp = sum(p.numel() for p in meta.mtp.parameters()) if meta.mtp else 0
    rows: list[tuple[str, object]] = [
        ("layers", f"`{config.hybrid_override_pattern}` ({layers})"),
        ("parameters", f"{sum(p.numel() for p in meta.parameters()) - mtp:,}"),
    ]
    if mtp:
        rows.append(("multi-token prediction", f"`{config.mtp_pattern}`, {mtp:,} parameters"))
    return [*rows, ("vocabulary", f"{config.vocab_size:,}"), ("hidden size", config.hidden_size)]


def _formats(parameters: Sequence[DiskParameter]) -> tuple[str, object]:
    """Say how many values lie on disk in each format."""
    counts: Counter[str] = Counter()
    for parameter in parameters:
        counts[parameter.format.name] += prod(parameter.shape)
    listed = ", ".join(f"{name} ({count:,} values)" for name, count in counts.most_common())
    return "stored as", listed


def _training(info: CheckpointInfo, run: RunFiles | None) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("step", f"{info.step:,}")]
    state = read_state(info)
    if state.trainer is not None:
        rows.append(("tokens seen", f"{state.trainer.tokens:,}"))
    if state.data is not None:
        rows += _data(read_fingerprint(state.data))
    if run is None:
        return rows
    recipe, provenance = run.recipe, run.provenance
    if recipe.is_file():
        rows.append(("recipe (sha256)", f"`{hashlib.sha256(recipe.read_bytes()).hexdigest()}`"))
    if provenance.is_file():
        rows += _provenance(read_provenance(provenance))
    return rows


def _data(data: Fingerprint) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [
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


def _provenance(known: Provenance) -> list[tuple[str, object]]:
    """Return what is there of the entries; which facts a run noted depends on its version."""
    rows: list[tuple[str, object]] = [("run", _plain(known.id))]
    if known.imported is not None:
        rows.append(("imported from", _plain(known.imported.get("from"))))
    if known.starts:
        last = known.starts[-1]
        rows.append(("last start", _plain(last.get("time"))))
        for part in (last.get("code"), last.get("versions")):
            if isinstance(part, dict):
                rows += [(_plain(name), _plain(value)) for name, value in part.items()]
    return rows


def _table(title: str, rows: list[tuple[str, object]]) -> str:
    lines = [
        f"## {title}\n",
        "| | |",
        "|---|---|",
        *(f"| {key} | {_cell(value)} |" for key, value in rows),
    ]
    return "\n".join(lines) + "\n"


def _plain(value: object) -> str:
    """Return a text of the run as one that is shown as it is: neither HTML nor Markdown."""
    text = re.sub(r"([\\`*\[\]!])", r"\\\1", one_line(str(value)))
    return html.escape(text, quote=False)


def _code(value: object) -> str:
    return f"`{one_line(str(value)).replace('`', chr(39))}`"


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _python(limit: tuple[float, float]) -> str:
    low, high = limit
    return f"({low}, {'math.inf' if high == float('inf') else high})"
