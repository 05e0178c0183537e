"""Learning curves of any number of runs as one figure: a panel per game, a line per algorithm, mean
and spread over seeds.

    python utils/plot.py runs/Pong*                               # all runs of a game, over steps
    python utils/plot.py runs/* --x hours --out curves.png --csv curves.csv
    python utils/plot.py runs/A runs/B --labels "default" "paper" # a line per label, in that order
    python utils/plot.py runs/* results/pong.csv                  # beside what --csv has kept
    python utils/plot.py runs/Pong* utils/published/paac_curves.csv  # beside the PAAC paper's

Runs of the same game and the same label (or, without labels, the same --exp-name) are seeds of one
line: it shows their mean, the shade lies between the lowest and the highest of them, both where all
seeds have points. A point is the mean score of the games that ended since the point before;
--smooth averages over that many points. What cannot be read is skipped with a line.
"""

import csv
import itertools
import logging
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from outputs import prepare
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Not a warning for every resumed run.
logging.getLogger("tensorboard").setLevel(logging.ERROR)


@dataclass
class Args:
    runs: Annotated[list[str], tyro.conf.Positional]  # run folders, or files that --csv has written
    # agent steps, emulator frames (4 per step) or hours of training; files need the same
    x: Literal["steps", "frames", "hours"] = "steps"
    tag: str = "charts/episodic_return"  # any TensorBoard tag
    smooth: int = 20  # points to average over
    labels: list[str] | None = None  # one per run
    out: str = "curves.png"  # the figure
    csv: str | None = None  # file for the smoothed curve of each run


@dataclass
class Curve:
    env_id: str
    label: str
    seed: str  # "": a published curve
    x: np.ndarray  # (points,), float
    y: np.ndarray


@cache  # benchmark.py asks for the same run again and again, after its end
def read_events(run_dir):
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return events


def read_tags(run_dir):
    """{tag: points} of a run; what was logged twice around a crash is there once."""
    events = read_events(run_dir)
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def read_flags(run_dir):
    """{flag: value as text} of a run, from the table that all scripts log. Raises ValueError if
    there is none."""
    events = read_events(run_dir)
    for tag in events.Tags()["tensors"]:
        table = b"".join(events.Tensors(tag)[-1].tensor_proto.string_val).decode(errors="replace")
        rows = [line.split("|") for line in table.splitlines() if line.count("|") >= 3]
        flags = {row[1]: "|".join(row[2:-1]) for row in rows}
        if flags.keys() >= {"env_id", "exp_name", "seed"}:
            return flags
    raise ValueError("not a run of these scripts, or one that has logged nothing yet")


def read_run(run_dir, tag, smooth):
    """{"steps", "frames", "hours": x} and smoothed values of a run. Raises ValueError if it has no
    such tag."""
    tags = read_tags(run_dir)
    if tag not in tags:
        raise ValueError(f"no {tag} in it; has a game ended yet?")
    steps = np.array([point.step for point in tags[tag]], float)
    values = np.array([point.value for point in tags[tag]])
    # The speed is that of each interval: sums of it leave out pauses between stop and resume.
    logged = np.array([point.step for point in tags["charts/SPS"]], float)
    speed = np.array([point.value for point in tags["charts/SPS"]])
    intervals = np.diff(logged, prepend=0)
    if len(intervals) > 1:
        # A run that was started from an exported agent has not played that agent's steps.
        intervals[0] = min(intervals[0], max(intervals[1:]))
    # When A3C is stopped, its last point may come after no step, with a speed of 0.
    seconds = np.divide(intervals, speed, out=np.zeros_like(intervals), where=intervals > 0)
    hours = np.cumsum(seconds) / 3600
    x = {"steps": steps, "frames": 4 * steps, "hours": np.interp(steps, logged, hours)}
    return x, average(values, smooth)


def average(values, window):
    """Replace each value by the mean of the last `window` values up to it, or of all there are."""
    ends = range(1, len(values) + 1)
    return np.array([values[max(0, end - window) : end].mean() for end in ends])


def read_csv(path, tag, x):
    """The curves of a file written by --csv. Raises ValueError if it has others."""
    with open(path, newline="", errors="replace") as file:
        header, *rows = [*csv.reader(file)] or [None]
    if header != ["env_id", "label", "seed", x, tag]:
        raise ValueError(f"not a file with {tag} over {x} that --csv has written")
    if not rows:
        raise ValueError("no points in it")
    curves = []  # (key, points)
    last_key, last_x = None, None
    for *key, x_value, y_value in rows:
        x_value = float(x_value)
        # Another run may have the same key: its curve begins where x falls.
        if key != last_key or x_value < last_x:
            points = []
            curves.append((key, points))
        points.append((x_value, float(y_value)))
        last_key, last_x = key, x_value
    return [Curve(*key, *np.array(points).T) for key, points in curves]


