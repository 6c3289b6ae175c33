from __future__ import annotations

from typing import Any

import pytest

from export.request import ExportRequest
from fedtt.errors import ConfigError


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"task": "translation"}, "task = 'translation'"),
        ({"task": "causal-lm"}, "none for causal-lm"),
        ({"head": "mlp"}, "head = 'mlp'"),
        ({"sites": ("attention", "ffn")}, "sites = 'ffn'"),
    ],
)
def test_nonsense_is_refused_when_the_request_is_made(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        ExportRequest(**{"model": "m", "labels": ("no", "yes"), **change})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rank": 0}, "adapter.rank = 0"),
        ({"depth": 3}, "adapter.depth = 3 .*from 1 to 2"),
        ({"bottleneck": 64}, "adapter.bottleneck = 64"),
        ({"hidden_modes": (4, 4)}, "multiply to 32"),
        ({"labels": ()}, "at least 2 labels"),
    ],
)
def test_what_does_not_fit_the_base_is_refused_when_planned(change: dict[str, Any], complaint: str) -> None:
    request = ExportRequest(**{"model": "m", "labels": ("no", "yes"), "bottleneck": 8, **change})
    with pytest.raises(ConfigError, match=complaint):
        request.plan(hidden=32, layers=2)


def test_a_decoder_for_next_tokens_has_no_head() -> None:
    request = ExportRequest(model="m", task="causal-lm", bottleneck=8)
    assert request.plan(hidden=32, layers=2).head is None
