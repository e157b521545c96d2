"""Pairs as batches: what a step takes, what it leaves out, and reading twice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.errors import UserError
from nemotron.generate.forward import new_cache
from nemotron.model.cached_rows import CachedRows
from nemotron.posttrain.correct.batches import PairBatches
from nemotron.posttrain.correct.config import CorrectConfig, CorrectOptions
from nemotron.posttrain.correct.layout import ANSWER, RUN, Specials, lay_out, prefix
from nemotron.posttrain.correct.stage import CorrectionData
from tests.support.models import build
from tests.support.pairs import PairPlace, make_rows, marks, write_shard


def batches_of(
    place: PairPlace, reader: int = 0, num_readers: int = 1, **changes: Any
) -> PairBatches:
    config = CorrectConfig.model_validate(place.values("batches", **changes))
    data = CorrectionData(config)
    return PairBatches(config, data.sources, data.specials, reader=reader, num_readers=num_readers)


def num_runs(batch: Batch) -> int:
    """Return the slots that are answered by runs, over those that are answered at all."""
    runs = int((batch.extras[RUN] != NO_LABEL).sum())
    return runs / (runs + int((batch.labels != NO_LABEL).sum()))


def test_in_the_first_steps_more_right_tokens_are_answered_by_runs(place: PairPlace) -> None:
    options = {"first_steps": 1, "first_pseudo_errors": 1.0, "pseudo_errors": 0.0}
    batches = batches_of(place, correct={"kind": "soft", **options})
    assert num_runs(batches.take(0)) == 1
    assert 0 < num_runs(batches.take(1)) < 0.7


def test_readers_share_the_rows_of_one(place: PairPlace) -> None:
    whole = batches_of(place, correct={"kind": "soft"}).take(0)
    parts = [batches_of(place, n, 2, correct={"kind": "soft"}).take(0) for n in (0, 1)]
    assert torch.equal(whole.input_ids, torch.cat([part.input_ids for part in parts]))
    assert torch.equal(whole.extras[ANSWER], torch.cat([part.extras[ANSWER] for part in parts]))


def test_a_pass_takes_each_pair_once_and_the_next_one_in_another_order(place: PairPlace) -> None:
    batches = batches_of(place, correct={"kind": "tag", "mask_rate": 0.0})
    [source] = batches._sources.values()
    first, second = (
        [source.pair(epoch * 300 + n)[0].target.tobytes() for n in range(300)] for epoch in (0, 1)
    )
    assert sorted(first) == sorted(second)
    assert first != second


def test_other_places_of_a_pair_are_hidden_in_each_pass_and_the_same_ones_after_a_resume(
    place: PairPlace,
) -> None:
    batches = batches_of(place, correct={"kind": "tag", "mask_rate": 0.3})
    [source] = batches._sources.values()
    options, specials = CorrectOptions(mask_rate=0.3), Specials(1, 2, marks())

    def hidden(number: int) -> dict[bytes, list[int]]:
        row, random = source.pair(number)
        example = lay_out(row, options, specials, random, 0.0)
        assert example is not None
        places = (example.columns[:, 0] == specials.marks.mask).nonzero()[0]
        return {row.columns.tobytes(): places.tolist()}

    first, second, again = (
        {key: places for n in numbers for key, places in hidden(n).items()}
        for numbers in (range(300), range(300, 600), range(300))
    )
    assert first == again
    assert first.keys() == second.keys()
    # of about seven tokens each with probability 0.3, seldom the same ones twice
    assert sum(first[key] == second[key] for key in first) < 0.5 * len(first)


def test_several_sources_have_their_shares(place: PairPlace, tmp_path: Path) -> None:
    write_shard(tmp_path / "more/train", make_rows(50, 2, seed=7))
    values = place.values("shares")
    known = values["data"]["sources"][0] | {"weight": 3.0}
    sources = [known, {"name": "more", "path": str(tmp_path / "more")}]
    batches = batches_of(place, data={"sources": sources})
    for step in range(8):
        batches.take(step)
    taken = batches.state()["pairs"]["taken"]
    assert taken["pairs"] / sum(taken.values()) == pytest.approx(0.75, abs=0.02)


def test_a_pair_that_no_row_holds_with_its_slots_is_counted(place: PairPlace) -> None:
    changes = {"data": {"seq_len": 44}, "batch": {"global_tokens": 88, "micro_batch": 1}}
    options = {"kind": "soft", "pseudo_errors": 1.0}
    batches = batches_of(place, correct=options, **changes)
    for step in range(20):
        batch = batches.take(step)
        assert batch.input_ids.shape == (2, 44)
    assert batches.metrics(20)["correct/too_long"] > 0


def test_pairs_that_fit_nowhere_are_refused_rather_than_searched_for_ever(
    place: PairPlace, tmp_path: Path
) -> None:
    rows = [row for row in make_rows(60, 2) if row.num_columns == 10][:3]
    write_shard(tmp_path / "long/train", rows)
    sources = [{"name": "pairs", "path": str(tmp_path / "long")}]
    data = {"sources": sources, "seq_len": 36}
    batches = batches_of(
        place,
        data=data,
        batch={"global_tokens": 36, "micro_batch": 1},
        correct={"kind": "soft", "pseudo_errors": 1.0},
    )
    with pytest.raises(UserError, match="none of 3 pairs fits"):
        batches.take(0)


def test_a_checkpoint_of_other_pairs_is_refused(place: PairPlace, tmp_path: Path) -> None:
    saved = batches_of(place).state()
    write_shard(tmp_path / "other/train", make_rows(30, 2, seed=5))
    other = batches_of(
        place, data={"sources": [{"name": "pairs", "path": str(tmp_path / "other")}]}
    )
    with pytest.raises(UserError, match="other pairs in pairs"):
        other.restore(saved, 2)
    with pytest.raises(UserError, match="a run without pairs"):
        other.restore({"taken": 1}, 2)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({}, "taken is missing"),
        ({"taken": {}, "infeasible": 0, "too_long": 0}, "taken.pairs is missing"),
        ({"taken": {"pairs": -1}}, "taken.pairs = -1"),
        ({"taken": {"pairs": "7"}}, "taken.pairs = '7'"),
        ({"taken": {"pairs": 7}, "infeasible": None}, "infeasible = None"),
        ([], "must be a valid dictionary"),
    ],
)
def test_a_damaged_count_of_pairs_is_refused(place: PairPlace, damage: Any, said: str) -> None:
    batches = batches_of(place)
    with pytest.raises(UserError, match=said):
        batches.restore(batches.state() | {"pairs": damage}, 2)
    with pytest.raises(UserError, match="other pairs in pairs"):
        batches.restore(batches.state() | {"sources": damage}, 2)


def test_a_source_that_the_recipe_left_out_is_forgotten(place: PairPlace) -> None:
    batches = batches_of(place)
    batches.take(0)
    saved = batches.state()
    progress = saved["pairs"] | {"taken": saved["pairs"]["taken"] | {"other": 3}}
    again = batches_of(place)
    again.restore(saved | {"pairs": progress}, 1)
    assert again.state() == saved
    assert torch.equal(again.take(1).input_ids, batches.take(1).input_ids)


def test_slots_read_the_whole_source_and_nothing_behind_them() -> None:
    model = build(
        vocab_size=64,
        hybrid_override_pattern="M*-M*-",
        num_nextn_predict_layers=0,
        mtp_hybrid_override_pattern=None,
        correction={"candidates": 2},
    )
    source, slots = np.arange(40, 58).reshape(9, 2), torch.tensor([[50, 51, 52, 53]])
    specials = Specials(1, 2, marks())

    def answers(columns: np.ndarray, own: torch.Tensor, *, cached: bool) -> torch.Tensor:
        before = torch.from_numpy(prefix(columns, 2, specials)).unsqueeze(0)
        alike = own.unsqueeze(2).expand(-1, -1, 2)
        with torch.no_grad():
            if not cached:
                both = torch.cat([before, alike], 1)
                return model(both[:, :, 0], candidates=both)[:, -own.shape[1] :]
            cache = new_cache(model, 1)
            rows = CachedRows(cache, [cache.admit()])
            model(before[:, :, 0], cache=rows, candidates=before)
            return model(own, cache=rows)

    plain = answers(source, slots, cached=False)
    torch.testing.assert_close(answers(source, slots, cached=True), plain, rtol=1e-9, atol=1e-9)
    changed = source.copy()
    changed[-1, 1] = 60
    assert (answers(changed, slots, cached=False) - plain)[:, 0].abs().max() > 1e-3
    later = slots.clone()
    later[0, -1] = 60
    assert torch.equal(answers(source, later, cached=False)[:, :-1], plain[:, :-1])
