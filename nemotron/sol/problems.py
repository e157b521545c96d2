"""Every operation at the sizes of one layer of a model: inputs, FLOPs, what backward must read."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron.sol.sizes import Rows, Size

BF16, FP32 = torch.bfloat16, torch.float32

Draw = Callable[["Source"], tuple[list[Tensor], tuple[object, ...]]]


@dataclass(frozen=True)
class Problem:
    """A call of an operation: `draw` returns the tensors and the other arguments.

    Floating tensors get gradients. `flops` are those of a forward pass; backward takes `again`
    times as many.
    """

    operation: str
    label: str
    """What of the operation, where there are several problems."""
    draw: Draw
    flops: float = 0.0
    again: float = 2.0
    needs: frozenset[str] = frozenset()
    is_wide: bool = False
    """Whether its inputs are float32 whatever the activations are."""
    reads_again: bool = True
    """Whether backward must read the floating inputs, or gets by with the output's gradient."""

    @property
    def name(self) -> str:
        """Operation and label."""
        return f"{self.operation} {self.label}".rstrip()


@dataclass
class Source:
    """Draws tensors on a device."""

    generator: torch.Generator
    dtype: torch.dtype = BF16
    """Of activations."""

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Return normal numbers, in the dtype of activations unless another one is given."""
        device = self.generator.device
        drawn = torch.randn(shape, generator=self.generator, device=device, dtype=FP32)
        return (drawn * scale).to(dtype or self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Return float32 numbers in [0, 1)."""
        return torch.rand(shape, generator=self.generator, device=self.generator.device)

    def labels(self, count: int, size: int) -> Tensor:
        """Return whole numbers below `size`."""
        device = self.generator.device
        return torch.randint(size, (count,), generator=self.generator, device=device)


