# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8,<3", "gymnasium>=1.2.3,<2", "ale-py>=0.11.1,<1",
#   "numpy>=2,<3", "opencv-python-headless>=4.10,<6", "tyro>=0.9.2,<2", "tensorboard>=2.19,<3"]
# ///
"""A3C: asynchronous advantage actor-critic on Atari (Mnih et al. 2016, arXiv 1602.01783).

num_envs actor-learners are processes with one game each. Each copies the shared network, plays
num_steps steps with the copy, and takes one gradient step of the *shared* network on

    L   = mean[-log pi(a_t|s_t) (R_t - V(s_t))] - ent_coef mean[H] + vf_coef mean[(R_t - V(s_t))^2]
    R_t = r_t + gamma R_{t+1},  R_T = V(s_T),  T = num_steps,

where H is the entropy, r_t is clipped to [-1, 1], and R_t and, in the first mean, V(s_t) are
constants. If step t ended the game or a life, R_{t+1} is 0; if a time limit did, V of the last obs.
The others do the same at the same time: nobody waits, and there is no lock anywhere (Hogwild).

Sections 1 and 2 are the algorithm; start with actor_learner(). The rest, but section 4, is PAAC's.

    python a3c_atari.py --env-id PongNoFrameskip-v4   # train; Ctrl-C saves a checkpoint and stops
    python a3c_atari.py --resume runs/NAME            # resumes; the games start anew
"""

import copy
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn as nn


@dataclass
class Args:  # the comments are the texts of --help
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    seed: int = 1  # of the network, the actions and all games
    track: bool = False  # log to Weights & Biases, too (pip install wandb)
    resume: str | None = None  # run folder or checkpoint; auto: the newest run like this one
    log_interval: int = 10_000  # agent steps between two points of the curves
    checkpoint_interval: int = 500_000  # agent steps between two checkpoints

    env_id: str = "BreakoutNoFrameskip-v4"  # ALE/Breakout-v5 has sticky actions
    frame_skip: int = 4  # emulator frames per agent step (replaces the id's own)
    terminal_on_life_loss: bool = True  # a lost life ends the return, not the game or its score
    num_envs: int = 16  # actor-learners: processes with one game each
    step_timeout: float = 60.0  # seconds without an update after which an actor-learner is lost

    total_timesteps: int = 10_000_000  # agent steps, summed over the games
    learning_rate: float = 7e-4  # at the start
    anneal_lr: bool = True  # the learning rate falls linearly to 0 at total_timesteps
    num_steps: int = 5  # steps per update of an actor-learner, t_max
    gamma: float = 0.99  # discount per agent step
    ent_coef: float = 0.01  # weight of the entropy, beta
    vf_coef: float = 0.5  # weight of the values' squared error
    max_grad_norm: float = 0.5  # a gradient of a larger global norm is scaled down to it
    optimizer_epsilon: float = 1e-5  # of RMSProp, inside the root of the mean square (paper: 0.1)
    arch: Literal["nips", "nature"] = "nips"  # Mnih et al. 2013, or 2015: 3 times the arithmetic
    init: Literal["orthogonal", "uniform"] = "orthogonal"  # uniform: +-1/sqrt(fan_in), the paper's
    layer_norm: bool = False  # LayerNorm before the last hidden layer's ReLU, as paac_atari.py does
    bf16: bool = False  # bfloat16: faster on CPUs with AVX512_BF16 or AMX


