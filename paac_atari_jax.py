# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.7,<0.11", "flax>=0.11,<0.13", "optax>=0.2.6,<0.3", "gymnasium>=1.2.3,<1.5", "ale-py>=0.11.1,<0.13",
#                 "numpy>=2,<3", "tyro>=0.9.2,<2", "opencv-python-headless>=4.10,<6", "tensorboard>=2.19,<3", "tqdm>=4.66,<5"]
# ///
"""PAAC: synchronous parallel n-step advantage actor-critic on Atari (Clemente et al. 2017, arXiv 1705.04862), in JAX.

Many games on a few worker processes step together; one network acts for all of them in one batch and learns from it.

    python paac_atari_jax.py --env-id BreakoutNoFrameskip-v4              # train; Ctrl-C writes a checkpoint and stops
    python paac_atari_jax.py --resume runs/NAME                           # go on as if nothing had happened
    python paac_atari_jax.py --env-id PongNoFrameskip-v4 --num-workers 0  # all games in this process, for a debugger
"""

import atexit
import json
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Literal

import ale_py
import cv2
import flax.linen as nn
import flax.serialization
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer import event_file_writer
from tqdm import tqdm

SCRIPT = Path(__file__).stem
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner from each process
multiprocessing.set_forkserver_preload(["optax", "flax.linen", "gymnasium", "ale_py", "cv2", "tyro"])  # for the workers
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass
class Args:  # the comments are the texts of --help
    exp_name: str = SCRIPT  # part of the run folder's name
    seed: int = 1  # of the network, the actions and all games
    torch_deterministic: bool = True  # deterministic kernels on a GPU
    cuda: bool = True  # use the GPU where there is one
    track: bool = False  # log to Weights & Biases, too (pip install wandb; WANDB_PROJECT and WANDB_ENTITY say where)
    resume: str | None = None  # run folder to continue; auto: the newest one of the same arguments, else a new one
    log_interval: int = 10_000  # agent steps between two points of the curves
    checkpoint_interval: int = 500_000  # agent steps between two checkpoints

    env_id: str = "BreakoutNoFrameskip-v4"  # any ALE game: XNoFrameskip-v4, or ALE/X-v5 (its actions stick: 25 % are repeated)
    frame_skip: int = 4  # emulator frames per agent step (replaces the id's own)
    terminal_on_life_loss: bool = True  # a lost life ends the return; the game goes on, and scores are those of whole games
    num_envs: int = 32  # games played in parallel, n_e
    num_workers: int | None = None  # processes they are split over, n_w; None: one per core; 0: none, the games live in this one
    step_timeout: float = 60.0  # seconds without an answer after which a worker counts as lost

    total_timesteps: int = 10_000_000  # agent steps, summed over the games
    learning_rate: float = 1.5e-3  # at the start
    anneal_lr: bool = True  # the learning rate falls linearly to 0 at total_timesteps
    num_steps: int = 5  # steps per game and update, t_max
    gamma: float = 0.99  # discount per agent step
    ent_coef: float = 0.01  # weight of the entropy, beta
    vf_coef: float = 0.5  # weight of the values' squared error
    max_grad_norm: float = 0.5  # the gradient is scaled down to this global norm
    optimizer: Literal["adam", "rmsprop"] = "adam"  # rmsprop: the paper's, which is not torch's
    optimizer_epsilon: float = 1e-5  # added to the root of the mean square; by rmsprop, inside it (paper: 0.1)
    arch: Literal["nips", "nature"] = "nips"  # network of Mnih et al. 2013, or of 2015: 3 times the arithmetic
    init: Literal["orthogonal", "uniform"] = "orthogonal"  # initial weights; uniform: +-1/sqrt(fan_in), the paper's
    bf16: bool = False  # run the network in bfloat16: faster on GPUs, and on CPUs with AVX512_BF16 or AMX


