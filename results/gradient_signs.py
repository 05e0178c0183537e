"""Why filters of the first layer die on a bright background: how far an update moves their answer
to it.

    python results/gradient_signs.py > results/gradient_signs.md

Trains paac_atari.py without LayerNorm for 100 updates: with the observations as they are, minus
each one's own mean, and minus the mean screen (--subtract-mean-screen). The background is a patch
of the most common pixel; a filter's answer to it is the sum of its weights times the pixel's value.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import paac_atari

UPDATES = 100
GAMES = ["Pong", "Breakout"]


class MinusMean(nn.Module):
    def forward(self, pixels):
        return pixels - pixels.mean((1, 2, 3), keepdim=True)


class MeanAgent(paac_atari.Agent):
    def __init__(self, num_actions, args):
        super().__init__(num_actions, args)
        self.trunk.insert(0, MinusMean())


def watch(game, variant):
    """Of a run: the background's value, how far an update moves a filter's answer to it (mean over
    updates and filters that move), how much the moves of a filter's weights agree in sign, and the
    number of filters that live at the end."""
    weights, live_filters, backgrounds = [], [], []
    clip_grad_norm, live_units = nn.utils.clip_grad_norm_, paac_atari.live_units
    agent_class = paac_atari.Agent

    def recording_clip(parameters, max_norm):
        parameters = list(parameters)
        weights.append(parameters[0].detach().flatten(start_dim=1).clone())  # (16, 256)
        return clip_grad_norm(parameters, max_norm)

    def recording_live_units(agent, obs):
        pixels = (obs.float() - agent.mean_screen) / 255
        if variant == "minus their own mean":
            pixels -= pixels.mean()
        is_background = obs == obs.median()  # in these games it is more than half of a screen
        backgrounds.append(pixels[is_background].mean().item())
        live_filters.append(16 * live_units(agent, obs)["charts/live_units_1"].item())
        return {}

    nn.utils.clip_grad_norm_ = recording_clip
    paac_atari.live_units = recording_live_units
    paac_atari.say = lambda *line: None
    if variant == "minus their own mean":
        paac_atari.Agent = MeanAgent
    flags = ["--env-id", f"{game}NoFrameskip-v4", "--seed", "4", "--num-workers", "0"]
    flags += ["--log-interval", "1600", "--no-layer-norm", "--no-anneal-lr"]
    if variant != "minus the mean screen":
        flags.append("--no-subtract-mean-screen")
    args = paac_atari.parse_args(flags)
    args.total_timesteps = UPDATES * args.num_envs * args.num_steps
    try:
        paac_atari.train(args, paac_atari.make_env)
    finally:
        nn.utils.clip_grad_norm_, paac_atari.live_units = clip_grad_norm, live_units
        paac_atari.Agent = agent_class
    moves = torch.stack(weights).diff(dim=0)  # (UPDATES - 1, 16, 256)
    moves = moves[moves.abs().amax(dim=2) > 1e-4]  # a dead filter hardly moves
    background = np.mean(backgrounds)
    answer_moves = moves.sum(dim=1).abs().mean().item() * abs(background)
    agreement = moves.sign().mean(dim=1).abs().mean().item()
    return background, answer_moves, agreement, live_filters[-1]


def main():
    print(
        "| game | observations | background | an update moves its answer by | signs agree | alive |"
    )
    print("|---|---|--:|--:|--:|--:|")
    os.chdir(tempfile.mkdtemp())  # for the run folders
    for game in GAMES:
        for variant in ("as they are", "minus their own mean", "minus the mean screen"):
            background, answer_moves, agreement, alive = watch(game, variant)
            numbers = f"{background:.2f} | {answer_moves:.4f} | {agreement:.2f} | {alive:.0f}"
            print(f"| {game} | {variant} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
