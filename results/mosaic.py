"""Trained agents side by side in one GIF, three in a row:

    python results/mosaic.py results/mosaic.gif 30 trained/pong.pt trained/breakout.pt

plays each for so many seconds at the game's own speed. One whose game ends earlier stands still.
"""

import math
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageSequence

UTILS = Path(__file__).resolve().parent.parent / "utils"
sys.path.insert(0, str(UTILS))
from evaluate import gif_durations

PER_ROW = 3
WIDTH, HEIGHT = 160, 210
COLORS = 64
FPS = 15  # one picture per action, which lasts four frames of 1/60 s


def record(agent, seconds, path):
    """The frames of one game."""
    command = [sys.executable, UTILS / "evaluate.py", agent, "--episodes", "1"]
    command += ["--video", path, "--video-seconds", seconds]
    subprocess.run(list(map(str, command)), check=True)
    frames = []
    with Image.open(path) as gif:
        for frame in ImageSequence.Iterator(gif):
            # Equal frames in a row are stored as one, which is shown for longer.
            repeats = round(frame.info["duration"] * FPS / 1000)
            frames += [frame.convert("RGB")] * repeats
    return frames


def main():
    out, seconds, *agents = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        games = [record(agent, seconds, Path(folder, "game.gif")) for agent in agents]
    rows = math.ceil(len(games) / PER_ROW)
    frames = []
    for i in range(max(map(len, games))):
        frame = Image.new("RGB", (PER_ROW * WIDTH, rows * HEIGHT))
        for number, game in enumerate(games):
            row, column = divmod(number, PER_ROW)
            picture = game[min(i, len(game) - 1)]  # the last one, once the game is over
            frame.paste(picture, (column * WIDTH, row * HEIGHT))
        frames.append(frame)
    # One palette for all frames: with one each, the file would be larger.
    palette = frames[len(frames) // 2].quantize(COLORS)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = gif_durations(len(frames), FPS)
    frames[0].save(out, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    print(f"{out}: {Path(out).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