# 1. ALGORITHM ====================================================================================
# >>> shared: orthogonal
def init_orthogonal(module, gain):
    """Orthogonal weights times gain, and zero biases, in all convolutions and linear layers."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)


# <<< shared: orthogonal
# >>> shared: network
class Agent(nn.Module):
    """Policy and value on a common trunk: nips (Mnih et al. 2013) or nature (Mnih et al. 2015)."""

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
        self.policy = nn.Linear(hidden_size, num_actions)
        self.value = nn.Linear(hidden_size, 1)
        if args.init == "orthogonal":  # torch's layers come with "uniform"
            init_orthogonal(self.trunk, gain=math.sqrt(2))
            if args.layer_norm:  # it cancels the weights' scale; Adam turns larger ones more slowly
                nn.init.orthogonal_(self.trunk[-3].weight, gain=4.5)  # of the last nn.Linear
            init_orthogonal(self.policy, gain=0.01)  # the first policy is nearly uniform
            init_orthogonal(self.value, gain=1.0)
        # Without a mean, what all screens share drives a filter until its ReLU is always 0.
        self.register_buffer("mean_screen", torch.zeros(84, 84))  # 0 unless train() changes it
        self.to(memory_format=torch.channels_last)  # halves the time of nips' updates on a CPU

    def forward(self, obs):
        """obs: uint8 (num_envs, 4, 84, 84) -> logits (num_envs, num_actions), values (num_envs,)"""
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.args.bf16):
            pixels = (obs.float() - self.mean_screen) / 255  # centred: LeCun et al. 1998
            hidden = self.trunk(pixels.contiguous(memory_format=torch.channels_last))
            logits = self.policy(hidden)
            values = self.value(hidden).squeeze(-1)
        return logits.float(), values.float()


# <<< shared: network
# >>> shared: loss
def compute_loss(logits, values, actions, returns, ent_coef, vf_coef):
    """The loss L of this file's docstring, policy loss, value loss and entropy, each a scalar.
    logits: (*batch, num_actions); values, actions, returns: batch, as in (num_steps, num_envs)."""
    logprobs = logits.log_softmax(-1)
    action_logprobs = logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    advantages = (returns - values).detach()  # constants: the policy loss must not move the values
    policy_loss = -(action_logprobs * advantages).mean()
    value_loss = (returns - values).square().mean()
    entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
    loss = policy_loss - ent_coef * entropy + vf_coef * value_loss
    return loss, policy_loss.detach(), value_loss.detach(), entropy.detach()


# <<< shared: loss
# >>> shared: sample_actions
def sample_actions(logits):
    """Draw actions (num_envs,) from logits (num_envs, num_actions). Continuous: docs/forking.md."""
    # If noise_a ~ Exponential(1), then p_a / noise_a is largest for action a with probability p_a.
    # torch.multinomial() does the same, after checks for which it waits for the GPU.
    noise = torch.empty_like(logits).exponential_()
    return (logits.softmax(-1) / noise).argmax(-1)


# <<< shared: sample_actions
# >>> shared: returns
def compute_returns(rewards, terminations, truncations, final_values, next_value, gamma):
    """The n-step returns R_t = r_t + gamma R_{t+1}, backwards from R_T = next_value, (num_envs,).
    R_{t+1} is 0 where step t ended a game or, in Atari, a life (terminations), and it is
    final_values[t], the value of the last observation, after a time limit (truncations).
    All arrays but next_value: (num_steps, num_envs)."""
    returns = torch.empty_like(rewards)
    next_return = next_value.detach()
    for t in reversed(range(len(rewards))):
        next_return = torch.where(truncations[t], final_values[t], next_return)
        next_return = torch.where(terminations[t], 0.0, next_return)
        next_return = rewards[t] + gamma * next_return
        returns[t] = next_return
    return returns


# <<< shared: returns
# 2. TRAINING =====================================================================================
LOSSES = (  # tags of what an actor-learner reports of its last update
    "charts/learning_rate",
    "losses/policy_loss",
    "losses/value_loss",
    "losses/entropy",
    "losses/grad_norm",
    "losses/logits_norm",
)


class Shared:
    """What all processes share. Of the optimizer, that is square_avg, but not the learning rate."""

    def __init__(self, agent, optimizer, num_envs):
        self.agent = agent.share_memory()
        self.optimizer = optimizer
        for state in optimizer.state.values():
            state["square_avg"].share_memory_()
        self.steps = torch.zeros(num_envs, dtype=torch.int64).share_memory_()  # taken by each
        self.losses = torch.zeros(num_envs, len(LOSSES)).share_memory_()  # of the last updates
        self.obs = torch.zeros(num_envs, 4, 84, 84, dtype=torch.uint8).share_memory_()  # the newest
        self.stop = torch.zeros(1, dtype=torch.bool).share_memory_()


def actor_learner(number, start, args, make_env, first_step, shared, connection):
    """One process. Sends (score, length) of each finished game through the connection, and the
    losses as a dictionary if they are not finite. start: how often this actor-learner has been
    started before; first_step: the global step at the start of the run."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends without a traceback when train() is dead
    torch.set_num_threads(1)
    # No two seeds, games or restarts share their random numbers.
    stream = np.random.SeedSequence([args.seed, number, start, first_step])
    game_seed, network_seed = stream.generate_state(2)
    torch.manual_seed(int(network_seed))
    env = make_env(args)
    obs, _ = env.reset(seed=int(game_seed))  # (4, 84, 84)
    score = 0.0
    length = 0
    agent = copy.deepcopy(shared.agent)  # this process's own
    main_process = multiprocessing.parent_process()

    global_step = first_step + int(shared.steps.sum())
    while global_step < args.total_timesteps and not shared.stop and main_process.is_alive():
        learning_rate = args.learning_rate
        if args.anneal_lr:
            learning_rate *= 1 - global_step / args.total_timesteps
        shared.optimizer.param_groups[0]["lr"] = learning_rate

        # ROLLOUT with the shared parameters as they are now
        agent.load_state_dict(shared.agent.state_dict())
        observations, actions, rewards, terminations, truncations = [], [], [], [], []
        final_values = torch.zeros(args.num_steps)
        with torch.no_grad():
            for t in range(args.num_steps):
                logits, _ = agent(torch.as_tensor(obs).unsqueeze(0))
                action = sample_actions(logits)
                observations.append(obs)
                actions.append(action)
                obs, reward, terminated, truncated, info = env.step(action.item())
                rewards.append(reward)
                terminations.append(terminated)
                truncations.append(truncated)
                score += reward
                length += 1
                if truncated:
                    # A time limit: the return goes on with the value of what the game showed last.
                    _, final_values[t] = agent(torch.as_tensor(obs).unsqueeze(0))
                if truncated or info.get("game_over", terminated):
                    connection.send((float(score), length))
                    score = 0.0
                    length = 0
                    obs, _ = env.reset()
            _, next_value = agent(torch.as_tensor(obs).unsqueeze(0))  # (1,)

        # TARGETS: there is one game here, so the shapes lack num_envs
        returns = compute_returns(
            torch.tensor(rewards, dtype=torch.float32).clamp(-1, 1),
            torch.tensor(terminations),
            torch.tensor(truncations),
            final_values,
            next_value[0],
            args.gamma,
        )

        # LOSS AND STEP: the copy's gradients change the shared parameters. A second pass over all
        # steps at once takes a third of the time of going back through num_steps single passes.
        logits, values = agent(torch.as_tensor(np.stack(observations)))
        loss, policy_loss, value_loss, entropy = compute_loss(
            logits, values, torch.cat(actions), returns, args.ent_coef, args.vf_coef
        )
        agent.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
        logits_norm = logits.detach().norm(dim=-1).mean()
        losses = torch.stack([policy_loss, value_loss, entropy, grad_norm, logits_norm])
        if not losses.isfinite().all():
            connection.send(dict(zip(LOSSES[1:], losses.tolist())))  # without the learning rate
            return
        for shared_p, p in zip(shared.agent.parameters(), agent.parameters()):
            shared_p.grad = p.grad
        shared.optimizer.step()
        shared.losses[number] = torch.tensor([learning_rate, *losses])
        shared.obs[number] = torch.as_tensor(obs)
        shared.steps[number] += args.num_steps
        global_step = first_step + int(shared.steps.sum())


