"""Train scripts x games x numbers of games x seeds, as many side by side as fit, and put the scores
beside the published ones.

    python utils/benchmark.py --games Pong Breakout --seeds 1 2 3        # paac_atari.py's default
    python utils/benchmark.py --scripts paac_atari nstep_q_atari --flags="--total-timesteps 2000000"
    python utils/benchmark.py --scripts paac_atari a3c_atari --hours 1   # the same time each
    python utils/benchmark.py --games Pong --steps 2e6                   # 2M steps of a run of 10M
    python utils/benchmark.py --runs runs.txt                            # a command line per line

The same command again resumes whatever is unfinished; Ctrl-C stops all runs with a checkpoint each.
A run that fails is resumed --retries times and, if that does not help, reported: the table is still
made, and the exit code is 1. Runs go to runs/, what they print to NAME/*.log, the results to
NAME.md, NAME.csv, and as curves to NAME_steps.png and .csv, NAME_hours.png and .csv (NAME: --out);
--flags are appended to each line of --runs. Sources of the published numbers: published/README.md.
"""

import csv
import ctypes
import importlib
import itertools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import plot
import tyro
from evaluate import atari_name, human_normalised
from outputs import prepare

UTILS = Path(__file__).resolve().parent
# macOS cannot give out its cores.
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]
PUBLISHED = {  # column: (file, column of the file)
    "random": ("human_random.csv", "random"),
    "human": ("human_random.csv", "human"),
    "A2C, 10M": ("atari_scores.csv", "a2c_10Msteps_ppo_paper"),
    "PPO, 10M": ("atari_scores.csv", "ppo_10Msteps_ppo_paper"),
    "A2C (SB2 zoo), 10M": ("a2c_zoo.csv", "sb2_zoo"),
    "A2C (SB3 zoo), 10M": ("a2c_zoo.csv", "sb3_zoo"),
    "A2C GAE (SLM-Lab), 10M": ("slm_lab.csv", "a2c_gae"),
    "A2C n-step (SLM-Lab), 10M": ("slm_lab.csv", "a2c_nstep"),
    "PPO (CleanRL), 10M": ("cleanrl.csv", "ppo"),
    "PQN (CleanRL), 10M": ("cleanrl.csv", "pqn"),
    "PAAC nips, 115M": ("paac_table1.csv", "paac_arch_nips"),
    "PAAC nature, 115M": ("paac_table1.csv", "paac_arch_nature"),
    "A3C, 4 days, human starts": ("paac_table1.csv", "a3c_ff"),
    "GA3C": ("paac_table1.csv", "ga3c"),
    "Gorila": ("paac_table1.csv", "gorila"),
}


@dataclass
class Args:
    scripts: list[str] = field(default_factory=lambda: ["paac_atari"])  # without .py
    games: list[str] = field(default_factory=lambda: ["Pong"])  # names (NoFrameskip-v4), or ids
    seeds: list[int] = field(default_factory=lambda: [1])
    num_envs: list[int] = field(default_factory=list)  # games in parallel; none: the script's own
    flags: str = ""  # more flags for all runs: --flags="--arch nature --num-steps 10"
    runs: str | None = None  # instead: a file of lines like "paac_atari.py --env-id ALE/Pong-v5"
    parallel: int | None = None  # runs side by side, each with its share of the cores
    steps: float = math.inf  # stop each run after so many agent steps, whatever its learning rate
    hours: float = math.inf  # stop each run after this time; the same command goes on for as long
    retries: int = 2  # how often a failed run is resumed
    budgets: list[float] = field(default_factory=list)  # steps of each table; none: at the end
    window: int = 200_000  # a score is the mean of the curve's points in the last so many steps
    out: str = "benchmark"  # name of the results and of the folder of the logs


@dataclass
class Run:
    script: str
    flags: list[str]  # as typed
    args: object  # the script's Args
    folder: str | None = None  # known after training
    error: str | None = None

    @property
    def name(self):
        return f"{self.args.env_id.replace('/', '-')}__{self.args.exp_name}__{self.args.seed}"

    def find_folder(self):
        """The run folder that --resume auto would resume, or None."""
        return importlib.import_module(self.script).find_newest_run_like(self.args)

    def reached(self):
        """The step of the run's checkpoint."""
        folder = self.find_folder()
        if folder is None:
            return 0
        return importlib.import_module(self.script).load_checkpoint(folder)["global_step"]


