# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8,<2.14", "gymnasium>=1.2.3,<1.5", "ale-py>=0.11.1,<0.13", "numpy>=2,<3", "tyro>=0.9.2,<2",
#                 "opencv-python-headless>=4.10,<6", "tensorboard>=2.19,<3", "tqdm>=4.66,<5"]
# ///
"""A3C: asynchronous n-step advantage actor-critic on Atari (Mnih et al. 2016, arXiv 1602.01783).

Each actor-learner is a process with one game and a copy of the network; all change one network in shared memory, without locks.

    python a3c_atari.py --env-id BreakoutNoFrameskip-v4              # train; Ctrl-C writes a checkpoint and stops
    python a3c_atari.py --resume runs/NAME                           # go on with the network; all games start anew
    python a3c_atari.py --env-id PongNoFrameskip-v4 --num-envs 1     # one actor-learner: nothing is asynchronous
"""

import atexit
import copy
import io
import json
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner from each process
multiprocessing.set_forkserver_preload(["torch.utils.tensorboard", "gymnasium", "ale_py", "cv2", "tyro"])  # for the actors
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
FIGURES = ("charts/learning_rate", "losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/grad_norm")


@dataclass
class Args:  # the comments are the texts of --help
    exp_name: str = SCRIPT  # part of the run folder's name
    seed: int = 1  # of the network, the actions and all games
    track: bool = False  # log to Weights & Biases, too (pip install wandb; WANDB_PROJECT and WANDB_ENTITY say where)
    resume: str | None = None  # run folder to continue; auto: the newest one of the same arguments, else a new one
    log_interval: int = 10_000  # agent steps between two points of the curves
    checkpoint_interval: int = 500_000  # agent steps between two checkpoints

    env_id: str = "BreakoutNoFrameskip-v4"  # any ALE game: XNoFrameskip-v4, or ALE/X-v5 (its actions stick: 25 % are repeated)
    frame_skip: int = 4  # emulator frames per agent step (replaces the id's own)
    terminal_on_life_loss: bool = True  # a lost life ends the return; the game goes on, and scores are those of whole games
    num_envs: int = 16  # actor-learners: processes with one game each
    step_timeout: float = 60.0  # seconds without an update after which an actor-learner counts as lost

    total_timesteps: int = 10_000_000  # agent steps, summed over the games
    learning_rate: float = 7e-4  # at the start
    anneal_lr: bool = True  # the learning rate falls linearly to 0 at total_timesteps
    num_steps: int = 5  # steps per update of an actor-learner, t_max
    gamma: float = 0.99  # discount per agent step
    ent_coef: float = 0.01  # weight of the entropy, beta
    vf_coef: float = 0.5  # weight of the values' squared error
    max_grad_norm: float = 0.5  # the gradient is scaled down to this global norm
    optimizer_epsilon: float = 1e-5  # of RMSProp, inside the root of the mean square (paper: 0.1)
    arch: Literal["nips", "nature"] = "nips"  # network of Mnih et al. 2013, or of 2015: 3 times the arithmetic
    init: Literal["orthogonal", "uniform"] = "orthogonal"  # initial weights; uniform: +-1/sqrt(fan_in), the paper's


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


class Agent(nn.Module):
    """Policy and value with a common trunk: `nips` (Mnih et al. 2013) or `nature` (Mnih et al. 2015)."""

    def __init__(self, num_actions, arch="nips", init="orthogonal", bf16=False):
        super().__init__()
        self.bf16 = bf16
        if arch == "nips":
            convs, features, hidden = [nn.Conv2d(4, 16, 8, 4), nn.ReLU(), nn.Conv2d(16, 32, 4, 2)], 32 * 9 * 9, 256
        else:
            convs = [nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3, 1)]
            features, hidden = 64 * 7 * 7, 512
        self.trunk = nn.Sequential(*convs, nn.ReLU(), nn.Flatten(), nn.Linear(features, hidden), nn.ReLU())
        self.policy, self.value = nn.Linear(hidden, num_actions), nn.Linear(hidden, 1)
        if init == "orthogonal":  # torch's own is the paper's
            for layer in [m for m in self.modules() if hasattr(m, "weight")]:
                nn.init.orthogonal_(layer.weight, {self.policy: 0.01, self.value: 1.0}.get(layer, 2**0.5))
                nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)  # on a CPU, a third of the time for the convolutions' gradients

    def forward(self, obs):
        """obs: uint8 (..., 4, 84, 84), as the workers return it -> logits (n, num_actions), values (n,)"""
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.trunk((obs.flatten(0, -4).float() / 255).contiguous(memory_format=torch.channels_last))
            return self.policy(hidden).float(), self.value(hidden).float().squeeze(-1)


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


