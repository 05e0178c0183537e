"""The value-based scripts: targets, exploration, target network and loss against numbers worked out
by hand."""

import importlib
import re
import shlex
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Q_SCRIPTS, ROOT, small
from games import Scripted, scripted_steps

import pqn_atari

ONE_STEP = Q_SCRIPTS[1:]


@pytest.fixture(params=Q_SCRIPTS)
def script(request):
    return importlib.import_module(request.param)


@pytest.mark.parametrize("name", ONE_STEP)
def test_targets_by_hand(name):
    """gamma 0.5: goes on, goes on with a reward, terminated, truncated, and both at once, which is
    terminated."""
    compute_targets = importlib.import_module(name).compute_targets
    rewards = torch.tensor([[0.0, 1.0, -1.0, 1.0, 1.0]])
    terminations = torch.tensor([[False, False, True, False, True]])
    truncations = torch.tensor([[False, False, False, True, True]])
    final_values = torch.tensor([[1e6, 1e6, 1e6, 40.0, 40.0]])
    next_values = torch.tensor([[8.0, 8.0, 1e6, 1e6, 1e6]])
    targets = compute_targets(rewards, terminations, truncations, final_values, next_values, 0.5)
    assert targets.tolist() == [[4.0, 5.0, -1.0, 21.0, 1.0]]


def test_one_step_returns_are_the_one_step_targets():
    """n-step Q's returns of a single step and one-step Q's targets are written differently, but the
    same."""
    nstep, one_step = (importlib.import_module(name) for name in Q_SCRIPTS[:2])
    generator = torch.Generator().manual_seed(0)
    rewards, final_values, next_values = torch.randn(3, 7, 50, generator=generator)
    terminations, truncations = torch.rand(2, 7, 50, generator=generator) < 0.3
    targets = one_step.compute_targets(
        rewards, terminations, truncations, final_values, next_values, 0.9
    )
    for t in range(7):
        step = (x[t : t + 1] for x in (rewards, terminations, truncations, final_values))
        torch.testing.assert_close(nstep.compute_returns(*step, next_values[t], 0.9)[0], targets[t])


def test_loss_and_gradient_without_autograd(script):
    generator = torch.Generator().manual_seed(0)
    q_values = torch.randn(5, 8, 6, generator=generator, dtype=torch.float64).requires_grad_()
    actions = torch.randint(6, (5, 8), generator=generator)
    targets = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    loss = script.compute_loss(q_values, actions, targets)
    loss.backward()
    q, a, y = q_values.detach().numpy(), np.eye(6)[actions.numpy()], targets.numpy()
    error = (q * a).sum(-1) - y
    np.testing.assert_allclose(loss.item(), np.mean(error**2), rtol=1e-10)
    np.testing.assert_allclose(q_values.grad.numpy(), 2 * error[..., None] * a / 40, rtol=1e-10)


def test_epsilon_greedy(script):
    """Random with probability epsilon, each game with its own; a random action may be the best
    one."""
    torch.manual_seed(0)
    epsilons = torch.tensor([0.0, 0.1, 0.5, 1.0]).repeat_interleave(100_000)
    q_values = torch.tensor([0.0, 3.0, 2.0, 1.0]).expand(len(epsilons), 4)
    actions = script.epsilon_greedy(q_values, epsilons).view(4, 100_000)
    shares = torch.stack([(actions == a).float().mean(1) for a in range(4)], 1)
    for epsilon, share in zip((0.0, 0.1, 0.5, 1.0), shares):
        expected = torch.tensor([0.25 * epsilon] * 4) + torch.tensor([0.0, 1 - epsilon, 0.0, 0.0])
        torch.testing.assert_close(share, expected, rtol=0, atol=0.005)


class Reader(torch.nn.Module):
    """In the network's place: Q(s, a) is the number that Scripted wrote on the observation, plus
    0.5 for action 1, the best."""

    def __init__(self, *args):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, obs):
        number = obs[:, 3, 0, 0].float() * self.weight
        return torch.stack([number, number + 0.5], 1)


