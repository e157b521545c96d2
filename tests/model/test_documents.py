"""Several documents in one row: as if each were alone, in every kind of layer."""

import pytest
import torch

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.config import LossConfig
from nemotron.train.loss import PretrainObjective, compute_sums
from tests.support.models import build, gradients, tokens

# shorter than the convolution, one token, and across the edge of a chunk of 64
LENGTHS = [2, 1, 3, 70, 20]


def numbers(lengths: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()[None]


@pytest.mark.parametrize("pattern", ["MM", "**", "ME*-M"])
def test_a_packed_row_is_its_documents_run_alone(pattern: str):
    model, ids = build(hybrid_override_pattern=pattern), tokens(1, sum(LENGTHS))
    packed = model(ids, numbers(LENGTHS))
    alone = torch.cat([model(part) for part in ids.split(LENGTHS, dim=1)], dim=1)
    assert (packed - alone).abs().max() <= 1e-12
    assert (model(ids) - alone).abs().max() > 1e-3  # without numbers they do see each other


def test_changing_document_one_leaves_the_next_bit_equal():
    # experts apart: how many rows of document 1 share a product with the others changes rounding
    model = build(
        dtype=torch.float32, hybrid_override_pattern="M*-M", mtp_hybrid_override_pattern="*"
    )
    ids, seq_idx = tokens(1, 90), numbers([40, 50])
    other = torch.cat([tokens(1, 40, seed=9), ids[:, 40:]], dim=1)
    results = []
    for row in (ids, other):
        hidden = model(row, seq_idx)
        ahead = [depth.input_ids for depth in Batch(row, row, seq_idx).look_ahead(2).ahead]
        results.append([hidden, *model.mtp_hidden(hidden, ahead, seq_idx)])
    for one, two in zip(*results, strict=True):
        assert not torch.equal(one[:, :40], two[:, :40])
        assert torch.equal(one[:, 40:], two[:, 40:])


def test_no_gradient_reaches_another_document():
    model, seq_idx = build(), numbers([30, 40])
    embedded = torch.randn(1, 70, 24, dtype=torch.float64, requires_grad=True)
    model.backbone.embeddings.forward = lambda _: embedded
    hidden = model(tokens(1, 70), seq_idx)
    (gradient,) = torch.autograd.grad(hidden[:, 30:].square().sum(), embedded)
    assert not gradient[:, :30].any()
    assert gradient[:, 30:].any()


def test_losses_and_gradients_of_a_packed_row_are_the_sums_of_its_documents():
    objective = PretrainObjective(Auxiliary(LossConfig(), num_depths=2))
    model, ids = build(), tokens(1, sum(LENGTHS) + 1)
    labels = ids[:, 1:].clone()
    labels[0, torch.tensor(LENGTHS).cumsum(0) - 1] = NO_LABEL
    seq_idx = numbers(LENGTHS)

    def total(batch: Batch) -> torch.Tensor:
        sums, _ = compute_sums(objective, model, batch.look_ahead(2))
        return sums[:3].sum()  # without the balance loss, which looks at whole rows

    packed = total(Batch(ids[:, :-1], labels, seq_idx))
    expected = gradients(model, packed)
    parts = zip(ids[:, :-1].split(LENGTHS, 1), labels.split(LENGTHS, 1), strict=True)
    alone = sum(total(Batch(a, b, None)) for a, b in parts)
    assert abs(packed - alone) <= 1e-10
    for name, gradient in gradients(model, alone).items():
        scale = max(expected[name].abs().max().item(), 1e-6)
        assert (gradient - expected[name]).abs().max() <= 1e-10 * scale, name
