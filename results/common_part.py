"""How much of what the network sees differs from one observation to the next? The rest is common to
all of them, and tells it nothing.

    python results/common_part.py > results/common_part.md

Per game, 200 observations of random play, and new networks with three seeds, orthogonal, nips. Of
the 256 inputs of the last hidden layer's LayerNorm, with the observations as they are, minus each
one's own mean, minus each one's median, and minus the mean screen of all of them: the part of
their energy that is variance over the observations; and the share of the 256 units that are
positive for some of the observations and not for others.
"""

import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import paac_atari

GAMES = ["Amidar", "BeamRider", "Boxing", "Breakout", "Centipede", "MsPacman", "NameThisGame"]
GAMES += ["Pong", "Qbert", "Seaquest", "SpaceInvaders", "UpNDown"]
SEEDS = range(3)


def play(env_id, num_observations=200, steps_between=10):
    """Observations of random play, float32 (num_observations, 4, 84, 84)."""
    game = paac_atari.AtariEnv(env_id)
    rng = np.random.default_rng(0)
    game.reset(seed=0)
    observations = []
    for step in range(num_observations * steps_between):
        obs, _, _, _, info = game.step(rng.integers(game.action_space.n))
        if step % steps_between == 0:
            observations.append(obs)
        if info["game_over"]:
            game.reset()
    return torch.tensor(np.stack(observations)).float(), game.action_space.n


def variants(obs):
    """{name: the observations less what is subtracted}"""
    newest_frames = obs[:, -1]
    return {
        "as they are": obs,
        "minus their own mean": obs - obs.mean(dim=(1, 2, 3), keepdim=True),
        "minus their median": obs - newest_frames.flatten(1).median(dim=1).values.view(-1, 1, 1, 1),
        "minus the mean screen": obs - newest_frames.mean(dim=0),
    }


@torch.no_grad()
def measure(obs, num_actions, seed):
    """The part of the energy that is variance, and the share of units that switch."""
    torch.manual_seed(seed)
    agent = paac_atari.Agent(num_actions, paac_atari.Args())
    before_norm = agent.trunk[:-2](obs / 255)  # (observations, 256)
    positive = agent.trunk[-2](before_norm) > 0
    variance = before_norm.var(dim=0).sum() / before_norm.square().mean(dim=0).sum()
    switches = (positive.any(dim=0) & ~positive.all(dim=0)).float().mean()
    return variance.item(), switches.item()


def main():
    torch.set_num_threads(1)
    for game in GAMES:
        obs, num_actions = play(f"{game}NoFrameskip-v4")
        shown = variants(obs)
        if game == GAMES[0]:
            print("| game | " + " | ".join(shown) + " |")
            print("|---|" + "--:|" * len(shown))
        cells = []
        for variant in shown.values():
            numbers = [measure(variant, num_actions, seed) for seed in SEEDS]
            variance, switches = np.mean(numbers, axis=0)
            cells.append(f"{variance:.3f}, {switches:.0%}")
        print(f"| {game} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
