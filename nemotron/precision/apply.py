"""Put a built model into the recipe's number formats; the model's own code knows none of them."""

from collections.abc import Callable, Sequence

import torch
import xxhash
from torch import Tensor, nn

from nemotron.ops.grouped_linear.loop import groups_of
from nemotron.precision.config import PrecisionConfig
from nemotron.precision.linear import quantized_grouped_linear, quantized_linear
from nemotron.precision.policy import Assignment, kind_of, resolve
from nemotron.precision.schemes import SCHEMES, Draw, NVFP4Scheme, Scheme
from nemotron.precision.telemetry import Telemetry

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def apply(model: nn.Module, config: PrecisionConfig) -> None:
    """Set the dtype of activations and matrix products; parameters stay float32 masters.

    Norm weights, decay, time step and router compute in float32 whatever is chosen here.
    """
    model.compute_dtype = DTYPES[config.compute]  # type: ignore[assignment]


class Quantization:
    """The formats of a model's linear layers, which may change from step to step.

    A quantised layer keeps its parameter and its name; only what its call does is replaced. Random
    bits of the gradients' rounding hang on seed, step, layer, call and row, so a resumed run draws
    the same ones.
    """

    def __init__(self, model: nn.Module, config: PrecisionConfig, seed: int) -> None:
        self._model, self._config, self._seed = model, config, seed
        self.preset: str | None = None
        options = config.nvfp4
        self._schemes = SCHEMES | {
            "nvfp4": NVFP4Scheme(
                options.hadamard, options.stochastic_rounding, options.square_weights
            )
        }
        self._step = self._first_token = 0
        self._calls: dict[str, int] = {}
        self._observed = Telemetry()
        self.table: list[Assignment] = []
        """What every linear layer computes in now."""
        self.begin(0, 0)

    def begin(self, step: int, first_token: int) -> bool:
        """Enter a portion of a step, whose first token has this number in the whole batch.

        Returns whether the formats change here, to those of another preset.
        """
        self._step, self._first_token = step, first_token
        self._calls.clear()
        if (preset := preset_at(self._config, step)) == self.preset:
            return False
        self.preset = preset
        self.table = assign(self._model, self._config, preset)
        for line in self.table:
            self._bind(self._model.get_submodule(line.module), line)
        return True

    def metrics(self) -> dict[str, float]:
        """Return what was measured of the operands since this was last asked for."""
        return self._observed.take()

    def _is_observed(self) -> bool:
        every = self._config.observe_every_steps
        return every is not None and (self._step + 1) % every == 0 and torch.is_grad_enabled()

    def _observe(self, name: str, scheme: Scheme, x: Tensor, weight: Tensor, y: Tensor) -> None:
        """Measure the operands of a product; the gradient's when it comes."""
        observe, narrow = self._observed.observe, weight.detach().to(torch.bfloat16)
        observe(name, "x", x, scheme.activation(x.detach()))
        observe(name, "w", narrow, scheme.weight(narrow)[0])
        if y.requires_grad:
            y.register_hook(lambda dy: observe(name, "dy", dy, scheme.gradient(dy, None)[0]))

    def _bind(self, module: nn.Module, line: Assignment) -> None:
        grouped = line.kind == "moe.experts"
        hook = "multiply" if grouped else "forward"
        vars(module).pop(hook, None)
        if line.format == "bf16":
            return
        scheme = self._schemes[line.format]

        def linear(x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])
            draw = self._draw(line.module, by_token=True)
            y = quantized_linear(rows, _weight(module), scheme, draw)
            if self._is_observed():
                self._observe(line.module, scheme, rows, _weight(module), y)
            return y.view(*x.shape[:-1], -1)

        def experts(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
            draw = self._draw(line.module, by_token=False)
            y = quantized_grouped_linear(rows, weight, counts, scheme, draw)
            if self._is_observed():
                for expert, share in groups_of(counts):
                    self._observe(line.module, scheme, rows[share], weight[expert], y[share])
            return y

        function: Callable[..., Tensor] = experts if grouped else linear
        vars(module)[hook] = function

    def _draw(self, module: str, *, by_token: bool) -> Draw:
        """Name the bits of a call; rows sorted by expert have no token's number of their own."""
        call = self._calls[module] = self._calls.get(module, -1) + 1
        portion = "" if by_token else f"/{self._first_token}"
        name = f"{self._seed}/{self._step}/{module}/{call}{portion}"
        digest = xxhash.xxh64_intdigest(name.encode())
        return Draw((digest >> 32, digest & 0xFFFFFFFF), self._first_token if by_token else 0)


def preset_at(config: PrecisionConfig, step: int) -> str:
    """Return the preset that holds at a step."""
    presets = [config.preset, *(s.preset for s in config.switches if s.step <= step)]
    return presets[-1]


def assign(model: nn.Module, config: PrecisionConfig, preset: str) -> list[Assignment]:
    """Return the table of a model, which may lie on the meta device."""
    layers = model.get_submodule("backbone.layers")
    assert isinstance(layers, nn.ModuleList)
    return resolve(linear_layers(model), len(layers), config, preset)


def linear_layers(model: nn.Module) -> Sequence[str]:
    """Return the names of all modules that a format can be given to."""
    return [name for name, _ in model.named_modules() if kind_of(name) is not None]


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
