r"""The twelve games of the PAAC paper: paac_atari.py's default after 10M steps beside everything
published. All of it, 17 hours of a core per seed:

    python utils/benchmark.py --games Amidar BeamRider Boxing Breakout Centipede MsPacman \
        NameThisGame Pong Qbert Seaquest SpaceInvaders UpNDown --seeds 1 2 3
    python results/table1.py runs/*NoFrameskip-v4__paac_atari__*

The second line keeps the curve of each run in table1_curves.csv, lets each finished run play 30
games (table1_GAME_SEED.json), and writes table1.md and table1.png from these files. Without runs it
only writes the latter two.
"""

import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import ale_py
import gymnasium as gym
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent
sys.path[:0] = [str(RESULTS.parent / "utils"), str(RESULTS.parent)]
import evaluate
import plot
from benchmark import PUBLISHED, published

import paac_atari

GAMES = ["Amidar", "BeamRider", "Boxing", "Breakout", "Centipede", "MsPacman", "NameThisGame"]
GAMES += ["Pong", "Qbert", "Seaquest", "SpaceInvaders", "UpNDown"]
STEPS = 10_000_000
SUFFIX = "NoFrameskip-v4"
COLUMNS = [name for name in PUBLISHED if name not in ("random", "human")]
A2C = [name for name in COLUMNS if name.startswith("A2C") and name.endswith("10M")]
CURVES = RESULTS / "table1_curves.csv"
TAG = "charts/episodic_return"
SMOOTH = 20  # points of a curve
TITLE = """# Twelve games after 10M steps

`paac_atari.py` with its default settings beside published scores. A2C and PPO without a source in
brackets are those of the PPO paper (Schulman et al. 2017); SB2 and SB3 are stable-baselines.

"""
PROTOCOLS = """
How each column was measured, as far as its source says:

| column | what is averaged | starts |
|---|---|---|
| ours | 30 games of each seed's last checkpoint, actions sampled (1) | 1 to 30 no-ops |
| random, human | at least 3 games | up to 30 no-ops |
| A2C and PPO, 10M | the last 100 games of training, three seeds | |
| A2C, SB2 and SB3 zoo | games of the trained network, one run | up to 30 no-ops |
| A2C, SLM-Lab | the last 100 evaluations in training, four seeds (2) | up to 30 no-ops |
| PPO and PQN, CleanRL | the last games of training, three seeds | up to 30 no-ops |
| PAAC, 115M | | |
| A3C, 4 days | games of the trained network | human starts |
| GA3C | | |
| Gorila | games of the trained network | up to 30 no-ops |

(1) A lost life cuts its step of four frames short, as in training. +- is the standard error of the
mean: over seeds, or over games where that is larger.
(2) Its code leaves open whether a score is that of a game or of a life.

All train with clipped rewards. Lost lives end returns in training in ours, in both zoos, SLM-Lab
and CleanRL, not in PAAC's released code. Sources: [published](../utils/published/README.md).
"""


def collect(run):
    """Keep the run's curve and, if it is finished and has not done so yet, let it play 30 games."""
    flags = plot.read_flags(run)
    x, scores = plot.read_run(run, TAG, SMOOTH)
    curves = plot.read_csv(CURVES, TAG, "steps") if CURVES.exists() else []
    kept = []
    for curve in curves:
        if (curve.env_id, curve.seed) != (flags["env_id"], flags["seed"]):
            kept.append(curve)
    kept.append(plot.Curve(flags["env_id"], "paac_atari", flags["seed"], x["steps"], scores))
    kept.sort(key=lambda curve: (curve.env_id, int(curve.seed)))
    plot.write_csv(CURVES, kept, TAG, "steps")
    game = flags["env_id"].removesuffix(SUFFIX)
    path = RESULTS / f"table1_{game}_{flags['seed']}.json"
    finished = paac_atari.load_checkpoint(run)["global_step"] == STEPS
    if finished and not has_played(run, path):
        evaluate.evaluate(evaluate.Args(str(run), json=str(path)))


def has_played(run, path):
    """Whether the file at path is this run's, and not that of an earlier run of the same seed."""
    return path.exists() and Path(json.loads(path.read_text())["checkpoint"]).name == run.name


