"""Play whole games, over all lives, with a trained checkpoint: raw scores; of Atari's games, 1 to
30 no-ops at the start.

    python utils/evaluate.py runs/NAME                          # 30 games, actions as in training
    python utils/evaluate.py trained/pong.pt --greedy           # always the best action
    python utils/evaluate.py trained/pong.pt --json pong.json   # the scores as a file
    python utils/evaluate.py trained/pong.pt --video pong.mp4   # also record a game (.mp4 or .gif)
    python utils/evaluate.py runs/NAME --script ../my_paac.py   # of a script that lives elsewhere

The games run in parallel, on the workers of the script. How many games each slot plays is fixed
beforehand: taking whichever end first would favour short ones. Human and random scores:
published/human_random.csv, from DeepMind's dqn_zoo (no-op starts). Nothing in a checkpoint is
executed; the script that it names is, if it lies beside utils/ or is the one of --script.
"""

import csv
import importlib
import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import cv2
import gymnasium as gym
import numpy as np
import torch
import tyro
from outputs import prepare
from PIL import Image

UTILS = Path(__file__).resolve().parent
ROOT = UTILS.parent


@dataclass
class Args:
    checkpoint: Annotated[str, tyro.conf.Positional]  # run folder or checkpoint file
    script: str | None = None  # the checkpoint's script, if it is not beside utils/
    episodes: int = 30  # whole games
    num_envs: int = 10  # played in parallel
    num_workers: int | None = None  # processes that the games are split over; None: one per core
    greedy: bool = False  # the best action, not one sampled from the policy or epsilon-greedily
    epsilon: float = 0.05  # share of random actions where the network gives Q-values
    seed: int = 1_000_000  # of games and actions; far from those of training
    cuda: bool = True  # use the GPU where there is one
    json: str | None = None  # file for the scores
    video: str | None = None  # record one more game: a name ending in .mp4 or .gif
    export: str | None = None  # write the network alone, torch's in bfloat16: under 1.5 MB for nips
    video_seconds: float = 60.0  # length of the video at most, at the game's own speed


def find_checkpoint(path):
    for file in (path, path / "checkpoint.pt", path / "checkpoint.msgpack"):
        if file.is_file():
            return file
    sys.exit(f"{path}: no checkpoint")


def read_script_name(path):
    """The name of the script that wrote a checkpoint file. Nothing in the file is executed."""
    if path.suffix == ".msgpack":
        from flax.serialization import msgpack_restore

        return msgpack_restore(path.read_bytes())["script"]
    return torch.load(path, map_location="cpu", weights_only=True)["script"]


def load(path, script_path=None):
    """The checkpoint of a file, with an Args as "args", and the module of its script."""
    try:
        name = read_script_name(path)
    except ImportError as error:
        sys.exit(f"{path} needs a package that is not installed: {error}")
    except Exception as error:  # a damaged file raises nearly anything
        sys.exit(f"{path}: damaged, or no checkpoint ({type(error).__name__})")
    if script_path is None:
        known = [file for file in ROOT.glob("*.py") if file.stem == name]
        if not known:
            sys.exit(f"{path} is of a script {name!r}, which is not in {ROOT}: name it by --script")
        script_path = known[0]
    script_path = Path(script_path).resolve()
    if not script_path.is_file():
        sys.exit(f"--script {script_path}: no such file")
    sys.path[:0] = [str(script_path.parent), str(ROOT)]  # the workers import it from there, too
    script = importlib.import_module(script_path.stem)
    if not hasattr(script, "load_checkpoint"):
        sys.exit(f"--script {script_path}: not a training script")
    try:
        return script.load_checkpoint(path), script
    except ValueError as error:
        sys.exit(str(error))


def make_torch_network(checkpoint, script, game, device):
    """A function of observations that gives logits and values, or Q-values."""
    args = checkpoint["args"]
    if hasattr(args, "hidden_size"):  # paac.py, or a fork of it
        (obs_size,) = game.observation_space.shape
        agent = script.Agent(obs_size, game.action_space.n, args.hidden_size)
    else:
        agent = script.Agent(game.action_space.n, args)
    agent.load_state_dict(checkpoint["agent"])
    agent.to(device)
    return lambda obs: agent(torch.as_tensor(obs, device=device))


def make_jax_network(checkpoint, script, game, device):
    """As make_torch_network; the network's outputs are torch's, too."""
    import jax

    if device.type == "cpu":
        jax.config.update("jax_platforms", "cpu")
    args = checkpoint["args"]
    network = (args.arch, args.init, args.bf16, args.layer_norm)
    agent = script.Agent(game.action_space.n, *network)
    forward = jax.jit(agent.apply)
    params = jax.device_put(checkpoint["agent"])  # once: numpy arrays would be sent at every step
    return lambda obs: [torch.tensor(np.asarray(x)) for x in forward(params, obs)]


