"""Set up before every test."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import jaxtyping
import pytest


@pytest.fixture
def as_a_user():
    """The library as users run it: without the shape checker, so that its own errors are what speaks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
