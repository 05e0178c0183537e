"""The scripts repeat each other by design. What they share is the same text; how much they differ is bounded."""

import ast
import subprocess
from itertools import zip_longest

import pytest
from conftest import Q_SCRIPTS, ROOT

PAAC = "paac_atari"
JAX, A3C, MULTIGPU = "paac_atari_jax", "a3c_atari", "paac_atari_multigpu"
SHARED = ["AtariEnv", "AtariWorker", "make_envs", "close_envs", "fail", "parse_args"]
PAIRS = [(PAAC, script, [*SHARED, "RMSpropTF", "save_checkpoint", "load_checkpoint"]) for script in Q_SCRIPTS]
PAIRS += [(PAAC, JAX, ["Args", *SHARED])]
PAIRS += [(PAAC, A3C, ["AtariEnv", "Agent", "RMSpropTF", "compute_returns", "compute_loss", "save_checkpoint"])]
PAIRS += [(PAAC, A3C, ["load_checkpoint", "fail"])]
PAIRS += [(PAAC, MULTIGPU, [*SHARED[:-1], "Agent", "RMSpropTF", "compute_returns", "compute_loss", "save_checkpoint"])]
PAIRS += [(PAAC, MULTIGPU, ["load_checkpoint"])]
PAIRS += [(PAAC, "nstep_q_atari", ["compute_returns"])]
PAIRS += [("nstep_q_atari", script, ["Agent", "epsilon_greedy"]) for script in Q_SCRIPTS[1:]]
PAIRS += [("one_step_q_atari", "one_step_sarsa_atari", ["Args", "compute_loss"])]
BUDGETS = {
    (PAAC, "nstep_q_atari"): 120,
    ("nstep_q_atari", "one_step_q_atari"): 45,
    ("one_step_q_atari", "one_step_sarsa_atari"): 45,
    (PAAC, JAX): 255,
    (PAAC, MULTIGPU): 110,
    (PAAC, A3C): 370,
}


def source(script):
    return (ROOT / f"{script}.py").read_text().replace("checkpoint.msgpack", "checkpoint.pt")


def block(script, name):
    """Line number and text of a top-level class or function."""
    for node in ast.parse(source(script)).body:
        if getattr(node, "name", None) == name:
            return node.lineno, ast.get_source_segment(source(script), node)
    raise AssertionError(f"{script}.py has no {name}")


@pytest.mark.parametrize("one, other, name", [(one, other, name) for one, other, names in PAIRS for name in names])
def test_shared_block_is_the_same_text(one, other, name):
    (line, text), (other_line, other_text) = block(one, name), block(other, name)
    for i, (a, b) in enumerate(zip_longest(text.splitlines(), other_text.splitlines())):
        assert a == b, f"{name} drifted: {one}.py:{line + i}: {a!r}; {other}.py:{other_line + i}: {b!r}"


@pytest.mark.parametrize("pair", BUDGETS, ids="-".join)
def test_diff_shows_the_algorithm_alone(pair):
    """In lines removed plus added, the number that the README gives."""
    files = [f"{script}.py" for script in pair]
    diff = subprocess.run(["diff", *files], cwd=ROOT, capture_output=True, text=True).stdout
    changed = sum(line[0] in "<>" for line in diff.splitlines())
    assert changed <= BUDGETS[pair]
    assert f"`diff {' '.join(files)}` | {changed} |" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("script", [PAAC, *Q_SCRIPTS, JAX, A3C, MULTIGPU])
def test_one_script_one_algorithm(script):
    """No switch between algorithms, nothing imported from this repository."""
    text = source(script)
    assert "if algorithm" not in text and "args.algorithm" not in text
    local = {path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("utils/*.py")]} | {"utils"}
    imported = {alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert not local & {name.split(".")[0] for name in imported}