class AtariEnv(gym.Env):
    """One Atari game as the DQN papers show it: observations are uint8 (4, 84, 84), newest frame last; rewards are raw points.
    Equals gymnasium's AtariPreprocessing bit for bit, but fetches only the frames that are used and resizes only what changed.
    To be reset when `game_over`, not when `terminated`: with terminal_on_life_loss, a lost life is that, and the game goes on."""

    def __init__(self, env_id, frame_skip=4, terminal_on_life_loss=False, render_mode=None):
        self.atari = gym.make(env_id, render_mode=render_mode, disable_env_checker=True).unwrapped
        self.ale, self.render, self.render_mode = self.atari.ale, self.atari.render, render_mode
        self.action_set, self.metadata = self.ale.getMinimalActionSet(), self.atari.metadata
        self.frame_skip, self.terminal_on_life_loss = frame_skip, terminal_on_life_loss
        self.shown = np.zeros(self.ale.getScreenDims(), np.uint8)  # the screen that became stack[3]
        self.strip = (5, 2) if len(self.shown) == 210 else (len(self.shown), 84)  # 5 lines of 210 make 2 rows of 84, exactly
        self.stack = np.zeros((4, 84, 84), np.uint8)
        self.observation_space = gym.spaces.Box(0, 255, self.stack.shape, np.uint8)
        self.action_space = gym.spaces.Discrete(len(self.action_set))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.atari.reset(seed=seed)  # also seeds the emulator (sticky actions) and np_random of the next line
        for _ in range(self.atari.np_random.integers(1, 31)):  # no-ops
            self.ale.act(self.action_set[0])
        self.lives, self.game_over, self.episode_return, self.episode_length = self.ale.lives(), False, 0.0, 0
        self.observe([self.ale.getScreenGrayscale()])
        self.stack[:3] = self.stack[3]
        return self.stack, {}

    def step(self, action):
        reward, screens = 0.0, []
        for t in range(self.frame_skip):
            reward += self.ale.act(self.action_set[action])
            terminated, truncated = self.ale.game_over(with_truncation=False), self.ale.game_truncated()
            self.game_over = terminated or truncated
            lives, self.lives = self.lives, self.ale.lives()
            terminated = terminated or (self.terminal_on_life_loss and self.lives < lives)
            if terminated or truncated:
                screens.append(self.shown.copy())  # as the step before
                break
            if t >= self.frame_skip - 2:
                screens.append(self.ale.getScreenGrayscale())
        self.episode_return, self.episode_length = self.episode_return + reward, self.episode_length + 1
        self.observe(screens)
        return self.stack, reward, terminated, truncated, {}

    def observe(self, screens):
        self.stack = np.concatenate([self.stack[1:], self.stack[3:]])  # a new array: the caller may keep the old one
        newest = np.maximum(screens[0], screens[-1], out=screens[0])  # many sprites show in every other frame only
        _, top, _, height = cv2.boundingRect(np.bitwise_xor(newest, self.shown, out=self.shown))  # of what changed
        if height:
            lines, rows = (slice(n * (top // self.strip[0]), -n * (-(top + height) // self.strip[0])) for n in self.strip)
            self.stack[3, rows] = cv2.resize(newest[lines], (84, rows.stop - rows.start), interpolation=cv2.INTER_AREA)
        self.shown = newest

    def get_state(self):
        """All that the future depends on, in plain types."""
        state = {name: getattr(self, name) for name in ("lives", "game_over", "episode_return", "episode_length")}
        state |= {"shown": self.shown.tobytes(), "stack": self.stack.tobytes()}
        state["np_random"] = json.dumps(self.atari.np_random.bit_generator.state)
        state["ale"] = self.ale.cloneState(include_rng=True).serialize()
        self.set_state(state)  # see below
        return state

    def set_state(self, state):
        vars(self).update({name: state[name] for name in ("lives", "game_over", "episode_return", "episode_length")})
        self.shown.flat, self.stack.flat = np.frombuffer(state["shown"], np.uint8), np.frombuffer(state["stack"], np.uint8)
        self.atari.np_random.bit_generator.state = json.loads(state["np_random"])
        for noops in (30, 0):  # the ALE state lacks the last sticky action and part of the video chip; no-ops make them the same
            self.ale.restoreState(ale_py.ALEState(state["ale"]))  # in the game that is restored and in the one that goes on
            for _ in range(noops):
                self.ale.act(self.action_set[0])


class AtariWorker(gym.Env):
    """The k games of one worker, stepped one after another; AsyncVectorEnv takes them for one environment with array rewards.
    A finished game restarts at once and shows the new game's first observation. Only when a time limit cut a game short,
    info["last_obs"] (k, 4, 84, 84) holds what the games showed before that."""

    processes, closed = (), False  # with `call` and `single_action_space`, what --num-workers 0 needs of an AsyncVectorEnv

    def __init__(self, make_env, first_game, num_games, learner_pid):
        if os.getpid() != learner_pid:  # AsyncVectorEnv also builds one worker in the learner
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # when the learner dies, die too, without a traceback
        cv2.setNumThreads(0)
        self.make_env, self.first_game, self.num_games = make_env, first_game, num_games
        self.envs, self.episodes = [make_env()], []  # the other games are made by start()
        self.observation_space = gym.vector.utils.batch_space(self.envs[0].observation_space, num_games)
        self.action_space = self.single_action_space = gym.vector.utils.batch_space(self.envs[0].action_space, num_games)
        self.obs = np.zeros(self.observation_space.shape, np.uint8)

    def start(self, seed, games):
        """Start the games anew, or where they were -> obs. games: None or the states of all games of all workers"""
        self.envs += [self.make_env() for _ in range(self.num_games - len(self.envs))]
        for i, env in enumerate(self.envs):
            stream = np.random.SeedSequence([seed, self.first_game + i])  # distinct for all seeds and games
            self.obs[i], _ = env.reset(seed=int(stream.generate_state(1, np.uint64)[0]))
            if games:
                env.set_state(games[self.first_game + i])
                self.obs[i] = env.stack
        return self.obs

    def step(self, actions):
        rewards, terminations, truncations = ([None] * self.num_games for _ in range(3))  # pipes are slow for arrays
        for i, env in enumerate(self.envs):
            self.obs[i], rewards[i], terminations[i], truncations[i], _ = env.step(actions[i])
        info = {"last_obs": self.obs.copy()} if any(truncations) else {}  # "final_obs" would become an array of objects
        for i, env in enumerate(self.envs):
            if env.game_over:
                self.episodes.append((env.episode_return, env.episode_length))
                self.obs[i], _ = env.reset()
        return self.obs, rewards, terminations, truncations, info

    def call(self, name, *args):
        return [getattr(self, name)(*args)]

    def report(self, with_states):
        """(score, length in agent steps) of the games that ended since the last report and, if wanted, the states of all games"""
        episodes, self.episodes = self.episodes, []
        return episodes, [env.get_state() for env in self.envs] if with_states else []


def make_envs(args, env_class=AtariEnv, first_game=0):
    """All workers as one vector environment: arrays (num_workers, games per worker, ...), observations in shared memory."""
    make_env = partial(env_class, args.env_id, args.frame_skip, args.terminal_on_life_loss)
    if args.num_workers == 0:
        return AtariWorker(make_env, first_game, args.num_envs, os.getpid())  # itself: lists, and no first dimension
    k = args.num_envs // args.num_workers
    workers = [partial(AtariWorker, make_env, first_game + i * k, k, os.getpid()) for i in range(args.num_workers)]
    # Not fork: when workers are replaced, the learner has threads and a GPU, and a forked child may hang. The fork server and,
    # from it, the workers block the signals that terminals and SLURM send to all processes: the learner decides.
    for start_server in (multiprocessing.resource_tracker.ensure_running, multiprocessing.forkserver.ensure_running):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # again: the resource tracker's start unblocks them
        start_server()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    envs = gym.vector.AsyncVectorEnv(workers, copy=False, context="forkserver", autoreset_mode="Disabled")
    for pipe in envs.parent_pipes:  # no answer within this time (as a struct timeval) raises an OSError; polling would cost more
        with socket.socket(fileno=os.dup(pipe.fileno())) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, np.array(divmod(int(args.step_timeout * 1e6), 10**6)).tobytes())
    with suppress(AttributeError, OSError):  # Linux alone has these, and some sandboxes forbid them
        cores = sorted(os.sched_getaffinity(0))
        for i, process in enumerate(envs.processes):  # as many workers as cores: each stays on its own
            os.sched_setaffinity(process.pid, {cores[i]} if len(cores) == args.num_workers else cores)
            os.sched_setscheduler(process.pid, os.SCHED_BATCH, os.sched_param(0))  # waking, it does not interrupt the learner
    atexit.register(close_envs, envs)
    return envs


def close_envs(envs):
    """End all workers, also hanging ones (AsyncVectorEnv.close() would wait for them). Returns what was wrong with which."""
    dead, silent, k = [], [], envs.action_space.shape[-1]
    for i, process in enumerate(envs.processes):
        process.join(0.05)  # a pipe breaks a moment before the exit code is there
        worker = f"worker {i} (games {i * k} to {i * k + k - 1}, pid {process.pid})"
        if process.exitcode is not None:
            dead.append(f"{worker} died: {signal.Signals(-process.exitcode).name if process.exitcode < 0 else process.exitcode}")
        elif not envs.parent_pipes[i].poll():
            silent.append(f"{worker} did not answer in time")
        process.kill()
        process.join()
    envs.processes, envs.closed = (), True
    return "; ".join(dead or silent)


class Agent(nn.Module):
    """Policy and value with a common trunk: `nips` (Mnih et al. 2013) or `nature` (Mnih et al. 2015)."""

    num_actions: int
    arch: str = "nips"
    initial: str = "orthogonal"
    bf16: bool = False

    @nn.compact
    def __call__(self, obs):
        """obs: uint8 (..., 4, 84, 84), as the workers return it -> logits (n, num_actions), values (n,)"""

        def layer(kind, x, features, *shape, gain=2**0.5, name=None):
            kernel_init, bias_init = nn.initializers.orthogonal(gain), nn.initializers.zeros
            if self.initial == "uniform":
                bound = (x.shape[-1] * np.prod(shape[:1] or 1)) ** -0.5  # 1/sqrt(fan_in)
                kernel_init = bias_init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
            dtype = jnp.bfloat16 if self.bf16 else jnp.float32
            return kind(features, *shape, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init, name=name)(x)

        if self.arch == "nips":
            convs, hidden = [(16, 8, 4), (32, 4, 2)], 256
        else:
            convs, hidden = [(32, 8, 4), (64, 4, 2), (64, 3, 1)], 512
        x = jnp.moveaxis(obs.reshape(-1, *obs.shape[-3:]), 1, -1).astype(jnp.float32) / 255
        for features, kernel, stride in convs:
            x = nn.relu(layer(nn.Conv, x, features, (kernel, kernel), stride, "VALID"))
        x = nn.relu(layer(nn.Dense, x.reshape(len(x), -1), hidden))
        logits = layer(nn.Dense, x, self.num_actions, gain=0.01, name="policy")
        values = layer(nn.Dense, x, 1, gain=1.0, name="value")
        return logits.astype(jnp.float32), values.astype(jnp.float32).squeeze(-1)


@partial(jax.jit, static_argnames="agent")
def act(agent, params, key, obs):
    """The next key, and (actions ~ softmax(logits), logits, values, backward): backward holds the activations and takes
    gradients with respect to logits and values to the parameters, so that the update needs no second forward pass."""
    key, action_key = jax.random.split(key)
    (logits, values), backward = jax.vjp(lambda params: agent.apply(params, obs), params)
    return key, (jax.random.categorical(action_key, logits), logits, values, backward)


@partial(jax.jit, static_argnames="agent")
def compute_values(agent, params, obs):
    return agent.apply(params, obs)[1]


def make_optimizer(args):
    """Without the learning rate. RMSProp is the papers': epsilon *inside* the root, the mean square starts at *one*."""
    rmsprop = optax.scale_by_rms(0.99, args.optimizer_epsilon, initial_scale=1.0, eps_in_sqrt=True)
    scale = rmsprop if args.optimizer == "rmsprop" else optax.scale_by_adam(eps=args.optimizer_epsilon)
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), scale)


