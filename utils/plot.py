"""Learning curves of any number of runs as one figure: a panel per game, a line per algorithm, mean
and spread over seeds.

    python utils/plot.py runs/Pong*                               # all runs of a game, over steps
    python utils/plot.py runs/* --x hours --out curves.png --csv curves.csv
    python utils/plot.py runs/A runs/B --labels "default" "paper" # a line per label, in that order
    python utils/plot.py runs/* results/pong.csv                  # beside what --csv has kept
    python utils/plot.py runs/Pong* utils/published/paac_curves.csv  # beside the PAAC paper's

Runs of the same game and the same label (or, without labels, the same --exp-name) are seeds of one
line: it shows their mean, the shade lies between the lowest and the highest of them. A point is the
mean score of the games that ended since the point before; --smooth averages over that many points.
"""

import csv
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@dataclass
class Args:
    # Run folders, or files written by --csv with the same --x
    runs: Annotated[list[str], tyro.conf.Positional]
    x: Literal["steps", "frames", "hours"] = (
        "steps"  # agent steps, emulator frames (4 per step) or hours of training
    )
    tag: str = "charts/episodic_return"  # any TensorBoard tag
    smooth: int = 20  # points to average over
    labels: list[str] | None = None  # one per run
    out: str = "curves.png"  # the figure
    csv: str | None = None  # file for the smoothed curve of each run


@cache  # benchmark.py asks for the same run again and again, after its end
def read_tags(run_dir):
    """{tag: points} of a run; what was logged twice around a crash is there once."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def read_run(run_dir, tag, smooth):
    """{"steps", "frames", "hours": x} and smoothed values of a run."""
    tags = read_tags(run_dir)
    if tag not in tags:
        sys.exit(f"{run_dir} has no {tag}: has a game ended yet?")
    steps, values = (
        np.array([p.step for p in tags[tag]], float),
        np.array([p.value for p in tags[tag]]),
    )
    # Of each interval: summing up time leaves out pauses between stop and resume
    speed = tags["charts/SPS"]
    logged = np.array([p.step for p in speed], float)
    hours = np.cumsum(np.diff(logged, prepend=0) / [p.value for p in speed]) / 3600
    smooth = min(smooth, len(values))
    sums = np.cumsum(np.insert(values, 0, 0.0))
    window = np.minimum(np.arange(1, len(values) + 1), smooth)
    ends = np.arange(1, len(values) + 1)
    values = (sums[ends] - sums[ends - window]) / window
    return {"steps": steps, "frames": 4 * steps, "hours": np.interp(steps, logged, hours)}, values


def read_csv(path, tag, x):
    """{(env_id, label, seed): (x, values)} of a file written by --csv."""
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    if header[3:] != [x, tag]:
        sys.exit(f"{path} has {header[4]} over {header[3]}, not {tag} over {x}")
    curves = {}
    for *key, x, y in rows:
        curves.setdefault(tuple(key), []).append((float(x), float(y)))
    return {key: np.array(points).T for key, points in curves.items()}


def main(args):
    if not args.runs:
        sys.exit("no runs given")
    if args.labels and len(args.labels) != len(args.runs):
        sys.exit(f"{len(args.labels)} labels for {len(args.runs)} runs")
    panels, rows, ends, styles = {}, [], {}, {}
    # These go as far as the runs
    files_last = sorted(range(len(args.runs)), key=lambda i: args.runs[i].endswith(".csv"))
    for i in files_last:
        run = args.runs[i]
        if run.endswith(".csv"):
            curves = read_csv(run, args.tag, args.x)
        else:
            if not Path(run).is_dir() or Path(run).name.count("__") < 3:
                sys.exit(f"{run} is no run folder and no .csv")
            env_id, exp_name, seed, _ = Path(run).name.rsplit("__", 3)
            xs, values = read_run(run, args.tag, args.smooth)
            curves = {(env_id, exp_name, seed): (xs[args.x], values)}
            ends[env_id] = max(ends.get(env_id, 0), xs[args.x][-1])
        for (env_id, label, seed), (x, values) in curves.items():
            end = min(x[-1], ends.get(env_id, -1 if ends else np.inf))
            if x[0] <= end:
                inside = x < end
                x, values = (
                    np.append(x[inside], end),
                    np.append(values[inside], np.interp(end, x, values)),
                )
                # A file of several keeps its own
                if args.labels and len({label for _, label, _ in curves}) == 1:
                    label = args.labels[i]
                styles[label] = "-" if seed else "--"  # published curves have no seed
                panels.setdefault(env_id, {}).setdefault(label, []).append((x, values))
                rows += [(env_id, label, seed, f"{a:g}", f"{b:.4g}") for a, b in zip(x, values)]

    figure, axes = plt.subplots(
        1, len(panels), figsize=(6 * len(panels), 4), squeeze=False, layout="constrained"
    )
    for axis, (env_id, lines) in zip(axes[0], panels.items()):
        for label, curves in lines.items():
            # Where all seeds have points
            grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 500)
            values = np.stack([np.interp(grid, x, y) for x, y in curves])
            seeds = f" ({len(curves)} seeds)" if len(curves) > 1 else ""
            (line,) = axis.plot(grid, values.mean(0), styles[label], label=label + seeds)
            if len(curves) > 1:
                axis.fill_between(
                    grid,
                    values.min(0),
                    values.max(0),
                    color=line.get_color(),
                    alpha=0.2,
                    linewidth=0,
                )
        axis.set_title(env_id)
        axis.set_xlabel(
            {"steps": "agent steps", "frames": "emulator frames", "hours": "hours"}[args.x]
        )
        axis.set_ylabel("score" if args.tag == "charts/episodic_return" else args.tag)
        axis.grid(alpha=0.3)
        axis.legend()
        if args.x != "hours":
            axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    figure.savefig(args.out, dpi=120)
    print(args.out)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            csv.writer(file).writerows([("env_id", "label", "seed", args.x, args.tag), *rows])


if __name__ == "__main__":
    main(tyro.cli(Args))
