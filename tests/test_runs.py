"""Whole runs: exact resume, signals, bad input and bad luck, learning, and the script copied alone.
What involves a signal, a stream or a limit of the system is tried from the command line, the rest
by train() in this process."""

import atexit
import fcntl
import multiprocessing.forkserver
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    DISTINCT,
    DISTINCT_PROCESSES,
    Q_SCRIPTS,
    ROOT,
    SCRIPTS,
    SYNCHRONOUS,
    VALUE_BASED,
    command,
    each,
    only_run,
    resume,
    run,
    scalars,
    small,
    train,
)
from flax.serialization import msgpack_restore, msgpack_serialize
from games import Scripted, ShortCatch, scripted_steps

import paac_atari


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    register = atexit.register
    pools = []

    def register_or_keep(function, *args, **options):
        owner = getattr(function, "__self__", None)
        if type(owner).__name__ in ("WorkerPool", "ActorPool"):
            pools.append(function)
            return function
        return register(function, *args, **options)

    monkeypatch.setattr(atexit, "register", register_or_keep)
    yield
    for close in pools:  # also those of a run that ended early
        close()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        default = signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
        signal.signal(signum, default)  # train() has installed its own


def parents():
    """{pid: parent pid} of all processes that are not zombies."""
    table = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if state != "Z":
            table[int(stat.parent.name)] = int(parent)
    return table


def descendants(pid):
    table = parents()
    family = {pid}
    while more := {child for child, parent in table.items() if parent in family} - family:
        family |= more
    return family - {pid}


def workers(pid):
    """The worker processes of a run, which are children of its fork server."""
    family = descendants(pid)
    table = parents()
    return sorted(child for child in family if table.get(child) in family)


def wait_for(condition, timeout=90):
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)  # a run may take 300 steps in 0.1 s
    return value


def kill(pid, signum=signal.SIGKILL):
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        pass


