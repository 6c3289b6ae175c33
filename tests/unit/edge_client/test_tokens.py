from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from edge_client.bundle import Bundle
from edge_client.tokens import KeptTokens, Tokens, _of_tokenizer
from fedtt.errors import BundleError
from tests.support.edge import living_tokenizers, panicking_tokenizer, small_bundle
from tests.support.tiny import tiny_manifest

SPEC = tiny_manifest().tokenization  # min_tokens 3, max_tokens 16, pad_id 0


def test_texts_are_padded_to_the_longest_of_the_batch(tmp_path: Path) -> None:
    batch, cut = Tokens(small_bundle(tmp_path)).batch(["lights on please now", "off"], [1, 0])
    assert batch.ids.tolist() == [[2, 3, 5, 6], [4, 0, 0, 0]]
    assert batch.mask.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, 0]
    assert {batch.ids.dtype, batch.mask.dtype, batch.labels.dtype} == {np.dtype(np.int64)}
    assert cut == 0


def test_two_texts_are_read_together_and_the_longer_is_cut_first(tmp_path: Path) -> None:
    tokens = Tokens(small_bundle(tmp_path), 6)
    batch, cut = tokens.batch([("lights on", "off please"), ("on", "now " * 9), "off"])
    assert batch.ids.tolist() == [[2, 3, 4, 5, 0, 0], [3, 6, 6, 6, 6, 6], [4, 0, 0, 0, 0, 0]]
    assert cut == 1


def test_short_batches_are_padded_to_what_the_graph_needs(tmp_path: Path) -> None:
    batch, _ = Tokens(small_bundle(tmp_path)).batch(["on"])
    assert batch.ids.tolist() == [[3, 0, 0]]
    assert batch.labels is None


def test_texts_are_cut_where_the_graph_ends_and_counted(tmp_path: Path) -> None:
    batch, cut = Tokens(small_bundle(tmp_path)).batch(["on " * 17, "on " * 16])
    assert batch.ids.shape == (2, 16)
    assert cut == 1


@pytest.mark.parametrize(("asked", "width"), [(5, 5), (99, 16), (1, 3)])
def test_a_plan_may_cut_earlier_but_never_later(tmp_path: Path, asked: int, width: int) -> None:
    batch, cut = Tokens(small_bundle(tmp_path), asked).batch(["on " * 50])
    assert (batch.ids.shape, cut) == ((1, width), 1)


def test_settings_inside_the_tokenizer_file_do_not_pad_or_cut(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    bundle = small_bundle(tmp_path)
    tokenizer = Tokenizer.from_file(str(bundle.path("tokenizer.json")))
    tokenizer.enable_padding(length=12)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(bundle.path("tokenizer.json")))
    batch, _ = Tokens(bundle).batch(["on off on off"])
    assert batch.ids.tolist() == [[3, 4, 3, 4]]


def test_padding_uses_the_id_of_the_manifest(tmp_path: Path) -> None:
    batch, _ = Tokens(small_bundle(tmp_path, tokenization=replace(SPEC, pad_id=6))).batch(["on"])
    assert batch.ids.tolist() == [[3, 6, 6]]
    assert batch.mask.tolist() == [[1, 0, 0]]


def test_ids_become_text_again(tmp_path: Path) -> None:
    assert Tokens(small_bundle(tmp_path)).text([2, 3]) == "lights on"


def test_a_file_that_is_no_tokenizer_is_a_clear_error(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    bundle.path("tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer.json is not a tokenizer this program can read"):
        Tokens(bundle).rows(["on"])


A: dict[str, object] = {"Sequence": {"id": "A", "type_id": 0}}
SPECIAL: dict[str, object] = {"SpecialToken": {"id": "[PAD]", "type_id": 0}}


def template(*single: dict[str, object], known: bool = True) -> dict[str, object]:
    special = {"[PAD]": {"id": "[PAD]", "ids": [0], "tokens": ["[PAD]"]}} if known else {}
    pair = [A, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": list(single),
        "pair": pair,
        "special_tokens": special,
    }


def with_changes(bundle: Bundle, **changes: object) -> Bundle:
    """The same, with other parts in its tokenizer's file."""
    path = bundle.path(SPEC.file)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return bundle


@pytest.mark.parametrize(
    "changes",
    [
        json.loads(panicking_tokenizer()),
        {"post_processor": template(SPECIAL, known=False)},
    ],
    ids=["when read", "at a text"],
)
def test_a_tokenizer_at_which_its_library_panics_is_a_clear_error(
    changes: dict[str, object], tmp_path: Path
) -> None:
    tokens = Tokens(with_changes(small_bundle(tmp_path), **changes))
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer this program can read"):
        tokens.rows(["on " * 50])


@pytest.mark.parametrize("single", [[SPECIAL] * 17 + [A], [A, A]], ids=["special tokens", "texts twice"])
def test_a_tokenizer_that_makes_more_tokens_than_the_graph_takes_is_a_clear_error(
    single: list[dict[str, object]], tmp_path: Path
) -> None:
    tokens = Tokens(with_changes(small_bundle(tmp_path), post_processor=template(*single)))
    with pytest.raises(BundleError, match=r"makes \d+ tokens of a text, 16 are allowed"):
        tokens.rows(["on off " * 50])


@pytest.mark.parametrize("asked", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_a_program_that_is_asked_to_end_while_it_reads_ends(
    asked: type[BaseException], tmp_path: Path
) -> None:
    with pytest.raises(asked), _of_tokenizer(tmp_path):
        raise asked


def test_a_tokenizer_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    os.truncate(bundle.path(SPEC.file), 1 << 40)
    with pytest.raises(BundleError, match="has 1099511627776 bytes, a tokenizer has at most"):
        Tokens(bundle).rows(["on"])


def test_what_is_remembered_is_of_the_bundle_opened_last_and_of_few_limits(tmp_path: Path) -> None:
    one, other = (
        small_bundle(tmp_path / "one"),
        dataclasses.replace(small_bundle(tmp_path / "other"), digest="1" * 64),
    )
    kept = KeptTokens()
    plain, short = kept.open(one), kept.open(one, 5)
    assert (kept.open(one), kept.open(one, 5)) == (plain, short)
    assert short.batch(["on " * 9])[0].ids.shape == (1, 5)
    kept.open(one, 6)
    assert kept.open(one, 5) is short
    assert kept.open(one) is not plain, "the longest unused went"
    assert kept.open(other) is not kept.open(one)
    assert kept.open(one, 5) is not short, "another bundle took the place of all"


def test_a_device_holds_a_tokenizer_only_while_it_reads_new_texts(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    tokens = KeptTokens().open(bundle)
    with living_tokenizers() as living:
        assert not tokens.know(["on"])
        rows = tokens.rows(["on", "off"])
        assert (len(living.read), living.count) == (1, 0)
        assert tokens.know(["off", "on"])
        assert tokens.rows(["on", "off"]) == rows
        assert not tokens.know(["on", "now"])
        tokens.rows(["on", "now"])
        assert (len(living.read), living.count) == (2, 0)
