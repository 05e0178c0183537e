"""How fast are the games, and how fast is training? Everything in turn, several rounds, medians.

    python utils/throughput.py                                   # a quarter of an hour on 2 cores
    python utils/throughput.py --parts games --rounds 3          # the environments alone
    python utils/throughput.py --sb3-python /tmp/sb3/bin/python  # beside stable-baselines3
    python utils/throughput.py --parts training --networks nips --scripts paac_atari nstep_q_atari

Three parts. games: the same games with random actions through four pipelines (five if envpool is
installed), in agent steps/s. training: the scripts at --num-envs with each of --networks. sweep:
training over the number of games with the time split of the PAAC paper's Figure 2. Prints tables,
writes throughput.json and, of the sweep, throughput.png. Run it on an otherwise idle machine.
"""

import importlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import ale_py
import gymnasium as gym
import matplotlib
import numpy as np
import torch
import tyro
from benchmark import stop_with_parent
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from outputs import prepare
from plot import read_tags

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner from each process
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
LOG_INTERVAL = 10_000 if torch.cuda.is_available() else 1000  # of the training that is measured

# Of the time: tag, and its name.
PARTS = {"env": "games", "act": "acting", "learn": "learning", "log": "logging"}


@dataclass
class Args:
    # scripts whose training is measured; sweep: the first of them; games: paac_atari.py's workers
    scripts: list[str] = field(default_factory=lambda: ["paac_atari"])
    # what is measured: games alone, training, training with several numbers of games
    parts: list[Literal["games", "training", "sweep"]] = field(
        default_factory=lambda: ["games", "training", "sweep"]
    )
    env_id: str = "BreakoutNoFrameskip-v4"  # the game
    num_envs: int = 32  # games in parallel, but for the sweep
    num_workers: int | None = None  # processes or threads; None: the script's choice
    rounds: int = 5  # repetitions, one of everything after the other
    seconds: float = 5.0  # length of a measurement of the games
    train_seconds: float = 20.0  # length of a measurement of training, after its start
    sweep: list[int] = field(default_factory=lambda: [16, 32, 64, 128, 256])  # numbers of games
    # training: the networks that are measured
    networks: list[str] = field(default_factory=lambda: ["nips", "nature", "nature-bf16"])
    sb3_python: str | None = None  # python of an environment with stable-baselines3[extra]
    out: str = "throughput"  # name of the .json and the .png


# games --------------------------------------------------------------------------------------------


def stock_env(env_id):
    return FrameStackObservation(AtariPreprocessing(gym.make(env_id, frameskip=1)), 4)


def emulate(env_id, seconds, barrier, results):
    """One process of the emulator alone: 4 act() calls per step, nothing looked at."""
    ale = gym.make(env_id).unwrapped.ale
    actions = ale.getMinimalActionSet()
    choices, steps = np.random.default_rng(os.getpid()).integers(len(actions), size=100_000), 0
    ale.reset_game()
    barrier.wait()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        action = actions[choices[steps % len(choices)]]
        for _ in range(4):
            ale.act(action)
        if ale.game_over():
            ale.reset_game()
        steps += 1
    results.put(steps / seconds)


def alternate(pipelines, num_envs, seconds):
    """{name: steps/s} over `seconds` of each, in slices of 0.3 s in random order: a slow moment of
    the machine slows all."""
    steps, spent = dict.fromkeys(pipelines, 0), dict.fromkeys(pipelines, 0.0)
    while min(spent.values()) < seconds:
        for name in random.sample(list(pipelines), len(pipelines)):
            start = time.perf_counter()
            while (elapsed := time.perf_counter() - start) < 0.3:
                pipelines[name]()
                steps[name] += num_envs
            spent[name] += elapsed
    return {name: steps[name] / spent[name] for name in pipelines}