def compute_returns(rewards, terminations, truncations, final_values, next_value, gamma):
    """R_t = r_t + gamma R_{t+1}, where R_{t+1} is 0 if step t ended the episode, the value of the final observation if a time
    limit cut it short, and next_value (num_envs,) after the last step. All others: (num_steps, num_envs)"""
    returns, next_return = torch.empty_like(rewards), next_value
    for t in reversed(range(len(rewards))):
        next_return = torch.where(truncations[t], final_values[t], next_return)
        returns[t] = next_return = rewards[t] + gamma * torch.where(terminations[t], 0.0, next_return)
    return returns


def compute_loss(logits, values, actions, returns, ent_coef, vf_coef):
    """mean[-log pi(a|s) (R - V)] - ent_coef mean[H] + vf_coef mean[(R - V)^2], and the three means it is made of.
    logits: (num_steps, num_envs, num_actions); values, actions, returns: (num_steps, num_envs)"""
    logprobs = logits.log_softmax(-1)
    advantages = (returns - values).detach()  # the policy's gradient must not reach the values
    policy_loss = -(logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1) * advantages).mean()
    value_loss = (returns - values).square().mean()
    entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
    return policy_loss - ent_coef * entropy + vf_coef * value_loss, policy_loss, value_loss, entropy


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
        known = {str(run.parent): load_checkpoint(run.parent)["args"] for run in runs}
        args.resume = next((run for run in reversed(known) if known[run] == replace(args, resume=None)), None)
    if args.resume:
        saved = load_checkpoint(args.resume)["args"]
        args = replace(tyro.cli(Args, args=argv, default=saved), resume=args.resume)
        if any(getattr(args, name) != getattr(saved, name) for name in ("env_id", "arch")):
            fail(f"{args.resume}: --env-id and --arch cannot change within a run")
    for name, value in vars(args).items():
        if type(value) in (int, float) and value < (type(value) is int and name != "seed"):
            fail(f"--{name.replace('_', '-')} cannot be {value}")
    if getattr(gym.registry.get(args.env_id), "entry_point", None) != "ale_py.env:AtariEnv":
        games = [game for game in gym.registry if game.startswith("ALE/") or game.endswith("NoFrameskip-v4")]
        fail(f"--env-id {args.env_id} is no Atari game; closest: {', '.join(get_close_matches(args.env_id, games, 3, 0))}")
    return args


