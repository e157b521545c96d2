"""Backends belong to a model: what one is given changes no other, and is never lost."""

import ast
import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nemotron
from nemotron.data.batch import Batch
from nemotron.errors import UserError
from nemotron.generate.decode_layers import prepare_weights
from nemotron.generate.engine import Engine
from nemotron.generate.sampling import Sampling
from nemotron.model.hybrid import HybridLM
from nemotron.ops.apply import ALL, COMBINED, GENERATION, apply
from nemotron.ops.config import OpsConfig
from nemotron.ops.registry import Backend, Operation
from nemotron.parallel.stages import Stage, cut
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.config import LossConfig
from nemotron.train.loss import PretrainObjective, compute_sums
from tests.support.models import build, recompute, tokens

REFERENCE = OpsConfig(**dict.fromkeys(OpsConfig.model_fields, "reference"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """Count the calls of every backend, by the names of operation and backend."""
    counted: Counter[tuple[str, str]] = Counter()

    def spy(function: Callable[..., Any], *key: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            counted[key] += 1
            return function(*arguments)

        return call

    for operation in ALL:
        backends = [
            replace(b, function=spy(b.function, operation.name, b.name)) for b in operation.backends
        ]
        monkeypatch.setattr(operation, "backends", backends)
        monkeypatch.setattr(operation, "_chosen", {})
    return counted


def train(model: HybridLM) -> None:
    """Forward and backward over every part of the model."""
    objective = PretrainObjective(Auxiliary(LossConfig(), num_depths=1))
    ids = torch.arange(20).ge(13).int().expand(2, 20)
    batch = Batch(tokens(2, 20), tokens(2, 20, seed=1), ids).look_ahead(1)
    sums, _ = compute_sums(objective, model, batch)
    objective.combine(sums, objective.counts(batch)).backward()


def backends_of(model: nn.Module) -> dict[str, set[str | None]]:
    found: dict[str, set[str | None]] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Operation):
                found.setdefault(value.name, set()).add(value.pinned)
    return found


def test_two_models_in_one_process_use_backends_of_their_own(calls: Counter):
    first, second = build(dtype=torch.float32), build(dtype=torch.float32)
    apply(first, REFERENCE)
    apply(second, OpsConfig(ssd="chunked", attention="sdpa"))
    train(first)
    assert {name for name, _ in calls} == set(OpsConfig.model_fields) - GENERATION - COMBINED
    assert {backend for _, backend in calls} == {"reference"}
    calls.clear()
    train(second)
    assert calls["ssd", "chunked"]
    assert calls["attention", "sdpa"]
    assert not calls["ssd", "reference"] + calls["attention", "reference"]
    assert not calls["rms_norm", "reference"]  # free: the fastest
    calls.clear()
    train(first)
    assert {backend for _, backend in calls} == {"reference"}


def test_a_model_that_was_given_nothing_uses_the_fastest(calls: Counter):
    train(build(dtype=torch.float32))
    assert calls["ssd", "chunked"]
    assert not calls["ssd", "reference"]


def test_operations_that_stand_for_others_are_called_where_they_are_named(
    monkeypatch: pytest.MonkeyPatch,
):
    counted: Counter[str] = Counter()
    for operation in ALL:
        if operation.name in COMBINED:
            function = operation.backend("reference").function

            def named(*inputs: Any, name: str = operation.name, own: Any = function) -> Any:
                counted[name] += 1
                return own(*inputs)

            backends = [Backend("named", named, by_name=True), *operation.backends]
            monkeypatch.setattr(operation, "backends", backends)
    found = []
    for choices in (OpsConfig(), OpsConfig(**dict.fromkeys(COMBINED, "named"))):
        model = build(dtype=torch.float32)
        apply(model, choices)
        assert not counted
        train(model)
        found.append({name: p.grad for name, p in model.named_parameters()})
    # once for each block, the prediction block's two included, and for each layer of experts
    assert counted == {"residual_rms_norm": 5 + 2, "grouped_mlp": 1 + 1}
    alone, together = found
    assert all(torch.equal(gradient, together[name]) for name, gradient in alone.items())


def test_choices_can_be_changed_and_lifted(calls: Counter):
    model = build(dtype=torch.float32)
    apply(model, REFERENCE)
    apply(model, OpsConfig())
    train(model)
    assert calls["ssd", "chunked"]
    assert not calls["ssd", "reference"]


def test_every_operation_of_a_model_is_bound():
    model = build()
    assert backends_of(model) == {operation.name: {None} for operation in ALL}
    apply(model, REFERENCE)
    assert backends_of(model) == {operation.name: {"reference"} for operation in ALL}
    assert backends_of(copy.deepcopy(model)) == backends_of(model)


def test_blocks_that_are_computed_again_keep_their_backends(calls: Counter):
    model = build(dtype=torch.float32)
    apply(model, REFERENCE)
    recompute(model, True)
    train(model)
    assert {backend for _, backend in calls} == {"reference"}
    assert calls["ssd", "reference"] == 2 * 2  # two M layers, forward and again


def test_the_stages_of_a_pipeline_keep_their_backends(calls: Counter):
    model = build(dtype=torch.float32)
    apply(model, REFERENCE)
    cut(model, range(2), is_first=True, is_last=False)
    stage = Stage(model, 0, 2)
    stage.batches = [Batch(tokens(1, 8), tokens(1, 8), None)]
    stage.share = lambda *_: torch.zeros(())
    stage(number=torch.zeros(1, dtype=torch.long))
    assert calls["ssd", "reference"] == 1
    assert {backend for _, backend in calls} == {"reference"}


def test_layers_for_decoding_keep_their_backends(calls: Counter):
    model = build(dtype=torch.float32)
    apply(model, REFERENCE)
    engine = Engine(prepare_weights(model))
    engine.generate([list(range(2, 20)), [3]], 3, Sampling(0.0))
    assert calls["ssd", "reference"]
    assert calls["attention", "reference"]
    assert calls["gated_rms_norm", "reference"]
    assert {backend for _, backend in calls} == {"reference"}
    assert {None} not in backends_of(model).values()


def test_a_backend_that_cannot_take_a_call_is_an_error_with_the_key():
    model = build(dtype=torch.float32)
    with pytest.raises(UserError, match=r"ops\.ssd = fastest is unknown; use auto or one of"):
        apply(model, OpsConfig(ssd="fastest"))
    apply(model, OpsConfig(attention="varlen"))
    with pytest.raises(UserError, match=r"ops\.attention = varlen runs on cuda, not on cpu"):
        model(tokens(1, 4))


PACKAGE = Path(nemotron.__file__).parent


@pytest.mark.parametrize("folder", ["model", "parallel", "generate", "train", "hf"])
def test_operations_are_called_through_a_module_that_holds_them(folder: str):
    for path in (PACKAGE / folder).rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imported = {
            alias.asname or alias.name
            for node in nodes
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nemotron.ops.")
            for alias in node.names
        } & set(OpsConfig.model_fields)
        called = {n.func.id for n in nodes if isinstance(n, ast.Call) and hasattr(n.func, "id")}
        assert not imported & called, path
