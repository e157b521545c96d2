import pytest
import torch

from nemotron.checkpoint.background import HostMemory


@pytest.mark.gpu
def test_copies_from_a_gpu_lie_in_pinned_memory_that_is_used_again():
    memory = HostMemory()
    values = {"a": torch.randn(300, 7, device="cuda"), "b": torch.zeros((), device="cuda")}
    first = memory.copy(values)
    assert all(torch.equal(first[name], tensor.cpu()) for name, tensor in values.items())
    assert first["a"].is_pinned()
    values["a"].neg_()
    second = memory.copy(values)
    assert second["a"].data_ptr() == first["a"].data_ptr()
    assert torch.equal(second["a"], values["a"].cpu())


def test_copies_of_what_lies_on_the_host_are_its_own():
    value = torch.randn(3)
    copied = HostMemory().copy({"a": value})["a"]
    value.zero_()
    assert copied.abs().sum() > 0
