"""The field names of a shop's own API, in the place of ours: {"buyer_id": "user_id", …}."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from twotower.core.errors import ConfigError, did_you_mean, echo
from twotower.serving.errors import RequestError

# Fields whose content has names of its own, of columns, users or versions: a shop that calls
# user_id "id" may still have a column "id".
_OPAQUE = (
    "where",
    "display",
    "columns",
    "max_per",
    "figures",
    "data",
    "weights",
    "overrides",
    "refused",
)


class Aliases:
    """Names of fields as a shop writes them.

    Attributes:
        theirs: Our name -> the name of the shop.
    """

    def __init__(self, names: Mapping[str, str], known: Collection[str]):
        """Checks the names, and keeps them.

        Args:
            names: Name of the shop -> our name; where several mean one, answers have the first.
            known: Our names.

        Raises:
            ConfigError: One of ours is unknown, or a name of the shop's is another one of ours.
        """
        self._ours = dict(names)
        # All of the file is checked at the start: a customer's request would find a wrong name
        # else.
        for theirs, ours in self._ours.items():
            if ours not in known:
                raise ConfigError(
                    f"--aliases: {echo(theirs)} is {echo(ours)}, which is no field"
                    f"{did_you_mean(str(ours), known)}"
                )
            # Our own names are understood beside the shop's, so that none of them can mean another
            # field.
            if theirs in known:
                raise ConfigError(
                    f"--aliases: {echo(theirs)} is a field already: it cannot mean {echo(ours)}."
                )
        # Backwards, since the last one of equal keys stays: answers have the first name of the
        # file.
        self.theirs = {ours: theirs for theirs, ours in reversed(self._ours.items())}

    @classmethod
    def read(cls, path: str, known: Collection[str]) -> Aliases:
        """Returns the names in a JSON file.

        Raises:
            ConfigError: It cannot be read, or a name in it is unknown.
        """
        try:
            names = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"--aliases={path} is no JSON: {error}.") from None
        if not isinstance(names, dict):
            raise ConfigError(f'--aliases={path} must hold an object: {{"buyer_id": "user_id"}}.')
        return cls(names, known)

    def to_ours(self, value: Any) -> Any:
        """Returns a request with our names.

        Raises:
            RequestError: Two names of an object mean one field.
        """
        if isinstance(value, list):
            return [self.to_ours(member) for member in value]
        if not isinstance(value, dict):
            return value
        renamed: dict[str, Any] = {}
        for theirs, member in value.items():
            ours = self._ours[theirs] if theirs in self._ours else theirs
            if ours in renamed:
                raise RequestError(
                    400,
                    f"Two fields are {ours}.",
                    field=ours,
                    value=echo(member),
                    cure="Leave one out.",
                )
            renamed[ours] = member if ours in _OPAQUE else self.to_ours(member)
        return renamed

    def to_theirs(self, value: Any) -> Any:
        """Returns an answer, or the description of one, with the names of the shop."""
        if isinstance(value, list):
            return [self.to_theirs(member) for member in value]
        if not isinstance(value, dict):
            return value
        renamed = {}
        for ours, member in value.items():
            opaque = ours in _OPAQUE
            renamed[self.theirs.get(ours, ours)] = member if opaque else self.to_theirs(member)
        return renamed

    def rename_field(self, field: str) -> str:
        """Returns the place of a field in a request with the names of the shop."""
        return re.sub(r"\w+", lambda found: self.theirs.get(found[0], found[0]), field)
