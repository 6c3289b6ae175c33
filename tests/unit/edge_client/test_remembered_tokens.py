from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_client.examples import Text
from edge_client.tokens import RememberedTokens, Tokens
from tests.support.edge import small_bundle

TEXTS: list[Text] = [
    "lights on please",
    "off",
    "lights on please",
    ("lights on", "now"),
    "please " * 50,
    "nobody knows this",
    ("on " * 30, "off " * 40),
]


@pytest.mark.parametrize("limit", [10**6, 40, 1, 0])
def test_the_rows_are_those_of_the_devices_tokenizer_however_much_is_remembered(
    limit: int, tmp_path: Path
) -> None:
    bundle = small_bundle(tmp_path)
    plain, remembered = Tokens(bundle), RememberedTokens(bundle, limit=limit)
    for texts in (TEXTS, TEXTS[::-1], TEXTS[2:3], [], TEXTS):
        assert remembered.rows(texts) == plain.rows(texts)
    batch, cut = remembered.batch(TEXTS, [0] * len(TEXTS))
    expected, expected_cut = plain.batch(TEXTS, [0] * len(TEXTS))
    assert cut == expected_cut == 2
    assert batch.ids.tolist() == expected.ids.tolist()
    assert batch.mask.tolist() == expected.mask.tolist()


def test_texts_are_cut_where_the_plan_says(tmp_path: Path) -> None:
    rows, cut = RememberedTokens(small_bundle(tmp_path), 2).rows(["lights on please"])
    assert (rows, cut) == ([[2, 3]], [True])


def test_a_text_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Text] = []
    plain = Tokens.rows

    def counted(self: Tokens, texts: list[Text], *rest: Any) -> tuple[list[list[int]], list[bool]]:
        read.extend(texts)
        return plain(self, texts, *rest)

    monkeypatch.setattr(Tokens, "rows", counted)
    tokens = RememberedTokens(small_bundle(tmp_path))
    for _ in range(3):
        tokens.rows(TEXTS)
    assert sorted(map(str, read)) == sorted({str(text) for text in TEXTS})
