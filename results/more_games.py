"""Do more games in parallel cost data? Mnih et al. 2016 report that n-step methods need as many
steps with 16 actor-learners as with one, and that one-step methods need fewer. Here an update takes
its batch from all games, so that more games mean larger and fewer updates.

    python results/more_games.py    # one core; the same command goes on with what is missing

The scripts play Catch (tests/games.py) with 1 to 32 games, all else the same, until the mean of the
last 100 games is 0.8 (a random player scores -0.7, the best 1), or for 100,000 steps. Writes
more_games.csv, with no steps where 0.8 was not reached, and more_games.png.
"""

import csv
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
TABLE = RESULTS / "more_games.csv"
NUM_STEPS = {  # per game and update
    "paac_atari": 5,
    "nstep_q_atari": 5,
    "one_step_q_atari": 1,
    "one_step_sarsa_atari": 1,
}
NUM_ENVS = [1, 2, 4, 8, 16, 32]
SEEDS = [1, 2, 3]
MOST_STEPS = 100_000


def steps_until_learned(script, num_envs, seed):
    """Agent steps, or None if the run came to its end before."""
    command = [sys.executable, RESULTS.parent / "tests" / "games.py", script, "--seed", seed]
    command += ["--num-envs", num_envs, "--num-workers", 0, "--no-anneal-lr"]
    command += ["--total-timesteps", MOST_STEPS, "--log-interval", 1000]
    if script != "paac_atari":
        command += ["--exploration-steps", 10_000, "--final-epsilons", 0.02]
        command += ["--target-interval", 1000]
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


def draw(results):
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for script, num_steps in NUM_STEPS.items():
        num_envs, steps, updates = [], [], []
        for number in NUM_ENVS:
            seeds = [results.get((script, number, seed)) for seed in SEEDS]
            if None not in seeds:
                num_envs.append(number)
                steps.append(seeds)
                updates.append(np.array(seeds) / (number * num_steps))
        if not num_envs:
            continue
        for axis, values in zip(axes, (np.array(steps), np.array(updates))):
            (line,) = axis.plot(num_envs, values.mean(axis=1), marker="o", label=script)
            low, high = values.min(axis=1), values.max(axis=1)
            axis.fill_between(num_envs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    for axis, what in zip(axes, ("agent steps", "updates")):
        axis.set(xscale="log", yscale="log", xlabel="games", ylabel=f"{what} until 0.8 on Catch")
        axis.set_xticks(NUM_ENVS, NUM_ENVS)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(TABLE.with_suffix(".png"), dpi=120)


def main():
    results = read()
    # Seed 1 of everything first
    for seed, script, num_envs in itertools.product(SEEDS, NUM_STEPS, reversed(NUM_ENVS)):
        if (script, num_envs, seed) not in results:
            steps = steps_until_learned(script, num_envs, seed)
            print(script, num_envs, "games, seed", seed, "steps:", steps, flush=True)
            results[script, num_envs, seed] = steps
            write(results)
    draw(results)


if __name__ == "__main__":
    main()
