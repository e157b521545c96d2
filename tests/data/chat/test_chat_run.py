"""From conversations to a folder that transformers chats with."""

import json
from pathlib import Path

import pytest

from nemotron.cli import run
from nemotron.data.chat.render import render
from nemotron.posttrain.demonstrations import Manner, TaskSet, chats
from nemotron.run.metrics import read_metrics

SMOKE = Path(__file__).parents[3] / "recipes/tiny/smoke.yaml"
RECIPE = f"""\
extends: {SMOKE}
name: chats
data:
  sources: [{{name: chats, path: data/chats}}]
  packing: {{kind: best_fit, long_documents: drop}}
  reset_documents: true
  objective: samples
  seq_len: 128
batch: {{global_tokens: 512}}
"""


def test_a_model_of_conversations_is_exported_with_its_template_and_its_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} and {i}?"},
                {"role": "assistant", "content": f"It is {2 * i}.", "reasoning_content": "I add."},
            ]
        }
        for i in range(60)
    ]
    Path("chats.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    Path("chats.yaml").write_text(RECIPE)
    assert run(["data", "prepare", "chats.jsonl", "--chat", "--out", "data/chats"]) == 0
    assert run(["train", "chats.yaml", "device=cpu"]) == 0
    records = read_metrics(Path("runs/chats/metrics.jsonl"))
    losses = [record["loss/main"] for record in records if record["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.5
    assert run(["export", "runs/chats", "--out", "exported", "--no-check"]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained("exported")
    text = tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False)
    assert text == render(rows[0]["messages"]).text
    # a call of a tool, what the tool says, and the answer
    [chat] = chats(TaskSet("arith_chain", 1, tools=True), 1, 3, Manner())
    messages, tools = chat["messages"], chat["tools"]
    called = messages[1]["tool_calls"][0]["function"]
    called["arguments"] = json.loads(called["arguments"])  # transformers takes objects
    for turns, is_open in ((messages, False), (messages[:1], True), (messages[:3], True)):
        text = tokenizer.apply_chat_template(
            turns, tools=tools, tokenize=False, add_generation_prompt=is_open
        )
        assert text == render(turns, tools, add_generation_prompt=is_open).text
    generation = transformers.GenerationConfig.from_pretrained("exported")
    assert generation.eos_token_id == [2, 11]
