"""Which device a process takes, and the measure of its speed."""

import pytest
import torch

from nemotron import device
from nemotron.device import find_device, measure_matmul_peak
from nemotron.errors import UserError


@pytest.mark.parametrize("name", ["gpu", "cpu:1", "cuda:99", "", "cuda:x"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"device = {name} is not on this machine; use auto, cpu"):
        find_device(name)


def test_a_machine_without_a_gpu_says_where_the_reason_stands(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="use auto, cpu \\(`nemotron doctor` says why"):
        find_device("cuda", 0)


def test_auto_is_the_gpu_when_there_is_one() -> None:
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_process_beyond_the_gpus_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="local rank 2 has no GPU: there are 2 here"):
        find_device("auto", 2)


def test_the_measured_peak_is_what_a_product_of_that_size_reaches() -> None:
    peak = measure_matmul_peak(torch.device("cpu"), torch.float32, seconds=0.05)
    assert 1e8 < peak < 1e14


def test_bfloat16_is_measured_as_it_is_multiplied(monkeypatch) -> None:
    seen: list[torch.dtype] = []
    product = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda a, b, out: seen.append(a.dtype) or product(a, b, out=out)
    )
    monkeypatch.setattr(device, "cpu_multiplies_bfloat16", lambda: False)
    measure_matmul_peak(torch.device("cpu"), torch.bfloat16, seconds=0.0)
    assert set(seen) == {torch.float32}
