"""Every SQL statement of the store, built once and compiled once; parameters carry their column's name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from operator import attrgetter
from typing import Any, Generic, TypeVar, cast

import msgspec
from sqlalchemy import (
    ARRAY,
    CursorResult,
    Dialect,
    Select,
    String,
    Table,
    TypeDecorator,
    bindparam,
    case,
    exists,
    func,
    literal_column,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import Insert, insert  # its ON CONFLICT is SQLite's too
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement, GenericFunction
from sqlalchemy.types import TypeEngine

from storage.models import (
    AdminTokenRow,
    AuditRow,
    Base,
    BundleRow,
    DeviceRow,
    EvaluationRow,
    LeaseRow,
    MembershipRow,
    ParticipationRow,
    RoundRow,
    TaskRow,
    TokenRow,
    UpdateRow,
    VersionRow,
)
from storage.records import (
    AdminToken,
    Audit,
    Bundle,
    Device,
    DeviceState,
    Evaluation,
    Lease,
    LeaseState,
    Participation,
    Round,
    Task,
    Token,
    Update,
    UpdateState,
    Version,
)

__all__ = [
    "Rows",
    "active_devices",
    "active_members",
    "admin_tokens",
    "all_admin_tokens",
    "all_tasks",
    "audit",
    "audits_after",
    "bundles",
    "candidates",
    "candidates_of_group",
    "count_devices",
    "count_leases",
    "count_rounds",
    "count_updates",
    "devices",
    "devices_after",
    "devices_named",
    "evaluations",
    "evaluations_of",
    "expire_leases",
    "forget_evaluations",
    "forget_memberships",
    "forget_participations",
    "forget_settled",
    "group_of",
    "last_audit",
    "latest_round",
    "latest_version",
    "lease_of",
    "leases",
    "leases_named",
    "leases_of",
    "members",
    "move_leases",
    "newest_rounds",
    "newest_task",
    "newest_update",
    "page_of_updates",
    "participants",
    "participations",
    "participations_of",
    "put_member",
    "rounds",
    "settle",
    "task_by_name",
    "tasks",
    "tokens",
    "updates",
    "updates_named",
    "updates_of",
    "version_named",
    "versions",
    "versions_of",
]

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
        new = insert(self.table)
        others = changes or [name for name in record.__struct_fields__ if name not in key]
        self.put = new.on_conflict_do_update(
            index_elements=list(key), set_={name: new.excluded[name] for name in others}
        )
        self._texts: dict[tuple[int, str], tuple[str, Values]] = {}
        self._readers: dict[str, list[tuple[int, Read]]] = {}

    def where(self, *names: str) -> Select[Any]:
        """All rows whose columns of these names equal the parameters of these names."""
        return self.select.where(*(self.table.c[name] == bindparam(name) for name in names))

    def key_of(self, record: R) -> tuple[object, ...]:
        return tuple(getattr(record, name) for name in self._key)

    def of(self, found: CursorResult[Any]) -> list[R]:
        """The records that a statement found: straight from the driver, for rows come in crowds."""
        cursor, fields = found.cursor, self.record.__struct_fields__
        assert cursor is not None  # noqa: S101  # the statement returns rows
        readers = self._readers_of(found.context.dialect, cursor.description)
        records = []
        for row in cursor.fetchall():
            values = list(row)
            for place, read in readers:
                values[place] = read(values[place])
            records.append(self.record(**dict(zip(fields, values, strict=True))))
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


_PLACE = ("task_id", "branch")
_ROUND = ("task_id", "branch", "round_number")
_MEASURED = ("examples", "loss_first", "loss_last")

tokens = Rows(Token, TokenRow, "sha256")
devices = Rows(Device, DeviceRow, "id")
admin_tokens = Rows(AdminToken, AdminTokenRow, "sha256")
audit = Rows(Audit, AuditRow, "sequence")
bundles = Rows(Bundle, BundleRow, "sha256")
tasks = Rows(Task, TaskRow, "id")
versions = Rows(Version, VersionRow, *_PLACE, "number")
rounds = Rows(Round, RoundRow, *_PLACE, "number")
leases = Rows(Lease, LeaseRow, "id", changes=("state",))
updates = Rows(Update, UpdateRow, "lease_id")
evaluations = Rows(Evaluation, EvaluationRow, "lease_id")
participations = Rows(Participation, ParticipationRow, "device_id", "task_id")

_device, _task, _version = devices.table.c, tasks.table.c, versions.table.c
_round, _lease, _update = rounds.table.c, leases.table.c, updates.table.c
_part = participations.table.c
_memberships = cast("Table", MembershipRow.__table__)
_member = _memberships.c

all_admin_tokens = admin_tokens.select.order_by(admin_tokens.table.c.name)
_sequence = audit.table.c.sequence
last_audit = audit.select.order_by(_sequence.desc()).limit(1)
audits_after = (
    audit.select.where(_sequence > bindparam("after")).order_by(_sequence).limit(bindparam("limit"))
)

_names = bindparam("names", type_=Names())
devices_named = devices.select.where(is_among(_device.id, _names))
leases_named = leases.select.where(is_among(_lease.id, _names))
updates_named = updates.select.where(is_among(_update.lease_id, _names))
participations_of = participations.select.where(is_among(_part.device_id, _names))
move_leases = update(leases.table).where(is_among(_lease.id, _names)).values(state=bindparam("moved_to"))

devices_after = (
    devices.select.where(_device.id > bindparam("after")).order_by(_device.id).limit(bindparam("limit"))
)
_able = func.json_texts(_device.runtimes).table_valued("value")
_is_able = (
    _device.state == bindparam("state"),
    _device.seen_at >= bindparam("seen_since"),
    _device.examples >= bindparam("min_examples"),
    (_device.memory_mb == 0) | (_device.memory_mb >= bindparam("needed_mb")),
    exists().where(_able.c.value.in_(bindparam("runtimes", expanding=True))),
)
active_devices = select(_device.id).where(*_is_able).order_by(_device.id)
_in_group = (
    (_member.device_id == _device.id)
    & (_member.task_id == bindparam("task"))
    & (_member.group_number == bindparam("group"))
)
active_members = active_devices.where(exists().where(_in_group))
candidates = (
    select(
        _device.id.label("device_id"),
        _device.examples,
        _device.memory_mb,
        func.coalesce(_part.count, 0).label("count"),
        _part.last_round,
        _part.last_loss,
        _part.duration_s,
    )
    .select_from(devices.table)
    .outerjoin(participations.table, (_part.device_id == _device.id) & (_part.task_id == bindparam("task")))
    .where(*_is_able)
    .order_by(_device.id)
)
candidates_of_group = candidates.where(exists().where(_in_group))
forget_participations = (
    update(participations.table)
    .where(_part.device_id == bindparam("device"))
    .values(last_loss=None, duration_s=None, label_counts=None)
)
_is_active = (_device.state == DeviceState.ACTIVE, _device.seen_at >= bindparam("seen_since"))
participants = (
    participations.where("task_id")
    .where(exists().where(_device.id == _part.device_id, *_is_active))
    .order_by(_part.device_id)
)

put_member = insert(_memberships)
put_member = put_member.on_conflict_do_update(
    index_elements=["device_id", "task_id"], set_={"group_number": put_member.excluded.group_number}
)
group_of = select(_member.group_number).where(
    _member.device_id == bindparam("device"), _member.task_id == bindparam("task")
)
members = (
    select(_member.device_id, _member.group_number)
    .where(_member.task_id == bindparam("task"), _member.group_number.is_not(None))
    .where(exists().where(_device.id == _member.device_id, *_is_active))
    .order_by(_member.device_id)
)
forget_memberships = (
    update(_memberships).where(_member.device_id == bindparam("device")).values(group_number=None)
)
count_devices = (
    select(_device.state, func.count().label("devices"))
    .where(_device.seen_at >= bindparam("seen_since"))
    .group_by(_device.state)
)

newest_task = select(func.coalesce(func.max(_task.id), 0))
task_by_name = tasks.where("name")
all_tasks = tasks.select.order_by(_task.id)

latest_version = versions.where(*_PLACE).order_by(_version.number.desc()).limit(1)
versions_of = versions.where("task_id").order_by(_version.branch, _version.number)
version_named = select(_version.number).where(_version.sha256 == bindparam("sha256")).limit(1)

_evaluation = evaluations.table.c
evaluations_of = evaluations.where(*_PLACE, "version_number").order_by(_evaluation.device_id)
forget_evaluations = (
    update(evaluations.table).where(_evaluation.device_id == bindparam("device")).values(verdict=None)
)

latest_round = rounds.where(*_PLACE).order_by(_round.number.desc()).limit(1)
newest_rounds = (
    rounds.where("task_id").order_by(_round.number.desc(), _round.branch.desc()).limit(bindparam("limit"))
)
count_rounds = (
    select(_round.state, func.count().label("rounds"))
    .where(_round.task_id == bindparam("task_id"))
    .group_by(_round.state)
)

lease_of = leases.where("device_id", *_ROUND).order_by(_lease.sequence.desc()).limit(1)
leases_of = leases.where("device_id", "state").order_by(_lease.sequence)
count_leases = (
    select(_lease.state, func.count().label("leases"))
    .where(*(_lease[name] == bindparam(name) for name in _ROUND))
    .group_by(_lease.state)
)
# the state stands in the text, because a partial index is not chosen for a parameter
expire_leases = (
    update(leases.table)
    .where(_lease.state == literal_column("'active'"), _lease.expires_at <= bindparam("now"))
    .values(state=LeaseState.EXPIRED)
)

newest_update = select(func.coalesce(func.max(_update.sequence), 0))
count_updates = (
    select(func.count())
    .where(*(_update[name] == bindparam(name) for name in (*_ROUND, "state")))
    .select_from(updates.table)
)
page_of_updates = (
    updates.where(*_ROUND, "state")
    .where(_update.sequence > bindparam("after"))
    .order_by(_update.sequence)
    .limit(bindparam("limit"))
)
updates_of = updates.where("device_id", "state").order_by(_update.sequence)
_of_erased = exists().where(_device.id == _update.device_id, _device.state == DeviceState.ERASED)
settle = (
    update(updates.table)
    .where(_update.lease_id == bindparam("lease"), _update.state == UpdateState.ACCEPTED)
    .values(payload=b"")
    .values({_update[name]: case((_of_erased, 0), else_=_update[name]) for name in _MEASURED})
)
forget_settled = (
    update(updates.table)
    .where(_update.device_id == bindparam("device"), _update.state != UpdateState.ACCEPTED)
    .values(dict.fromkeys(_MEASURED, 0))
)
