"""The masked loss of packed conversations against plain PyTorch in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nemotron.data.batch import NO_LABEL, Row, pack
from nemotron.model.hybrid import HybridLM
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.config import LossConfig
from nemotron.train.loss import PretrainObjective, compute_sums
from tests.support.models import build, tokens

LEARNED = [[0, 0, 1, 1, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 1, 1]]
"""Which tokens of three conversations the assistant wrote."""


def rows(per_sample: bool) -> list[Row]:
    """Pack the first two conversations into one row, the third into another."""
    found = []
    for number, members in enumerate(([0, 1], [2])):
        learned = [torch.tensor(LEARNED[member]).float() for member in members]
        weights = torch.cat([one / one.sum() if per_sample else one for one in learned])
        ids = tokens(1, len(weights), seed=number)[0].numpy()
        starts = torch.tensor([0, len(learned[0])][: len(members)]).numpy()
        found.append(Row(ids, starts, weights.numpy()))
    return found


@pytest.mark.parametrize("per_sample", [False, True])
def test_loss_and_gradient_equal_plain_torch(per_sample: bool) -> None:
    model: HybridLM = build(seed=5)
    packed = rows(per_sample)
    batch = pack(packed, 13, 0, mask_eod_loss=False)
    if batch.loss_weight is not None:
        batch = replace(batch, loss_weight=batch.loss_weight.double())
    own = PretrainObjective(Auxiliary(LossConfig(), num_depths=0, has_routers=False))
    sums, _ = compute_sums(own, model, batch)
    loss = own.combine(sums, own.counts(batch))
    model.zero_grad()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    losses, divisor = [], 0.0
    for row, members in zip(packed, ([0, 1], [2]), strict=True):
        edges = [*row.starts.tolist(), len(row.tokens)]
        for member, start, stop in zip(members, edges, edges[1:], strict=False):
            ids = torch.from_numpy(row.tokens[start:stop]).unsqueeze(0)
            logits = model.logits(model(ids[:, :-1]))[0]
            labels = torch.where(torch.tensor(LEARNED[member][1:]) == 1, ids[0, 1:], NO_LABEL)
            size = int((labels != NO_LABEL).sum())
            loss_sum = F.cross_entropy(logits, labels, reduction="sum", ignore_index=NO_LABEL)
            losses.append(loss_sum / size if per_sample else loss_sum)
            divisor += 1 if per_sample else size
    plain = torch.stack(losses).sum() / divisor
    plain.backward()
    # float64, but the weights of samples are float32 numbers such as 1 / 3
    limit = 1e-7 if per_sample else 1e-10
    assert abs(loss.item() - plain.item()) <= limit
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=limit, atol=limit)
