"""Policy losses against golden values and against formulas written out in float64."""

import math

import pytest
import torch
from torch import Tensor

from nemotron.posttrain.config import CorrectionConfig, PolicyConfig
from nemotron.posttrain.policy import (
    Answers,
    correction,
    kl_divergence,
    policy_loss,
    sequence_error,
)

# one answer of three tokens; the figures were computed with NVIDIA-NeMo/RL's loss function
LIVE = torch.tensor([[-1.0, -0.5, -2.0]], dtype=torch.float64)
OLD = torch.tensor([[-1.1, -0.4, -2.5]], dtype=torch.float64)
SAMPLED = torch.tensor([[-1.2, -0.45, -4.5]], dtype=torch.float64)
ADVANTAGES = torch.tensor([[1.0, 1.0, -1.0]], dtype=torch.float64)
DAPO = PolicyConfig(clip_low=0.2, clip_high=0.28)


def one_answer(values: Tensor) -> Answers:
    return Answers(torch.zeros_like(values, dtype=torch.long), 1, torch.ones_like(values).bool())


def test_golden_ratio_clipping() -> None:
    loss = policy_loss(LIVE, OLD, ADVANTAGES, one_answer(LIVE), DAPO)
    expected = torch.tensor([[-1.10517092, -0.90483742, 1.64872127]], dtype=torch.float64)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("kind", "low", "high", "mean"),
    [
        ("none", None, None, -0.120429),
        ("is", None, None, 3.336621),
        ("tis", None, 5.0, 2.023658),
        ("icepop", 0.5, 5.0, -0.724211),
    ],
)
def test_golden_corrections(kind: str, low: float | None, high: float | None, mean: float) -> None:
    config = CorrectionConfig.model_validate({"kind": kind, "min": low, "max": high})
    answers = one_answer(LIVE)
    loss = policy_loss(LIVE, OLD, ADVANTAGES, answers, DAPO)
    weight = correction(OLD, SAMPLED, answers, config)
    assert (loss * weight).mean().item() == pytest.approx(mean, abs=1e-6)


def test_golden_weights_errors_and_divergence() -> None:
    answers = one_answer(LIVE)
    weight = correction(OLD, SAMPLED, answers, CorrectionConfig(kind="is"))
    expected = torch.tensor([[1.105171, 1.051271, 7.389056]], dtype=torch.float64)
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=0)
    error = sequence_error(OLD, SAMPLED, answers)
    assert error[0, 0].item() == pytest.approx(3.181833, abs=1e-6)
    # NeMo RL's `gen_kl_error` compares the sampled policy with the trainer's
    divergence = kl_divergence(SAMPLED, OLD, "k3").mean().item()
    assert divergence == pytest.approx(1.465166, abs=1e-6)


def test_golden_ratio_of_a_whole_answer() -> None:
    config = PolicyConfig(kind="gspo", average="sequence", clip_low=0.5, clip_high=0.5)
    answers = one_answer(LIVE)
    loss = policy_loss(LIVE, OLD, torch.ones_like(LIVE), answers, config)
    torch.testing.assert_close(-loss, torch.full_like(loss, 1.181360), rtol=1e-6, atol=0)


