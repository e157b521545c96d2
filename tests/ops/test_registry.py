import pytest
import torch

from nemotron.errors import UserError
from nemotron.ops.config import OpsConfig
from nemotron.ops.describe import ALL, AWARE_OF_DOCUMENTS, choose_backends, describe
from nemotron.ops.registry import OPERATIONS, Backend, Call, Operation


@pytest.fixture
def operation():
    made = Operation(
        "toy",
        [
            Backend("quick", lambda: "quick", dtypes=frozenset({torch.float32})),
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
    yield made
    del OPERATIONS["toy"]


def test_the_first_fit_backend_is_taken(operation: Operation):
    x = torch.zeros(1)
    assert operation.select(x)() == "quick"
    assert operation.select(x.double())() == "plain"


def test_a_backend_without_documents_is_never_used_for_them(operation: Operation):
    assert operation.select(torch.zeros(1), documents=True)() == "plain"
    assert operation.select(torch.zeros(1), documents=False)() == "quick"
    operation.pin("quick")
    with pytest.raises(UserError, match=r"ops\.toy = quick does not honour documents"):
        operation.select(torch.zeros(1), documents=True)


def test_asking_for_a_missing_package_is_an_error_that_names_the_cure(operation: Operation):
    with pytest.raises(UserError, match=r"surely_not_installed is not installed \(pip install su"):
        operation.pin("absent")
    assert operation.select(torch.zeros(1), documents=True)() == "plain"


def test_an_unknown_backend_is_answered_with_those_that_exist(operation: Operation):
    with pytest.raises(UserError, match="auto or one of quick, absent, plain"):
        operation.pin("fastest")


def test_a_pin_is_lifted_by_auto(operation: Operation):
    operation.pin("plain")
    assert operation.select(torch.zeros(1))() == "plain"
    operation.pin("auto")
    assert operation.select(torch.zeros(1))() == "quick"


def test_every_operation_can_be_named_in_a_recipe():
    assert {operation.name for operation in ALL} == set(OpsConfig.model_fields)


@pytest.mark.parametrize("operation", ALL, ids=lambda operation: operation.name)
def test_the_last_backend_takes_every_call_of_training_and_decoding(operation: Operation):
    features = {
        "ssd": {"documents", "initial_state", "final_state"},
        "causal_conv1d": {"documents", "initial_state", "documents_after_a_state", "any_width"},
        "attention": {"documents", "cache", "start", "documents_after_a_prefix"},
        "grouped_linear": {"any_width"},
    }
    needs = frozenset(features.get(operation.name, set()))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert operation.backends[-1].unfit(Call("cpu", dtype, needs)) is None
    assert operation.backends[-1].name == "reference"


def test_the_start_of_a_run_names_what_is_missing():
    choices = choose_backends(torch.device("cpu"), torch.float32, documents=True)
    assert {choice.operation for choice in choices} == {operation.name for operation in ALL}
    # a CPU run need not hear of kernels for GPUs
    assert len(describe(choices, torch.device("cpu"))) == 1
    on_cpu = {choice.operation: choice for choice in choices}
    assert on_cpu["ssd"].backend == "chunked"
    assert "not on cpu" in on_cpu["ssd"].passed_over["mamba_ssm"]
    on_gpu = choose_backends(torch.device("cuda"), torch.bfloat16, documents=True)
    missing = describe(on_gpu, torch.device("cuda"))[1:]
    chosen = {choice.operation: choice.backend for choice in on_gpu}
    assert chosen["attention"] == "flash_attn" or any(
        "attention: flash_attn is not used: package flash_attn" in line for line in missing
    )
    assert chosen["ssd"] == "triton" or any(
        "ssd: triton is not used: package triton is not installed" in line for line in missing
    )


def test_a_package_that_is_installed_but_does_not_import_says_why(tmp_path, monkeypatch):
    (tmp_path / "halfway.py").write_text("import surely_not_installed")
    monkeypatch.syspath_prepend(tmp_path)
    backend = Backend("halfway", lambda: None, packages=("halfway",), imports=("halfway",))
    assert backend.missing() == (
        "halfway cannot be imported (No module named 'surely_not_installed')"
    )


def test_operations_that_mix_tokens_only_use_backends_that_know_documents():
    for choice in choose_backends(torch.device("cuda"), torch.bfloat16, documents=True):
        if choice.operation in AWARE_OF_DOCUMENTS:
            backend = OPERATIONS[choice.operation].backend(choice.backend)
            assert "documents" in backend.features
