"""The scripts repeat each other by design. What they share is the same text, how far they are apart
is bounded, and what a reader meets stays readable."""

import ast
import io
import subprocess
import tokenize

import pytest
import sync_shared
from conftest import ROOT

DEVELOPMENT = (ROOT / "docs" / "development.md").read_text()
# The most lines of `diff A B`, removed and added.
BUDGETS = {
    ("paac_atari", "nstep_q_atari"): 130,
    ("nstep_q_atari", "one_step_q_atari"): 60,
    ("one_step_q_atari", "one_step_sarsa_atari"): 50,
    ("nstep_q_atari", "pqn_atari"): 135,
    ("paac_atari", "paac_atari_multigpu"): 165,
    ("paac_atari", "paac_atari_jax"): 510,
    ("paac_atari", "paac"): 270,
    ("paac_atari", "a3c_atari"): 650,
}
FENCE = "\n# PLUMBING"


def source(script):
    return (ROOT / f"{script}.py").read_text()


def changed_lines(one, other):
    files = [f"{one}.py", f"{other}.py"]
    diff = subprocess.run(["diff", *files], cwd=ROOT, capture_output=True, text=True).stdout
    return [line for line in diff.splitlines() if line[0] in "<>"]


def test_shared_blocks_are_the_same_text(capsys):
    sync_shared.main(sync_shared.Args(check=True))
    assert capsys.readouterr().out == ""


def test_sync_finds_and_mends_a_drifted_block(tmp_path, monkeypatch, capsys):
    block = "# >>> shared: x\none = 1\n{}# <<< shared: x\n"
    (tmp_path / "first.py").write_text("a = 0\n" + block.format("two = 2\n"))
    (tmp_path / "second.py").write_text("b = 0\n\n" + block.format("two = 3\n") + "c = 0\n")
    monkeypatch.setattr(sync_shared, "ROOT", tmp_path)
    monkeypatch.setattr(sync_shared, "SCRIPTS", ["first", "second"])
    with pytest.raises(SystemExit, match="1"):
        sync_shared.main(sync_shared.Args(check=True))
    assert "x: second.py:5: 'two = 3' should be 'two = 2'" in capsys.readouterr().out
    assert "two = 3" in (tmp_path / "second.py").read_text()
    sync_shared.main(sync_shared.Args())
    mended = "b = 0\n\n" + block.format("two = 2\n") + "c = 0\n"
    assert (tmp_path / "second.py").read_text() == mended
    sync_shared.main(sync_shared.Args(check=True))


@pytest.mark.parametrize("script", sync_shared.SCRIPTS)
def test_fences_are_pairs(script):
    """A block whose end is missing or misspelt would not be compared at all."""
    text = source(script)
    assert text.count("# >>> shared: ") == text.count("# <<< shared: ")
    assert text.count("# >>> shared: ") == len(sync_shared.read_blocks(text))


@pytest.mark.parametrize("script", sync_shared.SCRIPTS[1:7])
def test_most_of_a_torch_sibling_is_guarded(script):
    text = source(script)
    originals = sync_shared.find_originals({name: source(name) for name in sync_shared.SCRIPTS})
    elsewhere = [name for name in sync_shared.SCRIPTS if name != script]
    guarded = 0
    for name, block in sync_shared.read_blocks(text).items():
        assert originals[name][0] != script or any(block in source(s) for s in elsewhere)
        guarded += block.count("\n")
    assert guarded >= 0.6 * text.count("\n")


@pytest.mark.parametrize("pair", BUDGETS, ids="-".join)
def test_diff_shows_the_algorithm_alone(pair):
    """The number is the one that docs/development.md gives."""
    changed = len(changed_lines(*pair))
    assert changed <= BUDGETS[pair]
    assert f"`diff {pair[0]}.py {pair[1]}.py` | {changed} |" in DEVELOPMENT


@pytest.mark.parametrize(
    "script", ["nstep_q_atari", "one_step_q_atari", "one_step_sarsa_atari", "pqn_atari", "paac"]
)
def test_siblings_differ_above_the_fence(script):
    """Below it, only paac.py does, in the section of the games, and pqn_atari.py, which has no CUDA
    graphs."""

    def plumbing(text):
        below = text[text.index(FENCE) :]
        if script == "pqn_atari":
            return below.replace(sync_shared.read_blocks(text).get("cuda graphs", ""), "")
        if script == "paac":
            return below[: below.index("# 3. Games")] + below[below.index("# 4. Workers") :]
        return below

    assert plumbing(source(script)) == plumbing(source("paac_atari"))


def test_what_a_reader_of_paac_meets():
    """As docs/development.md says: lines above the fence, tokens, tokens per line of code."""
    text = source("paac_atari")
    above = text[: text.index(FENCE)].count("\n")  # up to the line of the fence
    layout = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    tokens = []
    depth = 0  # since Python 3.12 an f-string is many tokens: it counts as one here, as before
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        if name == "FSTRING_END":
            depth -= 1
        elif depth == 0 and token.type not in layout:
            tokens.append(token)
        if name == "FSTRING_START":
            depth += 1
    lines = {n for token in tokens for n in range(token.start[0], token.end[0] + 1)}
    density = len(tokens) / len(lines)
    assert above <= 330 and density <= 10
    assert f"{above} lines above the fence, {len(tokens):,} tokens" in DEVELOPMENT
    assert f"{density:.1f} tokens per line of code" in DEVELOPMENT


@pytest.mark.parametrize("script", sync_shared.SCRIPTS)
def test_one_script_one_algorithm(script):
    """No switch between algorithms, nothing imported from this repository."""
    text = source(script)
    assert "if algorithm" not in text and "args.algorithm" not in text
    local = {path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("utils/*.py")]} | {"utils"}
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert not local & imported