def plan(args):
    """All runs; a mistyped game or flag ends here, in the script's own words."""
    if args.runs:
        lines = read_runs(args.runs)
    else:
        lines = []
        for script, game, n, seed in itertools.product(
            args.scripts, args.games, args.num_envs or [None], args.seeds
        ):
            name = script.removesuffix(".py")
            is_id = re.search(r"-v\d+$", game)
            env_id = game if is_id else f"{game}NoFrameskip-v4"
            size = "" if n is None else f"--num-envs {n} --exp-name {name}-{n}"
            lines.append(f"{name} --env-id {env_id} --seed {seed} {size}")
    if not lines:
        sys.exit("no runs: --scripts, --games, --seeds or the file of --runs is empty")
    runs = []
    for line in lines:
        try:
            script, *flags = shlex.split(f"{line} {args.flags}")
        except ValueError as error:
            sys.exit(f"{line} {args.flags}: {error}")
        script = script.removesuffix(".py")
        if script not in {path.stem for path in UTILS.parent.glob("*.py")}:
            sys.exit(f"there is no script {script}.py in {UTILS.parent}")
        if "--resume" in flags:
            sys.exit(f"{line}: without --resume, as all runs are resumed")
        runs.append(Run(script, flags, importlib.import_module(script).parse_args(flags)))
    if len({run.name for run in runs}) < len(runs):
        sys.exit("two runs have the same game, --exp-name and --seed")
    return runs


