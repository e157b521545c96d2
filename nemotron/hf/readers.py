"""Programs that read an exported folder, and what each of them cannot take."""

from collections.abc import Iterator
from dataclasses import dataclass

from nemotron.hf.config import groups_differ
from nemotron.model.config import ModelConfig

EAGER = ', experts_implementation="eager"'
"""Argument with which transformers loads experts of any width."""

STRIDE = 8
"""Values of bfloat16 in 16 bytes; rows of torch's grouped products must be multiples of it."""


@dataclass(frozen=True)
class Limit:
    """What in a model a reader does not take."""

    reader: str
    reason: str

    def __str__(self) -> str:
        return f"{self.reader}: {self.reason}"


def fits_grouped_products(config: ModelConfig) -> bool:
    """Say whether torch's grouped products take the experts' matrices."""
    if not config.moe_layers:
        return True
    widths = (config.expert_input_size, config.moe_intermediate_size)
    return all(width % STRIDE == 0 for width in widths)


def limits(config: ModelConfig) -> list[Limit]:
    """Return why readers of an export would refuse a model, or compute something else.

    Sources: transformers 5.23 (models/nemotron_h), torch 2.13 (`F.grouped_mm`), and
    ggml-org/llama.cpp: conversion/nemotron.py, src/models/nemotron-h.cpp.
    """
    return [*_of_transformers(config), *_of_llama_cpp(config)]


def _of_transformers(config: ModelConfig) -> Iterator[Limit]:
    if groups_differ(config):
        yield Limit(
            "every other program", "groups of experts that it scores in another way (n_group)"
        )
    if not fits_grouped_products(config):
        yield Limit(
            "transformers",
            f"experts of a width that {STRIDE} does not divide (but experts_implementation=eager)",
        )


def _of_llama_cpp(config: ModelConfig) -> Iterator[Limit]:
    pattern = config.hybrid_override_pattern
    if config.vocab_size % STRIDE:
        yield Limit("llama.cpp", f"vocab_size = {config.vocab_size} is no multiple of {STRIDE}")
    if not {"M", "*"} <= set(pattern):
        yield Limit("llama.cpp", "the pattern lacks M or * layers; its cache wants both")
    if "-" in pattern and "E" in pattern + config.mtp_pattern:
        yield Limit("llama.cpp", "the patterns have both E and - layers")
    if "M" in pattern and not config.use_conv_bias:
        yield Limit("llama.cpp", "use_conv_bias = false; it wants the bias")
    if config.mtp_pattern not in ("", "*E"):
        yield Limit(
            "llama.cpp", f"the pattern of multi-token prediction is not *E but {config.mtp_pattern}"
        )
