"""Fleet files: TOML, with paths that count from the directory the file lies in."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
from msgspec import Struct

from fedtt.errors import ConfigError
from fedtt.task import parse_task, read_task
from fleet.spec import FleetFile, FleetSpec

__all__ = ["naming", "read_fleet"]

_SIZE_LIMIT_BYTES = 1 << 20
_TASK_LIMIT_BYTES = 64 * 1024


def read_fleet(path: Path) -> FleetSpec:
    """Read a fleet file; raises ConfigError with the field, its value and what is allowed."""
    raw = _toml(path, _SIZE_LIMIT_BYTES)
    directory = path.parent
    _find_model(raw, directory)
    given = raw.pop("task", None)
    if isinstance(given, str):
        task = parse_task(_text(directory / given, _TASK_LIMIT_BYTES), str(directory / given))
    elif isinstance(given, dict):
        task = read_task(given, f"{path}: [task]")
    else:
        raise ConfigError("task", given, "a section [task], or the name of a task file", str(path))
    with naming(path):
        try:
            parts = msgspec.convert(
                raw, FleetFile, strict=True, dec_hook=lambda kind, value: directory / value
            )
        except msgspec.ValidationError as error:
            raise _explain(error, raw, str(path)) from None
        return FleetSpec(task=task, **{name: getattr(parts, name) for name in FleetFile.__struct_fields__})


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the fleet file's name before what is refused meanwhile, but where it names a place of its own."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(error.field, error.value, error.allowed, error.where or str(path)) from None


def _find_model(raw: dict[str, Any], directory: Path) -> None:
    """A model is a directory that counts from the file's, or else the name of one on a hub."""
    fleet = raw.get("fleet")
    name = fleet.get("model") if isinstance(fleet, dict) else None
    if isinstance(fleet, dict) and isinstance(name, str) and (directory / name).is_dir():
        fleet["model"] = str(directory / name)


def _toml(path: Path, limit_bytes: int) -> dict[str, Any]:
    try:
        return tomllib.loads(_text(path, limit_bytes))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(str(path), "…", f"valid TOML ({error})") from None


def _text(path: Path, limit_bytes: int) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
        text = data.decode()
    except OSError as error:
        raise ConfigError("file", str(path), f"a file that can be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError("file", str(path), "a file in UTF-8") from None
    if len(data) > limit_bytes:
        raise ConfigError("file", str(path), f"at most {limit_bytes} bytes")
    return text


_AT = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_NAMED = re.compile(r"(?P<what>unknown|required) field `(?P<name>[^`]+)`")


def _explain(error: msgspec.ValidationError, raw: dict[str, Any], where: str) -> ConfigError:
    """Turn msgspec's message and path into a field, the value found there and what is allowed."""
    message = str(error)
    at = _AT.search(message)
    path, allowed = at["path"] if at else "", _AT.sub("", message)
    section = _section(path, raw)
    if named := _NAMED.search(message):
        path = f"{path}.{named['name']}".lstrip(".")
        known = ", ".join(section.__struct_fields__) if section else "nothing"
        allowed = f"known settings here are {known}" if named["what"] == "unknown" else "it must be given"
    elif path.endswith(".kind"):
        kinds = _kinds(_section_type(path.removesuffix(".kind")))
        allowed = "one of " + ", ".join(sorted(map(repr, kinds)))
    return ConfigError(path or "fleet file", _lookup(raw, path), allowed, where)


def _section_type(path: str) -> Any:
    """The declared type of a section such as `data.partition` or `profiles[0]`."""
    kind: Any = FleetFile
    for name in filter(None, re.sub(r"\[\d+\]|\[\.\.\.\]", "", path).split(".")):
        kind = get_type_hints(kind).get(name) if isinstance(kind, type) else None
        kind = (
            next((arm for arm in get_args(kind) if arm is not type(None)), kind) if name in _ALONE else kind
        )
    return kind


_ALONE = {"evaluation", "profiles"}  #: whose declared type wraps the section's own


def _section(path: str, raw: dict[str, Any]) -> type[Struct] | None:
    kind = _section_type(path)
    if kinds := _kinds(kind):
        return kinds.get(str(_lookup(raw, f"{path}.kind")))
    return kind if isinstance(kind, type) and issubclass(kind, Struct) else None


def _kinds(union: Any) -> dict[str, type[Struct]]:
    """The kinds of a tagged union, by tag; none where it is no union."""
    return {
        str(arm.__struct_config__.tag): arm for arm in get_args(union) if hasattr(arm, "__struct_config__")
    }


def _lookup(raw: Any, path: str) -> object:
    for part in re.findall(r"[^.\[\]]+", path):
        if isinstance(raw, list):
            raw = raw[int(part)] if part.isdecimal() and int(part) < len(raw) else None
        else:
            raw = raw.get(part) if isinstance(raw, dict) else None
    return raw
