"""PAAC: returns, loss, gradients and optimiser against numbers worked out by hand or by an
independent reference."""

import importlib
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, VALUE_BASED, small
from games import Scripted, scripted_steps

import paac_atari

TORCH = [script for script in SCRIPTS if script != "paac_atari_jax"]

# One game over five steps: rewards, what ends where, what follows the last step, and the returns
# worked out by hand (gamma 0.5; the value of the last observation before a time limit is 40).
NOTHING, TERMINATED, TRUNCATED = 0, 1, 2  # a lost life terminates, too
HAND_COMPUTED = {
    "goes on": ([1, 0, 0, 2, 0], [0, 0, 0, 0, 0], 8.0, [1.5, 1.0, 2.0, 4.0, 4.0]),
    "terminates": (
        [1, 0, 4, 2, 0],
        [0, 0, TERMINATED, 0, 0],
        8.0,
        [2.0, 2.0, 4.0, 4.0, 4.0],
    ),
    "is truncated": (
        [1, 0, 4, 2, 0],
        [0, 0, TRUNCATED, 0, 0],
        8.0,
        [7.0, 12.0, 24.0, 4.0, 4.0],
    ),
    "terminates at the last step": (
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, TERMINATED],
        8.0,
        [0.0625, 0.125, 0.25, 0.5, 1.0],
    ),
    "is truncated at the last step": (
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, TRUNCATED],
        8.0,
        [1.3125, 2.625, 5.25, 10.5, 21.0],
    ),
    "ends twice": (
        [0, 1, 0, 1, 0],
        [0, TERMINATED, 0, TRUNCATED, 0],
        8.0,
        [0.5, 1.0, 10.5, 21.0, 4.0],
    ),
}


def returns_of(rewards, ends, next_value, final_value=40.0, gamma=0.5):
    ends = torch.tensor(ends)
    # Where nothing was truncated it must not matter
    final_values = torch.where(ends == TRUNCATED, final_value, -1e6)
    return paac_atari.compute_returns(
        torch.tensor(rewards, dtype=torch.float32),
        ends == TERMINATED,
        ends == TRUNCATED,
        final_values,
        next_value,
        gamma,
    )


@pytest.mark.parametrize("case", HAND_COMPUTED)
def test_returns_by_hand(case):
    rewards, ends, next_value, expected = HAND_COMPUTED[case]
    returns = returns_of([[r] for r in rewards], [[e] for e in ends], torch.tensor([next_value]))
    assert returns.squeeze(1).tolist() == expected


def test_terminated_and_truncated_at_once_is_terminated():
    yes = torch.tensor([[True]])
    returns = paac_atari.compute_returns(
        torch.ones(1, 1), yes, yes, torch.full((1, 1), 9.0), torch.tensor([9.0]), 0.99
    )
    assert returns.item() == 1.0


