"""The README and docs/ tell the truth where a program can check it: commands parse with the flags
and files they name, links and line counts are right, packages are the same everywhere."""

import importlib
import re
import shlex
import tomllib

import evaluate
import pytest
import table1
import tyro
from conftest import ROOT
from sync_shared import SCRIPTS
from test_drift import changed_lines
from test_runs import in_an_empty_folder  # noqa: F401
from torch.distributed.run import get_args_parser

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
}
README = PAGES["README.md"]
LINKING = PAGES | {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [*sorted(ROOT.glob("results/*.md")), ROOT / "utils" / "published" / "README.md"]
}
TORCHRUN = get_args_parser()


def commands(text):
    lines = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            command = line.split("  #")[0].split(" && ")[-1].strip()
            if re.match(r"python \w+\.py|python utils/|torchrun ", command):
                lines.append(command)
    return lines


COMMANDS = {command: page for page, text in PAGES.items() for command in commands(text)}


def test_the_readme_is_a_page():
    assert README.count("\n") <= 160 and len(README.split()) <= 1800
    assert set(PAGES) == {
        "README.md",
        *(f"docs/{name}.md" for name in ("running", "algorithms", "results", "speed")),
        *(f"docs/{name}.md" for name in ("forking", "development")),
    }
    assert "python -m pytest " in README
    assert sum(command.startswith("python paac_atari.py") for command in COMMANDS) >= 5


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "results/table1.md"])
def test_results_are_those_of_the_evaluations(page):
    """The score of each game: all seeds that have been evaluated, and no other."""
    pattern = r"^\| ([A-Z][\w .'*]+?)(?: \(\d\))? \| (.*)"
    rows = {}
    for name, row in re.findall(pattern, LINKING[page], re.MULTILINE):
        rows.setdefault(re.sub(r"\W", "", name).lower(), row)
    means, errors = table1.read_scores()
    for game in table1.GAMES:
        _, num_seeds, score, _ = table1.describe(game, means[game], errors[game])
        row = rows[game.lower()].replace("±", "+-").replace("*", "")
        assert score.replace("*", "") in row, game
        if page != "README.md":
            assert row.startswith(f"{num_seeds} |"), game


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command):
    launcher, *words = shlex.split(command)
    if launcher == "torchrun":
        parsed = TORCHRUN.parse_args(words)
        words = [parsed.training_script, *parsed.training_script_args]
    path, *args = words
    assert (ROOT / path).exists()
    module = importlib.import_module(path.removesuffix(".py").split("/")[-1])
    tyro.cli(module.Args, args=args)
    for file in re.findall(r"(?:results|utils/published|trained)/[\w.]+", command):
        if not re.search(rf"--(?:out|csv|json|video|export) {file}|--out\S* {file}", command):
            assert (ROOT / file).exists(), file


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_exists(page):
    """Flags in the tables and the text, too."""
    known = "".join(p.read_text() for p in [*ROOT.glob("*.py"), *ROOT.glob("utils/*.py")])
    for flag in set(re.findall(r"`--(?:no-)?([a-z][a-z0-9-]+)", PAGES[page])):
        is_field = re.search(rf"\b{flag.replace('-', '_')}: ", known)
        assert is_field or f"--{flag}" in TORCHRUN.format_help(), flag


def anchor(heading):
    """What GitHub makes of a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


@pytest.mark.parametrize("page", LINKING)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", LINKING[page], flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, fragment = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert fragment in map(anchor, headings), target


@pytest.mark.parametrize("page", PAGES)
def test_every_diff_is_as_long_as_it_is_said_to_be(page):
    rows = re.findall(r"`diff (\w+)\.py (\w+)\.py` \| (\d+) \|", PAGES[page])
    assert page != "README.md" or len(rows) == 8
    for one, other, lines in rows:
        assert len(changed_lines(one, other)) == int(lines)


def test_all_flags_are_explained():
    """docs/running.md lists those of paac_atari.py with their defaults."""
    import paac_atari

    section = PAGES["docs/running.md"].split("## All flags")[1]
    listed = dict(re.findall(r"^\| `--([a-z0-9-]+)` \| (.*?) \|", section, re.MULTILINE))
    fields = {name.replace("_", "-"): value for name, value in vars(paac_atari.Args()).items()}
    assert listed.keys() == fields.keys()
    for flag, default in listed.items():
        value = fields[flag]
        words = re.sub(r"[`,]", "", default)
        if isinstance(value, bool):
            assert words == ("on" if value else "off"), flag
        elif isinstance(value, float | int):
            assert float(words.removesuffix(" s")) == value, flag
        elif value is None:
            assert words in ("none", "one per core"), flag
        else:
            assert words in (str(value), "the script's name"), flag


def test_scripts_and_requirements_name_the_same_packages():
    listed = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            listed[re.match(r"[\w-]+", line)[0]] = line
    for script in SCRIPTS:
        text = (ROOT / f"{script}.py").read_text()
        block = re.match(r"# /// script\n(.*?)# ///\n", text, re.DOTALL)[1]
        metadata = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.MULTILINE))
        assert metadata["requires-python"] == ">=3.11"
        for requirement in metadata["dependencies"]:
            assert requirement == listed[re.match(r"[\w-]+", requirement)[0]], script
        # And no package is missing that the script imports.
        names = {re.match(r"[\w-]+", requirement)[0] for requirement in metadata["dependencies"]}
        modules = {"cv2": "opencv-python-headless", "ale_py": "ale-py"}
        for module in re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE):
            package = modules.get(module, module)
            assert package not in listed or package in names, (script, module)


def test_trained_agent_plays_well(tmp_path):
    """An agent in trained/ plays Pong, and shows it."""
    args = evaluate.Args(str(ROOT / "trained" / "pong.pt"), episodes=2, video="pong.gif")
    args.video_seconds = 2
    result = evaluate.evaluate(args)
    assert min(result["scores"]) > 10
    assert (tmp_path / "pong.gif").stat().st_size > 1000
    assert all(path.stat().st_size < 1.5e6 for path in (ROOT / "trained").iterdir())
