"""The tuning base: what is looked up, what a damaged file does, that only speed depends on it."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from nemotron.errors import UserError
from nemotron.ops.rms_norm import triton as rms_norm
from nemotron.ops.routing import copies_triton as token_copies
from nemotron.ops.tuning import base
from nemotron.ops.tuning.base import Base, Entry
from nemotron.ops.tuning.tunable import Tunable
from nemotron.precision.formats import E4M3
from nemotron.precision.kernels import quantize_fp8
from nemotron.sol.sizes import SIZES, Rows
from nemotron.tune import __main__ as command
from nemotron.tune.candidates import moves, order
from nemotron.tune.compiled import Compiled, Job
from nemotron.tune.problems import PROBLEMS, Target, sizes_of, targets
from nemotron.tune.search import Search
from nemotron.tune.timing import Timed, Timer, difference
from nemotron.tune.verify import verify

ARCH = "sm00"
"""Of no GPU, so that nothing is shipped for it."""
TINY = replace(SIZES["tiny"], usual=Rows(1, 32), expert_input=32)
KERNEL = Tunable(
    "op",
    "launch",
    (),
    ("rows", "width"),
    {"warps": 4, "stages": 2},
    {"warps": (2, 4, 8), "stages": (1, 2, 3)},
    by_dtype={torch.float64: {"warps": 2, "stages": 1}},
)


interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="where there is a GPU, kernels do not take a CPU's tensors"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give each test a cache folder of its own; returns the place of this user's file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    base.known.cache_clear()
    yield base.user_file(ARCH)
    base.known.cache_clear()


def entry(warps: int, rows: int = 64, width: int = 128, **changes: object) -> Entry:
    values: dict[str, object] = {
        "operation": "op", "launch": "launch", "axes": {"rows": rows, "width": width},
        "dtype": "float32", "configuration": {"warps": warps, "stages": 3}, "time_us": 10.0,
        "default_us": 12.0, "floor_us": 8.0, "binds": "memory", "error": 0.0, "registers": 64,
        "shared_bytes": 0, "device": "none", "triton": "3.6.0", "torch": "2.11.0",
        "date": "2026-11-26", "commit": "abc", "repetitions": 24,
    }  # fmt: skip
    return Entry(**{**values, **changes})


def looked_up(rows: int, width: int, dtype: torch.dtype = torch.float32) -> int:
    with base.assume(ARCH):
        return KERNEL.at(torch.empty(1, dtype=dtype), rows, width)["warps"]


def test_an_exact_bucket_wins_then_the_nearest_then_the_default(own_cache: Path):
    base.write(
        own_cache,
        Base(architecture=ARCH, entries=(entry(2, rows=64), entry(8, rows=512, width=128))),
    )
    assert looked_up(64, 128) == looked_up(33, 65) == 2  # what is rounded up to the bucket
    assert looked_up(512, 100) == 8
    assert looked_up(65, 128) == 2  # one bucket from 64, two from 512
    assert looked_up(1024, 256) == 8
    assert looked_up(1 << 14, 128) == 4  # too far from either
    assert looked_up(64, 128, torch.bfloat16) == 4  # nothing is known of this dtype
    assert looked_up(64, 128, torch.float64) == 2  # which has a default of its own


def test_without_a_gpu_launches_are_the_defaults():
    assert KERNEL.at(torch.empty(1), 64, 128) == {"warps": 4, "stages": 2}


def test_a_users_own_file_wins_over_the_shipped_one(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shipped = tmp_path / "shipped.json"
    base.write(shipped, Base(architecture=ARCH, entries=(entry(2), entry(2, rows=4096))))
    monkeypatch.setattr(base, "shipped_file", lambda architecture: shipped)
    assert looked_up(64, 128) == 2
    base.write(own_cache, Base(architecture=ARCH, entries=(entry(8),)))
    base.known.cache_clear()
    assert looked_up(64, 128) == 8
    assert looked_up(4096, 128) == 2  # exact in the shipped one, which is nearer


def test_entries_that_the_kernel_does_not_know_are_passed_over(own_cache: Path):
    strange = entry(64), entry(2, axes={"rows": 64}), entry(2, configuration={"warps": 2})
    base.write(own_cache, Base(architecture=ARCH, entries=strange))
    assert looked_up(64, 128) == 4


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "the file: Invalid JSON"),
        ('{"version": 2, "architecture": "sm00"}', "version: Input should be 1"),
        ('{"version": 1, "architecture": "sm00", "entries": [{}]}', "entries.0.operation: Field"),
        ('{"version": 1, "architecture": "sm99"}', "architecture = sm99 is not sm00"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_damaged_file_of_the_user_is_left_out_and_named(
    own_cache: Path, content: str | bytes, why: str
):
    own_cache.parent.mkdir(parents=True)
    own_cache.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=why) as raised:
        base.read(own_cache, ARCH)
    assert str(own_cache) in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.warns(UserWarning, match="tuning is left out: .*sm00.json"):
        assert looked_up(64, 128) == 4


def test_a_file_reads_as_it_was_written(own_cache: Path):
    written = Base(architecture=ARCH, entries=(entry(2), entry(8, rows=8)))
    base.write(own_cache, written)
    assert base.read(own_cache, ARCH) == written
    assert json.loads(own_cache.read_text())["version"] == 1


@pytest.mark.parametrize("path", sorted(Path(base.__file__).parent.glob("*.json")), ids=str)
def test_the_shipped_file_has_the_schema_and_launches_that_exist(path: Path):
    found = base.read(path, path.stem)
    tunables = {(t.operation, t.launch): t for p in PROBLEMS for t in p.tunables}
    seen = set()
    for one in found.entries:
        key = (one.operation, one.launch, one.dtype, tuple(one.axes.items()))
        assert key not in seen, key
        seen.add(key)
        tunable = tunables[one.operation, one.launch]
        assert tunable.accepts(one.configuration), key
        assert tuple(one.axes) == tunable.axes, key
        assert all(size == 1 << base.bucket(size) for size in one.axes.values()), key


def test_defaults_are_among_what_may_be_tried():
    for problem in PROBLEMS:
        for tunable in problem.tunables:
            assert tunable.accepts(tunable.default(torch.bfloat16)), tunable.name


def test_a_look_up_is_a_matter_of_a_microsecond():
    x = torch.empty(1)
    KERNEL._found[x.device, x.dtype, 6, 7] = {"warps": 4}
    table = Path(__file__)

    def seconds(call: Callable[[], object]) -> float:
        begin = time.thread_time()
        for _ in range(1000):
            call()
        return time.thread_time() - begin

    # it takes about 1 us, and to open a file about 10 us: nothing is read or searched each time
    looked_up, opened = (
        min(seconds(call) for _ in range(5))
        for call in (lambda: KERNEL.at(x, 64, 128), lambda: table.open().close())
    )
    assert looked_up < opened / 2
    KERNEL._found.clear()


def run_some() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 40, generator=g), torch.randn(40, generator=g)
    leaves = [t.requires_grad_() for t in (x, weight)]
    y = rms_norm.rms_norm(*leaves, 1e-5)
    token = torch.tensor([0, 3, 1, 1])
    place, starts = torch.tensor([0, 2, 3, 1]), torch.tensor([0, 1, 3, 3, 4])
    copies = token_copies.token_copies(y, token, place, starts, "copy")
    copies.square().sum().backward()
    return [copies.detach(), *(t.grad for t in leaves if t.grad is not None)]


@interpreted
def test_removing_the_files_changes_speed_only(own_cache: Path):
    without = run_some()
    rows_width = {"rows": 8, "width": 64}
    tuned = Base(
        architecture=ARCH,
        entries=(
            entry(2, operation="rms_norm", launch="forward", axes=rows_width,
                  configuration={"elements": 2048, "warps": 2}),
            entry(2, operation="rms_norm", launch="backward", axes=rows_width,
                  configuration={"elements": 2048, "warps": 2, "stages": 1, "programs": 1}),
            entry(2, operation="token_copies", launch="copy", axes=rows_width,
                  configuration={"columns": 256, "warps": 2, "rows": 1}),
        ),
    )  # fmt: skip
    base.write(own_cache, tuned)
    with base.assume(ARCH):
        assert rms_norm.FORWARD.at(torch.empty(1), 5, 40)["elements"] == 2048
        assert token_copies.COPY.at(torch.empty(1), 4, 40)["rows"] == 1
        found = run_some()
    # float32 sums of 5 rows and 40 columns, which may be added in another order
    for a, b in zip(found, without, strict=True):
        assert torch.allclose(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.slow
@interpreted
def test_the_width_of_tiles_changes_no_code():
    x = torch.randn(3, 130, 200, generator=torch.Generator().manual_seed(0))
    given = torch.tensor([0.5, 1.0, 3.0])

    def codes() -> list[torch.Tensor]:
        found = quantize_fp8.quantize(x, E4M3, quantize_fp8.BY_SCALE, given=given)
        assert found.row is not None
        assert found.columnwise is not None
        return [part.elements.view(torch.uint8) for part in (found.row, found.columnwise)]

    default = codes()
    for width in quantize_fp8.QUANTIZE.space["width"]:
        with quantize_fp8.QUANTIZE.forced({"width": width, "warps": 4}):
            assert all(map(torch.equal, codes(), default)), width


def test_candidates_begin_at_the_default_and_near_shapes_and_never_repeat():
    known = {"warps": 8, "stages": 3}
    found = list(order(KERNEL, KERNEL.default(torch.float32), [known], "memory"))
    assert found[:2] == [{"warps": 4, "stages": 2}, known]
    assert found[2] == {"warps": 8, "stages": 2}  # memory: first one more of each
    assert len(found) == len({tuple(c.values()) for c in found}) == 9
    assert found == list(order(KERNEL, KERNEL.default(torch.float32), [known], "memory"))


def test_products_are_tried_with_fewer_warps_and_more_stages_first():
    found = list(moves(KERNEL, {"warps": 4, "stages": 2}, "compute"))
    assert found[:2] == [{"warps": 2, "stages": 2}, {"warps": 4, "stages": 3}]


class Everything:
    """A compiler that finds nothing wrong but three stages, which spill."""

    def __init__(self) -> None:
        self.asked: list[Job] = []

    def compile(self, jobs: Sequence[Job], until: float) -> dict[int, Compiled]:
        self.asked += jobs
        return {
            number: Compiled(64, 16 if c["stages"] == 3 else 0, 1024, (str(c),))
            for number, (_, c) in enumerate(jobs)
        }


class Clock:
    """A device on which 8 warps take 8 us, and 4, which is the default, 10."""

    name = "a stand-in"

    def __init__(self, wrong: int = 0) -> None:
        self.wrong = wrong

    def begin(self, target: Target) -> Timed:
        return self.capture(KERNEL.default(torch.float32))

    def end(self) -> None:
        pass

    def capture(self, configuration: base.Mapping[str, int]) -> Timed:
        error = 1.0 if configuration["warps"] == self.wrong else 0.0
        place = (torch.device("cpu"), torch.float32, 6, 7)
        return Timed(configuration, [], error, place, 1e6)

    def time(self, candidates: Sequence[Timed], repetitions: int) -> None:
        for c in candidates:
            us = {2: 9.9, 4: 10.0, 8: 8.0}[c.configuration["warps"]]
            c.times_us += [us + 0.1 * (i % 3) for i in range(repetitions)]

    def floor(self, timed: Timed) -> tuple[float, base.Binds]:
        return 6.0, "memory"


def search(clock: Clock, found: Base) -> Search:
    target = Target(PROBLEMS[0], KERNEL, TINY)
    one = Search([target], found, clock, Everything(), lambda line: None, lambda kept: None)
    one.run(5)
    return one


def test_a_search_keeps_what_is_clearly_better_and_what_it_learned():
    found = search(Clock(), Base(architecture=ARCH)).found
    (kept,) = found.entries
    assert kept.configuration["warps"] == 8
    assert (kept.time_us, kept.default_us, kept.axes) == (8.1, 10.1, {"rows": 64, "width": 128})
    lessons = " ".join(lesson.text for lesson in found.lessons)
    assert "3 stages spills 16 bytes" in lessons
    again = search(Clock(), found).found
    assert again.entries == found.entries  # the same search finds nothing better than its entry


def test_a_candidate_that_is_wrong_or_hardly_better_is_not_kept():
    (kept,) = search(Clock(wrong=8), Base(architecture=ARCH)).found.entries
    assert kept.configuration == {"warps": 4, "stages": 2}  # 2 warps are better by 0.1 us only


def test_an_operation_that_fails_does_not_end_the_search():
    class Broken(Clock):
        def begin(self, target: Target) -> Timed:
            if target.tunable is not KERNEL:
                raise RuntimeError("out of memory")
            return super().begin(target)

    said: list[str] = []
    chosen = [Target(PROBLEMS[0], t, TINY) for t in (PROBLEMS[0].tunables[0], KERNEL)]
    found = Base(architecture=ARCH)
    one = Search(chosen, found, Broken(), Everything(), said.append, lambda kept: None)
    one.run(5)
    assert [e.operation for e in one.found.entries] == ["op"]
    assert "ERROR ssd gradients_of_heads: RuntimeError: out of memory" in said


def test_verify_finds_slower_and_wrong_entries():
    slower = Base(architecture=ARCH, entries=(entry(2, configuration={"warps": 4, "stages": 1}),))
    chosen = [Target(PROBLEMS[0], KERNEL, TINY)]

    class Slow(Clock):
        def time(self, candidates: Sequence[Timed], repetitions: int) -> None:
            for c in candidates:
                c.times_us += [12.0 if c.configuration["stages"] == 1 else 10.0] * repetitions

    assert "SLOWER" in verify(chosen, slower, Slow(), print)[0]
    wrong = Base(architecture=ARCH, entries=(entry(8, configuration={"warps": 8, "stages": 1}),))
    assert "WRONG" in verify(chosen, wrong, Clock(wrong=8), print)[0]
    assert verify(chosen, wrong, Clock(), print) == []


@pytest.mark.slow
@interpreted
def test_a_launch_is_taken_out_of_its_operation_and_compared():
    timer = Timer(torch.device("cpu"))
    (target,) = targets("token_copies copy", [TINY])
    default = timer.begin(target)
    other = timer.capture({"columns": 256, "warps": 2, "rows": 1})
    assert (default.error, other.error, other.calls) == (0.0, 0.0, 1)
    assert default.asked[2:] == (6, 5)  # 64 copies of 32 columns
    # x and rows in bfloat16, and the token of each row
    assert other.bytes == 32 * 32 * 2 + 64 * 32 * 2 + 64 * 8
    timer.time([default, other], 2)
    assert len(other.times_us) == 2


def test_bits_must_agree_where_no_sum_is_reordered():
    a, b = torch.ones(4), torch.ones(4) * (1 + 1e-6)
    assert difference([a], [a], reordered=False) == 0
    assert difference([b], [a], reordered=False) == float("inf")
    assert 0 < difference([b], [a], reordered=True) < 1e-5
    assert difference([a * float("nan")], [a], reordered=True) == float("inf")


def test_a_recipe_gives_the_sizes_of_its_model():
    recipe = Path(__file__).parents[2] / "recipes/nano/pretrain.yaml"
    found = sizes_of(str(recipe))
    assert (found.hidden, found.channels, found.projected) == (2688, 6144, 10304)
    assert (found.expert_width, found.copies, found.vocab) == (1856, 6, 131072)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_every_problem_asks_for_its_launches(problem):
    from nemotron.tune.compiled import launches_replaced
    from nemotron.tune.problems import Draw

    # on meta tensors nothing runs, and this is what is compiled for
    with launches_replaced(lambda *_, **__: None):
        for tunable in problem.tunables:
            with tunable.forced(tunable.default(torch.bfloat16)) as asked:
                problem.draw(SIZES["nano"], Draw(torch.device("meta"), 0))()
            assert asked, tunable.name


@pytest.mark.slow
def test_candidates_are_compiled_without_a_gpu(capsys: pytest.CaptureFixture[str]):
    words = ["rms_norm forward", "--compile-only", "--candidates", "2", "--processes", "1"]
    assert command.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("rms_norm forward: 8192 elements, 8 warps: ")
    assert lines[0].endswith(" shared: fine")


def test_what_cannot_be_tuned_is_named(capsys: pytest.CaptureFixture[str]):
    assert command.main(["rms", "--compile-only"]) == 2
    assert (
        "operation = rms is unknown; use all or one of adamw, causal_conv1d"
        in capsys.readouterr().err
    )
    if not torch.cuda.is_available():
        assert command.main(["rms_norm"]) == 2
        assert "torch finds no CUDA device" in capsys.readouterr().err
