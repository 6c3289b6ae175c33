"""Bundles that many tests share, exported once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

TINY_LABELS = ("alarm", "lights off", "pay", "weather")


@pytest.fixture(scope="session", autouse=True)
def _offline() -> None:
    """No test may wait for a hub that cannot be reached."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