def game_pipelines(args):
    """{name: function that steps all its games}, a function that measures the emulator alone, and
    one that ends them all."""
    n, generator = args.num_envs, np.random.default_rng(0)
    script = importlib.import_module("paac_atari")
    flags = ["--env-id", args.env_id, "--num-envs", str(n), "--no-terminal-on-life-loss"]
    run_args = script.parse_args(
        flags + (["--num-workers", str(args.num_workers)] if args.num_workers else [])
    )
    ours = script.WorkerPool(run_args, script.make_env)
    ours.start(seed=0, global_step=0)
    workers = run_args.num_workers
    stock = gym.vector.AsyncVectorEnv([lambda: stock_env(args.env_id)] * n, context="forkserver")
    stock.reset(seed=0)
    num_actions = ours.action_space.n
    game = gym.spec(args.env_id).kwargs["game"]
    cpp = ale_py.AtariVectorEnv(game, num_envs=n, num_threads=workers, reward_clipping=False)
    cpp.reset(seed=0)

    def emulator():
        context = multiprocessing.get_context("forkserver")
        barrier, results = context.Barrier(workers), context.Queue()
        work = (args.env_id, args.seconds, barrier, results)
        processes = [context.Process(target=emulate, args=work) for _ in range(workers)]
        for process in processes:
            process.start()
        speed = sum(results.get() for _ in processes)
        for process in processes:
            process.join()
        return {f"the emulator alone, {workers} processes": speed}

    def close():
        for process in stock.processes:  # its close() would wait for ever after an error
            process.kill()
        stock.closed = True
        ours.close()
        cpp.close()

    def random_actions():
        return generator.integers(num_actions, size=n)

    pipelines = {
        f"stock: {n} processes, gymnasium's wrappers": lambda: stock.step(random_actions()),
        f"ours: {workers} workers": lambda: ours.step(random_actions()),
        f"ale-py AtariVectorEnv (C++), {workers} threads": lambda: cpp.step(random_actions()),
    }
    if importlib.util.find_spec("envpool"):
        import envpool

        name = "".join(word.capitalize() for word in game.split("_"))  # breakout: Breakout-v5
        settings = {"num_envs": n, "num_threads": workers, "env_type": "gymnasium"}
        pool = envpool.make(f"{name}-v5", **settings)
        pool.reset()
        pipelines[f"envpool (C++), {workers} threads"] = lambda: pool.step(random_actions())
    return pipelines, emulator, close


# training -----------------------------------------------------------------------------------------

SB3_A2C = """
import sys, time
import ale_py
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack

class Stopwatch(BaseCallback):
    def _on_step(self):
        if self.n_calls == 50:
            self.start, self.start_steps = time.perf_counter(), self.num_timesteps
        if self.n_calls > 50 and time.perf_counter() - self.start > float(sys.argv[3]):
            print((self.num_timesteps - self.start_steps) / (time.perf_counter() - self.start))
            return False
        return True

if __name__ == "__main__":
    n = int(sys.argv[2])
    envs = make_atari_env(sys.argv[1], n_envs=n, vec_env_cls=SubprocVecEnv)
    A2C("CnnPolicy", VecFrameStack(envs, 4), n_steps=5).learn(10**9, callback=Stopwatch())
"""


def sb3_speed(args):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sb3_a2c.py")
        path.write_text(SB3_A2C)
        cmd = [args.sb3_python, path, args.env_id, args.num_envs, args.train_seconds]
        result = subprocess.run(list(map(str, cmd)), cwd=folder, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"stable-baselines3 failed: {result.stderr[-1000:]}")
    return float(result.stdout.split()[-1])


def train_speed(args, script, num_envs, network):
    """Steps/s of a script, and which part of the time went to the games, to acting and to
    learning; A3C, whose processes do all of it at once, has no such parts."""
    flags = training_flags(args, script, num_envs, network)
    return measure_training([sys.executable, ROOT / f"{script}.py", *flags], args.train_seconds)


