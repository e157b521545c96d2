"""Put a built model into the recipe's number formats; the model's own code knows none of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import xxhash
from jaxtyping import Int
from torch import Tensor, nn

from nemotron.precision.backends import BY_NAME
from nemotron.precision.config import PrecisionConfig
from nemotron.precision.delayed import FRESH, DelayedFP8Scheme, Histories
from nemotron.precision.groups import ExpertChunk, Sizes, expert_chunks
from nemotron.precision.policy import (
    Assignment,
    assign,
    device_of,
    linear_layers,
    with_backend,
)
from nemotron.precision.random_bits import Draw, Numbers
from nemotron.precision.schemes import SCHEMES, NVFP4Scheme, Reduce, Scheme
from nemotron.precision.telemetry import Telemetry

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def apply(model: nn.Module, config: PrecisionConfig) -> None:
    """Set the dtype of activations and matrix products; parameters stay float32 masters.

    Norm weights, decay, time step and router compute in float32 whatever is chosen here.
    """
    model.compute_dtype = DTYPES[config.compute]  # type: ignore[assignment]


@dataclass(frozen=True)
class LayerShard:
    """What this rank holds of a layer's tensors, where ranks share them."""

    reduce: dict[str, Reduce] = field(default_factory=dict)
    """How the ranks find the largest magnitude of `x`, `w` or `dy`, where each has a shard."""
    columns: Numbers = 0
    """Numbers of the output's columns in the whole layer."""
    rows: Callable[[Tensor], Tensor] | None = None
    """Takes the numbers of this layer's tokens out of those of the micro-batch, shaped as these."""
    first_expert: int = 0
    """Number of the first expert held here."""


WHOLE = LayerShard()


