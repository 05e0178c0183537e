"""The asynchronous script: one actor-learner computes what a plain sequential program does; several
change the same memory."""

import multiprocessing
import signal
import time

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import only_run, scalars, small
from games import Catch, Scripted

import a3c_atari


class Cut(Scripted):
    """Ends by a time limit after 4 steps."""

    def __init__(self, *args):
        super().__init__(*args)
        self.number = 1


def trained(tmp_path, monkeypatch, game_class, flags):
    """The run's folder and its checkpoint."""
    monkeypatch.chdir(tmp_path)
    a3c_atari.train(a3c_atari.parse_args([*small(a3c_atari), *flags.split()]), game_class)
    return only_run(tmp_path), torch.load(only_run(tmp_path) / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("game_class", [Catch, Cut])
def test_one_actor_learner_equals_a_sequential_program(tmp_path, monkeypatch, game_class):
    """One set of parameters, no processes, targets in plain numbers, RMSProp by hand: the same
    parameters after 20 updates."""
    lr, eps, clip, gamma, ent_coef, vf_coef = 1e-2, 1e-3, 0.1, 0.9, 0.02, 0.3
    flags = f"--num-envs 1 --total-timesteps 100 --seed 3 --learning-rate {lr} --gamma {gamma}"
    flags += f" --optimizer-epsilon {eps} --ent-coef {ent_coef} --vf-coef {vf_coef}"
    flags += f" --max-grad-norm {clip}"
    _, checkpoint = trained(tmp_path, monkeypatch, game_class, flags)
    assert checkpoint["global_step"] == 100

    env = game_class(None)
    torch.manual_seed(3)
    agent = a3c_atari.Agent(env.action_space.n, a3c_atari.Args())
    game_seed, network_seed = map(int, np.random.SeedSequence([3, 0, 0]).generate_state(2))
    torch.manual_seed(network_seed)
    obs, _ = env.reset(seed=game_seed)
    mean_squares = [torch.ones_like(p) for p in agent.parameters()]
    for update in range(20):
        log_policies, values, actions, rewards = [], [], [], []
        after = []  # the value that ends a return, or None
        for _ in range(5):
            logits, value = agent(torch.tensor(obs[None]))
            action = int((logits.softmax(-1) / torch.empty_like(logits).exponential_()).argmax())
            obs, reward, terminated, truncated, _ = env.step(action)
            log_policies.append(logits[0].log_softmax(-1))
            values.append(value[0])
            actions.append(action)
            rewards.append(min(max(reward, -1.0), 1.0))
            after.append(
                0.0
                if terminated
                else agent(torch.tensor(obs[None]))[1].item()
                if truncated
                else None
            )
            if terminated or truncated:
                obs, _ = env.reset()
        target, loss = agent(torch.tensor(obs[None]))[1].item(), 0.0
        for t in (4, 3, 2, 1, 0):
            target = rewards[t] + gamma * (target if after[t] is None else after[t])
            advantage = target - values[t].item()
            entropy = -(log_policies[t].exp() * log_policies[t]).sum()
            loss -= log_policies[t][actions[t]] * advantage / 5
            loss += (vf_coef * (target - values[t]) ** 2 - ent_coef * entropy) / 5
        gradients = torch.autograd.grad(loss, list(agent.parameters()))
        norm = sum(float((g**2).sum()) for g in gradients) ** 0.5
        with torch.no_grad():
            for p, g, mean_square in zip(agent.parameters(), gradients, mean_squares):
                g = g * min(1.0, clip / norm)
                mean_square += 0.01 * (g**2 - mean_square)
                p -= lr * (1 - 5 * update / 100) * g / (mean_square + eps) ** 0.5
    torch.manual_seed(3)
    initial = a3c_atari.Agent(env.action_space.n, a3c_atari.Args())
    for name, p in agent.state_dict().items():
        q = checkpoint["agent"][name]
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6, msg=name)
    assert all((p - q).abs().max() > 2e-5 for p, q in zip(initial.parameters(), agent.parameters()))


