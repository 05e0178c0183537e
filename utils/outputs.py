"""Files that a tool writes at its end are tried at its start."""

import sys
from pathlib import Path


def prepare(path):
    """Make the file's folder, and end with one line if the file cannot be written: better now than
    after hours of work. None, a file that nobody asked for, is fine."""
    if path is None:
        return
    path = Path(path).resolve()  # of a link, the file that it names
    is_new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        sys.exit(f"{path} cannot be written: {error.strerror}")
    if is_new:
        path.unlink()
