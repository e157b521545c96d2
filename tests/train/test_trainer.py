"""What one optimizer step must be: independent of micro-batches and logging, deaf to NaN."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nemotron.errors import UserError
from nemotron.model.mamba2 import Mamba2
from nemotron.parallel.runtime import Ranks
from nemotron.run.metrics import read_metrics
from nemotron.train.config import PretrainConfig
from nemotron.train.schedule import plan_training
from nemotron.train.start import open_data, train
from nemotron.train.state import SPIKE_MINIMUM, Skip, TrainerState
from nemotron.train.validation import evaluate
from tests.support.same_run import final_tensors
from tests.support.tiny_run import build_trainer, do_step


def losses_of(config: PretrainConfig, steps: int) -> list[dict]:
    subject = build_trainer(config)
    results = [do_step(subject, step) for step in range(steps)]
    return [{**r.sums.values(r.counts), "norm": r.grad_norm} for r in results]


@pytest.mark.parametrize("documents", [False, True])
def test_the_size_of_micro_batches_changes_no_loss_and_no_gradient(recipe, documents):
    # rows with unequal numbers of targets: dividing by a micro-batch's own count would show
    changes = {"reset_documents": documents, "mask_eod_loss": True}
    data = recipe().data.model_copy(update=changes)
    results = [
        losses_of(recipe(batch={"global_tokens": 155, "micro_batch": rows}, data=data), 3)
        for rows in (1, 4, 5)
    ]
    for other in results[1:]:
        # only the order of float32 additions differs; Adam makes more of it with every step
        assert other[0] == pytest.approx(results[0][0], rel=1e-6)
        assert other[2] == pytest.approx(results[0][2], rel=1e-4)


def test_resetting_at_documents_changes_the_loss(recipe):
    data = recipe().data
    plain, reset = (
        losses_of(recipe(data=data.model_copy(update={"reset_documents": on})), 1)[0]
        for on in (False, True)
    )
    assert plain["loss/main"] != reset["loss/main"]


def test_recomputing_blocks_changes_no_loss_and_counts_the_load_once(recipe):
    kept, recomputed = build_trainer(recipe()), build_trainer(recipe(recompute="block"))
    a, b = do_step(kept, 0), do_step(recomputed, 0)
    assert a.loss == b.loss
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-6)
    for layer, counts in a.sums.load.items():
        assert torch.equal(counts, b.sums.load[layer])


def test_the_router_bias_moves_once_per_step_by_the_load_of_the_whole_step(recipe):
    subject = build_trainer(recipe())
    result = do_step(subject, 0)
    config = subject.config
    tokens = config.batch.global_tokens * config.model.num_experts_per_tok
    for layer, calls in {"backbone.layers.1": 1, "mtp.layers.1": 2}.items():
        counts = result.sums.load[layer]
        assert counts.sum() == tokens * calls
        bias = subject.model.get_submodule(f"{layer}.mixer.gate").e_score_correction_bias
        expected = 1e-3 * torch.sign(counts.float().mean() - counts)
        assert torch.equal(bias, expected.float())


def test_how_often_is_logged_and_evaluated_changes_no_bit(recipe, undisturbed):
    config = recipe("quiet", logging={"every_steps": 5}, evaluation={"tokens": 62})
    assert train(config) == 0
    quiet, loud = final_tensors(Path(config.output) / "quiet"), final_tensors(undisturbed)
    assert all(torch.equal(quiet[name], loud[name]) for name in loud)
    records = read_metrics(Path(config.output) / "quiet" / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == [5, 8]


def test_a_step_that_is_not_finite_leaves_everything_but_data_and_schedule(recipe):
    subject = build_trainer(recipe())
    do_step(subject, 0)
    weight = subject.model.lm_head.weight
    before = {name: tensor.clone() for name, tensor in subject.tensors().items()}
    hook = weight.register_hook(lambda gradient: gradient * float("nan"))
    result = do_step(subject, 1)
    hook.remove()
    assert result.skip is Skip.NOT_FINITE
    assert result.events() == [
        "skipped the update: loss or gradient is not finite (gradients of head)"
    ]
    after = subject.tensors()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (subject.state.step, subject.state.tokens) == (2, 310)
    assert (subject.state.skipped_steps, subject.state.nonfinite_in_a_row) == (1, 1)
    following = do_step(subject, 2)
    assert following.skip is None
    assert following.lr == subject.plan.lr(2)
    assert subject.state.nonfinite_in_a_row == 0


def test_a_batch_without_targets_is_skipped_and_is_no_nan(recipe):
    subject = build_trainer(recipe())
    batch = subject.batches.take(0)
    empty = replace(batch, labels=torch.full_like(batch.labels, -100)).look_ahead(2)
    result = subject.update(0, empty)
    assert result.skip is Skip.NO_TARGETS
    assert subject.state.nonfinite_in_a_row == 0
    assert subject.state.skipped_steps == 1


def test_a_run_that_diverges_ends_with_a_sentence_that_names_the_step(recipe, capsys):
    schedule = {"kind": "constant", "peak": 1e25, "total_steps": 20}
    assert train(recipe("wild", schedule=schedule, nonfinite_limit=3)) == 1
    out = capsys.readouterr().out
    assert "3 steps in a row were not finite, the last one step" in out
    assert "the newest checkpoint is step-" in out


def test_a_loss_far_above_the_recent_ones_is_a_spike():
    state = TrainerState.fresh()
    for i in range(SPIKE_MINIMUM):
        assert not state.is_spike(9.0, 9.0, None)
        state.advance(10, 2.0 + 0.01 * (i % 3), 1.0 + 0.01 * (i % 2), None)
    assert not state.is_spike(2.03, 9.0, None)
    assert state.is_spike(2.5, 1.0, None)


def test_with_a_bound_a_large_gradient_is_a_spike_too():
    state = TrainerState.fresh()
    for i in range(SPIKE_MINIMUM):
        state.advance(10, 2.0 + 0.01 * (i % 3), 1.0 + 0.01 * (i % 2), None)
    assert state.is_spike(2.0, 1.5, 6.0)
    assert not state.is_spike(2.0, 1.5, 200.0)


def test_what_was_skipped_does_not_become_what_is_usual():
    state = TrainerState.fresh()
    for i in range(SPIKE_MINIMUM):
        state.advance(10, 2.0 + 0.01 * (i % 3), 1.0, None)
    for _ in range(SPIKE_MINIMUM):
        state.advance(10, 9.0, 1.0, Skip.SPIKE)
    assert state.is_spike(9.0, 1.0, 6.0)
    assert state.bad_within(8) == list(range(56, 64))


def test_weights_can_be_taken_from_another_run(recipe, undisturbed):
    config = recipe("child", init_from=str(undisturbed))
    assert train(config, stop_at=0) == 75
    child, parent = final_tensors(Path(config.output) / "child"), final_tensors(undisturbed)
    for name, tensor in child.items():
        if name.startswith("model."):
            assert torch.equal(tensor, parent[name])
    assert not child["optimizer.exp_avg.lm_head.weight"].any()


def test_weights_of_another_shape_are_refused_with_the_key_at_fault(recipe, undisturbed):
    model = recipe().model.model_copy(update={"moe_latent_size": 10})
    config = recipe("misfit", model=model.model_dump(), init_from=str(undisturbed))
    with pytest.raises(UserError, match=r"model.moe_latent_size = 12 there.*instead of"):
        train(config)
    assert not (Path(config.output) / "misfit").exists()


def test_validation_is_cross_entropy_of_the_logits_and_its_bits_per_byte(recipe):
    subject, config = build_trainer(recipe()), recipe()
    data = open_data(config, plan_training(config))
    values = evaluate(subject.local, data, Ranks(), tokens=31 * 4, rows=3)
    nats = tokens = size = 0
    for domain in ("prose", "numbers"):
        for held_out in data.validation(domain, tokens=31 * 4, rows=1):
            logits = subject.model.logits(subject.model(held_out.batch.input_ids))
            labels = held_out.batch.labels
            nats += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            tokens += int((labels != -100).sum())
            size += held_out.num_bytes
    assert values["validation/loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert values["validation/bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert values["validation/perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert {"validation/prose/loss", "validation/numbers/bits_per_byte"} <= values.keys()


def test_tied_heads_stay_one_tensor(recipe):
    model = recipe().model.model_dump() | {"tie_word_embeddings": True}
    subject = build_trainer(recipe(model=model))
    do_step(subject, 0)
    assert subject.model.lm_head.weight is subject.model.backbone.embeddings.weight


def test_the_model_uses_the_backends_of_the_recipe_and_other_models_their_own(recipe):
    named = build_trainer(recipe(ops={"ssd": "reference"}))
    free = build_trainer(recipe())
    for subject, expected in ((named, {"reference"}), (free, {None})):
        mixers = [m for m in subject.model.modules() if isinstance(m, Mamba2)]
        assert {mixer.ssd.pinned for mixer in mixers} == expected
