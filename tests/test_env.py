"""AtariEnv and the workers: the games look, reward and end as in gymnasium's own wrappers, and each
for itself. PAAC's are tested; test_drift.py holds those of the other scripts to the same text."""

import contextlib
import importlib
import os
import re
import time
from itertools import islice
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from conftest import SYNCHRONOUS, each, small
from games import Catch, Scripted, scripted_steps
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

import paac_atari

# In these games a new boot differs from the one before (after seed 3), or restoring it is not
# exact.
BOOTS_DIFFER = [
    "Assault",
    "BeamRider",
    "Berzerk",
    "DoubleDunk",
    "ElevatorAction",
    "Hangman",
    "HauntedHouse",
    "IceHockey",
    "Qbert",
    "SirLancelot",
    "Solaris",
    "Surround",
    "Tennis",
    "Tetris",
    "TimePilot",
    "YarsRevenge",
]


# AirRaid's screens have 250 lines, Carnival's 214, the others' 210. The v5 ids have sticky actions.
@pytest.mark.parametrize(
    "env_id, life_loss",
    [
        ("BreakoutNoFrameskip-v4", True),
        ("ALE/Qbert-v5", False),
        pytest.param("BreakoutNoFrameskip-v4", False, marks=pytest.mark.slow),
        pytest.param("PongNoFrameskip-v4", True, marks=pytest.mark.slow),
        pytest.param("ALE/AirRaid-v5", True, marks=pytest.mark.slow),
        pytest.param("ALE/Carnival-v5", True, marks=pytest.mark.slow),
        pytest.param("ALE/Qbert-v5", True, marks=pytest.mark.slow),
    ],
)
def test_equals_gymnasium_preprocessing(env_id, life_loss):
    ours = paac_atari.AtariEnv(env_id, 4, life_loss)
    preprocessed = AtariPreprocessing(
        gym.make(env_id, frameskip=1), terminal_on_life_loss=life_loss
    )
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
            if "v5" in env_id:  # see test_a_restart_is_a_boot
                break
            shown.append((ours.reset()[0], theirs.reset()[0]))
    assert step > 20
    # Compared only now: an observation stays as it was when the game goes on.
    for i, (obs, their_obs) in enumerate(shown):
        np.testing.assert_array_equal(obs, their_obs, f"observation {i}")


def restarted(game, boots_again):
    """What a game shows and rewards after it was played and restarted."""
    env = paac_atari.AtariEnv(f"ALE/{game}-v5")
    env.reset(seed=3)
    actions = np.random.default_rng(0).integers(env.action_space.n, size=40)
    # The last four are no-ops, because a restored game may repeat the last action (sticky ones).
    for action in [*actions, 0, 0, 0, 0]:
        *_, info = env.step(action)
        if info["game_over"]:
            break
    if boots_again:
        env.booted = None
    shown = [env.reset()[0]]
    rewards = []
    for action in actions:
        obs, reward, terminated, truncated, _ = env.step(action)
        shown.append(obs)
        rewards.append(reward)
        if terminated or truncated:
            break
    return np.stack(shown), rewards


@pytest.mark.parametrize(
    "games",
    [["Breakout", "Pong", "Qbert"], pytest.param(None, marks=pytest.mark.slow)],
    ids=["three", "all"],
)
def test_a_restart_is_a_boot(games):
    """A restarted game is the same bits as one that boots again, except for those of the list,
    which start all the same."""
    for game in games or [env_id[4:-3] for env_id in all_games()[0]]:
        shown, rewards = restarted(game, boots_again=False)
        if game in BOOTS_DIFFER:
            assert len(rewards) > 20, game
            assert (shown[0] != shown[-1]).any(), game
            continue
        booted_shown, booted_rewards = restarted(game, boots_again=True)
        np.testing.assert_array_equal(shown, booted_shown, game)
        assert rewards == booted_rewards, game


def start_and_play(env, seed):
    """What a game shows and rewards after reset(seed=seed), and how many frames it had before."""
    obs, _ = env.reset(seed=seed)
    num_frames = env.ale.getEpisodeFrameNumber()
    shown, rewards = [obs], []
    for action in np.random.default_rng(0).integers(env.action_space.n, size=300):
        obs, reward, terminated, truncated, _ = env.step(action)
        shown.append(obs)
        rewards.append(reward)
        if terminated or truncated:
            break
    return np.stack(shown), rewards, num_frames


