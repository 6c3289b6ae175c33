from __future__ import annotations

import msgspec
import pytest

from fedtt import names
from fedtt.errors import ConfigError
from fedtt.task import read_task


@pytest.mark.parametrize(
    ("kind", "sound"),
    [
        (names.SignatureHex, "0f" * 64),
        (names.Sha256, "0f" * 32),
        (names.DeviceId, "0f" * 16),
        (names.LeaseId, "0f" * 16),
        (names.Slug, "intents-7"),
    ],
)
def test_a_name_is_taken_whole_and_nothing_after_it(kind: object, sound: str) -> None:
    assert msgspec.json.decode(msgspec.json.encode(sound), type=kind) == sound
    for other in (sound + "\n", sound + "\n\n", "\n" + sound, sound.upper(), ""):
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(msgspec.json.encode(other), type=kind)


def test_a_task_is_not_named_with_a_line_feed() -> None:
    with pytest.raises(ConfigError, match="name"):
        read_task({"name": "intents\n", "rounds": {"count": 1, "cohort": 1}}, "task.toml")
