"""Two-tower retrieval in JAX: from a log of interactions to served recommendations."""

__version__ = "0.1.0"
