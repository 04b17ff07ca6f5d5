"""Tests run offline, on one thread, at the smallest scale, unless the environment says otherwise."""

import os

# before torch or transformers are imported; chapters under test inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("SAE_LIB_SCALE", "smoke")

import jaxtyping
import pytest


@pytest.fixture
def as_a_user():
    """The library as users run it: without the shape checker, so that its own errors are what speaks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
