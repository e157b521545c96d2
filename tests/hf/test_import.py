import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemotron.checkpoint.find import locate
from nemotron.checkpoint.read import read_model
from nemotron.errors import UserError
from nemotron.files import hash_file
from nemotron.hf import selfcheck
from nemotron.hf.export import export
from nemotron.hf.import_ import import_
from nemotron.hf.shards import INDEX
from nemotron.loading import load
from nemotron.outputs import MARK

SINGLE = "model.safetensors"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in folder.iterdir()}


def refusal(folder: Path, out: Path, **options: bool) -> str:
    before = sorted(os.listdir(out.parent))
    with pytest.raises(UserError) as caught:
        import_(folder, out, **options)
    assert sorted(os.listdir(out.parent)) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def single(exported: Path, tmp_path: Path) -> Path:
    """A copy of the exported folder with all weights in one file, to be changed."""
    folder = tmp_path / "single"
    shutil.copytree(exported, folder, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    shards = sorted(exported.glob("*.safetensors"))
    save_file({n: t for shard in shards for n, t in load_file(shard).items()}, folder / SINGLE)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def edit_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def test_importing_and_exporting_again_gives_the_same_files(exported: Path, tmp_path: Path):
    assert import_(exported, tmp_path / "run") == 0
    assert export(tmp_path / "run", tmp_path / "again", check=False, max_shard_bytes=50_000) == 0
    first, second = digests(exported), digests(tmp_path / "again")
    card = first.pop("README.md"), second.pop("README.md")
    assert card[0] != card[1]
    assert first.pop(MARK) != second.pop(MARK)  # it has the size of the card
    assert first == second
    assert len(first) > 8


def test_an_imported_run_is_a_checkpoint_with_tokenizer_and_origin(exported: Path, tmp_path: Path):
    assert import_(exported, tmp_path / "run") == 0
    assert locate(tmp_path / "run").info.step == 0
    config, weights = read_model(tmp_path / "run")
    assert config.hybrid_override_pattern == "MEM*E-M"
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    stacked = weights["backbone.layers.1.mixer.experts.up_proj"]
    disk = {n: t for shard in exported.glob("*.safetensors") for n, t in load_file(shard).items()}
    assert torch.equal(stacked[3], disk["backbone.layers.1.mixer.experts.3.up_proj.weight"].float())
    origin = json.loads((tmp_path / "run" / "provenance.json").read_text())["imported"]
    assert origin["from"] == exported.name
    assert origin["xxh128"] == {p.name: hash_file(p) for p in exported.glob("*.safetensors")}
    assert (tmp_path / "run" / "tokenizer.json").exists()


def test_a_single_file_without_index_is_read(single: Path, exported: Path, tmp_path: Path):
    assert import_(single, tmp_path / "run") == 0
    ours, theirs = load(tmp_path / "run").state_dict(), load(exported).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_transformers_saves_is_read(tmp_path: Path, make_run: Callable[..., Path]):
    transformers = pytest.importorskip("transformers")
    run = make_run(tmp_path / "run", num_nextn_predict_layers=0, mtp_hybrid_override_pattern=None)
    assert export(run, tmp_path / "ours", check=False) == 0
    model = transformers.NemotronHForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    model.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert "linear_attention" in config["layers_block_type"]
    assert config["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    shutil.copy(tmp_path / "ours" / "tokenizer.json", tmp_path / "theirs")
    assert import_(tmp_path / "theirs", tmp_path / "again") == 0
    ours, theirs = load(tmp_path / "ours").state_dict(), load(tmp_path / "again").state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_missing_multi_token_prediction_is_named_with_the_way_out(exported: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model = transformers.NemotronHForCausalLM.from_pretrained(exported, dtype="auto")
    model.save_pretrained(tmp_path / "theirs")
    shutil.copy(exported / "tokenizer.json", tmp_path / "theirs")
    message = refusal(tmp_path / "theirs", tmp_path / "run")
    for words in ("multi-token prediction are missing", "transformers drops them", "set num_nextn"):
        assert words in message
    edit_config(tmp_path / "theirs", num_nextn_predict_layers=0)
    assert import_(tmp_path / "theirs", tmp_path / "run") == 0


def test_float32_and_float16_weights_are_read_exactly(single: Path, tmp_path: Path):
    name, other = "backbone.layers.0.mixer.A_log", "backbone.layers.0.mixer.D"
    value = torch.linspace(0.1, 2.3, 6)
    edit(single, lambda tensors: tensors.update({name: value, other: value.half()}))
    weights = load(single).state_dict()
    assert torch.equal(weights[name], value)
    assert torch.equal(weights[other], value.half().float())


def test_missing_tensors_are_listed_up_to_ten(single: Path, tmp_path: Path):
    experts = [f"backbone.layers.1.mixer.experts.{e}" for e in range(5)]
    names = [f"{e}.{p}_proj.weight" for p in ("up", "down") for e in experts]
    names += ["lm_head.weight", "backbone.norm_f.weight"]
    edit(single, lambda tensors: [tensors.pop(name) for name in names])
    message = refusal(single, tmp_path / "run")
    assert "12 tensors are missing" in message
    assert sum(name in message for name in names) == 10


def test_tensors_that_the_model_has_no_place_for_are_listed(single: Path, tmp_path: Path):
    extra = {"backbone.layers.9.norm.weight": torch.ones(20), "mtp.layers.2.x": torch.ones(1)}
    edit(single, lambda tensors: tensors.update(extra))
    message = refusal(single, tmp_path / "run")
    assert "1 tensors are not in the model: backbone.layers.9.norm.weight" in message
    assert "1 tensors of multi-token prediction are not in the model (mtp.layers.2.x" in message


def test_a_renamed_prefix_drops_nothing_in_silence(single: Path, tmp_path: Path):
    def rename(tensors: dict[str, Tensor]) -> None:
        tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")

    edit(single, rename)
    message = refusal(single, tmp_path / "run")
    assert "missing: backbone.embeddings.weight" in message
    assert "not in the model: backbone.embedding.weight" in message


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(7), "backbone.norm_f.weight has shape [7] instead of [20]"),
        (torch.ones(20, dtype=torch.int64), "backbone.norm_f.weight is I64 instead of BF16"),
    ],
)
def test_a_wrong_shape_or_dtype_is_named(single: Path, tmp_path: Path, value: Tensor, words: str):
    edit(single, lambda tensors: tensors.update({"backbone.norm_f.weight": value}))
    assert words in refusal(single, tmp_path / "run")


