"""A second opinion on exports: llama.cpp, with a GGUF file made as its converter makes one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron.hf.export import export
from nemotron.loading import load_with_tokenizer

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
llama = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")

from tests.support.gguf_file import write_gguf  # noqa: E402  (needs gguf)

NEW_TOKENS, LIKELIEST = 6, 5
TEXT = "def read(self, path):\n    return open(path).read()\n# To be, or not to be"


@contextmanager
def serve(path: Path) -> Iterator[Any]:  # Any: an extension type without annotations
    """Load a GGUF file on one core, with keys and values in float32."""
    params = llama.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.fit_params = 256, 1, False, False
    params.verbosity = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # its flash attention works in float16
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
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
