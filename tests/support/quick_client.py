"""`python -m MODULE` without its start: the module runs in a process forked from a server.

This program stands for that process: it hands over arguments, environment, folder and streams,
forwards signals, and ends as the process does. Killed, it takes the process along. Any other
command line is that of Python itself. It imports next to nothing, and begins in 15 ms.
"""

import json
import os
import signal
import socket
import sys

SERVER = "QUICK_PYTHON"
"""The variable with the place of the server's socket."""

FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def main() -> int:
    words = sys.argv[1:]
    safe_path = "-P" in words[:2]
    while words[:1] in (["-P"], ["-u"]):
        words.pop(0)
    if words[:1] != ["-m"]:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    ignored = [number for number in FORWARDED if signal.getsignal(number) is signal.SIG_IGN]
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    request = {
        "module": words[1],
        "arguments": words[2:],
        "folder": os.getcwd(),
        "safe_path": safe_path,
        "environment": dict(os.environ),
        "ignored": ignored,
        "network": f"/proc/{os.getpid()}/ns/net",
    }
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ[SERVER])
        data = json.dumps(request).encode()
        socket.send_fds(server, [len(data).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(data)
        pid = int(server.recv(32))
        for number in FORWARDED:
            signal.signal(number, lambda given, _: os.kill(pid, given))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        answer = server.recv(32)
    if not answer:
        sys.exit("the server of quick processes has ended")
    code = int(answer)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main())