def compute_returns(rewards, terminations, truncations, final_values, next_value, gamma):
    """R_t = r_t + gamma R_{t+1}, where R_{t+1} is 0 if step t ended the episode, the value of the final observation if a time
    limit cut it short, and next_value (num_envs,) after the last step. All others: (num_steps, num_envs)"""
    returns, next_return = [], next_value
    for t in reversed(range(len(rewards))):
        next_return = jnp.where(truncations[t], final_values[t], next_return)
        next_return = rewards[t] + gamma * jnp.where(terminations[t], 0.0, next_return)
        returns.append(next_return)
    return jnp.stack(returns[::-1])


def compute_loss(logits, values, actions, returns, ent_coef, vf_coef):
    """mean[-log pi(a|s) (R - V)] - ent_coef mean[H] + vf_coef mean[(R - V)^2], and the three means it is made of.
    logits: (num_steps, num_envs, num_actions); values, actions, returns: (num_steps, num_envs)"""
    logprobs = jax.nn.log_softmax(logits)
    advantages = jax.lax.stop_gradient(returns - values)  # the policy's gradient must not reach the values
    policy_loss = -(jnp.take_along_axis(logprobs, actions[..., None], -1).squeeze(-1) * advantages).mean()
    value_loss = jnp.square(returns - values).mean()
    entropy = -(jnp.exp(logprobs) * logprobs).sum(-1).mean()
    return policy_loss - ent_coef * entropy + vf_coef * value_loss, (policy_loss, value_loss, entropy)


