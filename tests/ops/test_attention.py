import sys
import types

import pytest
import torch
from against_reference import doubled, results, worst
from torch import Tensor

from nemotron.ops import attention as package
from nemotron.ops.attention import attention, flash_attn, reference, sdpa, varlen
from nemotron.ops.attention.documents import bounds


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
    y = reference(q, k, v, None, None)
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
    exact = results(reference, doubled(inputs), ids, None)
    assert worst(results(sdpa, doubled(inputs), ids, None), exact) <= 1e-13
    assert worst(results(sdpa, inputs, ids, None), exact) <= 5e-6


@pytest.mark.parametrize(("length", "total"), [(1, 9), (4, 9), (9, 9)])
def test_a_cache_agrees(length: int, total: int):
    inputs = draw(2, length, total)
    exact = results(reference, doubled(inputs), None, None)
    assert worst(results(sdpa, inputs, None, None), exact) <= 5e-6


def with_rest(row: Tensor, total: int) -> Tensor:
    """Return the row followed by memory that nobody wrote."""
    rest = row.new_full((1, total - row.shape[1], *row.shape[2:]), torch.nan)
    return torch.cat([row, rest], dim=1)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("with_documents", [True, False])
def test_rows_of_unequal_length_are_those_rows_alone(length: int, with_documents: bool):
    lengths = [length, 11, 40]
    alone = [doubled(draw(1, length, total)) for total in lengths]
    ids = [documents(1, total) if with_documents else None for total in lengths]
    expected = torch.cat([reference(*row, i, None) for row, i in zip(alone, ids, strict=True)])
    q = torch.cat([row[0] for row in alone])
    k, v = (torch.cat([with_rest(row[n], 43) for row in alone]) for n in (1, 2))
    seq_idx = None
    if with_documents:
        # numbers that no document has fill up the rows
        seq_idx = torch.full((3, 43), 99, dtype=torch.int32)
        for number, row in enumerate(ids):
            seq_idx[number, : row.shape[1]] = row
    found = attention(q, k, v, seq_idx=seq_idx, lengths=torch.tensor(lengths))
    assert worst([found], [expected]) <= 1e-13
    masked = package._attend(q, k, v, seq_idx, torch.tensor(lengths))  # what a GPU is given
    assert worst([masked], [expected]) <= 1e-13
    written_out = reference(q, k, v, seq_idx, torch.tensor(lengths))
    assert worst([written_out], [expected]) <= 1e-13


@pytest.mark.parametrize("length", [1, 2, 5, 33])
@pytest.mark.parametrize("prefix", [1, 7, 64])
def test_documents_after_a_prefix_agree(length: int, prefix: int):
    inputs, ids = draw(3, length, prefix + length), documents(3, prefix + length)
    exact = results(reference, doubled(inputs), ids, None)
    assert worst(results(sdpa, doubled(inputs), ids, None), exact) <= 1e-13
    assert worst(results(sdpa, inputs, ids, None), exact) <= 5e-6


def test_the_last_queries_of_a_row_see_what_they_see_in_the_whole_row():
    q, k, v = doubled(draw(2, 30))
    ids = documents(2, 30)
    whole = reference(q, k, v, ids, None)
    # the tail begins inside a document, with one, and after the row's last change
    for begin in (1, *ids[0].diff().nonzero().flatten().add(1).tolist(), 29):
        tail = reference(q[:, begin:], k, v, ids, None)
        # products of other shapes may add up in another order
        assert worst([tail], [whole[:, begin:]]) <= 1e-14


def test_a_call_with_documents_after_a_prefix_asks_for_a_backend_that_knows_them():
    q, k, v = draw(1, 4, 9)
    ids = documents(1, 9)
    assert torch.equal(attention(q, k, v, seq_idx=ids), sdpa(q, k, v, ids, None))
    for backend in attention.backends:
        assert "documents_after_a_prefix" in backend.features


def test_changing_document_one_leaves_document_two_bit_equal():
    q, k, v = draw(1, 40)
    ids = (torch.arange(40) >= 17).int()[None]
    other = [t.clone() for t in (q, k, v)]
    for tensor in other:
        tensor[:, :17] += 1
    one, two = (sdpa(*t, ids, None) for t in ((q, k, v), other))
    assert not torch.equal(one[:, :17], two[:, :17])
    assert torch.equal(one[:, 17:], two[:, 17:])


