"""The trainer with another objective and other batches than those of pre-training."""

from pathlib import Path

import pytest
import torch

from nemotron.checkpoint.find import newest
from nemotron.checkpoint.write import Content, save
from nemotron.errors import UserError
from nemotron.parallel.runtime import Ranks
from nemotron.train.build import build_local
from nemotron.train.config import PretrainConfig
from nemotron.train.schedule import plan_training
from nemotron.train.trainer import Trainer
from tests.support.other_training import TEMPERATURE, CountedBatches, EverySecondToken
from tests.support.tiny_run import MODEL, PEAK_FLOPS, build_trainer, do_step

VOCAB = 61


@pytest.fixture
def config(recipe) -> PretrainConfig:
    return recipe(
        model=MODEL | {"vocab_size": VOCAB}, batch={"global_tokens": 31 * 4, "micro_batch": 3}
    )


def build(config: PretrainConfig) -> Trainer:
    batches = CountedBatches(4, 31, VOCAB)
    plan = plan_training(config)
    device = torch.device("cpu")
    local = build_local(config, device, Ranks())
    return Trainer(config, local, EverySecondToken(), batches, plan, device, PEAK_FLOPS)


def expected_loss(trainer: Trainer) -> float:
    """The definition, from all logits of the batch that comes next."""
    batch = CountedBatches(4, 31, VOCAB).take(0)
    with torch.no_grad():
        logits = trainer.model.logits(trainer.model(batch.input_ids)) / TEMPERATURE
    chosen, others = [], []
    for row, labels in enumerate(batch.labels.tolist()):
        for t, label in enumerate(labels):
            if label == -100:
                continue
            logprob = logits[row, t].log_softmax(-1)[label].item()
            if t % 2:
                others.append(logprob**2)
            else:
                chosen.append(-logprob * batch.extras["weight"][row, t].item())
    return sum(chosen) / len(chosen) + 0.01 * sum(others) / len(others)


def test_another_objective_trains_on_batches_from_memory(config):
    trainer = build(config)
    expected = expected_loss(trainer)
    results = [do_step(trainer, step) for step in range(8)]
    # float32 sums in another order, over micro-batches of 3 rows and 1
    assert results[0].loss == pytest.approx(expected, rel=1e-5)
    assert results[-1].loss < results[0].loss - 0.1
    assert trainer.state.tokens == 8 * 31 * 4
    values = trainer.values(7, results[-1])
    terms = {key for key in values if key.startswith("loss/")}
    assert terms == {"loss/total", "loss/chosen", "loss/others"}
    assert values["data/taken"] == 8
    # the prediction block has no part in this objective
    assert not any(key.startswith("moe/mtp") for key in values)
    assert any(key.startswith("moe/layers") for key in values)


def test_a_step_without_a_chosen_token_is_skipped(config):
    trainer = build(config)
    batch = trainer.batches.take(0)
    batch.labels[:, ::2] = -100
    assert trainer.update(0, batch).skip.name == "NO_TARGETS"


def write(trainer: Trainer, folder: Path) -> None:
    step, state = trainer.state.step, trainer.saved_state()
    save(folder, Content(step, trainer.tensors(), state, trainer.config.model), 2, Ranks())


def test_the_state_of_a_source_of_batches_survives_a_resume(config, tmp_path):
    kept = build(config)
    kept.batches.taken = 5  # so that the counter is not the step
    for step in range(3):
        do_step(kept, step)
    write(kept, tmp_path)
    resumed = build(config)
    resumed.restore(newest(tmp_path, Ranks()).info)
    assert resumed.batches.taken == 8
    for step in range(3, 6):
        a, b = do_step(kept, step), do_step(resumed, step)
        assert (a.loss, a.grad_norm) == (b.loss, b.grad_norm)


def test_a_checkpoint_of_other_batches_is_refused(recipe, config, tmp_path):
    text = build_trainer(recipe())
    do_step(text, 0)
    write(text, tmp_path)
    with pytest.raises(UserError, match="step 1 has other batches"):
        build(config).restore(newest(tmp_path, Ranks()).info)
