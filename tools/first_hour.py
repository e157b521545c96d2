"""The first hour of a stranger: the wheel in fresh environments, used from empty folders, timed.

    python tools/first_hour.py FOLDER --python python3.13 [--python python3.11 ...]

Builds the wheel of this tree with the first Python, installs it for each one in an environment of
its own (FOLDER/3.13, used again if it is there), and trains, resumes, generates and exports from
an empty folder, and follows the README. Then each Python resumes a run that every other one began:
checkpoints must not depend on the version. Prints each command with its time, and what an
installation weighs on disk. --short leaves out the README, and the compilation of files that may
never be imported.
Exits with 1 at the first command that does something else than expected, and with 69 when the
package index is to blame: when it cannot be reached, or is too slow.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = "tiny/smoke"
STEPS, HALF = 6, 3
"""Of the recipe."""
PARAGRAPH = "The river runs to the sea, and the stone stays where it was. "
STOPPED = 75
"""Exit code of a run that can be resumed."""
UNREACHABLE = 69
"""Exit code when the package index is to blame."""
INSTALL_S, COMMAND_S = 1800.0, 900.0
"""Seconds of all calls of pip together, and of one command."""
NETWORK = re.compile(
    r"Max retries|Retrying \(|NewConnectionError|ReadTimeout|ProtocolError|"
    r"Incomplete(Read|Download)|SSLError|ProxyError|HTTP error (429|5\d\d)|"
    r"[45]\d\d (Client|Server) Error|Connection (reset|aborted|refused)"
)
"""What pip says when the network fails it."""


class Failed(Exception):
    """A command did something else than a stranger expects."""


class Unreachable(Exception):
    """The package index does not give what is asked for."""


@dataclass(frozen=True)
class Timed:
    """A command and its seconds."""

    where: str
    command: str
    seconds: float


@dataclass(frozen=True)
class Environment:
    """An installed package, and the empty folder from which it is used."""

    version: str
    folder: Path
    empty: Path
    """The folder in which commands run."""
    started: list[Timed] = field(default_factory=list)

    def run(
        self, *words: str, cwd: Path | None = None, code: int = 0, limit_s: float = COMMAND_S
    ) -> str:
        """Run a command of the environment; returns what it printed.

        Raises:
            Failed: when it exits with another code, or takes longer.
        """
        begin = time.monotonic()
        try:
            done = subprocess.run(
                [str(self.folder / "bin" / words[0]), *words[1:]],
                cwd=cwd or self.empty,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit_s,
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"{' '.join(words)} took more than {limit_s:.0f} s") from None
        said = " ".join(words) if code == 0 else f"{' '.join(words)}  (exit code {code})"
        self.started.append(Timed(self.version, said, time.monotonic() - begin))
        print(f"{self.started[-1].seconds:8.1f} s  {self.version}  {said}", flush=True)
        if done.returncode != code:
            raise Failed(f"{said} exited with {done.returncode}:\n{done.stdout}")
        return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", action="append", required=True, help="repeatable")
    parser.add_argument("--torch", default="torch", help="what pip installs first")
    parser.add_argument("--constraint", type=Path, help="versions of all that is installed")
    parser.add_argument("--installed", type=Path, help="an environment that is used as it is")
    parser.add_argument("--short", action="store_true", help="leave out what takes long")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    until = begin + INSTALL_S
    try:
        environments = [open_environment(options.installed, folder)] if options.installed else []
        wheel = build_wheel(options.python[0], folder, until)
        versions = [options.torch]
        if options.constraint is not None:
            versions += ["--constraint", str(options.constraint.resolve())]
        if options.short:
            versions.append("--no-compile")
        for python in options.python:
            environment = open_environment(folder / version_of(python), folder, python)
            install(environment, wheel, versions, environments, until)
            environments.append(environment)
        for environment in environments:
            use(environment)
            if not options.short:
                follow_readme(environment)
        cross(environments, folder)
    except Failed as error:
        sys.exit(f"first_hour.py: {error}")
    except Unreachable as error:
        print(f"first_hour.py: {error}", file=sys.stderr)
        sys.exit(UNREACHABLE)
    print(f"{time.monotonic() - begin:8.1f} s  in all")
    for environment in environments:
        print(f"{environment.version}: {weigh(environment.folder)}")


def build_wheel(python: str, folder: Path, until: float) -> Path:
    """Build the wheel from a copy of the tracked files, so that nothing is left in this tree."""
    source, wheels = folder / "source", folder / "wheels"
    for old in (source, wheels):
        shutil.rmtree(old, ignore_errors=True)
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    run_pip(until, python, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(source))
    return next(wheels.glob("*.whl"))


def install(
    environment: Environment,
    wheel: Path,
    versions: Sequence[str],
    others: Sequence[Environment],
    until: float,
) -> None:
    """Install the wheel with what its exports are checked with; torch first, as its page says.

    `versions` begins with torch; options of pip follow.
    """
    for other in others:
        share_cuda(other, environment)
    own = str(environment.folder / "bin" / "python")
    run_pip(until, own, "install", *versions)
    run_pip(until, own, "install", f"{wheel}[hf]", *versions[1:])
    run_pip(until, own, "install", "--no-deps", "--force-reinstall", str(wheel))


def open_environment(place: Path, folder: Path, python: str | None = None) -> Environment:
    """Return an environment with an empty folder; with `python`, made if it is not there."""
    place = place.absolute()
    if python is not None and not (place / "bin" / "python").exists():
        subprocess.run([python, "-m", "venv", str(place)], check=True)
    version = version_of(str(place / "bin" / "python"))
    empty = folder / f"empty-{version}"
    shutil.rmtree(empty, ignore_errors=True)
    empty.mkdir()
    return Environment(version, place, empty)


def version_of(python: str) -> str:
    """Return the version of an interpreter, such as 3.13."""
    asked = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.check_output([python, "-c", asked], text=True).strip()


def share_cuda(source: Environment, target: Environment) -> None:
    """Link the packages of CUDA, 3 GB that are the same for each Python, before pip is asked."""
    have, lack = (next(e.folder.glob("lib/python*/site-packages")) for e in (source, target))
    for package in have.glob("nvidia*"):
        if not (lack / package.name).exists():
            shutil.copytree(package, lack / package.name, copy_function=os.link)


def run_pip(until: float, python: str, *words: str) -> None:
    """Run pip, which ends before the clock `time.monotonic` shows `until`, and print its time.

    Raises:
        Unreachable: when the package index is to blame.
        Failed: when anything else is.
    """
    begin = time.monotonic()
    call = [python, "-m", "pip", "--disable-pip-version-check", words[0], "--quiet", *words[1:]]
    shown = f"{version_of(python)}  pip {' '.join(words)}"
    try:
        done = subprocess.run(
            call,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=max(0.0, until - begin),
        )
    except subprocess.TimeoutExpired:
        late = f"{shown} was not done when pip had run for {INSTALL_S:.0f} s in all"
        raise Unreachable(late) from None
    print(f"{time.monotonic() - begin:8.1f} s  {shown}", flush=True)
    if done.returncode:
        kind = Unreachable if NETWORK.search(done.stderr) else Failed
        raise kind(f"{shown} exited with {done.returncode}:\n{done.stderr}")


def use(environment: Environment) -> None:
    """Train, stop, resume, generate and export, from an empty folder.

    Raises:
        Failed: when a command fails or leaves out what it is for.
    """
    said = environment.run("nemotron", "--version")
    if not said.startswith("nemotron "):
        raise Failed(f"nemotron --version printed {said!r}")
    environment.run("nemotron", "recipe", "list")
    environment.run("nemotron", "train", RECIPE, "--dry-run")
    environment.run("nemotron", "train", RECIPE, "--stop-at", str(HALF), code=STOPPED)
    environment.run("nemotron", "train", "runs/smoke/recipe.yaml", "--resume")
    if len(losses(environment.empty / "runs" / "smoke")) != STEPS:
        raise Failed("the resumed run did not do every step once")
    prompt = ("--prompt", "def read(self):", "--max-new-tokens", "16", "--seed", "1")
    environment.run("nemotron", "generate", "runs/smoke", *prompt)
    said = environment.run("nemotron", "export", "runs/smoke", "--out", "exported/smoke")
    if "transformers" not in said:
        raise Failed(f"the export was not compared with transformers:\n{said}")
    texts = environment.empty / "texts"
    texts.mkdir()
    for number in range(20):
        text = "\n".join(f"{number} {line} {PARAGRAPH}" for line in range(40))
        (texts / f"{number}.txt").write_text(text)
    environment.run("nemotron", "train", RECIPE, "name=own", "data.sources=[texts/]")


MINE = """\
extends: smoke.yaml
name: mine
schedule: {peak: 2.0e-3}
checkpoint: {every_steps: 2, keep: 3}
"""
LOADED = """\
import torch
import nemotron
model = nemotron.load("runs/mine", device="cpu", dtype=torch.float32)
print(model.logits(model(torch.tensor([[5, 6, 7]]))).shape)
"""
OF_TRANSFORMERS = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("exported/mine", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained("exported/mine")
tokens = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=4)
print(tokenizer.decode(tokens[0]))
"""
TORCHRUN = "torchrun --standalone --nproc-per-node 2"
README: tuple[tuple[int, str], ...] = (
    (0, "nemotron recipe copy tiny/pretrain"),
    (0, "nemotron recipe copy tiny/smoke"),
    (0, "nemotron recipe show recipes/tiny/mine.yaml"),
    (0, "nemotron recipe check recipes/tiny/mine.yaml"),
    (0, "nemotron recipe diff recipes/tiny/smoke.yaml recipes/tiny/mine.yaml"),
    (0, "nemotron train recipes/tiny/mine.yaml --dry-run"),
    (2, "nemotron train recipes/tiny/mine.yaml schedule.peek=1e-3"),
    (STOPPED, "nemotron train recipes/tiny/mine.yaml --stop-at 3"),
    (0, "nemotron train runs/mine --resume"),
    (0, "nemotron train recipes/tiny/mine.yaml name=mine-2 schedule.peak=1e-3 seed=7"),
    (0, "nemotron train recipes/tiny/mine.yaml name=letters data.sources=[texts/]"),
    (0, "nemotron data inspect texts"),
    (0, "nemotron runs"),
    (0, "nemotron compare runs/mine runs/mine-2"),
    (0, "nemotron report runs/mine runs/mine-2 --out both.html"),
    (0, "nemotron train recipes/tiny/mine.yaml name=four precision=nvfp4"),
    (0, f"{TORCHRUN} -m nemotron train recipes/tiny/mine.yaml name=two"),
    (0, "nemotron plan super/pretrain_64xh100 --gpus 64 --hardware h100"),
    (0, "nemotron generate runs/mine --prompt def --max-new-tokens 8 --seed 1"),
    (0, "nemotron export runs/mine --out exported/mine"),
    (0, "python transformers_mine.py"),
    (0, "python load_mine.py"),
    (0, "nemotron import exported/mine --out runs/imported"),
    (0, "nemotron evaluate runs/mine"),
    (0, "nemotron merge runs/mine --out runs/merged"),
    (0, "nemotron quantize runs/mine --preset fp8 --rows 4 --out small"),
    (0, "nemotron doctor"),
)
"""Every command of the README with its exit code, on the smallest recipe."""


