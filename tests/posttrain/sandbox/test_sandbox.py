"""What programs can do inside of the sandbox, and every attack that it has to contain."""

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from nemotron.errors import UserError
from nemotron.posttrain.sandbox import bwrap, seccomp
from nemotron.posttrain.sandbox.bwrap import find_isolation
from nemotron.posttrain.sandbox.config import SandboxConfig
from nemotron.posttrain.sandbox.run import Outcome, Run, Sandbox, SandboxFailed
from tests.support.namespaces import isolated

FAST = SandboxConfig(time_s=1.5, total_s=3)

PATIENCE_S = 50.0
"""What is not ended here takes a minute, or for ever."""


def attack(code: str, config: SandboxConfig = FAST) -> Outcome:
    """Return what one run of a program wrote, which has to end by itself or be ended."""
    [outcome] = Sandbox(config).run(code, [Run()])
    assert outcome is not None
    return outcome


def tries(*attempts: str, before: str = "") -> str:
    """Return a program that prints, for each statement, whether it succeeded."""
    lines = [before]
    for number, attempt in enumerate(attempts):
        lines += ["try:", f"    {attempt}", f"    print({number}, 'succeeded')"]
        lines += ["except (Exception, SystemExit) as e:", f"    print({number}, 'failed')"]
    return "\n".join(lines)


def assert_all_failed(code: str, count: int) -> None:
    outcome = attack(code)
    assert outcome.stdout.split("\n")[:-1] == [f"{n} failed" for n in range(count)], outcome


@isolated
def test_programs_read_their_input_and_functions_are_called():
    code = "import sys, math, json, collections\nprint(sys.stdin.read()[::-1])"
    outcomes = Sandbox().run(code, [Run("abc"), Run("é中\n"), Run("")])
    assert [each.stdout for each in outcomes if each] == ["cba\n", "\n中é\n", "\n"]
    code = "class Solution:\n def add(self, a, b):\n  print('noise')\n  return [a + b]"
    [one, two] = Sandbox().run(
        code, [Run(arguments=(1, 2)), Run(arguments=("a", "b"))], function="add"
    )
    assert one
    assert two
    assert (one.stdout, one.stderr, two.stdout) == ("[3]", "noise\n", '["ab"]')
    failed = attack("1 / 0")
    assert (failed.status, failed.reason) == (1, "end")
    assert "ZeroDivisionError" in failed.stderr


@isolated
def test_the_network_is_out_of_reach():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        before = "import socket\nsocket.setdefaulttimeout(1)"
        code = tries(
            f"socket.create_connection(('127.0.0.1', {port}))",
            "socket.create_connection(('1.1.1.1', 53))",
            "socket.getaddrinfo('example.com', 80)",
            before=before,
        )
        assert_all_failed(code, 3)


@isolated
def test_a_fork_bomb_stays_small_and_ends():
    code = """
import os, time
count = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(60)
        count += 1
except OSError:
    print(count)
"""
    outcome = attack(code)
    assert 1 <= int(outcome.stdout) < FAST.processes
    started = time.monotonic()
    bomb = attack("import os\nwhile True:\n try:\n  os.fork()\n except OSError:\n  pass")
    assert bomb.reason == "time" or bomb.status != 0
    assert time.monotonic() - started < PATIENCE_S


@isolated
def test_memory_is_limited():
    outcome = attack("try:\n x = bytearray(3 * 2**30)\nexcept MemoryError:\n print('refused')")
    assert outcome.stdout == "refused\n"


@isolated
def test_disk_is_limited_and_nothing_else_can_be_written():
    code = """
import os
def fill(folder, size):
    done = 0
    for number in range(100):
        try:
            with open(f"{folder}/{number}", "wb") as file:
                done += file.write(b"x" * size)
        except OSError:
            break
    return done
print(fill("/tmp", 2**20), fill("/dev/shm", 2**16), fill("/", 1), fill("/dev", 1), fill("/usr", 1))
"""
    outcome = attack(code, SandboxConfig(time_s=4, disk_mib=16))
    sizes = list(map(int, outcome.stdout.split()))
    assert 8 * 2**20 <= sizes[0] <= 16 * 2**20
    assert 0 < sizes[1] <= 2**20
    assert sizes[2:] == [0, 0, 0]
    large = attack("open('f', 'wb').write(b'x' * 11 * 2**20)")
    assert large.status != 0


