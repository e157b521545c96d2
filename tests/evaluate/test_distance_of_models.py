"""Divergence and agreement of two models, against PyTorch's own on the logits of whole rows."""

from dataclasses import astuple

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import cross_entropy

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.errors import UserError
from nemotron.evaluate import agreement as module
from nemotron.evaluate.agreement import agreement, pooled
from nemotron.model.hybrid import HybridLM
from tests.support.models import build, tokens


def batches() -> list[Batch]:
    found = []
    for seed in (1, 2):
        ids = tokens(2, 19, seed)
        labels = ids.roll(-1, 1)
        labels[:, -1] = NO_LABEL
        labels[0, 3:6] = NO_LABEL
        seq_idx = (torch.arange(19) > 7).int().expand(2, 19).contiguous()
        found.append(Batch(ids, labels, seq_idx))
    return found


def whole_logits(model: HybridLM, given: list[Batch]) -> torch.Tensor:
    rows = [model.logits(model(b.input_ids, b.seq_idx))[b.labels != NO_LABEL] for b in given]
    return torch.cat(rows).detach()


def test_divergence_goes_from_the_reference_to_the_model(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(module, "POSITIONS", 7)  # several parts, the last one smaller
    model, reference = build(0), build(5)
    found = agreement(model, reference, iter(batches()))
    ours, theirs = whole_logits(model, batches()), whole_logits(reference, batches())
    assert found.tokens == len(ours) == 66
    wanted = kl_divergence(Categorical(logits=theirs), Categorical(logits=ours)).mean().item()
    # distributions are float32
    assert found.kl == pytest.approx(wanted, rel=1e-5)
    assert found.top1 == (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    labels = torch.cat([b.labels[b.labels != NO_LABEL] for b in batches()])
    assert found.loss == pytest.approx(cross_entropy(ours, labels).item(), rel=1e-5)
    assert found.reference_loss == pytest.approx(cross_entropy(theirs, labels).item(), rel=1e-5)
    turned = agreement(reference, model, batches())
    assert turned.kl != pytest.approx(found.kl, rel=1e-3)


def test_parts_are_pooled_by_their_tokens():
    model, reference = build(0), build(5)
    whole = agreement(model, reference, batches())
    parts = [agreement(model, reference, [batch]) for batch in batches()]
    assert len(parts) > 1
    found = pooled(parts)
    for value, wanted in zip(astuple(found)[:-1], astuple(whole)[:-1], strict=True):
        assert value == pytest.approx(wanted, rel=1e-6)
    # as of strata: each part has a mean of its own
    weighed = [(part.error * part.tokens / whole.tokens) ** 2 for part in parts]
    assert found.error == pytest.approx(sum(weighed) ** 0.5)


def test_the_error_is_that_of_means_over_rows_on_the_same_tokens():
    model, reference = build(0), build(5)
    ids = tokens(64, 11)
    given = [Batch(part, part.roll(-1, 1), None) for part in ids.split(16)]
    found = agreement(model, reference, given)
    losses = [
        cross_entropy(one.logits(one(ids)).mT, ids.roll(-1, 1), reduction="none").mean(1)
        for one in (model, reference)
    ]
    changes = (losses[0] - losses[1]).detach().numpy()
    assert found.change == pytest.approx(changes.mean(), rel=1e-4)
    # rows are of one length, so that this is the error of a mean of rows
    assert found.error == pytest.approx(changes.std() / 8, rel=1e-4)


def test_a_model_agrees_with_itself():
    model = build(0)
    found = agreement(model, model, batches())
    assert (found.kl, found.top1, found.change, found.error) == (0.0, 1.0, 0.0, 0.0)


def test_models_that_cannot_be_compared_are_refused():
    with pytest.raises(UserError, match="vocabularies of 61 and 57"):
        agreement(build(0), build(0, vocab_size=57), batches())
    with pytest.raises(UserError, match="no text"):
        agreement(build(0), build(0), [])
