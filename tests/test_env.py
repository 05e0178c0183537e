"""AtariEnv and AtariWorker: the games look, reward and end as in gymnasium's own wrappers, and each for itself. PAAC's are
tested; test_drift.py holds those of the other scripts to the same text."""

import importlib
import os
from itertools import islice

import gymnasium as gym
import numpy as np
import pytest
from conftest import SYNCHRONOUS, small
from games import Scripted, scripted_steps
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

import paac_atari

# Screens of 210, 210, 250, 214 and 210 lines; the v5 ones with sticky actions.
GAMES = ["BreakoutNoFrameskip-v4", "PongNoFrameskip-v4", "ALE/AirRaid-v5", "ALE/Carnival-v5", "ALE/Qbert-v5"]


@pytest.mark.parametrize("life_loss", [False, True])
@pytest.mark.parametrize("env_id", GAMES)
def test_equals_gymnasium_preprocessing(env_id, life_loss):
    ours = paac_atari.AtariEnv(env_id, 4, life_loss)
    preprocessed = AtariPreprocessing(gym.make(env_id, frameskip=1), terminal_on_life_loss=life_loss)
    theirs = FrameStackObservation(preprocessed, 4)
    actions = np.random.default_rng(0)
    shown = [(ours.reset(seed=5)[0], theirs.reset(seed=5)[0])]
    for step in range(2500):
        action = int(actions.integers(ours.action_space.n))
        obs, *outcome, _ = ours.step(action)
        their_obs, *their_outcome, _ = theirs.step(action)
        shown.append((obs, their_obs))
        assert outcome == their_outcome, f"step {step}"
        if outcome[1] or outcome[2]:
            shown.append((ours.reset()[0], theirs.reset()[0]))
    for i, (obs, their_obs) in enumerate(shown):  # only now: an observation stays as it was when the game goes on
        np.testing.assert_array_equal(obs, their_obs, f"observation {i}")


def test_passes_the_env_checker():
    env = paac_atari.AtariEnv("PongNoFrameskip-v4", render_mode="rgb_array")
    check_env(env, skip_render_check=True)
    assert env.render().shape == (210, 160, 3)


@pytest.mark.parametrize("env_id, sticky", [("PongNoFrameskip-v4", 0.0), ("ALE/Pong-v5", 0.25)])
def test_sticky_actions_follow_the_id(env_id, sticky):
    env = paac_atari.AtariEnv(env_id)
    assert env.ale.getFloat("repeat_action_probability") == pytest.approx(sticky)

    def play(seed):
        env.reset(seed=seed)
        actions = np.random.default_rng(0).integers(env.action_space.n, size=300)
        return np.stack([env.step(action)[0] for action in actions])

    starts = {}
    for seed in range(40):  # of two seeds with equally many no-ops, only the sticky actions can differ
        env.reset(seed=seed)
        starts.setdefault(env.ale.getEpisodeFrameNumber(), []).append(seed)
    one, two = next(seeds for seeds in starts.values() if len(seeds) > 1)[:2]
    np.testing.assert_array_equal(play(one), play(one))
    assert (play(one) == play(two)).all() == (sticky == 0)


def test_life_loss_does_not_restart_the_game():
    env = paac_atari.AtariEnv("BreakoutNoFrameskip-v4", terminal_on_life_loss=True)
    env.reset(seed=1)
    generator, lives, frames, score = np.random.default_rng(0), [env.ale.lives()], 0, 0.0
    while not env.game_over:
        _, reward, terminated, _, _ = env.step(generator.integers(4))
        score += reward
        assert env.ale.getEpisodeFrameNumber() > frames
        frames = env.ale.getEpisodeFrameNumber()
        assert terminated == (env.ale.lives() < lives[-1])
        lives += [env.ale.lives()] if terminated else []
    assert lives == [5, 4, 3, 2, 1, 0]
    assert env.episode_return == score  # of all lives


def test_time_limit_is_a_truncation():
    env = paac_atari.AtariEnv("PongNoFrameskip-v4")
    env.ale.setInt("max_num_frames_per_episode", 402)  # 402 falls inside a repeat of 4
    env.reset(seed=3)
    outcomes = []
    while not env.game_over:
        outcomes.append(env.step(0)[2:4])
    assert outcomes[-1] == (False, True)
    assert set(outcomes[:-1]) == {(False, False)}
    assert env.ale.getEpisodeFrameNumber() == 402


