import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemotron import cli
from nemotron.checkpoint.find import locate
from nemotron.checkpoint.manifest import FORMAT
from nemotron.checkpoint.read import read_model
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.files import hash_file
from nemotron.generate.engine import Engine
from nemotron.generate.sampling import Sampling
from nemotron.hf import selfcheck
from nemotron.hf.export import export
from nemotron.hf.formats import MAMBA_FP32
from nemotron.hf.model_card import model_card
from nemotron.hf.shards import INDEX
from nemotron.hf.source import open_checkpoint
from nemotron.loading import load
from nemotron.run.metrics import read_metrics
from tests.support import forked
from tests.support.cases import mostly_nightly
from tests.support.embedded import fill_cache
from tests.support.old_checkpoint import seal

WIDE = "e_score_correction_bias"


def read_all(folder: Path) -> dict[str, Tensor]:
    shards = sorted(folder.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def refusal(*arguments: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        export(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def checked(run: Path) -> Path:
    """The export that the user gets by default, with the check in a fresh process."""
    assert export(run) == 0
    return run / "export"


@pytest.mark.slow
def test_an_export_ends_with_a_check_whose_report_lies_beside_it(checked: Path):
    report = json.loads((checked / "export_report.json").read_text())
    assert {check["check"]: check["outcome"] for check in report["checks"]} == {
        "names, shapes, dtypes": "ok",
        "values on disk": "ok",
        "nemotron.load": "ok",
        "tokenizer": "ok",
        "transformers": "ok",
    }
    assert list(report["xxh128"]) == ["model-00001-of-00001.safetensors"]
    assert hash_file(checked / "model-00001-of-00001.safetensors") in report["xxh128"].values()


@pytest.mark.slow
def test_every_file_of_a_released_folder_is_there(checked: Path):
    names = {path.name for path in checked.iterdir()}
    assert names == {
        ".nemotron.json",
        "README.md", "config.json", "export_report.json", "generation_config.json",
        "model-00001-of-00001.safetensors", "model.safetensors.index.json",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert not [name for name in os.listdir(checked.parent) if name.startswith(".export")]
    assert {(path.stat().st_mode & 0o777) for path in checked.iterdir()} == {0o644}


def test_tensors_are_the_checkpoint_rounded_to_bfloat16(run: Path, exported: Path):
    _, weights = read_model(run)
    disk = read_all(exported)
    for name, tensor in weights.items():
        if name.endswith(("experts.up_proj", "experts.down_proj")):
            layer, projection = name.rsplit(".", 1)
            parts = [disk.pop(f"{layer}.{e}.{projection}.weight") for e in range(len(tensor))]
            assert torch.equal(torch.stack(parts), tensor.bfloat16()), name
        else:
            expected = tensor if name.endswith(WIDE) else tensor.bfloat16()
            assert disk[name].dtype == expected.dtype, name
            assert torch.equal(disk.pop(name), expected), name
    assert not disk


def test_the_index_holds_sizes_and_places(exported: Path):
    index = json.loads((exported / INDEX).read_text())
    shards = sorted(exported.glob("*.safetensors"))
    assert len(shards) > 3
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in read_all(exported).values()
    )
    for shard in shards:
        assert re.fullmatch(rf"model-\d{{5}}-of-{len(shards):05}\.safetensors", shard.name)
        content = load_file(shard)
        assert {index["weight_map"][name] for name in content} == {shard.name}
        assert sum(t.nbytes for t in content.values()) <= 50_000 or len(content) == 1


def test_the_mamba_vectors_can_stay_float32(run: Path, tmp_path: Path):
    assert export(run, tmp_path / "wide", formats=MAMBA_FP32, check=False) == 0
    wide = {
        n.rsplit(".", 1)[-1]
        for n, t in read_all(tmp_path / "wide").items()
        if t.dtype.itemsize == 4
    }
    assert wide == {WIDE, "A_log", "D", "dt_bias"}
    assert selfcheck.main(tmp_path / "wide", run) == 0


def test_transformers_loads_every_tensor_bit_for_bit(exported: Path):
    transformers = pytest.importorskip("transformers")
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        exported, dtype="auto", output_loading_info=True
    )
    assert not any(found.values()), found
    disk, dtypes = read_all(exported), set()
    for name, tensor in model.state_dict().items():
        name = re.sub(r"^model\.", "backbone.", name)
        if name.endswith(("experts.up_proj", "experts.down_proj")):
            layer, projection = name.rsplit(".", 1)
            parts = [disk.pop(f"{layer}.{e}.{projection}.weight") for e in range(len(tensor))]
            assert torch.equal(torch.stack(parts), tensor), name
        else:
            assert torch.equal(disk.pop(name), tensor), name
            dtypes.add((name.rsplit(".", 1)[-1], tensor.dtype))
    assert all(name.startswith("mtp.") for name in disk)
    assert {leaf for leaf, dtype in dtypes if dtype == torch.float32} == {WIDE}
    assert ("dt_bias", torch.bfloat16) in dtypes


@pytest.mark.slow
def test_transformers_writes_the_same_tokens_from_an_export(exported: Path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    theirs.set_experts_implementation("eager")  # the fast one refuses odd widths
    for module in theirs.modules():
        if hasattr(module, "time_step_limit"):  # its floor is not in the configuration
            module.time_step_limit = (0.0, math.inf)
    ours = load(exported)
    ours.compute_dtype = torch.float32
    generator = torch.Generator().manual_seed(3)
    prompts = [
        torch.randint(3, ours.config.vocab_size, (n,), generator=generator).tolist()
        for n in (5, 17, 40)
    ]
    ids = torch.tensor([[0] * (40 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (40 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=64, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    assert Engine(ours).generate(prompts, 64, Sampling(0.0)) == found[:, 40:].tolist()


def test_transformers_loads_the_tokenizer(run: Path, exported: Path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    ours = Tokenizer((run / "tokenizer.json").read_bytes())
    text = "def f(x):\n    return x ** 2  # naïve Δ\n"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    assert theirs.decode(ours.encode(text)) == text
    generation = transformers.GenerationConfig.from_pretrained(exported)
    assert (generation.eos_token_id, generation.temperature, generation.do_sample) == (2, 1.0, True)


def test_the_model_card_says_where_the_model_comes_from(exported: Path):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for words in (
        "# hybrid", "`MEM*E-M`", "| tokens seen | 123,456 |", "| 777 tokens, hash `abc` |",
        "recipe (sha256)", "(0.0, math.inf)", "# license: name one",
    ):  # fmt: skip
        assert words in card


def test_the_model_card_shows_names_of_others_as_text(run: Path, tmp_path: Path):
    hostile = "<img src=x onerror=alert(1)>![a](b)`|\n# c"
    copy = tmp_path / "<b>run<!--"
    shutil.copytree(run, copy)
    facts = {"id": hostile, "starts": [{"time": hostile, "code": {hostile: 1}, "versions": 3}]}
    (copy / "provenance.json").write_text(json.dumps(facts))
    card = model_card(open_checkpoint(copy), [])
    assert "<" not in card
    assert r"&lt;img src=x onerror=alert(1)&gt;\!\[a\](b)\`\|\\n# c" in card


def change(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict], None]:
    return lambda tensors: tensors.__setitem__(name, value(tensors[name]))


FLAWS: dict[str, tuple[Callable[[dict], None], set[str]]] = {
    "a changed value": (
        change("backbone.layers.0.mixer.D", lambda t: t + 1),
        {"values on disk", "nemotron.load"},
    ),
    "a changed MTP weight": (
        change("mtp.layers.0.eh_proj.weight", lambda t: t.roll(20, 1)),
        {"values on disk", "nemotron.load"},
    ),
    "a wider dtype": (
        change("backbone.norm_f.weight", Tensor.float),
        {"names, shapes, dtypes", "values on disk"},
    ),
    "a bias in bfloat16": (
        change("backbone.layers.1.mixer.gate.e_score_correction_bias", Tensor.bfloat16),
        {"names, shapes, dtypes", "values on disk"},  # it moves no token here
    ),
    "a tensor that nobody asked for": (
        lambda tensors: tensors.__setitem__("rotary.inv_freq", torch.ones(3).bfloat16()),
        {"names, shapes, dtypes", "nemotron.load", "transformers"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("flaw", list(FLAWS))
def test_the_check_finds(
    run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flaw: str
):
    tensors = read_all(exported)
    damage, failing = FLAWS[flaw]
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(exported / name, tmp_path)
    index = json.loads((exported / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(tensors, "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert selfcheck.main(tmp_path, run) == 1
    lines = capsys.readouterr().out.splitlines()
    assert {line[2:24].strip() for line in lines if " FAILED " in line} == failing


def test_a_failed_check_leaves_the_old_export_alone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    out = tmp_path / "out"
    assert export(run, out, check=False) == 0
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    monkeypatch.setattr("nemotron.hf.export.run_selfcheck", lambda *_: False)
    assert export(run, out, overwrite=True) == 1
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["out", "out.failed"]
    assert "out.failed" in capsys.readouterr().out


def test_an_export_replaces_another_only_when_told(run: Path, tmp_path: Path):
    out = tmp_path / "exported/mine"  # its parent does not exist yet
    assert export(run, out, check=False) == 0
    assert f"{out}: exists already; add --overwrite" in refusal(run, out)
    card = (out / "README.md").read_text()
    assert export(run, out, overwrite=True, check=False) == 0
    (out / "model.gguf").write_text("made of it")
    assert f"{out / 'model.gguf'}: is not of nemotron export" in refusal(run, out, overwrite=True)
    (out / "model.gguf").unlink()
    (out / "README.md").write_text(f"{card} and my own words")
    assert "README.md: was changed since" in refusal(run, out, overwrite=True)
    assert "my own words" in (out / "README.md").read_text()
    assert os.listdir(out.parent) == ["mine"]


@pytest.mark.parametrize("name", [".out.partial", "out.failed"])
def test_what_has_the_name_of_unfinished_output_is_not_removed(run: Path, tmp_path: Path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("")
    message = refusal(run, tmp_path / "out", check=False)
    assert str(tmp_path / name) in message
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == [
        name,
        f"{name}/thesis.tex",
    ]


def test_a_link_is_not_followed_and_the_old_name_of_a_replaced_folder_is_free(
    run: Path, tmp_path: Path
):
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "mine").write_text("")
    (tmp_path / "away").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "away")
    assert "is a link" in refusal(run, tmp_path / "out", overwrite=True)
    (tmp_path / "out").unlink()
    for _ in range(2):
        assert export(run, tmp_path / "out", overwrite=True, check=False) == 0
    assert (tmp_path / ".out.old" / "mine").exists()
    assert sorted(os.listdir(tmp_path)) == [".out.old", "away", "out"]


@pytest.mark.slow
def test_a_full_disk_ends_an_export_and_an_import_with_a_sentence(run: Path, tmp_path: Path):
    for arguments in (["export", str(run)], ["import", str(tmp_path / "whole")]):
        if arguments[0] == "import":
            assert export(run, tmp_path / "whole", check=False) == 0
        program = (
            "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); "
            "from nemotron.cli import main; main(sys.argv[1:])"
        )
        words = [*arguments, "--out", tmp_path / "out"]
        done = forked.script(program, *words, output=tmp_path / "said.txt")
        assert done.wait() == 1, done.text
        assert "File too large" in done.text
        assert "Traceback" not in done.text
        assert not [name for name in os.listdir(tmp_path) if "out" in name]


def test_a_folder_that_is_no_export_is_never_replaced(run: Path, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("")
    assert "not replaced" in refusal(run, tmp_path, overwrite=True)
    assert "is a file" in refusal(run, tmp_path / "thesis.tex", overwrite=True)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize(
    "inside", ["checkpoints", "checkpoints/new", "checkpoints/step-00000010/x"]
)
def test_checkpoints_are_no_place_for_an_export(run: Path, inside: str):
    before = sorted(run.rglob("*"))
    assert "inside the checkpoints folder" in refusal(run, run / inside, overwrite=True)
    assert sorted(run.rglob("*")) == before


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path):
    assert "no complete checkpoint" in refusal(tmp_path, tmp_path / "out")


def test_a_forged_configuration_takes_no_memory(run: Path, tmp_path: Path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    [config] = copy.glob("checkpoints/*/model.json")
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 2**31 - 2})
    )
    seal(config.parent, locate(run).info.step, FORMAT)
    assert "q_proj.weight has shape" in refusal(copy, tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]


def test_a_missing_tokenizer_is_named_and_nothing_is_left(run: Path, tmp_path: Path):
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "checkpoints").symlink_to(run / "checkpoints")
    assert "tokenizer.json: does not exist" in refusal(copy, tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]


def test_rounding_is_said(run: Path, exported: Path, capsys: pytest.CaptureFixture):
    rounded = sum(
        int((tensor != tensor.bfloat16()).sum())
        for name, tensor in read_model(run)[1].items()
        if not name.endswith(WIDE)
    )
    check = selfcheck.SelfCheck(exported, open_checkpoint(run))
    assert f"{rounded:,} to BF16 were rounded" in check.check_values()


def test_groups_that_readers_score_in_another_way_are_not_exported(tmp_path: Path, make_run):
    groups = {"n_routed_experts": 6, "n_group": 3, "topk_group": 1, "num_experts_per_tok": 1}
    grouped = make_run(tmp_path / "run", **groups)
    assert "model.n_group = 3 is computed in another way" in refusal(grouped, tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]


def test_a_clamped_time_step_survives_export_and_check(tmp_path: Path, make_run):
    clamped = make_run(tmp_path / "clamped", time_step_limit=(0.02, math.inf))
    assert export(clamped, tmp_path / "out", check=False) == 0
    assert load(tmp_path / "out").config.time_step_limit == (0.02, math.inf)
    assert selfcheck.main(tmp_path / "out", clamped) == 0


def test_a_tied_head_is_written_and_read_back_tied(tmp_path: Path, make_run):
    tied = make_run(tmp_path / "tied", tie_word_embeddings=True)
    assert export(tied, tmp_path / "out", check=False) == 0
    disk = read_all(tmp_path / "out")
    assert torch.equal(disk["lm_head.weight"], disk["backbone.embeddings.weight"])
    model = load(tmp_path / "out")
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert selfcheck.main(tmp_path / "out", tied) == 0


DENSE = {"hidden_size": 48, "hybrid_override_pattern": "M-*-", "mamba_num_heads": 4,
         "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64,
         "vocab_size": 4096}  # fmt: skip
TRAINED = {
    "tied": ["tiny/smoke", "model.tie_word_embeddings=true"],
    "grouped": ["tiny/smoke", "model.n_group=4", "model.topk_group=1"],
    "dense": ["dense.yaml", "data.seq_len=64", "batch.global_tokens=256", "batch.micro_batch=2",
              "schedule.peak=3e-3", "schedule.total_steps=6", "schedule.kind=constant"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", mostly_nightly(TRAINED, "tied"))
def test_a_model_that_was_trained_resumes_generates_exports_and_begins_another_run(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    fill_cache(Path("runs/.cache"))
    Path("dense.yaml").write_text(json.dumps({"name": "dense", "model": DENSE}))
    recipe = [*TRAINED[kind], "device=cpu", "output=runs"]
    assert cli.run(["train", *recipe, "name=mine", "--stop-at", "3"]) == 75
    assert cli.run(["train", *recipe, "name=mine", "--resume"]) == 0
    if kind == "tied":
        _, weights = read_model(tmp_path / "runs/mine")
        assert weights["lm_head.weight"] is weights["backbone.embeddings.weight"]
    assert cli.run(["export", "runs/mine", "--out", "out", "--no-check"]) == 0
    assert selfcheck.main(tmp_path / "out", tmp_path / "runs/mine") == 0
    texts = []
    for model in ("runs/mine", "out"):
        capsys.readouterr()
        arguments = ["--prompt", "def read(", "--max-new-tokens", "5", "--temperature", "0"]
        assert cli.run(["generate", model, *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert all(text.startswith("def read(") and len(text) > 12 for text in texts)
    assert cli.run(["train", *recipe, "name=more", "init_from=runs/mine"]) == 0
    records = [read_metrics(Path(f"runs/{name}/metrics.jsonl")) for name in ("mine", "more")]
    first, second = ([r["loss/main"] for r in some if r["kind"] == "train"] for some in records)
    assert second[0] < first[0] - 0.5  # it goes on from what was learned
