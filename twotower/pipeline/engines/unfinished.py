"""Folders that are being prepared: what is in them counts for nothing until they are whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from twotower.core.errors import ConfigError
from twotower.core.files import discard
from twotower.pipeline.engines.database import MemoryTooSmall
from twotower.pipeline.engines.kept.stages import SCRATCH, STAGES, Stages


@contextlib.contextmanager
def preparing(folder: Path, key: str) -> Iterator[None]:
    """Makes a folder ready to be prepared. If the block does not end well, stages that are whole
    stay for the next try, unless the log or an option was refused.

    Args:
        folder: Folder that is new, empty, or left by a preparation that was stopped.
        key: Hash of all that decides what is prepared; see `twotower.pipeline.engines.kept.stages`.

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
    stages = Stages(folder)
    stages.begin(key)
    last = stages.last()
    if last is not None:
        logging.warning(
            "%s: an earlier try was stopped when %s: it goes on there.", folder, STAGES[last]
        )
    try:
        yield
    # Ctrl-C too. What a kill leaves beside whole stages is cleared by the next try.
    except BaseException as error:
        # A mistake is not gone on with; more memory is another way to do the same.
        if isinstance(error, ConfigError) and not isinstance(error, MemoryTooSmall):
            stages.clear()
        else:
            stages.end()
        raise
    discard(scratch)
