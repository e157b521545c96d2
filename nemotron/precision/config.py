"""Which number format the layers compute in."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nemotron.errors import RuleBroken
from nemotron.section import Section

Format = Literal["bf16", "fp8_delayed", "fp8_current", "fp8_block", "mxfp8", "nvfp4"]
Preset = Literal[
    "bf16", "fp8_delayed", "fp8_current", "fp8_block", "mxfp8", "nvfp4", "nvfp4_super", "nvfp4_all"
]


class PrecisionRule(Section):
    """A format for the linear layers that meet every condition given."""

    format: Format
    """Number format of the three matrix products; bf16: not quantized."""
    kind: str | None = None
    """Kind of layer, such as mamba.in_proj, moe.experts or attention.*."""
    name: str | None = None
    """Pattern of the module's name, such as backbone.layers.1.*."""
    first_block: int | None = Field(None, ge=0)
    """First block of a range, counted from 0."""
    last_block: int | None = Field(None, ge=0)
    """Last block of a range."""
    tail: float | None = Field(None, gt=0, le=1)
    """Share of the blocks, counted from the end, rounded to whole blocks."""
    tail_blocks: int | None = Field(None, gt=0)
    """Number of blocks, counted from the end."""

    @property
    def is_of_blocks(self) -> bool:
        """Whether the rule names blocks, so that layers outside the stack never fit."""
        limits = (self.first_block, self.last_block, self.tail, self.tail_blocks)
        return any(limit is not None for limit in limits)

    @model_validator(mode="after")
    def _check(self) -> "PrecisionRule":
        if not self.model_fields_set - {"format"}:
            raise RuleBroken("format", "stands alone; give the rule a condition, or use preset")
        return self


class PrecisionSwitch(Section):
    """A change of the preset during the run."""

    step: int = Field(gt=0)
    """Optimizer step, counted from 0, from which the preset holds."""
    preset: Preset
    """Formats from then on; the rules of the recipe stay in front."""


class NVFP4Config(Section):
    """Ingredients of NVFP4 training; each can be left out to see what it does."""

    hadamard: bool = True
    """Whether the weight gradient's operands are transformed."""
    stochastic_rounding: bool = True
    """Whether gradients are rounded stochastically."""
    square_weights: bool = True
    """Whether weights share a scale in squares of 16 instead of rows of 16."""


class DelayedConfig(Section):
    """How the format fp8_delayed takes a scale from the steps before."""

    history_length: int = Field(1024, gt=0)
    """Steps whose largest magnitudes are kept, that which ended last among them."""
    algorithm: Literal["max", "most_recent"] = "max"
    """Which of them decides: the largest, or the last."""
    margin: int = Field(0, ge=0)
    """Powers of two between the largest magnitude and the end of the format."""


class PrecisionConfig(Section):
    """Compute precision; the master weights and the optimizer's moments are always float32."""

    compute: Literal["fp32", "bf16"] = "fp32"
    """Format of activations and of the matrix products that are not quantized."""
    preset: Preset = "bf16"
    """Formats of the linear layers: nvfp4, or nvfp4_super, is Super's pre-training; bf16: none."""
    rules: Annotated[tuple[PrecisionRule, ...], Field(strict=False)] = ()
    """Rules before those of the preset; the first that fits decides."""
    switches: Annotated[tuple[PrecisionSwitch, ...], Field(strict=False)] = ()
    """Changes of the preset during the run, in order."""
    backend: Literal["auto", "emulate", "torch", "triton", "transformer_engine"] = "auto"
    """How quantized products are computed; auto takes the fastest that has the format here."""

    observe_every_steps: int | None = Field(None, gt=0)
    """Optimizer steps between measurements of what quantizing does; absent: none."""
    nvfp4: NVFP4Config = NVFP4Config()
    """Ingredients of the format nvfp4."""
    fp8_delayed: DelayedConfig = DelayedConfig()
    """Where the format fp8_delayed has its scales from."""

    @property
    def quantizes(self) -> bool:
        """Whether any layer may be quantized at any time."""
        return any(name != "bf16" for name in self._named())

    def names(self, start: str) -> bool:
        """Say whether a preset or rule of that name, or beginning with it, is given."""
        return any(name.startswith(start) for name in self._named())

    def preset_at(self, step: int) -> str:
        """Return the preset that holds at a step."""
        presets = [self.preset, *(s.preset for s in self.switches if s.step <= step)]
        return presets[-1]

    def _named(self) -> list[str]:
        presets = [self.preset, *(switch.preset for switch in self.switches)]
        return [*presets, *(rule.format for rule in self.rules)]

    @model_validator(mode="after")
    def _check(self) -> "PrecisionConfig":
        steps = [switch.step for switch in self.switches]
        if steps != sorted(set(steps)):
            raise RuleBroken("switches", f"are at the steps {steps}; put them in order, each once")
        if self.quantizes and self.compute != "bf16":
            raise RuleBroken(
                "compute",
                "cannot be quantized further; use compute: bf16 with a preset or rules that "
                "quantize",
                self.compute,
            )
        return self