@pytest.mark.parametrize("num_workers", [0, 2])
def test_time_limits_come_with_the_last_observations(num_workers, monkeypatch):
    """One array of all games, in which those that a time limit cut short show what they showed before they restarted."""
    monkeypatch.setattr(Scripted, "created", 0)
    envs = paac_atari.make_envs(paac_atari.parse_args([*small(paac_atari), "--num-workers", str(num_workers)]), Scripted)
    envs.call("start", 1, None)
    games, times = scripted_steps(2 if num_workers else 4), max(1, num_workers)  # each worker counts its games from 0
    for _, last_shown, over, cut, next_shown in islice(games, 20):
        obs, _, terminations, truncations, info = envs.step(np.zeros(envs.action_space.shape, int))
        np.testing.assert_array_equal(np.ravel(terminations), np.tile(over, times))
        np.testing.assert_array_equal(np.ravel(truncations), np.tile(cut, times))
        np.testing.assert_array_equal(obs.reshape(4, -1)[:, 0], np.tile(next_shown, times))
        assert ("last_obs" in info) == cut.any()
        if cut.any():
            assert info["last_obs"].shape == obs.shape and info["last_obs"].dtype == np.uint8
            last_obs = info["last_obs"].reshape(4, -1)[:, 0]
            np.testing.assert_array_equal(last_obs[np.tile(cut, times)], np.tile(last_shown[cut], times))
    paac_atari.close_envs(envs)


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_training_goes_on_after_time_limits_in_workers(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module(name)
    args = script.parse_args([*small(script), "--total-timesteps", "200"])
    assert args.num_workers == 2
    script.train(args, Scripted)
    assert [*tmp_path.glob("runs/*/checkpoint.*")]


@pytest.mark.parametrize("env_id", ["ALE/Qbert-v5", "QbertNoFrameskip-v4", "ALE/Breakout-v5", "ALE/Seaquest-v5"])
def test_restored_game_goes_on_exactly(env_id):
    live, restored = paac_atari.AtariEnv(env_id, 4, True), paac_atari.AtariEnv(env_id, 4, True)
    live.reset(seed=1)
    restored.reset(seed=2)
    actions = np.random.default_rng(0)
    for _ in range(8):  # at different moments
        for _ in range(int(actions.integers(20, 60))):
            live.step(actions.integers(live.action_space.n))
            if live.game_over:
                live.reset()
        restored.set_state(live.get_state())
        for step in range(150):
            action = actions.integers(live.action_space.n)
            (obs, *outcome), (other_obs, *other_outcome) = live.step(action), restored.step(action)
            np.testing.assert_array_equal(obs, other_obs, f"step {step}")
            assert outcome == other_outcome
            assert (live.episode_return, live.episode_length) == (restored.episode_return, restored.episode_length)
            if live.game_over:
                np.testing.assert_array_equal(live.reset()[0], restored.reset()[0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_play_the_same_as_single_games(num_workers):
    """Each game gets its own action once per step, restarts by itself, and shows up in its own place."""
    args = paac_atari.parse_args([*small(paac_atari), "--num-workers", str(num_workers), "--env-id", "BreakoutNoFrameskip-v4"])
    envs = paac_atari.make_envs(args)
    obs = np.stack(envs.call("start", 7, None))
    singles = [paac_atari.AtariEnv(args.env_id, 4, True) for _ in range(4)]
    for game, env in enumerate(singles):
        seed = int(np.random.SeedSequence([7, game]).generate_state(1, np.uint64)[0])
        np.testing.assert_array_equal(obs.reshape(4, 4, 84, 84)[game], env.reset(seed=seed)[0])
    generator, scores = np.random.default_rng(0), []
    for _ in range(400):
        actions = generator.integers(4, size=4)
        obs, rewards, terminations, truncations, info = envs.step(actions.reshape(envs.action_space.shape))
        assert info == {}
        outcomes = list(zip(*map(np.ravel, (rewards, terminations, truncations))))
        for game, env in enumerate(singles):
            single_obs, reward, terminated, truncated, _ = env.step(actions[game])
            assert (reward, terminated, truncated) == outcomes[game]
            if env.game_over:
                scores.append((env.episode_return, env.episode_length))
                single_obs, _ = env.reset()
            np.testing.assert_array_equal(obs.reshape(4, 4, 84, 84)[game], single_obs)
    episodes = [episode for report in envs.call("report", False) for episode in report[0]]
    paac_atari.close_envs(envs)
    assert len(scores) >= 4
    assert sorted(episodes) == sorted(scores)


def refuse(*args):
    raise PermissionError


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not let processes choose their cores")
@pytest.mark.parametrize("workers_per_core, refused", [(1, False), (2, False), (1, True)])
def test_one_worker_per_core_stays_on_it(monkeypatch, workers_per_core, refused):
    """Workers never interrupt the learner when they wake up, and where the system refuses that, they start all the same."""
    if refused:
        monkeypatch.setattr(os, "sched_setaffinity", refuse)
    cores, policy = sorted(os.sched_getaffinity(0)), os.sched_getscheduler(0)
    n = workers_per_core * len(cores)
    envs = paac_atari.make_envs(paac_atari.Args(num_envs=n, num_workers=n))
    placed = [(os.sched_getscheduler(process.pid), sorted(os.sched_getaffinity(process.pid))) for process in envs.processes]
    paac_atari.close_envs(envs)
    if refused:
        assert placed == [(policy, cores)] * n
    elif workers_per_core == 1:
        assert placed == [(os.SCHED_BATCH, [core]) for core in cores]
    else:
        assert placed == [(os.SCHED_BATCH, cores)] * n


def test_generators_are_distinct():
    """No two games of any worker share their random numbers, and neither do neighbouring seeds."""
    streams, args = [], paac_atari.parse_args([*small(paac_atari), "--num-envs", "8", "--num-workers", "0"])
    for seed in (1, 2, 3):
        for first_game in (0, 8):
            worker = paac_atari.make_envs(args, first_game=first_game)
            worker.start(seed, None)
            streams += [tuple(env.atari.np_random.integers(0, 2**62, 4)) for env in worker.envs]
    assert len(set(streams)) == len(streams) == 48


def all_games():
    ids = [spec.id for spec in gym.registry.values() if spec.entry_point == "ale_py.env:AtariEnv"]
    return [i for i in ids if i.startswith("ALE/")], [i for i in ids if i.endswith("NoFrameskip-v4")]


def test_all_games_start_and_step():
    v5, noframeskip = all_games()
    assert (len(v5), len(noframeskip)) == (104, 62)
    for env_id in v5 + noframeskip:
        env = paac_atari.AtariEnv(env_id)
        obs, _ = env.reset(seed=0)
        for action in range(env.action_space.n):
            obs, _, terminated, truncated, _ = env.step(action)
        assert obs.shape == (4, 84, 84) and obs.dtype == np.uint8
        assert not terminated and not truncated, env_id
