"""Speed against the plain backbone: networks, and with --tail the ends of their residual blocks alone.

Every cell runs its systems alternately in one process, each in turn first, and reports the plain one's time over each
one's, round by round: the median with its quartiles, above 1 is faster than plain. A cell that is done is kept in the
results file and not run again, so a run can be stopped and gone on with; --again measures anew. One process finds a
system a few percent faster or slower than the next, by where its memory lies: --processes takes the rounds of several.
With --keep-memory the process gives none back to the system, which otherwise hands out and zeroes the same pages in
every call, 14,000 in a compiled ResNet-50's of eight images; such cells are called kept, those of --autocast bf16,
and those of more threads than one by their number.
On a GPU calls are timed by events on its stream. The tails' cells also tell what they achieve of a copy's bandwidth.
"""

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import Timed, environment, keep_memory, ratios
from networks import time_networks
from tails import time_tails
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tail", action="store_true", help="the tails alone, not the networks")
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50", "mobilenetv2_100"])
    parser.add_argument("--modes", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    parser.add_argument("--batches", nargs="+", type=int, default=None, help="networks: 1 8 32; tails: 8")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--engines", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--size", type=int, default=224, help="pixels of each side (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=None, help="networks: 30; tails: 200")
    parser.add_argument("--processes", type=int, default=1, help="times as many rounds (default: %(default)s)")
    parser.add_argument("--autocast", action="store_true", help="networks: run them in bfloat16, as autocast does")
    parser.add_argument("--keep-memory", action="store_true", help="give no memory back to the system (glibc)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--again", action="store_true", help="measure cells anew that are in the file")
    parser.add_argument("--out", type=Path, default=None, help="JSON file (default: results/speed.json or tail.json)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here; cpu is what can be measured.")
    if args.tail and args.autocast:
        parser.error("--autocast is for networks: without --tail.")
    if args.processes < 1:
        parser.error(f"--processes {args.processes}: at least 1 is needed.")
    prepare(args.threads, args.keep_memory)
    suffix = "" if args.device == "cpu" else f"_{args.device}"
    out = args.out or RESULTS / f"{'tail' if args.tail else 'speed'}{suffix}.json"
    batches = args.batches or ([8] if args.tail else [1, 8, 32])
    rounds = args.rounds or (200 if args.tail else 30)
    cells = json.loads(out.read_text())["cells"] if out.exists() else {}
    grid = list(product(args.models, args.modes, batches, args.layouts, args.engines))
    for cell in tqdm(grid, desc="cells"):
        name = " ".join(map(str, cell)) + suffix_of(args)
        if args.again or name not in cells:
            model, mode, batch, layout, engine = cell
            what = (model, mode, batch, LAYOUTS[layout], engine == "compiled", args.size, rounds, args.device)
            what = what if args.tail else (*what, args.autocast)
            runs = timed_in(args.processes, args.keep_memory, time_tails if args.tail else time_networks, *what)
            cells[name] = {**figures_of(runs), "environment": environment(args.device)}
            out.write_text(json.dumps({"cells": cells}, indent=2) + "\n")
    print(markdown(cells))


def suffix_of(args: argparse.Namespace) -> str:
    """Return what the names of all cells of a run end with."""
    pixels = ("" if args.size == 224 else f" {args.size} pixels") if args.tail else f" {args.size}"
    threads = f" {args.threads} threads" if args.threads > 1 else ""
    return pixels + " bf16" * args.autocast + " kept" * args.keep_memory + threads


def prepare(threads: int, memory_kept: bool) -> None:
    """Set up a process that measures."""
    torch.set_num_threads(threads)
    if memory_kept:
        keep_memory()


def timed_in(processes: int, memory_kept: bool, time: Callable[..., Timed], *args: Any) -> list[Timed]:
    """Return what a function measures in fresh processes, one after the other, or, of one, in this."""
    if processes == 1:
        return [time(*args)]
    start = {"mp_context": get_context("spawn"), "initializer": prepare}
    found = []
    for _ in range(processes):
        with ProcessPoolExecutor(1, **start, initargs=(torch.get_num_threads(), memory_kept)) as pool:
            found.append(pool.submit(time, *args).result())
    return found


def figures_of(runs: list[Timed]) -> dict[str, Any]:
    """Return the plain system's seconds, the ratios to it, and what tails achieve of a copy's bandwidth, in GB/s."""
    seconds = {name: list(chain.from_iterable(run.seconds[name] for run in runs)) for name in runs[0].seconds}
    figures: dict[str, Any] = {"plain_seconds": median(seconds["plain"])}
    figures["ratio"] = ratios({name: own for name, own in seconds.items() if name != "copy"}, "plain")
    if moved := runs[0].moved:
        figures["bandwidth"] = {name: amount / median(seconds[name]) / 1e9 for name, amount in moved.items()}
    return {**figures, "processes": len(runs)}


def markdown(cells: dict[str, Any]) -> str:
    """Return one line a cell: the ratios, with their quartiles, and of tails the bandwidth beside a copy's."""
    systems = list(dict.fromkeys(s for figures in cells.values() for s in figures["ratio"] if s != "plain"))
    of_copy = any("bandwidth" in figures for figures in cells.values())
    columns = ["cell", "plain, ms", *systems, *(["eca of copy, GB/s"] if of_copy else [])]
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for name, figures in cells.items():
        shown = [figures["ratio"].get(s) for s in systems]
        texts = [f"{r['median']:.3f} ({r['quartile_low']:.3f}-{r['quartile_high']:.3f})" if r else "" for r in shown]
        if of_copy:
            texts.append("{eca:.1f} of {copy:.1f}".format_map(figures["bandwidth"]) if "bandwidth" in figures else "")
        lines.append(f"| {name} | {figures['plain_seconds'] * 1e3:.2f} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
