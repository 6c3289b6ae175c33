"""Directories as runs leave them, without the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from fleet.participation import COLUMNS
from fleet.run_files import DeviceLine, Outcome, VersionLine

__all__ = ["device_line", "outcome", "version_line", "write_run"]


def version_line(number: int, **changes: Any) -> VersionLine:
    """A version of a run that gets better by the number."""
    given: dict[str, Any] = {
        "version": number,
        "round": number or None,
        "sha256": "0" * 64,
        "virtual_s": 100.0 * number,
        "wall_s": 1.0 * number,
        "updates": 10 if number else 0,
        "examples": 300,
        "staleness": {0: 10} if number else {},
        "train_loss_first": 2.0 if number else None,
        "train_loss_last": 1.5 if number else None,
        "loss": 2 / (1 + number),
        "accuracy": number / (1 + number),
        "sent_bytes": 5000 * number,
        "received_bytes": 70_000 * number,
        "bundle_bytes": 10**6 * number,
        "frame_bytes": 4000 * number,
        "trained": 10 * number,
        "outcomes": {"acknowledged": 10 * number} if number else {},
        "participations": None,
        "report": {},
    }
    return VersionLine(**{**given, **changes})


def outcome(**changes: Any) -> Outcome:
    given: dict[str, Any] = {
        "task": "lights",
        "state": "finished",
        "reason": "all rounds are folded",
        "versions": 4,
        "sha256": "0" * 64,
        "accuracy": 0.8,
        "loss": 0.4,
        "virtual_s": 400.0,
        "wall_s": 4.0,
        "devices": 20,
        "took_part": 3,
        "left_out": {},
        "outcomes": {"acknowledged": 40},
        "steps": 400,
        "sent_bytes": 20_000,
        "received_bytes": 280_000,
        "bundle_bytes": 4 * 10**6,
        "frame_bytes": 16_000,
        "directory": "run",
    }
    return Outcome(**{**given, **changes})


def device_line(number: int, **changes: Any) -> DeviceLine:
    given: dict[str, Any] = {
        "device": number,
        "profile": "phone",
        "shard": number,
        "participations": 1,
        "sent_bytes": 10,
        "received_bytes": 10,
        "left_out": False,
        "examples": 8,
        "loss": 0.5,
        "accuracy": number % 9 / 8,
    }
    return DeviceLine(**{**given, **changes})


def write_run(
    directory: Path,
    *,
    versions: Sequence[VersionLine] | None = None,
    work: Sequence[tuple[int, str]] = ((0, "acknowledged"), (0, "acknowledged"), (3, "dropped")),
    ended: Outcome | None = None,
    devices: Sequence[DeviceLine] = (),
    settings: dict[str, Any] | None = None,
) -> Path:
    """work: device and what came of it. ended: None for a run that was cut short."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [version_line(number) for number in range(5)] if versions is None else versions
    rows = [[device, 1, 0, 1.5, 9.0, what, 4, 30, 2.0, 1.5, 333] for device, what in work]
    _write(directory / "versions.jsonl", lines)
    _write(directory / "participations.jsonl", [list(COLUMNS), *rows])
    (directory / "settings.json").write_bytes(msgspec.json.encode(settings or {"task": {"name": "lights"}}))
    if ended is not None:
        (directory / "summary.json").write_bytes(msgspec.json.encode(ended))
        _write(directory / "devices.jsonl", devices)
    return directory


def _write(path: Path, objects: Sequence[object]) -> None:
    path.write_bytes(b"".join(msgspec.json.encode(each) + b"\n" for each in objects))
