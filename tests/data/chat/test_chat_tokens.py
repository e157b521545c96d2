"""Conversations as tokens: what is learned, how samples are weighed, what a folder holds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nemotron.cli import run
from nemotron.data.batch import NO_LABEL
from nemotron.data.chat.render import Rendered, render
from nemotron.data.config import DataConfig, SourceConfig, leaves
from nemotron.data.folder import read_manifest
from nemotron.data.indexed import Shard
from nemotron.data.loader import TrainingData
from nemotron.data.mixture import single_phase
from nemotron.data.prepare.conversations import encode_conversation, encode_rendered
from nemotron.data.prepare.options import ChatOptions
from nemotron.data.prepare.writer import ShardWriter
from nemotron.data.tokenizer import load_tokenizer
from nemotron.errors import UserError
from nemotron.train.auxiliary import total_weight

TOKENIZER = load_tokenizer("embedded")
OPTIONS = ChatOptions()


def conversation(number: int, answer: str, thought: str | None = None) -> dict:
    turn = {"role": "assistant", "content": answer}
    if thought:
        turn["reasoning_content"] = thought
    return {"messages": [{"role": "user", "content": f"Question {number}?"}, turn]}


def test_the_tokens_of_a_turn_end_where_inference_hands_over():
    row = conversation(1, "An answer.\n", thought="\n  some thought")
    [sequence] = encode_conversation(row, TOKENIZER, OPTIONS)
    prompt = render(row["messages"][:1], add_generation_prompt=True).text
    assert sequence.learned is not None
    given = [i for i, own in zip(sequence.ids, sequence.learned, strict=True) if not own]
    assert given == TOKENIZER.encode(prompt, specials=True)
    learned = [i for i, own in zip(sequence.ids, sequence.learned, strict=True) if own]
    assert TOKENIZER.decode(learned) == ("\n  some thought\n</think>\nAn answer.<|im_end|>\n")
    assert sequence.ids[0] == TOKENIZER.id("<|im_start|>") == 10
    assert sequence.num_bytes == len(TOKENIZER.decode(sequence.ids).encode())


def test_columns_that_hold_json_as_text_are_read():
    row = conversation(1, "Fine.")
    text = {"messages": json.dumps(row["messages"]), "tools": "null"}
    assert encode_conversation(text, TOKENIZER, OPTIONS) == encode_conversation(
        row, TOKENIZER, OPTIONS
    )


def test_a_text_without_learned_parts_is_encoded_too():
    assert encode_rendered(Rendered("One two", ()), TOKENIZER).learned == [0] * len(
        TOKENIZER.encode("One two")
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Conversations of very different lengths, prepared by the command."""
    folder = tmp_path_factory.mktemp("chats")
    rows = [conversation(i, "Yes. " * (1 + 7 * (i % 5)), "Hm. " * (i % 3)) for i in range(150)]
    two = [*conversation(150, "One.", "A")["messages"], *conversation(151, "Two.", "B")["messages"]]
    rows.append({"messages": two})
    bad = [{"messages": [{"role": "user", "content": "Alone?"}]}, {"text": "no chat"}]
    lines = [json.dumps(row) for row in [*rows, *bad]]
    (folder / "chats.jsonl").write_text("\n".join(lines))
    arguments = [str(folder / "chats.jsonl"), "--chat", "--out", str(folder / "out")]
    assert run(["data", "prepare", *arguments, "--hold-out", "0.2"]) == 0
    return folder


def test_a_folder_of_conversations_holds_each_with_what_is_learned(folder: Path):
    manifest = read_manifest(folder / "out")
    assert manifest is not None
    assert manifest.counts.bad == 2
    assert manifest.counts.documents + manifest.counts.held_out_documents == 152
    assert [line.split("chats.jsonl:")[1][:40] for line in manifest.bad_rows] == [
        "152 messages has no assistant message; g",
        "153 has no column messages (its columns:",
    ]
    shard = Shard(folder / "out" / manifest.train[0].name)
    for number in range(shard.num_documents):
        ids = shard.document(number)
        start = int(shard.starts(slice(number, number + 1))[0])
        learned = shard.roles[start : start + len(ids)]
        text = TOKENIZER.decode(ids[learned == 1])
        assert text.endswith("<|im_end|>\n")
        assert "<|im_start|>" not in text
        assert "Question" not in text


