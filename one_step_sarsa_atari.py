# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8,<3", "gymnasium>=1.2.3,<2", "ale-py>=0.11.1,<1",
#   "numpy>=2,<3", "opencv-python-headless>=4.10,<6", "tyro>=0.9.2,<2", "tensorboard>=2.19,<3"]
# ///
"""One-step Sarsa on Atari (Mnih et al. 2016, arXiv 1602.01783), in batches like PAAC's.

num_envs games run in num_workers processes. All games take num_steps steps with the same network,
in one batch per step. Then the optimizer takes one gradient step on

    L   = mean[(y_t - Q(s_t, a_t))^2]
    y_t = r_t + gamma Q_target(s_{t+1}, a_{t+1}),

where r_t is clipped to [-1, 1] and y_t is a constant. If step t ended the game or a life, y_t is
r_t; if a time limit did, s_{t+1} is the last observation. Q_target is a copy of the
network, renewed every --target-interval steps: by default after each update.

Sections 1 and 2 are the algorithm; start with train(). The plumbing below them hardly differs
between the scripts: utils/sync_shared.py keeps the text between "# >>> shared" and "<<<" equal.

    python one_step_sarsa_atari.py --env-id PongNoFrameskip-v4   # train; Ctrl-C saves and stops
    python one_step_sarsa_atari.py --resume runs/NAME            # resumes exactly where it stopped
"""

import copy
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

# OpenMP's threads should sleep while the games run, because the games need the cores. Between two
# layers they should spin, because waking them takes longer. Set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn


@dataclass
class Args:  # the comments are the texts of --help
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    seed: int = 1  # of the network, the actions and all games
    torch_deterministic: bool = True  # deterministic kernels on a GPU
    cuda: bool = True  # use the GPU where there is one
    track: bool = False  # log to Weights & Biases, too (pip install wandb)
    resume: str | None = None  # run folder or checkpoint; auto: the newest run like this one
    log_interval: int = 10_000  # agent steps between two points of the curves
    checkpoint_interval: int = 500_000  # agent steps between two checkpoints

    env_id: str = "BreakoutNoFrameskip-v4"  # ALE/Breakout-v5 has sticky actions
    frame_skip: int = 4  # emulator frames per agent step (replaces the id's own)
    terminal_on_life_loss: bool = True  # a lost life ends the return, not the game or its score
    num_envs: int = 32  # games played in parallel, n_e
    num_workers: int | None = None  # processes, n_w; None: one per core; 0: none (to debug)
    step_timeout: float = 60.0  # seconds without an answer after which a worker counts as lost

    total_timesteps: int = 10_000_000  # agent steps, summed over the games
    learning_rate: float | None = None  # None: 0.0004, times sqrt(num_envs / 32) above 32 games
    anneal_lr: bool = True  # the learning rate falls linearly to 0 at total_timesteps
    num_steps: int = 1  # steps per game and update, t_max
    gamma: float = 0.99  # discount per agent step
    final_epsilons: tuple[float, ...] = (0.01,)  # shares of random actions, cycled over games
    exploration_steps: int = 1_000_000  # agent steps in which the shares fall from 1 to these
    target_interval: int = 1  # agent steps between two target networks; 1: none; paper: 10,000
    max_grad_norm: float = 0.5  # a gradient of a larger global norm is scaled down to it
    optimizer: Literal["adam", "rmsprop"] = "adam"  # rmsprop: TensorFlow's, as in the paper
    optimizer_epsilon: float = 1e-5  # of the optimizer; PAAC's paper has 0.1, inside the root
    arch: Literal["nips", "nature"] = "nips"  # Mnih et al. 2013, or 2015: 3 times the arithmetic
    init: Literal["orthogonal", "uniform"] = "orthogonal"  # uniform: +-1/sqrt(fan_in), the paper's
    subtract_mean_screen: bool = True  # a running mean of the screens; not in the paper
    layer_norm: bool = True  # LayerNorm before the last hidden layer's ReLU; not in the paper
    bf16: bool = False  # bfloat16: faster on CPUs with AVX512_BF16 or AMX

    def __post_init__(self):
        if self.learning_rate is None:
            self.learning_rate = 4e-4 * math.sqrt(max(1, self.num_envs / 32))