def training_flags(args, script, num_envs, network):
    flags = ["--env-id", args.env_id, "--num-envs", num_envs, "--log-interval", LOG_INTERVAL]
    # Each game of A3C is a process.
    if args.num_workers and hasattr(importlib.import_module(script).Args, "num_workers"):
        flags += ["--num-workers", args.num_workers]
    # nature-bf16: --arch nature --bf16
    return [*map(str, flags), "--arch", *network.replace("-", " --").split()]


def measure_training(command, seconds, before_the_end=lambda process: None):
    """Speed and split of a training that goes on for so many seconds after its first point.
    before_the_end(process) is called while it still runs."""
    command = [str(part) for part in command]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with open(log, "w") as file:
            options = {"stdout": file, "stderr": file, "preexec_fn": stop_with_parent}
            process = subprocess.Popen(command, cwd=folder, **options)
        try:
            wait_for_points(process, log, 1)
            time.sleep(seconds)
            wait_for_points(process, log, 6)  # slow ones get longer
            before_the_end(process)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
        (run_dir,) = Path(folder).glob("runs/*")
        return speed_and_split(read_tags(run_dir))


def wait_for_points(process, log, number):
    while log.read_text().count("\nstep ") < number:
        if process.poll() is not None:
            sys.exit(f"{' '.join(process.args)}\nended: {log.read_text()}")
        time.sleep(0.1)


def speed_and_split(tags):
    """Over all points but the first two, the warm-up, and the last, with its checkpoint."""
    points = tags["charts/SPS"][2:-1]
    steps = np.diff([point.step for point in tags["charts/SPS"][1:-1]])
    seconds = steps / [point.value for point in points]
    split = {}
    for tag in sorted(tag for tag in tags if tag.startswith("time/")):
        values = [point.value for point in tags[tag][2:-1]]
        split[tag.removeprefix("time/")] = float(np.average(values, weights=seconds))
    return float(steps.sum() / seconds.sum()), split


# report -------------------------------------------------------------------------------------------


def hardware():
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": CORES,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{
            package: version(package)
            for package in ("torch", "gymnasium", "ale-py", "numpy", "opencv-python-headless")
        },
    }


def table(title, speeds, reference):
    """Medians of the rounds, and the median over the rounds of the ratio to the reference."""
    print(f"\n{title}\n| steps/s | {'ratio':>5} | lowest - highest | |\n|--:|--:|--:|:--|")
    rows = []
    for name, values in speeds.items():
        ratio = statistics.median(v / r for v, r in zip(values, speeds[reference]))
        median = statistics.median(values)
        print(
            f"| {median:,.0f} | {ratio:.2f} | {min(values):,.0f} - {max(values):,.0f} | {name} |",
            flush=True,
        )
        rows.append({"name": name, "steps_per_second": median, "ratio": ratio, "rounds": values})
    return rows


def figure(sweep, path, title):
    """Figure 2 of the paper: speed and time split over the number of games."""
    archs = list(dict.fromkeys(row["arch"] for row in sweep))
    fig, axes = plt.subplots(
        1, 1 + len(archs), figsize=(5 * (1 + len(archs)), 4), layout="constrained"
    )
    for axis, arch in zip(axes[1:], archs):
        rows = [row for row in sweep if row["arch"] == arch]
        x, bottom = np.arange(len(rows)), np.zeros(len(rows))
        axes[0].plot(x, [row["steps_per_second"] for row in rows], marker="o", label=arch)
        for part, label in PARTS.items():
            share = np.array([100 * row["split"].get(part, 0) for row in rows])
            axis.bar(x, share, bottom=bottom, label=label)
            bottom += share
        axis.set(title=f"time, {arch}", ylabel="%", ylim=(0, 100), xlabel="games $n_e$")
        axis.set_xticks(x, [row["num_envs"] for row in rows])
        axis.legend(loc="lower right")
    axes[0].set(title=title, ylabel="steps/s", xlabel="games $n_e$")
    axes[0].set_xticks(x, [row["num_envs"] for row in rows])
    axes[0].set_ylim(bottom=0)
    axes[0].grid(alpha=0.3)
    axes[0].legend()
    fig.savefig(path, dpi=120)


