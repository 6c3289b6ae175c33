"""What a clone must hold before any test of it means something."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["aggregator", "edge_client", "export", "fedtt", "fleet", "storage"])
def test_each_package_that_is_imported_is_the_one_of_this_checkout(name: str) -> None:
    found = import_module(name).__file__
    assert found is not None
    assert Path(found).resolve() == ROOT / name / "__init__.py"