@pytest.fixture
def recorded(script, monkeypatch, tmp_path):
    """recorded(*flags) trains on Scripted with Reader and returns, per update, what reached the
    targets and the loss, the weight of network and target network at the time of the loss; and the
    epsilons of every choice."""
    rollouts, epsilons, agents, targets = [], [], [], []
    name = "compute_returns" if hasattr(script, "compute_returns") else "compute_targets"
    compute_targets, compute_loss, epsilon_greedy = (
        getattr(script, name),
        script.compute_loss,
        script.epsilon_greedy,
    )

    def record_targets(*inputs):
        names = ("rewards", "terminations", "truncations", "final_values", "next_values", "gamma")
        rollouts.append({k: x.clone() if torch.is_tensor(x) else x for k, x in zip(names, inputs)})
        return compute_targets(*inputs)

    def record_loss(q_values, actions, returns):
        rollouts[-1] |= {
            "q_values": q_values.detach().clone(),
            "actions": actions.clone(),
            "targets": returns.clone(),
        }
        rollouts[-1] |= {
            "target_weight": targets[0].weight.item(),
            "weight": agents[0].weight.item(),
        }
        return compute_loss(q_values, actions, returns)

    def record_epsilons(q_values, eps):
        epsilons.append(eps.clone())
        return epsilon_greedy(q_values, eps)

    def deepcopy(agent):
        agents.append(agent)
        targets.append(Reader())
        targets[0].load_state_dict(agent.state_dict())
        return targets[0]

    monkeypatch.setattr(script, name, record_targets)
    monkeypatch.setattr(script, "compute_loss", record_loss)
    monkeypatch.setattr(script, "epsilon_greedy", record_epsilons)
    monkeypatch.setattr(script, "copy", SimpleNamespace(deepcopy=deepcopy))
    monkeypatch.setattr(script, "Agent", Reader)
    monkeypatch.setattr(Scripted, "created", 0)
    monkeypatch.chdir(tmp_path)

    def train(*flags):
        flags = ["--num-workers", "0", "--num-steps", "5", *flags]
        flags.append("--no-subtract-mean-screen")  # Reader has none
        script.train(script.parse_args([*small(script), *flags]), Scripted)
        return rollouts, epsilons

    return train


@pytest.mark.parametrize("num_steps", [1, 5])
def test_rollout_reaches_the_targets_and_the_loss_unmixed(script, recorded, num_steps):
    """Every Q-value belongs to the observation acted on, every reward to its action, what follows a
    step to the observation after it, at a time limit to the game's last one. Sarsa's targets differ
    from Q's exactly where the next action is not the best."""
    flags = [
        "--total-timesteps",
        "400",
        "--learning-rate",
        "0",
        "--exploration-steps",
        "1000000",
        "--num-steps",
        str(num_steps),
    ]
    rollouts, _ = recorded(*flags)
    assert len(rollouts) == 100 / num_steps
    sarsa, nstep = "sarsa" in script.__name__, "nstep" in script.__name__
    games, differing = scripted_steps(4), 0
    for i, r in enumerate(rollouts):
        steps = list(islice(games, num_steps))
        for t, (shown, last_shown, over, cut, next_shown) in enumerate(steps):
            np.testing.assert_array_equal(r["q_values"][t], np.stack([shown, shown + 0.5], 1))
            np.testing.assert_array_equal(
                r["rewards"][t], np.where(r["actions"][t] == 1, 1.0, -0.5)
            )
            np.testing.assert_array_equal(r["terminations"][t], over)
            np.testing.assert_array_equal(r["truncations"][t], cut)
            final = r["final_values"][t].numpy()[cut] - last_shown[cut]
            # Sarsa's action is drawn but never taken
            assert np.isin(final, (0, 0.5)).all() if sarsa else (final == 0.5).all()
            last = t == num_steps - 1
            if sarsa and not (last and r is rollouts[-1]):
                taken = (rollouts[i + 1]["actions"][0] if last else r["actions"][t + 1]).numpy()
                np.testing.assert_array_equal(r["next_values"][t], next_shown + 0.5 * taken)
                differing += (taken == 0).sum()
            elif not nstep and not sarsa:
                np.testing.assert_array_equal(r["next_values"][t], next_shown + 0.5)
        if nstep:
            np.testing.assert_array_equal(r["next_values"], steps[-1][-1] + 0.5)
        after = r["next_values"].numpy()
        for t, (_, _, over, cut, _) in reversed(list(enumerate(steps))):
            after = after if nstep else r["next_values"][t].numpy()
            after = r["rewards"][t].numpy() + 0.99 * np.where(
                over, 0, np.where(cut, r["final_values"][t], after)
            )
            np.testing.assert_allclose(r["targets"][t], after, rtol=1e-5, atol=1e-5)
    assert not sarsa or differing > 50


