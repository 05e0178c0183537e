# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8,<2.14", "gymnasium>=1.2.3,<1.5", "ale-py>=0.11.1,<0.13", "numpy>=2,<3", "tyro>=0.9.2,<2",
#                 "opencv-python-headless>=4.10,<6", "tensorboard>=2.19,<3", "tqdm>=4.66,<5"]
# ///
"""n-step Q-learning on Atari (Mnih et al. 2016, arXiv 1602.01783), synchronous and in one batch like PAAC (arXiv 1705.04862).

Many games on a few worker processes step together; one network acts for all of them in one batch and learns from it.

    python nstep_q_atari.py --env-id BreakoutNoFrameskip-v4              # train; Ctrl-C writes a checkpoint and stops
    python nstep_q_atari.py --resume runs/NAME                           # go on as if nothing had happened
    python nstep_q_atari.py --env-id PongNoFrameskip-v4 --num-workers 0  # all games in this process, for a debugger
"""

import atexit
import copy
import io
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

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's idle threads sleep: while the games run, the cores are theirs,
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # but not within a forward pass: some microseconds until the next layer

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner from each process
multiprocessing.set_forkserver_preload(["torch.utils.tensorboard", "gymnasium", "ale_py", "cv2", "tyro"])  # for the workers
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
    learning_rate: float = 4e-4  # at the start
    anneal_lr: bool = True  # the learning rate falls linearly to 0 at total_timesteps
    num_steps: int = 5  # steps per game and update, t_max
    gamma: float = 0.99  # discount per agent step
    final_epsilons: tuple[float, ...] = (0.1,)  # shares of random actions in the end; the games take these numbers in turn
    exploration_steps: int = 1_000_000  # agent steps in which a game's share of random actions falls from 1 to its final one
    target_interval: int = 32_000  # agent steps, summed over the games, between two updates of the target network
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
    """Action values: `nips` (Mnih et al. 2013) or `nature` (Mnih et al. 2015)."""

    def __init__(self, num_actions, arch="nips", init="orthogonal", bf16=False):
        super().__init__()
        self.bf16 = bf16
        if arch == "nips":
            convs, features, hidden = [nn.Conv2d(4, 16, 8, 4), nn.ReLU(), nn.Conv2d(16, 32, 4, 2)], 32 * 9 * 9, 256
        else:
            convs = [nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3, 1)]
            features, hidden = 64 * 7 * 7, 512
        self.trunk = nn.Sequential(*convs, nn.ReLU(), nn.Flatten(), nn.Linear(features, hidden), nn.ReLU())
        self.q = nn.Linear(hidden, num_actions)
        if init == "orthogonal":  # torch's own is the paper's
            for layer in [m for m in self.modules() if hasattr(m, "weight")]:
                nn.init.orthogonal_(layer.weight, {self.q: 1.0}.get(layer, 2**0.5))
                nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)  # on a CPU, a third of the time for the convolutions' gradients

    def forward(self, obs):
        """obs: uint8 (..., 4, 84, 84), as the workers return it -> Q-values (n, num_actions)"""
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.trunk((obs.flatten(0, -4).float() / 255).contiguous(memory_format=torch.channels_last))
            return self.q(hidden).float()


class RMSpropTF(torch.optim.Optimizer):
    """RMSProp of TensorFlow 1 and the papers: epsilon *inside* the root, the mean square starts at *one*. Steps of torch's own,
    with epsilon outside and starting at zero, are up to 3.2 times larger at epsilon = 0.1."""

    def __init__(self, params, lr, alpha=0.99, eps=0.1):
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps})
        for p in self.param_groups[0]["params"]:
            self.state[p]["square_avg"] = torch.ones_like(p)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                square_avg = self.state[p]["square_avg"]
                square_avg.mul_(group["alpha"]).addcmul_(p.grad, p.grad, value=1 - group["alpha"])
                p.addcdiv_(p.grad, (square_avg + group["eps"]).sqrt(), value=-group["lr"])


def epsilon_greedy(q_values, epsilons):
    """A random action with probability epsilon, else the best. q_values: (num_envs, num_actions); epsilons: (num_envs,)"""
    random_actions = torch.randint(q_values.shape[-1], epsilons.shape, device=epsilons.device)
    return torch.where(torch.rand_like(epsilons) < epsilons, random_actions, q_values.argmax(-1))


def compute_returns(rewards, terminations, truncations, final_values, next_value, gamma):
    """R_t = r_t + gamma R_{t+1}, where R_{t+1} is 0 if step t ended the episode, the value of the final observation if a time
    limit cut it short, and next_value (num_envs,) after the last step. All others: (num_steps, num_envs)"""
    returns, next_return = torch.empty_like(rewards), next_value
    for t in reversed(range(len(rewards))):
        next_return = torch.where(truncations[t], final_values[t], next_return)
        returns[t] = next_return = rewards[t] + gamma * torch.where(terminations[t], 0.0, next_return)
    return returns


def compute_loss(q_values, actions, returns):
    """mean[(R - Q(s, a))^2]. q_values: (num_steps, num_envs, num_actions); actions, returns: (num_steps, num_envs)"""
    return (returns - q_values.gather(-1, actions.unsqueeze(-1)).squeeze(-1)).square().mean()


