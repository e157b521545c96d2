"""Correction by the commands: it learns, resumes to the same bits, and refuses what is wrong."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemotron.checkpoint.read import read_model
from nemotron.cli import run
from nemotron.generate.decode_layers import lay_out
from nemotron.ops.token_step import TokenStepOp, token_step
from nemotron.posttrain.correct.choose import choose
from nemotron.posttrain.correct.config import CorrectOptions
from nemotron.posttrain.correct.evaluate import Errors, distance, errors_of
from nemotron.posttrain.correct.layout import Specials
from nemotron.posttrain.correct.run import Corrector, Source, text_ids
from nemotron.posttrain.correct.threshold import NOTHING, best_threshold
from tests.support.cases import further
from tests.support.models import build
from tests.support.pairs import MODEL, PairPlace, make_rows, marks, metrics_of, tokenizer
from tests.support.same_run import assert_same_run

HEADS = {"heads": ["duration", "edit", "candidate"]}


def model_of(kind: str, candidates: int = 2) -> dict:
    heads = HEADS if kind == "duration" else {}
    return {"model": {**MODEL, "correction": {"candidates": candidates, **heads}}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [further("tag"), "soft", further("duration")])
def test_a_stopped_run_resumes_to_the_same_bits(place: PairPlace, kind: str) -> None:
    values = {"correct": {"kind": kind}, **model_of(kind)}
    whole, parts = (place.recipe(f"{kind}-{name}", **values) for name in ("whole", "parts"))
    assert run(["train", str(whole)]) == 0
    assert run(["train", str(parts), "--stop-at", "3"]) == 75
    assert run(["train", str(parts), "--resume"]) == 0
    assert_same_run(place.runs / f"{kind}-whole", place.runs / f"{kind}-parts")
    last = metrics_of(place.runs / f"{kind}-whole", "train")[-1]
    assert last["data/pairs/pairs"] > 15
    found = metrics_of(place.runs / f"{kind}-whole", "validation")
    named = "validation/duration_accuracy"
    assert all((named in row) == (kind == "duration") for row in found)


@pytest.mark.slow
@pytest.mark.nightly
def test_tagging_corrects_what_was_held_out(place: PairPlace) -> None:
    recipe = place.recipe(
        "learns",
        correct={"kind": "tag"},
        optimizer={"eps": 1e-8},
        schedule={"total_steps": 150},
        checkpoint={"every_steps": 150},
    )
    assert run(["train", str(recipe)]) == 0
    [found] = metrics_of(place.runs / "learns", "validation")
    assert found["validation/error_rate"] < 0.7 * found["validation/source_error_rate"]


@pytest.mark.slow
def test_a_trained_model_goes_on_with_candidates_and_heads(place: PairPlace) -> None:
    first = place.recipe("one", 1, correct={"kind": "tag"})
    assert run(["train", str(first)]) == 0
    base = read_model(place.runs / "one")[1]
    assert not [name for name in base if name.startswith(("candidates", "edit_heads"))]
    out = place.folder / "export"
    assert run(["export", str(place.runs / "one"), "--out", str(out), "--no-check"]) == 0
    more = {"init_from": str(place.runs / "one"), **model_of("duration")}
    second = place.recipe("two", correct={"kind": "duration"}, **more)
    assert run(["train", str(second), "--stop-at", "1", "optimizer.clip=1e-9"]) == 75
    found = read_model(place.runs / "two")[1]
    # the first step is too small to be seen
    mean = torch.eye(24).repeat(1, 2) / 2
    torch.testing.assert_close(found["candidates.weight"], mean, rtol=0, atol=1e-3)
    name = "backbone.embeddings.weight"
    torch.testing.assert_close(found[name], base[name], rtol=0, atol=1e-3)


def corrector(kind: str, threshold: float = NOTHING) -> Corrector:
    heads = HEADS["heads"] if kind == "duration" else []
    model = build(
        vocab_size=64,
        hybrid_override_pattern="M*-",
        num_nextn_predict_layers=0,
        mtp_hybrid_override_pattern=None,
        correction={"candidates": 2, "heads": heads},
    )
    own = tokenizer()
    allowed = text_ids(64, own.vocab_size, own.special_ids)
    return Corrector(model, CorrectOptions(kind=kind), Specials(1, 2, marks()), allowed, threshold)


@pytest.mark.parametrize("kind", ["tag", "ctc", "soft", "duration"])
def test_sources_are_corrected_together_as_each_by_itself(kind: str) -> None:
    own = corrector(kind, threshold=-4.0)
    sources = [Source(row.columns) for row in make_rows(12, 2)]
    together = own.correct(sources)
    apart = [own.correct([source])[0] for source in sources]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in apart]
    text = set(own.is_text.nonzero().flatten().tolist())
    assert all(set(answer.tokens) <= text for answer in together)
    assert len({tuple(answer.tokens) for answer in together}) > 3


@pytest.mark.parametrize("kind", ["tag", "ctc", "soft", "duration"])
@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_steps_correct_as_the_layers_do(kind: str, backend: str) -> None:
    own = corrector(kind, threshold=-4.0)
    if reason := token_step.backend(backend).missing():
        pytest.skip(reason)
    operation = token_step.bind(backend)
    assert isinstance(operation, TokenStepOp)
    model = copy.deepcopy(own.model).float()
    model.compute_dtype, model.token_step = torch.float32, operation
    lay_out(model, torch.float32, operation)
    fast, calls = replace(own, model=model), []
    bind = model.steps
    assert bind is not None

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(given[1].shape)
        found = bind(*given, **named)
        assert found is not None, "the layers themselves were called"
        return found

    model.steps = counted  # type: ignore[assignment]
    sources = [Source(row.columns) for row in make_rows(12, 2)]
    expected = own.correct(sources)
    for given in (sources, sources[:5]):  # the second call goes on in the cache of the first
        found = fast.correct(given)
        for ours, theirs in zip(found, expected, strict=False):
            assert (ours.tokens, ours.selected) == (theirs.tokens, theirs.selected)
            if ours.scores is not None and theirs.scores is not None:
                # another order of sums
                np.testing.assert_allclose(ours.scores, theirs.scores, rtol=0, atol=1e-4)
    assert len(calls) > len({source.columns.shape[1] for source in sources})


def test_right_durations_are_counted_by_token() -> None:
    own, rows = corrector("duration"), make_rows(6, 2)
    answers = own.correct([Source(row.columns) for row in rows])
    right = tokens = 0
    for row, answer in zip(rows, answers, strict=True):
        assert answer.durations is not None
        for k in range(2):
            for token, guess, true in zip(
                row.columns[k], answer.durations[k], row.durations[k], strict=True
            ):
                tokens += int(token != marks().void)
                right += int(token != marks().void and guess == min(true, 3))
    found = sum((errors_of(r, a, marks(), 3) for r, a in zip(rows, answers, strict=True)), Errors())
    assert (found.durations, found.right_durations) == (tokens, right)
    assert 0 < found.metrics()["validation/duration_accuracy"] <= 1


def test_without_a_flagged_token_the_choice_is_the_answer() -> None:
    sources = [Source(row.columns) for row in make_rows(5, 2)]
    for answer in corrector("soft").correct(sources):
        assert answer.tokens == answer.selected
    everywhere = corrector("soft", threshold=0.0).correct(sources)
    assert [a.tokens for a in everywhere] != [a.selected for a in everywhere]


def test_an_empty_source_has_an_empty_answer() -> None:
    empty = Source(np.zeros((2, 0), np.int64))
    found = corrector("soft").correct([Source(make_rows(1, 2)[0].columns), empty])
    assert found[1].tokens == []


def test_the_choice_is_made_by_stretch_with_two_columns_around() -> None:
    columns = np.array([[5, 6, 7, 8, 9], [5, 6, 1, 8, 2]])
    scores = np.full((2, 5), -1.0)
    scores[:, 2], scores[:, 4] = (-3, -2), (-1, -2)
    # the stretches are 2 and 4; around each lie all columns from 0, and from 2
    assert choose(columns, scores).tolist() == [0, 0, 0, 0, 0]
    scores[0, 2] = -5
    assert choose(columns, scores).tolist() == [0, 0, 1, 0, 1]
    scores[1, 4] = -9
    assert choose(columns, scores).tolist() == [0, 0, 0, 0, 0]


def test_the_threshold_is_that_of_the_best_f1() -> None:
    scores = np.array([-5.0, -4, -3, -3, -2, -1])
    wrong = np.array([True, False, True, True, False, False])
    found = best_threshold(scores, wrong)
    assert (found.value, found.f1) == (-3, pytest.approx(6 / 7))
    assert best_threshold(scores, ~wrong & wrong).value == NOTHING


@pytest.mark.parametrize(
    ("ours", "theirs", "edits"),
    [([], [1, 2], 2), ([1, 2], [], 2), ([1, 2, 3], [1, 3], 1), ([1, 2, 3], [3, 2, 1], 2),
     ([4, 1, 2, 3], [1, 2, 5, 3], 2)],
)  # fmt: skip
def test_the_distance_counts_edits(ours: list, theirs: list, edits: int) -> None:
    assert distance(ours, theirs) == edits


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (model_of("tag", 3), "has 2 candidates a pair, but model.correction.candidates = 3"),
        ({"correct": {"kind": "duration"}}, "set model.correction.heads to [duration, edit, cand"),
        (model_of("duration"), "is not trained by correct.kind = tag"),
        (
            {"model": {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*"}},
            "slots are answered at their own place; write 0",
        ),
        ({"model": {"hybrid_override_pattern": "*-"}}, "slots would not know their place"),
        ({"correct": {"kind": "soft"}, "parallel": {"cp": 2}}, "parallel.cp = 2 cannot be shared"),
        ({"correct": {"copies": 2}}, "correct.copies has no effect because correct.kind = tag"),
        ({"data": {"seq_len": 16}, "batch": {"global_tokens": 64}}, "is too short for"),
        ({"data": {"tokenizer": "embedded"}, "model": {"vocab_size": 20}}, "is too small"),
        ({"data": {"reset_documents": False}}, "pairs do not see each other"),
        ({"batch": {"global_tokens": 400}}, "is not a multiple of data.seq_len = 96"),
    ],
)
def test_a_mistake_is_one_sentence(
    place: PairPlace, capsys: pytest.CaptureFixture, changes: dict, said: str
) -> None:
    changes = {"batch": {"micro_batch": 1}, **changes}
    recipe = place.recipe("bad", **changes)
    capsys.readouterr()
    assert run(["train", str(recipe)]) == 2
    sentence = capsys.readouterr().err.strip()
    assert said in sentence
    assert len(sentence.splitlines()) == 1
    assert not (place.runs / "bad" / "checkpoints").exists()


def test_a_tokenizer_without_marks_is_refused(
    place: PairPlace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text((place.folder / "tokenizer.json").read_text().replace("<void>", "<hole>"))
    recipe = place.recipe("unmarked", data={"tokenizer": str(path)})
    capsys.readouterr()
    assert run(["train", str(recipe)]) == 2
    assert "<void>" in capsys.readouterr().err


def test_a_dry_run_refuses_another_end_of_text_as_training_does(place: PairPlace, capsys) -> None:
    recipe = str(place.recipe("ends"))
    for words in (["--dry-run"], []):
        assert run(["train", recipe, *words, "model.eos_token_id=3"]) == 2
        assert "but documents end with data.eod_token = " in capsys.readouterr().err
