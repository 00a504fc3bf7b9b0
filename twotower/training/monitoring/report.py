"""Where a run is and what its time went into, from the files in its folder."""

from __future__ import annotations

import datetime
import functools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from twotower.core.errors import ConfigError
from twotower.core.files import POINTER, read_json
from twotower.core.install import command
from twotower.core.remote.mirror import pull
from twotower.core.remote.objects import Bucket, is_remote
from twotower.training.monitoring.goodput import format_ledger, read_ledger
from twotower.training.monitoring.heartbeat import PERIOD, read_heartbeat
from twotower.training.monitoring.stragglers import find_slowest, format_slowest, parse_beat


def describe_run(workdir: Path) -> Iterator[str]:
    """Yields lines on the training of a run.

    Args:
        workdir: Folder of the run.
    """
    content = read_heartbeat(workdir)
    ledger = read_ledger(content)
    beat = parse_beat(content)
    if ledger is None or beat is None:
        yield f"{workdir} is a run without a heartbeat: it was trained by an earlier version."
        return
    begun = datetime.datetime.fromtimestamp(ledger.begun).isoformat(sep=" ", timespec="seconds")
    yield f"{workdir}: step {beat.step:,} of {content['steps']:,}, begun {begun}."
    yield _format_state(content)
    yield format_ledger(ledger)
    yield (
        f"A step: input {1000 * beat.own:.2f} ms, compute {1000 * beat.waiting:.2f} ms "
        "(the host's time; it makes a batch while the devices compute)."
    )
    yield _format_rates(content.get("rates", {}))
    yield from _format_processes(workdir, int(content["processes"]))


def _format_state(content: dict[str, Any]) -> str:
    state = content.get("state")
    if state == "ended":
        return "It came to its end."
    silent = time.time() - float(content["time"])
    if state == "stopped":
        return f"It was stopped {silent:,.0f} s ago; `train` goes on with it."
    # Machines' clocks differ by less than that.
    if silent < 10 * PERIOD:
        return f"It trains: process {content['pid']} on {content['host']}."
    return f"It has been silent for {silent:,.0f} s: the process has ended, or hangs."


def _format_rates(rates: dict[str, float]) -> str:
    """Returns a line on the share of the peaks, "-" where they are not known."""
    if not rates:
        return "MFU -, memory - (the devices' peaks are not known; --kind of `train` names them)."
    moved = rates["bytes_per_second"] / 1e9
    return (
        f"MFU {rates['mfu']:.1%}, memory {moved:,.0f} GB/s ({rates['bandwidth']:.1%} of the peak), "
        "of each device."
    )


def _format_processes(workdir: Path, processes: int) -> Iterator[str]:
    """Yields a line for each process of several, and one on the slowest."""
    if processes < 2:
        return
    beats = []
    for process in range(processes):
        beat = parse_beat(read_heartbeat(workdir, process))
        if beat is None:
            yield f"Process {process} has no heartbeat."
            continue
        beats.append(beat)
        yield (
            f"{beat.name}: step {beat.step:,}, {1000 * beat.own:.2f} ms of own work in a step, "
            f"{1000 * beat.waiting:.2f} ms of waiting."
        )
    slowest = find_slowest(beats)
    if slowest is None:
        yield "No process stands out."
    else:
        yield format_slowest(slowest)


def find_run(path: str) -> Path | None:
    """Returns the folder of the run at a path, that of an address as its copy; None where there is
    no run.

    Args:
        path: Path of anything.

    Raises:
        ConfigError: There is a bundle at the path.
    """
    if is_remote(path):
        bucket = Bucket(path, "--log")
        # The address of one object, such as a log, which would be read for each name.
        if bucket.is_object:
            return None
        _refuse_bundle(path, bucket.read)
        # Asked for alone first: a log in a bucket may be large, and is no run to copy.
        if bucket.read("config.json") is None:
            return None
        path = str(pull(path, "--log"))
    _refuse_bundle(path, functools.partial(_read_below, Path(path)))
    config = Path(path) / "config.json"
    # Other folders may have a file of that name.
    if config.is_file() and "training" in read_json(config):
        return Path(path)
    return None


def _read_below(folder: Path, name: str) -> bytes | None:
    """Returns the content of a file in a folder; None where there is none."""
    path = folder / name
    return path.read_bytes() if path.is_file() else None


def _refuse_bundle(path: str, read: Callable[[str], bytes | None]) -> None:
    """Refuses a bundle, which has the configuration of its run, and nothing that is told of one.

    Args:
        path: Path of anything.
        read: Function that reads a file below it.

    Raises:
        ConfigError: There is a bundle.
    """
    # The name of the version that counts, in a bundle whose items have changed.
    version = (read(POINTER) or b"").decode("utf-8", "replace").strip()
    name = "manifest.json"
    if re.fullmatch(r"v-\d{1,18}", version):
        name = f"{version}/{name}"
    # Other folders may have files of these names.
    if b'"twotower-bundle"' not in (read(name) or b""):
        return
    raise ConfigError(
        f"--log={path} is a bundle, and neither a log nor the folder of a run. Name its run, or "
        f"look at what the bundle answers: {command('query', f'--bundle={path}')}"
    )