def save_checkpoint(path, checkpoint):
    """Replace the file in one step, so that there is a whole one at any time; the one before is kept as checkpoint.prev"""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with open(path.with_suffix(".tmp"), "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    with suppress(OSError):  # there is none yet, or the disk has no hard links
        path.with_stem("checkpoint.prev").unlink(missing_ok=True)
        os.link(path, path.with_stem("checkpoint.prev"))
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(run_dir):
    path = Path(run_dir, "checkpoint.pt")
    try:
        assert path.open("rb").read(2) == b"PK"  # torch.save writes zip files
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # executes nothing, wherever the file is from
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
        runs = sorted(Path("runs").glob(f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__*/checkpoint.pt"))
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
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    envs = make_envs(args, env_class)
    agent = Agent(envs.single_action_space.nvec[0], args.arch, args.init, args.bf16).to(device)
    target = copy.deepcopy(agent).requires_grad_(False)
    final_epsilons = torch.tensor(args.final_epsilons, device=device).repeat(args.num_envs)[: args.num_envs]
    optimizer_class = RMSpropTF if args.optimizer == "rmsprop" else partial(torch.optim.Adam, fused=True)
    optimizer = optimizer_class(agent.parameters(), lr=args.learning_rate, eps=args.optimizer_epsilon)
    passes = [agent] * args.num_steps  # the passes of a rollout
    if device.type == "cuda":  # each as a CUDA graph, which is one launch instead of one per operation
        getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", bool)(False)  # a false alarm
        sample = (torch.zeros(envs.observation_space.shape, dtype=torch.uint8, device=device),)
        passes = torch.cuda.make_graphed_callables(tuple(map(copy.copy, passes)), (sample,) * len(passes))
    checkpoint = load_checkpoint(args.resume) if args.resume else {"global_step": 0, "recent_scores": [], "games": None}
    global_step, recent_scores, games = checkpoint["global_step"], deque(checkpoint["recent_scores"], 100), checkpoint["games"]
    if args.resume:
        agent.load_state_dict(checkpoint["agent"])
        target.load_state_dict(checkpoint["target"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        optimizer.param_groups[0]["eps"] = args.optimizer_epsilon  # not the checkpoint's, if another was asked for
        torch.set_rng_state(checkpoint["rng"][0])
        torch.cuda.set_rng_state_all(checkpoint["rng"][1 : 1 + torch.cuda.device_count()])
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
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - args.anneal_lr * global_step / args.total_timesteps)
        epsilons = 1 - (1 - final_epsilons) * min(1.0, global_step / args.exploration_steps)

        # ROLLOUT. Its forward passes keep their graph and the update goes back through it: a second pass would find the same
        choices, outcomes, final_values = [], [], torch.zeros(args.num_steps, args.num_envs, device=device)
        try:
            if obs is None:  # at the start, and after a lost worker
                envs = make_envs(args, env_class) if envs.closed else envs
                obs = np.reshape(envs.call("start", args.seed + (global_step << 32), games), envs.observation_space.shape)
            for step in range(args.num_steps):
                q_values = passes[step](torch.as_tensor(obs, device=device))
                actions = epsilon_greedy(q_values, epsilons)
                choices.append((q_values, actions))
                cpu_actions = actions.reshape(envs.action_space.shape).tolist()
                clock("act")
                obs, *outcome, info = envs.step(cpu_actions)  # overwrites what `obs` was
                outcomes.append(outcome)
                clock("env")
                if "last_obs" in info:
                    final_values[step] = target(torch.as_tensor(info["last_obs"], device=device)).amax(-1)
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

        # TARGETS. Everything is (num_steps, num_envs), Q-values have the actions as third dimension
        q_values, actions = (torch.stack(x) for x in zip(*choices))
        rewards, terminations, truncations = (torch.as_tensor(np.stack(x), device=device).flatten(1) for x in zip(*outcomes))
        next_value = target(torch.as_tensor(obs, device=device)).amax(-1)
        returns = compute_returns(rewards.float().clamp(-1, 1), terminations, truncations, final_values, next_value, args.gamma)

        # LOSS AND STEP
        loss = compute_loss(q_values, actions, returns)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
        if not torch.isfinite(loss + grad_norm):
            parts = f"loss {loss}, gradient norm {grad_norm}"
            sys.exit(f"step {global_step}: {parts}: stopped before the parameters change. A lower --learning-rate may help")
        optimizer.step()
        if global_step % args.target_interval < batch_size:
            target.load_state_dict(agent.state_dict())
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
                scalars = {"charts/SPS": speed, "charts/learning_rate": optimizer.param_groups[0]["lr"]}
                scalars |= {f"time/{part}": seconds / spent.total() for part, seconds in spent.items()}
                scalars |= {"losses/td_loss": loss, "losses/q_values": q_values.mean(), "losses/grad_norm": grad_norm}
                scalars["charts/epsilon"] = epsilons.mean()
                if episodes:
                    scalars["charts/episodic_return"], scalars["charts/episodic_length"] = np.mean(episodes, axis=0)
                if not writer:
                    writer = SummaryWriter(run_dir, purge_step=logged_step + 1)  # what came after the checkpoint comes again
                    writer.add_text("flags", "|flag|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in vars(args).items()))
                for tag, scalar in scalars.items():
                    writer.add_scalar(tag, scalar, global_step)
                logged_step, logged_time, spent = global_step, logged_time + spent.total(), Counter()
            if checkpoint_due:
                checkpoint = {"args": asdict(args) | {"resume": None}, "global_step": global_step, "games": games}
                checkpoint |= {"script": SCRIPT, "agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
                checkpoint |= {"target": target.state_dict()}
                checkpoint |= {"recent_scores": [*recent_scores], "rng": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]}
                writer.flush()
                save_checkpoint(run_dir / "checkpoint.pt", checkpoint)
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
