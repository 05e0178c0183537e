"""The changes in docs/forking.md: each applies to its script as it is, trains, and is as long as it
is said to be."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, only_run, run
from test_runs import load

DOC = (ROOT / "docs" / "forking.md").read_text()
FORKS = re.findall(r"```diff (\S+) (\S+)\n(.*?)```", DOC, re.DOTALL)  # script, name, lines
TITLES = {
    "own": "your own environment",
    "images": "images of your own",
    "impala": "a residual network",
    "ppo": "PPO",
    "lstm": "an LSTM",
    "continuous": "continuous actions",
}
MOST_CHANGED_LINES = {"ppo": 59, "lstm": 59}  # of the others 61, as the README says


def test_all_are_here():
    assert [name for _, name, _ in FORKS] == list(TITLES)


EACH_FORK = pytest.mark.parametrize("script, name, diff", FORKS, ids=[name for _, name, _ in FORKS])


def apply(folder, script, name, diff):
    """The script with the change, in a file of its own."""
    fork = folder / f"{name}.py"
    fork.write_text((ROOT / script).read_text())
    patch = ["patch", "--fuzz=0", fork.name]
    patched = subprocess.run(patch, cwd=folder, input=diff, capture_output=True, text=True)
    assert patched.returncode == 0, patched.stdout + patched.stderr
    return fork


@EACH_FORK
def test_fork_applies_and_is_as_short_as_it_is_said_to_be(tmp_path, script, name, diff):
    changed = sum(line[0] in "+-" for line in diff.splitlines())
    assert re.search(rf"\| \[{TITLES[name]}\]\(#\S+\) \| `{script}` \| {changed} \|", DOC)
    assert changed <= MOST_CHANGED_LINES.get(name, 61)
    compile(apply(tmp_path, script, name, diff).read_text(), name, "exec")


@pytest.mark.slow
@EACH_FORK
def test_fork_trains_and_resumes(tmp_path, script, name, diff):
    fork = apply(tmp_path, script, name, diff)
    flags = ["--num-envs", 4, "--num-workers", 2, "--log-interval", 100, "--total-timesteps", 400]
    result = run([sys.executable, fork, *flags], tmp_path)
    assert result.returncode == 0, result.stderr
    run_dir = only_run(tmp_path)
    result = run([sys.executable, fork, "--resume", run_dir, "--total-timesteps", 600], tmp_path)
    assert result.returncode == 0, result.stderr
    assert load(run_dir)["global_step"] == 600
