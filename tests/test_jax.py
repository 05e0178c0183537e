"""The JAX script computes what the torch script computes, compiles once, and keeps what it has
seen."""

from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import small
from games import Scripted, scripted_steps

import paac_atari
import paac_atari_jax

COMPILED = paac_atari_jax.act, paac_atari_jax.update, paac_atari_jax.compute_values


def to_jax(agent):
    """The torch network's parameters as flax has them: inputs before outputs; a convolution's
    pixels before its channels."""
    convs = sum(isinstance(layer, torch.nn.Conv2d) for layer in agent.trunk)
    params = {"mean_screen": jnp.array(agent.mean_screen.numpy())}
    names = iter([*["Conv_0", "Conv_1", "Conv_2"][:convs], "Dense_0"])
    for name, layer in agent.named_modules():
        if not hasattr(layer, "weight"):
            continue
        if isinstance(layer, torch.nn.LayerNorm):
            scale, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
            params["LayerNorm_0"] = {"scale": jnp.array(scale), "bias": jnp.array(bias)}
            continue
        weight = layer.weight.detach().contiguous().numpy()
        name = name if name in ("policy", "value") else next(names)
        # (hidden, channels x rows x columns) -> (rows x columns x channels, hidden)
        if name == "Dense_0":
            side = 9 if convs == 2 else 7
            weight = (
                weight.reshape(len(weight), -1, side, side)
                .transpose(2, 3, 1, 0)
                .reshape(-1, len(weight))
            )
        else:
            weight = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
        params[name] = {"kernel": jnp.array(weight), "bias": jnp.array(layer.bias.detach().numpy())}
    return {"params": params}


