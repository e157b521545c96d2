import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron.data.batch import NO_LABEL, Batch


def make_batch(rows: int, length: int, weighted: bool) -> Batch:
    ids = torch.arange(rows * length).reshape(rows, length)
    labels = torch.where(ids % 3 == 0, NO_LABEL, ids + 1)
    weight = torch.rand(rows, length) if weighted else None
    return Batch(ids, labels, (ids % length // 2).int(), weight)


@given(st.integers(1, 7), st.integers(1, 9), st.booleans())
def test_portions_in_order_are_the_whole_batch(rows: int, micro_batch: int, weighted: bool):
    batch = make_batch(rows, 5, weighted)
    parts = list(batch.split(micro_batch))
    assert all(part.input_ids.shape[0] <= micro_batch for part in parts)
    for name in ("input_ids", "labels", "seq_idx", *(["loss_weight"] if weighted else [])):
        whole = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(whole, getattr(batch, name))
    assert sum(part.num_loss_tokens for part in parts) == batch.num_loss_tokens
    assert weighted or all(part.loss_weight is None for part in parts)


def test_tokens_without_a_label_do_not_count():
    labels = torch.tensor([[4, NO_LABEL, 0], [NO_LABEL, NO_LABEL, NO_LABEL]])
    batch = Batch(torch.zeros(2, 3, dtype=torch.int64), labels, torch.zeros(2, 3).int())
    assert batch.num_loss_tokens == 2


def test_a_batch_moves_with_all_its_tensors():
    moved = make_batch(2, 3, weighted=True).to("meta")
    tensors = (moved.input_ids, moved.labels, moved.seq_idx, moved.loss_weight)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert make_batch(2, 3, weighted=False).to("meta").loss_weight is None
