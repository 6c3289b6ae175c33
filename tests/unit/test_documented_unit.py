"""The systemd unit of docs/deployment.md: systemd understands it, and the program its command."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedtt.cli import make_parser

PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"


def documented() -> str:
    block = re.search(r"```ini\n# /etc/systemd/system/fedtt\.service\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block is not None
    return block[1]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="SKIPPED: no systemd-analyze here")
def test_systemd_finds_nothing_wrong_with_it(tmp_path: Path) -> None:
    unit = tmp_path / "fedtt.service"
    unit.write_text(documented().replace("/opt/fedtt/bin/fedtt", sys.executable))

    def said() -> str:
        command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return "\n".join(line for line in done.stderr.splitlines() if "fedtt.service" in line)

    assert said() == ""
    unit.write_text(unit.read_text().replace("Restart=always", "Restart=ever"))
    assert "restart specifier" in said()  # it does look


def test_its_command_is_one_of_the_programs() -> None:
    line = re.search(r"^ExecStart=(.*)$", documented(), re.MULTILINE)
    assert line is not None
    program, *arguments = shlex.split(line[1])
    assert Path(program).name == "fedtt"
    args = make_parser().parse_args(arguments)
    assert (str(args.data), args.authorities, args.drain_s) == ("/var/lib/fedtt", ["fedtt.example.org"], 10)
