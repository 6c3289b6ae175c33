"""Every SQL statement of the store, built once and compiled once; parameters carry their column's name."""

from __future__ import annotations

from typing import cast

from sqlalchemy import Table, bindparam, case, delete, exists, func, literal_column, select, update
from sqlalchemy.dialects.postgresql import insert  # its ON CONFLICT is SQLite's too

from storage.models import (
    AdminTokenRow,
    AuditRow,
    BundleRow,
    DeviceRow,
    EvaluationRow,
    LeaseRow,
    MembershipRow,
    ParticipationRow,
    PayloadRow,
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
    Payload,
    Round,
    Task,
    Token,
    Update,
    UpdateState,
    Version,
)
from storage.rows import Names, Rows, is_among, json_texts

__all__ = [
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
    "payloads",
    "payloads_of",
    "payloads_to_wipe",
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
    "wipe",
]

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
payloads = Rows(Payload, PayloadRow, "sequence")
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
_able = json_texts(_device.runtimes).table_valued("value")
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
    .where(is_among(_update.lease_id, _names), _update.state == UpdateState.ACCEPTED)
    .values({_update[name]: case((_of_erased, 0), else_=_update[name]) for name in _MEASURED})
)
_payload = payloads.table.c
payloads_of = payloads.select.where(_payload.sequence.in_(bindparam("sequences", expanding=True))).order_by(
    _payload.sequence
)
# a subquery for each row, because a join may be planned to read all updates
_its_state = select(_update.state).where(_update.sequence == _payload.sequence).scalar_subquery()
payloads_to_wipe = (
    select(_payload.sequence)
    .where(_payload.sequence > bindparam("after"), _its_state != UpdateState.ACCEPTED)
    .order_by(_payload.sequence)
    .limit(bindparam("limit"))
)
wipe = delete(payloads.table).where(_payload.sequence.in_(bindparam("sequences", expanding=True)))
forget_settled = (
    update(updates.table)
    .where(_update.device_id == bindparam("device"), _update.state != UpdateState.ACCEPTED)
    .values(dict.fromkeys(_MEASURED, 0))
)
