"""What is logged about a rollout batch; names are NeMo RL's where it has one."""

import logging
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from nemotron.errors import RunFailed
from nemotron.posttrain.config import RlConfig
from nemotron.posttrain.rollout import Rollout

log = logging.getLogger(__name__)

PROB_ERROR = "rl/token_mult_prob_error"
"""Mean over the policy's own tokens of `exp |log trainer - log sampled|`."""

CURRENT_ERROR = "rl/token_mult_prob_error_current"
"""The same over the tokens that were sampled with the trainer's weights of now."""


def batch_metrics(rollouts: Sequence[Rollout], config: RlConfig) -> dict[str, float]:
    """Return rewards, lengths, agreement with the trainer, and what of the batch has no signal.

    `PROB_ERROR` is 1 if trainer and engine agree;
    `teacher_kl` is the divergence of the policy from a teacher (k1), in nats a token;
    `gen_kl_error` the divergence of the trainer from the rollout policy (k3).
    Source: NVIDIA-NeMo/RL: docs/guides/grpo.md.
    """
    judged = [r for r in rollouts if r.verdict.error is None]
    rewards = defaultdict(list)
    for rollout in judged:
        rewards[rollout.task.environment].append(rollout.verdict.reward)
    values = {f"rl/reward/{name}": _mean(found) for name, found in rewards.items()}
    size = config.rollout.num_generations_per_prompt
    by_group = np.array([r.verdict.reward for r in rollouts]).reshape(-1, size)
    old, sampled, _ = _own_logprobs(rollouts)
    difference = old - sampled
    masked = [r for r in rollouts if r.is_masked]
    if config.teacher is not None:
        values["rl/teacher_kl"] = -_mean(
            [
                advantage
                for rollout in rollouts
                for advantage, forced in zip(rollout.token_advantages, rollout.forced, strict=True)
                if not forced
            ]
        )
    return values | {
        "rl/reward": _mean([r.verdict.reward for r in judged]),
        "rl/answer_tokens": _mean([len(r.tokens) for r in rollouts]),
        "rl/turns": _mean([r.turns for r in rollouts]),
        "rl/tool_calls": _mean([r.tool_calls for r in rollouts]),
        "rl/tool_faults": float(sum(r.tool_fault is not None for r in rollouts)),
        "rl/truncated": _mean([r.is_truncated for r in rollouts]),
        "rl/verifier_faults": float(len(rollouts) - len(judged)),
        "rl/masked": float(len(masked)),
        "rl/masked_reward": _mean([r.verdict.reward for r in masked]),
        "rl/groups_without_signal": _mean(by_group.max(1) == by_group.min(1)),
        "rl/advantage_sum": float(sum(r.advantage for r in rollouts)),
        PROB_ERROR: _mean(np.exp(np.abs(difference))),
        "rl/gen_kl_error": _mean(np.exp(difference) - 1 - difference),
        "rl/approx_entropy": -_mean(old),
    }


def current_error(rollouts: Sequence[Rollout], version: int, config: RlConfig) -> float | None:
    """Return `PROB_ERROR` over the tokens that this version of the weights gave; None without any.

    Where states of older weights are kept, only answers count that no other version took part in.
    """
    if not config.rollout.recompute_kv_cache_after_weight_updates:
        rollouts = [r for r in rollouts if set(r.token_versions) == {version}]
    old, sampled, versions = _own_logprobs(rollouts)
    own = versions == version
    return _mean(np.exp(np.abs(old - sampled))[own]) if own.any() else None


def mean_lag(rollouts: Sequence[Rollout], version: int) -> float:
    """Return by how many steps the weights of sampled tokens are older, on average."""
    *_, versions = _own_logprobs(rollouts)
    return _mean(version - versions)


def check_agreement(error: float, config: RlConfig, step: int) -> None:
    """Warn, or end the run, when trainer and engine disagree about a rollout batch.

    Raises:
        RunFailed: when `PROB_ERROR` is above the limit of the recipe.
    """
    limit = config.policy.correction.max_prob_error
    if limit is None or error <= 1 + (limit - 1) / 2:
        return
    said = (
        f"{PROB_ERROR} = {error:.4f} at step {step}: trainer and engine give the sampled tokens "
        "different probabilities"
    )
    if error <= limit:
        log.warning("%s; above policy.correction.max_prob_error = %s the run stops", said, limit)
        return
    replays = config.rollout.router_replay or not config.model.moe_layers
    advice = "compare them with nemotron check-parity" if replays else "use router_replay: true"
    raise RunFailed(
        f"{said}, more than policy.correction.max_prob_error = {limit}; {advice}, or raise the "
        "limit. Nothing was learned from these answers."
    )


def _own_logprobs(rollouts: Sequence[Rollout]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what the trainer and the rollout policy say of the tokens that the policy chose.

    Beside them, in float64 too, stands the version of the policy.
    """
    found = [
        (old, sampled, version)
        for rollout in rollouts
        for old, sampled, version, forced in zip(
            rollout.old_logprobs,
            rollout.logprobs,
            rollout.token_versions,
            rollout.forced,
            strict=True,
        )
        if not forced
    ]
    old, sampled, versions = np.array(found, np.float64).reshape(-1, 3).T
    return old, sampled, versions


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0
