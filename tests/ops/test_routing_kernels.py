import importlib
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from against_reference import doubled, results, worst
from torch import Tensor

from nemotron.errors import UserError
from nemotron.model.moe import MoE
from nemotron.ops.registry import Operation
from nemotron.ops.routing import (
    Routed,
    add_up,
    balance_sums,
    expert_order,
    reference,
    sort,
    topk_routing,
)
from tests.support.models import build_config

MODULES = {
    "numba": dict.fromkeys(("topk_routing", "balance_sums", "expert_order"), "numba"),
    "triton": {
        "topk_routing": "topk_triton",
        "balance_sums": "balance_triton",
        "expert_order": "order_triton",
    },
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton() -> None:
    pytest.importorskip("triton")


@pytest.fixture(params=MODULES)
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    if request.param == "numba" and DEVICE != "cpu":
        pytest.skip("the kernels of numba are for CPUs")
    return request.param


@pytest.fixture
def kernels(backend: str) -> SimpleNamespace:
    """The functions of a backend."""
    return SimpleNamespace(
        **{
            name: getattr(importlib.import_module(f"nemotron.ops.routing.{module}"), name)
            for name, module in MODULES[backend].items()
        }
    )


def module_of(name: str) -> ModuleType:
    return importlib.import_module(f"nemotron.ops.routing.{name}_triton")


# tokens, experts, chosen: sizes that fill no block, one token, one expert, all experts, none
SIZES = [(7, 6, 2), (33, 45, 5), (1, 8, 8), (5, 1, 1), (19, 512, 22), (0, 7, 3)]


def draw(tokens: int, experts: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(tokens + experts)
    logits = 2 * torch.randn(tokens, experts, generator=g)
    return logits.to(DEVICE), (0.3 * torch.randn(experts, generator=g)).to(DEVICE)


def weighed(
    function: Callable[..., tuple[Tensor, ...]], bias: Tensor, given: Tensor | None, *rest: object
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Return a function of the logits that returns what has gradients."""
    return lambda logits: function(logits, bias.to(logits.dtype), given, *rest)[:2]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), SIZES)
def test_experts_weights_and_gradients_are_the_references(
    tokens: int, experts: int, top_k: int, normalize: bool, kernels: SimpleNamespace
):
    logits, bias = draw(tokens, experts)
    rest = (top_k, 1, 1, normalize, 2.5)
    found = Routed(*kernels.topk_routing(logits, bias, None, *rest))
    right = Routed(*reference(logits.double(), bias.double(), None, *rest))
    assert torch.equal(found.experts, right.experts)
    assert torch.equal(found.counts, right.counts)
    exact = results(weighed(reference, bias, None, *rest), doubled([logits]))
    # float32: a sigmoid, a sum of at most 22 and a quotient
    assert worst(results(weighed(kernels.topk_routing, bias, None, *rest), [logits]), exact) <= 2e-6


def test_given_experts_are_weighed_and_counted(kernels: SimpleNamespace):
    logits, bias = draw(9, 6)
    given = torch.tensor([[5, 0], [2, 3], [5, 4]], device=DEVICE).repeat(3, 1)
    rest = (2, 1, 1, True, 1.5)
    found = Routed(*kernels.topk_routing(logits, bias, given, *rest))
    assert torch.equal(found.experts, given)
    assert found.counts.tolist() == [3, 0, 3, 3, 3, 6]
    exact = results(weighed(reference, bias, given, *rest), doubled([logits]))
    assert (
        worst(results(weighed(kernels.topk_routing, bias, given, *rest), [logits]), exact) <= 2e-6
    )


@pytest.mark.parametrize("used", [0, 1])
def test_a_gradient_of_one_result_alone_is_enough(used: int, kernels: SimpleNamespace):
    logits, bias = draw(7, 6)
    rest = (2, 1, 1, True, 2.5)

    def one(function: Callable[..., tuple[Tensor, ...]]) -> Callable[[Tensor], Tensor]:
        return lambda logits: function(logits, bias.to(logits.dtype), None, *rest)[used]

    exact = results(one(reference), doubled([logits]))
    assert worst(results(one(kernels.topk_routing), [logits]), exact) <= 2e-6


def test_of_equal_scores_the_lower_number_wins(kernels: SimpleNamespace):
    logits = torch.tensor([[0.0] * 5, [1.0, 2.0, 0.0, 2.0, 1.0]], device=DEVICE)
    routed = Routed(
        *kernels.topk_routing(logits, torch.zeros(5, device=DEVICE), None, 3, 1, 1, True, 1)
    )
    assert routed.experts.tolist() == [[0, 1, 2], [1, 3, 0]]


def test_what_is_no_number_still_chooses_experts_that_exist(kernels: SimpleNamespace):
    logits, bias = draw(6, 5)
    logits[1, 3] = float("nan")
    logits[2] = float("nan")
    logits[3] = float("-inf")
    logits[4] = float("inf")
    routed = Routed(*kernels.topk_routing(logits, bias, None, 3, 1, 1, True, 1))
    experts = routed.experts.tolist()
    assert experts[1][0] == 3  # as torch orders it
    assert all(len(set(row)) == 3 and set(row) <= set(range(5)) for row in experts)
    assert int(routed.counts.sum()) == 18


def test_a_slice_of_wider_rows_is_read_in_place(kernels: SimpleNamespace):
    logits, bias = draw(7, 6)
    wide = torch.full((7, 11), torch.nan, device=DEVICE)
    wide[:, 2:8] = logits
    rest = (2, 1, 1, True, 2.5)
    right = kernels.topk_routing(logits, bias, None, *rest)
    found = kernels.topk_routing(wide[:, 2:8], bias, None, *rest)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("elements", [1, 64])
def test_rows_are_shared_among_programs(
    elements: int, triton: None, monkeypatch: pytest.MonkeyPatch
):
    topk = module_of("topk")
    logits, bias = draw(13, 12)
    rest = (3, 1, 1, True, 2.5)
    exact = results(weighed(reference, bias, None, *rest), doubled([logits]))
    monkeypatch.setattr(topk, "ELEMENTS", elements)
    found = results(weighed(topk.topk_routing, bias, None, *rest), [logits])
    assert worst(found, exact) <= 2e-6


def here(operation: Operation) -> Operation:
    """Return the operation with its kernels fit for the device of the tests, unnamed."""
    fit = [replace(b, devices=frozenset({DEVICE}), by_name=False) for b in operation.backends]
    return replace(operation, backends=fit)


def test_groups_and_too_many_choices_go_to_the_reference(triton: None):
    operation, like = here(topk_routing), torch.empty(0, device=DEVICE)
    operation.backends = [b for b in operation.backends if b.name != "numba"]
    assert operation.select(like, (128, 6), groups=False) is operation.backend("triton").function
    assert operation.select(like, (128, 6), groups=True) is reference
    assert operation.select(like, (128, 128), groups=False) is reference
    with pytest.raises(UserError, match="takes up to 64 of 1024 experts, not 128 of 128"):
        operation.bind("triton").select(like, (128, 128), groups=False)


def test_a_layer_computes_with_kernels_what_it_computes_without(backend: str):
    g = torch.Generator().manual_seed(2)
    config = build_config()
    layer = MoE(config).to(DEVICE)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=g))
    x = torch.randn(2, 19, config.hidden_size, generator=g).to(DEVICE)
    padding = torch.arange(19, device=DEVICE).expand(2, -1) >= 16
    found = []
    for name in ("reference", backend):
        for module, operation in (
            (layer.gate, topk_routing),
            (layer.gate, balance_sums),
            (layer.experts, expert_order),
        ):
            setattr(module, operation.name, here(operation).bind(name))
        inputs = [x.clone().requires_grad_(), *layer.parameters()]
        y, stats = layer(inputs[0], "layer", padding)
        slopes = torch.autograd.grad(y.square().sum() + stats.aux_loss_sum, inputs)
        found.append((stats.counts, [y.detach(), stats.aux_loss_sum.detach(), *slopes]))
    (counts, right), (own_counts, own) = found
    assert torch.equal(counts, own_counts)
    assert worst(own, [t.double() for t in right]) <= 1e-5  # float32 through the whole layer


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("rows", "tokens", "experts", "top_k"),
    [(3, 7, 6, 2), (2, 70, 45, 5), (1, 1, 8, 8), (2, 9, 300, 4), (2, 5, 1, 1)],
)
def test_sums_of_the_balance_loss_and_their_gradient_are_the_references(
    rows: int,
    tokens: int,
    experts: int,
    top_k: int,
    padded: bool,
    backend: str,
    kernels: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
):
    if backend == "triton":
        # so that there are several tiles of partial sums
        monkeypatch.setattr(module_of("balance"), "BLOCKS", 2)
    scores = draw(rows * tokens, experts)[0].sigmoid()
    padding = None
    if padded:
        padding = torch.arange(tokens, device=DEVICE).expand(rows, -1) >= tokens // 2
        padding = padding & (torch.arange(rows, device=DEVICE) > 0)[:, None]
    rest = (padding, rows, top_k)
    (sums, load), (right_sums, right_load) = (
        function(values, *rest)
        for function, values in ((kernels.balance_sums, scores), (add_up, scores.double()))
    )
    assert torch.equal(load.double(), right_load)
    assert worst([sums], [right_sums]) <= 1e-6  # sums of at most 70 shares in float32
    gradients = []
    slope = torch.randn(rows, experts, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    for function, values in ((kernels.balance_sums, scores), (add_up, scores.double())):
        leaf = values.clone().requires_grad_()
        (found,) = torch.autograd.grad(function(leaf, *rest)[0], leaf, slope.to(leaf.dtype))
        gradients.append(found)
    # differences of slopes that may cancel
    assert (gradients[0] - gradients[1]).abs().max() <= 2e-6 * slope.abs().max()


def test_a_row_of_padding_alone_has_no_sums(kernels: SimpleNamespace):
    scores = draw(12, 6)[0].sigmoid().requires_grad_()
    padding = torch.tensor([[False] * 6, [True] * 6], device=DEVICE)
    sums, load = kernels.balance_sums(scores, padding, 2, 2)
    sums.sum().backward()
    assert load[0].sum() == 12
    assert not load[1].any()
    assert not sums[1].any()
    assert scores.grad is not None
    assert not scores.grad[6:].any()


def copies_of(case: str) -> tuple[list[Tensor], int]:
    """Return weights, experts and tokens of copies and the experts' counts, and how many tokens."""
    g = torch.Generator().manual_seed(3)
    token: Tensor
    if case == "none":
        experts = token = torch.zeros(0, dtype=torch.int64)
        size, tokens = 4, 5
    elif case == "of one expert":
        experts, token, size, tokens = torch.full((700,), 3), torch.arange(700) // 2, 5, 350
    elif case == "of some tokens":  # as other ranks send them
        token = torch.randint(400, (391,), generator=g).sort().values
        experts, size, tokens = torch.randint(3, (391,), generator=g), 3, 413
    else:
        sizes = {"few": (1, 6, 2), "a block": (64, 7, 4), "many": (90, 45, 9)}
        tokens, size, top_k = sizes[case]
        experts = torch.rand(tokens, size, generator=g).topk(top_k).indices.flatten()
        token = torch.arange(tokens * top_k) // top_k
    weights = torch.rand(experts.shape[0], generator=g)
    counts = experts.bincount(minlength=size)
    return [t.to(DEVICE) for t in (weights, experts, token, counts)], tokens


CASES = ["none", "few", "a block", "many", "of one expert", "of some tokens"]


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("case", CASES)
def test_the_order_of_copies_is_that_of_a_stable_sort(
    case: str, multiple: int, kernels: SimpleNamespace
):
    inputs, tokens = copies_of(case)
    found = kernels.expert_order(*inputs, tokens, multiple)
    right = sort(*inputs, tokens, multiple)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    slope = torch.rand(right[0].shape, device=DEVICE)
    gradients = []
    for function in (kernels.expert_order, sort):
        weights = inputs[0].clone().requires_grad_()
        rows, *_ = function(weights, *inputs[1:], tokens, multiple)
        gradients += torch.autograd.grad(rows, weights, slope)
    assert torch.equal(*gradients)


def test_more_blocks_than_a_tile_are_added_up(triton: None, monkeypatch: pytest.MonkeyPatch):
    order = module_of("order")
    for name, value in {"BLOCK": 64, "PART": 32, "BLOCKS": 4, "EXPERTS": 32}.items():
        monkeypatch.setattr(order, name, value)
    inputs, tokens = copies_of("many")
    found = order.expert_order(*inputs, tokens, 1)
    assert all(torch.equal(a, b) for a, b in zip(found, sort(*inputs, tokens, 1), strict=True))


@pytest.mark.gpu
def test_the_host_does_not_wait_for_the_device(no_waits):
    logits, bias = draw(33, 45)
    logits.requires_grad_()
    token = torch.arange(33 * 5, device=DEVICE) // 5
    operations = topk_routing, expert_order, balance_sums
    route, line_up, add_up = (operation.bind("triton") for operation in operations)

    def step() -> None:
        routed = route(logits, bias, top_k=5)
        weights, *_ = line_up(
            routed.weights.flatten(), routed.experts.flatten(), token, routed.counts, 33
        )
        sums, _ = add_up(routed.scores, None, num_rows=3, top_k=5)
        (weights.square().sum() + sums.square().sum()).backward()

    step()  # compiles
    with no_waits():
        step()
