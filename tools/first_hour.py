"""The first hour of a stranger: the wheel in fresh environments, used from empty folders, timed.

    python tools/first_hour.py FOLDER --python python3.13 [--python python3.11 ...]

Builds the wheel of this tree with the first Python, installs it for each one in an environment of
its own (FOLDER/3.13, used again if it is there), and trains, resumes, generates and exports from
an empty folder, and follows the README. Then each Python resumes a run that every other one began:
checkpoints must not depend on the version. Prints each command with its time, and what an
installation weighs on disk.
Exits with 1 at the first command that does something else than expected. Needs a package index.
"""

import argparse
import json
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


class Failed(Exception):
    """A command did something else than a stranger expects."""


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
    started: list[Timed] = field(default_factory=list)

    @property
    def empty(self) -> Path:
        """The folder in which commands run."""
        return self.folder.with_name(f"empty-{self.version}")

    def run(self, *words: str, cwd: Path | None = None, code: int = 0) -> str:
        """Run a command of the environment; returns what it printed.

        Raises:
            Failed: when it exits with another code.
        """
        begin = time.monotonic()
        done = subprocess.run(
            [str(self.folder / "bin" / words[0]), *words[1:]],
            cwd=cwd or self.empty,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
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
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        wheel = build_wheel(options.python[0], folder)
        environments = [install(python, wheel, options.torch, folder) for python in options.python]
        for environment in environments:
            use(environment)
            follow_readme(environment)
        cross(environments, folder)
    except Failed as error:
        sys.exit(f"first_hour.py: {error}")
    for environment in environments:
        print(f"{environment.version}: {weigh(environment.folder)}")


def build_wheel(python: str, folder: Path) -> Path:
    """Build the wheel from a copy of the tracked files, so that nothing is left in this tree."""
    source, wheels = folder / "source", folder / "wheels"
    for old in (source, wheels):
        shutil.rmtree(old, ignore_errors=True)
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", str(wheels), str(source)], check=True)
    return next(wheels.glob("*.whl"))


def install(python: str, wheel: Path, torch: str, folder: Path) -> Environment:
    """Install the wheel with what its exports are checked with; torch first, as its page says."""
    asked = "import sys; print('%d.%d' % sys.version_info[:2])"
    version = subprocess.check_output([python, "-c", asked], text=True).strip()
    environment = Environment(version, folder / version)
    if not (environment.folder / "bin" / "python").exists():
        subprocess.run([python, "-m", "venv", str(environment.folder)], check=True)
    shutil.rmtree(environment.empty, ignore_errors=True)
    environment.empty.mkdir()
    pip = ("pip", "--disable-pip-version-check", "install", "--quiet")
    environment.run(*pip, torch)
    environment.run(*pip, f"{wheel}[hf]")
    environment.run(*pip, "--no-deps", "--force-reinstall", str(wheel))
    return environment


def use(environment: Environment) -> None:
    """Do what the README shows, from an empty folder.

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
