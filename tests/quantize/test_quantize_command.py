"""A really trained run, quantized, searched and distilled by the commands."""

import itertools
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file

from nemotron.cli import run
from nemotron.loading import load
from nemotron.precision.static import is_attached

# sizes that NVFP4's blocks of 16 divide
RUN = ["model.moe_latent_size=32", "evaluation.tokens=1024", "device=cpu"]
SHORT = ["schedule.total_steps=4", "schedule.warmup_steps=1", "schedule.decay_steps=1"]
QUICK = ["--rows", "4", "--no-check"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize")
    words = ["train", "tiny/smoke", f"output={folder}", "name=trained", *RUN]
    assert run([*words, *SHORT]) == 0
    return folder / "trained"


@pytest.fixture(scope="module")
def small(trained: Path) -> Path:
    out = trained.parent / "small"
    words = ["quantize", str(trained), "--preset", "super_nvfp4", "--out", str(out), "--rows", "4"]
    assert run(words) == 0
    return out


def report_of(folder: Path) -> dict:
    return json.loads((folder / "quantization.json").read_text())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.slow
def test_the_report_says_what_the_folder_holds_and_loses(
    trained: Path, small: Path, tmp_path: Path
):
    report, stored = report_of(small), tensors_of(small)
    experts = [name for name in report["formats"] if name.endswith("experts")]
    assert {report["formats"][name] for name in experts} == {"nvfp4"}
    assert {f for name, f in report["formats"].items() if name not in experts} == {"fp8"}
    packed = [name for name, tensor in stored.items() if tensor.dtype == torch.uint8]
    assert len(packed) == 2 * 8 * len(experts)
    assert f"{experts[0]}.3.up_proj.weight_scale_2" in stored
    assert [name for name in stored if name.endswith(("k_scale", "v_scale"))]
    bits = {"nvfp4": 4.5, "fp8": 8, "bf16": 16}
    total = sum(report["parameters"].values())
    mean = sum(bits[f] * n for f, n in report["parameters"].items()) / total
    assert report["bits_per_weight"]["model"] == pytest.approx(mean)
    assert report["calibration"]["tokens"] == 4 * 64
    # the folder, read again, computes as the model that the report is about, but what is not
    # quantized was rounded to bfloat16
    words = ["evaluate", str(small), "--recipe", str(trained), "--device", "cpu"]
    assert run([*words, "--out", str(tmp_path / "small.json")]) == 0
    found = json.loads((tmp_path / "small.json").read_text())["metrics"]
    held_out = report["held_out"]
    assert found["validation/loss"] == pytest.approx(held_out["all"]["loss"], rel=5e-5)
    assert held_out["all"]["loss"] != held_out["all"]["reference_loss"]
    assert 0 < held_out["all"]["kl"] < 0.05
    assert 0.5 < held_out["all"]["top1"] <= 1
    assert held_out["verse"]["tokens"] > 0
    model = load(small)
    assert is_attached(model.get_submodule(experts[0]))


@pytest.mark.slow
def test_the_same_scales_give_the_same_files_in_both_layouts(
    trained: Path, small: Path, tmp_path: Path
):
    words = ["quantize", str(trained), "--like", str(small), *QUICK]
    assert run([*words, "--out", str(tmp_path / "again")]) == 0
    stored, again = tensors_of(small), tensors_of(tmp_path / "again")
    assert stored.keys() == again.keys()
    assert all(torch.equal(again[k].view(-1), v.view(-1)) for k, v in stored.items())
    layout = ["--layout", "compressed-tensors"]
    assert run([*words, *layout, "--out", str(tmp_path / "other")]) == 0
    one, other = load(small), load(tmp_path / "other")
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(one(ids), other(ids))


@pytest.mark.slow
@pytest.mark.nightly
def test_an_exported_folder_is_quantized_as_its_run_is(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    export, rounded = tmp_path / "export", tmp_path / "rounded"
    assert run(["export", str(trained), "--out", str(export), "--no-check"]) == 0
    assert run(["import", str(export), "--out", str(rounded)]) == 0
    words = ["--preset", "nvfp4", "--inputs", "percentile", "--every-expert", "--rows", "4"]
    words += ["--recipe", str(trained)]
    assert run(["quantize", str(export), *words, "--out", str(tmp_path / "one")]) == 0
    words += ["--no-check"]
    assert run(["quantize", str(rounded), *words, "--out", str(tmp_path / "other")]) == 0
    one, other = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(torch.equal(other[k].view(-1), v.view(-1)) for k, v in one.items())
    found = report_of(tmp_path / "one")
    assert (found["calibration"]["inputs"], found["calibration"]["every_expert"]) == (
        "percentile",
        True,
    )
    assert found["held_out"]["all"]["error"] > 0
    # nothing is left of the run that was made for the time being
    assert {path.name for path in tmp_path.iterdir()} == {"export", "rounded", "one", "other"}
    for place, more, said in (
        (export, [], "brings no recipe"),
        (tmp_path / "one", ["--recipe", str(trained)], "is quantized already"),
    ):
        capsys.readouterr()
        asked = ["quantize", str(place), "--preset", "fp8", *more, "--out", str(tmp_path / "two")]
        assert run(asked) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "two").exists()


@pytest.mark.slow
@pytest.mark.nightly
def test_a_search_writes_its_curve_and_keeps_to_its_bits(trained: Path, tmp_path: Path):
    words = ["quantize", str(trained), *QUICK, "--score-rows", "2"]
    for score in ("fisher", "kl"):
        out = tmp_path / score
        assert run([*words, "--bits", "6", "--score", score, "--out", str(out)]) == 0
        report = report_of(out)
        assert 5 < report["search"]["chosen"]["bits"] <= 6
        assert report["bits_per_weight"]["linear_layers"] == pytest.approx(
            report["search"]["chosen"]["bits"]
        )
        assert {"nvfp4", "bf16"} < {*report["formats"].values(), "bf16", "fp8"}
        curve = report["search"]["curve"]
        assert curve[0]["bits"] == 4.5
        assert all(a["score"] > b["score"] for a, b in itertools.pairwise(curve))
        drawing = ElementTree.parse(out / "pareto.svg").getroot()
        assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
        assert f"{report['search']['chosen']['bits']:.4g} bits" in "".join(drawing.itertext())


@pytest.mark.slow
def test_a_student_learns_under_the_scales_that_it_is_written_with(
    trained: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    chats = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"Count from {n}."},
                      {"role": "assistant", "content": " ".join(map(str, range(n, n + 30)))}]}
        for n in range(200)
    ]  # fmt: skip
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "qad.yaml"
    recipe.write_text(f"""
extends: {Path("recipes/tiny/smoke.yaml").resolve()}
stage: distill
name: qad
output: {tmp_path}
device: cpu
init_from: {trained}
teacher: {trained}
quantization: {{like: {small}}}
model: {{moe_latent_size: 32}}
data: {{sources: [{{name: chats, path: {chats}}}], seq_len: 128,
       cache: {tmp_path}/cache,
       packing: {{kind: best_fit, long_documents: truncate}}}}
batch: {{global_tokens: 512, micro_batch: 2}}
schedule: {{peak: 1.0e-3, total_steps: 4, warmup_steps: 1, decay_steps: 1}}
loss: {{mtp_num_depths: 0}}
""")
    capsys.readouterr()
    assert run(["train", str(recipe), "--dry-run"]) == 0
    assert "matrices with fixed scales" in capsys.readouterr().out
    # the first step sees the teacher itself, rounded or not
    assert run(["train", str(recipe), "--stop-at", "1", "name=plain", "quantization=null"]) == 75
    assert run(["train", str(recipe)]) == 0
    first = {}
    for name in ("plain", "qad"):
        line = (tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]
        first[name] = json.loads(line)["loss/kl"]
    assert first["plain"] == pytest.approx(0, abs=1e-7)
    assert first["qad"] > 1e-5
    # as it was trained, so it is shipped
    words = ["quantize", str(tmp_path / "qad"), "--like", str(small), *QUICK]
    assert run([*words, "--recipe", str(trained), "--out", str(tmp_path / "shipped")]) == 0
    stored, before = tensors_of(tmp_path / "shipped"), tensors_of(small)
    same = [k for k in before if k.endswith(("_scale", "_scale_2"))]
    assert same
    assert all(torch.equal(stored[k].view(-1), before[k].view(-1)) for k in same)
    moved = [
        k for k, v in before.items() if v.dtype == torch.uint8 and not torch.equal(v, stored[k])
    ]
    assert moved
    for words, said in (
        ([f"quantization.like={trained}"], "is not a folder of a quantized model"),
        (["model.moe_latent_size=16", "init_from=null"], "init_from"),
        (["precision.compute=bf16", "precision.preset=fp8_current"], "precision.preset"),
    ):
        capsys.readouterr()
        assert run(["train", str(recipe), "--dry-run", "name=wrong", *words]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_wrong_input_is_one_sentence_and_writes_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine")
    run_, nvfp4 = str(trained), ["--preset", "nvfp4", "--rows", "1"]
    cases = [
        ([run_, "--out", str(out)], "give --preset NAME, --bits NUMBER or"),
        ([run_, "--out", str(out), "--preset", "int4"], "--preset = int4 is unknown"),
        ([run_, "--out", str(out), *nvfp4, "--bits", "5"], "or given twice"),
        ([run_, "--out", str(out), *nvfp4, "--weights", "min"], "--weights = min is unknown"),
        ([run_, "--out", str(out), *nvfp4, "--keep", "layer9"], "--keep = layer9 fits no linear"),
        ([run_, "--out", str(out), "--bits", "4", "--rows", "1"], "give at least 4.5"),
        ([run_, "--out", str(out), "--bits", "5", "--score", "magnitude"], "use one of fisher, kl"),
        ([run_, "--out", str(out), "--bits", "5", "--cost", "price"], "use one of weights, active"),
        ([run_, "--out", str(out), *nvfp4, "--inputs", "entropy"], "use one of max, percentile"),
        ([run_, "--out", str(out), "--like", str(foreign), "--every-expert"], "contradict --like"),
        ([run_, "--out", str(out), "--like", str(foreign)], "is not a folder of a quantized model"),
        ([run_, "--out", str(foreign), *nvfp4], "exists already"),
        ([run_, "--out", str(trained / "checkpoints" / "q"), *nvfp4], "inside the checkpoints"),
        ([str(foreign), "--out", str(out), *nvfp4], "foreign"),
        ([run_, "--out", str(out), *nvfp4, "data.validation_fraction=0"], "holds nothing out"),
    ]
    for words, said in cases:
        capsys.readouterr()
        assert run(["quantize", *words]) == 2, words
        [sentence] = capsys.readouterr().err.strip().splitlines()
        assert said in sentence, sentence
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign"]
    assert [path.name for path in foreign.iterdir()] == ["mine.txt"]
