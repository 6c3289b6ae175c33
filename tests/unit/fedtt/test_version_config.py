from __future__ import annotations

from typing import Any

import msgspec
import pytest

from fedtt.errors import BundleError
from fedtt.version_config import VersionConfig, decode_config, encode_config, version_config
from tests.support.tiny import tiny_manifest


def config() -> VersionConfig:
    return version_config(tiny_manifest(), "b" * 64, "assistant", 3, "c" * 64)


def refusal(data: bytes) -> str:
    """The one line with which a config is refused."""
    with pytest.raises(BundleError) as error:
        decode_config(data, "result/config.json")
    assert str(error.value).startswith("result/config.json ")
    assert "\n" not in str(error.value)
    return str(error.value)


def changed(**changes: Any) -> bytes:
    return msgspec.json.encode({**msgspec.json.decode(encode_config(config())), **changes})


def test_a_config_says_what_the_version_is_of_and_comes_back_as_it_went() -> None:
    found = decode_config(encode_config(config()))
    assert found == config()
    assert (found.task_name, found.version_number, found.version_sha256) == ("assistant", 3, "c" * 64)
    assert (found.bundle_sha256, found.model.name, found.labels) == ("b" * 64, "tiny", ("no", "yes"))
    assert found.adapter.layout.digest == tiny_manifest().layout_sha256


def test_another_format_is_refused_with_both_versions_and_what_to_do() -> None:
    complaint = refusal(changed(format=1, dropped_since=1))
    assert "has format 1, this program reads format 3: export or download it again" in complaint


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"extra": 1}, "unknown field `extra`"),
        ({"version_sha256": "short"}, "`$.version_sha256`"),
        ({"version_number": "3"}, "`$.version_number`"),
        ({"adapter": None}, "`$.adapter`"),
    ],
)
def test_a_field_that_is_wrong_is_named(changes: dict[str, Any], complaint: str) -> None:
    refused = refusal(changed(**changes))
    assert complaint in refused
    assert refused.endswith("download it again")


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b'{"format":1,"x":' + b"[" * 900_000])
def test_bytes_that_are_no_config_are_refused(data: bytes) -> None:
    assert "is not a version's config" in refusal(data)


def test_a_config_over_the_limit_is_refused_before_it_is_read() -> None:
    assert "at most 1048576 are read" in refusal(b" " * (2**20 + 1))
