"""Requests that are answered together, and several requests in one: all are answered, or none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from types import CoroutineType
from typing import Any

import msgspec

from twotower.serving.errors import RequestError, explain
from twotower.serving.types import Answer

# An answer, what a request is refused by, or the function that makes the one or raises the other.
Made = Answer | Exception | Callable[[], Answer]
# Request by its number -> what is made of it: the answers of those that are made together, and
# functions that make the others.
HandleEach = Callable[[Mapping[int, Any]], Mapping[int, Made]]
# Requests that are made together: others wait for them, and the tower is compiled for as many.
PART = 16


async def answer_each(function: Callable[[Any], Any], requests: Sequence[Any]) -> list[Any]:
    """Returns the answers of several requests, made one after another.

    Args:
        function: Function from a request to its answer, or to a promise of it.
        requests: Requests.

    Raises:
        RequestError: One of them is refused; its field says which.
    """
    answers = []
    for number, request in enumerate(requests):
        try:
            result = function(request)
            if isinstance(result, CoroutineType):
                result = await result
        except Exception as error:
            raise _refusal(number, request, error) from error
        answers.append(result)
        # Others are answered in between.
        await asyncio.sleep(0)
    return answers


async def answer_together(each: HandleEach, requests: Sequence[Any]) -> list[Any]:
    """Returns the answers of several requests, made some at a time.

    Args:
        each: Function that answers some of them.
        requests: Requests.

    Raises:
        RequestError: One of them is refused; its field says which.
    """
    answers: list[Any] = []
    for first in range(0, len(requests), PART):
        part = dict(enumerate(requests[first : first + PART], first))
        found = each(part)
        for number, made in found.items():
            if isinstance(made, Exception):
                raise _refusal(number, part[number], made) from made
        for number, request in part.items():
            made = found[number]
            try:
                answers.append(made() if callable(made) else made)
            except Exception as error:
                raise _refusal(number, request, error) from error
            # Others are answered in between.
            await asyncio.sleep(0)
    return answers


def _refusal(number: int, request: Any, error: Exception) -> RequestError:
    """Returns what a batch is refused by, as one of its requests is."""
    refusal = explain(error, type(request), msgspec.json.encode(request))
    refusal.field = f"requests[{number}].{refusal.field}".rstrip(".")
    return refusal
