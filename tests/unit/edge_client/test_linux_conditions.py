"""What a Linux machine says of itself, read from real files in a tree like the kernel's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_client.conditions import Limits, Readings
from edge_client.linux_conditions import LinuxConditions

TICKS = os.sysconf("SC_CLK_TCK")


class Machine:
    """A tree of sysfs, /proc, an app's files and a program in NetworkManager's place."""

    def __init__(self, root: Path) -> None:
        self.root, self.busctl = root, root / "busctl"
        (root / "sys" / "class" / "power_supply").mkdir(parents=True)

    def supply(self, name: str, **files: object) -> None:
        for file, value in files.items():
            self.write(f"sys/class/power_supply/{name}/{file}", value)

    def write(self, path: str, value: object) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(f"{value}\n")

    def stat(self, busy_s: float, idle_s: float) -> None:
        """Seconds of all processors since the start."""
        self.write("proc/stat", f"cpu  {int(busy_s * TICKS)} 0 0 {int(idle_s * TICKS)} 0 0 0 0 0 0\ncpu0 1")

    def metered(self, answer: str) -> None:
        self.busctl.write_text(f"#!/bin/sh\necho asked >> {self.root}/asked\necho '{answer}'\n")
        self.busctl.chmod(0o700)

    def conditions(self, limits: Limits | None = None) -> LinuxConditions:
        return LinuxConditions(
            self.root / "files",
            limits,
            sys=self.root / "sys",
            proc=self.root / "proc",
            busctl=str(self.busctl),
            idle_window_s=0.0,
        )

    def now(self) -> Readings:
        return self.conditions().now()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_machine_that_shows_nothing_knows_nothing(tmp_path: Path) -> None:
    assert Machine(tmp_path / "other").conditions() is not None
    empty = tmp_path / "empty"
    assert LinuxConditions(sys=empty, proc=empty, busctl=str(empty)).now() == Readings()


def test_a_board_without_a_battery_lives_on_power_from_outside(machine: Machine) -> None:
    found = machine.now()
    assert (found.battery, found.charging) == (None, True)


@pytest.mark.parametrize(
    ("status", "charging"),
    [("Charging", True), ("Full", True), ("Not charging", True), ("Discharging", False), ("Unknown", None)],
)
def test_a_battery_says_its_charge_and_whether_it_is_charged(
    machine: Machine, status: str, charging: bool | None
) -> None:
    machine.supply("BAT0", type="Battery", capacity=37, status=status)
    assert machine.now().battery == 0.37
    assert machine.now().charging is charging


@pytest.mark.parametrize(("online", "charging"), [(1, True), (0, False)])
def test_a_mains_adapter_that_is_plugged_in_counts(machine: Machine, online: int, charging: bool) -> None:
    machine.supply("BAT0", type="Battery", capacity=80, status="Discharging")
    machine.supply("AC", type="Mains", online=online)
    assert machine.now().charging is charging


def test_two_batteries_count_in_the_mean_and_that_of_a_mouse_not_at_all(machine: Machine) -> None:
    machine.supply("BAT0", type="Battery", capacity=20, status="Unknown")
    machine.supply("BAT1", type="Battery", capacity=60, status="Discharging")
    machine.supply("mouse", type="Battery", capacity=100, status="Charging", scope="Device")
    found = machine.now()
    assert (found.battery, found.charging) == (0.4, False)


def test_a_battery_that_shows_no_charge_has_an_unknown_one(machine: Machine) -> None:
    machine.supply("BAT0", type="Battery", capacity="", status="Charging")
    assert machine.now().battery is None


def test_the_hottest_zone_counts_and_one_that_cannot_be_does_not(machine: Machine) -> None:
    for zone, value in enumerate((41_000, 58_500, -273_000, 999_000)):
        machine.write(f"sys/class/thermal/thermal_zone{zone}/temp", value)
    machine.write("sys/class/thermal/thermal_zone9/temp", "no number")
    assert machine.now().temperature_c == 58.5


def test_memory_is_what_the_kernel_says_is_available(machine: Machine) -> None:
    machine.write("proc/meminfo", "MemTotal:  8000000 kB\nMemFree:  1 kB\nMemAvailable:  2097152 kB")
    assert machine.now().memory_mb == 2048


V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("line", "directory", "most", "used", "files"),
    [
        ("0::/a/b", f"{V2}/a", "memory.max", "memory.current", "inactive_file"),  # set on the group above
        ("4:memory:/c", f"{V1}/c", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_memory_is_no_more_than_what_a_control_group_leaves(
    machine: Machine, line: str, directory: str, most: str, used: str, files: str
) -> None:
    machine.write("proc/meminfo", "MemAvailable:  2097152 kB")
    machine.write("proc/self/cgroup", f"9:name=systemd:/\n{line}")
    machine.write(f"{directory}/{most}", 512 << 20)
    machine.write(f"{directory}/{used}", 300 << 20)
    assert machine.now().memory_mb == 212
    machine.write(f"{directory}/memory.stat", f"anon 1\n{files} {100 << 20}")
    assert machine.now().memory_mb == 312
    machine.write(f"{directory}/{most}", "max")
    assert machine.now().memory_mb == 2048


@pytest.mark.parametrize("text", ["MemAvailable:", "MemAvailable: much kB", ""])
def test_memory_in_no_number_is_unknown(machine: Machine, text: str) -> None:
    machine.write("proc/meminfo", text)
    assert machine.now().memory_mb is None


@pytest.mark.parametrize(
    ("answer", "unmetered"),
    [("u 0", None), ("u 1", False), ("u 2", True), ("u 3", False), ("u 4", True), ("no such thing", None)],
)
def test_the_network_is_metered_as_network_manager_says(
    machine: Machine, answer: str, unmetered: bool | None
) -> None:
    machine.metered(answer)
    assert machine.now().unmetered is unmetered


def test_network_manager_is_asked_seldom_and_only_where_it_matters(machine: Machine) -> None:
    machine.metered("u 2")
    assert machine.conditions(Limits()).now().unmetered is None
    assert not (machine.root / "asked").exists()
    conditions = machine.conditions(Limits(only_unmetered=True))
    assert [conditions.now().unmetered for _ in range(3)] == [True] * 3
    assert (machine.root / "asked").read_text().split() == ["asked"]


@pytest.mark.parametrize(("busy_s", "idle"), [(10.0, True), (90.0, False)])
def test_a_machine_is_idle_where_others_used_little_of_it_since_the_last_look(
    machine: Machine, busy_s: float, idle: bool
) -> None:
    machine.stat(1000.0, 1000.0)
    conditions = machine.conditions(Limits(only_idle=True))
    machine.stat(1000.0 + busy_s, 1000.0 + 100.0 - busy_s)
    assert conditions.now().idle is idle
    assert conditions.now().idle is idle, "no time has passed: as before"


def test_its_own_work_does_not_make_a_machine_busy(machine: Machine) -> None:
    machine.stat(0.0, 0.0)
    conditions = machine.conditions()
    before = os.times()
    while (spent_s := os.times().user + os.times().system - before.user - before.system) < 0.2:
        sum(range(10_000))
    machine.stat(spent_s, 0.0)
    assert conditions.now().idle is True


def test_what_an_app_writes_stands_above_what_the_system_says(machine: Machine) -> None:
    machine.supply("BAT0", type="Battery", capacity=37, status="Discharging")
    machine.metered("u 1")
    told = {"battery": 0.9, "charging": 1, "unmetered": 1, "idle": 0, "temperature_c": 30.5, "memory_mb": 512}
    for name, value in told.items():
        machine.write(f"files/{name}", value)
    assert machine.now() == Readings(
        battery=0.9, charging=True, unmetered=True, idle=False, temperature_c=30.5, memory_mb=512
    )


@pytest.mark.parametrize("text", ["", "yes", "nan", "-1", "40", "\0" * 100])
def test_a_file_that_holds_no_such_number_is_as_none(machine: Machine, text: str) -> None:
    machine.supply("BAT0", type="Battery", capacity=37, status="Charging")
    machine.write("files/battery", text)
    assert machine.now().battery == 0.37


def test_this_machine_is_read_without_an_error() -> None:
    found = LinuxConditions().now()
    assert found.memory_mb is not None
    assert found.memory_mb > 0
    assert found.idle is not None


def test_where_nothing_can_be_looked_at_nothing_is_known() -> None:
    nowhere = Path("x" * 300)  # as /sys/class is for those who may not search it: an error, and not absent
    readings = LinuxConditions(sys=nowhere, proc=nowhere, busctl="no-such-program").now()
    assert readings == Readings()
