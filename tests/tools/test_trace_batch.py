"""The tool's account of a batch is compared with the sources themselves."""

import ast
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        import trace_batch

        return trace_batch


@pytest.fixture(scope="module")
def found(tool: ModuleType) -> Any:
    return tool.trace(
        ROOT / "recipes/tiny/smoke.yaml", ["data.seq_len=32", "batch.global_tokens=64"]
    )


def test_the_files_come_in_the_order_in_which_the_batch_meets_them(found: Any):
    names = [str(path.relative_to(ROOT / "nemotron")) for path in found.functions]
    expected = [
        "cli.py",
        "recipe/load.py",
        "data/loader.py",
        "train/trainer.py",
        "train/loss.py",
        "model/hybrid.py",
        "model/block.py",
        "model/mamba2.py",
        "ops/ssd/__init__.py",
        "ops/ssd/chunked.py",
    ]
    assert [name for name in names if name in expected] == expected


def test_nothing_outside_recipe_and_step_is_counted(found: Any):
    names = {str(path.relative_to(ROOT / "nemotron")) for path in found.functions}
    assert names.isdisjoint({"run/provenance.py", "checkpoint/write.py", "run/screen.py"})
    assert "TrainingData.__init__" not in found.functions[ROOT / "nemotron/data/loader.py"]


def test_each_function_begins_where_the_source_says(found: Any):
    for path, functions in found.functions.items():
        begins = {
            (node.name, min([node.lineno, *(d.lineno for d in node.decorator_list)]))
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef)
        }
        for name, line in functions.items():
            assert (name.rpartition(".")[2], line) in begins, f"{path}: {name}"


def test_a_file_of_one_layer_kind_is_left_out_of_the_others(found: Any):
    model = ROOT / "nemotron/model"
    for kind, own, other in (
        ("mamba", "mamba2.py", "attention.py"),
        ("attention", "attention.py", "moe.py"),
        ("moe", "moe.py", "mamba2.py"),
    ):
        files = found.files(kind)
        assert {model / own, model / "block.py", model / "hybrid.py"} <= set(files)
        assert model / other not in files
    assert found.files() == list(found.functions)


def test_products_are_counted_as_the_sources_make_them(found: Any):
    # ME*E: two projections in the one Mamba layer, four in the one attention layer of the trunk
    trunk = ("Trainer.update", "compute_sums", "HybridLM.forward", "Block.forward")
    for mixer, products in (("Mamba2", 2), ("Attention", 4)):
        start = (*trunk, f"{mixer}.forward", "Linear.forward")
        calls = [n for chain, n in found.chains.items() if chain[: len(start)] == start]
        assert sum(calls) == products  # the step is one micro-batch
    assert any("chunked" in chain for chain in found.chains)
    assert not any("backward" in name for chain in found.chains for name in chain)


def test_the_step_is_one_call_from_the_loop(found: Any, tool: ModuleType):
    assert found.step_calls == 1 <= tool.STEP_CALLS


def test_a_projection_is_no_further_from_the_step_than_the_target_says(
    found: Any, tool: ModuleType
):
    chains = [c for c in found.chains if c[2] == "HybridLM.forward" and "Linear.forward" in c]
    mixers = [c for c in chains if "MLP.forward" not in c]
    assert mixers
    # what the operation adds to reach its backend is not the model's
    assert all(chain.index("Linear.forward") < tool.PROJECTION_CALLS for chain in mixers)


def test_what_a_person_reads_is_met_and_within_its_targets(found: Any, tool: ModuleType):
    files = tool.read(found)
    assert len(files) == len(tool.READ) <= tool.READ_FILES
    assert sum(path.read_bytes().count(b"\n") for path in files) <= tool.READ_LINES


def test_no_more_files_run_than_the_target_says(found: Any, tool: ModuleType):
    assert len(found.functions) <= tool.RAN_FILES


def test_the_report_gives_totals_beside_the_targets(found: Any, tool: ModuleType):
    text = tool.report(found)
    lines = sum(path.read_bytes().count(b"\n") for path in found.functions)
    assert f"all{len(found.functions):>29}{lines:>8,}\n" in text
    assert f"ran{len(found.functions):>29}{tool.RAN_FILES:>8}{lines:>8,}\n" in text


def test_a_recipe_that_is_wrong_is_told_as_by_the_command(tool: ModuleType):
    with pytest.raises(SystemExit, match="the nearest known one is `peak`"):
        tool.trace(ROOT / "recipes/tiny/smoke.yaml", ["schedule.peek=1"])
