"""Import torch or transformers, or skip the module and say why (`make test-parity` fails instead)."""

import importlib
import os
from types import ModuleType

import pytest

# Random tiny models only: nothing is ever fetched from a hub.
os.environ["HF_HUB_OFFLINE"] = "1"


def need(name: str) -> ModuleType:
    if os.environ.get("SLIMJAX_REQUIRE_PARITY") == "1":
        return importlib.import_module(name)
    return pytest.importorskip(
        name, reason=f"{name} is absent: install the extra 'parity' or run make test-parity"
    )