def test_returns_against_their_definition():
    """Against the sum of discounted rewards up to the end of the episode or rollout, each written
    out forwards."""
    generator = np.random.default_rng(0)
    num_steps, num_envs, gamma = 20, 50, 0.97
    rewards = generator.normal(size=(num_steps, num_envs))
    ends = generator.choice(
        [NOTHING, TERMINATED, TRUNCATED], p=[0.8, 0.1, 0.1], size=(num_steps, num_envs)
    )
    final_values, next_value = (
        generator.normal(size=(num_steps, num_envs)),
        generator.normal(size=num_envs),
    )
    expected = np.zeros((num_steps, num_envs))
    for start in range(num_steps):
        for game in range(num_envs):
            for t in range(start, num_steps):
                expected[start, game] += gamma ** (t - start) * rewards[t, game]
                if ends[t, game] == TRUNCATED:
                    expected[start, game] += gamma ** (t - start + 1) * final_values[t, game]
                if ends[t, game] != NOTHING:
                    break
            else:
                expected[start, game] += gamma ** (num_steps - start) * next_value[game]
    inputs = (rewards, ends == TERMINATED, ends == TRUNCATED, final_values, next_value)
    returns = paac_atari.compute_returns(*map(torch.from_numpy, inputs), gamma)
    np.testing.assert_allclose(returns.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_loss_and_gradient_without_autograd():
    """Against the formulas with the derivatives of softmax, entropy and square written out."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 8, 6, generator=generator, dtype=torch.float64).requires_grad_()
    values = torch.randn(5, 8, generator=generator, dtype=torch.float64).requires_grad_()
    actions = torch.randint(6, (5, 8), generator=generator)
    returns = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    loss, policy_loss, value_loss, entropy = paac_atari.compute_loss(
        logits, values, actions, returns, 0.02, 0.3
    )
    loss.backward()

    z, v, r, a = logits.detach().numpy(), values.detach().numpy(), returns.numpy(), actions.numpy()
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    h = -(p * np.log(p)).sum(-1)
    chosen = np.eye(6)[a]
    expected_policy_loss = np.mean(-np.log((p * chosen).sum(-1)) * (r - v))
    np.testing.assert_allclose(policy_loss.item(), expected_policy_loss, rtol=1e-10)
    np.testing.assert_allclose(value_loss.item(), np.mean((r - v) ** 2), rtol=1e-10)
    np.testing.assert_allclose(entropy.item(), np.mean(h), rtol=1e-10)
    np.testing.assert_allclose(
        loss.item(),
        expected_policy_loss - 0.02 * np.mean(h) + 0.3 * np.mean((r - v) ** 2),
        rtol=1e-10,
    )
    # D/dz of -log p(a) times the advantage, a constant
    grad_policy = (p - chosen) * (r - v)[..., None]
    grad_entropy = -p * (np.log(p) + h[..., None])  # dH/dz
    np.testing.assert_allclose(
        logits.grad.numpy(), (grad_policy - 0.02 * grad_entropy) / 40, rtol=1e-8, atol=1e-12
    )
    np.testing.assert_allclose(values.grad.numpy(), 0.3 * 2 * (v - r) / 40, rtol=1e-10)


def test_actions_are_those_of_multinomial():
    logits = 3 * torch.randn(64, 18)
    torch.manual_seed(1)
    actions = paac_atari.sample_actions(logits)
    torch.manual_seed(1)
    expected = torch.multinomial(logits.softmax(-1), num_samples=1).squeeze(-1)
    assert actions.tolist() == expected.tolist()


def test_rmsprop_by_hand():
    """mean square 1 -> 0.9 * 1 + 0.1 * 4 = 1.3 -> 0.9 * 1.3 + 0.1 * 1 = 1.27; epsilon 0.14, then
    0.42 inside the root."""
    weight = torch.nn.Parameter(torch.tensor([10.0], dtype=torch.float64))
    optimizer = paac_atari.RMSpropTF([weight], lr=0.6, alpha=0.9, eps=0.14)
    weight.grad = torch.tensor([2.0], dtype=torch.float64)
    optimizer.step()
    assert weight.item() == pytest.approx(10 - 0.6 * 2 / 1.2, rel=1e-12)  # sqrt(1.3 + 0.14) = 1.2
    weight.grad = torch.tensor([-1.0], dtype=torch.float64)
    optimizer.param_groups[0]["eps"] = 0.42
    optimizer.step()
    assert weight.item() == pytest.approx(9 + 0.6 / 1.3, rel=1e-12)  # sqrt(1.27 + 0.42) = 1.3


@pytest.mark.parametrize(
    "arch, sizes",
    [
        ("nips", [4112, 8224, 663808, 1542, 257]),
        ("nature", [8224, 32832, 36928, 1606144, 3078, 513]),
    ],
)
@pytest.mark.parametrize("paper", [True, False])
def test_network(arch, sizes, paper):
    """The papers' layers, with a LayerNorm unless `paper`; a nearly uniform first policy; an
    observation alone gives what it gives in a batch."""
    torch.manual_seed(0)
    args = paac_atari.Args(arch=arch, layer_norm=not paper)
    agent = paac_atari.Agent(6, args)
    layers = [layer for layer in agent.modules() if hasattr(layer, "weight")]
    norms = [layer for layer in layers if isinstance(layer, torch.nn.LayerNorm)]
    assert len(norms) == (0 if paper else 1)
    numbers = [layer.weight.numel() + layer.bias.numel() for layer in layers if layer not in norms]
    assert numbers == sizes
    obs = torch.randint(256, (6, 4, 84, 84), dtype=torch.uint8)
    logits, values = agent(obs)
    assert logits.shape == (6, 6) and values.shape == (6,)
    assert (logits.softmax(-1) - 1 / 6).abs().max() < 0.01
    for game in range(6):  # each alone gives what it gave in the batch
        alone, _ = agent(obs[game : game + 1])
        torch.testing.assert_close(alone[0], logits[game], rtol=1e-4, atol=1e-6)


def hidden_outputs(agent, obs):
    """What the heads get. The heads' own outputs are too small to compare, as PAAC starts."""
    outputs = []
    hook = agent.trunk.register_forward_hook(lambda trunk, inputs, output: outputs.append(output))
    agent(obs)
    hook.remove()
    return outputs[0]


@pytest.mark.parametrize("script", TORCH, indirect=True)
@pytest.mark.parametrize("arch", ["nips", "nature"])
def test_mean_screen_and_scale(script, arch):
    """What is added to all screens and to their mean does not matter; with layer_norm the size of
    the hidden layer's weights does not matter either, without it it does."""
    obs = torch.randint(200, (6, 4, 84, 84), dtype=torch.uint8)
    background = torch.randint(56, (84, 84), dtype=torch.uint8)
    for layer_norm in (True, False):
        torch.manual_seed(0)
        agent = script.Agent(6, script.Args(arch=arch, layer_norm=layer_norm))
        before = hidden_outputs(agent, obs)
        brighter = hidden_outputs(agent, obs + background)
        assert not torch.allclose(before, brighter, rtol=1e-3, atol=1e-4)
        agent.mean_screen += background
        same = hidden_outputs(agent, obs + background)
        torch.testing.assert_close(before, same, rtol=1e-3, atol=1e-4)
        agent.mean_screen.zero_()
        hidden = next(layer for layer in agent.trunk if isinstance(layer, torch.nn.Linear))
        hidden.weight.data *= 3
        larger = hidden_outputs(agent, obs)
        assert torch.allclose(before, larger, rtol=1e-3, atol=1e-4) == layer_norm


@pytest.mark.parametrize("script", TORCH, indirect=True)
@pytest.mark.parametrize("arch, layers", [("nips", 3), ("nature", 4)])
def test_live_units(script, arch, layers):
    """A quarter of each layer's units is dead; then one of them answers to one observation."""
    agent = script.Agent(6, script.Args(arch=arch))
    biased = [layer for layer in agent.trunk if hasattr(layer, "weight")]
    with torch.no_grad():
        for layer in biased:
            layer.weight.zero_()
            layer.bias.fill_(1)
            layer.bias[: len(layer.bias) // 4] = -1
        biased[0].weight[0] = 1  # not enough on a black screen
    obs = torch.zeros(8, 4, 84, 84, dtype=torch.uint8)
    shares = script.live_units(agent, obs)
    expected = {f"charts/live_units_{n}": 0.75 for n in range(1, layers + 1)}
    assert {tag: share.item() for tag, share in shares.items()} == expected
    obs[5, 0, :8, :8] = 255
    one_more = script.live_units(agent, obs)["charts/live_units_1"]
    assert one_more == 0.75 + 1 / len(biased[0].bias)


@pytest.mark.parametrize("script", TORCH, indirect=True)
@pytest.mark.parametrize("arch, hidden", [("nips", "trunk.5"), ("nature", "trunk.7")])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_network_init_by_default(script, arch, hidden, layer_norm):
    """Orthogonal: divided by the gain, W W' or, where the layer is wider than deep, W' W is
    the identity."""
    is_larger = layer_norm and script.__name__ not in VALUE_BASED
    gains = {"policy": 0.01, "value": 1.0, "q": 1.0, hidden: 4.5 if is_larger else 2**0.5}
    agent = script.Agent(6, script.Args(arch=arch, layer_norm=layer_norm))
    for name, layer in agent.named_modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            gain = gains.get(name, 2**0.5)
            weight = layer.weight.detach().flatten(1) / gain
            weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
            torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight)), rtol=0, atol=1e-5)
            assert not layer.bias.any()


