"""Whole runs from the command line: exact resume, signals, bad input and bad luck, learning, and
the script copied alone."""

import json
import multiprocessing.forkserver
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DISTINCT, Q_SCRIPTS, ROOT, SYNCHRONOUS, command, only_run, run, scalars, small
from flax.serialization import msgpack_restore, msgpack_serialize


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
        time.sleep(0.05)
    return value


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
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def checkpoint_file(run_dir):
    """checkpoint.pt, or checkpoint.msgpack of the JAX script; None before the first."""
    return next(
        filter(Path.exists, map(Path(run_dir).joinpath, ("checkpoint.pt", "checkpoint.msgpack"))),
        None,
    )


def script_checkpoint(script):
    return "checkpoint.msgpack" if script.__name__.endswith("jax") else "checkpoint.pt"


def load(run_dir):
    path = checkpoint_file(run_dir)
    return (
        torch.load(path, weights_only=True)
        if path.suffix == ".pt"
        else msgpack_restore(path.read_bytes())
    )


def reached(script, total_timesteps):
    """What the last step may be: one of two actor-learners may be in an update when the other one
    reaches the end."""
    return (
        (total_timesteps, total_timesteps + 5)
        if script.__name__ == "a3c_atari"
        else (total_timesteps,)
    )


def warnings(script, most):
    """How many a run may print that comes to that many places where it writes: A3C looks every
    0.1 s and may pass two at once."""
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


# resume -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, env_id",
    [
        *((script, "ALE/Qbert-v5") for script in SYNCHRONOUS),
        ("paac_atari", "BreakoutNoFrameskip-v4"),
    ],
    indirect=["script"],
)
def test_resume_after_kill_is_exact(script, start, tmp_path, env_id):
    """2N updates = N updates, kill -9 a little later, resume, N updates: parameters, optimiser,
    games and curves, bit for bit."""
    args = ["--env-id", env_id, "--checkpoint-interval", "1600", "--total-timesteps", "3200"]
    assert (
        run(command(script, *small(script), *args, "--exp-name", "whole"), tmp_path).returncode == 0
    )
    killed = start(*args, "--exp-name", "killed")
    # Two updates after the checkpoint: TensorBoard is ahead of it
    killed.wait_for_output("step 1,680 of")
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    (whole,), (resumed,) = tmp_path.glob("runs/*whole*"), tmp_path.glob("runs/*killed*")
    assert load(resumed)["global_step"] == 1600
    result = run(command(script, "--resume", resumed), tmp_path)
    assert result.returncode == 0, result.stderr
    one, two = load(whole), load(resumed)
    assert one["global_step"] == two["global_step"] == 3200
    assert one["args"].pop("exp_name") != two["args"].pop("exp_name")
    assert_same(one, two)
    curves, resumed_curves = scalars(whole), scalars(resumed)
    assert (
        curves.keys()
        == resumed_curves.keys()
        >= {"charts/episodic_return", "charts/learning_rate", "losses/grad_norm"}
    )
    for tag, curve in curves.items():
        if tag != "charts/SPS" and not tag.startswith("time/"):
            assert len(curve) > 2 and curve == resumed_curves[tag], tag


@pytest.mark.parametrize("script", SYNCHRONOUS, indirect=True)
def test_number_of_workers_changes_nothing(script, tmp_path):
    checkpoints = []
    for num_workers in (0, 1, 2):
        args = [
            *small(script),
            "--num-workers",
            num_workers,
            "--exp-name",
            f"on-{num_workers}",
            "--total-timesteps",
            400,
        ]
        assert run(command(script, *args), tmp_path).returncode == 0
        (run_dir,) = tmp_path.glob(f"runs/*__on-{num_workers}__*")
        checkpoints.append(load(run_dir))
    for checkpoint in checkpoints[1:]:
        for part in ("agent", "optimizer", "env_states"):
            assert_same(checkpoints[0][part], checkpoint[part], part)


