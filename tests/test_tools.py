"""utils/evaluate.py and utils/plot.py: what they compute, and what they do with what they are not
made for."""

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import evaluate
import numpy as np
import outputs
import plot
import pytest
import torch
from conftest import ROOT, each, only_run, run, tool, train
from test_runs import checkpoint_file, in_an_empty_folder, load  # noqa: F401
from torch.utils.tensorboard import SummaryWriter

import paac_atari


def fails(function, *args):
    """The one line with which it ends."""
    with pytest.raises(SystemExit) as stopped:
        function(*args)
    assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code
    return stopped.value.code


# evaluate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script", each(["paac_atari", "nstep_q_atari", "paac_atari_jax", "a3c_atari"]), indirect=True
)
def test_evaluate(script, tmp_path):
    train(script, "--env-id", "BreakoutNoFrameskip-v4", "--total-timesteps", 40)
    run_dir = only_run(tmp_path)
    exported = f"exported/{checkpoint_file(run_dir).name}"
    args = evaluate.Args(str(run_dir), episodes=5, num_envs=4, json="a/scores.json")
    args = replace(args, export=exported, video="b/video.mp4", video_seconds=3)
    evaluate.check(args)
    evaluate.evaluate(args)
    scores = json.loads(Path("a/scores.json").read_text())
    assert len(scores["scores"]) == len(scores["lengths"]) == scores["episodes"] == 5
    assert scores["mean"] == pytest.approx(np.mean(scores["scores"]))
    error = np.std(scores["scores"], ddof=1) / 5**0.5
    assert scores["standard_error"] == pytest.approx(error)
    human = 100 * (scores["mean"] - 1.7) / (30.5 - 1.7)
    assert scores["human_normalised_percent"] == pytest.approx(human)
    assert all(length > 80 for length in scores["lengths"])  # whole games of five lives
    weights = load(tmp_path / "exported")
    assert weights.keys() == {"script", "args", "global_step", "agent"}
    if exported.endswith(".pt"):
        assert {p.dtype for p in weights["agent"].values()} == {torch.bfloat16}
    assert Path("b/video.mp4").stat().st_size > 10_000
    assert evaluate.evaluate(evaluate.Args(exported, episodes=1))["episodes"] == 1


def test_episodes_are_shared_out_beforehand():
    """Games of 3, 4, 5 and 6 steps in four slots, and 7 games: the first three slots play two each,
    however early another one ends."""
    from games import Scripted

    Scripted.created = 0
    args = paac_atari.Args(num_envs=4, num_workers=0)
    envs = paac_atari.WorkerPool(args, Scripted)
    games_per_slot = [2, 2, 2, 1]
    scores, lengths = evaluate.play(envs, lambda obs: np.ones(4, int), 1, games_per_slot)
    assert lengths == (3, 3, 4, 4, 5, 5, 6)
    assert scores == tuple(3 * length for length in lengths)


@pytest.mark.parametrize("life_loss", [True, False])
def test_plays_whole_games_of_the_environment_of_the_training(tmp_path, monkeypatch, life_loss):
    """Lost lives cut their steps short, and so shift all later frames, if they did so in training.
    Either way the score is that of all lives."""
    args = paac_atari.Args(num_envs=1, num_workers=0, terminal_on_life_loss=life_loss)
    game = paac_atari.make_env(args)
    agent = paac_atari.Agent(game.action_space.n, args)
    checkpoint = {"script": "paac_atari", "args": asdict(args), "global_step": 0}
    torch.save(checkpoint | {"agent": agent.state_dict()}, tmp_path / "checkpoint.pt")
    shown = []

    def make_act(*_):
        actions = np.random.default_rng(0)

        def act(obs):
            shown.append(obs[0])
            return actions.integers(game.action_space.n, size=1)

        return act

    monkeypatch.setattr(evaluate, "make_act", make_act)
    result = evaluate.evaluate(evaluate.Args(str(tmp_path), episodes=1, num_workers=0, seed=3))

    seed = int(np.random.SeedSequence([3, 0]).generate_state(1, np.uint64)[0])
    actions = np.random.default_rng(0)
    obs, _ = game.reset(seed=seed)
    score, num_terminated, is_over = 0.0, 0, False
    for seen in shown:
        assert not is_over
        np.testing.assert_array_equal(seen, obs)
        obs, reward, terminated, _, info = game.step(actions.integers(game.action_space.n))
        score += reward
        is_over = info["game_over"]
        num_terminated += terminated
    assert is_over
    assert num_terminated == (5 if life_loss else 1)  # 1: the end of the game
    assert result["scores"] == [score] and result["lengths"] == [len(shown)]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "half"])
