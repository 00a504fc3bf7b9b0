"""The options of a server's lists, which hold for all versions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from twotower.config import RerankConfig
from twotower.core.errors import ConfigError
from twotower.plugins import import_plugins
from twotower.retrieval.rerank import resolve_rerank
from twotower.serving.answers import Answers, Fallback
from twotower.serving.lists.hook import Hook

MakeAnswers = Callable[..., Answers]  # takes a Retriever


@dataclasses.dataclass(frozen=True)
class ListOptions:
    """The options of a server's lists.

    Attributes:
        fallback: List of somebody of whom nothing is known.
        plugins: Modules or files that register re-rankers, as in `config.plugins`.
        rerank: Re-ranker of the model's lists with its options, "mine:weight=2"; "" for that of the
            bundle, without a limit of time.
        rerank_ms: Milliseconds that it has for a list.
    """

    fallback: Fallback = "popular"
    plugins: Sequence[str] = ()
    rerank: str = ""
    rerank_ms: float = 20.0

    def prepare(self, folder: Path) -> MakeAnswers:
        """Imports the plugins, and returns the function that makes a version of a bundle.

        Args:
            folder: Folder of a bundle; code in it is never imported.

        Raises:
            ConfigError: A plugin is not found, or there is no such re-ranker.
        """
        import_plugins(self.plugins, folder)
        hook = None
        if self.rerank:
            try:
                reranking = resolve_rerank(self.rerank, RerankConfig())
            except ConfigError as error:
                raise ConfigError(f"--rerank={self.rerank}: {error}") from None
            # One for all versions: its thread is the bound on how many lists are re-ranked at once.
            if reranking is not None:
                hook = Hook(reranking, self.rerank_ms / 1_000)
        return functools.partial(Answers, fallback=self.fallback, hook=hook)
