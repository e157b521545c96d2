"""From a window of tokens to a row: labels, documents, loss mask."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from nemotron.data.batch import NO_LABEL, Batch


def pack(
    windows: Sequence[NDArray[np.int64]], seq_len: int, eod_id: int, *, mask_eod_loss: bool
) -> Batch:
    """Make rows of `seq_len` tokens from windows of up to one token more.

    The token after an end-of-document starts the next document of the row. A shorter window is
    filled up with ends of documents that have no label.
    """
    tokens = np.full((len(windows), seq_len + 1), eod_id, np.int64)
    labels = np.full((len(windows), seq_len), NO_LABEL, np.int64)
    for row, window in enumerate(windows):
        tokens[row, : len(window)] = window
        labels[row, : len(window) - 1] = window[1:]
    inputs = tokens[:, :-1]
    ends = inputs == eod_id
    if mask_eod_loss:
        labels[ends] = NO_LABEL
    seq_idx = np.cumsum(ends, axis=1) - ends
    return Batch(
        input_ids=torch.from_numpy(np.ascontiguousarray(inputs)),
        labels=torch.from_numpy(labels),
        seq_idx=torch.from_numpy(seq_idx.astype(np.int32)),
    )