def actor_learner(i, start, args, env_class, agent, optimizer, first_step, steps, figures, stop, connection):
    """One process: play num_steps steps with a copy of the shared parameters, then change the shared ones; no lock anywhere.
    In shared memory: agent and optimizer; steps (num_envs,) that each one has taken; figures (num_envs, len(FIGURES)) of each
    one's last update; stop (1,). Finished games go through the connection as (score, length in agent steps), a loss that is not
    finite as a text. start: how often this actor-learner was lost and started anew."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # when the main process dies, die too, without a traceback
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    stream = np.random.SeedSequence([args.seed + (first_step << 32), i, start])  # distinct for all seeds and games
    game_seed, network_seed = map(int, stream.generate_state(2))
    torch.manual_seed(network_seed)
    env = env_class(args.env_id, args.frame_skip, args.terminal_on_life_loss)
    obs, _ = env.reset(seed=game_seed)
    local = copy.deepcopy(agent)
    main_process = multiprocessing.parent_process()
    while not stop and main_process.is_alive() and (global_step := first_step + int(steps.sum())) < args.total_timesteps:
        # SCHEDULE
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - args.anneal_lr * global_step / args.total_timesteps)

        # ROLLOUT with the shared parameters as they are now
        local.load_state_dict(agent.state_dict())
        observations, actions, outcomes, final_values = [], [], [], torch.zeros(args.num_steps)
        with torch.no_grad():
            for step in range(args.num_steps):
                logits, _ = local(torch.as_tensor(obs)[None])
                action = (logits.softmax(-1) / torch.empty_like(logits).exponential_()).argmax(-1)  # ~ softmax(logits)
                observations.append(obs)
                actions.append(action)
                obs, *outcome, _ = env.step(action.item())
                outcomes.append(outcome)
                if outcome[2]:  # a time limit
                    final_values[step] = local(torch.as_tensor(obs)[None])[1]
                if env.game_over:
                    connection.send((env.episode_return, env.episode_length))
                    obs, _ = env.reset()
            next_value = local(torch.as_tensor(obs)[None])[1][0]

        # TARGETS. Everything is (num_steps,), logits have the actions as second dimension
        rewards, terminations, truncations = (torch.tensor(x) for x in zip(*outcomes))
        returns = compute_returns(rewards.float().clamp(-1, 1), terminations, truncations, final_values, next_value, args.gamma)

        # LOSS AND STEP: gradients of the copy, at the parameters of the rollout, change the shared ones. For one game a second
        # pass pays: forward and backward in a batch of 5 take a third of the time of going back through 5 single ones.
        logits, values = local(torch.as_tensor(np.stack(observations)))
        actions = torch.cat(actions)
        loss, policy_loss, value_loss, entropy = compute_loss(logits, values, actions, returns, args.ent_coef, args.vf_coef)
        local.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(local.parameters(), args.max_grad_norm)
        if not torch.isfinite(loss + grad_norm):
            parts = f"policy loss {policy_loss}, value loss {value_loss}, entropy {entropy}, gradient norm {grad_norm}"
            connection.send(f"{parts}: stopped before the parameters change. A lower --learning-rate may help")
            return
        for p, local_p in zip(agent.parameters(), local.parameters()):
            p.grad = local_p.grad
        optimizer.step()
        losses = (x.item() for x in (policy_loss, value_loss, entropy, grad_norm))
        figures[i] = torch.tensor([optimizer.param_groups[0]["lr"], *losses])
        steps[i] += args.num_steps


def train(args, env_class=AtariEnv):
    threading.excepthook = lambda died: isinstance(died.exc_value, OSError) or threading.__excepthook__(died)  # full disk
    stop_signals = []
    for signum in STOP_SIGNALS:  # the first one is noted, a second one ends the process at once
        signal.signal(signum, lambda signum, _: stop_signals.append(signum) or signal.signal(signum, signal.SIG_DFL))
    torch.manual_seed(args.seed)
    num_actions = env_class(args.env_id, args.frame_skip, args.terminal_on_life_loss).action_space.n
    agent = Agent(num_actions, args.arch, args.init).share_memory()
    optimizer = RMSpropTF(agent.parameters(), lr=args.learning_rate, eps=args.optimizer_epsilon)
    checkpoint = load_checkpoint(args.resume) if args.resume else {"global_step": 0, "recent_scores": []}
    first_step, recent_scores = checkpoint["global_step"], deque(checkpoint["recent_scores"], 100)
    if args.resume:
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        optimizer.param_groups[0]["eps"] = args.optimizer_epsilon  # not the checkpoint's, if another was asked for
    steps = torch.zeros(args.num_envs, dtype=torch.int64)
    figures, stop = torch.zeros(args.num_envs, len(FIGURES)), torch.zeros(1, dtype=torch.bool)
    for tensor in (steps, figures, stop, *(state["square_avg"] for state in optimizer.state.values())):
        tensor.share_memory_()
    run_dir = Path(args.resume or f"runs/{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{time.time():.6f}")
    if args.track:
        import wandb

        wandb.init(sync_tensorboard=True, config=asdict(args), name=run_dir.name)
    print(f"{run_dir}: {args.num_envs} actor-learners, {args.arch} network", flush=True)
    bar = tqdm(total=args.total_timesteps, initial=first_step, unit=" steps", disable=not sys.stderr.isatty())
    processes, connections, starts, failures, last_seen = {}, {}, Counter(), Counter(), {}
    atexit.register(lambda: [process.kill() for process in processes.values()])

    def start(i):
        connections[i], far_end = mp.Pipe(duplex=False)
        shared = (agent, optimizer, first_step, steps, figures, stop, far_end)
        # Not fork: a process with threads may hang in a forked child
        processes[i] = mp.get_context("forkserver").Process(target=actor_learner, args=(i, starts[i], args, env_class, *shared))
        processes[i].start()
        far_end.close()  # the connection ends with the process
        starts[i] += 1
        last_seen[i] = int(steps[i]), time.perf_counter() + args.num_envs  # a game may take a second to start

    global_step = logged_step = first_step
    logged_time, episodes, writer = time.perf_counter(), [], None
    is_last = global_step >= args.total_timesteps
    if not is_last:
        # The fork server and, from it, the actor-learners block the signals that terminals and SLURM send to all processes
        for start_server in (multiprocessing.resource_tracker.ensure_running, multiprocessing.forkserver.ensure_running):
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # again: the resource tracker's start unblocks them
            start_server()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        for i in range(args.num_envs):
            start(i)
    while not is_last:
        # WATCH the actor-learners: their games, their ends, their silence
        multiprocessing.connection.wait(connections.values(), timeout=0.1)
        lost = {}
        for i, connection in connections.items():
            try:
                while connection.poll():
                    report = connection.recv()
                    if isinstance(report, str):
                        sys.exit(f"step {global_step}: {report}")
                    episodes.append(report)
            except (EOFError, OSError):
                processes[i].join()
                code = processes[i].exitcode
                lost[i] = f"died: {signal.Signals(-code).name if code < 0 else code}"
            if steps[i] > last_seen[i][0]:
                last_seen[i], failures[i] = (int(steps[i]), time.perf_counter()), 0
            elif time.perf_counter() - last_seen[i][1] > args.step_timeout:
                lost[i] = "did not answer in time"
        is_last = first_step + int(steps.sum()) >= args.total_timesteps or bool(stop_signals)
        if is_last:
            stop.fill_(True)
            for process in processes.values():
                process.join(args.step_timeout)
                process.kill()
            lost = {}
        for i, cause in lost.items():
            print(f"\nactor-learner {i} (pid {processes[i].pid}) {cause}; its game starts anew", file=sys.stderr)
            processes[i].kill()
            failures[i] += 1
            if failures[i] == 3:
                sys.exit(f"three times without an update: giving up. From the last checkpoint: --resume {run_dir}")
            start(i)
        last_step, global_step = global_step, first_step + int(steps.sum())
        bar.update(global_step - last_step)
        checkpoint_due = is_last or global_step // args.checkpoint_interval > last_step // args.checkpoint_interval
        log_due = checkpoint_due or global_step // args.log_interval > last_step // args.log_interval

        # LOG AND CHECKPOINT
        try:
            if log_due:
                recent_scores.extend(score for score, _ in episodes)
                speed = (global_step - logged_step) / (time.perf_counter() - logged_time)
                bar.set_postfix_str(score := f"score {np.mean(recent_scores):.1f}" if recent_scores else "no game over yet")
                if bar.disable:
                    print(f"step {global_step:,} of {args.total_timesteps:,}  {speed:,.0f} steps/s  {score}", flush=True)
                scalars = {"charts/SPS": speed} | dict(zip(FIGURES, figures.sum(0) / max(1, (steps > 0).sum())))
                if episodes:
                    scalars["charts/episodic_return"], scalars["charts/episodic_length"] = np.mean(episodes, axis=0)
                if not writer:
                    writer = SummaryWriter(run_dir, purge_step=logged_step + 1)  # what came after the checkpoint comes again
                    writer.add_text("flags", "|flag|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in vars(args).items()))
                for tag, scalar in scalars.items():
                    writer.add_scalar(tag, scalar, global_step)
                logged_step, logged_time, episodes = global_step, time.perf_counter(), []
            if checkpoint_due:
                checkpoint = {"args": asdict(args) | {"resume": None}, "global_step": global_step}
                checkpoint |= {"script": SCRIPT, "agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
                checkpoint |= {"recent_scores": [*recent_scores]}
                writer.flush()
                save_checkpoint(run_dir / "checkpoint.pt", checkpoint)
        except OSError as error:
            with suppress(OSError):  # this may go to the same disk
                print(f"\nwarning: {error}; training goes on, the checkpoint before is kept", file=sys.stderr)
            writer = None  # its thread is dead
    bar.close()
    if stop_signals:
        print(f"{signal.Signals(stop_signals[0]).name}: stopped at step {global_step:,}; to go on: --resume {run_dir}")
        sys.exit(128 + stop_signals[0])


if __name__ == "__main__":
    train(parse_args())
