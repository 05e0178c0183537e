"""The twelve games of the PAAC paper: paac_atari.py's default after 10M steps beside everything
published. A row appears when a run of its game has been evaluated:

    python utils/benchmark.py --games Pong Breakout --seeds 1 2           # any games and seeds
    python utils/evaluate.py runs/NAME --json results/table1_Pong_1.json  # of each, when it is done
    python results/table1.py                                              # writes results/table1.md
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent / "utils"))
from benchmark import PUBLISHED, published
from evaluate import human_normalised

GAMES = ["Amidar", "BeamRider", "Boxing", "Breakout", "Centipede", "MsPacman", "NameThisGame"]
GAMES += ["Pong", "Qbert", "Seaquest", "SpaceInvaders", "UpNDown"]
STEPS = 10_000_000
COLUMNS = [name for name in PUBLISHED if name not in ("random", "human")]


def read_scores():
    """{game: [mean score over the 30 games of each seed]}, and the same of the standard errors over
    these games."""
    means, errors = defaultdict(list), defaultdict(list)
    for path in sorted(RESULTS.glob("table1_*.json")):
        evaluation = json.loads(path.read_text())
        if evaluation["global_step"] != STEPS or evaluation["policy"] != "sampled":
            sys.exit(f"{path}: not of an agent that was trained for {STEPS:,} steps, or greedy")
        game = evaluation["env_id"].removesuffix("NoFrameskip-v4")
        means[game].append(evaluation["mean"])
        errors[game].append(evaluation["standard_error"])
    return means, errors


def interquartile_mean(values):
    """The mean of the middle half: of values (..., n), as Agarwal et al. 2021 recommend."""
    values = np.sort(values, axis=-1)
    cut = values.shape[-1] // 4
    return values[..., cut : values.shape[-1] - cut].mean(axis=-1)


def bootstrap(scores, num_samples=10_000):
    """95 % interval of the interquartile mean of scores (games, seeds): the seeds of each game are
    drawn anew, with replacement."""
    rng = np.random.default_rng(0)
    games, seeds = scores.shape
    drawn = rng.integers(seeds, size=(num_samples, games, seeds))
    samples = np.take_along_axis(scores[None], drawn, axis=2)
    return np.percentile(interquartile_mean(samples.reshape(num_samples, -1)), [2.5, 97.5])


def show(value):
    if value is None:
        return ""
    digits = 1 if abs(value) < 1000 else 0
    return f"{value:z,.{digits}f}"


def main():
    gym.register_envs(ale_py)
    means, errors = read_scores()
    header = ["game", "seeds", "ours, 10M", "human-normalised %", *PUBLISHED]
    lines = [" | ".join(header), "|".join([":--", *["--:"] * (len(header) - 1)])]
    ahead, compared = dict.fromkeys(COLUMNS, 0), dict.fromkeys(COLUMNS, 0)
    normalised = {}  # game: [of each seed]
    for game in GAMES:
        if game not in means:
            continue
        env_id = f"{game}NoFrameskip-v4"
        score = np.mean(means[game])
        seeds = len(means[game])
        error = np.std(means[game], ddof=1) / seeds**0.5 if seeds > 1 else errors[game][0]
        normalised[game] = [human_normalised(env_id, mean) for mean in means[game]]
        others = published(env_id)
        row = [game, str(seeds), f"**{show(score)}** +- {show(error)}"]
        row += [f"{np.mean(normalised[game]):,.0f}"]
        lines.append(" | ".join(row + [show(others.get(column)) for column in PUBLISHED]))
        for column in COLUMNS:
            if column in others:
                compared[column] += 1
                ahead[column] += score >= others[column]
    counts = []
    for column in COLUMNS:
        counts.append(f"{ahead[column]} of {compared[column]}" if compared[column] else "")
    lines.append(" | ".join(["ours is ahead, or level", "", "", "", "", "", *counts]))
    table = "".join(f"| {line} |\n" for line in lines)

    by_game = [np.mean(values) for values in normalised.values()]
    summary = f"Games: {len(by_game)} of 12. Human-normalised: median {np.median(by_game):.0f} %"
    summary += f", interquartile mean {interquartile_mean(np.array(by_game)):.0f} %"
    if by_game and min(map(len, normalised.values())) >= 3:
        low, high = bootstrap(np.array([values[:3] for values in normalised.values()]))
        summary += f" (95 % of a bootstrap over 3 seeds: {low:.0f} to {high:.0f} %)"
    (RESULTS / "table1.md").write_text(f"{table}\n{summary}.\n")
    print(f"{table}\n{summary}.")


if __name__ == "__main__":
    main()