def test_resume_auto_and_longer(script, tmp_path, monkeypatch, capsys):
    """auto starts a run or goes on with the one of the same arguments; flags typed with --resume
    replace the run's."""
    args = ["--num-envs", "2", "--env-id", "PongNoFrameskip-v4"]
    args += ["--resume", "auto", "--learning-rate", "1e-3"]
    assert run(command(script, *args, "--total-timesteps", 200), tmp_path).returncode == 0
    run_dir = only_run(tmp_path)
    assert run(command(script, *args, "--total-timesteps", 200), tmp_path).returncode == 0
    assert only_run(tmp_path) == run_dir
    longer = command(
        script, "--resume", run_dir, "--total-timesteps", 300, "--optimizer-epsilon", 0.5
    )
    assert run(longer, tmp_path).returncode == 0
    assert load(run_dir)["global_step"] in reached(script, 300)
    assert load(run_dir)["args"]["learning_rate"] == 1e-3
    if script.__name__ != "paac_atari_jax":  # whose optimizer has no numbers in its state
        assert load(run_dir)["optimizer"]["param_groups"][0]["eps"] == 0.5
    monkeypatch.chdir(tmp_path)
    # No longer the same arguments
    assert script.parse_args([*args, "--total-timesteps", "200"]).resume is None
    with pytest.raises(SystemExit, match="2"):
        script.parse_args(["--resume", str(run_dir), "--arch", "nature"])
    assert "--arch cannot change" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["paac_atari"], indirect=True)
def test_runs_started_at_the_same_time_have_folders_of_their_own(script, tmp_path):
    """As in a loop over learning rates that starts all runs at once."""
    commands = [
        command(script, *small(script), "--learning-rate", lr, "--total-timesteps", 20)
        for lr in (1e-3, 2e-3, 3e-3)
    ]
    processes = [subprocess.Popen(cmd, cwd=tmp_path, stdout=subprocess.DEVNULL) for cmd in commands]
    assert [process.wait(180) for process in processes] == [0, 0, 0]
    assert sorted(
        load(run_dir)["args"]["learning_rate"] for run_dir in tmp_path.glob("runs/*")
    ) == [1e-3, 2e-3, 3e-3]


# signals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, signum",
    [
        (name, s)
        for name in ("paac_atari", "a3c_atari")
        for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    ]
    + [(name, signal.SIGTERM) for name in SYNCHRONOUS[1:]],
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


def test_signal_while_the_workers_start_is_not_lost(script, tmp_path, monkeypatch):
    start = multiprocessing.forkserver.ensure_running
    monkeypatch.setattr(
        multiprocessing.forkserver,
        "ensure_running",
        lambda: os.kill(os.getpid(), signal.SIGINT) or start(),
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        args = script.parse_args([*small(script), "--total-timesteps", "200"])
        script.train(args, script.make_env)
    assert stopped.value.code == 128 + signal.SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert load(only_run(tmp_path))["global_step"] < 200


def test_second_signal_stops_at_once(start):
    r = start("--step-timeout", "1000")
    r.wait_for_output(" steps/s")
    family = descendants(r.pid)
    os.kill(workers(r.pid)[0], signal.SIGSTOP)  # the update cannot finish
    os.kill(r.pid, signal.SIGINT)
    os.kill(r.pid, signal.SIGTERM)  # uv and timeout send one each: within a second, they are one
    time.sleep(1.5)
    assert r.process.poll() is None
    os.kill(r.pid, signal.SIGINT)
    assert r.wait(5) == -signal.SIGINT
    for pid in family & parents().keys():
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: not family & parents().keys(), 10)


# bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, words",
    [
        (["--env-id", "CartPole-v1"], ["CartPole-v1 is no Atari game"]),
        (["--num-envs", "0"], ["--num-envs cannot be 0"]),
        (["--num-steps", "-5"], ["--num-steps cannot be -5"]),
        (["--seed", "-1"], ["--seed cannot be -1"]),
        (["--learning-rate", "nan"], ["--learning-rate cannot be nan"]),
        (["--step-timeout", "inf"], ["--step-timeout cannot be inf"]),
        (["--resume", "runs/nowhere"], ["runs/nowhere", "missing"]),
    ],
)
def test_bad_arguments_get_one_line(script, capsys, args, words):
    with pytest.raises(SystemExit) as stopped:
        script.parse_args(args)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1, error
    assert all(word in error for word in words), error


@pytest.mark.parametrize("script", SYNCHRONOUS, indirect=True)
@pytest.mark.parametrize(
    "num_workers, message",
    [("5", "--num-envs 32 is not a multiple of --num-workers 5"), ("-1", "cannot be -1")],
)
def test_bad_number_of_workers_gets_one_line(script, capsys, num_workers, message):
    with pytest.raises(SystemExit) as stopped:
        script.parse_args(["--num-envs", "32", "--num-workers", num_workers])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and message in error, error