# 1. ALGORITHM ====================================================================================
# >>> shared: orthogonal
def init_orthogonal(module, gain):
    """Orthogonal weights times gain, and zero biases, in all convolutions and linear layers."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)


# <<< shared: orthogonal
# >>> shared: q network
class Agent(nn.Module):
    """Values of all actions: nips (Mnih et al. 2013) or nature (Mnih et al. 2015)."""

    def __init__(self, num_actions, args):
        super().__init__()
        self.args = args
        if args.arch == "nips":
            hidden_size = 256
            self.trunk = nn.Sequential(
                nn.Conv2d(4, 16, kernel_size=8, stride=4),
                nn.ReLU(),
                nn.Conv2d(16, 32, kernel_size=4, stride=2),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(32 * 9 * 9, hidden_size),
                nn.LayerNorm(hidden_size) if args.layer_norm else nn.Identity(),
                nn.ReLU(),
            )
        else:
            hidden_size = 512
            self.trunk = nn.Sequential(
                nn.Conv2d(4, 32, kernel_size=8, stride=4),
                nn.ReLU(),
                nn.Conv2d(32, 64, kernel_size=4, stride=2),
                nn.ReLU(),
                nn.Conv2d(64, 64, kernel_size=3, stride=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(64 * 7 * 7, hidden_size),
                nn.LayerNorm(hidden_size) if args.layer_norm else nn.Identity(),
                nn.ReLU(),
            )
        self.q = nn.Linear(hidden_size, num_actions)
        if args.init == "orthogonal":  # torch's layers come with "uniform"
            init_orthogonal(self.trunk, gain=math.sqrt(2))
            init_orthogonal(self.q, gain=1.0)
        # Without a mean, what all screens share drives a filter until its ReLU is always 0.
        self.register_buffer("mean_screen", torch.zeros(84, 84))  # 0 unless train() changes it
        self.to(memory_format=torch.channels_last)  # halves the time of nips' updates on a CPU

    def forward(self, obs):
        """obs: uint8 (batch, 4, 84, 84) -> Q-values (batch, num_actions)"""
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.args.bf16):
            pixels = (obs.float() - self.mean_screen) / 255  # centred: LeCun et al. 1998
            hidden = self.trunk(pixels.contiguous(memory_format=torch.channels_last))
            q_values = self.q(hidden)
        return q_values.float()


def epsilon_greedy(q_values, epsilons):
    """The best action or, with probability epsilon, any one. q_values: (num_envs, num_actions)."""
    random_actions = torch.randint(q_values.shape[-1], epsilons.shape, device=epsilons.device)
    return torch.where(torch.rand_like(epsilons) < epsilons, random_actions, q_values.argmax(-1))


def compute_loss(q_values, actions, returns):
    """mean[(R - Q(s, a))^2] over all steps; q_values have the actions as last axis."""
    action_values = q_values.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    return (returns - action_values).square().mean()


# <<< shared: q network
def compute_targets(rewards, terminations, truncations, final_values, next_values, gamma):
    """y_t = r_t + gamma Q_{t+1}, where Q_{t+1} = next_values[t] = Q_target(s_{t+1}, a_{t+1}). But
    Q_{t+1} is 0 where step t ended a game or, in Atari, a life (terminations), and it is
    final_values[t], for the last observation and an action drawn for it, after a time limit
    (truncations). All: (num_steps, num_envs)."""
    next_values = torch.where(truncations, final_values, next_values)
    next_values = torch.where(terminations, 0.0, next_values)
    return rewards + gamma * next_values


# >>> shared: optimizer
def make_optimizer(agent, args):
    settings = {"lr": args.learning_rate, "eps": args.optimizer_epsilon}
    if args.optimizer == "rmsprop":  # not torch's: see RMSpropTF, almost at the end of the file
        return RMSpropTF(agent.parameters(), **settings)
    # k times 32 games: k times fewer updates, so average over fewer (Malladi et al. 2022).
    k = max(1, args.num_envs / 32)
    betas = (max(0.0, 1 - 0.1 * k), 1 - 0.001 * k)
    return torch.optim.Adam(agent.parameters(), betas=betas, **settings, fused=True)


# <<< shared: optimizer
# 2. TRAINING =====================================================================================
def train(args, make_env):
    """Train in a new run folder, or in the one of --resume. make_env(args) makes one game."""
    stop_signals = catch_stop_signals()
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    envs = WorkerPool(args, make_env)
    agent = Agent(envs.action_space.n, args).to(device)
    target = copy.deepcopy(agent).requires_grad_(False)  # renewed every --target-interval steps
    optimizer = make_optimizer(agent, args)

    run_dir = choose_run_dir(args)
    lock = lock_run_dir(run_dir)  # held until close(), so that nobody else resumes this run
    checkpoint = load_checkpoint(args.resume)  # {} without --resume
    global_step = checkpoint.get("global_step", 0)
    if checkpoint:
        restore(checkpoint, agent, optimizer, args)
        target.load_state_dict(checkpoint.get("target", checkpoint["agent"]))
    say(f"{run_dir}: {args.num_envs} games on {args.num_workers} workers, network on the {device}")
    obs = envs.start(args.seed, global_step, checkpoint.get("env_states"))  # (num_envs, 4, 84, 84)
    next_actions = None  # for obs; drawn before an update and played after it
    if checkpoint.get("env_states"):  # otherwise the games start anew, and with them their actions
        next_actions = checkpoint["next_actions"].to(device)
    # forward[t](obs) is agent(obs). On a GPU, a CUDA graph does it in less than half the time.
    forward = repeat_agent(agent, args.num_steps + 1, torch.as_tensor(obs, device=device))
    final_epsilons = np.resize(args.final_epsilons, args.num_envs)  # repeats them
    final_epsilons = torch.tensor(final_epsilons, dtype=torch.float32, device=device)
    log = Log(args, run_dir, global_step, checkpoint.get("recent_scores", []))
    batch_size = args.num_envs * args.num_steps
    is_last = global_step >= args.total_timesteps
    while not is_last:
        # LEARNING RATE AND SHARES OF RANDOM ACTIONS
        learning_rate = args.learning_rate
        if args.anneal_lr:
            learning_rate *= 1 - global_step / args.total_timesteps
        optimizer.param_groups[0]["lr"] = learning_rate
        epsilons = 1 - (1 - final_epsilons) * min(1.0, global_step / args.exploration_steps)

        # ROLLOUT: all games take num_steps steps with the same parameters.
        # The update goes back through these passes. Several updates need new ones: pqn_atari.py.
        q_values, next_values = [], []  # of each step: (num_envs, num_actions) and (num_envs,)
        actions, rewards, terminations, truncations = [], [], [], []  # of each step: (num_envs,)
        final_values = torch.zeros(args.num_steps, args.num_envs, device=device)  # filled below
        try:
            step_q_values = forward[0](torch.as_tensor(obs, device=device))
            if next_actions is None:
                next_actions = epsilon_greedy(step_q_values, epsilons)
            for t in range(args.num_steps):
                step_actions = next_actions
                q_values.append(step_q_values)
                actions.append(step_actions)
                cpu_actions = step_actions.cpu().numpy()
                log.book_time("act")
                # The learner waits for all workers here, num_steps times per update.
                obs, reward, terminated, truncated, last_obs = envs.step(cpu_actions)
                rewards.append(reward)
                terminations.append(terminated)
                truncations.append(truncated)
                log.book_time("env")
                step_q_values = forward[t + 1](torch.as_tensor(obs, device=device))
                next_actions = epsilon_greedy(step_q_values, epsilons)
                next_q_values = step_q_values.detach()
                if args.target_interval > batch_size:  # otherwise target equals agent
                    next_q_values = target(torch.as_tensor(obs, device=device))
                next_values.append(next_q_values.gather(-1, next_actions.unsqueeze(-1)).squeeze(-1))
                if last_obs is not None:
                    # A time limit ended games: targets need the value of their last observation.
                    last_obs = torch.as_tensor(last_obs, device=device)
                    last_actions = epsilon_greedy(agent(last_obs), epsilons)
                    last_q_values = target(last_obs).gather(-1, last_actions.unsqueeze(-1))
                    final_values[t] = last_q_values.squeeze(-1)
            # report() comes before the update: if it loses a worker, this rollout is dropped.
            next_step = global_step + batch_size
            is_last = next_step >= args.total_timesteps or len(stop_signals) > 0
            checkpoint_due = is_last or is_due(args.checkpoint_interval, global_step, next_step)
            log_due = checkpoint_due or is_due(args.log_interval, global_step, next_step)
            if log_due:
                episodes, env_states = envs.report(with_states=checkpoint_due)
        except WorkerLost as lost:
            envs.note_loss(lost, global_step)  # ends the run at the third without progress
            obs = envs.start(args.seed, global_step)
            next_actions = None
            is_last = False  # report() may have failed after what was to be the last rollout
            continue

        # TARGETS
        q_values = torch.stack(q_values)  # (num_steps, num_envs, num_actions)
        actions = torch.stack(actions)  # (num_steps, num_envs), and so are all others
        rewards = torch.tensor(np.stack(rewards), dtype=torch.float32, device=device)
        rewards = rewards.clamp(-1, 1)  # for learning; the scores in the log are not clipped
        terminations = torch.tensor(np.stack(terminations), device=device)
        truncations = torch.tensor(np.stack(truncations), device=device)
        next_values = torch.stack(next_values)
        returns = compute_targets(
            rewards, terminations, truncations, final_values, next_values, args.gamma
        )

        # LOSS AND STEP
        loss = compute_loss(q_values, actions, returns)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
        scalars = {"losses/td_loss": loss.detach(), "losses/grad_norm": grad_norm}
        stop_if_not_finite(scalars, next_step)
        optimizer.step()
        if args.subtract_mean_screen:
            rate = max(batch_size / next_step, 0.001)  # 1 / updates so far, at first
            screen = torch.as_tensor(obs[:, -1], device=device).float().mean(dim=0)
            agent.mean_screen.lerp_(screen, rate)
        if is_due(args.target_interval, global_step, next_step):
            target.load_state_dict(agent.state_dict())
        global_step = next_step
        log.book_time("learn")

        # LOG AND CHECKPOINT
        if log_due:
            scalars["losses/q_values"] = q_values.mean()
            scalars["charts/epsilon"] = epsilons.mean()
            scalars["charts/learning_rate"] = learning_rate
            scalars |= live_units(agent, torch.as_tensor(obs, device=device))
            log.write(global_step, episodes, scalars)
        if checkpoint_due:
            checkpoint = {
                "script": SCRIPT,
                "args": asdict(args) | {"resume": None},
                "global_step": global_step,
                "agent": agent.state_dict(),
                "target": target.state_dict(),
                "next_actions": next_actions.cpu(),
                "optimizer": optimizer.state_dict(),
                "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
                "env_states": env_states,
                "recent_scores": list(log.recent_scores),
            }
            save_checkpoint(run_dir, checkpoint, is_last)
        log.book_time("log")

    envs.close()
    lock.close()
    exit_if_stopped(stop_signals, global_step, run_dir)


# =================================================================================================
# PLUMBING: nearly the same text in all scripts. Skip it when reading, and copy it as it is. To
# change it in all of them, change it in paac_atari.py and run utils/sync_shared.py.
# =================================================================================================

# >>> shared: imports
import atexit
import fcntl
import glob
import importlib.util
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import signal
import sys
import threading
import time
import traceback
import uuid
from collections import Counter, deque
from contextlib import contextmanager, suppress
from functools import partial, wraps

import tyro

SCRIPT = Path(__file__).stem
# <<< shared: imports

# 3. Games ----------------------------------------------------------------------------------------

# >>> shared: games
import difflib
import json

import ale_py
import cv2


def make_env(args, **options):
    """One game; for a video, options are render_mode="rgb_array". Put your own wrappers here: any
    gymnasium environment will do whose observations and actions Agent takes: docs/forking.md"""
    return AtariEnv(args.env_id, args.frame_skip, args.terminal_on_life_loss, **options)


def check_env(args):
    env_id = args.env_id
    if env_id in gym.registry and gym.spec(env_id).entry_point == "ale_py.env:AtariEnv":
        return
    games = [name for name in gym.registry if name.startswith("ALE/") or "NoFrameskip-v4" in name]
    closest = difflib.get_close_matches(env_id, games, n=3, cutoff=0)
    fail(f"--env-id {env_id} is not an Atari game; closest: {', '.join(closest)}")


class AtariEnv(gym.Env):
    """One Atari game as the DQN papers show it: the four newest frames, uint8 (4, 84, 84), newest
    last; rewards are raw points.

    Equals gymnasium's AtariPreprocessing and FrameStackObservation bit for bit, but fetches only
    the screens that are used, resizes only what changed, and boots once: a restart goes back to
    that moment. That differs a little from a new boot in some games, and with sticky actions. With
    terminal_on_life_loss a lost life is `terminated`, but the game goes on: reset it when
    info["game_over"].
    """

    def __init__(self, env_id, frame_skip=4, terminal_on_life_loss=False, render_mode=None):
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner from each process
        cv2.setNumThreads(0)  # every core has games of its own
        self.atari = gym.make(env_id, render_mode=render_mode, disable_env_checker=True).unwrapped
        self.ale = self.atari.ale
        self.render = self.atari.render
        self.render_mode = render_mode
        self.metadata = self.atari.metadata
        self.action_set = self.ale.getMinimalActionSet()
        self.frame_skip = frame_skip
        self.terminal_on_life_loss = terminal_on_life_loss
        self.booted = None  # the emulator after reset(seed)
        self.screen = np.zeros(self.ale.getScreenDims(), np.uint8)  # the one that became frames[3]
        self.frames = np.zeros((4, 84, 84), np.uint8)
        self.observation_space = gym.spaces.Box(0, 255, self.frames.shape, np.uint8)
        self.action_space = gym.spaces.Discrete(len(self.action_set))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None or self.booted is None:
            self.atari.reset(seed=seed)  # seeds the emulator (sticky actions) and atari.np_random
            self.booted = self.ale.cloneState()
        else:
            # Booting emulates 68 frames, and all other games would wait for that at each restart.
            self.ale.restoreState(self.booted)
        for _ in range(self.atari.np_random.integers(1, 31)):  # no-ops: each game starts elsewhere
            self.ale.act(self.action_set[0])
        self.lives = self.ale.lives()
        self.observe([self.ale.getScreenGrayscale()])
        self.frames[:3] = self.frames[3]
        return self.frames, {}

    def step(self, action):
        """action: index into the minimal action set, repeated frame_skip times; rewards add up."""
        reward = 0.0
        screens = []
        for repeat in range(self.frame_skip):
            reward += self.ale.act(self.action_set[action])
            terminated = self.ale.game_over(with_truncation=False)
            truncated = self.ale.game_truncated()  # after 108,000 frames
            game_over = terminated or truncated
            lives = self.ale.lives()
            if self.terminal_on_life_loss and lives < self.lives:
                terminated = True  # a lost life ends the return; the game goes on
            self.lives = lives
            if terminated or truncated:
                # The repeat ends early, and like gymnasium's wrapper we show the previous screen.
                screens.append(self.screen)
                break
            if repeat >= self.frame_skip - 2:
                screens.append(self.ale.getScreenGrayscale())
        self.observe(screens)
        return self.frames, reward, terminated, truncated, {"game_over": game_over}

    def observe(self, screens):
        """Append the newest frame. screens: the last one or two of a step, uint8 (height, 160)."""
        screen = np.maximum(screens[0], screens[-1])  # many sprites show in every other screen only
        frame = resize_changed_rows(screen, self.screen, self.frames[3])
        # A new array, because the caller may keep the old one.
        self.frames = np.concatenate([self.frames[1:], frame[np.newaxis]])
        self.screen = screen

    def get_state(self):
        """All that the game's future depends on, in plain types, for set_state(). It also brings
        this game into the state that a restored one will have."""
        emulator = self.ale.cloneState(include_rng=True).serialize()
        self.restore_emulator(emulator)  # because the snapshot is not complete
        return {
            "emulator": emulator,
            "booted": self.booted.serialize(),
            "np_random": json.dumps(self.atari.np_random.bit_generator.state),
            "lives": self.lives,
            "screen": self.screen.tobytes(),
            "frames": self.frames.tobytes(),
        }

    def set_state(self, state):
        """Go on from where a game's get_state() was called -> obs."""
        self.restore_emulator(state["emulator"])
        self.booted = ale_py.ALEState(state["booted"])
        self.atari.np_random.bit_generator.state = json.loads(state["np_random"])
        self.lives = state["lives"]
        self.screen = np.frombuffer(state["screen"], np.uint8).reshape(self.screen.shape)
        self.frames = np.frombuffer(state["frames"], np.uint8).reshape(self.frames.shape)
        return self.frames

    def restore_emulator(self, emulator):
        # A snapshot lacks the last sticky action and part of the video chip's state. 30 no-ops
        # bring these to the same values in all games, then the snapshot is restored once more.
        self.ale.restoreState(ale_py.ALEState(emulator))
        for _ in range(30):
            self.ale.act(self.action_set[0])
        self.ale.restoreState(ale_py.ALEState(emulator))