def in_turn(measures, rounds):
    """{name: [what measure() returned in each round]}, one round of everything after the other."""
    results = {name: [] for name in measures}
    for number in range(1, rounds + 1):
        for name, measure in measures.items():
            print(f"round {number} of {rounds}: {name}", flush=True)
            results[name].append(measure())
    return results


def check(args):
    """End with one line, before anything is measured, if something cannot work."""
    if args.rounds < 1 or args.num_envs < 1 or args.seconds <= 0 or args.train_seconds < 0:
        sys.exit("--rounds, --num-envs and --seconds must be positive, --train-seconds 0 or more")
    for script in args.scripts:
        if not (ROOT / f"{script}.py").exists():
            sys.exit(f"--scripts {script}: there is no {script}.py in {ROOT}")
        for network in args.networks:
            flags = training_flags(args, script, args.num_envs, network)
            importlib.import_module(script).parse_args(flags)  # ends with a line of its own
    if args.sb3_python and not Path(args.sb3_python).exists():
        sys.exit(f"--sb3-python {args.sb3_python}: no such file")
    prepare(f"{args.out}.json")


def main(args):
    check(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("SIGTERM"))  # so that `finally` is reached
    report = {
        "hardware": hardware(),
        "settings": {k: v for k, v in vars(args).items() if k != "sb3_python"},
    }
    print(", ".join(f"{k} {v}" for k, v in report["hardware"].items()), flush=True)
    if "games" in args.parts:
        pipelines, emulator, close = game_pipelines(args)
        rounds = []
        try:
            for number in range(1, args.rounds + 1):
                print(f"round {number} of {args.rounds}: the games", flush=True)
                rounds.append(alternate(pipelines, args.num_envs, args.seconds) | emulator())
        finally:
            close()
        speeds = {name: [measured[name] for measured in rounds] for name in rounds[0]}
        report["games"] = table(
            f"{args.num_envs} games of {args.env_id}, random actions", speeds, next(iter(pipelines))
        )
    if "training" in args.parts:
        runs = (
            {"A2C of stable-baselines3, nature": lambda: sb3_speed(args)} if args.sb3_python else {}
        )
        for script, network in itertools.product(args.scripts, args.networks):
            flags = (args, script, args.num_envs, network)
            runs[f"{script}, {network}"] = lambda flags=flags: train_speed(*flags)[0]
        speeds = in_turn(runs, args.rounds)
        report["training"] = table(
            f"training, {args.num_envs} games of {args.env_id}", speeds, next(iter(runs))
        )
    if "sweep" in args.parts:
        points = itertools.product(args.sweep, ("nips", "nature"))
        runs = {
            point: lambda point=point: train_speed(args, args.scripts[0], *point)
            for point in points
        }
        report["sweep"] = []
        measured = in_turn(runs, args.rounds)
        parts = " | ".join(f"{name} %" for name in PARTS.values())
        print(f"\n| games | network | steps/s | {parts} |")
        print(f"|--:|:--|--:|{'--:|' * len(PARTS)}")
        for (num_envs, arch), rounds in measured.items():
            speed = statistics.median(speed for speed, _ in rounds)
            split = {}
            for part in PARTS:
                if part in rounds[0][1]:
                    split[part] = statistics.mean(shares[part] for _, shares in rounds)
            shares = [f"{100 * split[part]:.0f}" if part in split else "" for part in PARTS]
            print(f"| {num_envs} | {arch} | {speed:,.0f} | {' | '.join(shares)} |")
            point = {"num_envs": num_envs, "arch": arch, "steps_per_second": speed, "split": split}
            report["sweep"].append(point)
        figure(
            report["sweep"],
            f"{args.out}.png",
            f"{args.scripts[0]} on {report['hardware']['cores']} cores",
        )
    Path(f"{args.out}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{args.out}.json")


if __name__ == "__main__":
    main(tyro.cli(Args))
