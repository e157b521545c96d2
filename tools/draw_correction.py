"""Draw the figures of docs/correction.md from runs.

    python tools/draw_correction.py masks.svg --masks runs/correction-table
    python tools/draw_correction.py gate.svg --gate runs/correct-languages
    python tools/draw_correction.py bits.svg --bits runs/correct-ungated runs/correct-languages

--masks draws the correction F0.5 that tools/correction_table.py measured over the mask rate, with
the standard error over its seeds. --gate and --bits read texts that switch, drawn anew from the
verse of tools/two_languages.py, and average over all switches.
"""

import argparse
import json
import math
import random
import statistics
from pathlib import Path

import numpy as np
import torch
from correction_arms import ARMS
from jaxtyping import Float, Int
from torch import Tensor
from two_languages import parts, switching

from nemotron.drawing.chart import HEIGHT, Line, line_chart
from nemotron.drawing.colors import standalone
from nemotron.drawing.series import Series
from nemotron.files import write_text
from nemotron.loading import load_with_tokenizer
from nemotron.model.hybrid import HybridLM

BEFORE, AFTER = 12, 24
"""Characters before and after a switch."""
TEXTS = 300
TITLES = {
    "masks": ("Correction F0.5 over the share of right tokens that are hidden", "mask rate"),
    "gate": ("Probability of the language that begins at 0", "characters after the switch"),
    "bits": ("Bits of a character around a switch of languages", "characters after the switch"),
}


def mask_line(folder: Path) -> Line:
    """Return F0.5 over the mask rate, the mean of the seeds of correction_table.py."""
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    found = {(each["arm"], each["seed"]): each for each in lines}
    rates = {arm.name: mask_rate(arm.settings) for arm in ARMS if "mask" in arm.name}
    points = []
    for name, rate in sorted(rates.items(), key=lambda item: item[1]):
        values = [each["correction_f0.5"] for (arm, _), each in found.items() if arm == name]
        if values:
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
            points.append((rate, statistics.fmean(values), error))
            print(f"mask rate {rate}: F0.5 {points[-1][1]:.4f} ± {error:.4f}, {len(values)} seeds")
    x, y, errors = np.array(points, np.float64).reshape(-1, 3).T
    return Line("F0.5", Series(x, y), 0, has_dots=True, errors=errors)


def mask_rate(settings: tuple[str, ...]) -> float:
    """Return the rate that an arm sets, else that of the recipe."""
    given = [word.partition("=")[2] for word in settings if word.startswith("correct.mask_rate=")]
    return float(given[0]) if given else 0.2


def averaged(folder: Path, name: str) -> Series:
    """Return what a run gives on average at each place around a switch, none near two switches."""
    model, tokenizer = load_with_tokenizer(folder)
    pieces, rng = parts(), random.Random(99)
    sums, counts = np.zeros(BEFORE + AFTER), np.zeros(BEFORE + AFTER)
    for _ in range(TEXTS):
        first, second = rng.sample(pieces, 2)
        text, turns = switching(first, second, rng)
        ids = torch.tensor([tokenizer.encode(text)])
        assert ids.shape[1] == len(text), "the tokenizer is one of characters"
        values = gate_of(model, ids) if name == "gate" else bits_of(model, ids)[:, None]
        begins = [begin for begin, _ in turns]
        ends = [*begins[1:], len(text)]
        for (before, _), (begin, language), end in zip(turns, turns[1:], ends[1:], strict=False):
            places = np.arange(max(before, begin - BEFORE), min(end, begin + AFTER, len(text)))
            column = language if name == "gate" else 0
            np.add.at(sums, places - begin + BEFORE, values[places, column])
            np.add.at(counts, places - begin + BEFORE, 1)
    means = sums / counts
    shown = {place: round(float(means[place + BEFORE]), 3) for place in (-4, -1, 0, 1, 4, 8, 16)}
    print(f"{folder.name}, {name} by characters after the switch: {shown}")
    return Series(np.arange(-BEFORE, AFTER).astype(np.float64), means)


@torch.inference_mode()
def gate_of(model: HybridLM, ids: Int[Tensor, "1 T"]) -> Float[np.ndarray, "T G"]:
    """Return the probability of each language at each token."""
    assert model.language is not None, "give a run with model.language_experts"
    read: list[Tensor] = []
    first = model.backbone.layers[model.language.first_layer]
    handle = first.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    model(ids)
    handle.remove()
    choice, _ = model.language.choose(read[0])
    return choice.shares.double().numpy()


@torch.inference_mode()
def bits_of(model: HybridLM, ids: Int[Tensor, "1 T"]) -> Float[np.ndarray, " T"]:
    """Return the bits of each token after those before it; those of the first are unknown."""
    logprobs = model.logits(model(ids)).double().log_softmax(-1)[0, :-1]
    found = -logprobs.gather(1, ids[0, 1:, None])[:, 0] / math.log(2)
    return np.concatenate([[np.nan], found.numpy()])


def main() -> None:
    """Draw one figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="SVG file to write")
    figure = parser.add_mutually_exclusive_group(required=True)
    figure.add_argument("--masks", type=Path, metavar="FOLDER", help="of correction_table.py")
    figure.add_argument("--gate", type=Path, nargs="+", metavar="RUN", help="languages.yaml")
    figure.add_argument("--bits", type=Path, nargs="+", metavar="RUN", help="any of both recipes")
    given = parser.parse_args()
    name = next(name for name in TITLES if getattr(given, name))
    title, x_label = TITLES[name]
    if given.masks:
        lines = [mask_line(given.masks)]
    else:
        runs: list[Path] = given.gate or given.bits
        lines = [Line(run.name, averaged(run, name), color) for color, run in enumerate(runs)]
    svg = line_chart(lines, title=title, x_label=x_label)
    legend = {line.label: f"c{line.color}" for line in lines}
    write_text(given.out, standalone(svg, HEIGHT, title, legend))


if __name__ == "__main__":
    main()
