"""What all tests share.
Everything is tested through the scripts' own functions and command lines.

    python -m pytest            # minutes: paac_atari.py, the mathematics of all, each script once
    python -m pytest -m slow    # the rest: what takes longer, and the siblings' plumbing
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # each core runs a test already
# The same bits everywhere: a CPU's; with a GPU, see test_cuda.py
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
ROOT = Path(__file__).resolve().parent.parent
# Without this, XLA compiles the JAX script again in each test, which takes 15 s of a core.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
Q_SCRIPTS = ["nstep_q_atari", "one_step_q_atari", "one_step_sarsa_atari"]
VALUE_BASED = [*Q_SCRIPTS, "pqn_atari"]
SYNCHRONOUS = ["paac_atari", *VALUE_BASED, "paac_atari_jax"]
# paac.py has test_gym.py, paac_atari_multigpu.py test_multigpu.py.
SCRIPTS = [*SYNCHRONOUS, "a3c_atari"]
# Below the fence the value-based scripts are paac_atari.py, letter for letter (test_drift.py):
# what is long and happens there alone is tried with these.
DISTINCT = ["paac_atari", "paac_atari_jax", "a3c_atari"]
# The same holds for the JAX script in what handles signals, files and lost workers: what is long
# and about those alone is tried with these.
DISTINCT_PROCESSES = ["paac_atari", "a3c_atari"]
sys.path[:0] = [str(ROOT / folder) for folder in ("", "tests", "utils", "results")]


def each(scripts):
    """For parametrize: all scripts but paac_atari.py are slow, because most of their text is its
    text, which is always tested."""
    return [
        name if name == "paac_atari" else pytest.param(name, marks=pytest.mark.slow)
        for name in scripts
    ]


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no core waits for another at the end."""
    items.sort(key=lambda item: "learns" not in item.name)


@pytest.fixture(params=each(DISTINCT))
def script(request):
    """A script as a module: those of DISTINCT, unless a test names others."""
    return importlib.import_module(request.param)


def small(script):
    """Flags of a run of a few seconds: 4 games on 2 workers, or 2 actor-learners. An update takes
    20 steps, in the one-step scripts 4, in A3C 5."""
    flags = ["--log-interval", "40"]
    if script.__name__ != "paac":
        flags += ["--env-id", "PongNoFrameskip-v4"]
    if script.__name__ == "a3c_atari":
        return [*flags, "--num-envs", "2"]
    if script.__name__ == "pqn_atari":
        flags += ["--num-steps", "5", "--num-minibatches", "2"]
    return [*flags, "--num-envs", "4", "--num-workers", "2"]


def train(script, *args, make_env=None):
    """A small run in this process, in the current folder."""
    parsed = script.parse_args([*small(script), *map(str, args)])
    script.train(parsed, make_env or script.make_env)


def resume(script, run_dir, *args):
    script.train(script.parse_args(["--resume", *map(str, [run_dir, *args])]), script.make_env)


def command(script, *args):
    return [sys.executable, str(ROOT / f"{script.__name__}.py"), *map(str, args)]


def run(cmd, cwd, timeout=180, **kwargs):
    """Run a command to its end in `cwd`, as a user would, with nothing of this repository on the
    path."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | kwargs
    return subprocess.run(list(map(str, cmd)), cwd=cwd, timeout=timeout, env=env, **options)


def tool(name, *args):
    """The command line of a program in utils/."""
    return [sys.executable, str(ROOT / "utils" / f"{name}.py"), *map(str, args)]


def only_run(folder):
    """The one run folder below `folder`."""
    (run_dir,) = Path(folder).glob("runs/*")
    return run_dir


def scalars(run_dir):
    """{tag: [(step, value)]}, as TensorBoard shows them: after a resume, without what was logged
    twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