def documents(rows: Rows, device: torch.device) -> Tensor:
    """Number the documents of each row: cut at random, four a row on average."""
    generator = torch.Generator().manual_seed(1)
    begins = torch.rand(rows.rows, rows.tokens, generator=generator) < 4 / rows.tokens
    begins[:, rows.tokens // 2] = True
    begins[:, 0] = False
    return begins.cumsum(1).to(torch.int32).to(device)


def seen_pairs(seq_idx: Tensor) -> float:
    """Return how many pairs of tokens of one document there are, each in causal order."""
    lengths = [torch.unique_consecutive(row, return_counts=True)[1] for row in seq_idx]
    return float(sum((n.double() * (n + 1) / 2).sum() for n in lengths))


def problems(size: Size, rows: Rows) -> list[Problem]:
    """Return every problem of a size."""
    m, b, t = rows.all, rows.rows, rows.tokens
    copies = m * size.copies

    def rms_norm(s: Source) -> tuple[list[Tensor], tuple[object, ...]]:
        return [s.normal(b, t, size.hidden), 1 + s.normal(size.hidden, dtype=FP32)], (1e-5,)

    def gated(s: Source) -> tuple[list[Tensor], tuple[object, ...]]:
        y, z = s.normal(b, t, size.inner), s.normal(b, t, size.projected)[..., : size.inner]
        return [y, z, 1 + s.normal(size.inner, dtype=FP32)], (size.groups, 1e-5)

    def conv(s: Source) -> tuple[list[Tensor], tuple[object, ...]]:
        x = s.normal(b, t, size.projected)[..., size.inner : size.inner + size.channels]
        weight = s.normal(size.channels, 4, dtype=FP32, scale=0.5)
        return [x, weight, s.normal(size.channels, dtype=FP32)], (None, None, True)

    def scan(s: Source, seq_idx: Tensor | None) -> tuple[list[Tensor], tuple[object, ...]]:
        mixed, bc = s.normal(b, t, size.channels), size.groups * size.state
        x, B, C = mixed.split([size.inner, bc, bc], dim=-1)
        x = x.unflatten(-1, (size.heads, size.head_dim))
        B, C = (part.unflatten(-1, (size.groups, size.state)) for part in (B, C))
        dt = s.uniform(b, t, size.heads) * 0.1
        A, D = -1 - 15 * s.uniform(size.heads), s.normal(size.heads, dtype=FP32)
        return [x, dt, A, B, C, D], (None, seq_idx)

    def heads(s: Source, rows: Rows) -> list[Tensor]:
        counts = (size.query_heads, size.key_heads, size.key_heads)
        return [s.normal(rows.rows, rows.tokens, n, size.attention_dim) for n in counts]

    def groups(s: Source, k: int, n: int) -> tuple[list[Tensor], tuple[object, ...]]:
        counts = torch.full((size.experts,), copies // size.experts, device=s.generator.device)
        used = copies // size.experts * size.experts
        weight = s.normal(size.experts, n, k, scale=0.02)
        return [s.normal(used, k), weight, counts], ()

    def experts(s: Source) -> tuple[list[Tensor], tuple[object, ...]]:
        counts = torch.full((size.experts,), copies // size.experts, device=s.generator.device)
        used = copies // size.experts * size.experts
        k, n = _up(size)
        up, down = (s.normal(size.experts, *shape, scale=0.02) for shape in ((n, k), (k, n)))
        return [s.normal(used, k), s.uniform(used, 1), up, down, counts], ()

    def dense(s: Source) -> tuple[list[Tensor], tuple[object, ...]]:
        weight = s.normal(size.projected, size.hidden, dtype=FP32, scale=0.02)
        return [s.normal(b, t, size.hidden), weight], ()

    def router(s: Source) -> tuple[list[Tensor], tuple[object, ...]]:
        weight = s.normal(size.all_experts, size.hidden, dtype=FP32, scale=0.02)
        return [s.normal(m, size.hidden), weight], ()

    def chosen(s: Source) -> tuple[list[Tensor], tuple[object, ...]]:
        logits = s.normal(m, size.all_experts, dtype=FP32)
        bias = s.normal(size.all_experts, dtype=FP32, scale=0.01)
        return [logits, bias], (None, size.copies, 1, 1, True, 2.5)

    def balanced(s: Source) -> tuple[list[Tensor], tuple[object, ...]]:
        return [s.uniform(m, size.all_experts)], (None, b, size.copies)

    def ordered(s: Source) -> tuple[list[Tensor], tuple[object, ...]]:
        experts = _distinct(s, m, size).flatten()
        token = torch.arange(copies, device=experts.device) // size.copies
        counts = torch.bincount(experts, minlength=size.experts)
        return [s.uniform(copies), experts, token, counts], (m, 1)

    def weighted(s: Source) -> tuple[list[Tensor], tuple[object, ...]]:
        return [s.normal(copies, size.expert_width), s.uniform(copies, 1)], ()

    def unweighted(s: Source) -> tuple[list[Tensor], tuple[object, ...]]:
        return [s.normal(b, t, size.shared_width)], (None,)

    def routed(s: Source, direction: str) -> tuple[list[Tensor], tuple[object, ...]]:
        # rows sorted by expert
        order = _distinct(s, m, size).flatten().argsort(stable=True)
        row = torch.arange(copies, device=order.device)
        place = torch.empty_like(order).scatter_(0, order, row)
        starts = torch.arange(0, copies, size.copies, device=order.device)
        x = s.normal(m if direction == "copy" else copies, size.expert_input)
        return [x, order // size.copies, place, starts], (direction,)

    def head(s: Source) -> tuple[list[Tensor], tuple[object, ...]]:
        weight = s.normal(size.vocab, size.hidden, dtype=FP32, scale=0.02)
        return [s.normal(m, size.hidden), weight, s.labels(m, size.vocab)], ("sum", None)

    # the recurrence itself: one update of and one product with a state of each head
    scanned = 4.0 * size.inner * size.state
    pair = 4.0 * size.query_heads * size.attention_dim  # two products, two FLOPs a term
    one_row = Rows(1, m)
    ids = documents(rows, torch.device("cpu"))
    expert = 2.0 * copies * size.expert_input * size.expert_width
    pieces = frozenset({"documents"})
    return [
        Problem("rms_norm", "", rms_norm),
        Problem("residual_rms_norm", "", rms_norm),
        Problem("gated_rms_norm", "", gated),
        Problem("causal_conv1d", "", conv),
        Problem("ssd", "", lambda s: scan(s, None), m * scanned),
        Problem("squared_relu", "experts", weighted),
        Problem("squared_relu", "shared", unweighted),
        Problem("topk_routing", "", chosen, is_wide=True),
        Problem("balance_sums", "", balanced, is_wide=True),
        Problem("expert_order", "", ordered, is_wide=True, reads_again=False),
        Problem("token_copies", "copy", lambda s: routed(s, "copy"), reads_again=False),
        Problem("token_copies", "add", lambda s: routed(s, "add"), reads_again=False),
        Problem("linear_cross_entropy", "", head, 2.0 * m * size.hidden * size.vocab),
        Problem("grouped_linear", "up", lambda s: groups(s, *_up(size)), expert),
        Problem("grouped_linear", "down", lambda s: groups(s, *reversed(_up(size))), expert),
        Problem("grouped_mlp", "", experts, 2 * expert),
        Problem("linear", "in_proj", dense, 2.0 * m * size.hidden * size.projected),
        Problem("wide_linear", "router", router, 2.0 * m * size.hidden * size.all_experts),
        Problem(
            "attention",
            "1 row",
            lambda s: (heads(s, one_row), (None, None)),
            pair * m * (m + 1) / 2,
            2.5,
        ),
        Problem(
            "attention",
            "documents",
            lambda s: (heads(s, rows), (documents(rows, s.generator.device), None)),
            pair * seen_pairs(ids),
            2.5,
            pieces,
        ),
        Problem(
            "ssd",
            "documents",
            lambda s: scan(s, documents(rows, s.generator.device)),
            m * scanned,
            needs=pieces,
        ),
    ]


def _distinct(s: Source, tokens: int, size: Size) -> Tensor:
    """Return the experts of each token, drawn apart: [M, K]."""
    scores = s.uniform(tokens, max(size.experts, size.copies))
    return scores.topk(size.copies, dim=1).indices


def _up(size: Size) -> tuple[int, int]:
    return size.expert_input, size.expert_width