def test_updates_reach_the_shared_memory():
    """Two actor-learners change the parameters and mean squares that this process sees, each one
    counts its own steps."""
    args = a3c_atari.Args(num_envs=2)
    agent = a3c_atari.Agent(3, args)
    optimizer = a3c_atari.RMSpropTF(agent.parameters(), lr=1e-3, eps=1e-5)
    shared = a3c_atari.Shared(agent, optimizer, num_envs=2)
    mean_squares = [state["square_avg"] for state in optimizer.state.values()]
    processes, connections = [], []

    def play(i, updates):
        before = [x.clone() for x in (*agent.parameters(), *mean_squares)]
        connections.append(mp.Pipe(duplex=False))
        work = (i, 0, args, Catch, 0, shared, connections[-1][1])
        context = mp.get_context("forkserver")
        processes.append(context.Process(target=a3c_atari.actor_learner, args=work))
        processes[-1].start()
        deadline = time.monotonic() + 60
        while shared.steps[i] < 5 * updates and time.monotonic() < deadline:
            time.sleep(0.01)
        after = (*agent.parameters(), *mean_squares)
        assert shared.steps[i] >= 5 * updates
        assert all((a != b).any() for a, b in zip(before, after))

    try:
        play(0, 5)
        assert shared.steps[1] == 0 and not shared.losses[1].any() and shared.losses[0].all()
        play(1, 5)
        assert shared.losses.all()
    finally:
        shared.stop.fill_(True)  # they would play on, and this process would wait for them
    for process in processes:
        process.join(10)
        assert process.exitcode == 0


def test_a_stop_before_the_first_update_logs_no_point(tmp_path, monkeypatch):
    """It would have no speed and no losses; the run is resumed from its checkpoint."""
    start = a3c_atari.ActorPool.start

    def start_stopped(actors):
        actors.shared.stop.fill_(True)
        start(actors)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(a3c_atari.ActorPool, "start", start_stopped)
    monkeypatch.setattr(a3c_atari, "catch_stop_signals", lambda: [(0.0, signal.SIGINT)])
    with pytest.raises(SystemExit, match="130"):
        a3c_atari.train(a3c_atari.parse_args(small(a3c_atari)), Catch)
    run_dir = only_run(tmp_path)
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["global_step"] == 0
    assert not list(run_dir.glob("events*"))


@pytest.mark.slow
def test_concurrent_updates_stay_finite(tmp_path, monkeypatch):
    """Four actor-learners on as many cores as there are, at a high learning rate; none is left
    behind."""
    flags = "--num-envs 4 --total-timesteps 4000 --learning-rate 1e-3 --log-interval 1000"
    run_dir, checkpoint = trained(tmp_path, monkeypatch, Catch, flags)
    assert all(p.isfinite().all() for p in checkpoint["agent"].values())
    curves = scalars(run_dir)
    assert {*a3c_atari.LOSSES, "charts/SPS", "charts/episodic_return"} <= curves.keys()
    assert "charts/live_units_3" in curves
    assert np.isfinite([value for curve in curves.values() for _, value in curve]).all()
    assert not multiprocessing.active_children()


def test_checkpoints_cannot_change_while_they_are_written(tmp_path, monkeypatch):
    """The actor-learners go on meanwhile, and a change after the checksum damages the file."""
    serialize = a3c_atari.serialize
    is_shared = []

    def serialize_and_look(checkpoint):
        mean_squares = [x["square_avg"] for x in checkpoint["optimizer"]["state"].values()]
        tensors = [*checkpoint["agent"].values(), *mean_squares]
        is_shared.extend(tensor.is_shared() for tensor in tensors)
        return serialize(checkpoint)

    monkeypatch.setattr(a3c_atari, "serialize", serialize_and_look)
    flags = "--num-envs 2 --total-timesteps 2000 --checkpoint-interval 20"
    _, checkpoint = trained(tmp_path, monkeypatch, Catch, flags)
    num_tensors = len(checkpoint["agent"]) + len(checkpoint["optimizer"]["state"])
    assert len(is_shared) >= 2 * num_tensors  # at least one checkpoint before the last
    assert not any(is_shared)


def test_learning_rate_falls_with_the_steps_of_all(tmp_path, monkeypatch):
    flags = "--total-timesteps 2000 --log-interval 100 --learning-rate 3e-4"
    run_dir, _ = trained(tmp_path, monkeypatch, Catch, flags)
    for step, lr in scalars(run_dir)["charts/learning_rate"]:
        # A few updates go on while it is logged
        assert lr == pytest.approx(3e-4 * (1 - step / 2000), abs=3e-4 * 60 / 2000)