def test_epsilon_of_each_game_over_time(recorded):
    """From 1 to its final epsilon within --exploration-steps, then constant; final epsilons go
    round the games."""
    _, epsilons = recorded(
        "--total-timesteps",
        "400",
        "--exploration-steps",
        "200",
        "--final-epsilons",
        "0.1",
        "0.02",
        "0.5",
        "--learning-rate",
        "0",
    )
    final = torch.tensor([0.1, 0.02, 0.5, 0.1])
    seen = torch.stack(epsilons).unique(dim=0).flip(0)
    assert len(seen) == 11  # constant within an update of 20 steps, and from 200 steps on
    for update, eps in enumerate(seen):
        torch.testing.assert_close(eps, 1 + (final - 1) * update / 10)


def test_command_of_the_papers_setting_has_its_distribution_of_epsilons(script):
    """{0.1, 0.01, 0.5} with probabilities {0.4, 0.3, 0.3}, over 10 games as exactly as it goes."""
    page = (ROOT / "docs" / "algorithms.md").read_text()
    (command,) = set(re.findall(r"^python nstep_q_atari.py (.*--final-epsilons.*)", page, re.M))
    args = script.parse_args(shlex.split(command))
    assert Counter(args.final_epsilons) == {0.1: 4, 0.01: 3, 0.5: 3}
    assert (args.exploration_steps, args.target_interval) == (1_000_000, 10_000)


