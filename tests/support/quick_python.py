"""A `python` for launchers under test: what they start with `-m` is forked, not started anew.

The launcher, its signals and exit codes are real; only the seconds of importing torch are saved.
"""

import atexit
import contextlib
import ctypes
import functools
import json
import multiprocessing
import os
import runpy
import selectors
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
from pathlib import Path

from tests.support import forked, quick_client
from tests.support.quick_client import FORWARDED, SERVER


def environment() -> dict[str, str]:
    """Return the variables that make `python`, and torchrun's ranks, quick."""
    folder = _served()
    return {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHON_EXEC": str(folder / "python"),  # read by torchrun
        SERVER: str(folder / "socket"),
    }


@functools.cache
def _served() -> Path:
    """Return the folder of the program and of its server's socket, which is there until the end."""
    folder = Path(tempfile.mkdtemp(prefix="quick-"))
    words = shlex.join([sys.executable, "-I", "-S", quick_client.__file__])
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    program.chmod(0o755)
    ready = multiprocessing.get_context("forkserver").Event()
    server = forked.start(_serve, folder / "socket", ready)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.kill)
    assert ready.wait(240)
    return folder


def _serve(path: Path, ready: threading.Event) -> None:
    import torch.distributed.launcher.api  # noqa: F401 (of torchrun: once, for all that are forked)

    events = selectors.DefaultSelector()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        parent = multiprocessing.parent_process()
        assert parent is not None
        events.register(parent.sentinel, selectors.EVENT_READ, lambda: os._exit(0))
        events.register(
            listener, selectors.EVENT_READ, lambda: _accept(events, listener.accept()[0])
        )
        ready.set()
        while True:
            for key, _ in events.select():
                # else it ended with the one before
                if any(known is key for known in events.get_map().values()):
                    key.data()


def _accept(events: selectors.BaseSelector, client: socket.socket) -> None:
    header, streams, _, _ = socket.recv_fds(client, 8, 3)
    data, size = b"", int.from_bytes(header, "big")
    while len(data) < size and (more := client.recv(size - len(data))):
        data += more
    if not data or len(data) < size:  # the program was killed before it had asked
        for stream in streams:
            os.close(stream)
        client.close()
        return
    if not (pid := os.fork()):
        _become(json.loads(data), streams)
    for stream in streams:
        os.close(stream)
    process = os.pidfd_open(pid)
    with contextlib.suppress(OSError):  # else `end` sees that the program was killed
        client.sendall(str(pid).encode())

    def end() -> None:
        """Report how it ended, be it because its program was killed."""
        for source in (process, client):
            events.unregister(source)
        signal.pidfd_send_signal(process, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError):  # nobody waits for it
            client.sendall(str(code).encode())
        client.close()
        os.close(process)

    for source in (process, client):
        events.register(source, selectors.EVENT_READ, end)


def _become(request: dict, streams: list[int]) -> None:
    """Be the process that was asked for, to its end."""
    atexit._clear()
    code = 1
    try:
        _set_streams(streams)
        _set_signals(request["ignored"])
        _run(request)
        code = 0
    except SystemExit as ending:
        code = _exit_code(ending)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code & 0xFF)


def _set_streams(streams: list[int]) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (open to the end)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, closefd=False, errors="backslashreplace")  # noqa: SIM115


def _set_signals(ignored: list[int]) -> None:
    os.setsid()  # who signals the group of the program reaches the process through it alone
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    if signal.SIGINT not in ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(request: dict) -> None:
    with open(request["network"]) as network:
        if os.stat(network.fileno()).st_ino != os.stat("/proc/self/ns/net").st_ino:
            assert ctypes.CDLL(None).setns(network.fileno(), forked.CLONE_NEWNET) == 0
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if not request["safe_path"]:
        sys.path.insert(0, request["folder"])
    sys.argv = [request["module"], *request["arguments"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def _exit_code(ending: SystemExit) -> int:
    if ending.code is None or isinstance(ending.code, int):
        return ending.code or 0
    print(ending.code, file=sys.stderr)
    return 1
