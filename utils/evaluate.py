"""Play whole games with a trained checkpoint: raw scores; of Atari's games, 1 to 30 no-ops at the
start, and a lost life ends nothing.

    python utils/evaluate.py runs/NAME                          # 30 games, actions as in training
    python utils/evaluate.py trained/pong.pt --greedy           # always the best action
    python utils/evaluate.py trained/pong.pt --json pong.json   # the scores as a file
    python utils/evaluate.py trained/pong.pt --video pong.mp4   # also record a game (.mp4 or .gif)

The script's own games run in parallel on paac_atari.py's workers. Each slot plays the same fixed
number of games: taking whichever end first would favour short ones. Human and random scores:
published/human_random.csv, from DeepMind's dqn_zoo (no-op starts).
"""

import csv
import importlib
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import cv2
import gymnasium as gym
import numpy as np
import torch
import tyro
from PIL import Image

UTILS = Path(__file__).resolve().parent
sys.path.insert(0, str(UTILS.parent))
import paac_atari


@dataclass
class Args:
    checkpoint: Annotated[str, tyro.conf.Positional]  # run folder or checkpoint file
    episodes: int = 30  # whole games
    num_envs: int = 10  # played in parallel
    num_workers: int = 2  # processes that the games are split over
    greedy: bool = False  # the best action, not one sampled from the policy or epsilon-greedily
    epsilon: float = 0.05  # share of random actions where the network gives Q-values
    seed: int = 1_000_000  # of games and actions; far from those of training
    cuda: bool = True  # use the GPU where there is one
    json: str | None = None  # file for the scores
    video: str | None = None  # record one more game: a name ending in .mp4 or .gif
    export: str | None = None  # write a checkpoint of the network alone: under 3 MB for nips
    video_seconds: float = 60.0  # length of the video at most, at the game's own speed


def load(path):
    """The checkpoint of a file, with an Args as "args", and the module of its script."""
    name = "paac_atari_jax" if path.suffix == ".msgpack" else "paac_atari"
    checkpoint = importlib.import_module(name).deserialize(path)
    script = importlib.import_module(checkpoint["script"])
    return script.load_checkpoint(path), script


def make_torch_network(checkpoint, script, game, device):
    """A function of observations that gives logits and values, or Q-values."""
    args = checkpoint["args"]
    if script.__name__ == "paac":
        (obs_size,) = game.observation_space.shape
        agent = script.Agent(obs_size, game.action_space.n, args.hidden_size)
    else:
        agent = script.Agent(game.action_space.n, args.arch, bf16=getattr(args, "bf16", False))
    agent.load_state_dict(checkpoint["agent"])
    agent.to(device)
    return lambda obs: agent(torch.as_tensor(obs, device=device))


def make_jax_network(checkpoint, script, game, device):
    """As make_torch_network; the network's outputs are torch's, too."""
    import jax

    if device.type == "cpu":
        jax.config.update("jax_platforms", "cpu")
    args = checkpoint["args"]
    agent = script.Agent(game.action_space.n, args.arch, args.init, args.bf16)
    forward = jax.jit(agent.apply)
    return lambda obs: [torch.tensor(np.asarray(x)) for x in forward(checkpoint["agent"], obs)]


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


def play(envs, act, seed, num_envs, games_per_slot):
    """Scores and lengths (agent steps) of the first `games_per_slot` games of each of the
    `num_envs` slots."""
    episodes = [[] for _ in range(num_envs)]
    scores, lengths = np.zeros(num_envs), np.zeros(num_envs, int)
    obs = envs.start(seed, global_step=0)
    while min(map(len, episodes)) < games_per_slot:
        obs, rewards, terminations, truncations, _ = envs.step(act(obs))
        scores += rewards
        lengths += 1
        for slot in np.flatnonzero(np.logical_or(terminations, truncations)):
            if len(episodes[slot]) < games_per_slot:
                episodes[slot].append((scores[slot], lengths[slot]))
            scores[slot] = lengths[slot] = 0
    return zip(*(episode for slot in episodes for episode in slot))