@pytest.mark.parametrize("script", TORCH, indirect=True)
def test_network_init_of_the_paper(script):
    torch.manual_seed(0)
    for layer in script.Agent(6, script.Args(init="uniform")).modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            bound = layer.weight[0].numel() ** -0.5
            for p in (layer.weight, layer.bias):
                assert p.abs().max() <= bound
            assert layer.weight.abs().max() > 0.97 * bound or layer.weight.numel() < 1000
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


class Reader(torch.nn.Module):
    """In the network's place: the value of an observation is the number Scripted wrote on it; both
    actions are equally likely."""

    def __init__(self, *args):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, obs):
        value = obs[:, 3, 0, 0].float() * self.weight
        return torch.zeros(len(value), 2) * self.weight, value


@pytest.mark.parametrize("num_steps", [4, 5])
def test_rollout_reaches_the_returns_and_the_loss_unmixed(monkeypatch, tmp_path, num_steps):
    """Every value belongs to the observation acted on, every reward to its action, the bootstrap to
    the observation after the last step and, at a time limit, to the game's last one. Scripted's
    observations are numbered, so all of it is known."""
    rollouts = []

    def compute_returns(*inputs):
        rollouts.append([x.detach().clone() if torch.is_tensor(x) else x for x in inputs])
        return paac_compute_returns(*inputs)

    def compute_loss(logits, values, actions, returns, *coefficients):
        rollouts[-1] += [values.detach().clone(), actions.clone(), returns.clone(), coefficients]
        return paac_compute_loss(logits, values, actions, returns, *coefficients)

    paac_compute_returns, paac_compute_loss = paac_atari.compute_returns, paac_atari.compute_loss
    monkeypatch.setattr(paac_atari, "compute_returns", compute_returns)
    monkeypatch.setattr(paac_atari, "compute_loss", compute_loss)
    monkeypatch.setattr(paac_atari, "Agent", Reader)
    monkeypatch.setattr(Scripted, "created", 0)
    monkeypatch.chdir(tmp_path)
    flags = f"--num-workers 0 --num-steps {num_steps} --total-timesteps 240 --learning-rate 0"
    flags += " --no-subtract-mean-screen"  # Reader has none
    if num_steps == 4:
        flags += " --ent-coef 0.03"
    args = paac_atari.parse_args([*small(paac_atari), *flags.split()])
    paac_atari.train(args, Scripted)

    assert len(rollouts) == -(-240 // (4 * num_steps))
    games = scripted_steps(4)
    for (
        rewards,
        terminations,
        truncations,
        final_values,
        next_value,
        gamma,
        values,
        actions,
        returns,
        coefficients,
    ) in rollouts:
        assert gamma == 0.99
        assert coefficients == (0.0067 if num_steps == 5 else 0.03, 0.5)
        steps = list(islice(games, num_steps))
        for t, (shown, last_shown, over, cut, _) in enumerate(steps):
            np.testing.assert_array_equal(values[t], shown)
            # 3 was clipped to 1
            np.testing.assert_array_equal(rewards[t], np.where(actions[t] == 1, 1.0, -0.5))
            np.testing.assert_array_equal(terminations[t], over)
            np.testing.assert_array_equal(truncations[t], cut)
            np.testing.assert_array_equal(final_values[t][cut], last_shown[cut])
        after = steps[-1][-1]
        np.testing.assert_array_equal(next_value, after)
        for t, (_, last_shown, over, cut, _) in reversed(list(enumerate(steps))):
            after = rewards[t].numpy() + 0.99 * np.where(over, 0, np.where(cut, last_shown, after))
            np.testing.assert_allclose(returns[t], after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "script, learning_rate",
    [
        ("paac_atari", 0.0015),
        ("paac_atari_jax", 0.0015),
        ("paac_atari_multigpu", 0.0015),
        ("paac", 0.003),
        ("nstep_q_atari", 0.0004),
        ("one_step_q_atari", 0.0004),
        ("one_step_sarsa_atari", 0.0004),
        ("pqn_atari", 0.00025),
    ],
)
def test_more_games_make_larger_steps(script, learning_rate):
    Args = importlib.import_module(script).Args
    assert Args().learning_rate == Args(num_envs=8).learning_rate == learning_rate
    assert Args(num_envs=128).learning_rate == pytest.approx(2 * learning_rate)
    assert Args(num_envs=128, learning_rate=0.1).learning_rate == 0.1


@pytest.mark.parametrize("script", ["paac", "paac_atari"])
def test_recorded_passes_do_not_share_an_input(script, monkeypatch):
    """A layer that takes float32 observations as they are keeps the input itself for backward."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda agents, inputs: inputs)
    agent, obs = torch.nn.Identity(), torch.zeros(2, 4, device="meta")  # anything but the CPU
    passes = importlib.import_module(script).repeat_agent(agent, 3, obs)
    assert len({id(inputs[0]) for inputs in passes}) == 3


@pytest.mark.parametrize(
    "num_envs, betas",
    [(8, (0.9, 0.999)), (32, (0.9, 0.999)), (128, (0.6, 0.996)), (1000, (0.0, 0.96875))],
)
def test_adams_averages_last_as_many_steps_with_more_games(num_envs, betas):
    agent = torch.nn.Linear(1, 1)
    optimizer = paac_atari.make_optimizer(agent, paac_atari.Args(num_envs=num_envs))
    assert optimizer.param_groups[0]["betas"] == pytest.approx(betas)
