"""What do more games, more workers and more ranks cost? Steps/s, memory, and a model of the time.

    python results/scaling.py    # 15 minutes on an idle machine with 2 cores; Linux

Trains on Breakout for some seconds per point, several rounds of all points in turn: 16 to 512
games, 1 to 16 workers for 32 games, and 1 to 4 ranks with 32 games each. Writes scaling.json and
scaling.png, and prints the tables, the fitted model and what it predicts for larger machines.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
sys.path.insert(0, str(ROOT / "utils"))
from throughput import CORES, hardware, in_turn, measure_training

STEPS_PER_UPDATE = 5  # of each game
GAMES = [16, 32, 64, 128, 256, 512]
WORKERS = [1, 2, 4, 8, 16]
RANKS = [1, 2, 4]


@dataclass
class Args:
    rounds: int = 3  # repetitions, one of everything after the other
    seconds: float = 8.0  # length of a measurement, after its start
    arch: str = "nips"  # the network
    fit_only: bool = False  # take the measurements from scaling.json


@dataclass(frozen=True)
class Point:
    series: str  # games, workers or ranks: what varies
    num_envs: int  # games of all ranks together
    workers: int  # of each rank
    ranks: int = 1

    @property
    def x(self):
        return {"games": self.num_envs, "workers": self.workers, "ranks": self.ranks}[self.series]


def all_points():
    games = [Point("games", n, CORES) for n in GAMES]
    workers = [Point("workers", 32, n) for n in WORKERS]
    ranks = [Point("ranks", 32 * n, 1, n) for n in RANKS]
    return games + workers + ranks


# measuring ----------------------------------------------------------------------------------------


def processes_of(pid):
    """The process and all that it started, directly or not."""
    pids = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            pids += processes_of(int(child))
    return pids


def memory(pid):
    """GiB of the process and all that it started. What processes share is counted once (PSS)."""
    kilobytes = 0
    for member in processes_of(pid):
        for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                kilobytes += int(line.split()[1])
    return kilobytes / 2**20


def measure(point, args):
    """{"speed": steps/s, "memory": GiB, "env", "act" and "learn": shares of the time}"""
    command = [sys.executable, ROOT / "paac_atari.py"]
    if point.series == "ranks":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", point.ranks, ROOT / "paac_atari_multigpu.py"]
    command += ["--num-envs", point.num_envs, "--num-workers", point.workers, "--arch", args.arch]
    command += ["--log-interval", max(1000, 2 * STEPS_PER_UPDATE * point.num_envs)]
    row = {}

    def note_memory(process):
        row["memory"] = memory(process.pid)

    row["speed"], split = measure_training(command, args.seconds, note_memory)
    return row | split


# the model ----------------------------------------------------------------------------------------


def milliseconds(row, part):
    """Of a part (env, act or learn) per update."""
    steps = STEPS_PER_UPDATE * row["num_envs"]
    return 1000 * row[part] * steps / row["speed"]


def least_squares(inputs, targets):
    """The coefficients whose sums of inputs have the smallest relative errors."""
    inputs, targets = np.array(inputs, float), np.array(targets, float)
    scaled = inputs / targets[:, None]
    coefficients, *_ = np.linalg.lstsq(scaled, np.ones(len(targets)), rcond=None)
    return coefficients


def inputs_of(part, num_envs, workers, cores):
    """What a part's time per update is proportional to, for one rank with so many cores."""
    steps = STEPS_PER_UPDATE * num_envs
    messages = STEPS_PER_UPDATE * workers
    if part == "env":
        return [steps / min(workers, cores), messages]
    if part == "act":
        return [STEPS_PER_UPDATE, steps]
    return [1, steps]


def is_fitted(row):
    """One rank, and not 512 games: glibc gives arrays over 32 MiB back after each use, which costs
    time that the model does not know."""
    return row["series"] != "ranks" and row["num_envs"] <= 256


def fit(rows):
    """{part: milliseconds per unit of each of its inputs}"""
    model = {}
    rows = [row for row in rows if is_fitted(row)]
    for part in ("env", "act", "learn"):
        inputs = [inputs_of(part, row["num_envs"], row["workers"], CORES) for row in rows]
        targets = [milliseconds(row, part) for row in rows]
        model[part] = least_squares(inputs, targets)
    return model


def predicted_speed(model, num_envs, workers, cores, ranks=1, reduce_ms=0.0):
    """Steps/s of all ranks; num_envs, workers and cores are those of one of them."""
    update = reduce_ms
    for part, coefficients in model.items():
        update += float(np.dot(coefficients, inputs_of(part, num_envs, workers, cores)))
    return 1000 * ranks * STEPS_PER_UPDATE * num_envs / update