@partial(jax.jit, static_argnames="optimizer", donate_argnames=("params", "opt_state"))
def update(optimizer, params, opt_state, learning_rate, gamma, ent_coef, vf_coef, choices, outcomes, final_values, next_value):
    """Targets, loss and step -> params, opt_state, {tag: value}. choices: what act() gave in each step; outcomes: rewards,
    terminations, truncations; next_value: (num_envs,); everything else: (num_steps, num_envs)"""
    actions, logits, values, backwards = zip(*choices)
    actions, logits, values = map(jnp.stack, (actions, logits, values))
    rewards, terminations, truncations = outcomes
    returns = compute_returns(jnp.clip(rewards, -1, 1), terminations, truncations, final_values, next_value, gamma)
    compute_gradients = jax.value_and_grad(compute_loss, argnums=(0, 1), has_aux=True)
    (_, losses), gradients = compute_gradients(logits, values, actions, returns, ent_coef, vf_coef)
    gradients = [backward(pair)[0] for backward, pair in zip(backwards, zip(*gradients))]
    gradients = jax.tree.map(lambda *steps: sum(steps), *gradients)
    updates, opt_state = optimizer.update(gradients, opt_state)
    params = jax.tree.map(lambda p, u: p - learning_rate * u, params, updates)
    losses = dict(zip(("losses/policy_loss", "losses/value_loss", "losses/entropy"), losses))
    losses["losses/explained_variance"] = 1 - (returns - values).var() / returns.var()
    return params, opt_state, losses | {"losses/grad_norm": optax.tree.norm(gradients)}


