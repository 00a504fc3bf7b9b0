"""What every feature has, whatever its kind."""

from __future__ import annotations

import dataclasses

from twotower.core.errors import ConfigError

SIDES = ("user", "item")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feature:
    """What every feature has.

    Attributes:
        side: the tower it belongs to, "user" or "item".
        name: its name within the tower.
        column: the column it reads; empty means its name. An item feature reads the items table; a
            user feature the users table or, where only the interactions have the column, the
            interaction (the context of a query).
        table: features that name one table share its rows and their vocabulary; empty means a table
            of its own, "side.name".
        embedding_size: width of its table. For a feature that is numbers (`float`, a normalised
            `int`, frozen vectors) the width of a dense layer put before the tower; 0 is none.
    """

    side: str
    name: str
    column: str = ""
    table: str = ""
    embedding_size: int = 32

    def __post_init__(self):
        self._check(self.side in SIDES, "side", "user or item")
        self._check(
            self.embedding_size >= self._least_width,
            "embedding_size",
            f"at least {self._least_width}",
        )
        self._check(
            self.has_table or not self.table,
            "table",
            "left out: this feature is numbers and has no table",
        )
        object.__setattr__(self, "column", self.column or self.name)
        if self.has_table and not self.table:
            object.__setattr__(self, "table", f"{self.side}.{self.name}")

    @property
    def has_table(self) -> bool:
        """Whether the feature is rows of a table (else it is numbers)."""
        return True

    @property
    def _least_width(self) -> int:
        return int(self.has_table)

    @property
    def where(self) -> str:
        """The feature as error messages call it."""
        return f"features.{self.side}.{self.name}"

    def _check(self, ok: bool, field: str, right: str) -> None:
        if not ok:
            raise ConfigError(f"{self.where}.{field}={getattr(self, field)!r} must be {right}.")

    def _at_least(self, low: int, *fields: str) -> None:
        for field in fields:
            self._check(getattr(self, field) >= low, field, f"at least {low}")