def write_csv(path, curves, tag, x):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["env_id", "label", "seed", x, tag])
        for curve in curves:
            for x_value, y_value in zip(curve.x, curve.y):
                key = (curve.env_id, curve.label, curve.seed)
                writer.writerow([*key, f"{x_value:g}", f"{y_value:.4g}"])


def read_curves(args):
    """The curves of all runs and files, in the order in which they were named."""
    curves = []
    for i, run in enumerate(args.runs):
        try:
            if run.endswith(".csv"):
                new = read_csv(run, args.tag, args.x)
            elif not Path(run).is_dir():
                raise ValueError("no run folder and no .csv")
            else:
                flags = read_flags(run)
                x, values = read_run(run, args.tag, args.smooth)
                name = [flags[flag] for flag in ("env_id", "exp_name", "seed")]
                new = [Curve(*name, x[args.x], values)]
        except Exception as error:  # a foreign file raises nearly anything
            print(f"{run} is skipped: {error}", file=sys.stderr)
            continue
        # A file with several lines keeps their names.
        if args.labels and len({curve.label for curve in new}) == 1:
            for curve in new:
                curve.label = args.labels[i]
        curves.append((run, new))
    return curves


def cut_files(curves):
    """Beside runs, let the curves of files end where the longest run of their game does; of games
    without a run there are none."""
    ends = {}
    for run, new in curves:
        if not run.endswith(".csv"):
            ends[new[0].env_id] = max(ends.get(new[0].env_id, 0), new[0].x[-1])
    kept = []
    for run, new in curves:
        for curve in new:
            if run.endswith(".csv") and ends:
                end = min(curve.x[-1], ends.get(curve.env_id, -1))
                if end < curve.x[0]:
                    continue
                inside = curve.x < end
                last = np.interp(end, curve.x, curve.y)
                curve.x = np.append(curve.x[inside], end)
                curve.y = np.append(curve.y[inside], last)
            kept.append(curve)
    return kept


def draw_line(axis, label, seeds, color):
    """The mean of the seeds, and the range between the lowest and the highest."""
    style = "-" if seeds[0].seed else "--"  # published curves have no seed
    start = max(curve.x[0] for curve in seeds)
    end = min(curve.x[-1] for curve in seeds)
    if start > end:
        print(f"{label}: its seeds share no {axis.get_xlabel()}: a line each", file=sys.stderr)
        for curve in seeds:
            axis.plot(curve.x, curve.y, style, color=color, label=f"{label}, seed {curve.seed}")
        return
    if len(seeds) == 1:
        axis.plot(seeds[0].x, seeds[0].y, style, color=color, label=label)
        return
    grid = np.linspace(start, end, 500)
    values = np.stack([np.interp(grid, curve.x, curve.y) for curve in seeds])
    axis.plot(grid, values.mean(0), style, color=color, label=f"{label} ({len(seeds)} seeds)")
    axis.fill_between(grid, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)


def draw(curves, args):
    panels = defaultdict(lambda: defaultdict(list))  # of each game and label, the seeds
    for curve in curves:
        panels[curve.env_id][curve.label].append(curve)
    labels = list(dict.fromkeys(curve.label for curve in curves))
    palette = plt.get_cmap("tab10" if len(labels) <= 10 else "tab20").colors
    colors = dict(zip(labels, itertools.cycle(palette)))  # the same in all panels
    rows = math.ceil(len(panels) / 4)
    columns = math.ceil(len(panels) / rows)
    size = (6 * columns, 4 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:  # the last row may have more places than games
        axis.remove()
    units = {"steps": "agent steps", "frames": "emulator frames", "hours": "hours"}
    for axis, (env_id, lines) in zip(axes.flat, panels.items()):
        axis.set_title(env_id)
        axis.set_xlabel(units[args.x])
        axis.set_ylabel("score" if args.tag == "charts/episodic_return" else args.tag)
        for label, seeds in lines.items():
            draw_line(axis, label, seeds, colors[label])
        axis.grid(alpha=0.3)
        axis.legend()
        if args.x != "hours":
            axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    figure.savefig(args.out, dpi=120)
    plt.close(figure)


def main(args):
    if args.labels and len(args.labels) != len(args.runs):
        sys.exit(f"{len(args.labels)} labels for {len(args.runs)} runs")
    if not 1 <= args.smooth <= 10**6:
        sys.exit(f"--smooth {args.smooth}: must lie between 1 and 1,000,000")
    formats = plt.Figure().canvas.get_supported_filetypes()
    if Path(args.out).suffix.removeprefix(".") not in formats:
        sys.exit(f"--out {args.out}: the name must end in .png, .pdf or .svg")
    prepare(args.out)
    prepare(args.csv)
    curves = cut_files(read_curves(args))
    if not curves:
        sys.exit("nothing to plot")
    draw(curves, args)
    print(args.out)
    if args.csv:
        write_csv(args.csv, curves, args.tag, args.x)


if __name__ == "__main__":
    main(tyro.cli(Args))