@pytest.mark.parametrize(
    "arch, optimizer",
    [
        ("nips", "adam"),
        ("nature", "rmsprop"),
        pytest.param("nips", "rmsprop", marks=pytest.mark.slow),
        pytest.param("nature", "adam", marks=pytest.mark.slow),
    ],
)
def test_an_update_equals_torchs(arch, optimizer):
    """Outputs, targets, loss, gradient norm and parameters after three updates, from the same
    weights on the same batches."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    paper = arch == "nature"
    torch_args = paac_atari.Args(arch=arch, init="uniform", layer_norm=not paper)
    agent = paac_atari.Agent(6, torch_args)
    agent.mean_screen += 0 if paper else torch.rand(84, 84) * 255
    jax_agent = paac_atari_jax.Agent(6, arch, layer_norm=not paper)
    params, lr, eps, clip = to_jax(agent), 1e-3, 1e-2, 0.1
    # With more than 32 games Adam's betas are others.
    flags = {"optimizer": optimizer, "optimizer_epsilon": eps, "num_envs": 96}
    args = paac_atari_jax.Args(max_grad_norm=clip, **flags)
    jax_optimizer = paac_atari_jax.make_optimizer(args)
    opt_state = jax_optimizer.init(params)
    torch_optimizer = paac_atari.make_optimizer(agent, paac_atari.Args(learning_rate=lr, **flags))
    for _ in range(3):
        obs = generator.integers(256, size=(5, 8, 4, 84, 84), dtype=np.uint8)
        next_obs = generator.integers(256, size=(8, 4, 84, 84), dtype=np.uint8)
        rewards = generator.normal(size=(5, 8)).astype(np.float32)
        terminations, truncations = generator.random((2, 5, 8)) < 0.2
        final_values = generator.normal(size=(5, 8)).astype(np.float32)

        key, logits_, values_, actions_, backwards = jax.random.key(0), [], [], [], []
        for step in range(5):
            key, *outputs = paac_atari_jax.act(jax_agent, params, key, jnp.array(obs[step]))
            for kept, output in zip((actions_, logits_, values_, backwards), outputs):
                kept.append(output)
        next_value = paac_atari_jax.compute_values(jax_agent, params, next_obs)
        actions = torch.from_numpy(np.stack([np.array(x) for x in actions_])).long()
        logits, values = map(torch.stack, zip(*(agent(torch.from_numpy(o)) for o in obs)))
        shares = paac_atari.live_units(agent, torch.from_numpy(obs[0]))
        jax_shares = paac_atari_jax.live_units(jax_agent, params, obs[0])
        assert len(shares) == (3 if arch == "nips" else 4)
        assert jax_shares == {tag: pytest.approx(share.item()) for tag, share in shares.items()}
        for step in range(5):
            np.testing.assert_allclose(logits_[step], logits[step].detach(), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(values_[step], values[step].detach(), rtol=1e-4, atol=1e-5)

        rollout = {
            "logits": logits_,
            "values": values_,
            "actions": actions_,
            "backward": backwards,
            "rewards": rewards,
            "terminations": terminations,
            "truncations": truncations,
            "final_values": final_values,
        }
        params, opt_state, losses = paac_atari_jax.update(
            jax_optimizer, params, opt_state, lr, rollout, next_value, (0.9, 0.02, 0.3)
        )
        tensors = [
            torch.from_numpy(x)
            for x in (rewards.clip(-1, 1), terminations, truncations, final_values)
        ]
        returns = paac_atari.compute_returns(
            *tensors, agent(torch.from_numpy(next_obs))[1].detach(), 0.9
        )
        loss, policy_loss, value_loss, entropy = paac_atari.compute_loss(
            logits, values, actions, returns, 0.02, 0.3
        )
        torch_optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(agent.parameters(), clip)
        assert grad_norm > clip
        torch_optimizer.step()
        explained = 1 - (returns - values).var() / returns.var()
        expected = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "grad_norm": grad_norm,
            "logits_norm": logits.norm(dim=-1).mean(),
        }
        for name, x in (expected | {"explained_variance": explained}).items():
            np.testing.assert_allclose(
                losses[f"losses/{name}"], x.item(), rtol=1e-4, atol=1e-6, err_msg=name
            )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
            params,
            to_jax(agent),
        )


@pytest.mark.parametrize(
    "arch, init, layer_norm",
    [
        ("nips", "orthogonal", True),
        ("nature", "uniform", True),
        pytest.param("nips", "uniform", False, marks=pytest.mark.slow),
        pytest.param("nature", "orthogonal", False, marks=pytest.mark.slow),
    ],
)
def test_network_init(arch, init, layer_norm):
    """As the torch script's: orthogonal with its gains, or U(+-1/sqrt(fan_in)), biases too."""
    agent = paac_atari_jax.Agent(6, arch, init, layer_norm=layer_norm)
    params = agent.init(jax.random.key(0), np.zeros((1, 4, 84, 84), np.uint8))["params"]
    assert not params.pop("mean_screen").any()
    params.pop("LayerNorm_0", None)
    gains = {"policy": 0.01, "value": 1.0, "Dense_0": 4.5 if layer_norm else 2**0.5}
    for name, layer in params.items():
        weight, bias = (
            np.array(layer["kernel"]).reshape(-1, len(layer["bias"])),
            np.array(layer["bias"]),
        )
        if init == "orthogonal":
            gain = gains.get(name, 2**0.5)
            gram = weight.T @ weight if weight.shape[0] >= weight.shape[1] else weight @ weight.T
            np.testing.assert_allclose(gram, gain**2 * np.eye(len(gram)), atol=1e-5)
            assert not bias.any()
        else:
            bound = len(weight) ** -0.5
            assert max(abs(weight).max(), abs(bias).max()) <= bound
            assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert bias.std() == pytest.approx(bound / 3**0.5, rel=0.5) or len(bias) == 1


