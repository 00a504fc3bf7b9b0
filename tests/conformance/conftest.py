"""Programs of the kit run once or twice: they are compiled in a hurry."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def hurried_compiler():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
