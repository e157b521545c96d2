"""Stage 1: which machine this is, and what the project finds on it."""

import platform
import subprocess
import sys

import torch
from stage import ROOT, Stage, one_line, parser

QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit"


def main() -> None:
    stage = Stage("versions", parser(__doc__).parse_args())
    with stage.attempt("device"):
        values = {"python": platform.python_version(), "torch": torch.__version__}
        values["cuda"] = str(torch.version.cuda)
        with stage.attempt("triton"):
            import triton

            values["triton"] = triton.__version__
        if stage.clock.is_gpu:
            found = torch.cuda.get_device_properties(0)
            values["device"] = f"{found.name}, {found.multi_processor_count} SMs"
            values["memory_gib"] = f"{found.total_memory / 2**30:.1f}"
            values["nvidia_smi"] = _output(
                ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
            )
        stage.emit("device", **values)
    with stage.attempt("doctor"):
        text = _output([sys.executable, "-m", "nemotron", "doctor"])
        (stage.out / "doctor.txt").write_text(text)
        used = [" ".join(line.split()) for line in text.splitlines() if " used " in line]
        stage.emit("doctor", lines=len(text.splitlines()), used=len(used))


def _output(command: list[str]) -> str:
    try:
        ran = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return one_line(error)
    return (ran.stdout + ran.stderr).strip()


if __name__ == "__main__":
    main()
