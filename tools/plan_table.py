"""Compare the predictions with published runs, in docs/plan.md.

    python tools/plan_table.py [--check]

Fits the constants of the time model again, prints what they should be, and writes the table between
its marks in the page. With --check it writes nothing, and the exit code is 1 if something would
change.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemotron.plan.calibration import calibration_rows, error, fit
from nemotron.plan.memory import GIB, memory
from nemotron.plan.published import OWN, ROWS, Published
from nemotron.plan.throughput import FITTED, predict

PAGE = Path(__file__).parents[1] / "docs/plan.md"
BEGIN, END = "<!-- plan_table.py -->\n", "<!-- end of plan_table.py -->\n"
OUTLIER = 10.0
"""Relative error from which a row is left out of the summary, by name."""


def table() -> str:
    """Return the table and its summary."""
    lines = [
        "| Run | TP/PP/CP/EP | Rows, micro-batch, length | Published | Predicted | Error | |",
        "|---|---|---|--:|--:|--:|---|",
    ]
    for row in sorted(ROWS, key=lambda row: row.held_out):
        guess = predict(row.job, FITTED).per_accelerator
        use = "held out" if row.held_out else "fitted"
        lines.append(
            f"| {row.title} | {row.tp}/{row.pp}/{row.cp}/{row.ep} "
            f"| {row.rows}, {row.micro_batch}, {row.seq_len} | {row.tokens_per_second:,.5g} "
            f"| {guess:,.0f} | {100 * error(row, FITTED):+.0f} % "
            f"| {use}{'; ' if row.note else ''}{row.note} |"
        )
    return "\n".join([*lines, "", *summary(), ""])


def summary() -> Iterator[str]:
    """Yield what the errors are on the whole, and the one memory that was published."""
    yield (
        f"The factors: products at {100 / FITTED.gemm:.0f} % of the peak, {FITTED.passes:.1f} "
        f"passes over the saved bytes, {FITTED.waiting:.2f} of the nominal communication time, "
        f"{1e3 * FITTED.per_layer:.2f} ms for each layer and micro-batch."
    )
    yield ""
    fitted = calibration_rows()
    others = [row for row in ROWS if row.held_out]
    usual = [row for row in others if error(row, FITTED) < OUTLIER]
    [unusual] = [row for row in others if row not in usual]
    own = [row for row in ROWS if row.source == OWN]
    yield (
        f"Root mean square of the errors: {_spread(fitted)} over the {len(fitted)} fitted rows, "
        f"{_spread(usual)} over {len(usual)} of the {len(others)} held-out rows (without "
        f"{unusual.title}, for which the prediction is wrong by a large factor), {_spread(own)} "
        f"over the {len(own)} rows of this project."
    )
    [row] = [row for row in ROWS if row.peak_gib is not None]
    need = memory(row.job)
    runtime = need.terms["runtime"]
    yield ""
    yield (
        f"Memory was published for one run only, {row.title} with natural routing: "
        f"{row.peak_gib} GiB allocated, 70.3 GiB reserved. Predicted: "
        f"{(need.total - runtime) / GIB:.1f} GiB and {runtime / GIB:.0f} GiB for runtime and "
        f"fragmentation, together {need.total / 1e9:.1f} GB of the card's 80 GB."
    )
    over = {
        row.title: f"{memory(row.job).total / 1e9:.0f} of {row.job.hardware.memory / 1e9:.0f} GB"
        for row in ROWS
        if memory(row.job).total > row.job.hardware.memory
    }
    listed = "; ".join(f"{title} ({numbers})" for title, numbers in over.items())
    yield ""
    yield f"Runs that were published although they do not fit by the formula: {listed}."


def _spread(rows: Sequence[Published]) -> str:
    squares = [error(row, FITTED) ** 2 for row in rows]
    return f"{100 * math.sqrt(sum(squares) / len(squares)):.0f} %"


def insert(page: str) -> str:
    """Return the page with the table in its place."""
    head, rest = page.split(BEGIN, 1)
    _, tail = rest.split(END, 1)
    return f"{head}{BEGIN}{table()}{END}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would change")
    check = parser.parse_args().check
    found = fit(calibration_rows())
    print(f"fitted: {found}\nin use: {FITTED}")
    page = PAGE.read_text()
    changed = insert(page)
    if not check:
        PAGE.write_text(changed)
    return int(check and changed != page)


if __name__ == "__main__":
    sys.exit(main())