@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint.msgpack"])
def test_damaged_checkpoint_gets_one_line(tmp_path, name, content):
    if content == "half":
        paac_atari.save_checkpoint(tmp_path, {"agent": {"x": torch.zeros(1000)}}, is_last=False)
        content = Path("checkpoint.pt").read_bytes()[:2000]
    Path(name).write_bytes(content)
    assert f"{name}: damaged, or no checkpoint" in fails(evaluate.load, Path(name))


def save(path, **content):
    checkpoint = {"script": "paac_atari", "args": {}, "agent": {}, "global_step": 0} | content
    paac_atari.save_checkpoint(path, checkpoint, is_last=False)
    return path / "checkpoint.pt"


def test_no_other_module_is_imported(tmp_path, monkeypatch):
    """A checkpoint may name any; only a script that lies beside utils/ is imported."""
    Path("evil.py").write_text("raise SystemError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("evil", "antigravity", "tests/games", "../main/paac_atari", 7):
        error = fails(evaluate.load, save(tmp_path, script=name))
        assert "--script" in error
    assert "evil" not in sys.modules and "antigravity" not in sys.modules
    assert fails(evaluate.load, save(tmp_path), "nowhere.py").endswith("no such file")
    assert "not a training script" in fails(evaluate.load, save(tmp_path), plot.__file__)


@pytest.mark.slow
def test_script_that_lives_elsewhere(tmp_path):
    """Even under a name that is also in this repository, with flags of its own."""
    text = (ROOT / "paac_atari.py").read_text()
    changed = text.replace("num_steps: int = 5", "num_steps: int = 7\n    own: int = 1")
    assert changed != text
    Path("paac_atari.py").write_text(changed)
    flags = ["--num-envs", 2, "--num-workers", 1, "--total-timesteps", 20]
    assert run([sys.executable, "paac_atari.py", *flags], tmp_path).returncode == 0
    cmd = tool("evaluate", only_run(tmp_path), "--script", "paac_atari.py", "--episodes", 1)
    result = run(cmd, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "BreakoutNoFrameskip-v4, paac_atari after 28 steps" in result.stdout


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"episodes": 0}, "--episodes 0: must be 1 or more"),
        ({"num_envs": -1}, "--num-envs -1: must be 1 or more"),
        ({"num_workers": -3}, "--num-workers -3: must be 0 or more"),
        ({"seed": -1}, "--seed -1: must be 0 or more"),
        ({"video_seconds": 0}, "--video-seconds 0: must lie between"),
        ({"checkpoint": "nowhere"}, "nowhere: no checkpoint"),
        ({"export": "run/checkpoint.pt"}, "run/checkpoint.pt is the checkpoint itself"),
        ({"epsilon": 1.5}, "--epsilon 1.5: must lie between 0 and 1"),
        ({"video": "x.avi"}, "must end in .mp4 or .gif"),
        ({"json": "/proc/nowhere/x.json"}, "/proc/nowhere/x.json cannot be written"),
    ],
)
def test_evaluate_refuses_at_once(tmp_path, flags, words):
    before = save(tmp_path / "run").read_bytes()
    assert words in fails(evaluate.check, evaluate.Args(**({"checkpoint": "run"} | flags)))
    assert Path("run/checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("episodes, num_workers", [(1, 7), (3, 2)])
def test_evaluate_lowers_a_number_of_workers_that_does_not_fit(tmp_path, episodes, num_workers):
    train(paac_atari, "--env-id", "BreakoutNoFrameskip-v4", "--total-timesteps", 20)
    args = evaluate.Args(str(only_run(tmp_path)), episodes=episodes, num_workers=num_workers)
    assert evaluate.evaluate(args)["episodes"] == episodes


def test_a_gif_lasts_as_long_as_the_game():
    durations = evaluate.gif_durations(num_frames=450, fps=15)  # 66.7 ms each
    assert len(durations) == 450 and {*durations} == {60, 70} and sum(durations) == 30_000


def test_outputs_are_tried_without_a_trace(tmp_path):
    outputs.prepare("a/b/c.json")
    assert os.listdir("a/b") == []
    Path("kept").write_text("as it was")
    outputs.prepare("kept")
    assert Path("kept").read_text() == "as it was"
    Path("link").symlink_to("target")
    outputs.prepare("link")
    assert Path("link").is_symlink() and not Path("target").exists()
    assert "kept/x.png cannot be written" in fails(outputs.prepare, "kept/x.png")
    assert "a cannot be written" in fails(outputs.prepare, "a")


# plot ---------------------------------------------------------------------------------------------


def make_run(folder, steps, scores, seed=1, exp_name="paac_atari", env_id="PongNoFrameskip-v4"):
    """A run folder with these points, written by a script's own log."""
    args = paac_atari.Args(seed=seed, exp_name=exp_name, env_id=env_id)
    log = paac_atari.Log(args, Path(folder), 0, [])
    for step, score in zip(steps, scores):
        log.write(step, [(score, 100)] if score is not None else [], {})
    return str(folder)


def plotted(*runs, **options):
    """The rows of --csv: (game, label, seed, x, value)."""
    options = {"smooth": 1, "csv": "curves.csv"} | options
    plot.read_events.cache_clear()
    plot.main(plot.Args(list(map(str, runs)), **options))
    assert Path("curves.png").stat().st_size > 10_000
    rows = [line.split(",") for line in Path(options["csv"]).read_text().splitlines()]
    assert rows[0] == ["env_id", "label", "seed", options.get("x", "steps"), plot.Args([]).tag]
    return [(*row[:3], float(row[3]), float(row[4])) for row in rows[1:]]


def test_curves_of_runs_and_of_files(tmp_path):
    one = make_run("one", [10_000, 20_000, 30_000], [-20, -10, 0])
    pong = ("PongNoFrameskip-v4", "paac_atari", "1")
    rows = [(*pong, 10_000, -20), (*pong, 20_000, -10), (*pong, 30_000, 0)]
    assert plotted(one) == rows
    Path("curves.csv").rename("kept.csv")
    assert plotted("kept.csv") == rows
    assert [row[4] for row in plotted(one, smooth=2)] == [-20, -15, -5]
    assert [row[3] for row in plotted(one, x="frames")] == [40_000, 80_000, 120_000]
    # A published curve has no seed, and ends where the runs of its game do.
    header = "env_id,label,seed,steps,charts/episodic_return\n"
    paper = "PongNoFrameskip-v4,paper,,"
    other = "BeamRiderNoFrameskip-v4,paper,,0,1\n"
    Path("paper.csv").write_text(f"{header}{paper}20000,1\n{paper}40000,2\n{other}")
    published = ("PongNoFrameskip-v4", "paper", "")
    expected = [(*published, 20_000, 1), (*published, 30_000, 1.5), *rows]
    assert plotted("paper.csv", one) == expected
    assert [row[1] for row in plotted(one, "kept.csv", labels=["a", "b"])] == 3 * ["a"] + 3 * ["b"]


def test_two_runs_of_one_name_and_seed_stay_two_in_a_file(tmp_path):
    one = make_run("one", [10, 20, 30], [1, 2, 3])
    two = make_run("two", [10, 20, 30], [3, 4, 5])
    rows = plotted(one, two)
    Path("curves.csv").rename("kept.csv")
    assert plotted("kept.csv") == rows
    assert [list(curve.y) for curve in plot.read_csv("kept.csv", plot.Args([]).tag, "steps")] == [
        [1, 2, 3],
        [3, 4, 5],
    ]


def test_hours_leave_out_what_an_exported_agent_had_played(tmp_path):
    with SummaryWriter("runs") as writer:
        for step in (1_010_000, 1_020_000, 1_030_000):
            writer.add_scalar("charts/SPS", 1000.0, step)
            writer.add_scalar(plot.Args([]).tag, 1.0, step)
    x, _ = plot.read_run("runs", plot.Args([]).tag, 1)
    np.testing.assert_allclose(3600 * x["hours"], [10, 20, 30])


def test_a_point_after_no_step_takes_no_time(tmp_path):
    """As A3C logged it when it was stopped before its first update."""
    with SummaryWriter("stopped") as writer:
        for step, speed in ((0, 0.0), (1000, 100.0), (2000, 100.0)):
            writer.add_scalar("charts/SPS", speed, step)
            writer.add_scalar(plot.Args([]).tag, 1.0, step)
    x, _ = plot.read_run("stopped", plot.Args([]).tag, 1)
    np.testing.assert_allclose(3600 * x["hours"], [0, 10, 20])


def test_names_come_from_the_run_not_from_its_folder(tmp_path):
    one = make_run("a folder", [10, 20], [1, 2], seed=7, exp_name="x__y", env_id="ALE/Pong-v5")
    assert {row[:3] for row in plotted(one)} == {("ALE/Pong-v5", "x__y", "7")}


def test_what_cannot_be_plotted_is_skipped_with_a_line(tmp_path, capsys):
    good = make_run("good", [10, 20], [1, 2])
    make_run("no game over", [10, 20], [None, None])
    Path("empty").mkdir()
    Path("foreign.csv").write_text("a,b\n1,2\n")
    Path("empty.csv").write_text("")
    header = "env_id,label,seed,steps,charts/episodic_return\n"
    Path("header.csv").write_text(header)
    Path("short.csv").write_text(f"{header}x,y,1,5\n")
    Path("binary.csv").write_bytes(bytes(range(256)))
    Path("broken.csv").write_text(f"{header}x,y,1,a,b\n")
    with SummaryWriter("foreign") as writer:
        writer.add_scalar("a/b", 1.0, 1, new_style=True)
    bad = ["no game over", "empty", "foreign", "foreign.csv", "empty.csv", "header.csv"]
    bad += ["short.csv", "binary.csv", "broken.csv", "nowhere"]
    assert len(plotted(bad[0], good, *bad[1:])) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == len(bad) and "Traceback" not in error, error
    assert all(f"{name} is skipped: " in error for name in bad), error
    assert fails(plot.main, plot.Args(bad)) == "nothing to plot"


def test_a_band_only_where_all_seeds_have_points(tmp_path, monkeypatch, capsys):
    bands, lines = [], []
    band, line = plot.plt.Axes.fill_between, plot.plt.Axes.plot

    def fill_between(axis, x, *args, **options):
        bands.append(x)
        return band(axis, x, *args, **options)

    def draw_line(axis, x, *args, **options):
        lines.append(x)
        return line(axis, x, *args, **options)

    monkeypatch.setattr(plot.plt.Axes, "fill_between", fill_between)
    monkeypatch.setattr(plot.plt.Axes, "plot", draw_line)
    one = make_run("one", [10, 20, 30], [1, 2, 3], seed=1)
    two = make_run("two", [20, 30, 40], [1, 2, 3], seed=2)
    plotted(one, two)
    assert (bands[0][0], bands[0][-1]) == (lines[0][0], lines[0][-1]) == (20, 30)
    far = make_run("far", [50, 60], [1, 2], seed=3)
    plotted(one, far)
    assert len(bands) == 1 and [tuple(x) for x in lines[1:]] == [(10, 20, 30), (50, 60)]
    assert "its seeds share no agent steps" in capsys.readouterr().err


def test_an_algorithm_has_one_colour_in_all_panels(tmp_path, monkeypatch):
    colors, line = [], plot.plt.Axes.plot

    def draw_line(axis, *args, **options):
        (drawn,) = line(axis, *args, **options)
        colors.append((options["label"], drawn.get_color()))

    monkeypatch.setattr(plot.plt.Axes, "plot", draw_line)
    breakout = {"env_id": "BreakoutNoFrameskip-v4"}
    first = make_run("first", [10, 20], [1, 2], exp_name="first", **breakout)
    here = make_run("here", [10, 20], [1, 2], exp_name="both", **breakout)
    there = make_run("there", [10, 20], [1, 2], exp_name="both")
    plotted(first, here, there)
    assert [label for label, _ in colors] == ["first", "both", "both"]
    color_of_first, color_here, color_there = [color for _, color in colors]
    assert color_here == color_there
    assert color_of_first != color_here


def test_plot_refuses_at_once(tmp_path):
    assert "2 labels for 1 runs" in fails(plot.main, plot.Args(["x"], labels=["a", "b"]))
    assert "--smooth 0" in fails(plot.main, plot.Args(["x"], smooth=0))
    assert "must end in .png" in fails(plot.main, plot.Args(["x"], out="curves"))
    assert "cannot be written" in fails(plot.main, plot.Args(["x"], out="/proc/nowhere/x.png"))