@pytest.mark.parametrize(
    "games",
    [["Breakout", "Pong", "BeamRider"], pytest.param(None, marks=pytest.mark.slow)],
    ids=["three", "all"],
)
def test_a_restart_is_the_first_start_again(games):
    """The same bits, in all games but two, also where one boot differs from another, as Beam
    Rider's do."""
    for game in games or [env_id[4:-3] for env_id in all_games()[0]]:
        env = paac_atari.AtariEnv(f"ALE/{game}-v5")
        env.ale.setFloat("repeat_action_probability", 0.0)  # sticky ones are random
        # With this seed both starts draw as many no-ops.
        shown, rewards, num_frames = start_and_play(env, seed=8)
        shown_again, rewards_again, num_frames_again = start_and_play(env, seed=None)
        assert num_frames == num_frames_again
        assert len(rewards) > 20, game
        assert (shown[0] != shown[-1]).any(), game
        if game in ("Qbert", "Tetris"):  # a saved state lacks part of the video chip
            assert not np.array_equal(shown, shown_again), game
        else:
            np.testing.assert_array_equal(shown, shown_again, game)
            assert rewards == rewards_again, game


def test_passes_the_env_checker():
    env = paac_atari.AtariEnv("PongNoFrameskip-v4", render_mode="rgb_array")
    check_env(env, skip_render_check=True)
    assert env.render().shape == (210, 160, 3)


@pytest.mark.slow
@pytest.mark.parametrize("env_id, sticky", [("PongNoFrameskip-v4", 0.0), ("ALE/Pong-v5", 0.25)])
def test_sticky_actions_follow_the_id(env_id, sticky):
    env = paac_atari.AtariEnv(env_id)
    assert env.ale.getFloat("repeat_action_probability") == pytest.approx(sticky)

    def play(seed):
        env.reset(seed=seed)
        actions = np.random.default_rng(0).integers(env.action_space.n, size=300)
        return np.stack([env.step(action)[0] for action in actions])

    starts = {}
    # Of two seeds with equally many no-ops, only the sticky actions can differ
    for seed in range(40):
        env.reset(seed=seed)
        starts.setdefault(env.ale.getEpisodeFrameNumber(), []).append(seed)
    one, two = next(seeds for seeds in starts.values() if len(seeds) > 1)[:2]
    np.testing.assert_array_equal(play(one), play(one))
    assert (play(one) == play(two)).all() == (sticky == 0)


def test_life_loss_does_not_restart_the_game():
    env = paac_atari.AtariEnv("BreakoutNoFrameskip-v4", terminal_on_life_loss=True)
    env.reset(seed=1)
    generator, lives, frames = np.random.default_rng(0), [env.ale.lives()], 0
    info = {"game_over": False}
    while not info["game_over"]:
        _, _, terminated, _, info = env.step(generator.integers(4))
        assert env.ale.getEpisodeFrameNumber() > frames
        frames = env.ale.getEpisodeFrameNumber()
        assert terminated == (env.ale.lives() < lives[-1])
        lives += [env.ale.lives()] if terminated else []
    assert lives == [5, 4, 3, 2, 1, 0]


def test_time_limit_is_a_truncation():
    env = paac_atari.AtariEnv("PongNoFrameskip-v4")
    env.ale.setInt("max_num_frames_per_episode", 402)  # 402 falls inside a repeat of 4
    env.reset(seed=3)
    outcomes, info = [], {"game_over": False}
    while not info["game_over"]:
        *_, terminated, truncated, info = env.step(0)
        outcomes.append((terminated, truncated))
    assert outcomes[-1] == (False, True)
    assert set(outcomes[:-1]) == {(False, False)}
    assert env.ale.getEpisodeFrameNumber() == 402


