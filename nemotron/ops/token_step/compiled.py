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
from nemotron.ops.jit.native import address_of
from nemotron.ops.jit.team import Team
from nemotron.ops.token_step.buffers import Rows, rounded
from nemotron.ops.token_step.kernels import records
from nemotron.ops.token_step.stack import (
    BLOCK,
    AttentionWeights,
    ExpertsWeights,
    MambaPlace,
    MambaWeights,
    Matrix,
    Stack,
    Step,
)

COMPILE_S = 20
"""About how long a core compiles the kernels for one dtype."""


@functools.cache
def kernels(dtype: torch.dtype) -> tuple[int, int]:
    """Return the addresses of the step and the product for a number format."""
    name = str(dtype).removeprefix("torch.")
    mark = storage.announce(name, f"kernels for decoding in {name}", COMPILE_S)
    module = storage.load("nemotron.ops.token_step.kernels.run")
    run, multiply = address_of(module.run, dtype), address_of(module.multiply, dtype)
    mark.touch()
    return run, multiply


class Program:
    """A stack as a table of addresses, with buffers that grow with the largest call."""

    def __init__(self, stack: Stack) -> None:
        self._run, _ = kernels(stack.dtype)
        self._layers = np.zeros(len(stack.layers), records.LAYER)
        self._call = np.zeros(1, records.CALL)
        self._numbers = self._call.view(np.int64)
        self._places = {name: place for place, name in enumerate(records.NUMBERS)}
        self._team, self._lock = Team(), threading.Lock()
        self._padded: list[Tensor] = []
        self._num_kept = self._num_chosen = 0
        for record, layer in zip(self._layers, stack.layers, strict=True):
            record["norm"], record["eps"] = self._pad(layer.norm), layer.eps
            if isinstance(layer, MambaWeights):
                record["kind"] = records.MAMBA
                _fill_mamba(record, layer)
                record["kept_before"] = self._num_kept
                self._num_kept += layer.kernel.shape[1] + layer.decay.shape[0]
            elif isinstance(layer, AttentionWeights):
                record["kind"] = records.ATTENTION
                _fill_attention(record, layer)
            elif isinstance(layer, ExpertsWeights):
                record["kind"] = records.EXPERTS
                _fill_experts(record, layer)
                record["chosen_before"] = self._num_chosen
                self._num_chosen += layer.top_k
            else:
                record["kind"] = records.DENSE
                _fill_ends(record, layer.up, layer.down)
        size = stack.final_norm.shape[0]
        self._stack, self._size = stack, size
        self._capacity = self._scratch_bytes = self._threads = 0
        self._buffers: dict[str, Any] = {}
        self._addresses: list[int] = []
        self._call["eps"] = stack.eps
        self._set(size=size, width=rounded(size), counter=self._team.counter)
        self._set(embeddings=stack.embeddings.data_ptr(), final_norm=self._pad(stack.final_norm))
        if (join := stack.join) is not None:
            self._set(
                embedding_norm=self._pad(join.embedding_norm),
                hidden_norm=self._pad(join.hidden_norm),
                proj=join.proj.blocks.data_ptr(),
            )
            self._call["join_eps"] = join.eps

    def step(self, step: Step) -> Float[Tensor, "B S D"]:
        """Do a step."""
        rows, length = step.tokens.shape
        given = None if step.hidden is None else step.hidden.float().contiguous()
        is_joined = self._stack.join is not None
        assert given is not None or not is_joined, "a join needs what it joins"
        chosen = None
        if step.has_experts:
            chosen = torch.empty(rows * length * self._num_chosen, dtype=torch.int64)
        if step.keeps_inputs:
            step.kept = [torch.empty(rows * length * self._num_kept)]
        with self._lock:
            self._take(step)
            self._set(tokens=step.tokens.data_ptr(), counts=0, skipped=step.skipped)
            self._set(given=0 if given is None else given.data_ptr())
            if given is not None and not is_joined:
                self._set(tokens=0, given=0)
                hidden = self._buffers["hidden"].numbers
                hidden[: rows * length, : self._size] = given.flatten(0, 1)
            if chosen is not None:
                self._set(chosen=chosen.data_ptr())
            if step.only_last and length > 1 and chosen is None and not step.keeps_inputs:
                length = self._reach_last(step)
            else:
                self._run_layers(0, len(self._layers))
            result = self._buffers["result"].numbers[: rows * length, : self._size]
            result = result.to(self._stack.dtype, copy=True).view(rows, length, -1)
        if chosen is not None:
            mixtures = [la for la in self._stack.layers if isinstance(la, ExpertsWeights)]
            parts = chosen.split([rows * length * layer.top_k for layer in mixtures])
            step.chosen = [part.view(rows * length, -1) for part in parts]
        return result[:, -1:] if step.only_last else result

    def _run_layers(self, first: int, end: int, *, is_part: bool = False) -> None:
        self._set(is_part=is_part)
        layers = self._layers.ctypes.data + first * self._layers.itemsize
        self._set(layers=layers, num_layers=end - first)
        self._team.run(self._run, self._call.ctypes.data)

    def _reach_last(self, step: Step) -> int:
        """Pass all tokens as far as something remembers them, and the last ones to the end.

        Returns how many tokens of each text have passed all layers.
        """
        (rows, length), last = step.tokens.shape, self._stack.last_state
        self._run_layers(0, last + 1, is_part=True)
        hidden = self._buffers["hidden"].numbers
        hidden[:rows] = hidden[: rows * length].view(rows, length, -1)[:, -1].clone()
        lengths = step.lengths + (length - 1)
        self._set(tokens=0, given=0, length=1, lengths=lengths.data_ptr())
        # keys and values alone are there of an attention layer
        is_done = not isinstance(self._stack.layers[last], AttentionWeights)
        self._run_layers(last + is_done, len(self._layers))
        return 1

    def advance(self, step: Step, counts: Int[Tensor, " B"]) -> None:
        """Change the Mamba-2 states by the first tokens of each text in a step that kept them."""
        with self._lock:
            self._take(step)
            self._set(counts=counts.data_ptr())
            self._run_layers(0, len(self._layers))

    def _set(self, **values: int) -> None:
        for name, value in values.items():
            self._numbers[self._places[name]] = value

    def _pad(self, vector: Float[Tensor, " D"]) -> int:
        """Return the address of a copy that fills whole blocks."""
        padded = vector.new_zeros(rounded(vector.shape[0]), dtype=torch.float32)
        padded[: vector.shape[0]] = vector.detach()
        self._padded.append(padded)
        return padded.data_ptr()

    def _take(self, step: Step) -> None:
        """Say in the tables where the tensors of a step lie."""
        rows, length = step.tokens.shape
        addresses, block_size = [], 0
        for place in step.places:
            if isinstance(place, MambaPlace):
                addresses += [place.conv.data_ptr(), place.ssm.data_ptr()]
            elif place is not None:
                addresses += [place.keys.data_ptr(), place.values.data_ptr()]
                block_size = place.keys.shape[1]
        if addresses != self._addresses:
            self._addresses = addresses
            pairs = iter(zip(addresses[::2], addresses[1::2], strict=True))
            for record, place in zip(self._layers, step.places, strict=True):
                if isinstance(place, MambaPlace):
                    record["conv"], record["ssm"] = next(pairs)
                elif place is not None:
                    record["keys"], record["values"] = next(pairs)
        kept = step.kept[0] if step.keeps_inputs else None
        self._grow(rows * length, block_size * step.tables.shape[1])
        self._set(
            rows=rows,
            length=length,
            slots=step.slots.data_ptr(),
            lengths=step.lengths.data_ptr(),
            tables=step.tables.data_ptr(),
            table_length=step.tables.shape[1],
            block_size=block_size,
            kept=0 if kept is None else kept.data_ptr(),
            chosen=self._buffers["chosen"].data_ptr(),
        )

    def _grow(self, tokens: int, longest: int) -> None:
        """Make the buffers large enough for so many tokens, and texts of so many."""
        needed = max(_scratch_of(layer) for layer in self._stack.layers)
        from nemotron.ops.token_step.kernels.attention import QUERIES

        needed, threads = rounded(max(needed, QUERIES * longest)) * 4, torch.get_num_threads()
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
            "wide": max(2 * rounded(self._size), *(_first(la).num_outputs for la in layers)),
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
        number = max(capacity * self._num_chosen, 1)
        self._buffers["chosen"] = torch.zeros(number, dtype=torch.int64)
        self._set(
            copies=hidden.address,
            copies_width=hidden.width,
            order=order.ctypes.data,
            lists=lists.ctypes.data,
            weights=weights.data_ptr(),
        )


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
    _, product = kernels(matrix.blocks.dtype)
    rows = x.reshape(-1, x.shape[-1]).float().contiguous()
    (count, size), width = rows.shape, matrix.num_blocks * BLOCK
    result = torch.empty(count, width)
    tables = torch.empty(2 * count * torch.get_num_threads(), dtype=torch.int64)
    call = np.zeros(1, records.PRODUCT)
    call["x"], call["x_step"] = rows.data_ptr(), size * 4
    call["y"], call["y_step"] = result.data_ptr(), width * 4
    call["rows"], call["tables"] = count, tables.data_ptr()
    call["weight"], call["inputs"] = matrix.blocks.data_ptr(), size
    call["blocks"], call["counter"] = matrix.num_blocks, _products.counter
    _products.run(product, call.ctypes.data)
    result = result if width == matrix.num_outputs else result[:, : matrix.num_outputs]
    return result.to(x.dtype).view(*x.shape[:-1], matrix.num_outputs)