def flash_attn_varlen_func(q, k, v, ends_q, ends_k, longest_q, longest_k, causal):
    """Do what the function of the package does, and check what it is called with."""
    assert causal
    parts = []
    ends_and_longest = ((ends_q, longest_q), (ends_k, longest_k))
    for ends, longest in ends_and_longest:
        assert longest == int(ends.diff().max())
        assert ends.dtype == torch.int32
    for queries, keys in zip(*(ends.diff().tolist() for ends in (ends_q, ends_k)), strict=True):
        # a sequence without queries is no call that the kernel's gradient is known to take
        assert 0 < queries <= keys
    spans = (ends.unfold(0, 2, 1).tolist() for ends in (ends_q, ends_k))
    for (a, b), (c, d) in zip(*spans, strict=True):
        part = (q[None, a:b], k[None, c:d], v[None, c:d])
        parts.append(reference(*part, None, None)[0])
    return torch.cat(parts)


def check_documents_as_sequences(backend: types.ModuleType) -> None:
    inputs = draw(3, 30)
    # the last document of one row and the first of the next have the same number
    for ids in (None, documents(3, 30), torch.zeros(3, 30, dtype=torch.int32)):
        exact = results(reference, doubled(inputs), ids, None)
        assert worst(results(backend.attention, inputs, ids, None), exact) <= 5e-6
    for length in (1, 4, 29):
        inputs, ids = draw(3, length, 30), documents(3, 30)
        exact = results(reference, doubled(inputs), ids, None)
        assert worst(results(backend.attention, inputs, ids, None), exact) <= 5e-6


def test_flash_attn_gets_documents_as_sequences(monkeypatch: pytest.MonkeyPatch):
    def flash_attn_func(q, k, v, causal):
        assert causal
        return reference(q, k, v, None, None)

    module = types.SimpleNamespace(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func
    )
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    check_documents_as_sequences(flash_attn)


@pytest.mark.parametrize("has_keyword", [False, True])
def test_the_kernels_of_torch_get_documents_as_sequences(
    monkeypatch: pytest.MonkeyPatch, has_keyword: bool
):
    def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
        assert window_size == (-1, 0)
        longest_q = int(cu_seq_q.diff().max())
        assert max_q == max(2, longest_q)
        ends = (cu_seq_q, cu_seq_k, longest_q, max_k)
        return flash_attn_varlen_func(query, key, value, *ends, causal=True)

    def of_2_13(*arguments, enable_gqa=False, **keywords):
        assert enable_gqa
        return of_2_11(*arguments, **keywords)

    function = of_2_13 if has_keyword else of_2_11
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    varlen._fewer_key_heads.cache_clear()
    check_documents_as_sequences(varlen)
    varlen._fewer_key_heads.cache_clear()


def test_document_bounds_are_found_once_for_a_tensor():
    ids = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 2, 3]], dtype=torch.int32)
    found = bounds(ids)
    assert found.ends.tolist() == [0, 2, 5, 8, 9, 10]
    assert found.ends.dtype == torch.int32
    assert found.longest == 3
    assert bounds(ids) is found
    ids[1, 3] = 1  # a changed tensor has other documents
    assert bounds(ids).ends.tolist() == [0, 2, 5, 9, 10]
    assert bounds(ids.clone()).longest == 4
    assert bounds(torch.arange(4)[None]).ends.tolist() == [0, 1, 2, 3, 4]
    assert bounds(torch.zeros(2, 3, dtype=torch.int64)).ends.tolist() == [0, 3, 6]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash_attn", "varlen", "sdpa"])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("length", [200, 60])
def test_attention_on_a_gpu_agrees(backend: str, with_documents: bool, length: int):
    if backend == "flash_attn":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    g = torch.Generator().manual_seed(0)
    sizes = ((length, 8), (200, 2), (200, 2))
    inputs = [torch.randn(2, *size, 64, generator=g).bfloat16() for size in sizes]
    ids = documents(2, 200) if with_documents else None
    exact = results(reference, [*doubled(inputs), ids], None)
    on_gpu = [t.cuda() if t is not None else None for t in [*inputs, ids]]
    functions = {"flash_attn": flash_attn.attention, "varlen": varlen.attention, "sdpa": sdpa}
    # probabilities are rounded to bfloat16 before the second product
    assert worst([t.cpu() for t in results(functions[backend], on_gpu, None)], exact) <= 2e-2