def record(env, act, seed, path, seconds):
    """Write a video of one game, or its first `seconds`, with one frame per agent step."""
    fps = env.metadata.get("render_fps", 60)
    if hasattr(env, "frame_skip"):
        fps = 60 / env.frame_skip
    frames, score, is_over = [], 0.0, False
    obs, _ = env.reset(seed=seed)
    while not is_over and len(frames) < seconds * fps:
        frames.append(env.render().copy())
        obs, reward, terminated, truncated, info = env.step(act(obs[None])[0])
        is_over = info.get("game_over", terminated or truncated)
        score += reward
    if path.suffix == ".gif":
        first, *others = (Image.fromarray(frame).quantize(64) for frame in frames)
        first.save(path, save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
    else:
        height, width, _ = frames[0].shape
        video = cv2.VideoWriter(
            str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, (2 * width, 2 * height)
        )
        for frame in frames:
            frame = cv2.resize(frame, (2 * width, 2 * height), interpolation=cv2.INTER_NEAREST)
            video.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        video.release()
    print(f"{path}: {len(frames) / fps:.0f} s, score {score:g}{'' if is_over else ' so far'}")


def human_normalised(env_id, score):
    """100 * (score - random) / (human - random), or None where no human score is published."""
    with open(UTILS / "published" / "human_random.csv", newline="") as file:
        table = {row["game"]: row for row in csv.DictReader(file)}
    row = table.get(gym.spec(env_id).kwargs.get("game"))
    if row is None:
        return None
    return 100 * (score - float(row["random"])) / (float(row["human"]) - float(row["random"]))


def evaluate(args):
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    files = [Path(args.checkpoint, name) for name in ("", "checkpoint.pt", "checkpoint.msgpack")]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        sys.exit(f"{args.checkpoint}: no checkpoint")
    checkpoint, script = load(path)
    run_args = checkpoint["args"]
    # A3C's workers are not these; its flags lack one of theirs.
    flags = asdict(run_args) | {"num_envs": args.num_envs, "num_workers": args.num_workers}
    flags["terminal_on_life_loss"] = False
    envs = paac_atari.WorkerPool(SimpleNamespace(**flags), script.make_env)
    make_network = make_jax_network if path.suffix == ".msgpack" else make_torch_network
    network = make_network(checkpoint, script, envs, device)
    act = make_act(script, network, args.greedy, args.epsilon)
    sampled = "sampled"
    if hasattr(script, "epsilon_greedy"):
        sampled = f"epsilon-greedy ({args.epsilon:g})"
    games_per_slot = math.ceil(args.episodes / args.num_envs)
    scores, lengths = play(envs, act, args.seed, args.num_envs, games_per_slot)
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
    error, human = result["standard_error"], result["human_normalised_percent"]
    print(
        f"{len(scores)} games, {result['policy']} actions: score {result['mean']:.2f}"
        + (f" +- {error:.2f} (standard error)" if error is not None else "")
        + f", median {result['median']:g}, lowest {min(scores):g}, highest {max(scores):g}"
        + (f"; {human:.0f} % of a human's" if human is not None else "")
    )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    if args.export:
        weights = {key: checkpoint[key] for key in ("script", "args", "global_step", "agent")}
        weights["args"] = asdict(run_args)
        Path(args.export).write_bytes(script.serialize(weights))
    if args.video:
        if hasattr(script, "AtariEnv"):
            env = script.AtariEnv(run_args.env_id, run_args.frame_skip, render_mode="rgb_array")
        else:
            env = gym.make(run_args.env_id, render_mode="rgb_array")
        record(env, act, args.seed, Path(args.video), args.video_seconds)
    return result


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.num_workers and args.num_envs % args.num_workers:
        sys.exit(
            f"--num-envs {args.num_envs} is not a multiple of --num-workers {args.num_workers}"
        )
    if args.video and Path(args.video).suffix not in (".mp4", ".gif"):
        sys.exit(f"--video {args.video}: the name must end in .mp4 or .gif")
    evaluate(args)
