"""Folders that are being prepared: what is in them counts for nothing until they are whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from twotower.core.errors import ConfigError
from twotower.core.files import discard
from twotower.pipeline.folder import is_own

# Folder inside the prepared one for what is on the disk meanwhile. It marks all files beside it as
# those of a preparation that has not ended.
SCRATCH = ".preparing"


@contextlib.contextmanager
def preparing(folder: Path) -> Iterator[None]:
    """Makes a folder ready to be prepared, and empties it again if the block does not end well.

    Args:
        folder: Folder that is new, empty, or left by a preparation that was killed.

    Raises:
        ConfigError: The folder holds other files, which are not to be lost.
    """
    scratch = folder / SCRATCH
    others = []
    for path in folder.iterdir():
        # Hidden files and what a disk has of itself are nobody's data.
        if not path.name.startswith(".") and path.name != "lost+found":
            others.append(path.name)
    # By the mark and not by their names alone: a run has an encoder too.
    if others and not scratch.is_dir():
        raise ConfigError(
            f"--data={folder} holds {min(others)!r}, which no preparation wrote: name a folder "
            "that is new or empty (one in it will do)."
        )
    _clear(folder)
    scratch.mkdir()
    try:
        yield
    # Ctrl-C too. What a kill leaves is cleared by the next command.
    except BaseException:
        _clear(folder)
        raise
    discard(scratch)


def _clear(folder: Path) -> None:
    # The mark last: killed here, the rest still counts as unfinished.
    for path in folder.iterdir():
        if is_own(path.name):
            discard(path)
    discard(folder / SCRATCH)
