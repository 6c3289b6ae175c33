"""Tests that take long and of which a shorter one always runs: with FEDTT_LONG=1 alone."""

from __future__ import annotations

import os

import pytest

__all__ = ["LONG", "takes_long"]

LONG = bool(os.environ.get("FEDTT_LONG"))


def takes_long(what: str) -> pytest.MarkDecorator:
    """Skip, and say so, unless long tests are asked for."""
    reason = f"SKIPPED: {what} takes long; FEDTT_LONG=1 ./scripts/check does it, too"
    return pytest.mark.skipif(not LONG, reason=reason)
