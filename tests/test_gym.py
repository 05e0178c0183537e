"""paac.py and the workers with games of gymnasium: they need nothing but gymnasium's own API."""

import json
import re
import shutil
import sys

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT, command, only_run, run, scalars, tool
from test_runs import load

import paac

OWN_GAME = """
import gymnasium as gym
import numpy as np


class Own(gym.Env):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Discrete(2)
    error = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.array([-1e6, 0.5, 300.0]), {}

    def step(self, action):
        self.steps += 1
        if self.steps == 100 and self.error:
            raise self.error
        return np.array([-1e6, 0.5, 300.0]), 1.0, False, self.steps == 150, {}


class Unpicklable(Exception):
    def __init__(self):
        super().__init__(lambda: "100 % of this cannot be sent through a pipe")


def register(name, error):
    gym.register(name, type(name, (Own,), {"error": error}))


register("Own-v0", None)
register("OwnValueError-v0", ValueError("it is 100 % broken"))
register("OwnOSError-v0", OSError("a file is missing"))
register("OwnUnpicklable-v0", Unpicklable())
"""


@pytest.fixture
def own_game(tmp_path):
    """A folder with a copy of paac.py and a module that registers games; nothing else."""
    shutil.copy(ROOT / "paac.py", tmp_path)
    (tmp_path / "own_game.py").write_text(OWN_GAME)
    return tmp_path


def alone(folder, *args):
    return run([sys.executable, "paac.py", *args], folder)


def test_learns_to_balance_for_a_while(tmp_path, monkeypatch):
    """A random player holds the pole for 22 steps; some seconds of training teach to hold it
    for longer."""
    monkeypatch.chdir(tmp_path)
    paac.train(paac.parse_args(["--total-timesteps", "60_000"]), paac.make_env)
    scores = [score for _, score in scalars(only_run(tmp_path))["charts/episodic_return"]]
    assert scores[0] < 30 and max(scores) > 60


@pytest.mark.slow
def test_learns_cartpole(tmp_path):
    """500 is the most. With the default setting, the last 100 games of four of four seeds came to
    478 to 495 on average."""
    result = run(command(paac, "--total-timesteps", 500_000), tmp_path, timeout=600)
    assert result.returncode == 0, result.stderr
    scores = [score for _, score in scalars(only_run(tmp_path))["charts/episodic_return"]]
    assert scores[0] < 60 and max(scores) > 470, result.stdout


def test_own_game_runs_and_resumes(own_game):
    """Copied alone, with an id that names the module; the games start anew, which is said."""
    size = ["--num-envs", "4", "--num-workers", "2", "--log-interval", "1000"]
    flags = [*size, "--env-id", "own_game:Own-v0", "--total-timesteps", "2000"]
    result = alone(own_game, *flags)
    assert result.returncode == 0, result.stderr
    run_dir = only_run(own_game)
    checkpoint = load(run_dir)
    assert checkpoint["global_step"] == 2000 and checkpoint["env_states"] == []
    result = alone(own_game, "--resume", run_dir, "--total-timesteps", "3000", "--num-workers", 0)
    assert result.returncode == 0, result.stderr
    assert "no states of the games in it: they start anew" in result.stdout
    assert load(run_dir)["global_step"] == 3000
    curve = scalars(run_dir)
    assert curve["charts/episodic_return"][0][1] == curve["charts/episodic_length"][0][1] == 150
    # There is no published score of it, and gymnasium knows it without the module's name alone.
    evaluate = tool("evaluate", run_dir, "--episodes", 2, "--num-workers", 0)
    evaluate += ["--script", own_game / "paac.py"]
    result = run(evaluate, own_game)
    assert result.returncode == 0, result.stderr
    assert "2 games, sampled actions: score 150.00" in result.stdout


ERRORS = {
    "OwnValueError-v0": "ValueError: it is 100 % broken",
    "OwnOSError-v0": "OSError: a file is missing",
    "OwnUnpicklable-v0": "Unpicklable",
}


@pytest.mark.parametrize(
    "num_workers, name",
    [
        (0, "OwnOSError-v0"),
        (2, "OwnUnpicklable-v0"),
        pytest.param(2, "OwnOSError-v0", marks=pytest.mark.slow),
        pytest.param(0, "OwnUnpicklable-v0", marks=pytest.mark.slow),
        pytest.param(0, "OwnValueError-v0", marks=pytest.mark.slow),
        pytest.param(2, "OwnValueError-v0", marks=pytest.mark.slow),
    ],
)
def test_error_of_a_game_ends_the_run_with_its_traceback(own_game, num_workers, name):
    """It is not taken for a lost worker."""
    flags = ["--env-id", f"own_game:{name}", "--num-envs", "4", "--num-workers", num_workers]
    result = alone(own_game, *flags, "--log-interval", "20")
    assert result.returncode == 1
    assert ERRORS[name] in result.stderr and "raise self.error" in result.stderr, result.stderr
    assert "games restart" not in result.stderr
    steps = [int(step) for step in re.findall(r"^step (\d+) of", result.stdout, re.MULTILINE)]
    assert max(steps) == 380  # 19 updates of 5 steps in 4 games; the 100th step is in the 20th


@pytest.mark.parametrize(
    "env_id, words",
    [
        ("CartPol-v1", "CartPole"),
        ("no_such_module:Own-v0", "no_such_module"),
        ("Pendulum-v1", "not Discrete"),
        ("FrozenLake-v1", "not a flat Box"),
    ],
)
def test_games_that_do_not_fit_get_one_line(capsys, env_id, words):
    with pytest.raises(SystemExit, match="2"):
        paac.parse_args(["--env-id", env_id])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and env_id in error and words in error, error


def test_a_wrapper_may_make_a_game_fit(monkeypatch):
    """What make_env() returns counts, not the game below the wrappers."""

    def make_env(args, **options):
        return gym.wrappers.FlattenObservation(gym.make(args.env_id, **options))

    monkeypatch.setattr(paac, "make_env", make_env)
    assert paac.parse_args(["--env-id", "FrozenLake-v1"]).env_id == "FrozenLake-v1"


@pytest.mark.slow
def test_evaluate_and_plot(tmp_path):
    flags = ["--num-envs", "4", "--num-workers", "2", "--log-interval", "500"]
    assert run(command(paac, *flags, "--total-timesteps", 2000), tmp_path).returncode == 0
    run_dir = only_run(tmp_path)
    evaluate = tool("evaluate", run_dir, "--episodes", 4, "--num-envs", 2, "--json", "scores.json")
    result = run(evaluate, tmp_path)
    assert result.returncode == 0, result.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["scores"] == scores["lengths"] and np.mean(scores["scores"]) == scores["mean"]
    result = run(tool("plot", run_dir), tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "curves.png").stat().st_size > 10_000