def train(args, make_env):
    """Train in a new run folder, or in the one of --resume. make_env(args) makes one game."""
    stop_signals = catch_stop_signals()
    torch.manual_seed(args.seed)
    game = make_env(args)
    agent = Agent(game.action_space.n, args)
    game.close()
    optimizer = RMSpropTF(agent.parameters(), lr=args.learning_rate, eps=args.optimizer_epsilon)

    run_dir = choose_run_dir(args)
    lock = lock_run_dir(run_dir)  # held until close(), so that nobody else resumes this run
    checkpoint = load_checkpoint(args.resume)  # {} without --resume
    global_step = checkpoint.get("global_step", 0)
    if checkpoint:
        restore(checkpoint, agent, optimizer, args)
    say(f"{run_dir}: {args.num_envs} actor-learners")
    shared = Shared(agent, optimizer, args.num_envs)
    first_step = global_step
    actors = ActorPool(args, make_env, first_step, shared)
    is_last = global_step >= args.total_timesteps
    if not is_last:
        actors.start()
    log = Log(args, run_dir, global_step, checkpoint.get("recent_scores", []))
    episodes = []  # since the last point
    while not is_last:
        episodes += actors.watch(global_step)
        last_step = global_step
        global_step = first_step + int(shared.steps.sum())
        is_last = global_step >= args.total_timesteps or len(stop_signals) > 0
        if is_last:
            actors.stop()
            episodes += actors.watch(global_step)  # what ended, or failed, in the meantime
            global_step = first_step + int(shared.steps.sum())  # they finished the update at hand
        checkpoint_due = is_last or is_due(args.checkpoint_interval, last_step, global_step)
        log_due = checkpoint_due or is_due(args.log_interval, last_step, global_step)

        # LOG AND CHECKPOINT
        if log_due and global_step > first_step:
            scalars = dict(zip(LOSSES, shared.losses[shared.steps > 0].mean(0)))
            scalars |= live_units(agent, shared.obs)
            log.write(global_step, episodes, scalars)
            episodes = []
        if checkpoint_due:
            checkpoint = {
                "script": SCRIPT,
                "args": asdict(args) | {"resume": None},
                "global_step": global_step,
                "agent": agent.state_dict(),
                "optimizer": optimizer.state_dict(),
                "recent_scores": list(log.recent_scores),
            }
            # The actor-learners go on, and a file that changes while it is written is damaged.
            checkpoint = copy.deepcopy(checkpoint)
            save_checkpoint(run_dir, checkpoint, is_last)

    lock.close()
    exit_if_stopped(stop_signals, global_step, run_dir)


