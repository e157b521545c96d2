"""Every quantizer against vectors that public references computed, by the tool for any folder.

The vectors: NVIDIA/TransformerEngine 2.20.0.dev0 (d0067d0d) and pytorch/ao 0.19.0 (36027d82), run
unchanged on a CPU with torch 2.13.0; each file's metadata names its reference.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parents[2] / "tools" / "check_golden.py"
    spec = importlib.util.spec_from_file_location("check_golden", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_golden"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", FILES)
def test_every_bit_is_that_of_the_reference(tool, name: str):
    compared, differences = tool.check_file(GOLDEN / f"{name}.safetensors")
    assert not differences, "\n".join(map(str, differences))
    assert compared >= 6


def test_the_tool_accepts_the_vectors_and_names_each_difference(tool, tmp_path: Path, capsys):
    shutil.copy(GOLDEN / "mxfp8_2d_e4m3.safetensors", tmp_path)
    assert tool.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == "mxfp8_2d_e4m3.safetensors: 12 tensors, 0 differ\n"
    tensors = load_file(tmp_path / "mxfp8_2d_e4m3.safetensors")
    tensors["heavy.codes"][3, 5] ^= 1
    tensors["normal.row.scales"] = tensors["normal.row.scales"][:, :1].contiguous()
    tensors["normal.extra"] = torch.zeros(1)
    save_file(tensors, tmp_path / "mxfp8_2d_e4m3.safetensors")
    assert tool.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "mxfp8_2d_e4m3.safetensors: heavy: codes: 1 of 2048 values differ",
        "mxfp8_2d_e4m3.safetensors: normal: row.scales: "
        "is torch.uint8 [32, 2], must be torch.uint8 [32, 1]",
        "mxfp8_2d_e4m3.safetensors: normal: extra: was not compared with anything",
        "mxfp8_2d_e4m3.safetensors: 12 tensors, 3 differ",
    ]


def test_a_folder_that_cannot_be_checked_is_told(tool, tmp_path: Path, capsys):
    assert tool.main([]) == 2
    assert tool.main([str(tmp_path)]) == 2
    (tmp_path / "nvfp4_1x16.safetensors").write_bytes(b"nothing")
    assert tool.main([str(tmp_path)]) == 2
    assert "nvfp4_1x16.safetensors cannot be read" in capsys.readouterr().err
    (tmp_path / "nvfp4_1x16.safetensors").unlink()
    save_file({"a.x": torch.zeros(1)}, tmp_path / "int3.safetensors")
    assert tool.main([str(tmp_path)]) == 1
    assert "int3.safetensors: no check is known" in capsys.readouterr().out