def save_checkpoint(path, checkpoint):
    """Replace the file in one step, so that there is a whole one at any time; the one before is kept as checkpoint.prev"""
    with open(path.with_suffix(".tmp"), "wb") as file:
        file.write(flax.serialization.msgpack_serialize(checkpoint))
        file.flush()
        os.fsync(file.fileno())
    with suppress(OSError):  # there is none yet, or the disk has no hard links
        path.with_stem("checkpoint.prev").unlink(missing_ok=True)
        os.link(path, path.with_stem("checkpoint.prev"))
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(run_dir):
    path = Path(run_dir, "checkpoint.msgpack")
    try:
        checkpoint = flax.serialization.msgpack_restore(path.read_bytes())  # executes nothing, wherever the file is from
        assert checkpoint["script"] == SCRIPT
        return checkpoint | {"args": Args(**checkpoint["args"])}
    except Exception:  # a damaged file raises nearly anything
        fail(f"{path} is missing, damaged or not from {SCRIPT}.py; is there a checkpoint.prev?")


def fail(message):
    print(f"{SCRIPT}.py: {message}", file=sys.stderr)
    sys.exit(2)


def parse_args(argv=None):
    """The command line as Args, on top of the defaults or of the resumed run's. What cannot work ends here, with exit code 2."""
    args = tyro.cli(Args, args=argv)
    if args.resume == "auto":
        runs = sorted(Path("runs").glob(f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__*/checkpoint.msgpack"))
        known = {str(run.parent): replace(load_checkpoint(run.parent)["args"], num_workers=args.num_workers) for run in runs}
        args.resume = next((run for run in reversed(known) if known[run] == replace(args, resume=None)), None)
    if args.resume:
        saved = load_checkpoint(args.resume)["args"]
        args = replace(tyro.cli(Args, args=argv, default=saved), resume=args.resume)
        if any(getattr(args, name) != getattr(saved, name) for name in ("env_id", "num_envs", "optimizer", "arch")):
            fail(f"{args.resume}: --env-id, --num-envs, --optimizer and --arch cannot change within a run")
    for name, value in vars(args).items():
        if type(value) in (int, float) and value < (type(value) is int and name not in ("seed", "num_workers")):
            fail(f"--{name.replace('_', '-')} cannot be {value}")
    if args.num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        args.num_workers = max(n for n in range(1, cores + 1) if args.num_envs % n == 0)
    if args.num_workers and args.num_envs % args.num_workers:
        fail(f"--num-envs {args.num_envs} is not a multiple of --num-workers {args.num_workers}")
    if getattr(gym.registry.get(args.env_id), "entry_point", None) != "ale_py.env:AtariEnv":
        games = [game for game in gym.registry if game.startswith("ALE/") or game.endswith("NoFrameskip-v4")]
        fail(f"--env-id {args.env_id} is no Atari game; closest: {', '.join(get_close_matches(args.env_id, games, 3, 0))}")
    return args


def train(args, env_class=AtariEnv):
    threading.excepthook = lambda died: isinstance(died.exc_value, OSError) or threading.__excepthook__(died)  # full disk
    stop_signals = []
    for signum in STOP_SIGNALS:  # the first one is noted, a second one ends the process at once
        signal.signal(signum, lambda signum, _: stop_signals.append(signum) or signal.signal(signum, signal.SIG_DFL))
    if args.torch_deterministic:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    if not args.cuda:
        jax.config.update("jax_platforms", "cpu")
    device = jax.default_backend()
    envs = make_envs(args, env_class)
    agent = Agent(envs.single_action_space.nvec[0], args.arch, args.init, args.bf16)
    key, init_key = jax.random.split(jax.random.key(args.seed))
    params = agent.init(init_key, np.zeros((1, 4, 84, 84), np.uint8))
    optimizer = make_optimizer(args)
    opt_state = optimizer.init(params)
    checkpoint = load_checkpoint(args.resume) if args.resume else {"global_step": 0, "recent_scores": [], "games": None}
    global_step, recent_scores, games = checkpoint["global_step"], deque(checkpoint["recent_scores"], 100), checkpoint["games"]
    if args.resume:
        params = flax.serialization.from_state_dict(params, checkpoint["agent"])
        opt_state = flax.serialization.from_state_dict(opt_state, checkpoint["optimizer"])
        key = jax.random.wrap_key_data(checkpoint["rng"])
    run_dir = Path(args.resume or f"runs/{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{time.time():.6f}")
    if args.track:
        import wandb

        wandb.init(sync_tensorboard=True, config=asdict(args), name=run_dir.name)
    print(f"{run_dir}: {args.num_envs} games on {args.num_workers} workers, {args.arch} network on the {device}", flush=True)
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps", disable=not sys.stderr.isatty())
    spent, logged_time, writer, failures, obs = Counter(), time.perf_counter(), None, 0, None

    def clock(part):  # books the time since the last call under `part`
        spent[part] += time.perf_counter() - logged_time - spent.total()

    batch_size, logged_step, is_last = args.num_envs * args.num_steps, global_step, global_step >= args.total_timesteps
    while not is_last:
        # SCHEDULE
        learning_rate = args.learning_rate * (1 - args.anneal_lr * global_step / args.total_timesteps)

        # ROLLOUT. Its forward passes keep their graph and the update goes back through it: a second pass would find the same
        choices, outcomes, final_values = [], [], np.zeros((args.num_steps, args.num_envs), np.float32)
        try:
            if obs is None:  # at the start, and after a lost worker
                envs = make_envs(args, env_class) if envs.closed else envs
                obs = np.reshape(envs.call("start", args.seed + (global_step << 32), games), envs.observation_space.shape)
            for step in range(args.num_steps):
                key, choice = act(agent, params, key, jnp.array(obs))  # a copy: the workers overwrite obs
                choices.append(choice)
                cpu_actions = np.asarray(choice[0]).reshape(envs.action_space.shape).tolist()
                clock("act")
                obs, *outcome, info = envs.step(cpu_actions)  # overwrites what `obs` was
                outcomes.append(outcome)
                clock("env")
                if "last_obs" in info:
                    final_values[step] = compute_values(agent, params, info["last_obs"])
            next_step = global_step + batch_size
            is_last = next_step >= args.total_timesteps or bool(stop_signals)
            checkpoint_due = is_last or next_step % args.checkpoint_interval < batch_size
            log_due = checkpoint_due or next_step % args.log_interval < batch_size
            if log_due:
                episodes, games = (sum(parts, []) for parts in zip(*envs.call("report", checkpoint_due)))
        except (EOFError, OSError):  # of a dead or a stuck worker
            cause, failures, is_last, obs, games = close_envs(envs) or "a worker died at start", failures + 1, False, None, None
            print(f"\n{cause}; all games start anew, this rollout is dropped", file=sys.stderr)
            if failures == 3:
                sys.exit(f"three times without a finished rollout: giving up. From the last checkpoint: --resume {run_dir}")
            continue
        global_step, failures = next_step, 0

        # TARGETS, LOSS AND STEP. Everything is (num_steps, num_envs)
        outcomes = [np.stack(x).reshape(args.num_steps, -1) for x in zip(*outcomes)]
        batch = (choices, outcomes, final_values, compute_values(agent, params, obs))
        coefficients = (learning_rate, args.gamma, args.ent_coef, args.vf_coef)
        params, opt_state, losses = update(optimizer, params, opt_state, *coefficients, *batch)
        if not np.isfinite(losses["losses/grad_norm"]):
            parts = ", ".join(f"{tag.split('/')[1]} {x}" for tag, x in losses.items())
            sys.exit(f"step {global_step}: {parts}: stopped; the last checkpoint stays good. A lower --learning-rate may help")
        bar.update(batch_size)
        clock("learn")

        # LOG AND CHECKPOINT
        try:
            if log_due:
                recent_scores.extend(score for score, _ in episodes)
                speed = (global_step - logged_step) / spent.total()
                bar.set_postfix_str(score := f"score {np.mean(recent_scores):.1f}" if recent_scores else "no game over yet")
                if bar.disable:
                    print(f"step {global_step:,} of {args.total_timesteps:,}  {speed:,.0f} steps/s  {score}", flush=True)
                scalars = {"charts/SPS": speed, "charts/learning_rate": learning_rate} | losses
                scalars |= {f"time/{part}": seconds / spent.total() for part, seconds in spent.items()}
                if episodes:
                    scalars["charts/episodic_return"], scalars["charts/episodic_length"] = np.mean(episodes, axis=0)
                if not writer:
                    writer = event_file_writer.EventFileWriter(str(run_dir))
                    start = SessionLog(status=SessionLog.START)  # what came after the checkpoint comes again
                    writer.add_event(Event(wall_time=time.time(), step=logged_step + 1, session_log=start))
                    flags = "|flag|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in vars(args).items())
                    writer.add_event(Event(wall_time=time.time(), step=logged_step, summary=text_pb("flags", flags)))
                summary = Summary(value=[Summary.Value(tag=tag, simple_value=scalar) for tag, scalar in scalars.items()])
                writer.add_event(Event(wall_time=time.time(), step=global_step, summary=summary))
                logged_step, logged_time, spent = global_step, logged_time + spent.total(), Counter()
            if checkpoint_due:
                checkpoint = {"args": asdict(args) | {"resume": None}, "global_step": global_step, "games": games}
                checkpoint |= {"script": SCRIPT, "agent": params, "optimizer": flax.serialization.to_state_dict(opt_state)}
                checkpoint |= {"recent_scores": [*recent_scores], "rng": jax.random.key_data(key)}
                writer.flush()
                save_checkpoint(run_dir / "checkpoint.msgpack", checkpoint)
        except OSError as error:
            with suppress(OSError):  # this may go to the same disk
                print(f"\nwarning: {error}; training goes on, the checkpoint before is kept", file=sys.stderr)
            writer = None  # its thread is dead
    bar.close()
    close_envs(envs)
    if stop_signals:
        print(f"{signal.Signals(stop_signals[0]).name}: stopped at step {global_step:,}; to go on: --resume {run_dir}")
        sys.exit(128 + stop_signals[0])


if __name__ == "__main__":
    train(parse_args())
