"""Where does XLA spend the time of a PAAC update? Five acting passes, the next values and the update of paac_atari_jax.py,
without games, kernel by kernel, and the same work in torch.

    python utils/jax_kernels.py                      # nips
    python utils/jax_kernels.py --arch nature --num-envs 64

Kernels are named by layer and direction, from the metadata of the compiled programs; their milliseconds per update are summed
over threads. Run it on an otherwise idle machine.
"""

import collections
import gzip
import json
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import paac_atari
import paac_atari_jax


@dataclass
class Args:
    arch: Literal["nips", "nature"] = "nips"  # network
    num_envs: int = 32  # games
    updates: int = 20  # that are measured, after 5 that are not


def jax_update(args):
    """A function that makes one update, and the texts of its compiled programs."""
    script_args = paac_atari_jax.Args(arch=args.arch)
    agent, optimizer = paac_atari_jax.Agent(4, args.arch), paac_atari_jax.make_optimizer(script_args)
    obs = np.random.default_rng(0).integers(0, 255, (args.num_envs, 4, 84, 84), np.uint8)
    params = agent.init(jax.random.key(0), obs)
    state = {"key": jax.random.key(1), "params": params, "opt_state": optimizer.init(params)}
    zeros = jnp.zeros((5, args.num_envs))
    outcomes = (zeros, zeros.astype(bool), zeros.astype(bool))
    coefficients = (script_args.learning_rate, script_args.gamma, script_args.ent_coef, script_args.vf_coef)

    def batch():
        choices = []
        for _ in range(5):
            state["key"], choice = paac_atari_jax.act(agent, state["params"], state["key"], jnp.array(obs))
            np.asarray(choice[0])  # the actions, as the games would get them
            choices.append(choice)
        next_value = paac_atari_jax.compute_values(agent, state["params"], jnp.array(obs))
        return *coefficients, choices, outcomes, zeros, next_value

    def update():
        inputs = batch()
        state["params"], state["opt_state"], _ = paac_atari_jax.update(optimizer, state["params"], state["opt_state"], *inputs)
        jax.block_until_ready(state["params"])

    programs = [
        paac_atari_jax.act.lower(agent, state["params"], state["key"], jnp.array(obs)),
        paac_atari_jax.compute_values.lower(agent, state["params"], jnp.array(obs)),
        paac_atari_jax.update.lower(optimizer, state["params"], state["opt_state"], *batch()),
    ]
    return update, [program.compile().as_text() for program in programs]


def torch_update(args):
    script_args = paac_atari.Args(arch=args.arch)
    agent = paac_atari.Agent(4, args.arch)
    optimizer = torch.optim.Adam(agent.parameters(), lr=script_args.learning_rate, eps=script_args.optimizer_epsilon, fused=True)
    obs = torch.randint(0, 255, (args.num_envs, 4, 84, 84), dtype=torch.uint8)
    returns = torch.zeros(5, args.num_envs)

    def update():
        choices = []
        for _ in range(5):
            logits, values = agent(obs)
            choices.append((logits, values, (logits.softmax(-1) / torch.empty_like(logits).exponential_()).argmax(-1)))
        agent(obs)
        logits, values, actions = (torch.stack(x) for x in zip(*choices))
        loss, *_ = paac_atari.compute_loss(logits, values, actions, returns, script_args.ent_coef, script_args.vf_coef)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(agent.parameters(), script_args.max_grad_norm)
        optimizer.step()

    return update


def describe(line):
    """layer, direction and kind of one instruction of a compiled program"""
    op_name = "".join(re.findall(r'op_name="([^"]*)"', line))
    layer = re.search(r"(Conv_\d|Dense_\d|policy|value)/", op_name)
    if not layer:
        return "copies into another layout" if "transpose" in line.split("=")[0] else "all else"
    if "transpose(jvp" not in op_name:
        return f"{layer[1]} forward"
    return f"{layer[1]} {'input' if 'base-dilated' in line or 'dot_general' in op_name else 'weight'} gradient"


def main(args):
    update, programs = jax_update(args)
    kinds = {}
    for program in programs:
        module = re.match(r"HloModule (\w+)", program)[1]
        for line in program.splitlines():
            if match := re.match(r"\s*(?:ROOT )?%(\S+) = ", line):
                kinds[module, match[1]] = describe(line)
    updates = {"torch": torch_update(args), "jax": update}
    seconds = collections.defaultdict(list)
    for i in range(5 + args.updates):
        for name, function in updates.items():
            start = time.perf_counter()
            function()
            if i >= 5:
                seconds[name].append(time.perf_counter() - start)
    print(f"{args.arch}, {args.num_envs} games, 5 steps per update")
    for name in updates:
        print(f"{name}: {1000 * statistics.median(seconds[name]):.1f} ms per update")

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for _ in range(args.updates):
                update()
        (path,) = Path(folder).rglob("perfetto_trace.json.gz")
        trace = json.loads(gzip.decompress(path.read_bytes()))
    spent = collections.Counter()
    for event in trace["traceEvents"]:
        kernel = event.get("args", {}).get("hlo_module"), event.get("name")
        if kernel in kinds:
            spent[kinds[kernel]] += event["dur"] / 1000 / args.updates
    print("\n| ms | share | XLA kernels |\n|--:|--:|:--|")
    for kind, ms in spent.most_common():
        print(f"| {ms:.1f} | {100 * ms / spent.total():.0f} % | {kind} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