def test_time_limit_of_a_wrapper_restarts_the_game():
    """Although AtariEnv says in info that the game is not over. With terminal_on_life_loss, lives
    that are lost before do not restart it."""

    def make_env(args):
        return gym.wrappers.TimeLimit(paac_atari.make_env(args), 50)

    args = paac_atari.Args(num_envs=2, num_workers=0)
    envs = paac_atari.WorkerPool(args, make_env)
    envs.start(1, 0)
    num_lives_lost = 0
    for step in range(1, 151):
        _, _, terminations, truncations, last_obs = envs.step(np.ones(2, int))  # FIRE
        assert truncations.tolist() == [step % 50 == 0] * 2
        assert (last_obs is not None) == (step % 50 == 0)
        num_lives_lost += terminations.sum()
    episodes, _ = envs.report(with_states=False)
    envs.close()
    assert [length for _, length in episodes] == [50] * 6
    assert num_lives_lost > 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_time_limits_come_with_the_last_observations(num_workers, monkeypatch):
    """One array of all games, in which those that a time limit cut short show what they showed
    before they restarted."""
    monkeypatch.setattr(Scripted, "created", 0)
    flags = [*small(paac_atari), "--num-workers", str(num_workers)]
    envs = paac_atari.WorkerPool(paac_atari.parse_args(flags), Scripted)
    envs.start(1, 0)
    # Each worker counts its games from 0.
    games, times = scripted_steps(2 if num_workers else 4), max(1, num_workers)
    kept = []
    for _, last_shown, over, cut, next_shown in islice(games, 20):
        obs, _, terminations, truncations, last_obs = envs.step(np.zeros(4, int))
        np.testing.assert_array_equal(terminations, np.tile(over, times))
        np.testing.assert_array_equal(truncations, np.tile(cut, times))
        assert obs.shape == (4, 4, 84, 84) and obs.dtype == np.uint8
        kept.append((obs, np.tile(next_shown, times)))
        assert (last_obs is not None) == cut.any()
        if cut.any():
            assert last_obs.shape == obs.shape and last_obs.dtype == np.uint8
            last_obs = last_obs.reshape(4, -1)[:, 0]
            is_cut = np.tile(cut, times)
            np.testing.assert_array_equal(last_obs[is_cut], np.tile(last_shown, times)[is_cut])
    envs.close()
    for obs, shown in kept:  # compared only now: later steps do not overwrite what is kept
        np.testing.assert_array_equal(obs.reshape(4, -1)[:, 0], shown)


