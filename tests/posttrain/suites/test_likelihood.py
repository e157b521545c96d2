"""Log-probabilities of continuations, against a pass over each text by itself."""

import pytest
import torch
import torch.nn.functional as F

from nemotron.posttrain.suites.likelihood import sum_logprobs
from tests.support.models import build


def test_continuations_have_the_probabilities_of_texts_by_themselves():
    model = build(3)
    context, texts = [5, 9, 2, 2, 40], [[7], [7, 8, 1], [60, 3]]
    found = sum_logprobs(model, context, texts)
    for text, value in zip(texts, found, strict=True):
        row = torch.tensor([[*context, *text]])
        logits = model.logits(model(row[:, :-1]))[0, len(context) - 1 :]
        wanted = -F.cross_entropy(logits, torch.tensor(text), reduction="sum").item()
        # float32 probabilities of a float64 model
        assert value == pytest.approx(wanted, rel=1e-5)