# =================================================================================================
# PLUMBING: nearly the same text in all scripts. Skip it when reading, and copy it as it is. To
# change it in all of them, change it in paac_atari.py and run utils/sync_shared.py.
# =================================================================================================

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
import uuid
from collections import Counter, deque
from contextlib import suppress

import tyro

SCRIPT = Path(__file__).stem

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

# 4. Actor-learners -------------------------------------------------------------------------------


class ActorPool:
    """The processes of the actor-learners: starts them, and starts lost ones anew."""

    def __init__(self, args, make_env, first_step, shared):
        self.args = args
        self.make_env = make_env
        self.first_step = first_step
        self.shared = shared
        self.processes = {}  # by the actor-learner's number, like the connections
        self.connections = {}
        self.num_starts = [0] * args.num_envs
        self.num_losses = [0] * args.num_envs  # since the last update
        self.last_steps = [0] * args.num_envs
        self.last_times = [0.0] * args.num_envs  # of the last update
        atexit.register(self.kill)

    def start(self):
        start_fork_server()
        for i in range(self.args.num_envs):
            self.start_one(i)

    def start_one(self, i):
        self.connections[i], far_end = mp.Pipe(duplex=False)
        work = (i, self.num_starts[i], self.args, self.make_env, self.first_step, self.shared)
        # Not fork: a process with threads, or with a GPU, may hang in a forked child.
        context = mp.get_context("forkserver")
        self.processes[i] = context.Process(target=actor_learner, args=(*work, far_end))
        self.processes[i].start()
        far_end.close()  # so that the connection ends with the process
        self.num_starts[i] += 1
        self.last_times[i] = time.perf_counter() + self.args.num_envs  # a second to start, each

    def watch(self, global_step):
        """Wait a moment; start lost actor-learners anew -> (score, length) of finished games."""
        multiprocessing.connection.wait(self.connections.values(), timeout=0.1)
        episodes = []
        for i in range(self.args.num_envs):
            steps = int(self.shared.steps[i])
            if steps > self.last_steps[i]:
                self.last_steps[i] = steps
                self.last_times[i] = time.perf_counter()
                self.num_losses[i] = 0
            try:
                while self.connections[i].poll():
                    message = self.connections[i].recv()
                    if isinstance(message, dict):
                        stop_if_not_finite(message, global_step)
                    episodes.append(message)
            except (EOFError, OSError):
                self.processes[i].join()
                self.replace(i, f"died: {exit_cause(self.processes[i].exitcode)}")
                continue
            if time.perf_counter() > self.last_times[i] + self.args.step_timeout:
                self.replace(i, "did not answer in time")
        return episodes

    def replace(self, i, cause):
        process = self.processes[i]
        name = f"actor-learner {i} (pid {process.pid})"
        if process.exitcode == 1:
            sys.exit(f"{name} ended with the error printed above")
        if process.exitcode == 0 or self.shared.stop:  # it has seen the end of the run
            return
        process.kill()
        self.num_losses[i] += 1
        if self.num_losses[i] == 3:
            advice = "--resume continues from the last checkpoint, if there is one"
            sys.exit(f"{name} {cause}; three times without an update: giving up. {advice}")
        say(f"{name} {cause}; its game starts anew", sys.stderr)
        self.start_one(i)

    def stop(self):  # after the update at hand
        self.shared.stop.fill_(True)
        for process in self.processes.values():
            process.join(self.args.step_timeout)
        self.kill()

    def kill(self):
        for process in self.processes.values():
            process.kill()


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
def choose_num_workers(args):
    """Nothing to choose: each game has a process of its own."""


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


if __name__ == "__main__":
    train(parse_args(), make_env)