def read_runs(path):
    """The command lines of a file, without comments and empty lines."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"--runs {path}: {error}")
    return [line for line in lines if line.strip() and not line.startswith("#")]


def say(text):
    """Print in one piece, or the lines of several threads mix. If nobody can read it any more, the
    runs go on all the same."""
    with suppress(OSError):
        print(f"{text}\n", end="", flush=True)


# Loaded before any fork; there is nothing like it on macOS.
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def stop_with_parent():
    """Called in a new process: the kernel is to send it SIGTERM, after which it writes a checkpoint
    and stops, when this program dies, even of SIGKILL."""
    if LIBC is not None:
        LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def last_logged_step(output):
    steps = re.findall(r"^step ([\d,]+) of", output, re.MULTILINE)
    return int(steps[-1].replace(",", "")) if steps else 0


def train(run, args, stopping):
    """Start or resume one run until it is through; what is wrong with it is left in run.error."""
    script = UTILS.parent / f"{run.script}.py"
    command = [sys.executable, str(script), *run.flags, "--resume", "auto"]
    deadline = time.monotonic() + 3600 * args.hours
    for attempt in range(1 + args.retries):
        run.error = None
        if run.reached() >= min(args.steps, run.args.total_timesteps):
            return
        if stopping.is_set():
            run.error = "not finished"
            return
        say(f"{'start' if attempt == 0 else 'again'}: {run.name}")
        with open(Path(args.out, f"{run.name}.log"), "a+", errors="replace") as log:
            start = log.tell()
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=stop_with_parent,
            )
            told = None  # why it was told to stop; only once, as a later signal ends it at once
            while process.returncode is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                log.seek(start)
                output = log.read()
                if told:
                    continue
                if time.monotonic() > deadline or last_logged_step(output) >= args.steps:
                    told = "over"
                elif stopping.is_set():
                    told = "stopped"
                if told:
                    process.send_signal(signal.SIGINT)
        was_stopped = process.returncode == 128 + signal.SIGINT
        if process.returncode == 0 or (told == "over" and was_stopped):
            say(f"done:  {run.name}")
            return
        run.error = "not finished"
        if not was_stopped:
            last_words = " ".join(output.split("\n")[-3:]).strip()[-300:]
            run.error = f"exit code {process.returncode}: {last_words}"
        say(f"ended: {run.name}: {run.error}")
        if told:
            return


def published(env_id):
    """{column: score} of the game, as far as there are any."""
    key = atari_name(env_id)
    scores = {}
    for column, (name, source) in PUBLISHED.items():
        with open(UTILS / "published" / name, newline="") as file:
            rows = {
                re.sub(r"[^a-z]+", "_", row["game"].lower()): row[source]
                for row in csv.DictReader(file)
            }
        if rows.get(key):
            scores[column] = float(rows[key])
    return scores


def measure(run, budget, window):
    """Steps, hours and score at `budget` steps (None: at the run's end), or None if the run has not
    come so far."""
    logged, _ = plot.read_run(run.folder, "charts/SPS", 1)  # has points also where no game ended
    xs, scores = plot.read_run(run.folder, "charts/episodic_return", 1)
    budget = budget or logged["steps"][-1]
    # A run ends up to one update after the budget.
    inside = (xs["steps"] > budget - window) & (xs["steps"] < budget + window / 20)
    if logged["steps"][-1] < 0.98 * budget or not inside.any():
        return None
    return budget, np.interp(budget, logged["steps"], logged["hours"]), scores[inside].mean()


def report(runs, budget, window):
    """The table of one budget as rows of a CSV, one per game and setting."""
    groups, rows = {}, []
    for run in runs:
        if result := measure(run, budget, window):
            groups.setdefault((run.args.env_id, run.args.exp_name), []).append(result)
    for (env_id, name), results in sorted(groups.items()):
        steps, hours, scores = np.array(results).T
        row = {
            "game": env_id,
            "run": name,
            "steps": steps.mean(),
            "seeds": len(scores),
            "score": scores.mean(),
        }
        row["standard error"] = (
            np.std(scores, ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else None
        )
        row["human-normalised %"] = human_normalised(env_id, row["score"])
        row["hours"], row["steps/s"] = hours.mean(), steps.sum() / hours.sum() / 3600
        rows.append(row | published(env_id))
    return rows


def write(rows, out):
    columns = [
        "game",
        "run",
        "steps",
        "seeds",
        "score",
        "standard error",
        "human-normalised %",
        "hours",
        "steps/s",
        *PUBLISHED,
    ]
    columns = [c for c in columns if any(row.get(c) is not None for row in rows)]
    digits = {"steps": 0, "seeds": 0, "human-normalised %": 0, "hours": 2, "steps/s": 0}

    def show(row, column):
        value = row.get(column)
        if value is None:
            return ""
        if isinstance(value, str):
            return value
        return f"{value:z,.{digits.get(column, 1)}f}"

    alignment = [":--" if c in ("game", "run") else "--:" for c in columns]
    lines = [" | ".join(columns), "|".join(alignment)]
    lines += [" | ".join(show(row, c) for c in columns) for row in rows]
    table = "".join(f"| {line} |\n" for line in lines)
    say(f"\n{table}")
    Path(f"{out}.md").write_text(table)
    with open(f"{out}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def main(args):
    if args.retries < 0 or (args.parallel is not None and args.parallel < 1):
        sys.exit("--retries must be 0 or more, --parallel 1 or more")
    runs = plan(args)
    for name in (f"{args.out}.md", f"{args.out}/log", f"{args.out}_steps.png"):
        prepare(name)
    stopping, slots = threading.Event(), itertools.count()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Nohup stays nohup
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, lambda *_: stopping.set())
    parallel = args.parallel or min(len(CORES), len(runs))

    def own_cores():
        """Pin this thread to its share of the cores. Its runs inherit them, and start as many
        workers as that."""
        if hasattr(os, "sched_setaffinity"):
            share, slot = max(1, len(CORES) // parallel), next(slots)
            os.sched_setaffinity(0, {CORES[(slot * share + i) % len(CORES)] for i in range(share)})

    with ThreadPoolExecutor(parallel, initializer=own_cores) as pool:
        list(pool.map(lambda run: train(run, args, stopping), runs))
    for run in runs:
        run.folder = run.find_folder()
    ends = {
        None if args.hours < math.inf else min(args.steps, run.args.total_timesteps) for run in runs
    }
    with_scores = []
    for run in runs:
        if run.folder and "charts/episodic_return" in plot.read_tags(run.folder):
            with_scores.append(run)
    rows = []
    for budget in args.budgets or sorted(ends):
        rows += report(with_scores, budget, args.window)
    if rows:
        write(rows, args.out)
    else:
        say("no table: no run has come far enough")
    if with_scores:
        folders = [run.folder for run in with_scores]
        draw(folders, "hours", args.out)
        draw([*folders, str(UTILS / "published" / "paac_curves.csv")], "steps", args.out)
    failed = [run for run in runs if run.error]
    for run in failed:
        print(f"{run.name}: {run.error}", file=sys.stderr)
    if failed:
        counts = f"{len(failed)} of {len(runs)} runs are not finished"
        sys.exit(f"{counts}; the same command resumes them")


def draw(curves, x, out):
    plot.main(plot.Args(curves, x=x, out=f"{out}_{x}.png", csv=f"{out}_{x}.csv"))


if __name__ == "__main__":
    sys.path.insert(0, str(UTILS.parent))
    main(tyro.cli(Args))
