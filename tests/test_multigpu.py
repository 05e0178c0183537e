"""Several ranks compute what one does, resume exactly, stop together, and go on by themselves after
one was killed."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, command, run, scalars, small
from test_runs import assert_same, descendants, load, parents, wait_for

import paac_atari
import paac_atari_multigpu

FLAGS = small(paac_atari)[:-2]  # 4 games; workers: one per core and rank


def torchrun(ranks, *args, script=ROOT / "paac_atari_multigpu.py"):
    """The command line of torchrun; the first arguments are its own, the others come after "--"."""
    own, flags = args[: args.index("--")], args[args.index("--") + 1 :]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return list(map(str, [*launcher, ranks, *own, script, *FLAGS, *flags]))


def the_run(folder, name):
    (run_dir,) = folder.glob(f"runs/*__{name}__*")
    return run_dir


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    """After 50 updates: one rank is paac_atari.py bit for bit, two differ by rounding alone; the
    games are the same."""
    # With the default epsilon Adam makes whole steps of gradients that are rounding alone.
    flags = ["--optimizer-epsilon", "0.001", "--total-timesteps", "1000", "--exp-name"]
    assert run(command(paac_atari, *FLAGS, *flags, "paac"), tmp_path).returncode == 0
    for ranks in (1, 2):
        result = run(torchrun(ranks, "--", *flags, f"ranks-{ranks}"), tmp_path)
        assert result.returncode == 0, result.stderr
    paac, one, two = (load(the_run(tmp_path, name)) for name in ("paac", "ranks-1", "ranks-2"))
    assert one["global_step"] == two["global_step"] == 1000
    for part in ("agent", "optimizer", "rng", "env_states"):
        assert_same(paac[part], one[part], part)
    assert_same(one["env_states"], two["env_states"])
    assert_same(one["rng"], two["rng"])
    for name, p in one["agent"].items():
        torch.testing.assert_close(two["agent"][name], p, rtol=1e-4, atol=1e-5, msg=name)
    curves, curves_of_two = (scalars(the_run(tmp_path, name)) for name in ("ranks-1", "ranks-2"))
    for tag in (
        "losses/policy_loss",
        "losses/value_loss",
        "losses/entropy",
        "losses/grad_norm",
        "charts/learning_rate",
    ):
        assert len(curves[tag]) > 10
        torch.testing.assert_close(
            torch.tensor(curves_of_two[tag]),
            torch.tensor(curves[tag]),
            rtol=1e-3,
            atol=1e-5,
            msg=tag,
        )


@pytest.mark.slow
def test_resume_is_exact(tmp_path):
    """A signal-free stop at a checkpoint: 20 updates equal 10 and, resumed, 10 more, bit for
    bit."""
    flags = ["--no-anneal-lr", "--checkpoint-interval", "200"]
    assert (
        run(
            torchrun(2, "--", *flags, "--total-timesteps", 400, "--exp-name", "whole"), tmp_path
        ).returncode
        == 0
    )
    assert (
        run(
            torchrun(2, "--", *flags, "--total-timesteps", 200, "--exp-name", "half"), tmp_path
        ).returncode
        == 0
    )
    resumed = the_run(tmp_path, "half")
    assert (
        run(torchrun(2, "--", "--resume", resumed, "--total-timesteps", 400), tmp_path).returncode
        == 0
    )
    one, two = load(the_run(tmp_path, "whole")), load(resumed)
    assert one["global_step"] == two["global_step"] == 400
    for part in ("agent", "optimizer", "rng", "env_states", "recent_scores"):
        assert_same(one[part], two[part], part)


@pytest.fixture
def start(tmp_path):
    """start(*torchrun's arguments, "--", *the script's) -> Popen, log file"""
    processes = []

    def start(*args):
        log = tmp_path / "log.txt"
        with open(log, "w") as file:
            options = {
                "cwd": tmp_path,
                "stdout": file,
                "stderr": subprocess.STDOUT,
                "start_new_session": True,
            }
            processes.append(subprocess.Popen(torchrun(2, *args), **options))
        return processes[-1], log

    yield start
    for process in processes:
        for pid in [process.pid, *descendants(process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def ranks(process):
    return sorted(pid for pid, parent in parents().items() if parent == process.pid)


@pytest.mark.slow
def test_signal_to_one_rank_stops_all_with_a_checkpoint(start, tmp_path):
    process, log = start("--")
    wait_for(lambda: " steps/s" in log.read_text())
    family = descendants(process.pid)
    os.kill(ranks(process)[1], signal.SIGUSR1)
    process.wait(60)
    assert "stopped at step" in log.read_text()
    assert load(next(tmp_path.glob("runs/*")))["global_step"] > 0
    wait_for(lambda: not family & parents().keys(), 10)


@pytest.mark.slow
def test_killed_torchrun_stops_all_ranks_with_a_checkpoint(start, tmp_path):
    process, log = start("--")
    wait_for(lambda: " steps/s" in log.read_text())
    family = descendants(process.pid)
    process.kill()
    wait_for(lambda: not family & parents().keys(), 60)
    assert "SIGTERM: stopped at step" in log.read_text()
    assert load(next(tmp_path.glob("runs/*")))["global_step"] > 0


@pytest.mark.slow
def test_killed_rank_restarts_the_job_from_the_checkpoint(start, tmp_path):
    process, log = start(
        "--max-restarts",
        "1",
        "--",
        "--resume",
        "auto",
        "--checkpoint-interval",
        "200",
        "--total-timesteps",
        "3000",
    )
    wait_for(lambda: "step 400 of" in log.read_text())
    victim = ranks(process)[0]
    os.kill(victim, signal.SIGKILL)
    assert process.wait(300) == 0, log.read_text()  # torchrun may give the other rank half a minute
    (run_dir,) = tmp_path.glob("runs/*")
    assert load(run_dir)["global_step"] == 3000
    steps = [step for step, _ in scalars(run_dir)["charts/learning_rate"]]
    assert steps == sorted(set(steps)) and steps[-1] == 3000  # one curve
    assert log.read_text().count("games on 2 ranks") == 2
    assert victim not in parents()


@pytest.mark.slow
def test_ranks_with_different_checkpoints_do_not_start(tmp_path):
    """Two machines whose runs/ are not the same folder: one finds the checkpoint to resume, the
    other starts anew."""
    flags = ["--num-workers", "1", "--resume", "auto", "--total-timesteps", "40"]
    main = tmp_path / "main.py"
    main.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
os.makedirs(os.environ["RANK"], exist_ok=True)
os.chdir(os.environ["RANK"])
import paac_atari_multigpu as script
if __name__ == "__main__":
    script.train(script.parse_args(), script.make_env)
""")
    assert run(torchrun(1, "--", *flags, script=main), tmp_path).returncode == 0
    (path,) = tmp_path.glob("0/runs/*/checkpoint.pt")
    torch.save(torch.load(path, weights_only=True) | {"global_step": 20}, path)  # not yet finished
    result = run(torchrun(2, "--", *flags, script=main), tmp_path)
    assert result.returncode != 0 and "the ranks start at different steps" in result.stderr, (
        result.stderr
    )


@pytest.mark.slow
def test_ranks_with_and_without_a_gpu_do_not_start(tmp_path):
    """They would wait for each other for ever. Rank 0 takes a CPU for a GPU here."""
    main = tmp_path / "main.py"
    main.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import paac_atari_multigpu as script
if os.environ["RANK"] == "0":
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = lambda device: None
    init_process_group = script.dist.init_process_group
    script.dist.init_process_group = lambda backend, **kwargs: init_process_group("gloo", **kwargs)
if __name__ == "__main__":
    script.train(script.parse_args(), script.make_env)
""")
    result = run(torchrun(2, "--", script=main), tmp_path)
    assert result.returncode != 0 and "some ranks have a GPU" in result.stderr, result.stderr


def test_without_torchrun_one_line_says_how(tmp_path):
    result = run(command(paac_atari_multigpu, *FLAGS), tmp_path)
    assert (
        result.returncode == 2
        and result.stderr.count("\n") == 1
        and "torchrun --standalone" in result.stderr
    ), result.stderr


@pytest.mark.slow
def test_games_must_fit_the_ranks(tmp_path):
    result = run(torchrun(2, "--", "--num-envs", "5"), tmp_path)
    assert "--num-envs 5 is not a multiple of 2 ranks" in result.stderr
