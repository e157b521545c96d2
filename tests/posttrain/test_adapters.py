"""Adapters: what they compute, what of them is saved, and what PEFT makes of that."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from nemotron.checkpoint.find import newest
from nemotron.checkpoint.read import SavedTensors, read_model
from nemotron.cli import run
from nemotron.hf import selfcheck
from nemotron.loading import load
from nemotron.model.adapter import merge_all
from nemotron.model.build import build_around
from nemotron.train.config import AdapterConfig, TuneConfig
from nemotron.train.tuning import apply_tuning, role_of, trained_shares
from tests.support.cases import mostly_nightly
from tests.support.fine_tuning import Workplace
from tests.support.models import build, tokens
from tests.support.rewritten import rewrite
from tests.support.same_run import assert_same_run

KINDS = ["lora", "dora"]
NOWHERE = "model.backbone.nowhere.adapter"
RATE = {"peak": 3e-2, "total_steps": 3}


def adapter(kind: str = "lora", **more) -> dict:
    return {"adapter": {"kind": kind, "rank": 3, "alpha": 6, **more}}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_model_computes_what_the_merged_one_does(kind: str) -> None:
    model = build(seed=2)
    apply_tuning(model, TuneConfig.model_validate(adapter(kind)))
    model.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("scaling"):
                tensor.fill_(2.0)
            elif "adapter." in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator).abs() * 0.3)
    plain = build_around(model.config, merge_all(model.state_dict()))
    plain.compute_dtype = model.compute_dtype
    ids = tokens(2, 11)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), plain(ids), rtol=1e-9, atol=1e-9)
        changed = build(seed=2)
        assert (changed(ids) - plain(ids)).abs().max() > 1e-2
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "adapter." in n}


@pytest.mark.parametrize("kind", mostly_nightly(KINDS, "lora"))
def test_only_adapters_are_trained_from_where_they_change_nothing(
    workplace: Workplace, kind: str
) -> None:
    folder = workplace.train(f"only-{kind}", tune=adapter(kind), schedule=RATE)
    plain = workplace.train(f"full-{kind}", "--stop-at", "1")
    losses = [
        re.findall(r'"loss/main": ([\d.]+)', (f / "metrics.jsonl").read_text())
        for f in (folder, plain)
    ]
    assert float(losses[0][0]) == pytest.approx(float(losses[1][0]), abs=1e-5)
    assert float(losses[0][2]) < float(losses[0][0]) - 0.01
    info = newest(folder / "checkpoints").info
    assert info is not None
    saved = SavedTensors(info)
    tensors = saved.empty("model.")
    saved.load(tensors)
    for name, tensor in read_model(workplace.runs / "base")[1].items():
        assert torch.equal(tensors[f"model.{name}"], tensor), name
    moments = {n for n in saved.index.tensors if n.startswith("optimizer.exp_avg.")}
    assert moments
    assert all("adapter." in name for name in moments)


@pytest.mark.parametrize("kind", mostly_nightly(KINDS, "dora"))
def test_a_stopped_run_goes_on_to_the_same_bits(workplace: Workplace, kind: str) -> None:
    whole = workplace.train(f"whole-{kind}", tune=adapter(kind), schedule=RATE)
    parts = workplace.train(f"parts-{kind}", "--stop-at", "2", tune=adapter(kind), schedule=RATE)
    assert run(["train", str(parts / "recipe.yaml"), "--resume"]) == 0
    assert_same_run(whole, parts)


def test_peft_gets_no_adapter_that_it_would_not_read(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tune = adapter(targets=["out_proj"])
    folder = workplace.train("unread", "--stop-at", "1", tune=tune)
    assert run(["export", str(folder), "--adapter", "--out", str(tmp_path / "unread")]) == 2
    assert "PEFT reads no adapters of Mamba's out_proj" in capsys.readouterr().err


READ_BY_PEFT = ["in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "mlp", "shared", "latent"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_the_adapters_and_merging_gives_the_same_logits(
    workplace: Workplace, tmp_path: Path, kind: str
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from nemotron.hf.selfcheck import load_with_transformers

    experts = ["experts"] if kind == "lora" else []
    tune = adapter(kind, targets=[*READ_BY_PEFT, *experts])
    base = tmp_path / "base"
    assert run(["export", str(workplace.runs / "base"), "--out", str(base), "--no-check"]) == 0
    folder = workplace.train(f"peft-{kind}", init_from=str(base), tune=tune, schedule=RATE)
    written = tmp_path / "adapter"
    assert (
        run(["export", str(folder), "--adapter", "--base", str(base), "--out", str(written)]) == 0
    )
    ours = load(folder)
    theirs, _ = load_with_transformers(base, ours.config)
    ids = tokens(2, 17)
    with torch.no_grad():
        before = theirs(input_ids=ids).logits
        adapted = peft.PeftModel.from_pretrained(theirs, str(written)).eval()
        found = adapted(input_ids=ids).logits
        expected = ours.logits(ours(ids))
    # two float32 implementations that sum in another order
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert (before - expected).abs().max() > 1e-3 * expected.abs().max()


def test_an_export_has_the_adapters_merged(workplace: Workplace, tmp_path: Path) -> None:
    folder = workplace.train("merged", tune=adapter(), schedule=RATE)
    assert run(["export", str(folder), "--out", str(tmp_path / "merged"), "--no-check"]) == 0
    assert selfcheck.main(tmp_path / "merged", folder) == 0
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "| stage | sft |" in card
    assert "| tune.adapter.rank | 3 |" in card
    assert "`nemotron chat .`" in card
    name = "backbone.layers.0.mixer.in_proj.weight"
    expected = read_model(folder)[1][name]
    assert not torch.equal(expected, read_model(workplace.runs / "base")[1][name])
    found = load(tmp_path / "merged").state_dict()[name]
    assert torch.equal(found, expected.bfloat16().float())


def test_the_shares_of_every_role_are_listed() -> None:
    config = build().config
    lines = trained_shares(
        config, TuneConfig.model_validate(adapter(targets=["in_proj", "latent"]))
    )
    shares = dict(line.split(": ", 1) for line in lines[1:])
    assert shares["in_proj"].startswith(f"{2 * 3 * (24 + 2 * 30 + 2 * 21 + 6):,} of")
    assert shares["latent"].startswith(f"{3 * 2 * (24 + 9):,} of")
    assert shares["experts"].startswith("0 of")
    assert trained_shares(config, TuneConfig()) == []


def test_a_router_has_no_role() -> None:
    assert role_of("backbone.layers.1.mixer.gate") is None
    assert role_of("backbone.layers.1.mixer.experts") == "experts"
    assert AdapterConfig().targets == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tune": adapter(targets=["gate_proj"])}, "tune.adapter.targets.0 = gate_proj"),
        (
            {"tune": {**adapter(targets=["in_proj"]), "freeze": ["mamba"]}},
            "tune.adapter.targets = in_proj matches no layer",
        ),
        ({"tune": adapter("dora", targets=["experts"])}, "is not adapted by kind: dora"),
        ({"tune": adapter(), "parallel": {"tp": 2}}, "parallel.tp = 2 does not cut adapters"),
        ({"tune": adapter(), "parallel": {"ep": 2}}, "parallel.ep = 2 does not cut adapters of"),
        (
            {"tune": adapter(), "precision": {"compute": "bf16", "preset": "nvfp4"}},
            "quantizes layers that adapters",
        ),
    ],
)
def test_a_mistake_is_one_sentence(
    workplace: Workplace, capsys: pytest.CaptureFixture, changes: dict, said: str
) -> None:
    recipe = workplace.recipe("bad-adapter", **changes)
    capsys.readouterr()
    assert run(["train", str(recipe), "--dry-run"]) == 2
    sentence = capsys.readouterr().err.strip()
    assert said in sentence
    assert len(sentence.splitlines()) == 1


def test_a_run_without_adapters_has_none_to_export(
    workplace: Workplace, capsys: pytest.CaptureFixture
) -> None:
    assert run(["export", str(workplace.runs / "base"), "--adapter"]) == 2
    assert "has no adapters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--base", "HERE"], "--base has no effect without --adapter"),
        (["--adapter", "--mamba-fp32"], "--mamba-fp32 has no effect beside --adapter"),
        (["--adapter", "--no-check"], "--no-check has no effect beside --adapter"),
        (["--adapter", "--max-shard-gb", "1"], "--max-shard-gb has no effect beside --adapter"),
        (["--adapter", "--base", "HERE/nothing"], "is neither an exported folder nor OWNER/NAME"),
        (["--adapter", "--push", "NAME"], "--push = NAME is not a name on the Hub"),
    ],
)
def test_options_of_an_export_that_do_nothing_are_refused(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture, given: list[str], said: str
) -> None:
    words = [word.replace("HERE", str(tmp_path)) for word in given]
    out = tmp_path / "out"
    assert run(["export", str(workplace.runs / "base"), "--out", str(out), *words]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_adapters_can_be_read_by_all_who_may_read_their_folder(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    home, out = adapted(workplace), tmp_path / "adapters"
    assert run(["export", str(home), "--adapter", "--base", "own/base", "--out", str(out)]) == 0
    rights = {path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert rights == {out.stat().st_mode & 0o666}
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "own/base"
    )
    capsys.readouterr()
    assert (
        run(["export", str(workplace.runs / "base"), "--out", str(tmp_path / "all"), "--no-check"])
        == 0
    )
    assert run(["export", str(tmp_path / "all"), "--adapter", "--out", str(tmp_path / "no")]) == 2
    assert "is an exported folder, whose adapters are merged" in capsys.readouterr().err


def adapted(workplace: Workplace) -> Path:
    """Return a run with adapters, which is trained once."""
    if (workplace.runs / "adapted").exists():
        return workplace.runs / "adapted"
    tune = adapter(targets=["in_proj", "experts"])
    return workplace.train("adapted", "--stop-at", "1", tune=tune)


def other_rank(tensors: dict) -> None:
    name = next(name for name in tensors if name.endswith("lora_B"))
    tensors[name] = torch.zeros(*tensors[name].shape[:-1], 5)


def huge(tensors: dict) -> None:
    """Let the product of two narrow matrices be one that no memory holds."""
    start = next(name for name in tensors if name.endswith("lora_A")).removesuffix("lora_A")
    tensors[f"{start}lora_A"], tensors[f"{start}lora_B"] = (
        torch.zeros(1, 2**20),
        torch.zeros(2**20, 1),
    )


def without_scale(tensors: dict) -> None:
    del tensors[next(name for name in tensors if name.endswith("scaling"))]


@pytest.mark.slow
@pytest.mark.parametrize("forge", [other_rank, huge, without_scale])
def test_adapters_that_do_not_fit_are_refused_by_every_reader(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str], forge
) -> None:
    forged = tmp_path / "runs" / "forged"
    shutil.copytree(adapted(workplace), forged)
    rewrite(forged, forge)
    taught = {"stage": "distill", "teacher": str(forged), "init_from": None}
    for words in (
        ["generate", str(forged), "--prompt", "a"],
        ["export", str(forged), "--out", str(tmp_path / "out"), "--no-check"],
        ["export", str(forged), "--out", str(tmp_path / "out"), "--adapter"],
        ["train", str(workplace.recipe("f1", init_from=str(forged)))],
        ["train", str(workplace.recipe("f2", **taught))],
        ["chat", str(forged)],
        ["serve", str(forged), "--port", "0"],
    ):
        assert run(words) == 2, words
        said = capsys.readouterr().err
        assert "is damaged: " in said, (words, said)
        assert "adapt" in said
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_nothing_is_refused(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forged = tmp_path / "runs" / "forged"
    shutil.copytree(adapted(workplace), forged)
    rewrite(forged, lambda tensors: tensors.update({f"{NOWHERE}.scaling": torch.zeros(())}))
    assert run(["generate", str(forged), "--prompt", "a"]) == 2
    assert "backbone.nowhere.adapter.lora_A adapts no weight" in capsys.readouterr().err
