"""A profile of some steps: what host and devices did, and when."""

from __future__ import annotations

import re
from pathlib import Path

import jax
from absl import logging

from twotower.core.errors import ConfigError

FOLDER = "profile"  # in the folder of a run


def parse_steps(text: str) -> tuple[int, int] | None:
    """Returns the first and the last step of "N-M"; None of "".

    >>> parse_steps("20-40")
    (20, 40)

    Raises:
        ConfigError: The text is no such range.
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d+)-(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(
            f"--profile_steps={text} must be the first and the last step to profile, such as 20-40."
        )
    return int(found[1]), int(found[2])


class Profiler:
    """Profile of the steps from one to another; a context that ends it in any case.

    Args:
        workdir: Folder of the run.
        steps: First and last step, or None for no profile.
    """

    def __init__(self, workdir: Path, steps: tuple[int, int] | None) -> None:
        # Processes of one machine would write one file.
        self._folder = workdir / FOLDER / str(jax.process_index())
        self._steps = steps
        self._is_on = False

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_on:
            self.stop()

    def until_edge(self, step: int) -> list[int]:
        """Returns the numbers of steps after which the profile begins or ends, as far as ahead."""
        if self._steps is None:
            return []
        first, last = self._steps
        # Dispatches are cut there, since a profile begins and ends between two of them.
        return [edge - step for edge in (first - 1, last) if edge > step]

    def start_before(self, step: int) -> None:
        """Begins the profile if it is time.

        Args:
            step: Number of steps done.
        """
        if self._steps is None or self._is_on:
            return
        first, last = self._steps
        # A run that goes on in the midst of these steps profiles what is left of them.
        if first - 1 <= step < last:
            self._folder.mkdir(parents=True, exist_ok=True)
            # With a trace for Perfetto, which any browser opens without an installation.
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._is_on = True

    def ends_at(self, step: int) -> bool:
        """Returns whether the profile is to end after a step, which the devices must have done."""
        return self._is_on and self._steps is not None and step >= self._steps[1]

    def stop(self) -> None:
        """Ends the profile, and writes it."""
        self._is_on = False
        self._steps = None
        jax.profiler.stop_trace()
        logging.info(
            "The profile is in %s: open its perfetto_trace.json.gz at ui.perfetto.dev, or all of "
            "it by `pip install xprof` and `xprof --logdir=%s`.",
            self._folder,
            self._folder,
        )
