"""What the command prints and writes about a quantized model."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from nemotron.checkpoint.manifest import code_version
from nemotron.evaluate.agreement import Agreement
from nemotron.quantize.calibrate import FEW_TOKENS, Observed
from nemotron.quantize.decide import Decision, Wanted
from nemotron.quantize.size import Size

FORMATS = ("nvfp4", "fp8", "bf16")
NAMED = 3
"""Layers with rarely used experts that are printed; the file names all."""


def as_json(
    wanted: Wanted, decision: Decision, size: Size, compared: Mapping[str, Agreement]
) -> dict[str, Any]:  # Any: JSON
    """Return all that is known about a quantized model."""
    observed, found = decision.observed, decision.found
    return {
        "version": code_version(),
        "preset": wanted.preset,
        "like": None if wanted.like is None else str(wanted.like),
        "weights": wanted.observer,
        "keep": list(wanted.keep),
        "kv_cache": "fp8" if decision.scales.cache else "bf16",
        "bits_per_weight": {"linear_layers": size.of_linears, "model": size.of_model},
        "layers": dict(size.layers),
        "parameters": dict(size.parameters),
        "formats": dict(decision.table),
        "calibration": {
            "tokens": observed.tokens,
            "inputs": wanted.inputs,
            "every_expert": wanted.every_expert,
            "experts_below_8_tokens": {
                name: {str(expert): n for expert, n in few.items()}
                for name, few in observed.rare().items()
            },
        },
        "held_out": {name: asdict(found) for name, found in compared.items()},
        "search": None
        if found is None
        else {
            "bits": wanted.bits,
            "score": wanted.score,
            "cost": wanted.cost,
            "chosen": asdict(found.chosen),
            "groups": dict(found.groups),
            "scores": decision.scores,
            "curve": [asdict(point) for point in found.curve],
        },
    }


def lines(size: Size, observed: Observed, compared: Mapping[str, Agreement]) -> Iterator[str]:
    """Yield what the command prints."""
    yield f"{'format':<8}{'layers':>8}{'parameters':>16}"
    for format in FORMATS:
        if number := size.parameters.get(format):
            yield f"{format:<8}{size.layers.get(format, 0):>8}{number:>16,}"
    yield f"{size.of_linears:.3f} bits a weight of linear layers, {size.of_model:.3f} of the model"
    yield ""
    width = max(map(len, compared))
    heads = ("loss before", "after", "± of change", "KL", "same top-1")
    yield " " * width + "".join(f"{head:>13}" for head in heads)
    for name, one in compared.items():
        values = (one.reference_loss, one.loss, one.error, one.kl)
        cells = "".join(f"{value:>13.5f}" for value in values)
        yield f"{name:<{width}}{cells}{one.top1:>13.2%}"
    yield from _rare(observed)


def _rare(observed: Observed) -> Iterator[str]:
    rare = observed.rare()
    for name, few in list(rare.items())[:NAMED]:
        yield (
            f"note: {len(few)} experts of {name} saw fewer than {FEW_TOKENS} of "
            f"{observed.tokens:,} tokens; their inputs have the scale of the layer's others."
        )
    if len(rare) > NAMED:
        yield f"note: so did experts of {len(rare) - NAMED} more layers; calibrate on more rows."