@pytest.mark.parametrize("flags, updates", [(["--target-interval", "100"], 5), ([], 1)])
def test_target_network_changes_only_when_due(recorded, flags, updates):
    """By default after every update, so that there is none."""
    rollouts, _ = recorded("--total-timesteps", "400", "--optimizer", "rmsprop", *flags)
    weights = [r["weight"] for r in rollouts]
    assert len(set(weights)) == 20  # the network itself changes in every update
    for update, r in enumerate(rollouts):
        assert r["target_weight"] == weights[update // updates * updates]


# PQN ----------------------------------------------------------------------------------------------


def test_lambda_returns_by_hand():
    """gamma 0.5, lambda 0.75, three steps of a game that goes on, and of three in which the second
    step ends a life, ends by a time limit, or by both at once."""
    ends = {
        "terminations": torch.tensor([[0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool),
        "truncations": torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.bool),
        "final_values": torch.full((3, 4), 16.0),
    }
    rewards = torch.tensor([[1.0], [0.0], [-1.0]]).expand(3, 4)
    values = torch.tensor([[1e6], [4.0], [8.0], [2.0]]).expand(4, 4)
    returns = pqn_atari.compute_returns(rewards, **ends, values=values, gamma=0.5, q_lambda=0.75)
    # -1 + 0.5 * 2 = 0; 0 + 0.5 (0.25 * 8 + 0.75 * 0) = 1; 1 + 0.5 (0.25 * 4 + 0.75 * 1) = 1.875
    assert returns[:, 0].tolist() == [1.875, 1.0, 0.0]
    assert returns[:, 1].tolist() == [1.5, 0.0, 0.0]
    assert returns[:, 2].tolist() == [4.5, 8.0, 0.0]
    assert returns[:, 3].tolist() == [1.5, 0.0, 0.0]


def test_lambda_1_is_n_step_q_and_lambda_0_is_one_step_q():
    nstep, one_step = (importlib.import_module(name) for name in Q_SCRIPTS[:2])
    generator = torch.Generator().manual_seed(0)
    rewards, final_values = torch.randn(2, 7, 50, generator=generator)
    values = torch.randn(8, 50, generator=generator)
    terminations, truncations = torch.rand(2, 7, 50, generator=generator) < 0.3
    steps = (rewards, terminations, truncations, final_values)
    torch.testing.assert_close(
        pqn_atari.compute_returns(*steps, values, 0.9, q_lambda=1),
        nstep.compute_returns(*steps, values[-1], 0.9),
    )
    torch.testing.assert_close(
        pqn_atari.compute_returns(*steps, values, 0.9, q_lambda=0),
        one_step.compute_targets(*steps, values[1:], 0.9),
    )


def test_each_epoch_of_pqn_learns_each_step_once(monkeypatch, tmp_path):
    """What reaches the targets belongs to the observations acted on, and every observation comes
    back once per epoch, in another order, with its own action and return."""
    rollouts, minibatches = [], []
    compute_returns, compute_loss = pqn_atari.compute_returns, pqn_atari.compute_loss

    def record_returns(*inputs):
        returns = compute_returns(*inputs)
        rollouts.append((*inputs[:5], returns.clone()))
        return returns

    def record_loss(q_values, actions, returns):
        minibatches.append((q_values.detach()[:, 0].clone(), actions, returns))
        return compute_loss(q_values, actions, returns)

    monkeypatch.setattr(pqn_atari, "compute_returns", record_returns)
    monkeypatch.setattr(pqn_atari, "compute_loss", record_loss)
    monkeypatch.setattr(pqn_atari, "Agent", Reader)
    monkeypatch.setattr(Scripted, "created", 0)
    monkeypatch.chdir(tmp_path)
    flags = "--num-workers 0 --num-epochs 3 --no-subtract-mean-screen --learning-rate 0"
    flags += " --total-timesteps 400 --exploration-steps 1000000"
    pqn_atari.train(pqn_atari.parse_args([*small(pqn_atari), *flags.split()]), Scripted)
    assert len(rollouts) == 20 and len(minibatches) == 20 * 3 * 2
    games = scripted_steps(4)
    for i, (rewards, terminations, truncations, final_values, values, returns) in enumerate(
        rollouts
    ):
        steps = list(islice(games, 5))
        expected = []
        for t, (shown, last_shown, over, cut, _) in enumerate(steps):
            np.testing.assert_array_equal(values[t], shown + 0.5)
            np.testing.assert_array_equal(terminations[t], over)
            np.testing.assert_array_equal(truncations[t], cut)
            np.testing.assert_array_equal(final_values[t].numpy()[cut], last_shown[cut] + 0.5)
            actions = (rewards[t].numpy() == 1).astype(int)
            expected += zip(shown, actions, returns[t].tolist())
        np.testing.assert_array_equal(values[-1], steps[-1][-1] + 0.5)
        orders = []
        for epoch in range(3):
            first = 6 * i + 2 * epoch
            epoch_steps = [
                list(zip(*(x.tolist() for x in minibatch)))
                for minibatch in minibatches[first : first + 2]
            ]
            assert [len(part) for part in epoch_steps] == [10, 10]
            orders.append(epoch_steps[0] + epoch_steps[1])
            assert sorted(orders[-1]) == sorted(expected)
        assert orders[0] != orders[1] != orders[2]


def test_pqn_learns_from_each_minibatch(monkeypatch, tmp_path):
    """Two epochs of two minibatches are four steps of the optimizer."""
    steps = []
    make_optimizer = pqn_atari.make_optimizer

    def count_steps(agent, args):
        optimizer = make_optimizer(agent, args)
        optimizer.register_step_post_hook(lambda *_: steps.append(agent.q.weight.sum().item()))
        return optimizer

    monkeypatch.setattr(pqn_atari, "make_optimizer", count_steps)
    monkeypatch.chdir(tmp_path)
    args = [*small(pqn_atari), "--num-workers", "0", "--total-timesteps", "40"]
    pqn_atari.train(pqn_atari.parse_args(args), Scripted)
    assert len(steps) == len(set(steps)) == 2 * 4
