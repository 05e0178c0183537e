"""The README's commands are real: each parses with the flags and files it names, and the short ones
run."""

import re
import shlex
import sys

import pytest
import tyro
from conftest import ROOT, run
from torch.distributed.run import get_args_parser

sys.path.insert(0, str(ROOT / "utils"))
TORCHRUN = get_args_parser()
COMMANDS = [
    line.split("#")[0].split(" && ")[-1].strip()
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    for line in block.splitlines()
    if line.strip()
]


def test_there_are_commands():
    assert sum(command.startswith("python paac_atari.py") for command in COMMANDS) >= 5
    assert "python -m pytest" in COMMANDS


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if re.match(r"python \w+\.py|python utils/|torchrun ", c)]
)
def test_command_parses(command):
    launcher, *words = shlex.split(command)
    if launcher == "torchrun":
        parsed = TORCHRUN.parse_args(words)
        words = [parsed.training_script, *parsed.training_script_args]
    path, *args = words
    assert (ROOT / path).exists()
    module = __import__(path.removesuffix(".py").split("/")[-1])
    tyro.cli(module.Args, args=args)


def test_every_flag_in_the_readme_exists():
    """Flags in the tables and the text, too."""
    known = "".join(p.read_text() for p in [*ROOT.glob("*.py"), *ROOT.glob("utils/*.py")])
    for flag in set(re.findall(r"`--(?:no-)?([a-z][a-z0-9-]+)", (ROOT / "README.md").read_text())):
        assert (
            re.search(rf"\b{flag.replace('-', '_')}: ", known)
            or f"--{flag}" in TORCHRUN.format_help()
        ), flag


def test_trained_agent_can_be_watched(tmp_path):
    """The checkpoint that comes along plays a game of Pong, and plays it well."""
    evaluate = [
        sys.executable,
        ROOT / "utils" / "evaluate.py",
        ROOT / "trained" / "pong.pt",
        "--episodes",
        2,
        "--num-envs",
        2,
    ]
    result = run([*evaluate, "--video", "pong.gif", "--video-seconds", 2], tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    assert float(re.search(r"score (-?[\d.]+)", result.stdout).group(1)) > 10
    assert (tmp_path / "pong.gif").stat().st_size > 1000
    assert (ROOT / "trained" / "pong.pt").stat().st_size < 5e6