def resize_changed_rows(screen, previous_screen, previous_frame):
    """Resize a screen, uint8 (height, 160), to a frame, uint8 (84, 84).

    210 lines become 84 rows, so 5 lines become exactly 2 rows. Only the strips of 5 lines from the
    first to the last changed line are resized. The other rows are those of previous_frame, which is
    previous_screen resized. A game's step would take 9 to 19 % longer with all of it resized.
    """
    _, top, _, height = cv2.boundingRect(np.bitwise_xor(screen, previous_screen))
    if height == 0:
        return previous_frame
    if len(screen) != 210:
        return cv2.resize(screen, (84, 84), interpolation=cv2.INTER_AREA)
    first = top // 5
    end = math.ceil((top + height) / 5)
    frame = previous_frame.copy()
    frame[2 * first : 2 * end] = cv2.resize(
        screen[5 * first : 5 * end], (84, 2 * (end - first)), interpolation=cv2.INTER_AREA
    )
    return frame


# <<< shared: games

# 4. Workers --------------------------------------------------------------------------------------


# >>> shared: workers
class WorkerLost(Exception):
    """A worker died or did not answer in time. The text says which one, its games and the cause."""


def ends_worker_on_error(method):
    """If a game raises an error, print its traceback and end the worker with exit code 1. The
    learner then ends the run. gymnasium would send the error to the learner, where an OSError looks
    like a broken pipe, and where errors that cannot be pickled never arrive."""

    @wraps(method)
    def wrapped(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except Exception:
            if multiprocessing.parent_process() is None:  # --num-workers 0: it arrives by itself
                raise
            traceback.print_exc()
            sys.exit(1)

    return wrapped


class Worker(gym.Env):
    """The games of one process, played one after another, as one environment with arrays, which is
    what AsyncVectorEnv needs. A game is any gymnasium environment with a Box of observations.

    A game restarts after `truncated`, and after `terminated` unless info["game_over"] is False.
    Games with get_state() and set_state(state) -> obs resume exactly where they were.
    """

    def __init__(self, args, make_env, games, observation_space, action_space):
        self.args = args
        self.make_env = make_env
        self.games = games  # a range: their numbers among the games of all workers
        self.envs = []  # made by reset(): AsyncVectorEnv also makes a Worker in the learner
        self.observation_space = gym.vector.utils.batch_space(observation_space, len(games))
        self.action_space = gym.vector.utils.batch_space(action_space, len(games))
        self.obs = np.zeros(self.observation_space.shape, observation_space.dtype)

    @ends_worker_on_error
    def reset(self, *, seed=None, options=None):
        """Start all games, or go on from options["states"], which has those of all workers' games.
        global_step and attempt: no two restarts share their random numbers."""
        if not self.envs:
            if multiprocessing.parent_process() is not None:
                # When the learner is dead, a write to its pipe ends the worker without a traceback.
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            self.envs = [self.make_env(self.args) for _ in self.games]
        self.scores = [0.0] * len(self.games)
        self.lengths = [0] * len(self.games)
        self.episodes = []  # (score, length in agent steps) of the games that ended
        for i, env in enumerate(self.envs):
            key = [seed, self.games[i], options["global_step"], options["attempt"]]
            stream = np.random.SeedSequence(key)
            self.obs[i], _ = env.reset(seed=int(stream.generate_state(1, np.uint64)[0]))
            if options["states"]:
                state = options["states"][self.games[i]]
                self.obs[i] = env.set_state(state["env"])
                self.scores[i] = state["score"]
                self.lengths[i] = state["length"]
        return self.obs, {}

    @ends_worker_on_error
    def step(self, actions):
        """One step of all games, with lists for rewards, terminations and truncations. If a time
        limit ended a game, info["last_obs"] has what all games showed before any was restarted."""
        rewards, terminations, truncations, games_over = [], [], [], []
        for i, env in enumerate(self.envs):
            self.obs[i], reward, terminated, truncated, info = env.step(actions[i])
            self.scores[i] += reward
            self.lengths[i] += 1
            rewards.append(reward)
            terminations.append(terminated)
            truncations.append(truncated)
            if truncated or info.get("game_over", terminated):
                games_over.append(i)
        info = {}
        if any(truncations):
            info["last_obs"] = self.obs.copy()  # as "final_obs", gymnasium would take it apart
        for i in games_over:
            self.episodes.append((float(self.scores[i]), self.lengths[i]))
            self.scores[i] = 0.0
            self.lengths[i] = 0
            self.obs[i], _ = self.envs[i].reset()
        return self.obs, rewards, terminations, truncations, info

    @ends_worker_on_error
    def report(self, with_states):
        """What ended since the last report; the states of all games, if wanted and available."""
        episodes = self.episodes
        self.episodes = []
        states = []
        if with_states and hasattr(self.envs[0], "get_state"):
            for env, score, length in zip(self.envs, self.scores, self.lengths):
                states.append({"env": env.get_state(), "score": float(score), "length": length})
        return episodes, states


class LocalVectorEnv(Worker):
    """--num-workers 0: a Worker in this process, with AsyncVectorEnv's methods."""

    def reset(self, seed, options):
        return super().reset(seed=seed[0], options=options)

    def step(self, actions):
        return super().step(actions[0])

    def call(self, name, *args):
        return [getattr(self, name)(*args)]


class TimedVectorEnv(gym.vector.AsyncVectorEnv):
    """Raises a TimeoutError where gymnasium would wait for ever for a worker whose process runs.
    They get one second more: after Ctrl-Z and fg the time is over before they have run again."""

    start_timeout = step_timeout = None  # seconds; WorkerPool sets them

    def reset_wait(self, timeout=None):
        return super().reset_wait(self.start_timeout)

    def step_wait(self, timeout=None):
        return super().step_wait(self.step_timeout)

    def call_wait(self, timeout=None):
        return super().call_wait(self.step_timeout)

    def _poll_pipe_envs(self, timeout=None):
        return super()._poll_pipe_envs(timeout) or super()._poll_pipe_envs(1.0)


class WorkerPool:
    """All games as one vector environment: of num_workers processes or, if that is 0, in this one.

    step() and report() raise WorkerLost when a worker has died or does not answer; all others have
    been ended then, too, and start() makes new ones. first_game: the number of the first game."""

    def __init__(self, args, make_env, first_game=0):
        game = make_env(args)
        self.observation_space = game.observation_space  # of one game
        self.action_space = game.action_space
        game.close()
        self.obs_shape = (args.num_envs, *game.observation_space.shape)
        if args.num_workers > 0:
            start_fork_server()  # it needs seconds to import torch: the network is made meanwhile
        self.args = args
        self.make_env = make_env
        self.envs = None  # gymnasium's vector environment, from start() to the end or a loss
        self.num_losses = 0
        self.loss_step = None
        self.games_per_worker = args.num_envs // max(1, args.num_workers)
        self.games = []  # of each worker, the numbers of its games
        for first in range(first_game, first_game + args.num_envs, self.games_per_worker):
            self.games.append(range(first, first + self.games_per_worker))
        atexit.register(self.close)

    def start(self, seed, global_step, states=None):
        """Start all games, new or in the given states -> obs (num_envs, *observation shape)."""
        seeds = [seed] * len(self.games)
        while True:
            attempt = self.num_losses if global_step == self.loss_step else 0
            options = {"global_step": global_step, "attempt": attempt, "states": states}
            try:
                with self.raising_worker_lost():
                    if self.envs is None:
                        self.envs = self.make_vector_env()
                    obs, _ = self.envs.reset(seed=seeds, options=options)
                return obs.reshape(self.obs_shape).copy()
            except WorkerLost as lost:
                self.note_loss(lost, global_step)

    def step(self, actions):
        """actions: array (num_envs, ...) -> obs as start(); rewards, terminations, truncations:
        (num_envs,); last_obs: None, or obs before the restarts where a time limit ended a game."""
        shape = (len(self.games), self.games_per_worker, *actions.shape[1:])
        with self.raising_worker_lost():
            obs, *outcome, info = self.envs.step(actions.reshape(shape).tolist())  # lists: cheap
        rewards, terminations, truncations = (np.reshape(x, self.args.num_envs) for x in outcome)
        last_obs = info.get("last_obs")  # zeros from workers without a time limit in this step
        if last_obs is not None:
            last_obs = last_obs.reshape(self.obs_shape)
        # A copy, because the workers overwrite their memory in the next step, and the caller (or
        # autograd, with float32 observations) may still need what is in it now.
        obs = obs.reshape(self.obs_shape).copy()
        return obs, rewards, terminations, truncations, last_obs

    def report(self, with_states):
        """The episodes and, if wanted, the states of Worker.report() of all workers."""
        episodes, states = [], []
        with self.raising_worker_lost():
            for worker_episodes, worker_states in self.envs.call("report", with_states):
                episodes += worker_episodes
                states += worker_states
        return episodes, states

    def close(self):
        """End all workers, also hanging ones, for which AsyncVectorEnv.close() would wait."""
        processes = getattr(self.envs, "processes", [])
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        if processes:
            self.envs.closed = True  # so that its destructor does not wait for them either
        self.envs = None

    def make_vector_env(self):
        spaces = (self.observation_space, self.action_space)
        if self.args.num_workers == 0:
            return LocalVectorEnv(self.args, self.make_env, *self.games, *spaces)
        # Not fork: a process with threads, or with a GPU, may hang in a forked child.
        start_fork_server()
        options = {"copy": False, "autoreset_mode": "Disabled", "context": "forkserver"}
        makers = [partial(Worker, self.args, self.make_env, games, *spaces) for games in self.games]
        envs = TimedVectorEnv(makers, **options)
        envs.step_timeout = self.args.step_timeout
        envs.start_timeout = self.args.step_timeout + self.games_per_worker  # a second per game
        place_workers(envs.processes)
        return envs

    def note_loss(self, lost, global_step):
        """Announce the restart; give up at the third loss without progress."""
        if global_step != self.loss_step:
            self.num_losses = 0
        self.loss_step = global_step
        self.num_losses += 1
        if self.num_losses == 3:
            advice = "--resume continues from the last checkpoint, if there is one"
            sys.exit(f"{lost}; three times without progress: giving up. {advice}")
        say(f"{lost}; all games restart; the current rollout is dropped", sys.stderr)

    @contextmanager
    def raising_worker_lost(self):
        try:
            yield
        except (EOFError, OSError, multiprocessing.TimeoutError) as error:
            if self.args.num_workers == 0:
                raise
            cause = self.find_lost_workers() or f"a worker was lost ({error!r})"
            self.close()
            raise WorkerLost(cause) from None

    def find_lost_workers(self):
        """Which workers died or did not answer. Ends the run if a game raised an error."""
        processes = getattr(self.envs, "processes", [])
        # A pipe breaks a moment before the exit code is there.
        multiprocessing.connection.wait([process.sentinel for process in processes], timeout=1)
        died, silent = [], []
        for i, process in enumerate(processes):
            games = f"games {self.games[i][0]} to {self.games[i][-1]}"
            worker = f"worker {i} ({games}, pid {process.pid})"
            if process.exitcode == 1:
                sys.exit(f"{worker} ended with the error printed above")
            if process.exitcode is not None:
                died.append(f"{worker} died: {exit_cause(process.exitcode)}")
            elif not self.envs.parent_pipes[i].poll():
                silent.append(f"{worker} did not answer in time")
        return "; ".join(died or silent)


# <<< shared: workers


# >>> shared: processes
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def start_fork_server():
    """Start the process from which the workers are forked. It and they block the signals that
    terminals and SLURM send to all processes: the learner decides when the run ends. Called again,
    it only replaces a server that has died."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    multiprocessing.resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # the line above unblocks two of them
    multiprocessing.forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def place_workers(processes):
    """Give each worker a core of its own if there are exactly as many, and keep workers that wake
    up from interrupting the learner (SCHED_BATCH). Makes training 9 % faster."""
    if not hasattr(os, "sched_setaffinity"):  # only Linux lets processes choose
        return
    cores = sorted(os.sched_getaffinity(0))
    for i, process in enumerate(processes):
        with suppress(OSError):  # some sandboxes forbid it
            if len(processes) == len(cores):
                os.sched_setaffinity(process.pid, {cores[i]})
            os.sched_setscheduler(process.pid, os.SCHED_BATCH, os.sched_param(0))


def exit_cause(exitcode):
    if exitcode < 0:
        return signal.Signals(-exitcode).name
    return f"exit code {exitcode}"


# <<< shared: processes

# 5. Runs -----------------------------------------------------------------------------------------


# >>> shared: runs
# A resumed run keeps these, because the checkpoint's network, optimizer and games fit no others.
NETWORK_FLAGS = ("arch", "hidden_size", "layer_norm", "subtract_mean_screen")
FIXED_FLAGS = ("env_id", "num_envs", "optimizer", *NETWORK_FLAGS)


def say(text, stream=None):
    """Print a line. If nobody can read it any more, because a pipe is broken or a disk is full, the
    stream leads nowhere from then on, and the run goes on."""
    stream = stream or sys.stdout
    if stream is None:  # closed before the start
        return
    try:
        print(text, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fail(message):
    say(f"{SCRIPT}.py: {message}", sys.stderr)
    sys.exit(2)


def parse_args(argv=None):
    """The command line as Args, on top of the defaults or of the resumed run's flags. Flags that
    cannot work end the program here, with exit code 2 and a line that says what to change."""
    args = tyro.cli(Args, args=argv)
    if args.resume == "auto":
        args.resume = find_newest_run_like(args)
    if args.resume is not None:
        args = parse_resumed_args(args.resume, argv)
    check_numbers(args)
    name = run_name(args)
    if "/" in name or len(name.encode()) > 200:
        fail(f"--exp-name {args.exp_name}: too long, or not the name of a folder")
    # Without an origin it is some folder named wandb, such as wandb itself leaves behind.
    if args.track and getattr(importlib.util.find_spec("wandb"), "origin", None) is None:
        fail("--track needs Weights & Biases: pip install wandb")
    choose_num_workers(args)
    check_env(args)
    return args


def parse_resumed_args(resume, argv):
    """The run's own flags, replaced by those that are typed with --resume."""
    try:
        checkpoint = load_checkpoint(resume)
    except ValueError as error:
        fail(error)
    if Path(resume).name == CHECKPOINT and "optimizer" in checkpoint:  # not an exported agent
        resume = str(Path(resume).parent)
    saved = checkpoint["args"]
    saved.num_workers = None  # one per core of this machine, which may have more or fewer
    args = replace(tyro.cli(Args, args=argv, default=saved), resume=resume)
    for name in FIXED_FLAGS:
        if getattr(args, name, None) != getattr(saved, name, None):
            fail(f"{resume}: --{name.replace('_', '-')} cannot change within a run")
    check_numbers(args)
    if checkpoint["global_step"] >= args.total_timesteps:
        say(f"{resume}: nothing left to do; --total-timesteps is {args.total_timesteps:,}")
        sys.exit(0)
    if "optimizer" not in checkpoint:
        say(f"{resume}: an agent without its optimizer, which starts anew")
    if not checkpoint.get("env_states"):
        say(f"{resume}: no states of the games in it: they start anew")
    return args


# Numeric flags lie between these; unlisted integers start at 1, unlisted floats at 0.
RANGES = {
    "seed": (0, 2**32 - 1),
    "num_envs": (1, 10**4),
    "num_steps": (1, 10**4),
    "hidden_size": (1, 10**4),
    "num_workers": (0, 10**4),
    "step_timeout": (0.001, 10**6),
    "gamma": (0, 1),
    "q_lambda": (0, 1),
    "max_grad_norm": (1e-12, 10**12),
    "optimizer_epsilon": (1e-12, 10**12),
    "final_epsilons": (0, 1),
}


def check_numbers(args):
    """Refuse numbers outside their range, inf and nan among them."""
    for name, value in vars(args).items():
        flag = name.replace("_", "-")
        numbers = value if isinstance(value, tuple) else [value]
        if len(numbers) == 0:
            fail(f"--{flag}: at least one number")
        for number in numbers:
            if type(number) not in (int, float):  # strings, None, and bool, which is an int, too
                continue
            default = (1, 10**12) if isinstance(number, int) else (0, 10**12)
            lowest, highest = RANGES.get(name, default)
            if not lowest <= number <= highest:  # true for nan, too
                fail(f"--{flag} {number}: must lie between {lowest} and {highest:,}")


def run_name(args):
    return f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}"