def test_actions_follow_the_policy():
    """Their frequencies are softmax(logits); each game and each step draws for itself."""
    agent, policy = paac_atari_jax.Agent(4), np.array([0.5, 0.3, 0.15, 0.05])
    obs, key, actions = np.zeros((500, 4, 84, 84), np.uint8), jax.random.key(1), []
    params = agent.init(key, obs[:1])
    params["params"]["policy"]["bias"] = jnp.log(policy)  # the logits of a black screen
    for _ in range(10):
        key, action, *_ = paac_atari_jax.act(agent, params, key, obs)
        actions.append(np.array(action))
    # 4 sigma
    np.testing.assert_allclose(
        np.bincount(np.concatenate(actions), minlength=4) / 5000, policy, atol=0.03
    )
    same_again = (policy**2).sum()
    # Of 500: 4 sigma
    assert np.mean(actions[0] == actions[1]) == pytest.approx(same_again, abs=0.09)
    assert np.mean(actions[0][1:] == actions[0][:-1]) == pytest.approx(same_again, abs=0.09)


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """recorded(*flags, make_env) trains and returns what reached act() and update()."""
    acts, updates = [], []
    act, update = paac_atari_jax.act, paac_atari_jax.update

    def record_act(agent, params, key, obs):
        acts.append((obs, np.array(obs)))
        return act(agent, params, key, obs)

    def record_update(optimizer, params, opt_state, *inputs):
        _, rollout, next_value, coefficients = inputs
        kept = {name: x for name, x in rollout.items() if name != "backward"}
        updates.append(jax.tree.map(np.array, (kept, next_value, coefficients)))
        return update(optimizer, params, opt_state, *inputs)

    monkeypatch.setattr(paac_atari_jax, "act", record_act)
    monkeypatch.setattr(paac_atari_jax, "update", record_update)
    monkeypatch.setattr(Scripted, "created", 0)
    monkeypatch.chdir(tmp_path)

    def train(*flags, make_env=paac_atari_jax.make_env):
        paac_atari_jax.train(paac_atari_jax.parse_args([*small(paac_atari), *flags]), make_env)
        return acts, updates

    return train


def test_compiles_once_and_keeps_what_it_saw(recorded):
    """No function is compiled again after its first call; the workers' next step does not change
    observations acted on."""
    for function in COMPILED:
        function.clear_cache()
    acts, updates = recorded("--total-timesteps", "400")
    assert len(updates) == 20 and len(acts) == 100
    for obs, copy in acts:
        np.testing.assert_array_equal(obs, copy)
    assert (acts[0][1] != acts[-1][1]).any()
    assert [function._cache_size() for function in COMPILED] == [1, 1, 1]


class Reader(paac_atari_jax.nn.Module):
    """In the network's place: the value of an observation is the number Scripted wrote on it; both
    actions are equally likely."""

    num_actions: int
    arch: str
    initial: str
    bf16: bool
    layer_norm: bool

    @paac_atari_jax.nn.compact
    def __call__(self, obs):
        weight = self.param("weight", lambda key: jnp.ones(()))
        value = obs[:, 3, 0, 0].astype(jnp.float32) * weight
        return jnp.zeros((len(value), 2)) * weight, value


def test_rollout_reaches_the_update_unmixed(recorded, monkeypatch):
    """As test_paac.py's: values, rewards, ends and the values after them belong together."""
    monkeypatch.setattr(paac_atari_jax, "Agent", Reader)
    flags = ["--num-workers", "0", "--total-timesteps", "240", "--learning-rate", "0"]
    flags.append("--no-subtract-mean-screen")  # Reader has none
    _, updates = recorded(*flags, make_env=Scripted)
    assert len(updates) == 12
    games = scripted_steps(4)
    for rollout, next_value, coefficients in updates:
        np.testing.assert_allclose(coefficients, (0.99, 0.0067, 0.5))
        steps = list(islice(games, 5))
        for t, (shown, last_shown, over, cut, _) in enumerate(steps):
            rewards = np.where(rollout["actions"][t] == 1, 3.0, -0.5)
            np.testing.assert_array_equal(rollout["values"][t], shown)
            np.testing.assert_array_equal(rollout["rewards"][t], rewards)
            np.testing.assert_array_equal(rollout["terminations"][t], over)
            np.testing.assert_array_equal(rollout["truncations"][t], cut)
            np.testing.assert_array_equal(rollout["final_values"][t][cut], last_shown[cut])
        np.testing.assert_array_equal(next_value, steps[-1][-1])


def test_rmsprop_is_the_papers():
    """As test_paac.py's test_rmsprop_by_hand: mean square 1 -> 0.99 + 0.01 * 4 = 1.03; epsilon 0.41
    inside the root: 1.2."""
    optimizer = paac_atari_jax.make_optimizer(
        paac_atari_jax.Args(optimizer="rmsprop", optimizer_epsilon=0.41, max_grad_norm=100)
    )
    updates, _ = optimizer.update(jnp.array([2.0]), optimizer.init(jnp.array([10.0])))
    assert updates[0] == pytest.approx(2 / 1.2, rel=1e-6)
