"""Two-tower retrieval in JAX: from a log of interactions to served recommendations.

    import twotower as tt

    run = tt.fit(events, items=products, workdir="runs/mine")   # frames, or paths of files
    run.evaluate(baselines=True)
    run.recommend("17850", k=10)
    run.export()
    tt.Retriever.load("runs/mine/bundle").recommend("17850", k=10)

The names in `__all__` are stable; every other module and name is internal and may change. Names are
loaded when they are first used: `import twotower` itself loads the standard library alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from twotower import config, features, register
    from twotower.api import (
        Run,
        compare,
        fit,
        grow,
        judge,
        load_retriever,
        load_run,
        prepare,
        refit,
        sweep,
        train,
    )
    from twotower.core.errors import TwotowerError
    from twotower.evaluation import metrics
    from twotower.experiment import load_config
    from twotower.objectives import losses
    from twotower.retrieval import rerank
    from twotower.retrieval.match import MatchModel
    from twotower.retrieval.retriever import Recommendation, Retriever

# The module that has each name. The imports above are for editors and type checkers alone.
_HOMES = {
    "MatchModel": "twotower.retrieval.match",
    "Recommendation": "twotower.retrieval.retriever",
    "Retriever": "twotower.retrieval.retriever",
    "Run": "twotower.api",
    "TwotowerError": "twotower.core.errors",
    "compare": "twotower.api",
    "fit": "twotower.api",
    "grow": "twotower.api",
    "judge": "twotower.api",
    "load_config": "twotower.experiment",
    "load_retriever": "twotower.api",
    "load_run": "twotower.api",
    "prepare": "twotower.api",
    "refit": "twotower.api",
    "sweep": "twotower.api",
    "train": "twotower.api",
}
# Names that are modules themselves.
_MODULES = {
    "config": "twotower.config",
    "features": "twotower.features",
    "losses": "twotower.objectives.losses",
    "metrics": "twotower.evaluation.metrics",
    "register": "twotower.register",
    "rerank": "twotower.retrieval.rerank",
}

__all__ = [
    "MatchModel",
    "Recommendation",
    "Retriever",
    "Run",
    "TwotowerError",
    "compare",
    "config",
    "features",
    "fit",
    "grow",
    "judge",
    "load_config",
    "load_retriever",
    "load_run",
    "losses",
    "metrics",
    "prepare",
    "refit",
    "register",
    "rerank",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    """Loads a public name from its module (PEP 562)."""
    if name in _MODULES:
        # As a module it needs no home of its own, and nothing of JAX.
        return importlib.import_module(_MODULES[name])
    if name in _HOMES:
        # Before the module imports JAX, which reads its options then.
        importlib.import_module("twotower.runtime").prepare_process()
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'twotower' has no attribute {name!r}")


def __dir__() -> list[str]:
    # Completion in a shell also offers names that are not loaded yet.
    return sorted([*globals(), *__all__])
