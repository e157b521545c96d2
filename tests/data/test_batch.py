from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron.data.batch import NO_LABEL, Batch, Row, pack

EOD = 2
WINDOWS = st.lists(st.lists(st.integers(0, 6), min_size=8, max_size=8), min_size=1, max_size=4)


def make_batch(rows: int, length: int) -> Batch:
    ids = torch.arange(rows * length).reshape(rows, length)
    labels = torch.where(ids % 3 == 0, NO_LABEL, ids + 1)
    return Batch(ids, labels, (ids % length // 2).int())


@given(st.integers(1, 7), st.integers(1, 9))
def test_micro_batches_in_order_are_the_whole_batch(rows: int, micro_batch: int):
    batch = make_batch(rows, 5)
    parts = list(batch.split(micro_batch))
    assert all(part.input_ids.shape[0] <= micro_batch for part in parts)
    for name in ("input_ids", "labels", "seq_idx"):
        whole = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(whole, getattr(batch, name))
    assert sum(part.num_loss_tokens for part in parts) == batch.num_loss_tokens


def test_tokens_without_a_label_do_not_count():
    labels = torch.tensor([[4, NO_LABEL, 0], [NO_LABEL, NO_LABEL, NO_LABEL]])
    batch = Batch(torch.zeros(2, 3, dtype=torch.int64), labels, torch.zeros(2, 3).int())
    assert batch.num_loss_tokens == 2


def test_a_batch_moves_with_all_its_tensors():
    moved = make_batch(2, 3).to("meta")
    tensors = (moved.input_ids, moved.labels, moved.seq_idx)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def with_extras(rows: int, length: int) -> Batch:
    batch = make_batch(rows, length)
    scores = torch.arange(rows * length, dtype=torch.float32).reshape(rows, length)
    return replace(batch, extras={"score": scores, "teacher": torch.stack([scores, -scores], -1)})


def test_extras_are_split_and_mapped_with_the_tokens_and_stay_when_looking_ahead():
    batch = with_extras(5, 4).look_ahead(2)
    parts = list(batch.split(2))
    assert [part.extras["score"].shape[0] for part in parts] == [2, 2, 1]
    for name, values in batch.extras.items():
        assert torch.equal(torch.cat([part.extras[name] for part in parts]), values)
    last = batch.map(lambda values: values[:, -1:])
    assert last.extras["score"].flatten().tolist() == [3, 7, 11, 15, 19]
    assert last.extras["teacher"].shape == (5, 1, 2)
    assert {tensor.device.type for tensor in batch.to("meta").extras.values()} == {"meta"}


@pytest.mark.gpu
def test_extras_are_pinned_with_the_tokens():
    assert all(tensor.is_pinned() for tensor in with_extras(2, 3).pin().extras.values())


@given(WINDOWS, st.booleans())
def test_rows_agree_with_the_definition(windows: list[list[int]], mask_eod_loss: bool):
    batch = pack([Row(np.array(w)) for w in windows], 7, EOD, mask_eod_loss=mask_eod_loss)
    for row, window in enumerate(windows):
        document = 0
        for t in range(7):
            label = NO_LABEL if mask_eod_loss and window[t] == EOD else window[t + 1]
            assert batch.input_ids[row, t] == window[t]
            assert batch.labels[row, t] == label
            assert batch.seq_idx[row, t] == document
            document += window[t] == EOD
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.seq_idx.dtype == torch.int32


@given(WINDOWS)
def test_document_numbers_start_at_zero_and_never_come_back(windows: list[list[int]]):
    steps = pack([Row(np.array(w)) for w in windows], 7, EOD, mask_eod_loss=False).seq_idx
    assert torch.equal(steps[:, 0], torch.zeros(len(windows), dtype=torch.int32))
    assert set(steps.diff(dim=1).flatten().tolist()) <= {0, 1}


def test_a_short_window_is_filled_without_labels():
    batch = pack([Row(np.array([4, 5, EOD])), Row(np.arange(3, 9))], 5, EOD, mask_eod_loss=False)
    assert batch.input_ids.tolist() == [[4, 5, EOD, EOD, EOD], [3, 4, 5, 6, 7]]
    assert batch.labels.tolist() == [[5, EOD, NO_LABEL, NO_LABEL, NO_LABEL], [4, 5, 6, 7, 8]]
    assert batch.num_loss_tokens == 7


def test_rows_of_whole_documents_number_them_by_their_starts_and_predict_none_from_another():
    row = Row(np.array([4, 5, EOD, 6, EOD, 7]), np.array([0, 3, 5]))
    batch = pack([row], 7, EOD, mask_eod_loss=False)
    assert batch.input_ids.tolist() == [[4, 5, EOD, 6, EOD, 7, EOD]]
    assert batch.seq_idx.tolist() == [[0, 0, 0, 1, 1, 2, 3]]
    none = NO_LABEL
    assert batch.labels.tolist() == [[5, EOD, none, EOD, none, none, none]]
    assert batch.loss_weight is None


def test_weights_stand_beside_the_label_that_they_weigh():
    tokens, starts = np.array([4, 5, 6, 7, 8]), np.array([0, 3])
    row = Row(tokens, starts, np.array([0, 0, 1, 0, 0.5], np.float32))
    batch = pack([row, Row(np.arange(3, 8))], 4, EOD, mask_eod_loss=False)
    assert batch.labels.tolist() == [[NO_LABEL, 6, NO_LABEL, 8], [4, 5, 6, 7]]
    assert batch.loss_weight.tolist() == [[0, 1, 0, 0.5], [1, 1, 1, 1]]


def test_weights_that_are_nothing_or_one_are_told_by_labels_alone():
    row = Row(np.array([4, 5, 6]), np.array([0]), np.array([0, 0, 1], np.float32))
    batch = pack([row], 3, EOD, mask_eod_loss=False)
    assert batch.labels.tolist() == [[NO_LABEL, 6, NO_LABEL]]
    assert batch.loss_weight is None
