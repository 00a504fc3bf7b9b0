"""The description of the API, OpenAPI 3.1, written from its types."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import msgspec

from twotower.serving.types import Problem

VERSION = "1"
REFERENCE = "#/components/schemas/{name}"
# Statuses that any endpoint may answer with.
STATUSES = {
    "400": "The request cannot be meant; the problem says why.",
    "401": "A token is missing, or not known.",
    "403": "The token does not give the right.",
    "404": "There is no such item, user or version.",
    "409": "The versions that are loaded do not allow it; the problem says which.",
    "413": "The body is too large.",
    "415": "The body is not declared as JSON.",
    "408": "The body came too slowly.",
    "429": "Too many requests were sent, or wait; Retry-After says when to come back.",
    "501": "Processes that hold a part of the bundle each cannot do it.",
    "503": "The server is not ready, or could not do this; Retry-After says when to come back.",
}


class Endpoint(Protocol):
    """What is described of an endpoint; see `twotower.serving.app.Endpoint`."""

    name: str
    method: str
    path: str
    summary: str
    request: type[Any] | None
    answer: type[Any] | None


def describe(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """Returns the document of an API.

    Args:
        endpoints: Endpoints of the API.
    """
    endpoints = list(endpoints)
    # A dict for its order, which keeps the document the same from one start to the next.
    kinds: dict[Any, None] = {Problem: None}
    for endpoint in endpoints:
        for kind in (endpoint.request, endpoint.answer):
            if kind is not None:
                kinds[kind] = None
    # All at once, so that a type which several endpoints use is described once.
    schemas, components = msgspec.json.schema_components(list(kinds), ref_template=REFERENCE)
    schema_of = dict(zip(kinds, schemas))
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        operation = _operation(endpoint, schema_of)
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Recommendations",
            "version": VERSION,
            "description": "Items for users, from a bundle of two towers.",
        },
        "paths": paths,
        "components": {
            "schemas": {name: _plain(schema) for name, schema in components.items()},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        # Each endpoint may be open where no token is set.
        "security": [{}, {"token": []}],
    }


def _operation(endpoint: Endpoint, schema_of: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    problem = {"application/problem+json": {"schema": schema_of[Problem]}}
    responses: dict[str, Any] = {}
    content = {"text/plain": {"schema": {"type": "string"}}}
    if endpoint.answer is not None:
        content = {"application/json": {"schema": schema_of[endpoint.answer]}}
    responses["200"] = {"description": "The answer.", "content": content}
    # Each of them for each endpoint: which are possible depends on tokens and limits of the server.
    for status, description in STATUSES.items():
        responses[status] = {"description": description, "content": problem}
    operation: dict[str, Any] = {
        "operationId": endpoint.name,
        "summary": endpoint.summary,
        "responses": responses,
    }
    if "{item_id}" in endpoint.path:
        parameter = {
            "name": "item_id",
            "in": "path",
            "required": True,
            "description": "Id of the item.",
            "schema": {"type": "string", "minLength": 1},
        }
        operation["parameters"] = [parameter]
    if endpoint.request is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema_of[endpoint.request]}},
        }
    return operation


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns a schema whose description is the summary of its docstring."""
    # The rest of a docstring is for readers of the code.
    summary = schema.get("description", "").partition("\n\n")[0]
    return {**schema, "description": " ".join(summary.split())}