@isolated
def test_links_do_not_lead_out(tmp_path: Path):
    (tmp_path / "secret").write_text("secret")
    own = Path(__file__).resolve()
    attempts = [
        f"os.symlink({str(path)!r}, 'a{number}'); open('a{number}').read()"
        for number, path in enumerate((tmp_path / "secret", own, "/etc/passwd", "/etc/hostname"))
    ]
    attempts += [f"open('/proc/1/root{own}').read()", f"open('/tmp/../..{own}').read()"]
    attempts += ["os.listdir('/home')", "os.listdir('/root')", "os.listdir('/etc')"]
    assert_all_failed(tries(*attempts, before="import os"), len(attempts))


@isolated
def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOKEN_OF_A_USER", "hunter2-secret")
    code = """
import os, glob
print(sorted(os.environ))
for path in glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/cmdline"):
    try:
        print(open(path).read())
    except OSError:
        pass
"""
    outcome = attack(code)
    assert "TOKEN_OF_A_USER" not in outcome.stdout
    assert "hunter2-secret" not in outcome.stdout
    names = ["HOME", "LANG", "PATH", "PWD", "PYTHONDONTWRITEBYTECODE"]
    assert outcome.stdout.split("\n")[0] == str(names)


@isolated
def test_nothing_outside_is_written(tmp_path: Path):
    tmp_path.chmod(0o777)
    target = tmp_path / "file"
    target.write_text("before")
    target.chmod(0o666)
    attempts = [
        f"open({str(target)!r}, 'w').write('after')",
        f"os.remove({str(target)!r})",
        "open('/usr/bin/own', 'w')",
        "open('/etc/own', 'w')",
        "open('/own', 'w')",
        "open('/proc/sys/kernel/hostname', 'w').write('own')",
        "open('/proc/sysrq-trigger', 'w').write('x')",
        "os.mkdir('/home')",
    ]
    assert_all_failed(tries(*attempts, before="import os"), len(attempts))
    assert target.read_text() == "before"


@isolated
@pytest.mark.parametrize("victim", ["os.getppid()", "-1", "1"])
def test_a_program_that_kills_its_parent_harms_only_itself(victim: str):
    code = f"import os, time\nos.kill({victim}, 9)\ntime.sleep(0.5)\nprint('alive')"
    outcomes = Sandbox(FAST).run(code, [Run(), Run()])
    assert len(outcomes) == 2
    assert attack("print(1)").stdout == "1\n"


@isolated
def test_a_stopped_launcher_is_ended_from_outside():
    started = time.monotonic()
    code = "import os, signal, time\nos.kill(os.getppid(), signal.SIGSTOP)\ntime.sleep(60)"
    assert Sandbox(SandboxConfig(time_s=0.5, total_s=0.5)).run(code, [Run()]) == [None]
    assert time.monotonic() - started < PATIENCE_S


@isolated
def test_lines_that_a_program_writes_in_place_of_the_launcher_are_not_a_fault():
    code = """
import os
with open(f"/proc/{os.getppid()}/fd/1", "w") as file:
    file.write("nonsense\\n[1]\\n{\\"stdout\\": 3}\\n")
"""
    outcomes = Sandbox(FAST).run(code, [Run()] * 2)
    assert len(outcomes) == 2


@isolated
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_flood_of_output_is_ended(stream: str):
    started = time.monotonic()
    code = f"import sys\nwhile True:\n    sys.{stream}.write('x' * 100_000)"
    outcome = attack(code)
    assert outcome.reason == "output"
    assert len(getattr(outcome, stream)) == FAST.output_kib * 1024
    assert time.monotonic() - started < PATIENCE_S


@isolated
def test_a_child_that_sleeps_on_delays_nothing_and_is_ended():
    code = """
import subprocess, sys
sleep = "import time; time.sleep(600)"
subprocess.Popen([sys.executable, "-c", sleep, "left-behind"], start_new_session=True)
print("done")
"""
    started = time.monotonic()
    outcome = attack(code)
    assert outcome.stdout == "done\n"
    assert outcome.reason == "end"
    assert time.monotonic() - started < PATIENCE_S
    assert not processes_with(b"left-behind")


