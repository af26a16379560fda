"""How the tests run: one thread per worker, and the same drawn examples every time."""

import functools
import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from transformers import PreTrainedModel

from hf_variants.conversion.memory import lay_alike
from tests.tools.table import (  # noqa: F401 (hooks, found by name)
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
)


# Two workers with a full thread pool each are slower than one; and a process that a test starts has to round as this one.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# `HYPOTHESIS_PROFILE=explore` draws new and more examples; what it finds becomes a test of its own.
_shared = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
_no_shrinking = (Phase.explicit, Phase.generate)
settings.register_profile("fixed", derandomize=True, max_examples=25, phases=_no_shrinking, **_shared)
settings.register_profile("explore", max_examples=500, **_shared)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# What torch's inductor needs on a CPU; a bare machine has neither.
HAS_COMPILER = (
    bool(shutil.which(os.environ.get("CXX", "g++"))) and (Path(sysconfig.get_path("include")) / "Python.h").is_file()
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("compiler"):
        if not HAS_COMPILER:
            pytest.skip("needs a C++ compiler (g++, or CXX) and Python's headers")
        # A number that changes from one call to the next is compiled as an unknown, which inductor's flex attention cannot
        # for a soft-cap; so no test may see what another compiled.
        torch.compiler.reset()


@pytest.fixture(autouse=True, scope="session")
def loaded_weights_lie_like_fresh_ones():
    """Many tests compare the bits of a loaded model with those of a live one, wherever a file's header ends."""
    load = PreTrainedModel.from_pretrained.__func__

    @functools.wraps(load)
    def from_pretrained(cls, *args, **kwargs):
        loaded = load(cls, *args, **kwargs)
        lay_alike(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
        yield
