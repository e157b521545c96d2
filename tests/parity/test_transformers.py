"""Logits and gradients of our model are those of transformers' NemotronH."""

import copy

import pytest
import torch
import torch.nn.functional as F

# Two float32 implementations that sum in another order; measured: 1e-6.
LOGITS = 2e-5
GRADIENTS = 1e-4


@pytest.mark.parametrize("length", [1, 7, 63, 130])
def test_logits_are_those_of_transformers(pair, tokens, length: int):
    assert pair.difference(tokens(2, length)) <= LOGITS


def test_every_gradient_is_that_of_transformers(pair, tokens):
    ids = tokens(2, 71)
    for logits, model in zip(pair.logits(ids), (pair.ours, pair.theirs), strict=True):
        model.zero_grad()
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = dict(pair.theirs.named_parameters())
    for name, parameter in pair.ours.named_parameters():
        expected = theirs.pop(name.replace("backbone.", "model.", 1)).grad
        assert expected.abs().max() > 0, name
        error = (parameter.grad - expected).abs().max() / expected.abs().max()
        assert error <= GRADIENTS, f"{name}: {error}"
    assert not theirs


def test_the_stock_floor_of_the_time_step_is_the_only_difference(pair_of, tokens):
    pair, ids = pair_of("nano"), tokens(2, 40)
    limits = {m: m.time_step_limit for m in pair.theirs.modules() if hasattr(m, "time_step_limit")}
    assert len(limits) == 3
    for mixer in limits:
        mixer.time_step_limit = (
            mixer.config.time_step_min,
            float("inf"),
        )  # as transformers sets it
    assert pair.difference(ids) > 100 * LOGITS
    floor = copy.deepcopy(pair.ours)
    for block in floor.backbone.layers:
        if hasattr(block.mixer, "time_step_limit"):
            block.mixer.time_step_limit = (0.001, float("inf"))
    with torch.no_grad():
        expected = pair.theirs(input_ids=ids).logits
        difference = (floor.logits(floor(ids)) - expected).abs().max() / expected.abs().max()
    assert difference <= LOGITS
