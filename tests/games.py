"""Small games for tests that need to know all about the game. Any script but paac.py can be trained
on Catch:

    python tests/games.py a3c_atari --num-envs 4 --total-timesteps 80000

Each is made by make_env(args) as AtariEnv is, and as any gymnasium environment may be.
"""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np


class Catch(gym.Env):
    """A ball falls 6 rows; the paddle below moves left, stays or moves right by one of 7 columns.
    +1 caught, -1 missed."""

    first_row = 0
    columns = range(7)  # where the ball may fall

    def __init__(self, args):
        self.observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        self.action_space = gym.spaces.Discrete(3)
        self.frames = np.zeros((4, 84, 84), np.uint8)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.generator = np.random.default_rng(seed)
        self.row = self.first_row
        self.ball = int(self.generator.choice(self.columns))
        self.paddle = 3
        self.frames[:] = self.draw()
        return self.frames.copy(), {}

    def draw(self):
        frame = np.zeros((84, 84), np.uint8)
        frame[12 * self.row : 12 * self.row + 12, 12 * self.ball : 12 * self.ball + 12] = 255
        frame[72:, 12 * self.paddle : 12 * self.paddle + 12] = 128
        return frame

    def step(self, action):
        self.row += 1
        self.paddle = min(max(self.paddle + int(action) - 1, 0), 6)
        is_over = self.row == 6
        reward = 0.0
        if is_over:
            reward = 1.0 if self.ball == self.paddle else -1.0
        self.frames[:3] = self.frames[1:]
        self.frames[3] = self.draw()
        return self.frames.copy(), reward, is_over, False, {}


class ShortCatch(Catch):
    """The ball falls 2 rows, in one of the 5 columns that the paddle can still reach. It is learned
    in a quarter of the steps."""

    first_row = 4
    columns = range(1, 6)


class Scripted(gym.Env):
    """Shows what it is: all pixels are the number of observations shown so far, so that a learner's
    values can be told apart.

    Game number n (in order of creation in its process) ends after 3 + n steps, by a time limit
    where n is odd; the reward is 3 for action 1 and -0.5 for action 0, which tells that the action
    reached its game, and that rewards are clipped.
    """

    created = 0

    def __init__(self, args):
        self.number = Scripted.created
        self.shown = 0
        Scripted.created += 1
        self.observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        self.action_space = gym.spaces.Discrete(2)

    def close(self):
        """The game that a learner makes to ask for its spaces does not count."""
        if self.shown == 0:
            Scripted.created -= 1

    def show(self):
        self.shown += 1
        return np.full((4, 84, 84), self.shown, np.uint8)

    def reset(self, *, seed=None, options=None):
        self.length = 0
        return self.show(), {}

    def step(self, action):
        reward = 3.0 if action == 1 else -0.5
        self.length += 1
        is_over = self.length == 3 + self.number
        truncated = is_over and self.number % 2 == 1
        return self.show(), reward, is_over and not truncated, truncated, {}


def scripted_steps(num_envs):
    """What Scripted's games show in each step: the number on the observation acted on and on the
    one after it, whether that was the game's end or the time limit, and the number on the
    observation acted on next. All (num_envs,)"""
    game = np.arange(num_envs)
    shown, played = np.ones(num_envs), np.zeros(num_envs, int)
    while True:
        played += 1
        over = played == 3 + game
        next_shown = shown + 1 + over  # after the end, the new game's first observation
        yield shown, shown + 1, over & (game % 2 == 0), over & (game % 2 == 1), next_shown
        shown, played = next_shown, np.where(over, 0, played)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    script = importlib.import_module(sys.argv[1])
    script.train(replace(script.parse_args(sys.argv[2:]), env_id="Catch"), Catch)