def make_act(script, network, greedy, epsilon):
    """obs -> actions, as numpy arrays."""

    @torch.no_grad()
    def act(obs):
        output = network(obs)
        if hasattr(script, "epsilon_greedy"):
            epsilons = torch.full(
                output.shape[:1], 0.0 if greedy else epsilon, device=output.device
            )
            actions = script.epsilon_greedy(output, epsilons)
        elif greedy:
            actions = output[0].argmax(-1)
        else:
            actions = torch.multinomial(output[0].softmax(-1), 1).squeeze(-1)
        return actions.cpu().numpy()

    return act


class WholeGame(gym.Wrapper):
    """The training's environment, but `terminated` only when the game is over, with all its lives.

    This is not AtariEnv without terminal_on_life_loss. In training, a lost life cuts its step of
    frame_skip frames short, and so decides at which frames the steps of the next life begin. The
    agent may rely on that: without, Beam Rider's scores 3,486 instead of 4,989."""

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, info.get("game_over", terminated), truncated, info


def make_whole_game(make_env, args, **options):
    return WholeGame(make_env(args, **options))


def play(envs, act, seed, games_per_slot):
    """Scores and lengths (agent steps) of the first games_per_slot[i] games of each slot i."""
    num_envs = len(games_per_slot)
    episodes = [[] for _ in range(num_envs)]
    scores, lengths = np.zeros(num_envs), np.zeros(num_envs, int)
    obs = envs.start(seed, global_step=0)
    while any(len(played) < n for played, n in zip(episodes, games_per_slot)):
        obs, rewards, terminations, truncations, _ = envs.step(act(obs))
        scores += rewards
        lengths += 1
        for slot in np.flatnonzero(np.logical_or(terminations, truncations)):
            if len(episodes[slot]) < games_per_slot[slot]:
                episodes[slot].append((scores[slot], lengths[slot]))
            scores[slot] = lengths[slot] = 0
    return zip(*(episode for slot in episodes for episode in slot))


def record(env, act, seed, path, seconds):
    """Write a video of one game, or its first `seconds`, with one frame per agent step."""
    fps = env.metadata.get("render_fps", 60)
    if hasattr(env.unwrapped, "frame_skip"):
        fps = 60 / env.unwrapped.frame_skip
    frames, score, is_over = [], 0.0, False
    obs, _ = env.reset(seed=seed)
    while not is_over and len(frames) < seconds * fps:
        frames.append(env.render().copy())
        obs, reward, terminated, truncated, _ = env.step(act(obs[None])[0])
        is_over = terminated or truncated
        score += reward
    if path.suffix == ".gif":
        first, *others = (Image.fromarray(frame).quantize(64) for frame in frames)
        durations = gif_durations(len(frames), fps)
        first.save(path, save_all=True, append_images=others, duration=durations, loop=0)
    else:
        height, width, _ = frames[0].shape
        codec = cv2.VideoWriter_fourcc(*"mp4v")
        video = cv2.VideoWriter(str(path), codec, fps, (2 * width, 2 * height))
        if not video.isOpened():
            sys.exit(f"{path} cannot be written: OpenCV finds no encoder for it")
        for frame in frames:
            frame = cv2.resize(frame, (2 * width, 2 * height), interpolation=cv2.INTER_NEAREST)
            video.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        video.release()
    so_far = "" if is_over else " so far"
    print(f"{path}: {len(frames) / fps:.0f} s, score {score:g}{so_far}")


def gif_durations(num_frames, fps):
    """Milliseconds of each frame. GIF counts hundredths of a second, so that at 15 frames/s some
    frames last 60 ms and some 70."""
    ends = 10 * np.round(100 / fps * np.arange(num_frames + 1)).astype(int)
    return np.diff(ends).tolist()


def atari_name(env_id):
    """The game's name in published/, or None if it is not one of Atari's."""
    spec = gym.registry.get(env_id.rpartition(":")[2])  # without the module of module:Id-v0
    return spec.kwargs.get("game") if spec else None


def human_normalised(env_id, score):
    """100 * (score - random) / (human - random), or None where no human score is published."""
    with open(UTILS / "published" / "human_random.csv", newline="") as file:
        table = {row["game"]: row for row in csv.DictReader(file)}
    row = table.get(atari_name(env_id))
    if row is None:
        return None
    return 100 * (score - float(row["random"])) / (float(row["human"]) - float(row["random"]))


