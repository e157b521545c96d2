"""A second opinion on exports: llama.cpp, with a GGUF file made as its converter makes one."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nemotron import cli
from nemotron.generate.engine import Engine
from nemotron.generate.sampling import Sampling
from nemotron.generate.speculate import Speculation
from nemotron.hf.export import export
from nemotron.loading import load_with_tokenizer
from nemotron.model.hybrid import HybridLM

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
llama = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")

from tests.support.gguf_file import write_gguf  # noqa: E402  (needs gguf)

NEW_TOKENS, LIKELIEST = 6, 5
TEXT = "def read(self, path):\n    return open(path).read()\n# To be, or not to be"


@contextmanager
def serve(path: Path, drafts: int = 0) -> Iterator[Any]:  # Any: a type without annotations
    """Load a GGUF file on one core, with keys and values in float32.

    `drafts` tokens are guessed at once by the block of multi-token prediction.
    """
    params = llama.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.fit_params = 256, 1, False, False
    params.verbosity = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # its flash attention works in float16
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    if drafts:
        kind = llama.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP
        params.speculative.types = [kind]
        params.speculative.draft.n_max = drafts
        params.speculative.draft.cache_type_k = llama.ggml_type.GGML_TYPE_F32
        params.speculative.draft.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    server = llama.Server(params)
    yield server
    del server


@pytest.mark.parametrize(
    "changes",
    [
        {"hybrid_override_pattern": "MEM*EM"},
        {"hybrid_override_pattern": "EM*E", "moe_latent_size": None, "n_groups": 1},
        {"hybrid_override_pattern": "M-M*-M", "num_nextn_predict_layers": 0},
    ],
    ids=["latent experts", "experts", "dense"],
)
def test_greedy_tokens_and_the_likeliest_five_are_those_of_llama_cpp(
    make_run: Callable[..., Path], tmp_path: Path, changes: dict
) -> None:
    folder = tmp_path / "export"
    assert export(make_run(tmp_path / "run", **changes), folder, check=False) == 0
    write_gguf(folder, tmp_path / "model.gguf")
    model, tokenizer = load_with_tokenizer(folder)
    ids = tokenizer.encode(TEXT)
    assert len(ids) > 15
    asked = {"prompt": ids, "n_predict": NEW_TOKENS, "n_probs": LIKELIEST, "temperature": 0.0}
    with serve(tmp_path / "model.gguf") as server:
        answer = server.handle_completions(asked)
    steps = answer["choices"][0]["logprobs"]["content"]
    assert len(steps) == NEW_TOKENS
    for step in steps:
        with torch.no_grad():
            logprobs = model.logits(model(torch.tensor([ids])))[0, -1].log_softmax(-1)
        top = step["top_logprobs"]
        found = torch.tensor([token["logprob"] for token in top])
        # float32 in another order of sums; logits reach several units
        for ours in (logprobs.topk(LIKELIEST).values, logprobs[[token["id"] for token in top]]):
            torch.testing.assert_close(found, ours, rtol=0, atol=1e-5)
        assert step["id"] == logprobs.argmax()
        ids.append(step["id"])


TRAIN = ["train", "tiny/smoke", "name=mine", "device=cpu", "model.hybrid_override_pattern=EM*E",
         "model.mtp_hybrid_override_pattern='*E'", "model.num_nextn_predict_layers=1",
         "model.moe_latent_size=null", "model.n_groups=1", "model.hidden_size=32",
         "data.seq_len=64", "batch.global_tokens=512", "batch.micro_batch=8", "schedule.peak=1e-2",
         "schedule.total_steps=90", "schedule.warmup_steps=10", "schedule.decay_steps=30",
         "evaluation.tokens=64"]  # fmt: skip
WORDS = ("river", "stone", "sea", "hill", "cloud", "bird", "road", "wind")
READ = "The river runs to the sea, and the sea stays where the river was. "
BEGINS = ("", "The stone", "road", "where it", "A hill was", "def read", "The cloud runs to the")
MOST = 40


@pytest.mark.slow
def test_drafts_are_those_of_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"text": f"The {a} runs to the {b}, and the {b} stays where the {a} was."}
        for a in WORDS
        for b in WORDS
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 20))
    assert cli.run(["data", "prepare", "rows.jsonl", "--out", "shards", "--workers", "1"]) == 0
    sources = "data.sources=[{name: text, path: shards}]"
    assert cli.run([*TRAIN, sources, "output=runs", "data.cache=cache"]) == 0
    assert cli.run(["export", "runs/mine", "--out", "export", "--no-check"]) == 0
    for attends, length in ((False, 1), (False, 3), (True, 1), (True, 3)):
        center_drafts(Path("export"), Path("centered"), attends=attends)
        write_gguf(Path("centered"), Path("model.gguf"), drafts=True)
        model, tokenizer = load_with_tokenizer(Path("centered"))
        texts = [tokenizer.encode(READ + text) for text in BEGINS]
        ours = [drafted(model, ids, length) for ids in texts]
        with serve(Path("model.gguf"), length) as server:
            theirs = [answered(server, ids) for ids in texts]
        assert [one[0] for one in theirs] == [one[0] for one in ours]
        assert sum(one[2] for one in ours) > len(BEGINS)
        # it also counts right drafts behind the end of a text; and its block attends, before all
        # tokens, to the first one with a hidden state of zeros, which may turn a rare draft
        equal = [b <= a <= b + length for (*_, a), (*_, b) in zip(theirs, ours, strict=True)]
        equal = [e and a[1] == b[1] for e, a, b in zip(equal, theirs, ours, strict=True)]
        assert sum(equal) >= len(BEGINS) - attends, (attends, length, theirs, ours)
    capsys.readouterr()


def center_drafts(source: Path, folder: Path, *, attends: bool) -> None:
    """Copy an export whose drafting block gets a residual stream with a mean of zero.

    Its last norm is a LayerNorm in llama.cpp, and RMSNorm here and in Megatron: then they agree.
    Unless the block `attends`, its attention adds nothing, and each norm gets weights of its own.
    """
    generator = torch.Generator().manual_seed(1)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    [path] = folder.glob("*.safetensors")
    with safe_open(source / path.name, "pt") as file:
        tensors, facts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for name in [name for name in tensors if name.startswith("mtp.")]:
        weight = tensors[name].float()
        if name.endswith(("eh_proj.weight", "o_proj.weight", "down_proj.weight")):
            weight = weight - weight.mean(0, keepdim=True)
        if name.endswith("o_proj.weight") and not attends:
            weight = torch.zeros_like(weight)
        if name.endswith("norm.weight") and not attends:
            weight = weight * (0.5 + torch.rand(weight.shape, generator=generator)) ** 4
        tensors[name] = weight.contiguous()
    save_file(tensors, path, facts)


def drafted(model: HybridLM, ids: list[int], length: int) -> tuple[list[int], int, int]:
    """Return the tokens that we add, how many were drafted for them, and how many were right."""
    speculation = Speculation("mtp", length, adaptive=False)
    engine = Engine(model, {model.config.eos_token_id}, speculation=speculation)
    [tokens] = engine.generate([ids], MOST, Sampling(0.0))
    acceptance = engine.speculator.acceptance
    return tokens, acceptance.num_drafts, acceptance.num_accepted


def answered(server: Any, ids: list[int]) -> tuple[list[int], int, int]:
    """Return the same of llama.cpp."""
    asked = {"prompt": ids, "n_predict": MOST, "n_probs": 1, "temperature": 0.0}
    answer = server.handle_completions({**asked, "cache_prompt": False})
    tokens = [step["id"] for step in answer["choices"][0]["logprobs"]["content"]]
    timings = answer["timings"]
    return tokens, timings["draft_n"], timings["draft_n_accepted"]
