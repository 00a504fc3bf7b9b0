"""The files of the page at `/`: HTML, CSS and JavaScript that are shipped in the package.

The page loads nothing from elsewhere, and its policy forbids it. No file holds anything of the
bundle or of the shop, so that they need no token; what they show they ask the API for.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from importlib import resources
from typing import Any

from twotower.retrieval.item_map.plane import map_script

# 'none' for all that is not named: a title with HTML in it, should one ever get through, runs
# nothing and fetches nothing.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    # A new version of the package may bring another page.
    (b"cache-control", b"no-cache"),
]
_PACKAGE = "twotower.serving.page"
_TYPES = {
    "html": b"text/html; charset=utf-8",
    "css": b"text/css; charset=utf-8",
    "js": b"text/javascript; charset=utf-8",
    "svg": b"image/svg+xml",
    "json": b"application/json",
}
# By name, and not whatever the folder holds: a file that an editor left there is not sent to
# everybody.
_SHIPPED = (
    "icon.svg",
    "page.css",
    "page.js",
    "api.js",
    "finder.js",
    "model.js",
    "options.js",
    "view.js",
)


class PageFile:
    """A file of the page, as a plain ASGI application.

    Attributes:
        method: Method of HTTP.
        path: Path of the file.
    """

    method = "GET"

    def __init__(self, path: str, kind: str, content: str):
        """Keeps a file in memory.

        Args:
            path: Path of the file.
            kind: Ending of its name, which says its type.
            content: What it holds.
        """
        self.path = path
        # Once, at the start: a page asks for all files together.
        self._body = content.encode()
        length = (b"content-length", b"%d" % len(self._body))
        self._headers = [(b"content-type", _TYPES[kind]), length, *HEADERS]

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:
        del scope, receive
        start = {"type": "http.response.start", "status": 200, "headers": self._headers}
        await send(start)
        await send({"type": "http.response.body", "body": self._body})


def page_files(names: Mapping[str, str]) -> list[PageFile]:
    """Returns the files of the page.

    Args:
        names: Our name of a field -> its name in the API, where they differ.
    """
    folder = resources.files(_PACKAGE).joinpath("static")
    files = [PageFile("/", "html", folder.joinpath("index.html").read_text(encoding="utf-8"))]
    for name in _SHIPPED:
        content = folder.joinpath(name).read_text(encoding="utf-8")
        files.append(PageFile(f"/page/{name}", name.rpartition(".")[2], content))
    # The script of the report's map, word for word: both draw the same plane.
    files.append(PageFile("/page/map.js", "js", map_script()))
    # The page sends the names of the shop's API as any client does.
    files.append(PageFile("/page/names.json", "json", json.dumps(dict(names))))
    return files
