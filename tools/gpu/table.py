"""The results as a short table and as one line of JSON."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"
LONGEST = 9_300
"""Characters of the table: of a program's output only the last 12,000 may be seen."""
Row = dict[str, Any]


def rows_of(out: Path) -> list[Row]:
    """Return all results; a line cut off by a full disk or a kill is left out."""
    found = []
    path = out / RESULTS
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def table(out: Path, seconds: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a section for each stage that has results, cut to `LONGEST` characters."""
    rows = rows_of(out)
    lines = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        lines.append(f"== {stage}")
        write = WRITERS.get(stage, plain)
        lines += [line[:400] for line in write([row for row in rows if row["stage"] == stage])]
    times = ", ".join(f"{name} {part['seconds']:.0f}" for name, part in seconds.items())
    lines.append(f"== seconds: {times}")
    bad = [f"{name} ({part['exit_code']})" for name, part in seconds.items() if part["exit_code"]]
    if bad:
        lines.append(f"== ended badly: {', '.join(bad)}; see log_*.txt")
    return shortened(lines, LONGEST)


def shortened(lines: list[str], longest: int) -> str:
    """Join lines; when they are too long, cut the longest ones down until they fit."""
    width = max(map(len, lines), default=0)
    while sum(min(len(line), width) + 1 for line in lines) > longest and width > 40:
        width -= 10
    return "\n".join(line[:width] for line in lines)[:longest]


def plain(rows: list[Row]) -> Iterator[str]:
    """Yield a line for each result: its name and all its values."""
    for row in rows:
        values = [f"{k} {_text(v)}" for k, v in row.items() if k not in ("stage", "case", "flag")]
        yield f"{_flag(row)}{row['case']}: {', '.join(values)}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return " ".join(f"{k}={_text(v)}" for k, v in value.items())
    if isinstance(value, list):
        return "[" + "; ".join(map(_text, value)) + "]"
    return str(value)


def _flag(row: Row) -> str:
    bad = "ERROR " if row.get("error") else ""
    return bad + (f"{row['flag']} " if row.get("flag") else "")


def roofs(rows: list[Row]) -> Iterator[str]:
    """Yield all rates on as few lines as they need."""
    parts = []
    for row in rows:
        if "rate" not in row:
            said = row.get("error") or row.get("nvidia_smi")
            parts.append(f"{_flag(row)}{row['case']}: {said}")
        elif row["case"] == "copy":
            parts.append(f"copy {row['rate'] / 1e12:.2f} TB/s")
        else:
            parts.append(f"{row['case']} {row['rate'] / 1e12:.0f} TFLOP/s")
    yield from (", ".join(parts[i : i + 3]) for i in range(0, len(parts), 3))


def ops(rows: list[Row]) -> Iterator[str]:
    """Yield a line for each workload, its backends side by side."""
    yield "ms forward+backward (forward), share of floor, score, error in norm"
    measured = [row for row in rows if "backend" in row]
    for case in dict.fromkeys(row["case"] for row in measured):
        found = [row for row in measured if row["case"] == case]
        cells = [
            f"{_flag(row)}{row['backend']} {row['ms']:.3g} ({row['forward_ms']:.3g}) "
            f"{row['of_floor']:.0%} S{row['score'] or 0:.2f} {row['difference']:.0e}"
            for row in found
        ]
        yield f"{case} [{found[0]['floor_ms']:.3g}]: {' | '.join(cells)}"
    yield from plain([row for row in rows if "backend" not in row])


def step(rows: list[Row]) -> Iterator[str]:
    """Yield the times of each variant, its layers, kernels and waits."""
    for row in rows:
        if "optimizer_ms" in row:
            yield (
                f"{row['case']}: in a row {row['in_a_row_ms']} ms, one by one {row['ms']} = "
                f"{row['forward_ms']} + {row['backward_ms']} + {row['optimizer_ms']}, "
                f"{row['tokens_per_s']} tokens/s, {row['model_tflops']} "
                f"TFLOP/s, MFU {row['mfu']:.1%} (without optimizer "
                f"{row['mfu_without_optimizer']:.1%}), of roof {row['of_roof']:.1%}, loss "
                f"{row['loss']}, layers {_text(row['formats'])}"
            )
            yield (
                f"  GiB: peak {row['peak_gib']}, static {row['static_gib']}, planned "
                f"{row['planned_gib']}: {_text(row['planned_terms'])}"
            )
        elif "whole_ms" in row:
            kinds = {k: row[k] for k in ("M", "E", "*", "head")}
            yield (
                f"{row['case']}: forward, backward ms {_text(kinds)}; 52 layers {row['whole_ms']} "
                f"ms, {row['whole_tokens_per_s']} tokens/s, MFU {row['whole_mfu']:.1%}"
            )
        elif "top" in row:
            yield (
                f"{row['case']}: {row['launches']} launches, busy {row['busy_ms']} of "
                f"{row['span_ms']} ms, idle {row['idle']:.1%}"
            )
            shown = row["top"] if row["case"].startswith("auto") else row["top"][:6]
            yield from (f"  {line}" for line in shown)
        elif "lines" in row:
            yield f"{row['case']}: {row['total']}; {_text(row['lines'])}"
        else:
            yield from plain([row])


WRITERS: dict[str, Callable[[list[Row]], Iterator[str]]] = {
    "roofs": roofs,
    "ops": ops,
    "step": step,
}


def summary(out: Path, seconds: float) -> Row:
    """Return the figures that a reader wants first."""
    rows = rows_of(out)
    found: Row = {
        "seconds": round(seconds),
        "wrong": [f"{r['stage']} {r['case']}" for r in rows if r.get("flag")][:20],
        "errors": [f"{r['stage']} {r['case']}" for r in rows if r.get("error")][:20],
    }
    for row in rows:
        stage, case = row["stage"], row["case"]
        if stage == "step" and "mfu" in row:
            found[f"step {case}"] = {
                k: row[k] for k in ("in_a_row_ms", "tokens_per_s", "mfu", "peak_gib")
            }
        elif stage == "step" and "whole_mfu" in row:
            found[f"52 layers {case}"] = row["whole_mfu"]
        elif stage == "peer" and "ms" in row:
            found[f"peer {case}"] = row["ms"]
        elif stage == "decode" and "ms" in row:
            found[f"decode {case}"] = row["ms"]
        elif stage == "roofs" and "rate" in row and case in ("bf16 8192", "copy"):
            found[case] = float(f"{row['rate']:.4g}")
    scores = [r for r in rows if r["stage"] == "ops" and not r.get("is_torch", True)]
    found["scores"] = {f"{r['case']}: {r['backend']}": r["score"] for r in scores}
    return found