def read_scores():
    """{game: [mean score over the 30 games of each seed]}, and the same of the standard errors over
    these games."""
    means = defaultdict(list)
    errors = defaultdict(list)
    for path in sorted(RESULTS.glob("table1_*.json")):
        evaluation = json.loads(path.read_text())
        if evaluation["global_step"] != STEPS or evaluation["policy"] != "sampled":
            sys.exit(f"{path}: not of an agent that was trained for {STEPS:,} steps, or greedy")
        game = evaluation["env_id"].removesuffix(SUFFIX)
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
    drawn anew, with replacement. rliable 1.2.0 gives the same; it is not imported because arch, on
    which it rests, does not work with pandas 3."""
    rng = np.random.default_rng(0)
    games, seeds = scores.shape
    drawn = rng.integers(seeds, size=(num_samples, games, seeds))
    samples = np.take_along_axis(scores[None], drawn, axis=2)
    return np.percentile(interquartile_mean(samples.reshape(num_samples, -1)), [2.5, 97.5])


def show(value, like=None):
    """As text. An error has as many decimals as its mean: show(error, like=mean)."""
    if value is None:
        return ""
    if like is None:
        like = value
    digits = 1 if abs(like) < 1000 else 0
    return f"{value:z,.{digits}f}"


def standard_error(means, errors):
    """Of the mean over seeds: what their spread says or what their games do, whichever is larger,
    because two or three seeds may be close to each other by chance. means, errors: of each seed."""
    num_seeds = len(means)
    of_games = np.linalg.norm(errors) / num_seeds
    if num_seeds == 1:
        return of_games
    of_seeds = np.std(means, ddof=1) / num_seeds**0.5
    return max(of_games, of_seeds)


def describe(game, means, errors):
    """The cells of a row in front of the published scores. means, errors: of each seed."""
    mean = np.mean(means)
    normalised = evaluate.human_normalised(f"{game}{SUFFIX}", mean)
    score = f"**{show(mean)}** +- {show(standard_error(means, errors), like=mean)}"
    return [game, str(len(means)), score, f"{normalised:,.0f}"]


def count_ahead(means, others, columns):
    """On how many of the games for which these columns have a score ours is at least as high as
    the highest of them."""
    ahead = []
    for game in means:
        scores = [others[game][column] for column in columns if column in others[game]]
        if scores:
            ahead.append(np.mean(means[game]) >= max(scores))
    return f"{sum(ahead)} of {len(ahead)}" if ahead else ""


def summarise(means, others):
    """Two sentences about the scores of all games."""
    normalised = []  # of each game, those of its seeds
    for game in means:
        env_id = f"{game}{SUFFIX}"
        normalised.append([evaluate.human_normalised(env_id, mean) for mean in means[game]])
    median = np.median([np.mean(seeds) for seeds in normalised])
    num_seeds = min(map(len, normalised))
    scores = np.array([seeds[:num_seeds] for seeds in normalised])  # (games, seeds)
    line = f"Games: {len(scores)} of {len(GAMES)}. Human-normalised: median {median:.0f} %, "
    line += f"interquartile mean {interquartile_mean(scores.ravel()):.0f} %, of the first "
    line += "seed" if num_seeds == 1 else f"{num_seeds} seeds"
    if num_seeds > 1:
        low, high = bootstrap(scores)
        line += f" (95 % of a bootstrap over seeds: {low:.0f} to {high:.0f} %)"
    ahead = count_ahead(means, others, A2C)
    return f"{line}. Ours is ahead of the highest A2C score after 10M steps, or level, on {ahead}."


def write_table(means, errors):
    others = {game: published(f"{game}{SUFFIX}") for game in means}
    rows = [["game", "seeds", "ours, 10M", "human-normalised %", *PUBLISHED]]
    rows.append([":--", *["--:"] * (len(rows[0]) - 1)])
    for game in GAMES:
        if game in means:
            scores = [show(others[game].get(column)) for column in PUBLISHED]
            rows.append([*describe(game, means[game], errors[game]), *scores])
    counts = [count_ahead(means, others, [column]) for column in COLUMNS]
    rows.append(["our mean is as high or higher", "", "", "", "", "", *counts])
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    text = f"{table}\n{summarise(means, others)}\n"
    (RESULTS / "table1.md").write_text(TITLE + text + PROTOCOLS)
    print(text, end="")


def draw_figure():
    """A panel per game: each seed, the seeds' mean as far as all of them have come, and what A2C,
    PPO and PAAC are published to reach."""
    curves = defaultdict(list)
    for curve in plot.read_csv(CURVES, TAG, "steps"):
        curves[curve.env_id.removesuffix(SUFFIX)].append(curve)
    games = [game for game in GAMES if game in curves]
    rows = math.ceil(len(games) / 4)
    figure, axes = plt.subplots(rows, 4, figsize=(16, 3 * rows + 0.6), layout="constrained")
    for axis in axes.flat[len(games) :]:
        axis.remove()
    for axis, game in zip(axes.flat, games):
        draw_panel(axis, game, curves[game])
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(RESULTS / "table1.png", dpi=100)


def draw_panel(axis, game, seeds):
    for seed in seeds:
        axis.plot(seed.x, seed.y, color="C0", alpha=0.4, linewidth=0.8)
    start = max(seed.x[0] for seed in seeds)
    end = min(seed.x[-1] for seed in seeds)
    grid = np.linspace(start, end, 500)
    mean = np.mean([np.interp(grid, seed.x, seed.y) for seed in seeds], axis=0)
    axis.plot(grid, mean, color="C0", label="paac_atari.py")
    scores = published(f"{game}{SUFFIX}")
    a2c = max(scores[name] for name in A2C if name in scores)
    ppo = scores["PPO (CleanRL), 10M"]
    paac = scores["PAAC nips, 115M"]
    style = {"linestyle": "--", "linewidth": 1}
    axis.axhline(a2c, color="C1", label="best published A2C, 10M steps", **style)
    axis.axhline(ppo, color="C2", label="PPO of CleanRL, 10M steps", **style)
    axis.axhline(paac, color="C3", label="PAAC of the paper, nips, 115M steps", **style)
    axis.set_title(f"{game}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}")
    axis.set_xlabel("agent steps")
    axis.set_ylabel("score")
    axis.grid(alpha=0.3)
    axis.set_xlim(0, STEPS)
    axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))


def main():
    gym.register_envs(ale_py)
    newest = {}  # run of each game and seed; the time is at the end of its name
    for run in sorted(map(Path, sys.argv[1:])):
        newest[run.name.rpartition("__")[0]] = run
    for run in newest.values():
        collect(run)
    means, errors = read_scores()
    if not means:
        sys.exit(f"there is no {RESULTS}/table1_*.json")
    write_table(means, errors)
    draw_figure()


if __name__ == "__main__":
    main()
