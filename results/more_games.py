r"""Do more games in parallel cost data? Mnih et al. 2016 report that n-step methods need about as
many steps with 16 actor-learners as with one, and that one-step methods need fewer. Here an update
takes its batch from all games, so that more games mean larger and fewer updates.

    python utils/benchmark.py --games Breakout --num-envs 4 32 --steps 1e6 --scripts \
        paac_atari nstep_q_atari one_step_q_atari one_step_sarsa_atari
    python utils/plot.py runs/Breakout*_atari-{4,32}__1__* --smooth 10 \
        --csv results/more_games_breakout.csv
    python results/more_games.py    # one core; the same command goes on with what is missing

The scripts play Catch (tests/games.py) with 1 to 32 games, all else the same, until the mean of the
last 100 games is 0.8 as they print it, 0.75 or more, looked at every 1,000 steps (a random player
scores -0.7, the best 1), or for 100,000 steps. Writes more_games.csv, without a number of steps
where 0.8 was not reached, and more_games.png: Catch without the points at which one of the seeds
did not reach it, and below it the curves of Breakout, if they are there.
"""

import csv
import importlib
import itertools
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
sys.path[:0] = [str(ROOT / "utils"), str(ROOT)]
import plot

TABLE = RESULTS / "more_games.csv"
BREAKOUT = RESULTS / "more_games_breakout.csv"
SCRIPTS = ["paac_atari", "nstep_q_atari", "one_step_q_atari", "one_step_sarsa_atari"]
NUM_ENVS = [1, 2, 4, 8, 16, 32]
SEEDS = [1, 2, 3]
MOST_STEPS = 100_000


def steps_until_learned(script, num_envs, seed):
    """Agent steps, or None if the run came to its end before."""
    command = [sys.executable, ROOT / "tests" / "games.py", script, "--seed", seed]
    command += ["--num-envs", num_envs, "--num-workers", 0, "--no-anneal-lr"]
    command += ["--total-timesteps", MOST_STEPS, "--log-interval", 1000]
    if script != "paac_atari":
        command += ["--exploration-steps", 10_000, "--final-epsilons", 0.02]
        command += ["--target-interval", 1000, "--no-subtract-mean-screen"]  # see q_study.md
    with tempfile.TemporaryDirectory() as folder:
        options = {"cwd": folder, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(list(map(str, command)), **options) as process:
            for line in process.stdout:
                match = re.match(r"step ([\d,]+) of .* score (-?[\d.]+)$", line)
                if match and float(match[2]) >= 0.8:
                    process.send_signal(signal.SIGINT)
                    return int(match[1].replace(",", ""))
        if process.returncode:
            sys.exit(f"{command}\nended with exit code {process.returncode}")
    return None


def read():
    """{(script, num_envs, seed): steps or None} of the runs so far."""
    if not TABLE.exists():
        return {}
    with open(TABLE, newline="") as file:
        rows = list(csv.DictReader(file))
    results = {}
    for row in rows:
        key = (row["script"], int(row["num_envs"]), int(row["seed"]))
        results[key] = int(row["steps"]) if row["steps"] else None
    return results


def write(results):
    with open(TABLE, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["script", "num_envs", "seed", "steps"])
        for key, steps in results.items():
            writer.writerow([*key, "" if steps is None else steps])


def draw_line(axis, num_envs, values, label):
    """The mean over the seeds, and their range. num_envs: (points, 1), values: (points, seeds)."""
    (line,) = axis.plot(num_envs[:, 0], values.mean(axis=1), marker="o", label=label)
    shade = {"color": line.get_color(), "alpha": 0.2, "linewidth": 0}
    axis.fill_between(num_envs[:, 0], values.min(axis=1), values.max(axis=1), **shade)


def draw(results):
    num_rows = 2 if BREAKOUT.exists() else 1
    size = (12, 4 * num_rows)
    figure, axes = plt.subplots(num_rows, 2, figsize=size, layout="constrained", squeeze=False)
    draw_catch(*axes[0], results)
    if BREAKOUT.exists():
        draw_breakout(*axes[1])
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(TABLE.with_suffix(".png"), dpi=120)


def steps_per_update(script, num_envs):
    return num_envs * importlib.import_module(script).Args.num_steps


def draw_catch(steps_axis, updates_axis, results):
    for script in SCRIPTS:
        num_envs, steps = [], []
        for number in NUM_ENVS:
            seeds = [results.get((script, number, seed)) for seed in SEEDS]
            if None not in seeds:
                num_envs.append([number])
                steps.append(seeds)
        if steps:
            num_envs = np.array(num_envs)
            steps = np.array(steps)
            draw_line(steps_axis, num_envs, steps, script)
            draw_line(updates_axis, num_envs, steps / steps_per_update(script, num_envs), script)
    steps_axis.set_ylabel("agent steps until 0.8 on Catch")
    steps_axis.set_ylim(8_000, 100_000)
    updates_axis.set_ylabel("updates until 0.8 on Catch")
    for axis in (steps_axis, updates_axis):
        axis.set(xscale="log", yscale="log", xlabel="games")
        axis.set_xticks(NUM_ENVS, NUM_ENVS)
        axis.minorticks_off()
    steps_axis.set_yticks([10_000, 20_000, 50_000, 100_000], ["10k", "20k", "50k", "100k"])


def draw_breakout(steps_axis, updates_axis):
    """The curves of Breakout, whose labels are a script and a number of games: paac_atari-32."""
    for curve in plot.read_csv(BREAKOUT, "charts/episodic_return", "steps"):
        script, num_envs = curve.label.rsplit("-", 1)
        style = {"color": f"C{SCRIPTS.index(script)}", "label": f"{script}, {num_envs} games"}
        style["linestyle"] = "dashed" if num_envs == "4" else "solid"
        steps_axis.plot(curve.x / 1e6, curve.y, **style)
        updates_axis.plot(curve.x / steps_per_update(script, int(num_envs)), curve.y, **style)
    steps_axis.set(xlabel="million agent steps", ylabel="score on Breakout")
    updates_axis.set(xlabel="updates", ylabel="score on Breakout", xscale="log")


def main():
    results = read()
    # Seed 1 of everything first
    for seed, script, num_envs in itertools.product(SEEDS, SCRIPTS, reversed(NUM_ENVS)):
        if (script, num_envs, seed) not in results:
            steps = steps_until_learned(script, num_envs, seed)
            print(script, num_envs, "games, seed", seed, "steps:", steps, flush=True)
            results[script, num_envs, seed] = steps
            write(results)
    draw(results)


if __name__ == "__main__":
    main()
