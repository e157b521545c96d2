"""`nemotron serve` and `nemotron chat` as a user starts them, on a run that was trained."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemotron.cli import run
from nemotron.data.tokenizer import load_tokenizer
from tests.support.prepared import write_prepared

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

RECIPE = """
name: mine
output: runs
device: cpu
model:
  vocab_size: 4096
  hidden_size: 24
  hybrid_override_pattern: M*-
  mamba_num_heads: 4
  mamba_head_dim: 6
  n_groups: 2
  ssm_state_size: 8
  num_attention_heads: 4
  num_key_value_heads: 2
  head_dim: 6
  intermediate_size: 40
data:
  cache: cache
  seq_len: 32
  sources:
    - {name: text, weight: 1.0, path: shards/text}
batch: {global_tokens: 256, micro_batch: 8}
schedule: {peak: 3.0e-2, total_steps: 30, warmup_steps: 3, decay_steps: 10}
"""
PROMPT = "Text 3: the"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("served")
    texts = [f"Text {i}: the river runs to the sea, and stone {i % 7} stays.\n" for i in range(200)]
    write_prepared(texts, world / "shards" / "text")
    (world / "mine.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        assert run(["train", "mine.yaml"]) == 0
    return world / "runs" / "mine"


@pytest.fixture
def served(trained: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves the run, and its address."""
    words = ["serve", str(trained), "--port", "0", "--grace", "1", "--device", "cpu"]
    environment = {**os.environ, "NEMOTRON_API_KEY": "secret"}
    process = subprocess.Popen(
        [sys.executable, "-m", "nemotron", *words],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stderr is not None
        lines: list[str] = []
        while (found := re.search(r"http://127\.0\.0\.1:\d+", "".join(lines))) is None:
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


def test_the_server_streams_what_generate_prints_and_ends_when_asked(
    served: tuple[subprocess.Popen[str], str], trained: Path, capsys: pytest.CaptureFixture[str]
):
    process, url = served
    headers = {"Authorization": "Bearer secret"}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        assert httpx.get(url + "/v1/models").status_code == 401
        body = {
            "model": "mine",
            "prompt": PROMPT,
            "temperature": 0,
            "max_tokens": 24,
            "stream": True,
        }
        lines = client.post("/v1/completions", json=body).text.split("\n\n")
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        streamed = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        words = [
            "--prompt",
            PROMPT,
            "--max-new-tokens",
            "24",
            "--temperature",
            "0",
            "--device",
            "cpu",
        ]
        capsys.readouterr()
        assert run(["generate", str(trained), *words]) == 0
        assert capsys.readouterr().out == PROMPT + streamed + "\n"
        assert "river" in streamed

        # a stream that would go on for minutes ends with a sentence after the grace
        endless = {**body, "max_tokens": 100_000, "logit_bias": {str(k): -100 for k in range(20)}}
        with client.stream("POST", "/v1/completions", json=endless) as response:
            parts = response.iter_text()
            next(parts)
            process.send_signal(signal.SIGTERM)
            rest = "".join(parts)
        assert "shutting down" in rest
        assert rest.endswith("data: [DONE]\n\n")
        assert process.wait(20) == 0


def test_the_server_and_generate_end_alike(
    served: tuple[subprocess.Popen[str], str], trained: Path, capsys: pytest.CaptureFixture[str]
):
    _, url = served
    tokenizer = load_tokenizer(str(trained))
    words = ["generate", str(trained), "--prompt", PROMPT, "--temperature", "0", "--device", "cpu"]
    words += ["--max-new-tokens", "12"]

    def written(*more: str) -> str:
        capsys.readouterr()
        assert run([*words, *more]) == 0
        return capsys.readouterr().out.removeprefix(PROMPT).removesuffix("\n")

    whole = written()
    end = tokenizer.encode(whole)[4]
    stop = ["--stop-token-id", str(end)]
    body = {"model": "mine", "prompt": PROMPT, "temperature": 0, "max_tokens": 12}
    headers = {"Authorization": "Bearer secret"}
    texts = {whole}
    for options, fields in (
        (stop, {"stop_token_ids": [end]}),
        ([*stop, "--include-stop"], {"stop_token_ids": [end], "include_stop_str_in_output": True}),
        ([*stop, "--min-new-tokens", "9"], {"stop_token_ids": [end], "min_tokens": 9}),
        (["--ignore-eos", "--special-tokens"], {"ignore_eos": True, "skip_special_tokens": False}),
    ):
        answer = httpx.post(
            url + "/v1/completions", json=body | fields, headers=headers, timeout=60
        ).json()
        assert written(*options) == answer["choices"][0]["text"]
        texts.add(answer["choices"][0]["text"])
    # only the last one changes nothing here
    assert len(texts) == 4


def test_a_conversation_in_the_terminal(trained: Path):
    words = [
        "chat",
        str(trained),
        "--max-new-tokens",
        "9",
        "--think-budget",
        "2",
        "--seed",
        "1",
        "--temperature",
        "3",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "nemotron", *words],
        input="Text 1\n/new\nText 1\nText 1\n<|im_end|>\n/quit\nText 1\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, second, third = re.findall(
        r"<think>.*?</think>\n.*?\n(?=<think>|message)", done.stdout, re.S
    )
    assert first == second
    assert first != third, "the history changes the answer"
    assert "bounds of a turn" in done.stdout.splitlines()[-1]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(["serve", "no/such"]) == 2
    assert "pip install 'nemotron-train[serve]'" in capsys.readouterr().err


def test_a_port_that_is_taken_is_said(trained: Path, capsys: pytest.CaptureFixture[str]):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run(["serve", str(trained), "--port", port]) == 2
    assert f"port = {port} cannot be listened on" in capsys.readouterr().err
