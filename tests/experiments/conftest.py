"""Fixtures of the commands' tests."""

from tests.experiments.trained import exported, trained  # noqa: F401  pytest finds them by name