@isolated
def test_an_endless_loop_is_ended_and_the_next_run_takes_place():
    code = "if input():\n    while True: pass\nprint('end')"
    started = time.monotonic()
    [loop, other] = Sandbox(SandboxConfig(time_s=0.5)).run(code, [Run("x\n"), Run("\n")])
    assert loop
    assert other
    assert (loop.reason, other.reason, other.stdout) == ("time", "end", "end\n")
    assert time.monotonic() - started < PATIENCE_S


@isolated
def test_runs_beyond_the_total_time_do_not_take_place():
    config = SandboxConfig(time_s=1.0, total_s=1.9)  # the second begins, the third does not
    outcomes = Sandbox(config).run("while True: pass", [Run()] * 5)
    assert [outcome is None for outcome in outcomes] == [False, False, True, True, True]


@isolated
def test_more_rights_cannot_be_had():
    calls = [
        "os.setuid(0)",
        "os.chroot('/tmp')",
        "check(libc.unshare(0x10000000))",
        "check(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))",
        "check(libc.setns(0, 0))",
        "resource.setrlimit(resource.RLIMIT_NPROC, (1000, 1000))",
        "resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))",
        "os.nice(-5)",
    ]
    before = """
import ctypes, os, resource
libc = ctypes.CDLL(None)
def check(result):
    if result != 0:
        raise OSError
"""
    assert_all_failed(tries(*calls, before=before), len(calls))


@isolated
def test_it_does_not_run_as_root_and_sees_its_own_processes_only():
    code = "import os\nprint(os.getuid(), len([p for p in os.listdir('/proc') if p.isdigit()]))"
    user, count = map(int, attack(code).stdout.split())
    assert user != 0
    assert count <= 4


@isolated
@pytest.mark.skipif(seccomp.find_binding() is None, reason="no binding of libseccomp")
def test_denied_system_calls_fail_with_a_filter():
    # keyctl (250 on x86-64), which no namespace or capability denies
    if os.uname().machine != "x86_64":
        pytest.skip("the number of the call is that of x86-64")
    code = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    code += "print(libc.syscall(250, 0, -3, 1), ctypes.get_errno())"
    assert attack(code).stdout == "-1 1\n"
    assert "with a filter" in Sandbox().describe()


def processes_with(word: bytes) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word in path.read_bytes().split(b"\0"):
                found.append(str(path))
        except OSError:
            continue
    return found


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that puts another program in the place of bubblewrap."""

    def put(path: str) -> None:
        monkeypatch.setattr(bwrap.shutil, "which", lambda name: path or None)
        find_isolation.cache_clear()

    yield put
    monkeypatch.undo()
    find_isolation.cache_clear()


def test_without_bubblewrap_it_refuses_and_says_how_to_install_it(
    elsewhere: Callable[[str], None],
):
    elsewhere("")
    with pytest.raises(UserError, match="bubblewrap is not installed; install it with: apt-get"):
        Sandbox()


@pytest.mark.skipif(sys.platform != "linux", reason="no namespaces")
def test_where_namespaces_are_forbidden_it_refuses_with_the_reason(
    elsewhere: Callable[[str], None], tmp_path: Path
):
    program = Path("/bin/false")
    elsewhere(str(program))
    with pytest.raises(UserError, match=r"cannot isolate \(status 1\); allow namespaces"):
        Sandbox()


def test_no_isolation_has_to_be_allowed_by_the_environment(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="set NEMOTRON_ALLOW_UNSAFE_CODE=1"):
        Sandbox(SandboxConfig(kind="none"))
    with pytest.raises(ValidationError, match="allow_unsafe_code"):
        SandboxConfig.model_validate({"kind": "none", "allow_unsafe_code": True})
    monkeypatch.setenv("NEMOTRON_ALLOW_UNSAFE_CODE", "1")
    sandbox = Sandbox(SandboxConfig(kind="none", time_s=2))
    [outcome] = sandbox.run("print(input())", [Run("x")])
    assert outcome
    assert outcome.stdout == "x\n"
    assert "no isolation" in sandbox.describe()


def test_a_sandbox_that_does_not_start_is_a_fault(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NEMOTRON_ALLOW_UNSAFE_CODE", "1")
    sandbox = Sandbox(SandboxConfig(kind="none"))
    monkeypatch.setattr("nemotron.posttrain.sandbox.run.sys.executable", "/bin/false")
    with pytest.raises(SandboxFailed, match="did not start"):
        sandbox.run("print(1)", [Run()])
