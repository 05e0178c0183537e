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
    means = defaultdict(list)
    errors = defaultdict(list)
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


def describe(game, means, errors):
    """The cells of a row in front of the published scores. means, errors: of each seed."""
    error = errors[0]  # of one seed's 30 games; of several seeds, their spread counts
    if len(means) > 1:
        error = np.std(means, ddof=1) / len(means) ** 0.5
    normalised = human_normalised(f"{game}NoFrameskip-v4", np.mean(means))
    score = f"**{show(np.mean(means))}** +- {show(error)}"
    return [game, str(len(means)), score, f"{normalised:,.0f}"]


def count_ahead(means, others, column):
    """On how many of the games for which the column has a score ours is at least as high."""
    games = [game for game in means if column in others[game]]
    if not games:
        return ""
    ahead = [np.mean(means[game]) >= others[game][column] for game in games]
    return f"{sum(ahead)} of {len(games)}"


def summarise(means):
    """One line about the human-normalised scores of all games."""
    normalised = []  # of each game, those of its seeds
    for game in means:
        env_id = f"{game}NoFrameskip-v4"
        normalised.append([human_normalised(env_id, mean) for mean in means[game]])
    by_game = np.array([np.mean(seeds) for seeds in normalised])
    line = f"Games: {len(by_game)} of {len(GAMES)}. Human-normalised: median "
    line += f"{np.median(by_game):.0f} %, interquartile mean {interquartile_mean(by_game):.0f} %"
    if min(map(len, normalised)) >= 3:
        low, high = bootstrap(np.array([seeds[:3] for seeds in normalised]))
        line += f" (95 % of a bootstrap over 3 seeds: {low:.0f} to {high:.0f} %)"
    return f"{line}."


def main():
    gym.register_envs(ale_py)
    means, errors = read_scores()
    if not means:
        sys.exit(f"there is no {RESULTS}/table1_*.json")
    others = {game: published(f"{game}NoFrameskip-v4") for game in means}
    rows = [["game", "seeds", "ours, 10M", "human-normalised %", *PUBLISHED]]
    rows.append([":--", *["--:"] * (len(rows[0]) - 1)])
    for game in GAMES:
        if game in means:
            scores = [show(others[game].get(column)) for column in PUBLISHED]
            rows.append([*describe(game, means[game], errors[game]), *scores])
    counts = [count_ahead(means, others, column) for column in COLUMNS]
    rows.append(["ours is ahead, or level", "", "", "", "", "", *counts])
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    text = f"{table}\n{summarise(means)}\n"
    (RESULTS / "table1.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
