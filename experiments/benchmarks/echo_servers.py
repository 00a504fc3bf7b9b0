"""Servers that do nothing but HTTP, which `experiments.benchmarks.serving` compares ours with.

    python -m experiments.benchmarks.echo_servers bare|starlette PORT
    python -m experiments.benchmarks.echo_servers kept PORT BUNDLE

The first two read the body of a request of `POST /v1/retrieve` into a type of msgspec, and write
an answer of as many items as it asks for: ids and scores, the same ones each time. "bare" is an
application of ASGI alone on uvicorn; "starlette" has the routes, requests and responses of
Starlette. "kept" is our server without the model: each request gets the list that was made for the
first of its length.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

import msgspec

MOST = 100  # items of an answer


class Body(msgspec.Struct, gc=False):
    """The body of a request, as the benchmark sends it."""

    k: int = 10
    user_id: str | None = None
    history: list[str] | None = None
    columns: list[str] | None = None


class Item(msgspec.Struct, gc=False):
    """An item of an answer."""

    item_id: str
    score: float
    source: str
    display: dict[str, str]


class Answer(msgspec.Struct):
    """An answer, with the fields that ours has."""

    recommendation_id: str
    model_version: str
    items: list[Item]


DECODER = msgspec.json.Decoder(Body)
ENCODER = msgspec.json.Encoder()
# Scores of as many digits as those of float32 numbers have.
ITEMS = [Item(f"item-{n:07}", 1 / (n + 1.1), "model", {}) for n in range(MOST)]


def answer(body: bytes) -> bytes:
    """Returns the answer to a body."""
    asked = DECODER.decode(body)
    return ENCODER.encode(Answer("0123456789ab1", "0123456789ab", ITEMS[: asked.k]))


async def bare(
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[Any]],
    send: Callable[[Any], Awaitable[None]],
) -> None:
    """Answers a request of any path."""
    body = b"{}"
    if scope["method"] == "POST":
        # Bodies of these sizes come in one part.
        body = (await receive())["body"]
    written = answer(body)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(written)),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": written})


def make_starlette() -> Any:
    """Returns the application of Starlette."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    async def retrieve(request: Request) -> Response:
        return Response(answer(await request.body()), media_type="application/json")

    async def ready(request: Request) -> Response:
        del request
        return Response(b"{}", media_type="application/json")

    routes = [
        Route("/v1/retrieve", retrieve, methods=["POST"]),
        Route("/readyz", ready),
    ]
    return Starlette(routes=routes)


def serve_kept(port: int, folder: str) -> None:
    """Runs our server, whose retriever makes the first list of each length alone."""
    from twotower.retrieval.retriever import Retriever

    recommend = Retriever.recommend
    lists: dict[int, Any] = {}

    def kept(self: Retriever, *whom: Any, k: int = 10, **options: Any) -> Any:
        if k not in lists:
            lists[k] = recommend(self, *whom, k=k, **options)
        return lists[k]

    def kept_each(self: Retriever, asked: Sequence[Any], *, k: int = 10, **options: Any) -> Any:
        return [kept(self, k=k, **who, **options) for who in asked]

    Retriever.recommend = kept
    Retriever.recommend_each = kept_each
    sys.argv[1:] = ["serve", f"--bundle={folder}", f"--port={port}", f"--events={folder}.kept"]
    runpy.run_module("twotower", run_name="__main__")


def main(kind: str, port: int, *folder: str) -> None:
    """Serves until the process is ended."""
    if kind == "kept":
        serve_kept(port, *folder)
        return
    import uvicorn

    app = bare if kind == "bare" else make_starlette()
    lifespan = "off" if kind == "bare" else "auto"
    uvicorn.run(app, port=port, log_level="error", access_log=False, lifespan=lifespan)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
