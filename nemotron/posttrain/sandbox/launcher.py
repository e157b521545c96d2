"""Runs a program several times inside of the sandbox, and reports what each run wrote.

This file is passed to an interpreter as text, and imports the standard library alone. It receives
inputs but no expected outputs: whatever the program does to it, there is nothing to learn.
"""

import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from typing import Any

# calls a function of the program; what the program prints goes to the errors
CALL = """
import json, os, sys
answer = os.dup(1)
os.dup2(2, 1)
name, arguments = json.load(sys.stdin)
sys.path.insert(0, os.getcwd())
import solution
owner = solution if hasattr(solution, name) else solution.Solution()
result = json.dumps(getattr(owner, name)(*arguments))
with os.fdopen(answer, "w") as file:
    file.write(result)
"""


def main() -> None:
    """Answer the job on standard input with one line for each run."""
    job = json.load(sys.stdin)
    with open("solution.py", "w", encoding="utf-8", errors="replace") as file:
        file.write(job["code"])
    report({"is_ready": True})
    end = time.monotonic() + job["total_s"]
    for run in job["runs"]:
        if time.monotonic() >= end:
            break
        report(execute(job, run))


def report(found: dict[str, Any]) -> None:
    """Write one line."""
    print(json.dumps(found), flush=True)


def execute(job: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """Return outputs and status of one run of the program."""
    command, text = [sys.executable, "-I", "-S"], run["stdin"]
    if job["function"] is None:
        command += ["solution.py"]
    else:
        command += ["-c", CALL]
        text = json.dumps([job["function"], run["arguments"]])
    with open("input", "w+", encoding="utf-8", errors="replace", newline="") as given:
        given.write(text)
        given.seek(0)
        process = subprocess.Popen(
            command,
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=lambda: limit(job),
        )
    try:
        return watch(process, job)
    finally:
        clear(process, job["is_isolated"])


def limit(job: dict[str, Any]) -> None:
    """Limit what this process and its children may use."""
    mib = 2**20
    limits = {
        resource.RLIMIT_AS: job["memory_mib"] * mib,
        resource.RLIMIT_CPU: max(1, int(job["time_s"] + 0.999)),
        resource.RLIMIT_FSIZE: job["file_mib"] * mib,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_STACK: 64 * mib,
    }
    if job["is_isolated"]:  # counts the processes of the user, so all of them elsewhere
        limits[resource.RLIMIT_NPROC] = job["processes"]
    for kind, value in limits.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def watch(process: "subprocess.Popen[bytes]", job: dict[str, Any]) -> dict[str, Any]:
    """Collect the outputs until the process ends, writes too much or takes too long.

    Its end counts, not that of the outputs: a child that lives on may hold them open.
    """
    end, most = time.monotonic() + job["time_s"], job["output_kib"] * 1024
    found = {"stdout": b"", "stderr": b""}
    reason = ""
    with selectors.DefaultSelector() as selector:
        for name in found:
            pipe = getattr(process, name)
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ, name)
        while not reason:
            has_ended = process.poll() is not None
            for key, _ in selector.select(0 if has_ended else 0.02):
                part = getattr(process, key.data).read(65536)
                if not part:
                    selector.unregister(key.fileobj)
                found[key.data] += part or b""
            if max(map(len, found.values())) > most:
                reason = "output"
            elif has_ended:
                reason = "end"
            elif time.monotonic() > end:
                reason = "time"
    texts = {name: part[:most].decode(errors="replace") for name, part in found.items()}
    return {**texts, "status": process.returncode, "reason": reason}


def clear(process: "subprocess.Popen[bytes]", is_isolated: bool) -> None:
    """End the program and whatever it started."""
    try:
        if is_isolated:
            os.kill(-1, signal.SIGKILL)  # all others of this namespace, in whatever session
        else:
            os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


if __name__ == "__main__":
    main()
