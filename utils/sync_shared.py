"""Copy what the scripts share, the text between `# >>> shared: NAME` and `# <<< shared: NAME`.

    python utils/sync_shared.py          # copy each block to all scripts that have one of its name
    python utils/sync_shared.py --check  # only say where a copy has drifted; exit code 1 if any has

A block's original is in the first script of SCRIPTS that has it, which for most is paac_atari.py:
change it there.
"""

import re
import sys
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    "paac_atari",
    "paac",
    "nstep_q_atari",
    "one_step_q_atari",
    "one_step_sarsa_atari",
    "pqn_atari",
    "paac_atari_multigpu",
    "paac_atari_jax",
    "a3c_atari",
]
BLOCK = re.compile(r"^# >>> shared: ([^\n]+)\n.*?^# <<< shared: \1\n", re.MULTILINE | re.DOTALL)


@dataclass
class Args:
    check: bool = False  # change nothing


def read_blocks(text):
    """{name: text between the fences} of a script, with the fences' own lines."""
    return {match[1]: match[0] for match in BLOCK.finditer(text)}


def find_originals(texts):
    """{name: (script, block)}, from the first script that has the block. texts: {script: text}"""
    originals = {}
    for script, text in texts.items():
        for name, block in read_blocks(text).items():
            originals.setdefault(name, (script, block))
    return originals


def first_difference(script, text, block, copy):
    """The first line of the copy, in the script's text, that is not the original block's."""
    start = text[: text.index(copy)].count("\n") + 1
    for i, (line, wanted) in enumerate(zip_longest(copy.splitlines(), block.splitlines())):
        if line != wanted:
            return f"{script}.py:{start + i}: {line!r} should be {wanted!r}"


def main(args):
    texts = {script: (ROOT / f"{script}.py").read_text() for script in SCRIPTS}
    originals = find_originals(texts)
    has_drifted = False
    for script, text in texts.items():
        for name, copy in read_blocks(text).items():
            source, block = originals[name]
            if copy == block:
                continue
            has_drifted = True
            difference = first_difference(script, text, block, copy)
            print(f"{name}: {difference}, as in {source}.py")
            if not args.check:
                text = text.replace(copy, block)
                (ROOT / f"{script}.py").write_text(text)
    if args.check and has_drifted:
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Args))