def make_data(folder: Path, **changes: object) -> TrainingData:
    values: dict = {
        "sources": [SourceConfig(name="chats", path=str(folder / "out"))],
        "cache": str(folder / "cache"),
        "seq_len": 200,
        "packing": {"kind": "best_fit", "long_documents": "drop"},
    }
    config = DataConfig.model_validate(values | changes)
    timeline = single_phase(leaves(config.blend), config.seq_len, 4 * config.seq_len, 10)
    return TrainingData(config, timeline, seed=2, vocab_size=4096)


def test_packed_rows_learn_the_assistants_tokens_and_no_other(folder: Path):
    batch = make_data(folder).batch(0)
    assert batch.loss_weight is None
    learned = batch.labels[batch.labels != NO_LABEL].tolist()
    text = TOKENIZER.decode(learned)
    assert "Yes." in text
    assert "Question" not in text
    # a conversation's first answer token is predicted from the prompt, its end from the answer
    assert text.count("<|im_end|>") == sum(
        TOKENIZER.decode(row.tolist()).count("<|im_start|>assistant") for row in batch.input_ids
    )


def test_samples_weigh_alike_and_tokens_do_when_they_are_counted(folder: Path):
    batch = make_data(folder, objective="samples").batch(1)
    assert batch.loss_weight is not None
    for row in range(4):
        documents, weights = batch.seq_idx[row], batch.loss_weight[row]
        for number in range(int(documents.max()) + 1):
            # a label belongs to the document of its input; the row's filling has none
            total = float(weights[documents == number].sum())
            assert total == pytest.approx(1.0, abs=1e-5) or total == 0.0
    assert not batch.loss_weight[batch.labels == NO_LABEL].any()


@pytest.mark.parametrize(("objective", "expected"), [("tokens", 7 / 3), ("samples", 2.0)])
def test_the_two_objectives_have_the_published_values(
    tmp_path: Path, objective: str, expected: float
):
    # losses 2 and 4 in one conversation, 1 in the other: Super report, equations 1 and 2
    with ShardWriter(tmp_path / "two", np.int32, supervised=True) as writer:
        writer.add([10, 50, 51, 52], [0, 0, 1, 1])
        writer.add([10, 60, 61], [0, 0, 1])
    source = SourceConfig(name="two", path=str(tmp_path / "two"))
    data = make_data(tmp_path, sources=[source], seq_len=8, objective=objective)
    [batch] = list(data.batch(0).split(1))[:1]
    losses = {51: 2.0, 52: 4.0, 61: 1.0}
    found = torch.tensor([[losses.get(label, 0.0) for label in batch.labels[0].tolist()]])
    weights = 1.0 if batch.loss_weight is None else batch.loss_weight
    total = (found * weights).sum().item() / total_weight(batch.labels, batch.loss_weight)
    assert total == pytest.approx(expected)


@pytest.mark.parametrize(
    "packing",
    [
        {"kind": "concatenate"},
        {"kind": "best_fit", "long_documents": "split"},
    ],
)
def test_rows_that_would_cut_conversations_are_refused(folder: Path, packing: dict):
    with pytest.raises(UserError, match="must not cut the conversations of chats"):
        make_data(folder, packing=packing)


def test_truncated_conversations_are_counted(folder: Path):
    lines = make_data(
        folder, seq_len=60, packing={"kind": "sequential", "long_documents": "truncate"}
    ).describe()
    assert any("truncated" in line and "tokens lost" in line for line in lines)
    [line] = [line for line in lines if "truncated" in line]
    assert " 0 truncated" not in line
