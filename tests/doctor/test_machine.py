"""What the doctor says of this machine."""

import pytest
import torch

from nemotron.cli import run
from nemotron.ops.apply import ALL


def test_the_doctor_names_device_versions_and_every_backend(capsys: pytest.CaptureFixture):
    assert run(["doctor"]) == 0
    output = capsys.readouterr().out
    assert torch.__version__ in output
    for operation in ALL:
        assert operation.name in output
        for backend in operation.backends:
            assert backend.name in output
    # exactly one backend of each operation is in use
    assert sum("used " in line and "slower" not in line for line in output.splitlines()) == len(ALL)


def test_a_missing_package_comes_with_the_line_that_installs_it(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    import importlib.metadata

    known = importlib.metadata.version

    def version(name: str) -> str:
        if name == "trackio":
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert run(["doctor"]) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "trackio" in x)
    assert "missing" in line
    assert "pip install 'nemotron-train[track]'" in line