# What the predictions for GPUs assume. Two costs were seen on an H200 with 32 games: a pass that
# acts, and an update (docs/development.md, "What stays"). How they grow with the games was not, so
# they are taken as constant up to 128 games.
GPU_ACT_MS = 0.32
GPU_UPDATE_MS = 4.0
# The gradient of nips has 2.7 MB. Averaging it takes microseconds within a machine with NVLink;
# between machines it passes twice over a network of 100 Gbit/s. Neither was measured.
REDUCE_MACHINE_MS = 0.1
REDUCE_NETWORK_MS = 0.6


def report(rows, model):
    print("\n| | | steps/s | model | memory, GiB |\n|:--|--:|--:|--:|--:|")
    for row in rows:
        modelled = f"{row['model']:,.0f}" if row["model"] else ""
        cells = [row["series"], str(row["x"]), f"{row['speed']:,.0f}", modelled]
        print(f"| {' | '.join(cells)} | {row['memory']:.2f} |")

    print("\nthe model, milliseconds")
    per_game, per_message = model["env"]
    print(f"{per_game:.3f} per step of a game, on one core")
    print(f"{per_message:.3f} per message to a worker and back")
    print(f"{model['act'][0]:.3f} per pass that acts, and {model['act'][1]:.4f} per game in it")
    print(f"{model['learn'][0]:.3f} per update, and {model['learn'][1]:.4f} per step in it")
    errors = [abs(row["model"] / row["speed"] - 1) for row in rows if is_fitted(row)]
    print(f"largest error of the speed, without 512 games: {100 * max(errors):.0f} %")

    one = next(row for row in rows if row["series"] == "ranks" and row["ranks"] == 1)
    for row in rows:
        if row["series"] == "ranks" and row["ranks"] > 1:
            parts = [
                f"{part} {milliseconds(row, part):.0f} (1 rank: {milliseconds(one, part):.0f})"
                for part in ("env", "act", "learn")
            ]
            print(f"{row['ranks']} ranks, milliseconds per update: {', '.join(parts)}")


def predict(model):
    print("\nprediction for GPUs with 16 cores each")
    print("| GPUs | games of each | steps/s |\n|--:|--:|--:|")
    gpu = {"env": model["env"], "act": [GPU_ACT_MS, 0], "learn": [GPU_UPDATE_MS, 0]}
    for ranks, reduce_ms in [(1, 0), (8, REDUCE_MACHINE_MS), (512, REDUCE_NETWORK_MS)]:
        for num_envs in (32, 128):
            speed = predicted_speed(gpu, num_envs, 16, 16, ranks, reduce_ms)
            print(f"| {ranks} | {num_envs} | {speed:,.0f} |")


def figure(rows, arch):
    shared = {"sharex": "col", "sharey": "row", "layout": "constrained"}
    fig, axes = plt.subplots(2, 3, figsize=(12, 6), **shared)
    labels = {"games": "games", "workers": "workers", "ranks": "ranks, 32 games each"}
    for column, (series, label) in enumerate(labels.items()):
        chosen = [row for row in rows if row["series"] == series]
        x = [row["x"] for row in chosen]
        speed, gigabytes = axes[:, column]
        speed.plot(x, [row["speed"] for row in chosen], marker="o", label="measured")
        if series != "ranks":
            speed.plot(x, [row["model"] for row in chosen], "k--", label="model")
            speed.legend()
        gigabytes.plot(x, [row["memory"] for row in chosen], marker="o", color="tab:green")
        gigabytes.set_xscale("log", base=2)
        gigabytes.set_xticks(x, x)
        gigabytes.set_xlabel(label)
    axes[0, 0].set_ylabel(f"steps/s, {arch}, {CORES} cores")
    axes[1, 0].set_ylabel("memory, GiB")
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    fig.savefig(RESULTS / "scaling.png", dpi=110)


def main(args):
    path = RESULTS / "scaling.json"
    if args.fit_only:
        rows = json.loads(path.read_text())["points"]
    else:
        measures = {point: lambda point=point: measure(point, args) for point in all_points()}
        rows = []
        for point, rounds in in_turn(measures, args.rounds).items():
            medians = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
            rows.append({**vars(point), "x": point.x, **medians})
        content = {"hardware": hardware(), "arch": args.arch, "points": rows}
        path.write_text(json.dumps(content, indent=1) + "\n")
    model = fit(rows)
    for row in rows:
        row["model"] = None  # of several ranks on one machine there is none
        if row["series"] != "ranks":
            row["model"] = predicted_speed(model, row["num_envs"], row["workers"], CORES)
    report(rows, model)
    predict(model)
    figure(rows, args.arch)


if __name__ == "__main__":
    main(tyro.cli(Args))
