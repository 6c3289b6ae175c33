"""The labels of a classifier, from a JSON file."""

from __future__ import annotations

from pathlib import Path

import msgspec

from fedtt.errors import DataError

__all__ = ["read_labels"]


def read_labels(path: Path) -> tuple[str, ...]:
    """Names in order of their index: a JSON list, or an object whose `labels` is one.

    Raises DataError unless they are at least two different, non-empty strings.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: the labels file cannot be read ({error.strerror}); check --labels"
        ) from None
    try:
        found = msgspec.json.decode(data)
        names = msgspec.convert(found["labels"] if isinstance(found, dict) else found, tuple[str, ...])
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError):
        raise DataError(
            f'{path}: must hold a JSON list of names, as ["no", "yes"], or {{"labels": [...]}}'
        ) from None
    if len(names) < 2:
        raise DataError(f"{path}: holds {len(names)} labels, a classifier needs at least 2")
    seen: set[str] = set()
    for index, name in enumerate(names):
        if not name.strip() or name in seen:
            raise DataError(f"{path}: label {index} is {name!r}: names must be different and not empty")
        seen.add(name)
    return names