@pytest.mark.parametrize("name", each(SYNCHRONOUS))
def test_training_goes_on_after_time_limits_in_workers(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module(name)
    args = script.parse_args([*small(script), "--total-timesteps", "200"])
    assert args.num_workers == 2
    script.train(args, Scripted)
    assert [*tmp_path.glob("runs/*/checkpoint.*")]


@pytest.mark.parametrize(
    "env_id",
    [
        "ALE/Qbert-v5",
        pytest.param("QbertNoFrameskip-v4", marks=pytest.mark.slow),
        pytest.param("ALE/Breakout-v5", marks=pytest.mark.slow),
        pytest.param("ALE/Seaquest-v5", marks=pytest.mark.slow),
    ],
)
def test_restored_game_goes_on_exactly(env_id):
    live, restored = paac_atari.AtariEnv(env_id, 4, True), paac_atari.AtariEnv(env_id, 4, True)
    live.reset(seed=1)
    restored.reset(seed=2)
    actions = np.random.default_rng(0)
    for _ in range(8):  # at different moments
        for _ in range(int(actions.integers(20, 60))):
            *_, info = live.step(actions.integers(live.action_space.n))
            if info["game_over"]:
                live.reset()
        shown = restored.set_state(live.get_state())
        np.testing.assert_array_equal(shown, live.frames)
        for step in range(150):
            action = actions.integers(live.action_space.n)
            (obs, *outcome), (other_obs, *other_outcome) = live.step(action), restored.step(action)
            np.testing.assert_array_equal(obs, other_obs, f"step {step}")
            assert outcome == other_outcome
            if outcome[-1]["game_over"]:
                np.testing.assert_array_equal(live.reset()[0], restored.reset()[0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_play_the_same_as_single_games(num_workers):
    """Each game gets its own action once per step, restarts by itself, and shows up in its own
    place."""
    flags = ["--num-workers", str(num_workers), "--env-id", "BreakoutNoFrameskip-v4"]
    args = paac_atari.parse_args([*small(paac_atari), *flags])
    envs = paac_atari.WorkerPool(args, paac_atari.make_env)
    obs = envs.start(7, 0)
    singles = [paac_atari.make_env(args) for _ in range(4)]
    for game, env in enumerate(singles):
        seed = int(np.random.SeedSequence([7, game]).generate_state(1, np.uint64)[0])
        np.testing.assert_array_equal(obs[game], env.reset(seed=seed)[0])
    generator, finished = np.random.default_rng(0), []
    scores, lengths = [0.0] * 4, [0] * 4  # of whole games, over all lives
    for _ in range(400):
        actions = generator.integers(4, size=4)
        obs, rewards, terminations, truncations, last_obs = envs.step(actions)
        assert last_obs is None
        for game, env in enumerate(singles):
            single_obs, reward, terminated, truncated, info = env.step(actions[game])
            assert (reward, terminated, truncated) == (
                rewards[game],
                terminations[game],
                truncations[game],
            )
            scores[game] += reward
            lengths[game] += 1
            if info["game_over"]:
                finished.append((scores[game], lengths[game]))
                scores[game], lengths[game] = 0.0, 0
                single_obs, _ = env.reset()
            np.testing.assert_array_equal(obs[game], single_obs)
    episodes, states = envs.report(with_states=True)
    envs.close()
    assert len(finished) >= 4
    assert sorted(episodes) == sorted(finished)
    assert [(state["score"], state["length"]) for state in states] == [*zip(scores, lengths)]


def test_a_game_of_gymnasium_arrives_unchanged():
    """Float observations of both signs and beyond 255, shown in the dtype and shape of the space; a
    restart after each end; no state to save."""
    args = paac_atari.Args(num_envs=2, num_workers=2)
    envs = paac_atari.WorkerPool(args, Floats)
    obs = envs.start(1, 0)
    assert obs.dtype == np.float32
    expected = np.array([-0.03, 1.7, -2000.5, 3e5], np.float32)
    np.testing.assert_array_equal(obs, [expected, expected])
    for step in range(1, 8):
        obs, rewards, terminations, _, _ = envs.step(np.array([0, 1]))
        shown = expected + np.float32(step % 4)  # a new game after four steps
        np.testing.assert_array_equal(obs, [shown, shown])
        assert rewards.tolist() == [0.25, 0.25] and terminations.tolist() == [step % 4 == 0] * 2
    assert envs.report(with_states=True) == ([(1.0, 4), (1.0, 4)], [])
    envs.close()


class Floats(gym.Env):
    """A game with nothing but what gymnasium asks for."""

    def __init__(self, args):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self.action_space = gym.spaces.Discrete(2)

    def show(self):
        return np.array([-0.03, 1.7, -2000.5, 3e5], np.float32) + np.float32(self.steps)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.show(), {}

    def step(self, action):
        self.steps += 1
        return self.show(), 0.25, self.steps == 4, False, {}


def refuse(*args):
    raise PermissionError


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"),
    reason="this system does not let processes choose their cores",
)
@pytest.mark.parametrize("workers_per_core, refused", [(1, False), (2, False), (1, True)])
def test_one_worker_per_core_stays_on_it(monkeypatch, workers_per_core, refused):
    """Workers never interrupt the learner when they wake up, and where the system refuses that,
    they start all the same."""
    if refused:
        monkeypatch.setattr(os, "sched_setaffinity", refuse)
    cores, policy = sorted(os.sched_getaffinity(0)), os.sched_getscheduler(0)
    n = workers_per_core * len(cores)
    args = paac_atari.Args(num_envs=n, num_workers=n)
    envs = paac_atari.WorkerPool(args, paac_atari.make_env)
    envs.start(1, 0)
    placed = []
    for process in envs.envs.processes:
        affinity = sorted(os.sched_getaffinity(process.pid))
        placed.append((os.sched_getscheduler(process.pid), affinity))
    envs.close()
    if refused:
        assert placed == [(policy, cores)] * n
    elif workers_per_core == 1:
        assert placed == [(os.SCHED_BATCH, [core]) for core in cores]
    else:
        assert placed == [(os.SCHED_BATCH, cores)] * n


def test_generators_are_distinct():
    """No two games of any worker share their random numbers, and neither do neighbouring seeds."""
    args = paac_atari.parse_args([*small(paac_atari), "--num-envs", "8", "--num-workers", "0"])
    streams = []
    for seed in (1, 2):
        for global_step in (0, 160):  # of a restart
            for first_game in (0, 8):
                envs = paac_atari.WorkerPool(args, paac_atari.make_env, first_game)
                envs.start(seed, global_step)
                for env in envs.envs.envs:
                    streams.append(tuple(env.atari.np_random.integers(0, 2**62, 4)))
    assert len(set(streams)) == len(streams) == 64


def all_games():
    ids = [spec.id for spec in gym.registry.values() if spec.entry_point == "ale_py.env:AtariEnv"]
    return [i for i in ids if i.startswith("ALE/")], [
        i for i in ids if i.endswith("NoFrameskip-v4")
    ]


@pytest.mark.slow
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


class StuckOnce(Catch):
    """Hangs when the first of all games starts, but only once."""

    def reset(self, *, seed=None, options=None):
        with contextlib.suppress(FileExistsError):
            Path("stuck").touch(exist_ok=False)
            time.sleep(1000)
        return super().reset(seed=seed, options=options)


def test_worker_stuck_at_its_start_is_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = paac_atari.Args(num_envs=2, num_workers=2, step_timeout=2.0)
    envs = paac_atari.WorkerPool(args, StuckOnce)
    assert envs.start(1, 0).shape == (2, 4, 84, 84)
    envs.close()
    error = capsys.readouterr().err
    assert re.search(r"worker [01] \(games ([01]) to \1, pid \d+\) did not answer in time", error)
    assert error.count("all games restart") == 1
