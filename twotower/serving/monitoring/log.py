"""The log of a server as one JSON object a line, without anything of a person.

A line says of a request its endpoint, status, time and version, and never what it asked or got. An
exception is told by its kind and place: its message may hold a value of the request.
"""

from __future__ import annotations

import datetime
import logging
import random
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec
from absl import logging as absl_logging

Count = Callable[[str, int, str, float], None]
_LOGGER = logging.getLogger("twotower.requests")
_ENCODER = msgspec.json.Encoder()


class JsonFormatter(logging.Formatter):
    """Lines of JSON: time, level, place and message; of a request, its figures."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": record.process,
        }
        if record.name == _LOGGER.name and isinstance(record.args, dict):
            return _ENCODER.encode({**line, **record.args}).decode()
        line["place"] = f"{record.filename}:{record.lineno}"
        line["message"] = record.getMessage()
        if record.exc_info and record.exc_info[0] is not None:
            kind, _, frames = record.exc_info
            # Without its message, which may hold what somebody has sent.
            line["exception"] = kind.__name__
            line["stack"] = [
                f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
                for frame in traceback.extract_tb(frames)
            ]
        return _ENCODER.encode(line).decode()


class RequestLog:
    """Counts requests, and logs those that failed and a sample of the others."""

    def __init__(self, count: Count, share: float):
        """Logs beside counting.

        Args:
            count: Function that counts a request by endpoint, status, version and seconds.
            share: Share of the requests that are logged; those of status 500 and above all are.
        """
        self._count = count
        self._share = share

    def __call__(self, endpoint: str, status: int, version: str, seconds: float) -> None:
        """Counts and logs a request that was answered."""
        self._count(endpoint, status, version, seconds)
        # All that failed is logged: what is rare is what a sample would miss.
        if status < 500 and random.random() >= self._share:
            return
        figures = {
            "request": endpoint,
            "status": status,
            "ms": round(1e3 * seconds, 3),
            "version": version,
        }
        level = logging.INFO if status < 500 else logging.ERROR
        _LOGGER.log(level, "request", figures)


def use_json() -> None:
    """Writes the log of this process as JSON from now on."""
    # The handler of absl is the only one, so that lines of libraries come in this form too.
    absl_logging.get_absl_handler().setFormatter(JsonFormatter())
    # Whatever --verbosity says: the share is the bound on these lines.
    _LOGGER.setLevel(logging.INFO)
