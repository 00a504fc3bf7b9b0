"""Who may do what: tokens for reading, for changing items and events, and for administration.

A token stands in the header `Authorization: Bearer …` or `X-API-Key`. A greater right includes the
smaller ones. Reading and sending events are open where no token is set for them; changing items
never is.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import ipaddress
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from twotower.core.errors import ConfigError, did_you_mean, echo
from twotower.serving.errors import RequestError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
MIN_LETTERS = 16  # of a token, so that it cannot be guessed


class Right(enum.IntEnum):
    """A right, which includes all below it."""

    NONE = 0
    READ = 1
    CHANGE = 2
    ADMIN = 3


# A right of NONE has no token: it is that of probes, which must work without a secret.
_NAMES = {"read": Right.READ, "change": Right.CHANGE, "admin": Right.ADMIN}


class Access:
    """The tokens of a server."""

    def __init__(self, tokens: Mapping[str, str | Iterable[str]]):
        """Keeps the hashes of tokens.

        Args:
            tokens: "read", "change" or "admin" -> a token, or several where one is being replaced.

        Raises:
            ConfigError: A right is unknown, or a token is too short.
        """
        self._rights: list[tuple[bytes, Right]] = []
        for name, values in tokens.items():
            if name not in _NAMES:
                raise ConfigError(
                    f"--tokens: {echo(name)} is no right{did_you_mean(name, _NAMES)} Known: "
                    f"{', '.join(_NAMES)}."
                )
            listed = [values] if isinstance(values, str) else list(values)
            # An empty list would be taken for no wish to have a token, which opens reading to
            # everybody.
            if not listed:
                raise ConfigError(f"--tokens: {name!r} has no token. Leave it out, or give one.")
            for token in listed:
                if not isinstance(token, str) or len(token) < MIN_LETTERS:
                    raise ConfigError(
                        f"--tokens: a token of {name!r} is shorter than {MIN_LETTERS} letters. "
                        "Make one by: openssl rand -hex 32"
                    )
                # Often the end of the line in the file of a secret; no request could send it.
                if token != token.strip() or not token.isprintable():
                    raise ConfigError(
                        f"--tokens: a token of {name!r} has a line break or a space at an end, "
                        "which no header carries. Take it away."
                    )
                self._rights.append((_digest(token.encode()), _NAMES[name]))
        self._set = {right for _, right in self._rights}

    @classmethod
    def read(cls, path: str, environment: Mapping[str, str] = os.environ) -> Access:
        """Returns the tokens of a JSON file, or of the environment: TWOTOWER_READ_TOKEN and so on.

        Args:
            path: File of {"read": TOKEN, "change": TOKEN, "admin": TOKEN}; "" for none.
            environment: Environment variables.

        Raises:
            ConfigError: The file cannot be read, or holds something else.
        """
        tokens: dict[str, Any] = {}
        for name in _NAMES:
            value = environment.get(f"TWOTOWER_{name.upper()}_TOKEN")
            # An empty variable is a secret that was not found, and is refused as too short.
            if value is not None:
                tokens[name] = value
        if path:
            try:
                read = json.loads(Path(path).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"--tokens={path} is no JSON: {error}.") from None
            if not isinstance(read, dict):
                raise ConfigError(f'--tokens={path} must hold an object: {{"read": "…"}}.')
            tokens |= read
        return cls(tokens)

    def is_open(self, right: Right) -> bool:
        """Whether a right needs no token, because none is set for it or for a smaller one."""
        # A token for a smaller right closes the greater ones too: where reading is guarded, a
        # stranger who may not read must not send events either.
        return right == Right.NONE or not any(held <= right for held in self._set)

    @property
    def clients(self) -> int:
        """Number of clients that are told apart: one a token, and all without one together."""
        return len(self._rights) + 1

    def identify(self, headers: Iterable[tuple[bytes, bytes]]) -> tuple[Right | None, int]:
        """Returns the right that a request's token gives, and the number of its client.

        Args:
            headers: Headers of the request, their names in small letters.

        Returns:
            None where no token is sent, and `Right.NONE` of one that is not known.
        """
        token = b""
        for name, value in headers:
            # The name of a scheme has no case (RFC 9110); a token has.
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                token = value[7:].strip()
            elif name == b"x-api-key":
                token = value
        unnamed = len(self._rights)
        if not token:
            return None, unnamed
        digest = _digest(token)
        granted = Right.NONE
        client = unnamed
        # All of them, so that the time does not tell which one was nearly right.
        for number, (known, held) in enumerate(self._rights):
            if hmac.compare_digest(digest, known):
                granted = max(granted, held)
                client = number
        return granted, client

    def check(self, right: Right, granted: Right | None) -> None:
        """Refuses a request whose token does not give a right.

        Args:
            right: Right that the request needs.
            granted: Right that its token gives; see `identify`.

        Raises:
            RequestError: It has no token, or a wrong one.
        """
        # Apart from a wrong token, since each is cured by something else: a header, or a newer
        # secret.
        if granted is None:
            raise RequestError(
                401,
                "This needs a token.",
                cure="Send the header Authorization: Bearer TOKEN.",
            )
        if granted == Right.NONE:
            raise RequestError(401, "The token is not known.", cure="Send another token.")
        if granted < right:
            raise RequestError(
                403,
                f"The token does not give the right to {right.name.lower()}.",
                cure=f"Send a token for {right.name.lower()}.",
            )


class Hosts:
    """The names that a server answers to, as the header Host of a request has them.

    A page of another site can have its own name point to this machine (DNS rebinding): a browser
    then asks a server on loopback, which needs no token, in the name of that site, and gives the
    site the answer.
    """

    def __init__(self, names: Iterable[str]):
        """Answers to some names.

        Args:
            names: Names or addresses without a port; "*" for any.
        """
        self._names = {name.strip("[]").lower().encode() for name in names}
        self._takes_any = b"*" in self._names

    @classmethod
    def at(cls, address: str, names: Sequence[str]) -> Hosts | None:
        """Returns the names of a server at an address; None where any will do.

        Args:
            address: Address that it listens at.
            names: Further names. Beyond loopback, where proxies and balancers have names of their
                own, any will do unless some are given.
        """
        is_loopback = ipaddress.ip_address(address).is_loopback
        if not is_loopback and not names:
            return None
        return cls([*LOOPBACK_NAMES, address, *names])

    def allow(self, host: bytes) -> bool:
        """Returns whether a request is meant for this server.

        >>> hosts = Hosts.at("127.0.0.1", ["shop.example"])
        >>> [hosts.allow(name) for name in (b"localhost:8000", b"[::1]", b"Shop.example", b"a.b")]
        [True, True, True, False]

        Args:
            host: Value of its header Host, a name with or without a port.
        """
        if self._takes_any:
            return True
        name, colon, port = host.rpartition(b":")
        # An address of IPv6 has colons within its brackets.
        if not colon or not port.isdigit():
            name = host
        return name.strip(b"[]").lower() in self._names


def check_hosts(names: Sequence[str]) -> None:
    """Refuses what is no name of a host.

    Raises:
        ConfigError: A name has a port, or is an address of a page.
    """
    for name in names:
        is_address = name.count(":") > 1
        if not name.strip() or "/" in name or (":" in name and not is_address):
            raise ConfigError(
                f"--allowed_hosts: {echo(name)} is no name of a host. Write it without https:// "
                "and without a port, as in --allowed_hosts=shop.example."
            )


def _digest(token: bytes) -> bytes:
    # Of equal length whatever the token is, which the comparison needs. Without salt or slowness:
    # those protect words that can be guessed, and would cost their time with every request.
    return hashlib.sha256(token).digest()
