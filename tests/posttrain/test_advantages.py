"""Advantages against published estimators and golden values."""

import pytest
import torch

from nemotron.posttrain.advantages import advantages
from nemotron.posttrain.config import AdvantageConfig

ESTIMATORS = {
    "nemo": AdvantageConfig(baseline="loo", scale="loo"),
    "grpo": AdvantageConfig(baseline="group", scale="group"),
    "rloo": AdvantageConfig(baseline="loo", scale="none"),
    "dr_grpo": AdvantageConfig(baseline="group", scale="none"),
}
# rewards, place of another answer, estimator, advantage of the first answer and of the other,
# computed with the formulas of NVIDIA-NeMo/RL
GOLDEN = [
    ([1, 0, 0, 0], 3, "nemo", 1.0, -0.5773503),
    ([1, 0, 0, 1], 2, "nemo", 1.1547005, -1.1547005),
    ([1] + [0] * 15, 15, "nemo", 1.0, -0.2581989),
    ([0] + [1] * 15, 15, "nemo", -1.0, 0.2581989),
    ([1, 0], 1, "nemo", 1.0, -1.0),
    ([1, 0, 0, 1], 2, "grpo", 0.8660254, -0.8660254),
    ([1, 0, 0, 0], 3, "grpo", 1.5, -0.5),
    ([1] + [0] * 15, 15, "grpo", 3.75, -0.25),
    ([0] + [1] * 15, 15, "grpo", -3.75, 0.25),
    ([1, 0], 1, "grpo", 0.7071068, -0.7071068),
    ([1, 0, 0, 1], 2, "rloo", 2 / 3, -2 / 3),
    ([1, 0, 0, 0], 3, "rloo", 1.0, -1 / 3),
    ([1] + [0] * 15, 15, "rloo", 1.0, -1 / 15),
    ([1, 0, 0, 1], 2, "dr_grpo", 0.5, -0.5),
    ([1] + [0] * 15, 15, "dr_grpo", 0.9375, -0.0625),
    ([1, 0], 1, "dr_grpo", 0.5, -0.5),
]


@pytest.mark.parametrize(("rewards", "other", "estimator", "first", "last"), GOLDEN)
def test_golden_values(
    rewards: list[int], other: int, estimator: str, first: float, last: float
) -> None:
    group = torch.tensor([rewards], dtype=torch.float64)
    found = advantages(group, torch.ones_like(group), ESTIMATORS[estimator])[0]
    # the divisor has 1e-6 added, which the published figures round away
    assert found[0].item() == pytest.approx(first, abs=2e-5)
    assert found[other].item() == pytest.approx(last, abs=2e-5)


def test_groups_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    rewards = torch.rand(3, 5, dtype=torch.float64)
    lengths = torch.ones_like(rewards)
    for config in ESTIMATORS.values():
        together = advantages(rewards, lengths, config)
        for number in range(3):
            rows = slice(number, number + 1)
            alone = advantages(rewards[rows], lengths[rows], config)
            # sums over another number of groups may be vectorised otherwise: one rounding
            torch.testing.assert_close(together[rows], alone, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_equal_rewards_give_no_signal(value: float, size: int) -> None:
    rewards = torch.full((2, size), value, dtype=torch.float64)
    for config in ESTIMATORS.values():
        if size == 1 and config.baseline == "loo":
            continue  # there is no other answer to compare with
        found = advantages(rewards, torch.ones_like(rewards), config)
        assert found.abs().max() < 1e-9


def test_loo_equals_a_loop_over_the_others() -> None:
    torch.manual_seed(1)
    rewards = torch.rand(4, 6, dtype=torch.float64)
    found = advantages(rewards, torch.ones_like(rewards), ESTIMATORS["nemo"])
    for p in range(4):
        for g in range(6):
            others = torch.cat([rewards[p, :g], rewards[p, g + 1 :]])
            expected = (rewards[p, g] - others.mean()) / (others.std() + 1e-6)
            assert found[p, g].item() == pytest.approx(expected.item(), abs=1e-12)


def test_batch_scale_weighs_answers_by_their_tokens() -> None:
    """REINFORCE++ whitens the token-level advantages: compare with every token written out."""
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    lengths = torch.tensor([[3.0, 1.0], [2.0, 4.0]], dtype=torch.float64)
    found = advantages(rewards, lengths, AdvantageConfig(baseline="group", scale="batch"))
    centered = (rewards - rewards.mean(1, keepdim=True)).flatten()
    tokens = centered.repeat_interleave(lengths.flatten().long())
    expected = (centered - tokens.mean()) / tokens.std(correction=0)
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-12, atol=0)


def test_mean_scale_divides_by_the_share_of_successes() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    found = advantages(
        rewards, torch.ones_like(rewards), AdvantageConfig(baseline="group", scale="mean")
    )
    torch.testing.assert_close(
        found, torch.tensor([[3.0, -1.0, -1.0, -1.0]]).double(), rtol=1e-5, atol=0
    )


def test_clamp_limits_both_sides() -> None:
    rewards = torch.tensor([[1.0] + [0.0] * 15], dtype=torch.float64)
    config = AdvantageConfig(baseline="group", scale="group", clamp=2.0)
    found = advantages(rewards, torch.ones_like(rewards), config)
    assert found.max() == 2.0
    assert advantages(1 - rewards, torch.ones_like(rewards), config).min() == -2.0
