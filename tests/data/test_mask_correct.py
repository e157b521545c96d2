"""Right tokens of a text to be corrected are hidden in training, others in each pass."""

from pathlib import Path

import numpy as np
import pytest

from nemotron.data.config import ChatDataConfig, leaves
from nemotron.data.correct.marks import marks_of
from nemotron.data.indexed import HEADER, MAGIC
from nemotron.data.loader import TrainingData
from nemotron.data.mixture import single_phase
from nemotron.data.tokenizer import load_tokenizer

END, LENGTH = 2, 31


def write_chats(prefix: Path, number: int) -> None:
    """Texts of 20 tokens: a wrong and 9 right ones of a source, then 10 that are learned."""
    draw = np.random.default_rng(3)
    prefix.parent.mkdir(parents=True)
    tokens = draw.integers(300, 4000, (number, 20))
    tokens[:, -1] = END
    roles = np.tile(np.repeat([0, 2, 1], [1, 9, 10]), (number, 1))
    Path(f"{prefix}.bin").write_bytes(tokens.astype("<u2").tobytes())
    Path(f"{prefix}.loss").write_bytes(roles.astype("u1").tobytes())
    header = HEADER.pack(MAGIC, 1, 8, number, number + 1)
    lengths, places = np.full(number, 20, "<i4"), np.arange(number + 1, dtype="<i8")
    offsets = places[:-1] * 40
    arrays = [lengths.tobytes(), offsets.astype("<i8").tobytes(), places.tobytes()]
    Path(f"{prefix}.idx").write_bytes(b"".join([header, *arrays]))


def opened(folder: Path, rate: float) -> TrainingData:
    sources = ({"name": "chats", "path": str(folder / "chats/all")},)
    held = ({"name": "held", "path": str(folder / "chats/all")},)
    values = {"sources": sources, "seq_len": LENGTH, "cache": str(folder / "cache")}
    more = {"mask_correct": rate, "validation": held}
    config = ChatDataConfig.model_validate(values | more)
    timeline = single_phase(leaves(config.blend), LENGTH, 10 * LENGTH, 8)
    return TrainingData(config, timeline, seed=1, vocab_size=4096)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_chats(tmp_path / "chats/all", 40)
    return tmp_path


def test_only_right_tokens_are_hidden_at_the_rate_and_labels_stay(folder: Path) -> None:
    plain, masked = opened(folder, 0.0), opened(folder, 0.3)
    mask = marks_of(load_tokenizer("embedded")).mask
    hidden = total = 0
    for step in range(8):  # two passes over 40 rows
        one, other = plain.batch(step), masked.batch(step)
        assert one.labels.tolist() == other.labels.tolist()
        changed = one.input_ids != other.input_ids
        assert (other.input_ids[changed] == mask).all()
        place = np.arange(LENGTH)[None, :]
        assert not changed[:, (place[0] < 1) | (place[0] >= 10)].any()
        hidden, total = hidden + int(changed.sum()), total + 9 * len(changed)
    assert hidden / total == pytest.approx(0.3, abs=0.05)


def test_each_pass_hides_others_and_a_resumed_run_the_same(folder: Path) -> None:
    data, again = opened(folder, 0.3), opened(folder, 0.3)
    mask = marks_of(load_tokenizer("embedded")).mask

    def hidden(step: int) -> dict[int, list[bool]]:
        batch = data.batch(step)
        keys = batch.input_ids[:, 12].tolist()  # which text it is
        rows = (batch.input_ids == mask).tolist()
        return dict(zip(keys, rows, strict=True))

    passes = [{}, {}]
    for step in range(8):
        passes[step // 4] |= hidden(step)
    assert passes[0].keys() == passes[1].keys()
    same = sum(passes[0][key] == passes[1][key] for key in passes[0])
    assert same < 8
    assert again.batch(6).input_ids.tolist() == data.batch(6).input_ids.tolist()


def test_held_out_texts_are_not_hidden(folder: Path) -> None:
    mask = marks_of(load_tokenizer("embedded")).mask
    for held in opened(folder, 0.9).validation("held", tokens=10 * LENGTH, rows=10):
        assert not (held.batch.input_ids == mask).any()