def packed(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Answers]:
    """Two rows with three answers of other lengths, and positions that belong to none."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [2, 2, 2, 2, 2, 2, 2]])
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0]]).bool()
    live, old, sampled = -torch.rand(3, 2, 7, generator=generator, dtype=torch.float64) * 3
    scores = torch.randn(3, generator=generator, dtype=torch.float64)[number]
    zero = torch.zeros_like(live)
    live, old, sampled = (torch.where(mask, t, zero) for t in (live, old, sampled))
    return live, old, sampled, scores, Answers(number, 3, mask)


CONFIGS = {
    "ppo": PolicyConfig(clip_low=0.2, clip_high=0.28),
    "dual": PolicyConfig(clip_low=0.2, clip_high=0.28, dual_clip=3.0),
    "gspo": PolicyConfig(kind="gspo", average="sequence"),
    "cispo": PolicyConfig(kind="cispo", clip_high=0.28),
    "reinforce": PolicyConfig(kind="reinforce"),
    "on_policy": PolicyConfig(on_policy=True),
}


def token_by_token(
    live: Tensor, old: Tensor, advantages: Tensor, answers: Answers, config: PolicyConfig
) -> Tensor:
    """The same losses from scalar formulas, one token after the other."""
    total = live.new_zeros(())
    for b, t in answers.mask.nonzero().tolist():
        a, logp = advantages[b, t], live[b, t]
        base = logp.detach() if config.on_policy else old[b, t]
        ratio = (logp - base).exp()
        if config.kind == "gspo":
            own = (answers.number == answers.number[b, t]) & answers.mask
            ratio = ((live - old)[own].sum() / own.sum()).exp()
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        if config.kind == "reinforce":
            loss = -a * logp
        elif config.kind == "cispo":
            loss = -a * clipped.detach() * logp
        else:
            loss = torch.maximum(-a * ratio, -a * clipped)
            if config.dual_clip and a < 0:
                loss = torch.minimum(loss, -a * config.dual_clip)
        total = total + loss
    return total


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_equal_scalar_formulas(name: str, seed: int) -> None:
    live, old, _, scores, answers = packed(seed)
    config = CONFIGS[name]
    ours, theirs = live.clone().requires_grad_(), live.clone().requires_grad_()
    found = policy_loss(ours, old, scores, answers, config).sum()
    expected = token_by_token(theirs, old, scores, answers, config)
    found.backward()
    expected.backward()
    # the same float64 formulas, summed in another order
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)
    assert ours.grad[~answers.mask].abs().max() == 0


def test_on_policy_gradient_is_that_of_reinforce() -> None:
    """One update per batch makes the clip bounds inert."""
    live, old, _, scores, answers = packed(3)
    gradients = []
    for name in ("on_policy", "reinforce"):
        logprobs = live.clone().requires_grad_()
        policy_loss(logprobs, old, scores, answers, CONFIGS[name]).sum().backward()
        gradients.append(logprobs.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=0)


def test_answers_outside_the_bounds_are_left_out_as_a_whole() -> None:
    _, old, sampled, _, answers = packed(4)
    means = answers.mean(old - sampled).exp()
    threshold = means[answers.mask].median().item()
    config = CorrectionConfig(kind="seq-mask-tis", min=0.0, max=threshold)
    weight = correction(old, sampled, answers, config)
    for number in range(3):
        own = (answers.number == number) & answers.mask
        is_in = means[own][0].item() <= threshold
        assert bool((weight[own] != 0).all()) is is_in
    assert (weight[answers.mask] == 0).any()


def test_what_is_not_finite_weighs_nothing() -> None:
    answers = one_answer(LIVE)
    sampled = torch.tensor([[-1.2, float("-inf"), float("nan")]], dtype=torch.float64)
    for kind in ("is", "tis", "icepop"):
        weight = correction(OLD, sampled, answers, CorrectionConfig.model_validate({"kind": kind}))
        assert weight[0, 1:].tolist() == [0.0, 0.0]
        assert weight[0, 0].item() == pytest.approx(math.exp(0.1))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_divergence_estimators(kind: str) -> None:
    """k1 and k3 are unbiased: their mean over the policy's own tokens is the exact divergence."""
    torch.manual_seed(5)
    p, q = (torch.randn(6, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = (p.exp() * (p - q)).sum().item()
    estimate = (p.exp() * kl_divergence(p, q, kind)).sum().item()
    if kind == "k2":
        assert estimate == pytest.approx((p.exp() * (p - q).square()).sum().item() / 2)
    else:
        assert estimate == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "gspo", "average": "token"}, "average: sequence"),
        ({"kind": "cispo", "average": "sequence"}, "average: token"),
        ({"correction": {"min": 6.0, "max": 5.0}}, "min = 6.0 is above max = 5.0"),
    ],
)
def test_contradictions_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PolicyConfig.model_validate(values)