def follow_readme(environment: Environment) -> None:
    """Give every command of the README, from the empty folder in which `use` made texts.

    Raises:
        Failed: when a command fails.
    """
    home = environment.empty
    for folder in ("recipes", "runs/mine", "exported/mine", "small"):
        shutil.rmtree(home / folder, ignore_errors=True)
    (home / "transformers_mine.py").write_text(OF_TRANSFORMERS)
    (home / "load_mine.py").write_text(LOADED)
    for code, command in README:
        if command.startswith("nemotron recipe show"):
            (home / "recipes" / "tiny" / "mine.yaml").write_text(MINE)
        environment.run(*command.split(), code=code)


def cross(environments: Sequence[Environment], folder: Path) -> None:
    """Begin a run with each version and end it with each other one.

    Raises:
        Failed: when a run cannot be resumed, or comes to another loss.
    """
    for first in environments:
        for second in environments:
            if first is second:
                continue
            home = folder / f"crossed-{first.version}-{second.version}"
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir()
            first.run("nemotron", "train", RECIPE, "--stop-at", str(HALF), cwd=home, code=STOPPED)
            second.run("nemotron", "train", RECIPE, "--resume", cwd=home)
            crossed, alone = losses(home / "runs" / "smoke"), losses(first.empty / "runs" / "smoke")
            # builds of torch for two versions may link other libraries of matrix products
            if len(crossed) != STEPS or abs(crossed[-1] - alone[-1]) > 1e-3:
                raise Failed(f"begun in {first.version}, ended in {second.version}: {crossed}")
            print(f"losses of {home.name} differ by {max(map(abs, differences(crossed, alone)))}")


def differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Return the differences of two lists."""
    return [a - b for a, b in zip(first, second, strict=True)]


def losses(run: Path) -> list[float]:
    """Return the loss of every step in the metrics of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss/total"] for record in records if record["kind"] == "train"]


def weigh(folder: Path) -> str:
    """Say what an environment takes on disk: in all, and its largest packages."""
    packages = next(folder.glob("lib/python*/site-packages"))
    sizes = {path.name: size_of(path) for path in packages.iterdir()}
    largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:6]
    listed = ", ".join(f"{name} {sizes[name] / 1e9:.2f}" for name in largest)
    own = sizes.get("nemotron", 0)
    return f"{size_of(folder) / 1e9:.2f} GB on disk ({listed}); nemotron {own / 1e6:.1f} MB"


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if not file.is_dir() or file.is_symlink())


if __name__ == "__main__":
    main()