def test_a_config_of_other_dimensions_is_refused(single: Path, tmp_path: Path):
    edit_config(single, ssm_state_size=6)
    message = refusal(single, tmp_path / "run")
    assert "backbone.layers.0.mixer.in_proj.weight has shape" in message


def test_a_config_of_far_more_tensors_than_there_are_is_refused_before_they_are_listed(
    single: Path, tmp_path: Path
):
    edit_config(single, n_routed_experts=2**31 - 1)
    text = refusal(single, tmp_path / "out")
    assert re.search(r"config\.json describes [\d,]{13,} tensors, but there are [\d,]{2,5};", text)


@pytest.mark.parametrize("kind", ["NVFP4", "FP8"])
def test_packed_checkpoints_are_recognized_by_their_scales(single: Path, tmp_path: Path, kind: str):
    name = "backbone.layers.1.mixer.experts.0.up_proj.weight"
    rows, columns = 9, 11
    if kind == "NVFP4":
        packed = {
            name: torch.zeros(rows, (columns + 1) // 2, dtype=torch.uint8),
            f"{name}_scale": torch.zeros(rows, 1, dtype=torch.float8_e4m3fn),
            f"{name}_scale_2": torch.ones(()),
        }
    else:
        packed = {
            name: torch.zeros(rows, columns, dtype=torch.float8_e4m3fn),
            f"{name}_scale": torch.ones(()),
        }
    edit(single, lambda tensors: tensors.update(packed))
    message = refusal(single, tmp_path / "run")
    assert "is a packed" in message
    assert "use the bfloat16 checkpoint" in message
    assert kind in message


def test_remote_code_is_ignored_and_said(
    single: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (single / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit_config(single, auto_map={"AutoModelForCausalLM": "evil.Model"})
    tokenizer = json.loads((single / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (single / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert import_(single, tmp_path / "run") == 0
    assert not (tmp_path / "ran").exists()
    output = capsys.readouterr().out
    assert "auto_map names remote code, which was ignored" in output
    assert "auto_map in tokenizer_config.json names remote code, which was left out" in output
    assert export(tmp_path / "run", tmp_path / "out", check=False) == 0
    written = [p for p in (tmp_path / "out").glob("*.json") if b"evil." in p.read_bytes()]
    assert not written


def test_chat_template_and_generation_settings_travel_along(single: Path, tmp_path: Path):
    generation = {"eos_token_id": [2, 11], "temperature": 0.6}
    (single / "generation_config.json").write_text(json.dumps(generation))
    (single / "chat_template.jinja").write_text("{{ messages }}")
    assert import_(single, tmp_path / "run") == 0
    assert export(tmp_path / "run", tmp_path / "out", check=False) == 0
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == generation
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.slow
def test_a_flipped_bit_is_found_by_the_hashes_of_our_own_export(run: Path, tmp_path: Path):
    assert export(run, tmp_path / "out", check=False) == 0
    assert selfcheck.main(tmp_path / "out", run) == 0  # writes the hashes
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    message = refusal(tmp_path / "out", tmp_path / "run")
    assert f"{shard}: is not what was exported" in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", None, "config.json: does not exist"),
        ("config.json", "{", "config.json: is not valid JSON"),
        ("config.json", "[]", "config.json: is not a JSON object"),
        ("tokenizer.json", None, "tokenizer.json: does not exist"),
        ("tokenizer.json", "{}", "tokenizer.json: is not a tokenizer.json"),
        ("generation_config.json", "{", "generation_config.json: is not valid JSON"),
        (SINGLE, "<html>", "HTML"),
        (SINGLE, None, "holds neither"),
    ],
)
def test_a_broken_file_is_named(
    single: Path, tmp_path: Path, name: str, content: str | None, words: str
):
    (single / name).unlink()
    if content is not None:
        (single / name).write_text(content)
    assert words in refusal(single, tmp_path / "run")


def test_a_tokenizer_of_another_model_is_refused(exported: Path, single: Path, tmp_path: Path):
    edit(single, lambda tensors: tensors.update(
        {n: tensors[n][:400].clone() for n in ("lm_head.weight", "backbone.embeddings.weight")}
    ))  # fmt: skip
    edit_config(single, vocab_size=400)
    assert "has 4096 tokens, vocab_size is 400" in refusal(single, tmp_path / "run")


def test_a_run_is_replaced_only_when_told_and_only_if_it_was_imported(
    single: Path, run: Path, tmp_path: Path
):
    out = tmp_path / "out"
    assert import_(single, out) == 0
    assert "add --overwrite" in refusal(single, out)
    assert import_(single, out, overwrite=True) == 0
    assert "not replaced" in refusal(single, run, overwrite=True)
    (out / "metrics.jsonl").write_text("trained since")
    assert f"{out / 'metrics.jsonl'}: is not of nemotron import" in refusal(
        single, out, overwrite=True
    )
    assert f"{single}: is an input and lies in {tmp_path}" in refusal(
        single, tmp_path, overwrite=True
    )


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "tokenizer.json", "config.json", SINGLE, "generation_config.json"],
)
def test_no_file_outside_the_folder_is_read(single: Path, tmp_path: Path, name: str):
    (tmp_path / "secret").write_text("PRIVATE KEY")
    (single / name).unlink(missing_ok=True)
    (single / name).symlink_to(tmp_path / "secret")
    assert f"{single / name}: is a link that leads out" in refusal(single, tmp_path / "run")
    (single / name).unlink()
    (single / name).symlink_to("/dev/zero")
    assert str(single / name) in refusal(single, tmp_path / "run")
    (single / name).unlink()
    os.mkfifo(single / name)  # a reader would wait for somebody to write
    message = refusal(single, tmp_path / "run")
    assert "not a regular file" in message or f"{name}: does not exist" in message


def test_a_file_too_large_for_its_kind_is_refused(single: Path, tmp_path: Path):
    with open(single / "chat_template.jinja", "wb") as file:
        file.truncate(1 << 40)
    assert "a file of this kind has at most" in refusal(single, tmp_path / "run")


def test_the_links_of_a_hub_cache_are_followed(single: Path, tmp_path: Path):
    snapshot = tmp_path / "hub" / "snapshots" / "0a1b"
    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(single.iterdir()):
        shutil.copy(path, tmp_path / "hub" / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert import_(snapshot, tmp_path / "run") == 0


def test_a_tied_head_may_be_absent_but_not_different(single: Path, tmp_path: Path):
    edit_config(single, tie_word_embeddings=True)
    assert "lm_head.weight differs" in refusal(single, tmp_path / "run")
    edit(single, lambda tensors: tensors.pop("lm_head.weight"))
    assert import_(single, tmp_path / "run") == 0
    model = load(tmp_path / "run")
    assert model.lm_head.weight is model.backbone.embeddings.weight


def test_each_parameter_keeps_the_format_that_it_was_imported_with(
    single: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    def widen(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("gate.weight"):  # of a router
                tensors[name] = tensors[name].float() * 1.001

    edit(single, widen)
    wanted = load_file(single / SINGLE)
    assert import_(single, tmp_path / "run") == 0
    assert export(tmp_path / "run", tmp_path / "again", check=False) == 0
    [path] = (tmp_path / "again").glob("*.safetensors")
    found = load_file(path)
    assert {name: t.dtype for name, t in found.items()} == {n: t.dtype for n, t in wanted.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    capsys.readouterr()
    assert selfcheck.main(tmp_path / "again", tmp_path / "run") == 0
    assert "every bit is the checkpoint's" in capsys.readouterr().out
    assert json.loads((tmp_path / "again/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_float32_folder_stays_float32(single: Path, tmp_path: Path):
    edit(single, lambda tensors: tensors.update({n: t.float() for n, t in tensors.items()}))
    assert import_(single, tmp_path / "run") == 0
    assert export(tmp_path / "run", tmp_path / "again", check=False) == 0
    [path] = (tmp_path / "again").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}
    assert json.loads((tmp_path / "again/config.json").read_text())["torch_dtype"] == "float32"


def test_a_folder_packed_by_mlx_is_called_packed(single: Path, tmp_path: Path):
    def pack(tensors: dict[str, Tensor]) -> None:
        name = "backbone.layers.0.mixer.in_proj"
        shape = tensors[f"{name}.weight"].shape
        tensors[f"{name}.weight"] = torch.zeros(shape[0], 4, dtype=torch.uint32)
        tensors |= {f"{name}.{part}": torch.ones(shape[0], 1) for part in ("scales", "biases")}

    edit(single, pack)
    assert "is a packed MLX checkpoint" in refusal(single, tmp_path / "run")
