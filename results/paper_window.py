"""Our curves in the paper's setting, seen through the window through which the paper shows its own.

    python results/paper_window.py    # writes results/paper_window.png

The paper's curves start at half the score of random play, in all six games and for every number of
games. That is what a centred moving average gives which takes 0 for what lies before the first
game, as np.convolve(scores, window, mode="same") does. From the second points of four of Pong's
curves the window follows: 2.3M steps, about 3,000 games of random play. A random game of Breakout
is a quarter as long, so its window is about 0.6M steps.
"""

import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "utils"))
import plot

WINDOWS = {"PongNoFrameskip-v4": 2.3e6, "BreakoutNoFrameskip-v4": 0.6e6}  # agent steps


def read(path):
    """{game: {label: (steps, scores)}}"""
    curves = defaultdict(dict)
    for curve in plot.read_csv(ROOT / path, "charts/episodic_return", "steps"):
        curves[curve.env_id][curve.label] = (curve.x, curve.y)
    return curves


def through_window(steps, scores, window, step=10_000):
    """The centred mean over the window, with 0 before the first step; it ends half a window before
    the curve does, because what comes then is not known."""
    grid = np.arange(0, steps[-1], step)
    known = np.interp(grid, steps, scores)
    half = round(window / 2 / step)
    padded = np.concatenate([np.zeros(half), known])
    sums = np.convolve(padded, np.ones(2 * half + 1), mode="valid")
    return grid[: len(sums)], sums / (2 * half + 1)


def main():
    ours = read("results/paper.csv")
    published = read("utils/published/paac_curves.csv")
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for axis, (game, window) in zip(axes, WINDOWS.items()):
        ((steps, scores),) = (c for name, c in ours[game].items() if name.startswith("paac_atari"))
        smooth_steps, smooth_scores = through_window(steps, scores, window)
        axis.plot(steps, scores, color="black", alpha=0.2, label="paac_atari.py")
        axis.plot(smooth_steps, smooth_scores, color="black", label="through the paper's window")
        for label, (paper_steps, paper_scores) in published[game].items():
            inside = paper_steps <= steps[-1]
            axis.plot(paper_steps[inside], paper_scores[inside], "--", label=label)
        axis.set_title(game)
        axis.set_xlabel("agent steps")
        axis.set_ylabel("score")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(ROOT / "results" / "paper_window.png", dpi=120)


if __name__ == "__main__":
    main()
