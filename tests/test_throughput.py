"""utils/throughput.py measures all it says it measures, and does its sums right."""

import importlib.util
import json
from itertools import pairwise

import pytest


def test_medians_and_ratios_are_those_of_the_rounds(capsys):
    import throughput

    speeds = {"slow": [10.0, 20.0, 40.0], "fast": [20.0, 60.0, 80.0]}
    rows = throughput.table("title", speeds, "slow")
    assert [(row["name"], row["steps_per_second"], row["ratio"]) for row in rows] == [
        ("slow", 20, 1),
        ("fast", 60, 2),
    ]
    assert "| 60 | 2.00 | 20 - 80 | fast |" in capsys.readouterr().out


def test_pipelines_take_turns(monkeypatch):
    """Both get their seconds in slices of 0.3, and each step counts for all games. The clock is the
    test's: a step's length."""
    import throughput

    order, lengths = [], {"slow": 0.1, "fast": 0.02}
    monkeypatch.setattr(
        throughput.time, "perf_counter", lambda: sum(lengths[name] for name in order)
    )
    steps = {name: lambda name=name: order.append(name) for name in lengths}
    assert throughput.alternate(steps, 8, 0.7) == pytest.approx({"slow": 80, "fast": 400})
    assert sum(one != other for one, other in pairwise(order)) >= 3


def test_all_games_count_where_the_cores_do_not_divide_them(monkeypatch):
    import throughput

    import paac_atari

    counts = []

    class Counted(paac_atari.WorkerPool):
        def __init__(self, args, make_env):
            counts.append((args.num_workers, args.num_envs))
            super().__init__(args, make_env)

    monkeypatch.setattr(paac_atari, "WorkerPool", Counted)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    pipelines, _, close = throughput.game_pipelines(throughput.Args(num_envs=4, seconds=0.1))
    close()
    assert counts == [(2, 4)]
    assert "ours: 2 workers" in pipelines and "ale-py AtariVectorEnv (C++), 2 threads" in pipelines


@pytest.mark.slow
def test_all_parts(tmp_path, monkeypatch):
    import throughput

    monkeypatch.setattr(throughput, "LOG_INTERVAL", 200)
    flags = {"rounds": 1, "num_envs": 4, "num_workers": 2, "seconds": 0.3, "train_seconds": 1}
    flags |= {"networks": ["nips"], "sweep": [4], "out": str(tmp_path / "throughput")}
    throughput.main(throughput.Args(**flags))
    report = json.loads((tmp_path / "throughput.json").read_text())
    names = " ".join(row["name"] for row in report["games"])
    assert all(name in names for name in ("stock:", "ours:", "AtariVectorEnv", "emulator alone"))
    num_pipelines = 5 if importlib.util.find_spec("envpool") else 4
    assert [len(report[part]) for part in ("games", "training", "sweep")] == [num_pipelines, 1, 2]
    assert all(
        row["steps_per_second"] > 0
        for part in ("games", "training", "sweep")
        for row in report[part]
    )
    assert all(sum(row["split"].values()) == pytest.approx(1, abs=1e-4) for row in report["sweep"])
    assert (tmp_path / "throughput.png").stat().st_size > 10_000


@pytest.mark.slow
def test_sweep_of_a_script_without_a_time_split(tmp_path, monkeypatch):
    import throughput

    monkeypatch.setattr(throughput, "LOG_INTERVAL", 200)
    flags = {"parts": ["sweep"], "scripts": ["a3c_atari"], "sweep": [2]}
    flags |= {"rounds": 1, "train_seconds": 1, "out": str(tmp_path / "throughput")}
    args = throughput.Args(**flags)
    speed, split = throughput.train_speed(args, "a3c_atari", 2, "nips")
    assert speed > 0 and split == {}
    monkeypatch.setattr(throughput, "train_speed", lambda *_: (speed, split))
    throughput.main(args)
    report = json.loads((tmp_path / "throughput.json").read_text())
    assert [row["split"] for row in report["sweep"]] == [{}, {}]
    assert (tmp_path / "throughput.png").stat().st_size > 10_000


def test_a_script_that_does_not_start_says_why(tmp_path):
    import throughput

    args = throughput.Args(env_id="BreakoutNoFrameskip-v4", train_seconds=0)
    with pytest.raises(SystemExit) as stopped:
        throughput.train_speed(args, "a3c_atari", 2, "resnet")
    assert "--arch" in stopped.value.code and "a3c_atari.py" in stopped.value.code


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"rounds": 0}, "must be positive"),
        ({"train_seconds": -1}, "--train-seconds 0 or more"),
        ({"scripts": ["paac_atari.py"]}, "there is no paac_atari.py.py"),
        ({"sb3_python": "/nowhere"}, "--sb3-python /nowhere: no such file"),
        ({"out": "/proc/nowhere/x"}, "cannot be written"),
    ],
)
def test_refuses_at_once(flags, words):
    import throughput

    with pytest.raises(SystemExit) as stopped:
        throughput.check(throughput.Args(**flags))
    assert words in stopped.value.code


def test_refuses_flags_of_a_script_before_anything_is_measured(capsys):
    import throughput

    with pytest.raises(SystemExit) as stopped:
        throughput.check(throughput.Args(networks=["nips", "nature-bf61"]))
    assert stopped.value.code == 2 and "bf61" in capsys.readouterr().err
