"""The terms of correction, against torch's own losses pair by pair."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.model.hybrid import HybridLM
from nemotron.posttrain.correct.anti_copy import anti_copy
from nemotron.posttrain.correct.batches import pack_examples
from nemotron.posttrain.correct.config import CorrectOptions
from nemotron.posttrain.correct.layout import (
    ANSWER,
    DETECT,
    DURATION,
    END,
    RUN,
    WRONG,
    Example,
    Specials,
    lay_out,
)
from nemotron.posttrain.correct.objective import CorrectObjective
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.config import LossConfig
from nemotron.train.loss import compute_sums
from tests.support.models import build, gradients
from tests.support.pairs import make_rows, marks

MARKS = marks()
SPECIALS = Specials(1, 2, MARKS)
KINDS = ["tag", "ctc", "soft", "duration"]


def model_of(kind: str, candidates: int = 2) -> HybridLM:
    heads = ["duration", "edit", "candidate"] if kind == "duration" else []
    correction = {"candidates": candidates, "heads": heads}
    return build(
        vocab_size=64,
        hybrid_override_pattern="M*-",
        num_nextn_predict_layers=0,
        mtp_hybrid_override_pattern=None,
        correction=correction,
    )


def options_of(kind: str) -> CorrectOptions:
    return CorrectOptions(kind=kind, pseudo_errors=0.2)


def objective_of(kind: str) -> CorrectObjective:
    return CorrectObjective(options_of(kind), Auxiliary(LossConfig(), 0, False), MARKS)


def examples_of(kind: str, number: int, candidates: int = 2) -> list[Example]:
    found = []
    for index, row in enumerate(make_rows(number, candidates)):
        example = lay_out(row, options_of(kind), SPECIALS, np.random.default_rng(index), 0.2)
        if example is not None:
            found.append(example)
    return found


def evaluated(model: HybridLM, kind: str, batch: Batch) -> tuple[Tensor, Tensor]:
    objective = objective_of(kind)
    return compute_sums(objective, model, batch)[0], objective.counts(batch)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_pairs_have_the_terms_and_gradients_of_rows_of_their_own(kind: str) -> None:
    model = model_of(kind)
    examples = examples_of(kind, 5)
    length = max(example.length for example in examples)
    packed = pack_examples([examples[:3], examples[3:]], 4 * length, 2)
    apart = pack_examples([[example] for example in examples], length + 3, 2)
    found, counts = evaluated(model, kind, packed)
    expected, own_counts = evaluated(model, kind, apart)
    assert counts.tolist() == own_counts.tolist()
    assert counts.min() > 0
    # heads answer in float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    objective = objective_of(kind)
    ours = gradients(model, objective.combine(found, counts))
    theirs = gradients(model, objective.combine(expected, counts))
    assert ours.keys() == theirs.keys() == dict(model.named_parameters()).keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def plain_terms(kind: str, model: HybridLM, example: Example) -> list[Tensor]:
    """The terms of one pair by torch's losses, from all of its logits."""
    batch = pack_examples([[example]], example.length, 2)
    hidden = model(batch.input_ids, candidates=batch.candidates)
    logits = model.logits(hidden)[0]
    labels = batch.labels[0]
    at = labels != NO_LABEL
    smoothing = 0.0 if kind == "tag" else 0.1
    main = F.cross_entropy(logits[at], labels[at], reduction="sum", label_smoothing=smoothing)
    if kind == "tag":
        return [main]
    extras = {name: values[0] for name, values in batch.extras.items()}
    if kind == "duration":
        return [main, *_heads(model, batch, hidden, extras, labels, logits)]
    runs = logits.new_zeros(())
    for number in range(int(extras[RUN].max()) + 1):
        own = extras[RUN] == number
        target = extras[ANSWER][own]
        target = target[target != NO_LABEL]
        runs = runs + F.ctc_loss(
            logits[own].log_softmax(-1).unsqueeze(1),
            target,
            torch.tensor([int(own.sum())]),
            torch.tensor([len(target)]),
            blank=MARKS.blank,
            reduction="sum",
        )
    if kind == "ctc":
        return [runs]
    seen = extras[DETECT] != NO_LABEL
    return [anti_copy(logits[seen], extras[DETECT][seen], MARKS.truth, 1.0).sum(), runs, main]


