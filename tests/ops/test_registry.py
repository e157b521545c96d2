import pytest
import torch

from nemotron.errors import UserError
from nemotron.ops.apply import ALL
from nemotron.ops.config import OpsConfig
from nemotron.ops.describe import AWARE_OF_DOCUMENTS, choose_backends, describe
from nemotron.ops.registry import Backend, Call, Operation
from nemotron.ops.token_step import OTHER_LAYERS

CPU = torch.device("cpu")


def narrow(width: int) -> str | None:
    return None if width < 5 else f"takes widths below 5, not {width}"


@pytest.fixture
def operation() -> Operation:
    return Operation(
        "toy",
        [
            Backend("quick", lambda: "quick", dtypes=frozenset({torch.float32}), limit=narrow),
            Backend(
                "absent",
                lambda: "absent",
                features=frozenset({"documents"}),
                packages=("surely_not_installed",),
                install="pip install surely",
            ),
            Backend("plain", lambda: "plain", features=frozenset({"documents", "state"})),
        ],
    )


def test_the_first_fit_backend_is_taken(operation: Operation):
    x = torch.zeros(1)
    assert operation.select(x)() == "quick"
    assert operation.select(x.double())() == "plain"


def test_a_backend_without_documents_is_never_used_for_them(operation: Operation):
    assert operation.select(torch.zeros(1), documents=True)() == "plain"
    assert operation.select(torch.zeros(1), documents=False)() == "quick"
    with pytest.raises(UserError, match=r"ops\.toy = quick does not honor documents"):
        operation.bind("quick").select(torch.zeros(1), documents=True)


def test_a_backend_is_used_for_sizes_that_it_takes(operation: Operation):
    assert operation.select(torch.zeros(1), sizes=(4,))() == "quick"
    assert operation.select(torch.zeros(1), sizes=(5,))() == "plain"
    with pytest.raises(UserError, match=r"ops\.toy = quick takes widths below 5, not 5"):
        operation.bind("quick").select(torch.zeros(1), sizes=(5,))


def test_a_call_of_unknown_sizes_is_not_refused(operation: Operation):
    assert operation.choose(Call("cpu", torch.float32)).name == "quick"


def test_asking_for_a_missing_package_is_an_error_that_names_the_cure(operation: Operation):
    with pytest.raises(UserError, match=r"surely_not_installed is not installed \(pip install su"):
        operation.bind("absent")
    assert operation.select(torch.zeros(1), documents=True)() == "plain"


def test_an_unknown_backend_is_answered_with_those_that_exist(operation: Operation):
    with pytest.raises(UserError, match="auto or one of quick, absent, plain"):
        operation.bind("fastest")


def test_binding_leaves_the_operation_itself_free(operation: Operation):
    bound = operation.bind("plain")
    assert bound.select(torch.zeros(1))() == "plain"
    assert operation.select(torch.zeros(1))() == "quick"
    assert bound.bind("auto").select(torch.zeros(1))() == "quick"


def test_every_operation_can_be_named_in_a_recipe():
    assert {operation.name for operation in ALL} == set(OpsConfig.model_fields)


@pytest.mark.parametrize("operation", ALL, ids=lambda operation: operation.name)
def test_the_last_backend_takes_every_call_of_training_and_decoding(operation: Operation):
    features = {
        "ssd": {"documents", "initial_state", "final_state"},
        "causal_conv1d": {"documents", "initial_state", "documents_after_a_state", "any_width"},
        "attention": {"documents", "cache", "lengths", "documents_after_a_prefix"},
        "token_step": OTHER_LAYERS,
    }
    needs = frozenset(features.get(operation.name, set()))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert operation.backends[-1].unfit(Call("cpu", dtype, needs)) is None
    assert operation.backends[-1].name == "reference"
    assert operation.backends[-1].limit is None


def test_the_start_of_a_run_names_what_is_missing():
    choices = choose_backends(OpsConfig(), CPU, torch.float32, documents=True)
    assert {choice.operation for choice in choices} == {operation.name for operation in ALL}
    # a CPU run need not hear of kernels for GPUs
    assert all("numba is not installed" in line for line in describe(choices)[1:])
    on_cpu = {choice.operation: choice for choice in choices}
    assert on_cpu["ssd"].backend == "chunked"
    passed_over = {other.backend: other for other in on_cpu["ssd"].passed_over}
    assert "not on cpu" in passed_over["mamba_ssm"].reason
    assert not passed_over["mamba_ssm"].runs_here
    on_gpu = choose_backends(OpsConfig(), torch.device("cuda"), torch.bfloat16, documents=True)
    missing = describe(on_gpu)[1:]
    chosen = {choice.operation: choice.backend for choice in on_gpu}
    assert chosen["attention"] == "flash_attn" or any(
        "attention: flash_attn is not used: package flash_attn" in line for line in missing
    )
    assert chosen["ssd"] == "triton" or any(
        "ssd: triton is not used: package triton is not installed" in line for line in missing
    )


def test_the_start_of_a_run_says_what_the_recipe_names():
    choices = choose_backends(OpsConfig(ssd="reference"), CPU, torch.float32, documents=True)
    (ssd,) = (choice for choice in choices if choice.operation == "ssd")
    assert ssd.backend == "reference"
    (chunked,) = (other for other in ssd.passed_over if other.backend == "chunked")
    assert (chunked.reason, chunked.runs_here) == ("the recipe names another one", True)
    assert "ssd: chunked is not used: the recipe names another one" in describe(choices)
    with pytest.raises(UserError, match=r"ops\.attention = varlen runs on cuda, not on cpu"):
        choose_backends(OpsConfig(attention="varlen"), CPU, torch.bfloat16, documents=True)


def test_a_package_that_is_installed_but_does_not_import_says_why(tmp_path, monkeypatch):
    (tmp_path / "halfway.py").write_text("import surely_not_installed")
    monkeypatch.syspath_prepend(tmp_path)
    backend = Backend("halfway", lambda: None, packages=("halfway",), imports=("halfway",))
    assert backend.missing() == (
        "halfway cannot be imported (No module named 'surely_not_installed')"
    )


def test_operations_that_mix_tokens_only_use_backends_that_know_documents():
    operations = {operation.name: operation for operation in ALL}
    cuda = torch.device("cuda")
    for choice in choose_backends(OpsConfig(), cuda, torch.bfloat16, documents=True):
        if choice.operation in AWARE_OF_DOCUMENTS:
            backend = operations[choice.operation].backend(choice.backend)
            assert "documents" in backend.features