def choose_run_dir(args):
    """The resumed run's folder, or a new one, with the time in microseconds in its name."""
    if args.resume and Path(args.resume).is_dir():
        return Path(args.resume)
    return Path("runs", f"{run_name(args)}__{time.time():.6f}")


def lock_run_dir(run_dir):
    """Returns an open file. Until it is closed, which also happens when this process dies, another
    process that locks this folder ends with one line. A folder that cannot be locked is used
    without a lock."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # Not buffered: close() would try again to write what a full disk has refused.
        file = open(run_dir / "lock", "a+b", buffering=0)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        fail(f"{run_dir} is in use by process {file.read().decode()}")
    except OSError:
        return open(os.devnull)
    with suppress(OSError):  # the lock holds without the number in it
        file.truncate(0)
        file.write(str(os.getpid()).encode())
    return file


def find_newest_run_like(args):
    """The newest folder in runs/ whose run has the same flags, or None."""
    pattern = f"{glob.escape(run_name(args))}__*/{CHECKPOINT}"
    for path in sorted(Path("runs").glob(pattern), reverse=True):
        try:
            saved = load_checkpoint(path)["args"]
        except ValueError as error:
            say(f"{SCRIPT}.py: --resume auto skips {error}", sys.stderr)
            continue
        if comparable(saved) == comparable(args):
            return str(path.parent)
    return None


def comparable(args):
    flags = asdict(args)
    flags.pop("resume")
    flags.pop("num_workers", None)  # any number of workers plays the same games
    return flags


def load_checkpoint(path):
    """The checkpoint in a run folder or of a file as a dictionary, with an Args as "args"; train()
    lists the keys. Raises ValueError if it is missing, damaged or another script's."""
    if path is None:
        return {}
    path = Path(path)
    if path.is_dir():
        path = path / CHECKPOINT
    if not path.exists():
        raise ValueError(f"{path}: missing")
    try:
        checkpoint = deserialize(path)
        script = checkpoint["script"]
        flags = checkpoint["args"]
        known = {field.name for field in fields(Args)}  # an older version may have had others
        checkpoint["args"] = Args(**{name: flags[name] for name in flags if name in known})
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(f"{path}: damaged, or no checkpoint of {SCRIPT}.py") from error
    if "global_step" not in checkpoint or "agent" not in checkpoint:
        raise ValueError(f"{path}: no global_step or no agent in it")
    if script != SCRIPT:
        raise ValueError(f"{path}: not from {SCRIPT}.py, but from {script}.py")
    return checkpoint