def evaluate(args):
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    path = find_checkpoint(Path(args.checkpoint))
    checkpoint, script = load(path, args.script)
    run_args = checkpoint["args"]
    num_envs = min(args.num_envs, args.episodes)
    # The first slots play one game more where the games cannot be shared out equally.
    games_per_slot = [len(range(slot, args.episodes, num_envs)) for slot in range(num_envs)]
    flags = asdict(run_args) | {"num_envs": num_envs, "num_workers": args.num_workers}
    flags = SimpleNamespace(**flags)
    # A3C has no workers: its games run on those of paac_atari.py.
    plumbing = script if hasattr(script, "WorkerPool") else importlib.import_module("paac_atari")
    if flags.num_workers:  # lowered until each worker has as many games
        flags.num_workers = min(flags.num_workers, num_envs)
        while num_envs % flags.num_workers:
            flags.num_workers -= 1
    plumbing.choose_num_workers(flags)
    make_env = partial(make_whole_game, script.make_env)
    envs = plumbing.WorkerPool(flags, make_env)
    make_network = make_jax_network if path.suffix == ".msgpack" else make_torch_network
    network = make_network(checkpoint, script, envs, device)
    act = make_act(script, network, args.greedy, args.epsilon)
    sampled = "sampled"
    if hasattr(script, "epsilon_greedy"):
        sampled = f"epsilon-greedy ({args.epsilon:g})"
    scores, lengths = play(envs, act, args.seed, games_per_slot)
    envs.close()
    standard_error = None
    if len(scores) > 1:
        standard_error = float(np.std(scores, ddof=1) / len(scores) ** 0.5)
    result = {
        "checkpoint": str(args.checkpoint),
        "env_id": run_args.env_id,
        "script": script.__name__,
        "global_step": checkpoint["global_step"],
        "policy": "greedy" if args.greedy else sampled,
        "seed": args.seed,
        "episodes": len(scores),
        "mean": float(np.mean(scores)),
        "median": float(np.median(scores)),
        "standard_error": standard_error,
        "human_normalised_percent": human_normalised(run_args.env_id, np.mean(scores)),
        "scores": list(map(float, scores)),
        "lengths": list(map(int, lengths)),
    }
    print(f"{run_args.env_id}, {script.__name__} after {result['global_step']:,} steps")
    games = "1 game" if len(scores) == 1 else f"{len(scores)} games"
    summary = f"{games}, {result['policy']} actions: score {result['mean']:.2f}"
    if standard_error is not None:
        summary += f" +- {standard_error:.2f} (standard error)"
    summary += f", median {result['median']:g}, lowest {min(scores):g}, highest {max(scores):g}"
    if result["human_normalised_percent"] is not None:
        summary += f"; {result['human_normalised_percent']:.0f} % of a human's"
    print(summary)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    if args.export:
        weights = {key: checkpoint[key] for key in ("script", "args", "global_step", "agent")}
        weights["args"] = asdict(run_args)
        if path.suffix == ".pt":  # load_state_dict() makes float32 of it again
            weights["agent"] = {name: p.bfloat16() for name, p in checkpoint["agent"].items()}
        Path(args.export).write_bytes(script.serialize(weights))
    if args.video:
        env = make_env(flags, render_mode="rgb_array")
        record(env, act, args.seed, Path(args.video), args.video_seconds)
    return result


def check(args):
    """End with one line, before any game is played, if something cannot work."""
    for flag, lowest in {"episodes": 1, "num_envs": 1, "num_workers": 0, "seed": 0}.items():
        value = getattr(args, flag)
        if value is not None and value < lowest:
            sys.exit(f"--{flag.replace('_', '-')} {value}: must be {lowest} or more")
    if not 0 <= args.epsilon <= 1:
        sys.exit(f"--epsilon {args.epsilon}: must lie between 0 and 1")
    if not 0.1 <= args.video_seconds <= 1e6:
        sys.exit(f"--video-seconds {args.video_seconds}: must lie between 0.1 and 1,000,000")
    if args.video and Path(args.video).suffix not in (".mp4", ".gif"):
        sys.exit(f"--video {args.video}: the name must end in .mp4 or .gif")
    checkpoint = find_checkpoint(Path(args.checkpoint))
    for path in (args.json, args.export, args.video):
        if path and Path(path).resolve() == checkpoint.resolve():
            sys.exit(f"{path} is the checkpoint itself: it would be overwritten")
        prepare(path)


if __name__ == "__main__":
    args = tyro.cli(Args)
    check(args)
    evaluate(args)