class Run:
    """A run in the background; its output goes to a file."""

    def __init__(self, script, folder, *args):
        self.log = Path(folder, "log.txt")
        with open(self.log, "w") as log:
            cmd = command(script, *small(script), *args)
            self.process = subprocess.Popen(
                cmd, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.pid = self.process.pid

    def wait_for_output(self, text):
        wait_for(lambda: text in self.log.read_text() or self.process.poll() is not None)
        assert text in self.log.read_text()

    def wait(self, timeout=90):
        return self.process.wait(timeout)


@pytest.fixture
def start(script, tmp_path):
    """start(*args) -> Run; whatever a failed test leaves running is killed."""
    runs = []

    def start(*args):
        runs.append(Run(script, tmp_path, *args))
        return runs[-1]

    yield start
    for r in runs:
        for pid in [r.pid, *descendants(r.pid)]:
            kill(pid)


def checkpoint_file(run_dir):
    """checkpoint.pt, or checkpoint.msgpack of the JAX script; None before the first."""
    for name in ("checkpoint.pt", "checkpoint.msgpack"):
        if Path(run_dir, name).exists():
            return Path(run_dir, name)
    return None


def load(run_dir):
    path = checkpoint_file(run_dir)
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    return msgpack_restore(path.read_bytes())


def reached(script, total_timesteps):
    """What the last step may be: one of two actor-learners may be in an update when the other one
    reaches the end."""
    if script.__name__ == "a3c_atari":
        return (total_timesteps, total_timesteps + 5)
    return (total_timesteps,)


def ended_at(script, total_timesteps, output):
    return any(f"step {step:,} of" in output for step in reached(script, total_timesteps))


def warnings(script, most):
    """How many warnings are right where there are `most` occasions to warn: A3C looks every 0.1 s
    and may miss one."""
    return (most - 1, most) if script.__name__ == "a3c_atari" else (most,)


def assert_same(one, two, path=""):
    """Equal to the last bit, through dicts and lists."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            assert_same(one[key], two[key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), path
        for i, (a, b) in enumerate(zip(one, two)):
            assert_same(a, b, f"{path}/{i}")
    else:
        assert np.array_equal(one, two) if hasattr(one, "shape") else one == two, path


def fails(script, args, capsys):
    """The one line with which parse_args() refuses the command line."""
    with pytest.raises(SystemExit) as stopped:
        script.parse_args(list(map(str, args)))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1, error
    return error


# resume -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, env_id, steps",
    [
        ("paac_atari", "ALE/Qbert-v5", 400),
        pytest.param("paac_atari", "BreakoutNoFrameskip-v4", 1600, marks=pytest.mark.slow),
        *(
            pytest.param(name, "ALE/Qbert-v5", 1600, marks=pytest.mark.slow)
            for name in ("nstep_q_atari", "one_step_sarsa_atari", "pqn_atari", "paac_atari_jax")
        ),
    ],
    indirect=["script"],
)
def test_resume_after_kill_is_exact(script, start, tmp_path, env_id, steps):
    """2N steps = N steps, kill -9 a little later, resume, N steps: parameters, optimiser, games and
    curves, bit for bit."""
    args = ["--env-id", env_id, "--checkpoint-interval", steps, "--total-timesteps", 2 * steps]
    train(script, *args, "--exp-name", "whole")
    killed = start(*map(str, args), "--exp-name", "killed")
    # Two points after the checkpoint: TensorBoard is ahead of it
    killed.wait_for_output(f"step {steps + 80:,} of")
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    (whole,), (resumed,) = tmp_path.glob("runs/*whole*"), tmp_path.glob("runs/*killed*")
    assert load(resumed)["global_step"] == steps
    resume(script, resumed)
    one, two = load(whole), load(resumed)
    assert one["global_step"] == two["global_step"] == 2 * steps
    assert one["args"].pop("exp_name") != two["args"].pop("exp_name")
    assert_same(one, two)
    curves, resumed_curves = scalars(whole), scalars(resumed)
    assert curves.keys() == resumed_curves.keys()
    assert curves.keys() >= {"charts/learning_rate", "losses/grad_norm", "charts/live_units_3"}
    if steps == 1600:  # so that games have ended before and after
        assert len(curves["charts/episodic_return"]) > 2
    for tag, curve in curves.items():
        if tag != "charts/SPS" and not tag.startswith("time/"):
            assert curve == resumed_curves[tag], tag


@pytest.mark.parametrize("script", each(SYNCHRONOUS), indirect=True)
def test_number_of_workers_changes_nothing(script, tmp_path):
    checkpoints = []
    for num_workers in (0, 1, 2):
        name = f"on-{num_workers}"
        train(script, "--num-workers", num_workers, "--exp-name", name, "--total-timesteps", 400)
        (run_dir,) = tmp_path.glob(f"runs/*__{name}__*")
        checkpoints.append(load(run_dir))
    for checkpoint in checkpoints[1:]:
        for part in ("agent", "optimizer", "env_states"):
            assert_same(checkpoints[0][part], checkpoint[part], part)


@pytest.mark.parametrize("script", each(SCRIPTS), indirect=True)
def test_resume_auto_and_longer(script, tmp_path, capsys):
    """auto starts a run or resumes the one of the same arguments; flags typed with --resume replace
    the run's."""
    args = ["--resume", "auto", "--learning-rate", "1e-3"]
    train(script, *args, "--total-timesteps", 200)
    run_dir = only_run(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train(script, *args, "--total-timesteps", 200)
    assert stopped.value.code == 0
    assert "nothing left to do; --total-timesteps is 200" in capsys.readouterr().out
    assert only_run(tmp_path) == run_dir
    resume(script, run_dir, "--total-timesteps", 300, "--optimizer-epsilon", 0.5)
    assert load(run_dir)["global_step"] in reached(script, 300)
    assert load(run_dir)["args"]["learning_rate"] == 1e-3
    if script.__name__ != "paac_atari_jax":  # whose optimizer has no numbers in its state
        assert load(run_dir)["optimizer"]["param_groups"][0]["eps"] == 0.5
    # No longer the same arguments
    assert script.parse_args([*small(script), *args, "--total-timesteps", "200"]).resume is None
    error = fails(script, ["--resume", run_dir, "--arch", "nature"], capsys)
    assert "--arch cannot change" in error
    if script.__name__ != "a3c_atari":  # which subtracts nothing
        error = fails(script, ["--resume", run_dir, "--no-subtract-mean-screen"], capsys)
        assert "--subtract-mean-screen cannot change" in error
    error = fails(script, ["--resume", run_dir, "--gamma", "7"], capsys)  # also of a finished run
    assert "--gamma 7.0: must lie" in error


def test_resume_takes_the_checkpoint_file_for_its_folder(script, tmp_path):
    train(script, "--total-timesteps", 20)
    run_dir = only_run(tmp_path)
    flags = ["--resume", str(checkpoint_file(run_dir)), "--total-timesteps", "40"]
    assert script.parse_args(flags).resume == str(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["paac_atari"], indirect=True)
def test_runs_started_at_the_same_time_have_folders_of_their_own(script, tmp_path):
    """As in a loop over learning rates that starts all runs at once."""
    commands = [
        command(script, *small(script), "--learning-rate", lr, "--total-timesteps", 20)
        for lr in (1e-3, 2e-3, 3e-3)
    ]
    processes = [subprocess.Popen(cmd, cwd=tmp_path, stdout=subprocess.DEVNULL) for cmd in commands]
    assert [process.wait(180) for process in processes] == [0, 0, 0]
    rates = sorted(load(run_dir)["args"]["learning_rate"] for run_dir in tmp_path.glob("runs/*"))
    assert rates == [1e-3, 2e-3, 3e-3]


def test_a_run_in_use_is_not_resumed(script, tmp_path, capsys):
    """And not even read before the other process has written its last checkpoint. When that process
    ends, however it does, the lock is gone."""
    train(script, "--total-timesteps", 20)
    run_dir = only_run(tmp_path)
    path = checkpoint_file(run_dir)
    before = path.read_bytes()
    # The file has this process's id: the run above was trained here.
    with open(run_dir / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        capsys.readouterr()
        args = script.parse_args(["--resume", str(run_dir), "--total-timesteps", "40"])
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(script, "load_checkpoint", None)
            script.train(args, script.make_env)
        assert stopped.value.code == 2
        assert f"{run_dir} is in use by process {os.getpid()}\n" in capsys.readouterr().err
        assert path.read_bytes() == before
    resume(script, run_dir, "--total-timesteps", 40)
    assert load(run_dir)["global_step"] in reached(script, 40)


# signals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, signum",
    [
        ("paac_atari", signal.SIGINT),
        ("paac_atari", signal.SIGHUP),
        pytest.param("paac_atari", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("paac_atari", signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param("a3c_atari", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("a3c_atari", signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param("a3c_atari", signal.SIGHUP, marks=pytest.mark.slow),
        *(pytest.param(name, signal.SIGTERM, marks=pytest.mark.slow) for name in SCRIPTS[1:]),
    ],
    indirect=["script"],
)
def test_signal_to_the_group_stops_with_a_checkpoint(start, tmp_path, signum):
    r = start()
    r.wait_for_output(" steps/s")
    family = descendants(r.pid)
    os.killpg(r.pid, signum)  # as a terminal and SLURM do: to the workers, too
    assert r.wait() == 128 + signum
    assert f"{signum.name}: stopped at step" in r.log.read_text()
    assert "Traceback" not in r.log.read_text()
    assert load(only_run(tmp_path))["global_step"] > 0
    wait_for(lambda: not family & parents().keys(), 10)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["paac_atari"], indirect=True)
def test_nohup_survives_its_terminal(script, tmp_path):
    cmd = ["nohup", *command(script, *small(script), "--total-timesteps", "4000")]
    with open("log.txt", "w") as log:
        process = subprocess.Popen(cmd, stdout=log, stderr=log, start_new_session=True)
    wait_for(lambda: " steps/s" in Path("log.txt").read_text())
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(90) == 0
    assert load(only_run(tmp_path))["global_step"] in reached(script, 4000)


@pytest.mark.parametrize("script", ["paac_atari"], indirect=True)
def test_suspended_run_goes_on(start):
    """Ctrl-Z and, after more than --step-timeout, fg: no worker counts as lost."""
    r = start("--step-timeout", "2")
    r.wait_for_output(" steps/s")
    for pid in workers(r.pid):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(0.5)  # the learner waits for their answers now
    os.kill(r.pid, signal.SIGSTOP)
    time.sleep(3)
    points = r.log.read_text().count(" steps/s")
    for pid in (r.pid, *workers(r.pid)):
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: r.log.read_text().count(" steps/s") > points)
    os.kill(r.pid, signal.SIGINT)
    assert r.wait() == 128 + signal.SIGINT
    assert "lost" not in r.log.read_text() and "restart" not in r.log.read_text()


@pytest.mark.parametrize("script", each(SCRIPTS), indirect=True)
def test_signal_while_the_workers_start_is_not_lost(script, tmp_path, monkeypatch):
    start = multiprocessing.forkserver.ensure_running
    signals = [signal.SIGINT]  # one only: a second one, more than a second later, stops at once

    def interrupted():
        if signals:
            os.kill(os.getpid(), signals.pop())
        start()

    monkeypatch.setattr(multiprocessing.forkserver, "ensure_running", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train(script, "--total-timesteps", 200)
    assert stopped.value.code == 128 + signal.SIGINT
    assert load(only_run(tmp_path))["global_step"] < 200


@pytest.mark.parametrize("script", each(DISTINCT_PROCESSES), indirect=True)
def test_second_signal_stops_at_once(start):
    r = start("--step-timeout", "1000")
    r.wait_for_output(" steps/s")
    family = descendants(r.pid)
    os.kill(workers(r.pid)[0], signal.SIGSTOP)  # the update cannot finish
    os.kill(r.pid, signal.SIGINT)
    os.kill(r.pid, signal.SIGTERM)  # uv and timeout send one each: within a second, they are one
    time.sleep(3)
    assert r.process.poll() is None

    def ended():  # again and again: on a busy machine the first one may have been handled just now
        kill(r.pid, signal.SIGINT)
        time.sleep(1)
        return r.process.poll() is not None

    wait_for(ended, 30)
    assert r.process.returncode == -signal.SIGINT
    for pid in family & parents().keys():
        kill(pid, signal.SIGCONT)
    wait_for(lambda: not family & parents().keys(), 10)


# bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
@pytest.mark.parametrize(
    "args, words",
    [
        (["--env-id", "CartPole-v1"], "CartPole-v1 is not an Atari game"),
        (["--env-id", "BreakouNoFrameskip-v4"], "closest: BreakoutNoFrameskip-v4"),
        (["--env-id", "Pong"], "ALE/Pong-v5"),
        (["--env-id", ""], "closest: "),
        (["--num-envs", "0"], "--num-envs 0: must lie between 1 and"),
        (["--num-steps", "-5"], "--num-steps -5: must lie between 1 and"),
        (["--log-interval", "0"], "--log-interval 0: must lie between 1 and"),
        (["--seed", "-1"], "--seed -1: must lie between 0 and 4,294,967,295"),
        (["--seed", str(2**40)], "--seed 1099511627776: must lie between"),
        (["--learning-rate", "nan"], "--learning-rate nan: must lie between 0 and"),
        (["--learning-rate", "-1e-3"], "--learning-rate -0.001: must lie between 0 and"),
        (["--step-timeout", "inf"], "--step-timeout inf: must lie between 0.001 and"),
        (["--step-timeout", "0"], "--step-timeout 0.0: must lie between 0.001 and"),
        (["--gamma", "2"], "--gamma 2.0: must lie between 0 and 1"),
        (["--max-grad-norm", "0"], "--max-grad-norm 0.0: must lie between 1e-12 and"),
        (["--optimizer-epsilon", "0"], "--optimizer-epsilon 0.0: must lie between 1e-12 and"),
        (["--num-envs", str(10**12)], "--num-envs 1000000000000: must lie between 1 and 10,000"),
        (["--resume", "runs/nowhere"], f"{Path('runs/nowhere')}: missing"),
        (["--resume", ""], "missing"),
        (["--exp-name", "../elsewhere"], "--exp-name ../elsewhere: "),
        (["--exp-name", 250 * "x"], "too long"),
    ],
)
def test_bad_arguments_get_one_line(script, capsys, args, words):
    error = fails(script, args, capsys)
    assert error.startswith(f"{script.__name__}.py: ") and words in error, error


@pytest.mark.parametrize("script", Q_SCRIPTS, indirect=True)
@pytest.mark.parametrize(
    "args, words",
    [
        (["--final-epsilons", "0.1", "1.5"], "--final-epsilons 1.5: must lie between 0 and 1"),
        (["--final-epsilons", "-0.1"], "--final-epsilons -0.1: must lie between 0 and 1"),
        (["--final-epsilons", "nan"], "--final-epsilons nan: must lie between 0 and 1"),
        (["--final-epsilons"], "--final-epsilons: at least one number"),
        (["--exploration-steps", "0"], "--exploration-steps 0: must lie between 1 and"),
        (["--target-interval", "0"], "--target-interval 0: must lie between 1 and"),
    ],
)
def test_bad_epsilons_get_one_line(script, capsys, args, words):
    assert words in fails(script, args, capsys)


@pytest.mark.parametrize("script", ["pqn_atari"], indirect=True)
@pytest.mark.parametrize(
    "args, words",
    [
        (["--q-lambda", "1.1"], "--q-lambda 1.1: must lie between 0 and 1"),
        (["--num-epochs", "0"], "--num-epochs 0: must lie between 1 and"),
        (["--num-minibatches", "0"], "--num-minibatches 0: must lie between 1 and"),
    ],
)
def test_bad_flags_of_pqn_get_one_line(script, capsys, args, words):
    assert words in fails(script, args, capsys)


@pytest.mark.parametrize("script", SYNCHRONOUS, indirect=True)
@pytest.mark.parametrize(
    "num_workers, message",
    [
        ("5", "--num-envs 32 is not a multiple of --num-workers 5"),
        ("-1", "--num-workers -1: must lie between 0 and"),
    ],
)
def test_bad_number_of_workers_gets_one_line(script, capsys, num_workers, message):
    assert message in fails(script, ["--num-envs", "32", "--num-workers", num_workers], capsys)


def test_many_games_have_time_to_start(monkeypatch):
    """A second for each game of a worker on top of --step-timeout."""

    class NotStarted(paac_atari.TimedVectorEnv):
        processes = []
        closed = True

        def __init__(self, make_workers, **options):
            pass

    monkeypatch.setattr(paac_atari, "TimedVectorEnv", NotStarted)
    args = paac_atari.Args(num_envs=1024, num_workers=2)
    envs = paac_atari.WorkerPool(args, paac_atari.make_env).make_vector_env()
    assert envs.start_timeout == 60 + 512 and envs.step_timeout == 60


def test_mistyped_game_from_the_command_line(script, tmp_path):
    result = run(command(script, "--env-id", "Breakou"), tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "Breakout" in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
@pytest.mark.parametrize("args", [["--arch", "resnet"], ["--no-such-flag"]])
def test_wrong_flags_get_the_parsers_box(script, capsys, args):
    with pytest.raises(SystemExit) as stopped:
        script.parse_args(args)
    assert stopped.value.code == 2 and args[0] in "".join(capsys.readouterr())


@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
def test_tracking_without_wandb_is_refused(script, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it was not installed
    assert "pip install wandb" in fails(script, ["--track"], capsys)
    monkeypatch.delitem(sys.modules, "wandb")
    Path("wandb").mkdir()  # which it leaves behind, and which can be imported like a package
    monkeypatch.syspath_prepend(".")
    assert "pip install wandb" in fails(script, ["--track"], capsys)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["paac_atari"], indirect=True)
def test_a_resumed_run_is_the_same_in_wandb(script, tmp_path, monkeypatch):
    calls = []
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = types.SimpleNamespace(origin="wandb/__init__.py")  # find_spec() asks for it
    wandb.init = lambda **options: calls.append(options)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train(script, "--track", "--total-timesteps", 20)
    run_dir = only_run(tmp_path)
    resume(script, run_dir, "--total-timesteps", 40)
    train(script, "--track", "--total-timesteps", 20, "--seed", 2)
    first, second, other = calls
    assert first["id"] == second["id"] != other["id"]
    assert first["name"] == second["name"] == run_dir.name
    assert second["resume"] == "allow" and re.fullmatch(r"[0-9a-f]{32}", first["id"])


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("kind", ["truncated", "one bit", "empty", "foreign", "partial", "pickled"])
def test_bad_checkpoint_gets_one_line(script, tmp_path, capsys, kind):
    path = tmp_path / script.CHECKPOINT

    def save(content):
        if path.suffix == ".pt":
            torch.save(content, path)
        else:
            path.write_bytes(msgpack_serialize(content))

    if kind == "truncated":
        train(script, "--total-timesteps", 20)
        path = checkpoint_file(only_run(tmp_path))
        path.write_bytes(path.read_bytes()[:100_000])
    elif kind == "one bit":
        if path.suffix != ".pt":
            pytest.skip("msgpack has no checksums")
        save(checkpoint_of(script, agent={"weights": torch.zeros(10_000)}))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "foreign":
        save({"weights": np.zeros(3)})
    elif kind == "partial":
        save({"script": script.__name__, "args": {}})
    else:
        path.write_bytes(pickle.dumps(Malicious()))
    capsys.readouterr()
    error = fails(script, ["--resume", path.parent], capsys)
    assert ("no global_step or no agent" if kind == "partial" else "damaged") in error, error
    assert not (tmp_path / "executed").exists()


def test_what_cannot_be_read_back_is_not_saved(tmp_path):
    """As with a fork that keeps a numpy array in the checkpoint."""
    checkpoint = checkpoint_of(paac_atari)
    paac_atari.save_checkpoint(tmp_path, checkpoint, is_last=False)
    with pytest.raises(pickle.UnpicklingError, match="numpy"):
        paac_atari.save_checkpoint(tmp_path, {**checkpoint, "mine": np.zeros(3)}, is_last=False)
    assert paac_atari.load_checkpoint(tmp_path)["script"] == "paac_atari"


def checkpoint_of(module, **content):
    """The least that load_checkpoint() takes."""
    return {"script": module.__name__, "global_step": 0, "agent": {}, "args": {}} | content


@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
def test_another_scripts_checkpoint_is_refused(script, tmp_path):
    """Also where the flags are the same, as those of one-step Q and Sarsa are."""
    checkpoint = checkpoint_of(script, args={"seed": 7, "a_flag_of_old": 1})
    script.save_checkpoint(tmp_path, checkpoint, is_last=False)
    assert script.load_checkpoint(tmp_path)["args"].seed == 7
    script.save_checkpoint(tmp_path, {**checkpoint, "script": "another_script"}, is_last=False)
    with pytest.raises(ValueError, match=f"not from {script.__name__}.py, but from another_script"):
        script.load_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["damaged", "another script's", "older"])
def test_resume_auto_skips_what_it_cannot_resume(script, tmp_path, capsys, kind):
    """Of another game without a word; of the same game with a line. The run before is resumed."""
    args = script.parse_args(["--env-id", "PongNoFrameskip-v4"])
    good = tmp_path / "runs" / f"PongNoFrameskip-v4__{script.__name__}__1__1"
    script.save_checkpoint(good, checkpoint_of(script, args=asdict(args)), is_last=False)
    run_dir = good.with_name(good.name[:-1] + "2")
    if kind == "damaged":
        run_dir.mkdir()
        (run_dir / script.CHECKPOINT).write_text("")
    elif kind == "older":
        run_dir.mkdir()
        content = {"script": script.__name__, "flags": {}}
        (run_dir / script.CHECKPOINT).write_bytes(script.serialize(content))
    else:
        script.save_checkpoint(
            run_dir, checkpoint_of(script, script="another_script"), is_last=False
        )
    assert script.parse_args(["--resume", "auto"]).resume is None
    assert capsys.readouterr().err == ""
    pong = ["--env-id", "PongNoFrameskip-v4", "--resume", "auto"]
    assert script.parse_args(pong).resume == f"runs/{good.name}"
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"skips {Path('runs', run_dir.name)}" in error, error


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen")
def test_a_resumed_run_uses_the_cores_of_its_machine(tmp_path, monkeypatch):
    train(paac_atari, "--total-timesteps", 100, "--num-workers", 0)
    flags = ["--resume", str(only_run(tmp_path)), "--total-timesteps", "200"]
    for cores in (1, 2):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: range(n))
        assert paac_atari.parse_args(flags).num_workers == cores
        assert paac_atari.parse_args([*flags, "--num-workers", "4"]).num_workers == 4


@pytest.mark.parametrize("name", ["v[1]", "*", "a b", "x__y"])
def test_resume_auto_takes_names_as_they_are(script, tmp_path, name):
    """Also where a name looks like a pattern of file names."""
    args = script.parse_args(["--exp-name", name])
    run_dir = tmp_path / "runs" / f"{args.env_id}__{name}__1__5"
    script.save_checkpoint(run_dir, checkpoint_of(script, args=asdict(args)), is_last=False)
    resumed = script.parse_args(["--exp-name", name, "--resume", "auto"]).resume
    assert resumed == f"runs/{run_dir.name}"
    assert script.parse_args(["--exp-name", "v1", "--resume", "auto"]).resume is None


def test_what_a_checkpoint_lacks_starts_anew(script, tmp_path, capsys):
    """The games, which is said. Of an exported agent, all but the network, in a run folder of its
    own."""
    train(script, "--total-timesteps", 100)
    path = checkpoint_file(only_run(tmp_path))
    checkpoint = script.deserialize(path)
    weights = {name: checkpoint[name] for name in ("script", "args", "global_step", "agent")}
    exported = tmp_path / path.name  # a run's checkpoint has the same name, but an optimizer, too
    exported.write_bytes(script.serialize(weights))
    checkpoint.pop("env_states", None)
    path.write_bytes(script.serialize(checkpoint))
    capsys.readouterr()
    resume(script, path.parent, "--total-timesteps", 200)
    output = capsys.readouterr().out
    assert "no states of the games in it: they start anew" in output and "optimizer" not in output
    resume(script, exported, "--total-timesteps", 200)
    assert "an agent without its optimizer, which starts anew" in capsys.readouterr().out
    run_dirs = list(tmp_path.glob("runs/*"))
    assert len(run_dirs) == 2
    assert all(load(run_dir)["global_step"] in reached(script, 200) for run_dir in run_dirs)


# bad luck -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", each([*DISTINCT, "one_step_sarsa_atari"]), indirect=True)
def test_killed_worker_is_replaced(script, start, tmp_path):
    r = start("--total-timesteps", "1000")
    r.wait_for_output(" steps/s")
    victim = workers(r.pid)[1]
    os.kill(victim, signal.SIGKILL)
    assert r.wait() == 0
    log = r.log.read_text()
    name = rf"(worker 1 \(games 2 to 3, |actor-learner [01] \()pid {victim}\)"
    assert re.search(rf"{name} died: SIGKILL", log)
    assert "Traceback" not in log
    assert load(only_run(tmp_path))["global_step"] in reached(script, 1000)


@pytest.mark.parametrize("script", each(DISTINCT_PROCESSES), indirect=True)
def test_stuck_worker_is_replaced(start, tmp_path):
    r = start("--step-timeout", "2")
    r.wait_for_output(" steps/s")
    victim = workers(r.pid)[0]
    os.kill(victim, signal.SIGSTOP)
    r.wait_for_output("did not answer in time")
    name = rf"(worker 0 \(games 0 to 1, |actor-learner [01] \()pid {victim}\)"
    assert re.search(rf"{name} did not", r.log.read_text())
    points = r.log.read_text().count(" steps/s")
    wait_for(lambda: r.log.read_text().count(" steps/s") > points)  # training goes on
    os.kill(r.pid, signal.SIGINT)
    assert r.wait() == 128 + signal.SIGINT
    assert load(only_run(tmp_path))["global_step"] > 0
    assert victim not in parents()


@pytest.mark.slow
def test_gives_up_when_workers_keep_dying(start, tmp_path):
    r = start("--checkpoint-interval", "100", "--step-timeout", "20")
    wait_for(lambda: any(map(checkpoint_file, tmp_path.glob("runs/*"))))
    deadline = time.monotonic() + 90
    while r.process.poll() is None and time.monotonic() < deadline:
        for pid in workers(r.pid):
            kill(pid)
        time.sleep(0.02)
    assert r.wait() == 1
    assert "three times" in r.log.read_text()
    assert "Traceback (most recent call last)" not in r.log.read_text()
    assert load(only_run(tmp_path))["global_step"] >= 100


@pytest.mark.parametrize("script", each(SCRIPTS), indirect=True)
def test_not_a_number_stops_before_it_spreads(script, tmp_path):
    train(script, "--total-timesteps", 100)
    run_dir = only_run(tmp_path)
    before = checkpoint_file(run_dir).read_bytes()
    with pytest.raises(SystemExit) as stopped:
        resume(script, run_dir, "--total-timesteps", 1000, "--learning-rate", "1e12")
    message = stopped.value.code  # a text: it is printed, and the exit code is 1
    assert "nan" in message and "step 1" in message and "--learning-rate" in message
    assert checkpoint_file(run_dir).read_bytes() == before


@pytest.mark.parametrize("interval", [1, 10**6])
def test_no_checkpoint_of_parameters_that_are_not_finite(script, tmp_path, monkeypatch, interval):
    """The update that spoils them has finite losses: only the parameters tell, be it at the last
    step or before."""
    monkeypatch.setitem(script.RANGES, "learning_rate", (0, 1e300))
    with pytest.raises(SystemExit) as stopped:
        flags = ["--total-timesteps", 40 if interval == 1 else 20]
        flags += ["--checkpoint-interval", interval]
        if script.__name__ == "a3c_atari":
            # RMSProp's first step is rate * gradient, and the usual gradients leave it finite.
            flags += ["--vf-coef", 1e9, "--max-grad-norm", 1e9]
        # The most that torch takes; JAX's step is a little smaller.
        rate = "1e39" if script.__name__ == "paac_atari_jax" else "1e38"
        train(script, *flags, "--learning-rate", rate, "--no-anneal-lr", "--optimizer-epsilon", 1)
    # Of A3C's processes, another one may be the first to see a loss that is not finite.
    words = "nan" if script.__name__ == "a3c_atari" else "a parameter is inf or nan"
    assert words in stopped.value.code
    assert checkpoint_file(only_run(tmp_path)) is None


@pytest.mark.slow
@pytest.mark.parametrize("script", DISTINCT_PROCESSES, indirect=True)
def test_full_disk_is_a_warning_until_the_end(script, tmp_path):
    train(script, "--total-timesteps", 100)
    run_dir = only_run(tmp_path)
    before = checkpoint_file(run_dir).read_bytes()

    # no file may grow beyond 4 MB; a checkpoint has more, what the processes share has less
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))

    args = ["--resume", run_dir, "--total-timesteps", 300, "--checkpoint-interval", 100]
    result = run(command(script, *args), tmp_path, preexec_fn=limit)
    assert result.returncode == 1, result.stderr
    assert result.stderr.count("warning: ") in warnings(script, 1)
    assert re.search(r"step 30[05]: last checkpoint not written", result.stderr)
    assert "File too large" in result.stderr and "Traceback" not in result.stderr
    assert ended_at(script, 300, result.stdout)
    assert checkpoint_file(run_dir).read_bytes() == before


def test_unwritable_folder_is_a_warning_until_the_end(script, tmp_path, capsys):
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(SystemExit, match="last checkpoint not written"):
        train(script, "--total-timesteps", 80)
    output = capsys.readouterr()
    assert output.err.count("warning: ") in warnings(script, 2), output.err
    assert "Traceback" not in output.err
    assert ended_at(script, 80, output.out)


# What happens to the streams, in the shell's words.
STREAMS = {
    "a reader that ends": "| head -2",
    "neither output nor errors": ">&- 2>&-",
    "a full disk for both": "> /dev/full 2>&1",
    "no output": ">&-",
    "no errors": "2>&-",
    "nothing at all": "<&- >&- 2>&-",
}


@pytest.mark.parametrize(
    "script, name",
    [
        ("paac_atari", "a reader that ends"),
        ("paac_atari", "neither output nor errors"),
        *(pytest.param("paac_atari", name, marks=pytest.mark.slow) for name in list(STREAMS)[2:]),
        pytest.param("a3c_atari", "a full disk for both", marks=pytest.mark.slow),
    ],
    indirect=["script"],
)
def test_run_does_not_depend_on_its_streams(script, tmp_path, name):
    """The checkpoint and the curves reach the end, whoever listens."""
    flags = ["--total-timesteps", "400", "--checkpoint-interval", "100"]
    line = f"{shlex.join(command(script, *small(script), *flags))} {STREAMS[name]}"
    result = run(["bash", "-c", f"set -o pipefail; {line}"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    run_dir = only_run(tmp_path)
    assert load(run_dir)["global_step"] in reached(script, 400)
    assert scalars(run_dir)["charts/SPS"][-1][0] in reached(script, 400)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["paac_atari"], indirect=True)
def test_warning_that_cannot_be_written_either(script, tmp_path):
    """The log lies on the full disk, too."""
    (tmp_path / "runs").write_text("not a folder")
    with open("/dev/full", "w") as full:
        cmd = command(script, *small(script), "--total-timesteps", 80)
        result = run(cmd, tmp_path, stderr=full)
    assert ended_at(script, 80, result.stdout), result.stdout


def test_nothing_survives_a_killed_learner(start):
    r = start()
    r.wait_for_output(" steps/s")
    family = descendants(r.pid)
    mapped = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in family)
    shared_memory = {
        line.split(maxsplit=5)[5] for line in mapped.splitlines() if "/dev/shm/" in line
    }
    assert len(workers(r.pid)) == 2
    os.kill(r.pid, signal.SIGKILL)
    wait_for(lambda: not family & parents().keys(), 5)
    assert not any(map(os.path.exists, shared_memory))
    assert "Traceback" not in r.log.read_text()


# learning, and being copied -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
def test_learns_a_small_image_game(script, tmp_path):
    """Random play scores -0.6, the optimum is 1, with 2 % random actions about 0.97. A3C, whose
    course depends on the machine, had 0.92 and 0.94 after 12,500 and 15,000 steps; with a tenth of
    its entropy bonus a run can settle on half of the balls for good."""
    is_a3c = script.__name__ == "a3c_atari"
    if is_a3c:
        flags = ["--num-envs", 4, "--total-timesteps", 20_000]
    else:
        flags = ["--num-envs", 32, "--total-timesteps", 15_000, "--no-anneal-lr"]
    if script.__name__ in VALUE_BASED:
        flags += ["--exploration-steps", 5000, "--final-epsilons", 0.02]
    train(script, *flags, "--log-interval", 1250, make_env=ShortCatch)
    scores = scalars(only_run(tmp_path))["charts/episodic_return"]
    assert scores[0][1] < -0.2
    assert np.mean([score for _, score in scores[-3:]]) > (0.8 if is_a3c else 0.9)


@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
def test_runs_copied_alone_into_an_empty_folder(script, tmp_path):
    """And resumes there, with its games in one process."""
    shutil.copy(ROOT / f"{script.__name__}.py", tmp_path)
    alone = [sys.executable, f"{script.__name__}.py"]
    result = run([*alone, *small(script), "--total-timesteps", 60], tmp_path)
    assert result.returncode == 0, result.stderr
    run_dir = only_run(tmp_path)
    more = ["--resume", run_dir, "--total-timesteps", 80]
    if script.__name__ != "a3c_atari":
        more += ["--num-workers", 0]
    result = run([*alone, *more], tmp_path)
    assert result.returncode == 0, result.stderr
    assert load(run_dir)["global_step"] in reached(script, 80)


def saved_mean_screen(checkpoint):
    agent = checkpoint["agent"]
    return np.asarray(agent.get("params", agent)["mean_screen"])


@pytest.mark.parametrize("script", each(SYNCHRONOUS), indirect=True)
def test_mean_screen_is_that_of_all_updates(script, monkeypatch, tmp_path):
    """Scripted's pixels are known numbers. The newest frames after each of 12 updates count."""
    monkeypatch.setattr(Scripted, "created", 0)
    flags = ["--num-workers", 0, "--num-steps", 5, "--total-timesteps", 240]
    train(script, *flags, "--subtract-mean-screen", make_env=Scripted)
    games = scripted_steps(4)
    shown = []
    for _ in range(12):
        steps = list(islice(games, 5))
        shown.append(steps[-1][-1])  # the numbers on the observations after the last step
    mean_screen = saved_mean_screen(load(only_run(tmp_path)))
    assert mean_screen.shape == (84, 84)
    np.testing.assert_allclose(mean_screen, np.mean(shown), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
def test_runs_with_the_other_settings(script, tmp_path):
    """The other network, initial weights, optimizer and number format, where it has them."""
    flags = ["--arch", "nature", "--init", "uniform", "--total-timesteps", 100]
    flags += ["--bf16", "--no-layer-norm"]
    if script.__name__ != "a3c_atari":  # which has RMSProp and subtracts nothing
        flags += ["--optimizer", "rmsprop", "--no-subtract-mean-screen"]
    train(script, *flags)
    checkpoint = load(only_run(tmp_path))
    assert checkpoint["global_step"] in reached(script, 100)
    assert not saved_mean_screen(checkpoint).any()
