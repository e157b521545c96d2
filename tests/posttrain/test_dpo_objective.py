"""The loss of pairs of answers against plain PyTorch in float64, and against TRL's numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nemotron.data.batch import Batch, Row, pack
from nemotron.model.hybrid import HybridLM
from nemotron.posttrain.preference.config import DpoOptions
from nemotron.posttrain.preference.objective import REFERENCE, DpoObjective
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.config import LossConfig
from nemotron.train.loss import compute_sums
from tests.support.models import build, tokens

ANSWERS = [[5, 2], [7, 4], [4, 1], [6, 5], [9, 3], [5, 4]]
"""Tokens of each conversation, and how many of them at its end are learned; two make a pair."""
ROWS = ([0, 1, 2, 3], [4, 5])
CASES = [
    DpoOptions(),
    DpoOptions(reference_policy_kl_penalty=0.3, label_smoothing=0.1, preference_loss_weight=2.0),
    DpoOptions(preference_average_log_probs=True, sft_loss_weight=0.2),
    DpoOptions(sft_loss_weight=0.5, sft_average_log_probs=True),
]


def packed() -> Batch:
    """Three pairs in two rows, with room left in both."""
    rows = []
    for seed, members in enumerate(ROWS):
        lengths = [ANSWERS[member][0] for member in members]
        starts = np.cumsum([0, *lengths])[:-1]
        weights = [
            np.arange(n, 0, -1) <= ANSWERS[m][1] for n, m in zip(lengths, members, strict=True)
        ]
        ids = tokens(1, sum(lengths), seed=seed)[0].numpy()
        rows.append(Row(ids, starts, np.concatenate(weights).astype(np.float32)))
    return pack(rows, 26, 0, mask_eod_loss=False)


def with_reference(batch: Batch, reference: HybridLM) -> Batch:
    with torch.no_grad():
        hidden = reference(batch.input_ids, batch.seq_idx)
        known = reference.lm_head.token_logprobs(hidden, batch.labels)
    return replace(batch, extras={REFERENCE: known})


def answer_logprobs(model: HybridLM, batch: Batch) -> list[torch.Tensor]:
    """Return the log-probabilities of each answer's tokens, each conversation read by itself."""
    found = []
    for row, members in enumerate(ROWS):
        start = 0
        for member in members:
            length, learned = ANSWERS[member]
            ids = batch.input_ids[row, start : start + length]
            logits = model.logits(model(ids[None, :-1]))[0]
            picked = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            found.append(picked[-learned:])
            start += length
    return found


def plain(options: DpoOptions, ours: list[torch.Tensor], theirs: list[torch.Tensor]):
    """The published formula, pair by pair."""
    losses = []
    for chosen in range(0, len(ours), 2):
        gains = [ours[i] - theirs[i] for i in (chosen, chosen + 1)]
        average = options.preference_average_log_probs
        first, second = (gain.mean() if average else gain.sum() for gain in gains)
        margin = options.reference_policy_kl_penalty * (first - second)
        right = options.label_smoothing
        loss = -(1 - right) * F.logsigmoid(margin) - right * F.logsigmoid(-margin)
        average = options.sft_average_log_probs
        likelihood = ours[chosen].mean() if average else ours[chosen].sum()
        weighted = options.preference_loss_weight * loss
        losses.append(weighted - options.sft_loss_weight * likelihood)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("options", CASES, ids=str)
def test_loss_and_gradient_equal_plain_torch(options: DpoOptions) -> None:
    policy, reference = build(seed=1), build(seed=8)
    batch = with_reference(packed(), reference)
    own = DpoObjective(options, Auxiliary(LossConfig(), 0, False))
    counts, loss = own.counts(batch), 0.0
    policy.zero_grad()
    for micro in batch.split(1):
        terms, _ = compute_sums(own, policy, micro)
        share = own.combine(terms, counts)
        share.backward()
        loss += share.item()
    found = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}

    policy.zero_grad()
    with torch.no_grad():
        theirs = answer_logprobs(reference, batch)
    expected = plain(options, answer_logprobs(policy, batch), theirs)
    expected.backward()
    assert counts[0] == 3
    assert abs(loss - expected.item()) <= 1e-10
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-10)


def test_figures_are_means_over_pairs() -> None:
    policy, reference = build(seed=1), build(seed=8)
    batch = with_reference(packed(), reference)
    own = DpoObjective(DpoOptions(), Auxiliary(LossConfig(), 0, False))
    with torch.no_grad():
        terms, _ = compute_sums(own, policy, batch)
        ours, theirs = answer_logprobs(policy, batch), answer_logprobs(reference, batch)
    means = dict(zip(own.names, (terms / 3).tolist(), strict=True))
    rewards = [0.05 * (a - b).sum().item() for a, b in zip(ours, theirs, strict=True)]
    chosen, rejected = np.array(rewards[::2]), np.array(rewards[1::2])
    assert means["dpo/rewards_chosen"] == pytest.approx(chosen.mean(), abs=1e-10)
    assert means["dpo/rewards_rejected"] == pytest.approx(rejected.mean(), abs=1e-10)
    assert means["dpo/rewards_margin"] == pytest.approx((chosen - rejected).mean(), abs=1e-10)
    assert means["dpo/accuracy"] == (chosen > rejected).mean()
