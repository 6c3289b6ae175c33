"""How records lie in their tables, and what both databases say in words of their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from operator import attrgetter
from typing import Any, Generic, TypeVar, cast

import msgspec
from sqlalchemy import (
    ARRAY,
    BigInteger,
    CursorResult,
    Dialect,
    Double,
    Integer,
    LargeBinary,
    Select,
    String,
    Table,
    Text,
    TypeDecorator,
    bindparam,
    func,
    select,
)
from sqlalchemy.dialects.postgresql import Insert, insert  # its ON CONFLICT is SQLite's too
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement, GenericFunction
from sqlalchemy.types import TypeEngine

from fedtt.errors import FedttError, StorageError
from storage.models import Base

__all__ = ["Names", "Rows", "Values", "is_among", "json_texts", "plain"]

R = TypeVar("R", bound=msgspec.Struct)
Values = Callable[[msgspec.Struct], tuple[Any, ...]]
Read = Callable[[Any], Any]  #: a value as the driver gives it -> as records have it


class Names(TypeDecorator[Collection[str]]):
    """Many texts in one parameter, so that a statement has one text however many there are."""

    impl = String
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(ARRAY(String) if dialect.name == "postgresql" else String())

    def process_bind_param(self, value: Collection[str] | None, dialect: Dialect) -> Any:
        names = list(value or ())
        return names if dialect.name == "postgresql" else msgspec.json.encode(names).decode()


class is_among(FunctionElement[Any]):  # noqa: N801 - a function of SQL is named as one
    """Whether a column is one of the names in a parameter: a look into its index for each."""

    inherit_cache = True


@compiles(is_among)
def _as_texts_of_json(element: is_among, compiler: SQLCompiler, **kw: Any) -> str:
    column, names = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"{column} IN (SELECT value FROM json_each({names}))"  # noqa: S608  # both are compiled already


@compiles(is_among, "postgresql")
def _as_array(element: is_among, compiler: SQLCompiler, **kw: Any) -> str:
    """Of an array it expects few elements; of a subquery so many that it would read the whole table."""
    column, names = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"{column} = ANY ({names})"


class json_texts(GenericFunction[str]):  # noqa: N801 - a function of SQL is named as one
    """The texts in a JSON list, a row each."""

    inherit_cache = True


@compiles(json_texts)
def _as_json_each(element: json_texts, compiler: SQLCompiler, **kw: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **kw)})"


@compiles(json_texts, "postgresql")
def _as_array_elements(element: json_texts, compiler: SQLCompiler, **kw: Any) -> str:
    return f"json_array_elements_text(CAST({compiler.process(element.clauses, **kw)} AS json))"


def plain(kind: TypeEngine[Any]) -> BigInteger | Double[float] | LargeBinary | Text:
    """How values lie in a column, whatever they stand for."""
    if isinstance(kind, TypeDecorator):
        kind = kind.impl_instance
    for given, lies in ((Integer, BigInteger), (Double, Double), (LargeBinary, LargeBinary), (String, Text)):
        if isinstance(kind, given):
            return lies()
    raise TypeError(f"a column of {kind} holds no plain values")


class Rows(Generic[R]):
    """How records of one kind lie in their table: columns are fields, `key` names the unique ones."""

    def __init__(
        self, record: type[R], model: type[Base], *key: str, changes: tuple[str, ...] | None = None
    ) -> None:
        """changes: the fields that a later `put` may change; None for all but the key."""
        self.record, self.table, self._key = record, cast("Table", model.__table__), key
        c = self.table.c
        self.select = select(*(c[field] for field in record.__struct_fields__))
        self.get = self.where(*key)
        self.add = insert(self.table).on_conflict_do_nothing().execution_options(preserve_rowcount=True)
        others = changes or [name for name in record.__struct_fields__ if name not in key]
        self.put, self.put_all = (
            new.on_conflict_do_update(
                index_elements=list(key), set_={name: new.excluded[name] for name in others}
            )
            for new in (insert(self.table), self._from_lists())
        )
        self._texts: dict[tuple[int, str], tuple[str, Values]] = {}
        self._readers: dict[str, list[tuple[int, Read]]] = {}

    def _from_lists(self) -> Insert:
        """Many rows of different keys at once (PostgreSQL): a parameter is all of a column's values."""
        columns = [self.table.c[field] for field in self.record.__struct_fields__]
        lists = (bindparam(column.name, type_=ARRAY(plain(column.type))) for column in columns)
        given = func.unnest(*lists).table_valued(*(column.name for column in columns)).render_derived()
        return insert(self.table).from_select([column.name for column in columns], select(*given.c))

    def where(self, *names: str) -> Select[Any]:
        """All rows whose columns of these names equal the parameters of these names."""
        return self.select.where(*(self.table.c[name] == bindparam(name) for name in names))

    def key_of(self, record: R) -> tuple[object, ...]:
        return tuple(getattr(record, name) for name in self._key)

    def of(self, found: CursorResult[Any]) -> list[R]:
        """The records that a statement found: straight from the driver, for rows come in crowds.

        Raises StorageError where a row is not what this program writes, as in the middle of a migration.
        """
        cursor, fields = found.cursor, self.record.__struct_fields__
        assert cursor is not None  # noqa: S101  # the statement returns rows
        readers = self._readers_of(found.context.dialect, cursor.description)
        records = []
        try:
            for row in cursor.fetchall():
                values = list(row)
                for place, read in readers:
                    values[place] = read(values[place])
                records.append(self.record(**dict(zip(fields, values, strict=True))))
        except (msgspec.MsgspecError, FedttError, LookupError, ValueError) as error:
            said = str(error).partition("\n")[0]
            where = f"a row of {self.table.name} cannot be read ({said})"
            raise StorageError(f"{where}: run one release on all servers of a ledger") from error
        found.close()
        return records

    def _readers_of(self, dialect: Dialect, description: Sequence[Any]) -> list[tuple[int, Read]]:
        """How the columns whose values the driver does not give as they are become values."""
        if dialect.name not in self._readers:
            self._readers[dialect.name] = [
                (place, read)
                for place, (column, told) in enumerate(
                    zip(self.select.selected_columns, description, strict=True)
                )
                if (read := column.type.dialect_impl(dialect).result_processor(dialect, told[1]))
            ]
        return self._readers[dialect.name]

    def text_of(self, statement: Insert, dialect: Dialect) -> tuple[str, Values]:
        """An insertion as the driver's own text, and how it takes its parameters from a record.

        For many rows this spares most of their way through SQLAlchemy; all their values must be plain.
        """
        key = id(statement), dialect.name
        if key not in self._texts:
            style: Any = "qmark" if dialect.name == "sqlite" else "format"
            positional: Dialect = cast("Any", type(dialect))(paramstyle=style)
            compiled = statement.compile(dialect=positional, column_keys=self.record.__struct_fields__)
            assert isinstance(compiled, SQLCompiler)  # noqa: S101  # that is what dialects have
            order = compiled.positiontup
            assert order is not None  # noqa: S101  # the style is positional
            self._texts[key] = str(compiled), cast("Values", attrgetter(*order))
        return self._texts[key]
