"""A server in this process, asked without a network."""

import asyncio
import json
import time

import httpx

from twotower.serving.access import Access
from twotower.serving.answers import Answers
from twotower.serving.app import App
from twotower.serving.direct import Reply, WholeRequest
from twotower.serving.events import EventLog
from twotower.serving.limits import Limits
from twotower.serving.versions.versions import Versions

TOKENS = {
    "read": "a token for reading",
    "change": "a token for changes",
    "admin": "a token for everything",
}


def make_app(retriever, folder, *, tokens=None, hook=None, **options):
    """A server that is ready, with its events in a folder."""
    options.setdefault("limits", Limits(seconds=0.3))
    events = EventLog(folder / "events")
    versions = Versions(Answers(retriever, hook=hook))
    app = App(versions, events, access=Access(tokens or {}), **options)
    app.status = "ok"
    return app


async def send(app, method, path, body=None, **options):
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)
    # Without certificates, which take longer to read than a request to answer.
    options_of_client = {"base_url": "http://shop", "verify": False, "trust_env": False}
    async with httpx.AsyncClient(transport=transport, **options_of_client) as client:
        if body is not None:
            options["json"] = body
        return await client.request(method, path, **options)


def ask(app, method, path, body=None, **options):
    """The response to one request."""
    return asyncio.run(send(app, method, path, body, **options))


def watch_tower(retriever, monkeypatch):
    """A list to which each call of a tower appends the number of its rows."""
    sizes = []
    towers = type(retriever.bundle.towers)
    embed = towers.embed

    def count(self, side, features, **options):
        sizes.append(len(next(iter(features.values()))))
        return embed(self, side, features, **options)

    monkeypatch.setattr(towers, "embed", count)
    return sizes


def reply_together(app, requests):
    """The replies to requests for a user's list that wait at the same moment, and which of them
    were made together."""
    now = time.perf_counter()
    headers = [(b"content-type", b"application/json")]
    whole = [WholeRequest(headers, json.dumps(body).encode(), now) for body in requests]
    made = app.direct[b"/v1/retrieve"].reply_each(whole)
    replies = [reply if isinstance(reply, Reply) else reply() for reply in made]
    return replies, [isinstance(reply, Reply) for reply in made]


def post(app, name, **body):
    """The answer to a request that is right."""
    response = ask(app, "POST", f"/v1/{name}", body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(app, name, status=400, **body):
    """The problem of a request that is refused."""
    response = ask(app, "POST", f"/v1/{name}", body)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    return response.json()
