"""Steps by compiled kernels: tables of addresses for them, their buffers and their threads."""

import functools
import threading
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.jit import storage
from nemotron.ops.jit.team import Team
from nemotron.ops.token_step.buffers import Rows, rounded
from nemotron.ops.token_step.stack import (
    BLOCK,
    AttentionWeights,
    ExpertsWeights,
    KeysPlace,
    MambaPlace,
    MambaWeights,
    Matrix,
    Stack,
    Step,
)

COMPILE_S = 20
"""About how long a core compiles the kernels for one dtype."""


@functools.cache
def kernels(dtype: str) -> tuple[Any, Any, Any]:
    """Return the step, the product, and what names the dtype; compile or load them."""
    mark = storage.announce(dtype, f"kernels for decoding in {dtype}", COMPILE_S)
    module = storage.load("nemotron.ops.token_step.kernels.run")
    from nemotron.ops.token_step.kernels.records import CALL, LAYER

    kind = module.FORMATS[dtype]
    module.run(np.zeros(1, CALL), np.zeros(0, LAYER), 0, 1, kind)
    module.multiply(0, 0, 0, 0, 0, 0, 0, 0, 1, kind)
    mark.touch()
    return module.run, module.multiply, kind


class Program:
    """A stack as a table of addresses, with buffers that grow with the largest call."""

    def __init__(self, stack: Stack) -> None:
        self._run, _, self._kind = kernels(_name(stack.dtype))
        from nemotron.ops.token_step.kernels import records

        self._layers = np.zeros(len(stack.layers), records.LAYER)
        self._call = np.zeros(1, records.CALL)
        self._team, self._lock = Team(), threading.Lock()
        self._padded: list[Tensor] = []
        for record, layer in zip(self._layers, stack.layers, strict=True):
            record["norm"], record["eps"] = self._pad(layer.norm), layer.eps
            if isinstance(layer, MambaWeights):
                record["kind"] = records.MAMBA
                _fill_mamba(record, layer)
            elif isinstance(layer, AttentionWeights):
                record["kind"] = records.ATTENTION
                _fill_attention(record, layer)
            elif isinstance(layer, ExpertsWeights):
                record["kind"] = records.EXPERTS
                _fill_experts(record, layer)
            else:
                record["kind"] = records.DENSE
                _fill_ends(record, layer.up, layer.down)
        size = stack.final_norm.shape[0]
        self._stack, self._size = stack, size
        self._capacity = self._scratch_bytes = self._threads = 0
        self._buffers: dict[str, Any] = {}
        self._set(size=size, width=rounded(size), eps=stack.eps, counter=self._team.counter)
        self._set(embeddings=stack.embeddings.data_ptr(), final_norm=self._pad(stack.final_norm))

    def step(self, step: Step) -> Float[Tensor, "B T D"]:
        """Do a step."""
        rows, length = step.tokens.shape
        with self._lock:
            self._take(step)
            self._set(tokens=step.tokens.data_ptr(), counts=0)
            self._team.run(self._run, self._call, self._layers, kind=self._kind)
            result = self._buffers["result"].numbers[: rows * length, : self._size]
            return result.to(self._stack.dtype, copy=True).view(rows, length, -1)

    def advance(self, step: Step, counts: Int[Tensor, " B"]) -> None:
        """Change the Mamba-2 states by the first tokens of each text in a step that kept them."""
        with self._lock:
            self._take(step)
            self._set(counts=counts.data_ptr())
            self._team.run(self._run, self._call, self._layers, kind=self._kind)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            self._call[name] = value

    def _pad(self, vector: Float[Tensor, " D"]) -> int:
        """Return the address of a copy that fills whole blocks."""
        padded = vector.new_zeros(rounded(vector.shape[0]), dtype=torch.float32)
        padded[: vector.shape[0]] = vector.detach()
        self._padded.append(padded)
        return padded.data_ptr()

    def _take(self, step: Step) -> None:
        """Say in the tables where the tensors of a step lie."""
        rows, length = step.tokens.shape
        tokens, longest = rows * length, 0
        if not step.kept:
            _make_room(self._stack, step)
        for record, place, kept, chosen in zip(
            self._layers, step.places, step.kept, step.chosen, strict=True
        ):
            if isinstance(place, MambaPlace):
                record["conv"], record["ssm"] = place.conv.data_ptr(), place.ssm.data_ptr()
                record["kept"] = 0 if kept is None else kept.data_ptr()
            elif isinstance(place, KeysPlace):
                record["keys"], record["values"] = place.keys.data_ptr(), place.values.data_ptr()
                self._set(block_size=place.keys.shape[1])
                longest = place.keys.shape[1] * step.tables.shape[1]
            elif chosen is not None:
                record["chosen"] = chosen.data_ptr()
        self._grow(tokens, longest)
        self._set(
            rows=rows,
            length=length,
            slots=step.slots.data_ptr(),
            lengths=step.lengths.data_ptr(),
            tables=step.tables.data_ptr(),
            table_length=step.tables.shape[1],
        )

    def _grow(self, tokens: int, longest: int) -> None:
        """Make the buffers large enough for so many tokens, and texts of so many."""
        needed = max(_scratch_of(layer) for layer in self._stack.layers)
        needed, threads = rounded(max(needed, longest)) * 4, torch.get_num_threads()
        if needed > self._scratch_bytes or threads > self._threads:
            self._scratch_bytes = max(needed, 2 * self._scratch_bytes)
            self._threads = max(threads, self._threads)
            scratch = torch.zeros(self._threads, self._scratch_bytes // 4)
            self._buffers["scratch"] = scratch
            self._set(scratch=scratch.data_ptr(), scratch_size=self._scratch_bytes)
        if tokens > self._capacity:
            self._capacity = max(tokens, 2 * self._capacity)
            self._make_rows(self._capacity)

    def _make_rows(self, capacity: int) -> None:
        layers = self._stack.layers
        mixtures = [layer for layer in layers if isinstance(layer, ExpertsWeights)]
        copies = capacity * max((layer.top_k for layer in mixtures), default=0)
        latent = max((layer.up.num_inputs for layer in mixtures), default=0)
        widths = {
            "hidden": self._size,
            "x": self._size,
            "result": self._size,
            "wide": max(_first(layer).num_outputs for layer in layers),
            "mid": max(_last(layer).num_inputs for layer in layers),
            "latent": latent,
            "routed": latent,
            "scores": max((layer.router.num_outputs for layer in mixtures), default=0),
        }
        for name, width in widths.items():
            self._buffers[name] = rows = Rows.of(capacity, rounded(width))
            self._set(**{name: rows.address})
            if name != "result":
                self._set(**{f"{name}_rows": rows.table})
            if name in ("wide", "mid", "latent", "scores"):
                self._set(**{f"{name}_width": rows.width})
        width = max((layer.up.num_outputs for layer in mixtures), default=0)
        hidden = self._buffers["copies"] = Rows.of(max(copies, 1), rounded(width))
        experts = max((layer.router.num_outputs for layer in mixtures), default=0)
        order = self._buffers["order"] = np.zeros(copies + experts + 1, np.int64)
        lists = self._buffers["lists"] = np.zeros(max(3 * copies, 1), np.int64)
        weights = self._buffers["weights"] = torch.zeros(max(copies, 1))
        self._set(
            copies=hidden.address,
            copies_width=hidden.width,
            order=order.ctypes.data,
            lists=lists.ctypes.data,
            weights=weights.data_ptr(),
        )


def _make_room(stack: Stack, step: Step) -> None:
    """Give a step the tensors that it is to fill."""
    rows, length = step.tokens.shape
    for layer, place in zip(stack.layers, step.places, strict=True):
        kept = chosen = None
        if isinstance(place, MambaPlace) and step.keeps_inputs:
            kept = torch.empty(rows, length, place.conv.shape[2] + place.ssm.shape[1])
        if isinstance(layer, ExpertsWeights):
            chosen = torch.empty(rows * length, layer.top_k, dtype=torch.int64)
        step.kept.append(kept)
        step.chosen.append(chosen)


def _first(layer: Any) -> Matrix:
    if isinstance(layer, MambaWeights):
        return layer.in_proj
    if isinstance(layer, AttentionWeights):
        return layer.qkv_proj
    return layer.shared_up if isinstance(layer, ExpertsWeights) else layer.up


def _last(layer: Any) -> Matrix:
    if isinstance(layer, MambaWeights):
        return layer.out_proj
    if isinstance(layer, AttentionWeights):
        return layer.o_proj
    return layer.shared_down if isinstance(layer, ExpertsWeights) else layer.down


def _scratch_of(layer: Any) -> int:
    """Return the numbers that a thread needs at a time: convolved inputs, and a state."""
    if not isinstance(layer, MambaWeights):
        return 0
    channels = layer.out_proj.num_inputs // layer.num_groups
    return channels + 2 * layer.state_size + channels * max(layer.state_size, 1)


def _fill_ends(record: Any, first: Matrix, last: Matrix) -> None:
    record["first"], record["first_blocks"] = first.blocks.data_ptr(), first.num_blocks
    record["last"], record["last_blocks"] = last.blocks.data_ptr(), last.num_blocks
    record["last_count"] = last.num_inputs


def _fill_mamba(record: Any, layer: MambaWeights) -> None:
    _fill_ends(record, layer.in_proj, layer.out_proj)
    for name in ("kernel", "decay", "skip", "dt_bias", "gate_norm"):
        record[name] = getattr(layer, name).data_ptr()
    record["bias"] = 0 if layer.bias is None else layer.bias.data_ptr()
    heads = layer.decay.shape[0]
    record["heads"], record["head_size"] = heads, layer.out_proj.num_inputs // heads
    record["state_size"], record["groups"] = layer.state_size, layer.num_groups
    record["window"], record["gate_eps"] = layer.kernel.shape[0], layer.gate_eps
    record["smallest"], record["largest"] = layer.limits


def _fill_attention(record: Any, layer: AttentionWeights) -> None:
    _fill_ends(record, layer.qkv_proj, layer.o_proj)
    record["queries"], record["key_heads"] = layer.num_queries, layer.num_keys
    record["head_size"] = layer.head_size


def _fill_experts(record: Any, layer: ExpertsWeights) -> None:
    _fill_ends(record, layer.shared_up, layer.shared_down)
    router, up, down = layer.router, layer.up, layer.down
    record["router"], record["router_blocks"] = router.blocks.data_ptr(), router.num_blocks
    record["router_bias"] = layer.router_bias.data_ptr()
    record["num_experts"], record["top_k"] = router.num_outputs, layer.top_k
    record["normalize"], record["scaling"] = layer.normalize, layer.scaling
    record["up"], record["down"] = up.blocks.data_ptr(), down.blocks.data_ptr()
    record["expert_size"], record["expert_blocks"] = up.num_outputs, up.num_blocks
    record["input_size"], record["input_blocks"] = up.num_inputs, down.num_blocks
    if layer.to_latent is not None and layer.from_latent is not None:
        record["to_latent"] = layer.to_latent.blocks.data_ptr()
        record["from_latent"] = layer.from_latent.blocks.data_ptr()


_programs: WeakKeyDictionary[Stack, Program] = WeakKeyDictionary()


def program_of(stack: Stack) -> Program:
    """Return the program of a stack, which is made once."""
    if stack not in _programs:
        _programs[stack] = Program(stack)
    return _programs[stack]


def compute(
    work: str, first: Stack | Tensor, second: Step | Matrix, counts: Tensor | None = None
) -> Tensor | None:
    """The reference's results; the bits of a text are the same whatever others there are."""
    if isinstance(first, Tensor):
        assert isinstance(second, Matrix), second
        return multiply(first, second)
    assert isinstance(second, Step), second
    if work == "step":
        return program_of(first).step(second)
    assert counts is not None, "how many tokens are kept?"
    program_of(first).advance(second, counts)
    return None


_products = Team()


def multiply(x: Float[Tensor, "*batch I"], matrix: Matrix) -> Float[Tensor, "*batch O"]:
    """Return x Wᵀ, each row as if it were alone."""
    _, product, kind = kernels(_name(matrix.blocks.dtype))
    rows = x.reshape(-1, x.shape[-1]).float().contiguous()
    count, width = rows.shape[0], matrix.num_blocks * BLOCK
    result = torch.empty(count, width)
    sources = rows.data_ptr() + np.arange(count, dtype=np.int64) * (rows.shape[1] * 4)
    targets = result.data_ptr() + np.arange(count, dtype=np.int64) * (width * 4)
    _products.run(
        product,
        sources.ctypes.data,
        targets.ctypes.data,
        count,
        matrix.blocks.data_ptr(),
        rows.shape[1],
        matrix.num_blocks,
        _products.counter,
        kind=kind,
    )
    return result[:, : matrix.num_outputs].to(x.dtype).view(*x.shape[:-1], matrix.num_outputs)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