def _heads(
    model: HybridLM,
    batch: Batch,
    hidden: Tensor,
    extras: dict[str, Tensor],
    labels: Tensor,
    logits: Tensor,
) -> list[Tensor]:
    assert batch.candidates is not None
    assert model.edit_heads is not None
    durations, wrong = extras[DURATION], extras[WRONG]
    at, end = (durations != NO_LABEL).any(-1), extras[END] != NO_LABEL
    own = model.backbone.embeddings.weight[batch.candidates[0]]
    found = model.edit_heads(hidden[0][at], own[at], hidden[0][end])
    mean = F.cross_entropy(logits, labels, ignore_index=NO_LABEL).detach()
    squares = flags = logits.new_zeros(())
    for k in range(durations.shape[1]):
        has = durations[at][:, k] != NO_LABEL
        target = durations[at][has, k].clamp(max=3).float()
        squares = squares + F.mse_loss(found.durations[has, k], target, reduction="sum")
        flags = flags + F.binary_cross_entropy_with_logits(
            found.edits[has, k], wrong[at][has, k].float(), reduction="sum"
        )
    missed = (found.losses[0, extras[END][end]] - mean).square().sum()
    return [squares, flags, missed]


@pytest.mark.parametrize("kind", KINDS)
def test_terms_are_those_of_plain_torch(kind: str) -> None:
    model = model_of(kind)
    examples = examples_of(kind, 4)
    batch = pack_examples([examples], sum(e.length for e in examples) + 1, 2)
    found, _ = evaluated(model, kind, batch)
    every = [plain_terms(kind, model, example) for example in examples]
    expected = [sum(terms) for terms in zip(*every, strict=True)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.item() == pytest.approx(torch.as_tensor(theirs).item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_without_anything_to_answer_has_terms_of_zero(kind: str) -> None:
    """Other ranks wait for its gradients all the same."""
    model = model_of(kind)
    [batch] = [pack_examples([examples_of(kind, 1)], 80, 2)]
    extras = {name: torch.full_like(values, NO_LABEL) for name, values in batch.extras.items()}
    empty = replace(batch, labels=torch.full_like(batch.labels, NO_LABEL), extras=extras)
    found, counts = evaluated(model, kind, empty)
    assert found.tolist() == counts.tolist() == [0.0] * len(found)
    objective_of(kind).combine(found, counts).backward()
    gradients_ = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients_)


def test_slots_answer_with_labels_that_are_not_shifted() -> None:
    model = model_of("tag")
    batch = pack_examples([examples_of("tag", 1)], 60, 2)
    found, _ = evaluated(model, "tag", batch)
    logits = model.logits(model(batch.input_ids, candidates=batch.candidates))
    shifted = F.cross_entropy(logits[0, :-1], batch.labels[0, 1:], reduction="sum")
    assert abs(found[0].item() - shifted.item()) > 1e-3


def test_equal_candidates_are_read_as_one_by_a_model_that_begins() -> None:
    plain, several = build(seed=3), build(seed=3, correction={"candidates": 4})
    weights = plain.state_dict()
    several.load_state_dict(weights, strict=False)
    several.init_weights(0)
    plain.init_weights(0)
    ids = torch.randint(61, (2, 9))
    alike = ids.unsqueeze(2).expand(-1, -1, 4)
    for found in (several(ids, candidates=alike), several(ids)):
        torch.testing.assert_close(found, plain(ids), rtol=1e-9, atol=1e-9)


def test_a_model_without_correction_has_the_keys_that_it_had() -> None:
    plain = build()
    assert not [name for name in plain.state_dict() if "candidates" in name or "edit" in name]
    one = build(correction={"candidates": 1})
    assert one.state_dict().keys() == plain.state_dict().keys()
