"""Several requests in one: all of them are answered, or none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CoroutineType
from typing import Any

import msgspec

from twotower.serving.errors import RequestError, explain

# request by number -> answers by number, or what is raised, as many at once as are made together
HandleEach = Callable[[Mapping[int, Any]], Iterator[Mapping[int, Any]]]
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
        made: dict[int, Any] = {}
        for some in each(dict(enumerate(requests[first : first + PART], first))):
            made |= some
            # Others are answered in between.
            await asyncio.sleep(0)
        for number in sorted(made):
            if isinstance(made[number], Exception):
                raise _refusal(number, requests[number], made[number]) from made[number]
            answers.append(made[number])
    return answers


def _refusal(number: int, request: Any, error: Exception) -> RequestError:
    """Returns what a batch is refused by, as one of its requests is."""
    refusal = explain(error, type(request), msgspec.json.encode(request))
    refusal.field = f"requests[{number}].{refusal.field}".rstrip(".")
    return refusal
