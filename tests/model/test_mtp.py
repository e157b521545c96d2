"""Multi-token prediction against a plain loop over depths, written from the formulas."""

import torch
import torch.nn.functional as F

from nemotron.data.batch import NO_LABEL, Batch, shift_left
from nemotron.model.hybrid import HybridLM
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.config import LossConfig
from nemotron.train.loss import PretrainObjective, compute_sums
from tests.support.models import build, gradients, tokens


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-5)


def by_depth(model: HybridLM, ids: torch.Tensor, labels: torch.Tensor, depths: int) -> list:
    """Return the loss of each depth for one row without documents."""
    first, last = model.mtp.layers
    g, length, found = model(ids), ids.shape[1], []
    for k in range(1, depths + 1):
        ahead = torch.cat([ids[:, k:], torch.zeros(1, k, dtype=torch.int64)], dim=1)
        embedded = model.backbone.embeddings.weight[ahead]
        joined = torch.cat([norm(embedded, first.enorm.weight), norm(g, first.hnorm.weight)], -1)
        x = joined @ first.eh_proj.weight.T
        x = x + first.mixer(norm(x, first.norm.weight))
        x = x + last.mixer(norm(x, last.norm.weight))[0]
        g = norm(x, last.final_layernorm.weight)
        logits = g @ model.lm_head.weight.T
        # depth k at position t predicts token t + k + 1
        found.append(F.cross_entropy(logits[0, : length - k], labels[0, k:], reduction="sum"))
    return found


def test_every_depth_follows_the_formulas():
    model, row = build(), tokens(1, 41)
    ids, labels = row[:, :-1], row[:, 1:]
    config = LossConfig(mtp_num_depths=2, mtp_loss_factor=0.3, moe_aux_loss_coeff=0.0)
    batch = Batch(ids, labels, None).look_ahead(2)
    objective = PretrainObjective(Auxiliary(config, num_depths=2))
    (sums, _), counts = compute_sums(objective, model, batch), objective.counts(batch)
    expected = by_depth(model, ids, labels, 2)
    assert objective.names == ("main", "mtp_1", "mtp_2", "aux")
    assert counts.tolist() == [40, 39, 38, 40]
    for ours, theirs in zip(sums[1:3], expected, strict=True):
        assert abs(ours - theirs) <= 1e-10
    total = objective.combine(sums, counts)
    main = F.cross_entropy(model.logits(model(ids))[0], labels[0])
    whole = main + 0.3 / 2 * (expected[0] / 39 + expected[1] / 38)
    assert abs(total - whole) <= 1e-12
    ours, theirs = gradients(model, total), gradients(model, whole)
    assert set(ours) == set(theirs)
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).abs().max() <= 1e-11, name


def test_detached_heads_train_only_the_block():
    model, row = build(), tokens(1, 30)
    batch = Batch(row[:, :-1], row[:, 1:], None).look_ahead(2)

    def reach(config: LossConfig) -> list[str]:
        sums, _ = compute_sums(PretrainObjective(Auxiliary(config, num_depths=2)), model, batch)
        found = gradients(model, sums[1:3].sum())  # the main loss gets a gradient of 0
        return [name for name, gradient in found.items() if gradient.any()]

    reached = reach(LossConfig(mtp_detach_heads=True))
    assert reached
    assert all(name.startswith("mtp.") for name in reached)
    free = reach(LossConfig())
    assert {"lm_head.weight", "backbone.embeddings.weight"} <= set(free)


def test_the_shared_block_gets_the_sum_of_what_two_copies_would_get():
    model, ids = build(), tokens(1, 25)
    hidden = model(ids).detach()
    after = shift_left(ids, None, vacated=0)
    later = shift_left(after, None, vacated=0)
    one, two = model.mtp_hidden(hidden, [after, later], None)
    cotangents = [torch.randn(one.shape, dtype=torch.float64) for _ in range(2)]
    shared = gradients(model, (one * cotangents[0]).sum() + (two * cotangents[1]).sum())
    first, second = build(), build()
    (g,) = first.mtp_hidden(hidden, [after], None)
    (h,) = second.mtp_hidden(g, [later], None)
    loss = (g * cotangents[0]).sum() + (h * cotangents[1]).sum()
    copies = gradients(first, loss)
    others = {n: p.grad for n, p in second.named_parameters() if p.grad is not None}
    for name, gradient in shared.items():
        assert (gradient - copies[name] - others[name]).abs().max() <= 1e-11, name


def test_shifts_stay_inside_their_document():
    values = torch.tensor([[1, 2, 3, 4, 5, 6]])
    seq_idx = torch.tensor([[0, 0, 0, 1, 2, 2]])
    once = shift_left(values, seq_idx, vacated=NO_LABEL)
    assert once.tolist() == [[2, 3, NO_LABEL, NO_LABEL, 6, NO_LABEL]]
    assert shift_left(once, seq_idx, vacated=NO_LABEL).tolist() == [
        [3, NO_LABEL, NO_LABEL, NO_LABEL, NO_LABEL, NO_LABEL]
    ]
    assert shift_left(values, None, vacated=0).tolist() == [[2, 3, 4, 5, 6, 0]]
