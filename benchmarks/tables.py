"""The results of a grid of models as the CSV files of timm's results/ folder, and as a table in Markdown."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLUMNS = {
    "results.csv": "model img_size top1 top1_err top5 top5_err param_count crop_pct interpolation",
    "benchmark-infer.csv": "model infer_img_size infer_samples_per_sec infer_step_time infer_batch_size param_count"
    " infer_gmacs infer_macts",
    "benchmark-train.csv": "model train_samples_per_sec train_step_time train_batch_size train_img_size param_count",
}
STEPS = {"results.csv": "validate", "benchmark-infer.csv": "benchmark", "benchmark-train.csv": "benchmark"}
ORDER = {"results.csv": "top1", "benchmark-infer.csv": "infer_samples_per_sec"}
ORDER |= {"benchmark-train.csv": "train_samples_per_sec"}
HEADINGS = {
    "top1": "top-1 (%)",
    "top5": "top-5 (%)",
    "param_count": "parameters (10^6)",
    "infer_samples_per_sec": "inference (images/s)",
    "train_samples_per_sec": "training (images/s)",
}

Done = Mapping[tuple[str, str], Mapping[str, Any]]


def write_tables(out: Path, done: Done) -> None:
    """Write results.csv, benchmark-infer.csv, benchmark-train.csv and table.md of the steps done so far."""
    for name in COLUMNS:
        rows = [{**result, "model": row} for (row, step), result in done.items() if step == STEPS[name]]
        rows = [row for row in rows if ORDER[name] in row]
        # timm's own files leave out what could not be counted: gmacs need a profiler's package.
        columns = [column for column in COLUMNS[name].split() if any(column in row for row in rows)]
        with open(out / name, "w", newline="") as file:
            writer = csv.DictWriter(file, columns or ["model"], extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted(rows, key=lambda row: row[ORDER[name]], reverse=True))
    (out / "table.md").write_text(markdown(done))


def markdown(done: Done) -> str:
    """Return one line a row, in the order they ran; a failed step's error stands below the table."""
    lines = ["| model | " + " | ".join(HEADINGS.values()) + " |", "|---" * (len(HEADINGS) + 1) + "|"]
    failures = []
    for row in dict.fromkeys(row for row, _ in done):
        results = {step: result for (name, step), result in done.items() if name == row}
        # benchmark.py counts with the model's default number of classes, validate.py with the data's
        told = {**results.get("benchmark", {}), **results.get("validate", {})}
        lines.append(f"| {row} | " + " | ".join(str(told.get(key, "")) for key in HEADINGS) + " |")
        failures += [f"{row}: {step} failed, {r['error']}" for step, r in results.items() if "error" in r]
    return "\n".join([*lines, *([""] if failures else []), *failures]) + "\n"
