"""What the comparison of ranks says, on invented reports."""

from dataclasses import replace

import pytest

from nemotron.doctor.report import RankReport, differences, remarks, report, spell


def invented(rank: int, **changes) -> RankReport:
    """Return the report of one of two ranks on each machine."""
    values = {
        "rank": rank,
        "local_rank": rank % 2,
        "host": f"node{rank // 2}",
        "device": "Some GPU, 80 GiB",
        "device_id": f"gpu-{rank}",
        "device_count": 2,
        "cores": 16,
        "threads": 8,
        "open_files": 65536,
        "memory_gib": 500.0,
        "disk_gib": 100.0,
        "shared_gib": 250.0,
        "master": "10.0.0.1",
        "versions": {"python": "3.12.1", "torch": "2.13.0"},
    }
    return RankReport(**(values | changes))


def test_equal_ranks_on_two_machines_do_not_differ():
    assert list(differences([invented(rank) for rank in range(4)])) == []
    assert list(remarks([invented(rank) for rank in range(4)])) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"versions": {"python": "3.12.1", "torch": "2.12.0"}},
            "torch differs: 2.13.0 on ranks 0-2; 2.12.0 on rank 3.",
        ),
        (
            {"versions": {"python": "3.12.1"}},
            "torch differs: 2.13.0 on ranks 0-2; missing on rank 3.",
        ),
        (
            {"versions": {"python": "3.12.1", "torch": "2.13.0", "mamba-ssm": "2.3"}},
            "mamba-ssm differs: missing on ranks 0-2; 2.3 on rank 3.",
        ),
        (
            {"device": "Other GPU, 40 GiB"},
            "The device differs: Some GPU, 80 GiB on ranks 0-2; Other GPU, 40 GiB on rank 3.",
        ),
        (
            {"device_count": 1},
            "The number of GPUs that a rank sees differs: 2 on ranks 0-2; 1 on rank 3.",
        ),
        ({"cores": 3}, "The number of cores differs: 16 on ranks 0-2; 3 on rank 3."),
        ({"threads": 1}, "The number of threads differs: 8 on ranks 0-2; 1 on rank 3."),
        (
            {"open_files": -1},
            "The limit of open files differs: 65536 on ranks 0-2; none on rank 3.",
        ),
        (
            {"device_id": "gpu-2"},
            "Ranks 2-3 on node1 use the same GPU; give each its own LOCAL_RANK.",
        ),
        (
            {"clock_s": -2.5},
            "The clock of rank 0 on node0 is 2.5 s ahead of that of rank 3 on node1; "
            "synchronize them.",
        ),
    ],
)
def test_each_difference_is_one_sentence(changes: dict, sentence: str):
    reports = [invented(0), invented(1), invented(2), replace(invented(3), **changes)]
    assert list(differences(reports)) == [sentence]


def test_a_rank_without_its_gpu_is_told_what_it_sees():
    lost = invented(1, device="none", device_id="", device_count=1, local_rank=1)
    sentences = list(differences([lost]))
    assert sentences == [
        "Rank 1 on node0 has LOCAL_RANK 1, but sees 1 GPUs; "
        "let every rank of a machine see all of its GPUs."
    ]


def test_clocks_within_a_second_are_fine():
    assert list(differences([invented(0), invented(1, clock_s=0.9)])) == []


def test_what_is_little_everywhere_is_a_remark_and_no_difference():
    reports = [invented(rank, open_files=1024, shared_gib=0.0625) for rank in range(2)]
    assert list(differences(reports)) == []
    files, shared = remarks(reports)
    assert files.startswith("Ranks 0-1 may open 1024 files at a time")
    assert "0.06 GiB free in /dev/shm" in shared


def test_ranks_are_spelled_in_runs():
    assert spell([7, 0, 2, 1, 9, 10]) == "0-2, 7, 9-10"
    assert spell([4]) == "4"


def test_a_report_of_this_machine_names_versions_and_addresses():
    own = report(3, 1, "localhost")
    assert own.rank == 3
    assert own.master == "127.0.0.1"
    assert {"python", "torch", "nemotron"} <= own.versions.keys()
    assert own.cores >= 1
    assert own.memory_gib > 0
    assert "unknown" in report(0, 0, "no-such-host.invalid").master
