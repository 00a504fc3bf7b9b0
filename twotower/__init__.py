"""Two-tower retrieval in JAX: from a log of interactions to served recommendations.

    import twotower as tt

    run = tt.train(tt.from_dict(config), "runs/mine")
    tt.evaluate(run, baselines=True)
    tt.export(run)
    tt.load_retriever("runs/mine").recommend("17850", k=10)

Names are loaded when they are first used: `import twotower` itself loads the standard library
alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from twotower.api import evaluate, export, load_retriever, load_run, train
    from twotower.config import Config, defaults, from_dict
    from twotower.core.errors import ConfigError
    from twotower.retrieval.match import MatchModel
    from twotower.retrieval.retriever import Recommendation, Retriever
    from twotower.training.run import Run

# The module of each name. Those of the block above are for editors and type checkers alone.
_HOMES = {
    "Config": "twotower.config",
    "ConfigError": "twotower.core.errors",
    "MatchModel": "twotower.retrieval.match",
    "Recommendation": "twotower.retrieval.retriever",
    "Retriever": "twotower.retrieval.retriever",
    "Run": "twotower.training.run",
    "defaults": "twotower.config",
    "evaluate": "twotower.api",
    "export": "twotower.api",
    "from_dict": "twotower.config",
    "load_retriever": "twotower.api",
    "load_run": "twotower.api",
    "train": "twotower.api",
}

__all__ = [
    "Config",
    "ConfigError",
    "MatchModel",
    "Recommendation",
    "Retriever",
    "Run",
    "defaults",
    "evaluate",
    "export",
    "from_dict",
    "load_retriever",
    "load_run",
    "train",
]


def __getattr__(name: str) -> Any:
    """Loads a public name from its module (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'twotower' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    # Completion in a shell also offers names that are not loaded yet.
    return sorted([*globals(), *__all__])
