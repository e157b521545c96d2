"""A checkpoint of any layout is read in any other: the same bits, rows and losses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_layouts import laid_out

from nemotron.checkpoint.find import SAVING
from tests.support.cases import mostly_nightly
from tests.support.layout_run import (
    find,
    joined,
    load_and_go_on,
    save_after,
    save_where_one_rank_has_no_room,
)
from tests.support.pool import Pool

pytestmark = pytest.mark.distributed

NUM_STEPS = 3

# layouts by the number of their ranks
MOVES: list[tuple[tuple[int, dict[str, Any]], tuple[int, dict[str, Any]]]] = [
    ((1, {}), (4, {})),
    ((4, {}), (2, {})),
    ((2, {}), (1, {})),
    ((4, {"ep": 2}), (1, {})),
    ((4, {"tp": 2}), (2, {})),
    ((1, {}), (2, {"tp": 2, "ep": 2})),
    ((2, {"pp": 2}), (1, {})),
    ((4, {"pp": 2, "ep": 2}), (4, {"cp": 2, "dp_replicate": 2})),
]


@pytest.fixture
def run(pair: Pool, four: Pool):
    def on(world: int, function: Any, *arguments: Any) -> list[Any]:
        if world == 1:
            return [function(*arguments)]
        return {2: pair, 4: four}[world].run(function, *arguments)

    return on


@pytest.mark.parametrize(
    ("before", "after"),
    mostly_nightly(MOVES, MOVES[2], MOVES[4], MOVES[7]),
    ids=lambda move: f"{move[0]}{move[1]}",
)
def test_another_layout_goes_on(run, values: dict, tmp_path: Path, before: tuple, after: tuple):
    torch.set_num_threads(1)
    (world, layout), (next_world, next_layout) = before, after
    folder = tmp_path / "checkpoints"
    old = joined(run(world, save_after, laid_out(values, layout), NUM_STEPS, folder, False))
    reference = load_and_go_on(values, folder, NUM_STEPS)[1]
    results = run(next_world, load_and_go_on, laid_out(values, next_layout), folder, NUM_STEPS)
    new = joined([loaded for loaded, _ in results])
    assert new.keys() == old.keys()
    assert [name for name in new if not torch.equal(new[name], old[name])] == []
    for number, (loss, _, ids) in enumerate(reference):
        by_reader = {seen[number][1]: seen[number][2] for _, seen in results}
        assert [id for reader in sorted(by_reader) for id in by_reader[reader]] == ids
        for _, seen in results:
            # float32 sums in another order
            assert seen[number][0] == pytest.approx(loss, rel=1e-5)


def test_training_goes_on_while_a_checkpoint_of_two_ranks_is_written(
    pair: Pool, values: dict, tmp_path: Path
):
    saved = joined(pair.run(save_after, values, NUM_STEPS, tmp_path / "checkpoints", True))
    loaded, _ = load_and_go_on(values, tmp_path / "checkpoints", 0)
    found = joined([loaded])
    assert [name for name in found if not torch.equal(found[name], saved[name])] == []


def test_where_one_rank_has_no_room_all_keep_the_old_checkpoint_and_train_on(
    pair: Pool, values: dict, tmp_path: Path
):
    folder = tmp_path / "checkpoints"
    (said, loss), (_, same) = pair.run(save_where_one_rank_has_no_room, values, folder)
    assert "step-00000002 was not saved: File too large" in said
    assert loss == same
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    assert pair.run(find, folder) == [(1, ())] * 2


def test_a_damaged_part_of_one_rank_sends_all_to_the_checkpoint_before(
    pair: Pool, values: dict, tmp_path: Path
):
    together = tmp_path / "checkpoints"
    for num_steps in (1, 2, 3):
        pair.run(save_after, values, num_steps, together, False)
    flipped = together / "step-00000002" / "rank-00001.safetensors"
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    (together / "step-00000003" / "manifest.json").unlink()
    (together / f"{SAVING}step-00000004-0a1b2c3d").mkdir()
    for step, skipped in pair.run(find, together):
        assert step == 1
        half, uncommitted, damaged = skipped
        assert half.startswith("step-00000004 is incomplete")
        assert uncommitted.startswith("step-00000003 is damaged (has no manifest.json")
        assert damaged == (
            "step-00000002 is damaged (the content of rank-00001.safetensors does not match its "
            "hash); skipped"
        )
