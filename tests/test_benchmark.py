"""utils/benchmark.py trains what it was asked for, swallows no failure, goes on where it was, and
writes what the curves say."""

import csv
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import ROOT, run, scalars, tool
from test_runs import descendants, load, parents, wait_for
from torch.utils.tensorboard import SummaryWriter

BENCHMARK = tool("benchmark")
PLAN = """# one that works and one that fails
paac_atari.py --env-id BreakoutNoFrameskip-v4 --log-interval 500 --total-timesteps 10400
paac_atari.py --env-id BreakoutNoFrameskip-v4 --exp-name broken --learning-rate 1e12
"""


@pytest.mark.slow
def test_failures_are_reported_and_results_kept(tmp_path):
    (tmp_path / "runs.txt").write_text(PLAN)
    command = [
        *BENCHMARK,
        "--runs",
        "runs.txt",
        "--flags=--num-envs 16",
        "--window",
        "2000",
        "--retries",
        "1",
    ]
    result = run(command, tmp_path)
    assert result.returncode == 1
    assert "1 of 2 runs" in result.stderr and "--learning-rate may help" in result.stderr, (
        result.stderr
    )
    assert result.stdout.count("start: ") == 2 and result.stdout.count("again: ") == 1
    (run_dir,) = tmp_path.glob("runs/*__paac_atari__*")
    assert load(run_dir)["args"]["num_envs"] == 16
    curve = [value for step, value in scalars(run_dir)["charts/episodic_return"] if step > 8400]
    with open(tmp_path / "benchmark.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["score"]) == pytest.approx(np.mean(curve), rel=1e-6) and row["seeds"] == "1"
    published = (
        "random",
        "human",
        "A2C, 10M",
        "A2C (SB2 zoo), 10M",
        "A2C (SB3 zoo), 10M",
        "PAAC nips, 115M",
    )
    assert [row[column] for column in published] == [
        "1.7",
        "30.5",
        "303.0",
        "384.9",
        "279.8",
        "470.1",
    ]
    assert (
        "| BreakoutNoFrameskip-v4 | paac_atari | 10,400 | 1 |"
        in (tmp_path / "benchmark.md").read_text()
    )
    assert all(
        (tmp_path / f"benchmark_{x}.png").stat().st_size > 10_000 for x in ("steps", "hours")
    )
    with open(tmp_path / "benchmark_steps.csv", newline="") as file:
        env_ids, labels = zip(*((row["env_id"], row["label"]) for row in csv.DictReader(file)))
    assert {*env_ids} == {"BreakoutNoFrameskip-v4"} and {*labels} >= {
        "paac_atari",
        "paper, 32 games",
    }
    checkpoint = (run_dir / "checkpoint.pt").read_bytes()
    assert run([*command[:-1], "0"], tmp_path).returncode == 1  # again: nothing is trained twice
    assert (run_dir / "checkpoint.pt").read_bytes() == checkpoint


@pytest.mark.slow
def test_a_signal_stops_all_runs_with_checkpoints(tmp_path):
    command = [*BENCHMARK, "--games", "Pong", "--seeds", "1", "2", "3", "--parallel", "2"]
    command += ["--flags=--num-envs 4 --log-interval 100"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for(
        lambda: (
            len([log for log in tmp_path.glob("benchmark/*.log") if " steps/s" in log.read_text()])
            == 2
        )
    )
    family = descendants(process.pid)
    os.kill(process.pid, signal.SIGINT)
    assert (
        "3 of 3 runs are not finished; the same command resumes them"
        in process.communicate(timeout=60)[1]
    )
    assert process.returncode == 1
    wait_for(lambda: not family & parents().keys(), 10)  # the runs' fork servers end after them
    run_dirs = list(tmp_path.glob("runs/*"))
    assert len(run_dirs) == 2 and all(load(run_dir)["global_step"] > 0 for run_dir in run_dirs)


def test_a_run_that_fails_while_it_stops_says_why(tmp_path, monkeypatch):
    """Its time is over, and the disk is full: not tried again, but its last words are kept."""
    import benchmark

    (run,) = benchmark.plan(benchmark.Args())
    process = subprocess.Popen
    fails = "trap 'echo no space left; exit 1' INT; while :; do sleep 0.1; done"
    monkeypatch.setattr(
        subprocess, "Popen", lambda _, **options: process(["bash", "-c", fails], **options)
    )
    benchmark.train(run, benchmark.Args(hours=0.0, out=str(tmp_path)), threading.Event())
    assert run.error == "exit code 1: no space left"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_killed_benchmark_leaves_no_orphans(tmp_path):
    """Its runs write a checkpoint and stop; the same command resumes them."""
    command = [*BENCHMARK, "--games", "Pong", "--steps", "1e6"]
    command += ["--flags=--num-envs 4 --num-workers 2 --log-interval 100"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    logs = tmp_path / "benchmark"
    wait_for(lambda: any(" steps/s" in log.read_text() for log in logs.glob("*.log")))
    family = descendants(process.pid)
    process.kill()
    process.wait()
    wait_for(lambda: not family & parents().keys(), 30)
    (log,) = logs.glob("*.log")
    assert "SIGTERM: stopped at step" in log.read_text()
    (run_dir,) = tmp_path.glob("runs/*")
    assert load(run_dir)["global_step"] > 0


@pytest.mark.slow
def test_hours_end_a_run_and_cores_are_shared_out(tmp_path):
    command = [*BENCHMARK, "--scripts", "paac", "--games", "CartPole-v1", "--hours", "0.007"]
    command += ["--parallel", len(os.sched_getaffinity(0))]
    flags = "--flags=--num-envs 4 --log-interval 1000 --total-timesteps 100000000"
    result = run([*command, flags], tmp_path)
    assert result.returncode == 0 and "done: " in result.stdout, result.stderr
    (log,) = tmp_path.glob("benchmark/*.log")
    assert " 4 games on 1 workers" in log.read_text() and "SIGINT: stopped" in log.read_text()
    with open(tmp_path / "benchmark.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    steps, hours, speed = (float(row[column]) for column in ("steps", "hours", "steps/s"))
    assert 0 < hours < 0.007 and steps / hours / 3600 == pytest.approx(speed)


@pytest.mark.slow
def test_steps_end_each_run_once(tmp_path):
    command, flags = (
        [*BENCHMARK, "--games", "Breakout", "--steps", "2000"],
        "--flags=--num-envs 4 --log-interval 100",
    )
    other, tables = f"{flags} --learning-rate 0.001", []
    # Each is trained once, whatever came between
    for setting, runs in ((flags, 1), (other, 2), (flags, 2)):
        result = run([*command, setting], tmp_path)
        assert result.returncode == 0, result.stderr
        assert len([*tmp_path.glob("runs/*")]) == runs
        (log,) = tmp_path.glob("benchmark/*.log")
        assert log.read_text().count("SIGINT: stopped") == runs
        tables.append((tmp_path / "benchmark.csv").read_text())
    assert tables[0] == tables[2] != tables[1] and ",2000.0," in tables[0]
    assert all(2000 <= load(run_dir)["global_step"] < 10_000 for run_dir in tmp_path.glob("runs/*"))


def test_a_run_ends_with_its_last_step_not_its_last_score(tmp_path):
    """Where all games are long, the last of them end long before the run does."""
    import benchmark

    with SummaryWriter(tmp_path / "run") as writer:
        for step in range(10_000, 510_000, 10_000):
            writer.add_scalar("charts/SPS", 1000.0, step)
            if step % 130_000 == 0:
                writer.add_scalar("charts/episodic_return", step / 10_000, step)
    run = benchmark.Run("paac_atari", [], None, str(tmp_path / "run"))
    for budget in (None, 500_000):
        steps, hours, score = benchmark.measure(run, budget, window=200_000)
        assert (steps, score) == (500_000, 39) and hours == pytest.approx(500 / 3600)
    assert benchmark.measure(run, 600_000, window=200_000) is None


def test_plan_names_its_mistakes(tmp_path):
    result = run([*BENCHMARK, "--games", "Breakou"], tmp_path)
    assert result.returncode == 2 and "closest: BreakoutNoFrameskip-v4" in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"runs": "nowhere.txt"}, "--runs nowhere.txt: "),
        ({"runs": "empty.txt"}, "no runs"),
        ({"games": []}, "no runs"),
        ({"scripts": ["no_such"]}, "there is no script no_such.py"),
        ({"flags": "--exp-name 'x"}, "No closing quotation"),
        ({"flags": "--resume auto"}, "without --resume"),
        ({"seeds": [1, 1]}, "two runs have the same game"),
    ],
)
def test_plan_refuses_at_once(tmp_path, monkeypatch, flags, words):
    import benchmark

    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(SystemExit) as stopped:
        benchmark.plan(benchmark.Args(**flags))
    assert words in stopped.value.code and "\n" not in stopped.value.code


@pytest.mark.parametrize("game", ["Pong", "PongNoFrameskip-v4", "ALE/Pong-v5"])
def test_plan_takes_names_and_ids(game):
    """In a process of its own: in this one, another test may have made the ids known already."""
    code = f"import sys; sys.path.append({str(ROOT)!r}); import benchmark; "
    code += f"(run,) = benchmark.plan(benchmark.Args(games=[{game!r}])); print(run.args.env_id)"
    result = run([sys.executable, "-c", code], ROOT / "utils")
    assert result.stdout.strip() == (game if "-v" in game else f"{game}NoFrameskip-v4")


def test_plan_takes_scripts_with_and_without_py():
    import benchmark

    (run,) = benchmark.plan(benchmark.Args(scripts=["paac_atari.py"], num_envs=[16]))
    assert (run.script, run.args.num_envs) == ("paac_atari", 16)
    assert run.name == "PongNoFrameskip-v4__paac_atari-16__1"
