"""The policy objective on a model, against the same loss from all logits in plain PyTorch."""

import operator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.model.hybrid import HybridLM
from nemotron.posttrain.config import CorrectionConfig, PolicyConfig
from nemotron.posttrain.objective import (
    ADVANTAGE,
    OLD,
    REFERENCE,
    SAMPLED,
    PolicyObjective,
    answers_of,
)
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.config import LossConfig
from nemotron.train.loss import compute_sums
from tests.support.models import build

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def model() -> HybridLM:
    return build(seed=3)


def objective(model: HybridLM, policy: PolicyConfig) -> PolicyObjective:
    depths = 2 if model.mtp is not None else 0
    auxiliary = Auxiliary(LossConfig(), depths, bool(model.config.moe_layers))
    return PolicyObjective(policy, auxiliary, TEMPERATURE)


def batch_of(model: HybridLM, seed: int = 0) -> Batch:
    """Two rows of two documents each, of which the second halves are answers."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (2, 14), generator=generator)
    seq_idx = torch.tensor([[0] * 6 + [1] * 7, [0] * 9 + [1] * 4], dtype=torch.int32)
    labels = tokens[:, 1:].clone()
    labels[:, :3] = NO_LABEL
    labels[0, 5:8] = NO_LABEL
    labels[1, 8:10] = NO_LABEL
    batch = Batch(tokens[:, :-1], labels, seq_idx)
    with torch.no_grad():
        live = plain_logprobs(model, batch)

    def near() -> Tensor:
        """Log-probabilities of another policy, for which few ratios reach a limit."""
        noise = 0.5 * torch.randn(2, 13, generator=generator).double()
        return torch.where(labels != NO_LABEL, live + noise, 0)

    scores = torch.randn(2, 13, generator=generator).double()
    extras = {ADVANTAGE: scores, OLD: near(), SAMPLED: near(), REFERENCE: near()}
    batch = replace(batch, extras=extras)
    return batch.look_ahead(2 if model.mtp is not None else 0)


def plain_logprobs(model: HybridLM, batch: Batch) -> Tensor:
    logits = model.logits(model(batch.input_ids, batch.seq_idx)) / TEMPERATURE
    index = batch.labels.clamp(min=0).unsqueeze(-1)
    found = logits.log_softmax(-1).gather(-1, index).squeeze(-1)
    return torch.where(batch.labels != NO_LABEL, found, 0)


def test_loss_and_gradient_equal_plain_torch(model: HybridLM) -> None:
    policy = PolicyConfig(
        clip_low=0.2,
        clip_high=0.3,
        kl_coefficient=0.1,
        correction=CorrectionConfig(kind="tis", max=1.5, max_sequence_error=None),
    )
    batch, own = batch_of(model), objective(model, policy)
    own = replace(own, auxiliary=replace(own.auxiliary, num_depths=0, has_routers=False))
    batch = replace(batch, ahead=())
    model.zero_grad()
    sums, _ = compute_sums(own, model, batch)
    own.combine(sums, own.counts(batch)).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    logprobs, x = plain_logprobs(model, batch), batch.extras
    ratio = (logprobs - x[OLD]).exp()
    pg = torch.maximum(-x[ADVANTAGE] * ratio, -x[ADVANTAGE] * ratio.clamp(0.8, 1.3))
    pg = pg * (x[OLD] - x[SAMPLED]).exp().clamp(max=1.5)
    log_ratio = x[REFERENCE] - logprobs
    kl = log_ratio.exp() - 1 - log_ratio
    # the gradient of the divergence has the score-function part, too
    kl = kl + kl.detach() * (logprobs - logprobs.detach())
    mask = batch.labels != NO_LABEL
    ((pg + 0.1 * kl)[mask].sum() / mask.sum()).backward()
    assert found.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            # float64: only the order of the sums differs
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-8, atol=1e-11)


def test_answers_of_packed_rows_stay_apart(model: HybridLM) -> None:
    """GSPO has one ratio an answer: packed rows give what each document alone gives."""
    policy = PolicyConfig(
        kind="gspo",
        average="sequence",
        clip_low=0.9,
        clip_high=9.0,
        correction=CorrectionConfig(kind="is", max_sequence_error=None),
    )
    own = objective(model, policy)
    own = replace(own, auxiliary=replace(own.auxiliary, num_depths=0, has_routers=False))
    packed = replace(batch_of(model), ahead=())
    with torch.no_grad():
        whole, _ = compute_sums(own, model, packed)
        total = torch.zeros_like(whole)
        for row, start, stop in ((0, 0, 6), (0, 6, 13), (1, 0, 9), (1, 9, 13)):
            part = packed.map(operator.itemgetter((slice(row, row + 1), slice(start, stop))))
            total += compute_sums(own, model, replace(part, seq_idx=None))[0]
    torch.testing.assert_close(whole, total, rtol=1e-9, atol=1e-11)
    assert len(answers_of(packed).number.unique()) == 4


def test_every_answer_counts_alike_when_averaged_by_sequence(model: HybridLM) -> None:
    policy = PolicyConfig(kind="reinforce", correction=CorrectionConfig(kind="none"))
    own, batch = objective(model, policy), batch_of(model)
    answers = answers_of(batch)
    weight = torch.where(answers.mask, 1 / answers.sum(torch.ones(2, 13)), 0)
    batch = replace(batch, loss_weight=weight)
    assert own.counts(batch)[0].item() == pytest.approx(4.0)


def test_terms_are_named_and_counted(model: HybridLM) -> None:
    with_kl = objective(model, PolicyConfig(kl_coefficient=1e-4))
    without = objective(model, PolicyConfig())
    assert with_kl.names == ("policy", "kl", *without.names[1:])
    batch = batch_of(model)
    labels = (batch.labels != NO_LABEL).sum().item()
    assert with_kl.counts(batch)[:2].tolist() == [labels, labels]
    sums, _ = compute_sums(with_kl, model, batch)
    assert len(sums) == len(with_kl.names)
