"""Weights of labels reach every term of the loss, and the sums they are divided by."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nemotron.train.loss import count_tokens, losses, objective
from nemotron.train.schedule import plan_course
from nemotron.train.start import open_data
from nemotron.train.trainer import build_model


def test_the_objective_is_the_weighted_mean_of_each_term(recipe):
    config = recipe()
    batch = open_data(config, plan_course(config)).batch(0)
    weights = torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(3))
    batch = replace(batch, loss_weight=weights).look_ahead(2)
    [model] = build_model(config, torch.device("cpu")).models
    terms, counts = losses(model, batch, config.loss), count_tokens(batch)
    assert counts.main == pytest.approx(weights[batch.labels != -100].sum().item(), rel=1e-6)

    def mean(hidden: torch.Tensor, ahead: int) -> float:
        """The term from the definition: the label that lies further along its document."""
        total = whole = 0.0
        logits = model.logits(hidden)
        for row in range(batch.labels.shape[0]):
            for t in range(batch.labels.shape[1] - ahead):
                same = batch.seq_idx[row, t] == batch.seq_idx[row, t + ahead]
                label = int(batch.labels[row, t + ahead])
                if label != -100 and same:
                    weight = float(weights[row, t + ahead])
                    total += weight * F.cross_entropy(logits[row, t], torch.tensor(label)).item()
                    whole += weight
        return total / whole

    hidden = model(batch.input_ids, batch.seq_idx)
    inputs = [depth.input_ids for depth in batch.ahead]
    further = model.mtp_hidden(hidden, inputs, batch.seq_idx)
    # float32 sums in another order
    assert terms.main.item() / counts.main == pytest.approx(mean(hidden, 0), rel=1e-5)
    for ahead, depth in enumerate(further, start=1):
        term = terms.mtp[ahead - 1].item() / counts.mtp[ahead - 1]
        assert term == pytest.approx(mean(depth, ahead), rel=1e-5)
    alike = replace(batch, loss_weight=None).look_ahead(2)
    plain = objective(losses(model, alike, config.loss), count_tokens(alike), config.loss)
    assert plain.item() != pytest.approx(objective(terms, counts, config.loss).item(), rel=1e-4)


def test_a_run_over_weighted_samples_trains_and_portions_change_nothing(recipe):
    config = recipe()
    data = open_data(config, plan_course(config))
    [model] = build_model(config, torch.device("cpu")).models
    batch = data.batch(2)
    weights = torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(4))
    batch = replace(batch, loss_weight=weights).look_ahead(2)
    counts = count_tokens(batch)
    whole = objective(losses(model, batch, config.loss), counts, config.loss)
    parts = [objective(losses(model, p, config.loss), counts, config.loss) for p in batch.split(2)]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-5)
