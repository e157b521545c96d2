"""Weights of labels reach every term of the loss, and the sums they are divided by."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nemotron.data.batch import Batch
from nemotron.train.build import build_model
from nemotron.train.loss import PretrainObjective, compute_sums
from nemotron.train.pretraining import open_data
from nemotron.train.schedule import plan_training


def test_the_objective_is_the_weighted_mean_of_each_term(recipe):
    config = recipe()
    batch = open_data(config, plan_training(config)).batch(0)
    weights = torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(3))
    batch = replace(batch, loss_weight=weights).look_ahead(2)
    [model] = build_model(config, torch.device("cpu")).models
    objective = PretrainObjective.of(config)
    (sums, _), counts = compute_sums(objective, model, batch), objective.counts(batch)
    assert counts[0] == pytest.approx(weights[batch.labels != -100].sum().item(), rel=1e-6)

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
    assert sums[0].item() / counts[0] == pytest.approx(mean(hidden, 0), rel=1e-5)
    for ahead, depth in enumerate(further, start=1):
        term = sums[ahead].item() / counts[ahead]
        assert term == pytest.approx(mean(depth, ahead), rel=1e-5)
    alike = replace(batch, loss_weight=None).look_ahead(2)
    plain = objective.combine(compute_sums(objective, model, alike)[0], objective.counts(alike))
    assert plain.item() != pytest.approx(objective.combine(sums, counts).item(), rel=1e-4)


def test_micro_batches_of_weighted_samples_add_up_to_the_loss_of_all(recipe):
    config = recipe()
    data = open_data(config, plan_training(config))
    [model] = build_model(config, torch.device("cpu")).models
    batch = data.batch(2)
    weights = torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(4))
    batch = replace(batch, loss_weight=weights).look_ahead(2)
    objective = PretrainObjective.of(config)
    counts = objective.counts(batch)

    def loss(rows: Batch) -> float:
        return objective.combine(compute_sums(objective, model, rows)[0], counts).item()

    assert sum(loss(part) for part in batch.split(2)) == pytest.approx(loss(batch), rel=1e-5)
