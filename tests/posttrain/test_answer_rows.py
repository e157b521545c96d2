"""Answers packed into rows: each token keeps its label, its weight and its values."""

import random

import pytest
import torch

from nemotron.data.batch import NO_LABEL
from nemotron.posttrain.config import PolicyConfig, RlConfig
from nemotron.posttrain.environments.base import Response, Verdict
from nemotron.posttrain.policy import Answers, policy_loss
from nemotron.posttrain.rollout import Rollout
from nemotron.posttrain.rows import pack_answers
from nemotron.posttrain.tasks import Task
from tests.support.tiny_run import MODEL

EOD, SEQ_LEN = 0, 29


@pytest.fixture
def config() -> RlConfig:
    return RlConfig.model_validate(
        {
            "name": "rows",
            "model": MODEL,
            "data": {"seq_len": SEQ_LEN},
            "rollout": {
                "num_prompts_per_step": 5,
                "num_generations_per_prompt": 3,
                "max_new_tokens": 9,
            },
            "batch": {"global_tokens": 15 * SEQ_LEN},
            "schedule": {"kind": "constant", "peak": 1e-3, "total_steps": 1},
        }
    )


def rollouts(seed: int) -> list[Rollout]:
    rng, found = random.Random(seed), []
    for number in range(15):
        prompt = tuple(rng.randrange(1, 99) for _ in range(rng.randint(1, 9)))
        tokens = [rng.randrange(1, 99) for _ in range(rng.randint(1, 9))]
        found.append(
            Rollout(
                task=Task("arith_chain", {}, prompt),
                group=number // 3,
                tokens=tokens,
                logprobs=[-rng.random() for _ in tokens],
                forced=[rng.random() < 0.2 for _ in tokens],
                is_truncated=False,
                version=0,
                response=Response(""),
                verdict=Verdict(0.0),
                is_masked=rng.random() < 0.2,
            )
        )
    return found


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_every_answer_lies_once_in_a_row_that_holds_it(config, multiple: int, seed: int) -> None:
    given = rollouts(seed)
    rows = pack_answers(given, config, multiple)
    assert len(rows.answers) % multiple == 0
    assert rows.length <= SEQ_LEN
    placed = [rollout for row in rows.answers for rollout in row]
    assert sorted(map(id, placed)) == sorted(map(id, given))
    for row in rows.answers:
        assert sum(len(r.task.prompt) + len(r.tokens) for r in row) <= rows.length + 1
    assert any(len(row) > 1 for row in rows.answers)


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_labels_are_the_tokens_that_the_policy_chose(config, average: str) -> None:
    given = rollouts(7)
    rows = pack_answers(given, config, 4)
    batch = rows.batch(EOD, average)
    lined_up = rows.line_up({id(r): r.logprobs for r in given})
    apart = rows.take_apart(lined_up)
    for rollout in given:
        assert apart[id(rollout)] == pytest.approx(rollout.logprobs)
    chosen = [
        (token, value)
        for rollout in given
        for token, value, forced in zip(
            rollout.tokens, rollout.logprobs, rollout.forced, strict=True
        )
        if not forced and not rollout.is_masked
    ]
    mask = batch.labels != NO_LABEL
    found = zip(batch.labels[mask].tolist(), lined_up[mask].tolist(), strict=True)
    # float32 holds the values
    torch.testing.assert_close(torch.tensor(sorted(found)), torch.tensor(sorted(chosen)))
    # a label follows its input, also at the borders of documents
    assert batch.seq_idx is not None
    inside = (batch.seq_idx[:, 1:] == batch.seq_idx[:, :-1]) & mask[:, :-1]
    assert torch.equal(batch.input_ids[:, 1:][inside], batch.labels[:, :-1][inside])


def test_every_answer_weighs_alike_when_averaged_by_sequence(config) -> None:
    given = rollouts(3)
    batch = pack_answers(given, config, 1).batch(EOD, "sequence")
    counted = [r for r in given if not r.is_masked and not all(r.forced)]
    assert batch.loss_weight is not None
    mask = batch.labels != NO_LABEL
    assert batch.loss_weight[mask].sum().item() == pytest.approx(len(counted), abs=1e-5)


def test_learning_from_a_teacher_follows_the_reverse_divergence() -> None:
    """Over all tokens, weighted by their probability, the loss has the divergence's gradient."""
    drawn = torch.Generator().manual_seed(3)
    logits, taught = torch.randn(2, 7, generator=drawn, dtype=torch.float64)
    logits.requires_grad_()
    ours, theirs = logits.log_softmax(-1), taught.log_softmax(-1)
    [answer, *_] = rollouts(1)
    total = torch.zeros((), dtype=torch.float64)
    for token in range(7):
        answer.tokens = [token]
        answer.old_logprobs = [ours[token].item()]
        answer.teacher_logprobs = [theirs[token].item()]
        advantages = torch.tensor([answer.token_advantages], dtype=torch.float64)
        live = ours[token].view(1, 1)
        one = Answers(torch.zeros(1, 1, dtype=torch.long), 1, torch.ones(1, 1).bool())
        loss = policy_loss(live, live.detach(), advantages, one, PolicyConfig())
        total = total + ours[token].exp().detach() * loss.sum()
    [found] = torch.autograd.grad(total, logits, retain_graph=True)
    [expected] = torch.autograd.grad((ours.exp() * (ours - theirs)).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
