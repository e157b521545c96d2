import sys
import types

import pytest
import torch
from against_reference import doubled, results, worst
from torch import Tensor

from nemotron.ops.attention import flash_attn, reference, sdpa


def draw(rows: int, length: int, total: int | None = None) -> list[Tensor]:
    g = torch.Generator().manual_seed(length)
    total = length if total is None else total
    return [
        torch.randn(rows, length, 6, 8, generator=g),
        torch.randn(rows, total, 2, 8, generator=g),
        torch.randn(rows, total, 2, 8, generator=g),
    ]


def documents(rows: int, length: int) -> Tensor:
    g = torch.Generator().manual_seed(length + 1)
    return (torch.rand(rows, length, generator=g) < 0.2).int().cumsum(1).int()


def test_the_reference_is_the_formula():
    q, k, v = doubled(draw(1, 5))
    y = reference.attention(q, k, v, None, None)
    for head in range(6):
        for t in range(5):
            scores = torch.stack([q[0, t, head] @ k[0, s, head // 3] for s in range(t + 1)])
            expected = (scores / 8**0.5).softmax(0) @ v[0, : t + 1, head // 3]
            assert worst([y[0, t, head]], [expected]) <= 1e-13


@pytest.mark.parametrize("length", [1, 2, 33, 130])
@pytest.mark.parametrize("with_documents", [True, False])
def test_values_and_gradients_agree(length: int, with_documents: bool):
    inputs = draw(2, length)
    ids = documents(2, length) if with_documents else None
    exact = results(reference.attention, doubled(inputs), ids, None)
    assert worst(results(sdpa.attention, doubled(inputs), ids, None), exact) <= 1e-13
    assert worst(results(sdpa.attention, inputs, ids, None), exact) <= 5e-6


@pytest.mark.parametrize(("length", "total"), [(1, 9), (4, 9), (9, 9)])
@pytest.mark.parametrize("start", [None, (0, 3), (2, 5)])
def test_a_cache_and_left_padding_agree(length: int, total: int, start: tuple[int, int] | None):
    inputs = draw(2, length, total)
    first = None if start is None else torch.tensor(start)
    exact = results(reference.attention, doubled(inputs), None, first)
    found = results(sdpa.attention, inputs, None, first)
    seen = length if start is None else total
    assert seen
    assert worst(found, exact) <= 5e-6


def test_changing_document_one_leaves_document_two_bit_equal():
    q, k, v = draw(1, 40)
    ids = (torch.arange(40) >= 17).int()[None]
    other = [t.clone() for t in (q, k, v)]
    for tensor in other:
        tensor[:, :17] += 1
    one, two = (sdpa.attention(*t, ids, None) for t in ((q, k, v), other))
    assert not torch.equal(one[:, :17], two[:, :17])
    assert torch.equal(one[:, 17:], two[:, 17:])


def test_flash_attn_gets_documents_as_sequences(monkeypatch: pytest.MonkeyPatch):
    def flash_attn_func(q, k, v, causal):
        assert causal
        return reference.attention(q, k, v, None, None)

    def flash_attn_varlen_func(q, k, v, ends_q, ends_k, longest_q, longest_k, causal):
        assert causal
        assert longest_q == longest_k == int(ends_q.diff().max())
        assert ends_q.dtype == torch.int32
        assert torch.equal(ends_q, ends_k)
        parts = []
        for a, b in ends_q.unfold(0, 2, 1).tolist():
            part = (t[None, a:b] for t in (q, k, v))
            parts.append(reference.attention(*part, None, None)[0])
        return torch.cat(parts)

    module = types.SimpleNamespace(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func
    )
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    inputs = draw(3, 30)
    # the last document of one row and the first of the next have the same number
    for ids in (None, documents(3, 30), torch.zeros(3, 30, dtype=torch.int32)):
        exact = results(reference.attention, doubled(inputs), ids, None)
        assert worst(results(flash_attn.attention, inputs, ids, None), exact) <= 5e-6


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash_attn", "sdpa"])
@pytest.mark.parametrize("with_documents", [False, True])
def test_attention_on_a_gpu_agrees(backend: str, with_documents: bool):
    if backend == "flash_attn":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 200, h, 64, generator=g).bfloat16() for h in (8, 2, 2)]
    ids = documents(2, 200) if with_documents else None
    exact = results(reference.attention, [*doubled(inputs), ids], None)
    on_gpu = [t.cuda() if t is not None else None for t in [*inputs, ids]]
    function = {"flash_attn": flash_attn, "sdpa": sdpa}[backend].attention
    # probabilities are rounded to bfloat16 before the second product
    assert worst([t.cpu() for t in results(function, on_gpu, None)], exact) <= 2e-2
