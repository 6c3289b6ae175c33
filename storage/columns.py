"""Column types the tables share: plain numbers, hex names, states and JSON, the same on every database."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from sqlalchemy import BigInteger, CheckConstraint, Dialect, Double, Enum, Integer, String, Text
from sqlalchemy.orm import mapped_column
from sqlalchemy.types import TypeDecorator

from fedtt import names

__all__ = [
    "Count",
    "Id",
    "Json",
    "Number",
    "Parents",
    "Reason",
    "Seconds",
    "Sha256",
    "one_of",
    "sha256_check",
    "sha256s_check",
]

Sha256 = Annotated[str, mapped_column(String(64))]  #: 64 hex digits
Id = Annotated[str, mapped_column(String(32))]  #: 128 bits as 32 hex digits
Seconds = Annotated[float, mapped_column(Double)]  #: since the Unix epoch
Number = Annotated[float, mapped_column(Double)]  #: a finite measurement
Count = Annotated[int, mapped_column(BigInteger().with_variant(Integer, "sqlite"))]  #: 64 bits
Reason = Annotated[str, mapped_column(Text)]  #: for people; empty where there is nothing to say


def one_of(states: type[enum.Enum]) -> Enum:
    """Text that holds the value of one of `states`; a CHECK refuses any other."""
    return Enum(
        states,
        values_callable=lambda kinds: [kind.value for kind in kinds],
        native_enum=False,
        create_constraint=True,
        name="known_state",
        length=16,
    )


def sha256s_check(column: str) -> CheckConstraint:
    """Compact JSON of n hashes, each 66 characters in its quotes, has 67 n + 1; of none it has 2."""
    return CheckConstraint(f"{column} = '[]' OR length({column}) % 67 = 1", name=f"{column}_are_sha256")


def sha256_check(column: str) -> CheckConstraint:
    return CheckConstraint(f"length({column}) = 64", name=f"{column}_is_sha256")


class Json(TypeDecorator[Any]):
    """A value of one type as JSON text, checked against the type when it is read."""

    impl = Text
    cache_ok = True

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind
        self._decode = msgspec.json.Decoder(kind).decode  # made here, as `fedtt.manifest` says why

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], str | None]:
        encode = msgspec.json.encode
        return lambda value: None if value is None else encode(value).decode()

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[str | None], Any]:
        decode = self._decode
        return lambda text: None if text is None else decode(text)


Parents = Annotated[tuple[str, ...], mapped_column(Json(tuple[names.Sha256, ...]))]  #: sha256s as JSON