def save_checkpoint(run_dir, checkpoint, is_last):
    """Replace the run's checkpoint in one step, so that there is a whole one at any time. If the
    disk is full, warn and go on, but end with exit code 1 if this was to be the last checkpoint: it
    would be missed. A network that is not finite ends the run, too."""
    if not is_finite(checkpoint["agent"]):
        sys.exit(f"step {checkpoint['global_step']}: a parameter is inf or nan: {NOT_FINITE}")
    path = run_dir / CHECKPOINT
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".tmp"), "wb") as file:
            file.write(serialize(checkpoint))
            file.flush()
            os.fsync(file.fileno())
        # What cannot be read back ends the run here, and not with --resume.
        deserialize(path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    except OSError as error:
        if is_last:
            sys.exit(f"step {checkpoint['global_step']}: last checkpoint not written: {error}")
        say(f"warning: no checkpoint written: {error}; training continues", sys.stderr)


def is_due(interval, last_step, step):
    """Whether a multiple of the interval lies between the two steps."""
    return step // interval > last_step // interval


NOT_FINITE = "stopped; the last checkpoint is unchanged. A lower --learning-rate may help"


def stop_if_not_finite(losses, step):
    if math.isfinite(sum(losses.values())):
        return
    parts = ", ".join(f"{tag.removeprefix('losses/')} {loss:g}" for tag, loss in losses.items())
    sys.exit(f"step {step}: {parts}: {NOT_FINITE}")


def catch_stop_signals():
    """Install handlers and return a list that stays empty until a stop signal comes: then it holds
    (time, signal), and train() stops after the current update. Repeats within a second are ignored,
    because uv, timeout and terminals send several; a later one ends the process at once."""
    received = []

    def on_signal(signum, frame):
        now = time.monotonic()
        if not received:
            received.append((now, signum))
        elif now > received[0][0] + 1:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    for signum in STOP_SIGNALS:
        if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
            continue  # nohup: the run must outlive its terminal
        signal.signal(signum, on_signal)
    return received


def exit_if_stopped(stop_signals, global_step, run_dir):
    if stop_signals:
        _, signum = stop_signals[0]
        name = signal.Signals(signum).name
        say(f"{name}: stopped at step {global_step:,}; resume it with --resume {run_dir}")
        sys.exit(128 + signum)


class Log:
    """Lines on the terminal and curves in TensorBoard. If one of them fails, the other and the
    training continue."""

    def __init__(self, args, run_dir, global_step, recent_scores):
        self.args = args
        self.run_dir = run_dir
        self.last_step = global_step  # of the last point, like last_time
        self.last_time = time.perf_counter()
        self.last_booking = self.last_time
        self.seconds = Counter()  # since the last point, by what they were spent on
        self.recent_scores = deque(recent_scores, maxlen=100)
        self.writer = None  # opened with the first point: an unwritable folder is a warning then
        threading.excepthook = ignore_full_disk
        if args.track:
            import wandb

            # A resumed run goes on in W&B, too, because its id depends on the folder's name alone.
            name = run_dir.resolve().name  # of --resume . as well
            run_id = uuid.uuid5(uuid.NAMESPACE_URL, name).hex
            names = {"name": name, "id": run_id, "resume": "allow"}
            wandb.init(sync_tensorboard=True, config=asdict(args), **names)

    def book_time(self, part):
        """Book the time since the last call under `part`."""
        now = time.perf_counter()
        self.seconds[part] += now - self.last_booking
        self.last_booking = now

    def write(self, global_step, episodes, scalars):
        """A point of all curves. episodes: (score, length) of the games that ended since the last
        point; scalars: {tag: number or tensor}."""
        now = time.perf_counter()
        seconds = now - self.last_time
        scalars = {"charts/SPS": (global_step - self.last_step) / seconds, **scalars}
        for part in self.seconds:
            scalars[f"time/{part}"] = self.seconds[part] / self.seconds.total()
        if episodes:
            scores, lengths = zip(*episodes)
            self.recent_scores.extend(scores)
            scalars["charts/episodic_return"] = np.mean(scores)
            scalars["charts/episodic_length"] = np.mean(lengths)
        self.show(global_step, scalars["charts/SPS"])
        try:
            if self.writer is None:
                self.writer = self.open_writer()
            for tag, scalar in scalars.items():
                self.writer.add_scalar(tag, scalar, global_step)
            self.writer.flush()  # so that TensorBoard is never behind a checkpoint
        except OSError as error:
            say(f"warning: no curves in {self.run_dir}: {error}; training continues", sys.stderr)
            self.writer = None  # its thread has ended; the next point tries with a new one
        self.last_step = global_step
        self.last_time = now
        self.seconds.clear()

    def show(self, global_step, speed):
        score = "no game over yet"
        if self.recent_scores:
            score = f"score {np.mean(self.recent_scores):.1f}"
        total = self.args.total_timesteps
        hours = max(0, total - global_step) / max(speed, 1) / 3600
        progress = f"step {global_step:,} of {total:,}  {speed:,.0f} steps/s"
        say(f"{progress}  {hours:.1f} h left  {score}")

    def open_writer(self):
        # After a crash, TensorBoard is ahead of the checkpoint: those points will come again.
        writer = SummaryWriter(self.run_dir, purge_step=self.last_step + 1)
        rows = [f"|{name}|{value}|" for name, value in asdict(self.args).items()]
        writer.add_text("hyperparameters", "\n".join(["|flag|value|", "|-|-|", *rows]))
        return writer


def ignore_full_disk(died):
    """For threading.excepthook. TensorBoard writes from a thread of its own; when an OSError ends
    it, Log.write() says so, and the traceback would only repeat it."""
    if not isinstance(died.exc_value, OSError):
        threading.__excepthook__(died)


# <<< shared: runs
# >>> shared: number of workers
def choose_num_workers(args):
    """None becomes the number of cores, or the largest below it that divides the games."""
    if args.num_workers is None:
        cores = os.cpu_count()
        if hasattr(os, "sched_getaffinity"):  # those that this process may use
            cores = len(os.sched_getaffinity(0))
        args.num_workers = min(cores, args.num_envs)
        while args.num_envs % args.num_workers:
            args.num_workers -= 1
    if args.num_workers and args.num_envs % args.num_workers:
        fail(f"--num-envs {args.num_envs} is not a multiple of --num-workers {args.num_workers}")


# <<< shared: number of workers
# >>> shared: torch
import io
import zipfile

from torch.utils.tensorboard import SummaryWriter

CHECKPOINT = "checkpoint.pt"
# The fork server imports these once for all workers, which import this whole script.
PRELOAD = ["torch.utils.tensorboard", "gymnasium", "tyro"]


def serialize(checkpoint):
    buffer = io.BytesIO()  # written to a file, torch.save() hides the OSError of a full disk
    torch.save(checkpoint, buffer)
    return buffer.getbuffer()


def is_finite(agent_state):
    return all(parameter.isfinite().all() for parameter in agent_state.values())


def deserialize(path):
    # torch.save() writes zip files, but torch.load() does not look at their checksums.
    if not zipfile.is_zipfile(path) or zipfile.ZipFile(path).testzip():
        raise ValueError("not a zip file, or a damaged one")
    # weights_only: nothing in the file is executed, wherever it comes from.
    return torch.load(path, map_location="cpu", weights_only=True)


def restore(checkpoint, agent, optimizer, args):
    agent.load_state_dict(checkpoint["agent"])
    if "optimizer" in checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
    optimizer.param_groups[0]["eps"] = args.optimizer_epsilon  # it may be typed with --resume
    if "rng" in checkpoint:  # not in an exported agent
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        # The checkpoint may come from a machine with more GPUs.
        torch.cuda.set_rng_state_all(checkpoint["rng"]["cuda"][: torch.cuda.device_count()])


# <<< shared: torch
# >>> shared: rmsprop
class RMSpropTF(torch.optim.Optimizer):
    """RMSProp as in TensorFlow 1 and the papers. It differs from torch.optim.RMSprop in two ways:
    epsilon is inside the square root, and the mean square starts at 1, not 0. With epsilon 0.1,
    torch's steps are up to 3.2 times larger."""

    def __init__(self, params, lr, eps, alpha=0.99):
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["square_avg"] = torch.ones_like(p)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                square_avg = self.state[p]["square_avg"]
                square_avg.mul_(group["alpha"]).addcmul_(p.grad, p.grad, value=1 - group["alpha"])
                p.addcdiv_(p.grad, (square_avg + group["eps"]).sqrt(), value=-group["lr"])


# <<< shared: rmsprop
# >>> shared: live units
@torch.no_grad()
def live_units(agent, *inputs):
    """The share of the units of each ReLU layer (of a convolution: its filters) that are positive
    for at least one of the observations, by tag. A unit that is positive for none has no gradient,
    and if that is so for all observations to come, it can never learn again.
    inputs: those of agent(). A network without nn.ReLU modules has no such layers."""
    outputs = []  # of the ReLU layers: (num_envs, units, ...)

    def keep(layer, inputs, output):
        outputs.append(output)

    layers = [layer for layer in agent.modules() if isinstance(layer, nn.ReLU)]
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    agent(*inputs)
    for hook in hooks:
        hook.remove()
    shares = {}
    for number, output in enumerate(outputs, start=1):
        units = output.transpose(0, 1).flatten(start_dim=1)  # (units, everything else)
        is_live = (units > 0).any(dim=1)
        shares[f"charts/live_units_{number}"] = is_live.float().mean()
    return shares


# <<< shared: live units
# >>> shared: cuda graphs
def repeat_agent(agent, num_passes, obs):
    """Return num_passes functions that compute agent(obs). On a GPU each is a CUDA graph, which is
    one launch instead of one per operation; call them in order, and backward in reverse order. Each
    pass has its own graph and input, because using them again overwrites what backward still needs.
    A graph repeats what was recorded: no other branch of an if, no other shape, and nothing that
    waits for the GPU, like item(). obs: an example of the observations to come."""
    if obs.device.type == "cpu":
        return [agent] * num_passes
    if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
        # A warning about the stream of the recording. With and without graphs, the parameters of
        # paac_atari.py were the same bits after 20 updates (commit 105d45d).
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    agents = tuple(copy.copy(agent) for _ in range(num_passes))  # which share their parameters
    inputs = tuple((obs.clone(),) for _ in range(num_passes))
    return torch.cuda.make_graphed_callables(agents, inputs)


# <<< shared: cuda graphs


if __name__ == "__main__":
    train(parse_args(), make_env)