def test_mistyped_game_from_the_command_line(script, tmp_path):
    result = run(command(script, "--env-id", "Breakou"), tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "BreakoutNoFrameskip-v4" in result.stderr, (
        result.stderr
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("args", [["--arch", "resnet"], ["--no-such-flag"]])
def test_wrong_flags_get_the_parsers_box(script, capsys, args):
    with pytest.raises(SystemExit) as stopped:
        script.parse_args(args)
    assert stopped.value.code == 2 and args[0] in "".join(capsys.readouterr())


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("script", DISTINCT, indirect=True)
@pytest.mark.parametrize("kind", ["truncated", "foreign", "pickled"])
def test_bad_checkpoint_gets_one_line(script, tmp_path, kind):
    if kind == "truncated":
        assert (
            run(command(script, *small(script), "--total-timesteps", 20), tmp_path).returncode == 0
        )
        path = checkpoint_file(only_run(tmp_path))
        path.write_bytes(path.read_bytes()[:100_000])
    else:
        path = tmp_path / script_checkpoint(script)
        save = (
            torch.save
            if path.suffix == ".pt"
            else lambda x, path: path.write_bytes(msgpack_serialize(x))
        )
        save({"weights": np.zeros(3)}, path) if kind == "foreign" else path.write_bytes(
            pickle.dumps(Malicious())
        )
    result = run(command(script, "--resume", path.parent), tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "damaged" in result.stderr, result.stderr
    assert not (tmp_path / "executed").exists()


def test_another_scripts_checkpoint_is_refused(script, tmp_path):
    """Also where the flags are the same, as those of one-step Q and Sarsa are."""
    checkpoint = {"script": script.__name__, "args": {"seed": 7, "a_flag_of_old": 1}}
    script.save_checkpoint(tmp_path, checkpoint)
    assert script.load_checkpoint(tmp_path)["args"].seed == 7
    script.save_checkpoint(tmp_path, {**checkpoint, "script": "another_script"})
    with pytest.raises(ValueError, match=f"not from {script.__name__}.py, but from another_script"):
        script.load_checkpoint(tmp_path)


def test_resume_auto_skips_a_damaged_checkpoint(script, tmp_path, monkeypatch, capsys):
    """Of another game without a word; of the same game with a line."""
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs" / f"PongNoFrameskip-v4__{script.__name__}__1__1"
    run_dir.mkdir(parents=True)
    (run_dir / script_checkpoint(script)).write_text("")
    assert script.parse_args(["--resume", "auto"]).resume is None
    assert capsys.readouterr().err == ""
    pong = ["--env-id", "PongNoFrameskip-v4", "--resume", "auto"]
    assert script.parse_args(pong).resume is None
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"skips {Path('runs', run_dir.name)}" in error, error


def test_resume_auto_takes_names_as_they_are(script, tmp_path, monkeypatch):
    """Also where a name looks like a pattern of file names."""
    monkeypatch.chdir(tmp_path)
    args = script.parse_args(["--exp-name", "v[1]"])
    run_dir = tmp_path / "runs" / f"{args.env_id}__v[1]__1__5"
    script.save_checkpoint(run_dir, {"script": script.__name__, "args": asdict(args)})
    resumed = script.parse_args(["--exp-name", "v[1]", "--resume", "auto"]).resume
    assert resumed == f"runs/{run_dir.name}"


@pytest.mark.parametrize("script", DISTINCT, indirect=True)
def test_a_run_of_an_older_version_goes_on(script, tmp_path, monkeypatch, capsys):
    """With the network and the optimizer; what was kept in another form starts anew, which is said.
    So does all but the network of an exported agent, into a run folder of its own."""
    monkeypatch.chdir(tmp_path)
    flags = [*small(script), "--total-timesteps", "100"]
    script.train(script.parse_args(flags), script.make_env)
    path = checkpoint_file(only_run(tmp_path))
    checkpoint = script.deserialize(path)
    weights = {name: checkpoint[name] for name in ("script", "args", "global_step", "agent")}
    exported = tmp_path / f"agent{path.suffix}"
    exported.write_bytes(script.serialize(weights))
    checkpoint.pop("env_states", None)
    checkpoint["games"] = [{}]
    if script.__name__ != "paac_atari_jax":
        checkpoint["rng"] = []
    path.write_bytes(script.serialize(checkpoint))
    for resume, missing in ((path.parent, "no env_states"), (exported, "no optimizer")):
        capsys.readouterr()
        more = ["--resume", str(resume), "--total-timesteps", "200"]
        script.train(script.parse_args(more), script.make_env)
        assert missing in capsys.readouterr().out
    assert script.parse_args(["--resume", str(path)]).resume == str(path.parent)
    run_dirs = list(tmp_path.glob("runs/*"))
    assert len(run_dirs) == 2
    assert all(load(run_dir)["global_step"] in reached(script, 200) for run_dir in run_dirs)


def test_checkpoints_on_a_disk_without_hard_links(script, tmp_path, monkeypatch):
    def link(*args):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", link)
    for seed in (1, 2):
        script.save_checkpoint(tmp_path, {"script": script.__name__, "args": {"seed": seed}})
        assert script.load_checkpoint(tmp_path)["args"].seed == seed


# bad luck -----------------------------------------------------------------------------------------


def test_killed_worker_is_replaced(script, start, tmp_path):
    r = start("--total-timesteps", "2000")
    r.wait_for_output(" steps/s")
    victim = workers(r.pid)[1]
    os.kill(victim, signal.SIGKILL)
    assert r.wait() == 0
    log = r.log.read_text()
    assert re.search(
        rf"(worker 1 \(games 2 to 3, |actor-learner [01] \()pid {victim}\) died: SIGKILL", log
    )
    assert "Traceback" not in log
    assert load(only_run(tmp_path))["global_step"] in reached(script, 2000)


@pytest.mark.parametrize("script", DISTINCT, indirect=True)
def test_stuck_worker_is_replaced(start, tmp_path):
    r = start("--step-timeout", "2")
    r.wait_for_output(" steps/s")
    victim = workers(r.pid)[0]
    os.kill(victim, signal.SIGSTOP)
    r.wait_for_output("did not answer in time")
    assert re.search(
        rf"(worker 0 \(games 0 to 1, |actor-learner [01] \()pid {victim}\) did not",
        r.log.read_text(),
    )
    points = r.log.read_text().count(" steps/s")
    wait_for(lambda: r.log.read_text().count(" steps/s") > points)  # training goes on
    os.kill(r.pid, signal.SIGINT)
    assert r.wait() == 128 + signal.SIGINT
    assert load(only_run(tmp_path))["global_step"] > 0
    assert victim not in parents()


@pytest.mark.parametrize("script", DISTINCT, indirect=True)
def test_gives_up_when_workers_keep_dying(start, tmp_path):
    r = start("--checkpoint-interval", "100", "--step-timeout", "20")
    wait_for(lambda: any(map(checkpoint_file, tmp_path.glob("runs/*"))))
    deadline = time.monotonic() + 90
    while r.process.poll() is None and time.monotonic() < deadline:
        for pid in workers(r.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.02)
    assert r.wait() == 1
    assert "three times" in r.log.read_text() and "--resume" in r.log.read_text()
    assert "Traceback (most recent call last)" not in r.log.read_text()
    assert load(only_run(tmp_path))["global_step"] >= 100


def test_not_a_number_stops_before_it_spreads(script, tmp_path):
    assert run(command(script, *small(script), "--total-timesteps", 100), tmp_path).returncode == 0
    run_dir = only_run(tmp_path)
    before = checkpoint_file(run_dir).read_bytes()
    result = run(
        command(script, "--resume", run_dir, "--total-timesteps", 1000, "--learning-rate", "1e30"),
        tmp_path,
    )
    assert result.returncode == 1
    assert (
        "nan" in result.stderr and "step 1" in result.stderr and "--learning-rate" in result.stderr
    )
    assert "Traceback" not in result.stderr
    assert checkpoint_file(run_dir).read_bytes() == before


@pytest.mark.parametrize("script", DISTINCT, indirect=True)
def test_full_disk_is_a_warning(script, tmp_path):
    assert run(command(script, *small(script), "--total-timesteps", 100), tmp_path).returncode == 0
    run_dir = only_run(tmp_path)
    before = checkpoint_file(run_dir).read_bytes()

    # no file may grow beyond 4 MB; a checkpoint has more, what the processes share has less
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))

    args = ["--resume", run_dir, "--total-timesteps", 300, "--checkpoint-interval", 100]
    result = run(command(script, *args), tmp_path, preexec_fn=limit)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("warning: ") in warnings(script, 2)
    assert "File too large" in result.stderr and "Traceback" not in result.stderr
    assert any(f"step {step} of" in result.stdout for step in reached(script, 300))
    assert checkpoint_file(run_dir).read_bytes() == before


@pytest.mark.parametrize("script", DISTINCT, indirect=True)
def test_unwritable_folder_is_a_warning(script, tmp_path):
    (tmp_path / "runs").write_text("not a folder")
    result = run(command(script, *small(script), "--total-timesteps", 80), tmp_path)
    assert result.returncode == 0, result.stderr
    assert (
        result.stderr.count("warning: ") in warnings(script, 3) and "Traceback" not in result.stderr
    ), result.stderr
    assert any(f"step {step} of" in result.stdout for step in reached(script, 80))


@pytest.mark.parametrize("script", DISTINCT, indirect=True)
def test_warning_that_cannot_be_written_either(script, tmp_path):
    """The log lies on the full disk, too."""
    (tmp_path / "runs").write_text("not a folder")
    with open("/dev/full", "w") as full:
        result = run(
            command(script, *small(script), "--total-timesteps", 80), tmp_path, stderr=full
        )
    assert any(f"step {step} of" in result.stdout for step in reached(script, 80)), result.stdout


@pytest.mark.parametrize("script", DISTINCT, indirect=True)
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


# --------------------------------------------------------------------------------------------------
# learning, and being copied


def test_learns_a_small_image_game(script, tmp_path):
    """Catch at 84 x 84: random play scores -0.7, the optimum is 1, with 2 % random actions about
    0.97. A3C's entropy bonus keeps it at 0.88 to 0.94 (five seeds); with a tenth of it a run can
    settle on half of the balls for good."""
    greedy = ["--exploration-steps", 20_000, "--final-epsilons", 0.02, "--target-interval", 1000]
    is_a3c = script.__name__ == "a3c_atari"
    flags = ["--num-envs", 4] if is_a3c else ["--no-anneal-lr"]
    flags += ["--total-timesteps", 80_000, *(greedy if script.__name__ in Q_SCRIPTS else [])]
    result = run(
        [sys.executable, ROOT / "tests" / "games.py", script.__name__, *flags],
        tmp_path,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    scores = scalars(only_run(tmp_path))["charts/episodic_return"]
    assert scores[0][1] < -0.5
    assert np.mean([score for _, score in scores[-2:]]) > (0.8 if is_a3c else 0.9), result.stdout


def test_runs_copied_alone_into_an_empty_folder(script, tmp_path):
    """With both networks, both optimisers and bfloat16, where it has them."""
    shutil.copy(ROOT / f"{script.__name__}.py", tmp_path)
    alone = [sys.executable, f"{script.__name__}.py", *small(script), "--total-timesteps", 200]
    assert run(alone, tmp_path).returncode == 0
    other = ["--arch", "nature", "--init", "uniform"]
    other += ["--optimizer", "rmsprop", "--bf16"] if hasattr(script.Args, "bf16") else []
    assert run([*alone, *other], tmp_path).returncode == 0
    assert len([*filter(checkpoint_file, tmp_path.glob("runs/*"))]) == 2


@pytest.mark.parametrize("script", [*DISTINCT, "nstep_q_atari"], indirect=True)
def test_evaluate_and_plot(script, tmp_path):
    args = [*small(script), "--env-id", "BreakoutNoFrameskip-v4", "--total-timesteps", 3000]
    assert run(command(script, *args), tmp_path).returncode == 0
    run_dir = only_run(tmp_path)
    evaluate = [
        sys.executable,
        ROOT / "utils" / "evaluate.py",
        run_dir,
        "--episodes",
        4,
        "--num-envs",
        2,
    ]
    evaluate += ["--export", checkpoint_file(run_dir).name]
    result = run(
        [*evaluate, "--json", "scores.json", "--video", "video.mp4", "--video-seconds", 3],
        tmp_path,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert len(scores["scores"]) == scores["episodes"] == 4
    assert scores["mean"] == pytest.approx(np.mean(scores["scores"]))
    assert scores["standard_error"] == pytest.approx(np.std(scores["scores"], ddof=1) / 2)
    assert scores["human_normalised_percent"] == pytest.approx(
        100 * (scores["mean"] - 1.7) / (30.5 - 1.7)
    )
    assert all(length > 80 for length in scores["lengths"])  # whole games of five lives
    assert load(tmp_path).keys() == {"script", "args", "global_step", "agent"}
    assert (tmp_path / "video.mp4").stat().st_size > 10_000
    result = run(
        [sys.executable, ROOT / "utils" / "plot.py", run_dir, "--csv", "curve.csv"], tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    curve = (tmp_path / "curve.csv").read_text()
    assert curve.startswith("env_id,label,seed,steps") and curve.count("\n") > 2
    result = run(
        [sys.executable, ROOT / "utils" / "plot.py", "curve.csv", "--csv", "again.csv"], tmp_path
    )
    assert result.returncode == 0 and (tmp_path / "again.csv").read_text() == curve
    header, paper, end = (
        curve.split("\n")[0] + "\n",
        "BreakoutNoFrameskip-v4,paper,,",
        float(curve.split(",")[-2]),
    )
    (tmp_path / "paper.csv").write_text(
        f"{header}{paper}1000,1\n{paper}10000,2.5\nPongNoFrameskip-v4,paper,,0,1\n"
    )
    result = run(
        [sys.executable, ROOT / "utils" / "plot.py", "paper.csv", run_dir, "--csv", "both.csv"],
        tmp_path,
    )
    # as far as the run goes
    both = f"{curve}{paper}1000,1\n{paper}{end:g},{1 + 1.5 * (end - 1000) / 9000:.4g}\n"
    assert result.returncode == 0 and (tmp_path / "both.csv").read_text() == both