class Quantization:
    """The formats of a model's linear layers, which may change from step to step.

    A quantized layer keeps its parameter and its name; only what its call does is replaced. Random
    bits of the gradients' rounding depend on seed, step, layer, call and row, so a resumed run
    draws the same ones, and so does a run on other ranks that number rows and columns as the whole
    has them. `models` are the model or, where ranks share it, what is here of `whole`, which may
    lie on the meta device.

    Raises:
        UserError: when the recipe names a backend that is not fit for a layer.
    """

    def __init__(
        self,
        models: nn.Module | Sequence[nn.Module],
        config: PrecisionConfig,
        seed: int,
        whole: nn.Module | None = None,
    ) -> None:
        models = [models] if isinstance(models, nn.Module) else models
        self._whole = models[0] if whole is None else whole
        self._here = {
            name: model.get_submodule(name) for model in models for name in linear_layers(model)
        }
        self._config, self._seed = config, seed
        self._device = device_of(models[0])
        self.preset: str | None = None
        self.reduce_amax: Reduce = lambda amaxes: amaxes
        """Makes the largest of all ranks out of this one's, of all tensors with delayed scaling."""
        options = config.nvfp4
        self._schemes: dict[str, Scheme] = SCHEMES | {
            "nvfp4": NVFP4Scheme(
                options.hadamard, options.stochastic_rounding, options.square_weights
            )
        }
        self._shards: dict[str, LayerShard] = {}
        self._histories = Histories(self._delayed_matrices(), config.fp8_delayed, self._device)
        self._step = 0
        self._rows: Numbers = 0
        self._calls: dict[str, int] = {}
        self._observed = Telemetry()
        self.table: list[Assignment] = []
        """What every linear layer of the whole model computes in now."""
        self.begin(0, 0)

    def begin(self, step: int, rows: Numbers = 0) -> bool:
        """Begin a micro-batch of a step; `rows` numbers its tokens in the whole batch.

        A single number is that of the first token, which the others follow; else there is one for
        each, [B, T] or [M]. The first micro-batch of another step ends the one before for
        delayed scaling. Returns whether the formats change here, to those of another preset.
        """
        if step != self._step:
            self._histories.roll(self.reduce_amax)
        self._step = step
        self._rows = rows if isinstance(rows, int) else rows.to(self._device)
        self._calls.clear()
        if (preset := self._config.preset_at(step)) == self.preset:
            return False
        self.preset = preset
        table = assign(self._whole, self._config, preset, self._device)
        self.table = [self._with_backend(line) for line in table]
        for line in self.table:
            self._bind(line)
        return True

    def tensors(self) -> dict[str, Tensor]:
        """Return what a resume needs: histories and scales of delayed scaling, by name.

        Names and shapes are the same at every step; values are put in place.
        """
        return {f"precision.{name}": tensor for name, tensor in self._histories.tensors()}

    def forget(self, name: str) -> None:
        """Put one of `tensors` back to what it is before the first step."""
        self.tensors()[name].fill_(FRESH[name.rpartition(".")[2]])

    def metrics(self) -> dict[str, float]:
        """Return what was measured of the operands since this was last asked for."""
        return self._observed.take()

    def set_reduction(self, module: str, operand: str, reduce: Reduce) -> None:
        """Say how ranks find the largest magnitude of an operand of which each holds a shard.

        Without it a scale for a whole tensor is that of the shard held here. Tensors with
        delayed scaling need none: `reduce_amax` serves all of them.

        Raises:
            UserError: when the recipe names a backend that cannot do it.
        """
        assert operand in ("x", "w", "dy"), operand
        shard = self._shards.get(module, WHOLE)
        self._set_shard(module, replace(shard, reduce=shard.reduce | {operand: reduce}))

    def set_shard(
        self,
        module: str,
        *,
        columns: Numbers = 0,
        rows: Callable[[Tensor], Tensor] | None = None,
        first_expert: int = 0,
    ) -> None:
        """Say which columns of the output, tokens of a micro-batch and experts are held here."""
        shard = self._shards.get(module, WHOLE)
        shard = replace(shard, columns=columns, rows=rows, first_expert=first_expert)
        self._set_shard(module, shard)

    def copy_numbers(self, module: str, num_tokens: int, num_copies: int) -> Int[Tensor, "M K"]:
        """Return the number in the whole batch of each copy of each token that a layer sees.

        The rows of `Experts.multiply` are such copies, sorted.
        """
        rows = self._rows_of(module)
        if isinstance(rows, int):
            rows = rows + torch.arange(num_tokens, device=self._device)
        return rows.unsqueeze(1) * num_copies + torch.arange(num_copies, device=rows.device)

    def _rows_of(self, module: str) -> Numbers:
        """Return the numbers of the tokens that a layer sees here."""
        rows, shard = self._rows, self._shards.get(module, WHOLE)
        if shard.rows is not None:
            assert isinstance(rows, Tensor), (
                f"{module} takes some rows of a micro-batch without numbers"
            )
            rows = shard.rows(rows)
        return rows if isinstance(rows, int) else rows.flatten()

    def _set_shard(self, module: str, shard: LayerShard) -> None:
        self._shards[module] = shard
        (index,) = (i for i, line in enumerate(self.table) if line.module == module)
        self.table[index] = self._with_backend(self.table[index])
        self._bind(self.table[index])

    def _with_backend(self, line: Assignment) -> Assignment:
        """Choose again for the shard that is here of a layer."""
        module = self._here.get(line.module)
        if module is None:
            return line
        is_split = bool(self._shards.get(line.module, WHOLE).reduce)
        return with_backend(line, self._config, module, self._device, is_split=is_split)

    def _delayed_matrices(self) -> dict[str, int]:
        """Return every matrix that is ever in fp8_delayed, with its number of experts or 1."""
        sizes: dict[str, int] = {}
        presets = [self._config.preset, *(switch.preset for switch in self._config.switches)]
        for preset in dict.fromkeys(presets):
            for line in assign(self._whole, self._config, preset, self._device):
                if line.format == "fp8_delayed":
                    module = self._whole.get_submodule(line.module)
                    sizes |= {
                        _matrix(line.module, name): weight.shape[0] if weight.dim() == 3 else 1
                        for name, weight in module.named_parameters(recurse=False)
                    }
        return sizes

    def _schemes_of(self, line: Assignment, module: nn.Module) -> dict[str, Scheme]:
        """Return the scheme of each matrix of a module."""
        shard = self._shards.get(line.module, WHOLE)
        schemes: dict[str, Scheme] = {}
        for name, weight in module.named_parameters(recurse=False):
            if line.format == "fp8_delayed":
                experts = weight.shape[0] if weight.dim() == 3 else 1
                matrix = _matrix(line.module, name)
                slots = self._histories.slots(matrix, shard.first_expert, experts)
                schemes[name] = DelayedFP8Scheme(slots)
            else:
                schemes[name] = replace(self._schemes[line.format], reduce=shard.reduce)
        return schemes

    def _is_observed(self) -> bool:
        every = self._config.observe_every_steps
        return every is not None and (self._step + 1) % every == 0 and torch.is_grad_enabled()

    def _observe(
        self, name: str, scheme: Scheme, x: Tensor, weight: Tensor, sizes: Sizes, y: Tensor
    ) -> None:
        """Measure the operands of a product; the gradient's when it comes."""

        def observe(operand: str, tensor: Tensor, chunk: ExpertChunk, sizes: Sizes) -> None:
            row, _ = scheme.for_experts(chunk.experts).quantize(operand, tensor, sizes, both=False)
            self._observed.observe(name, operand, tensor, row.operand())

        def observe_rows(operand: str, tensor: Tensor) -> None:
            for chunk in cut:
                observe(operand, tensor[chunk.rows], chunk, chunk.sizes)

        cut = expert_chunks(sizes, weight)
        observe_rows("x", x.detach())
        for chunk in cut:
            narrow = weight[chunk.experts].detach().to(torch.bfloat16).flatten(0, 1)
            observe("w", narrow, chunk, (weight.shape[1],) * len(chunk.sizes))
        if y.requires_grad:
            y.register_hook(lambda dy: observe_rows("dy", dy))

    def _bind(self, line: Assignment) -> None:
        module = self._here.get(line.module)
        if module is None:
            return
        grouped = line.kind == "moe.experts"
        hook = "multiply" if grouped else "forward"
        vars(module).pop(hook, None)
        if grouped:
            vars(module)["number_copies"] = None
        if line.format == "bf16":
            return
        schemes = self._schemes_of(line, module)
        backend = BY_NAME[line.backend]
        layer = backend.function(schemes, line.format, self._config.nvfp4)
        is_drawn = line.format == "nvfp4"  # the others round to nearest

        def linear(x: Tensor) -> Tensor:
            rows, weight = x.reshape(-1, x.shape[-1]), _weight(module)
            y = layer.linear(rows, weight, self._draw(line.module) if is_drawn else None)
            if self._is_observed():
                sizes = (rows.shape[0],)
                scheme = schemes["weight"]
                self._observe(line.module, scheme, rows, weight.unsqueeze(0), sizes, y)
            # not a view for autograd, as torch's own product: FSDP2 warns of views, which a change
            # in place would take out of its hooks
            return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])

        def experts(rows: Tensor, weight: Tensor, counts: Tensor, numbers: Tensor | None) -> Tensor:
            (name,) = (name for name in schemes if getattr(module, name) is weight)
            draw = None
            if is_drawn:
                assert numbers is not None, line.module
                draw = replace(self._draw(line.module), rows=numbers)
            y = layer.grouped(rows, weight, counts, name, draw)
            if self._is_observed():
                sizes = tuple(counts.tolist())
                self._observe(line.module, schemes[name], rows, weight, sizes, y)
            return y

        function: Callable[..., Tensor] = experts if grouped else linear
        vars(module)[hook] = function
        if grouped and is_drawn:
            vars(module)["number_copies"] = partial(self.copy_numbers, line.module)

    def _draw(self, module: str) -> Draw:
        """Name the bits of a call, whose rows are tokens."""
        call = self._calls[module] = self._calls.get(module, -1) + 1
        name = f"{self._seed}/{self._step}/{module}/{call}"
        key = xxhash.xxh64_intdigest(name.encode())
        return Draw(key, self._rows_of(module), self._shards.get(module, WHOLE).columns)


def _matrix(module: str, name: str) -> str:
    """Name a matrix of a module; a linear layer has only one."""
    return module if name == "weight" else f"{module}.{name}"


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
