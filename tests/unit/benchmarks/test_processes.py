"""What a server and its children have used, as far as /proc says."""

from __future__ import annotations

import subprocess
import sys

import psutil

from benchmarks.serving.processes import cpu_s

BUSY = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"


def test_the_time_of_children_counts() -> None:
    parent = subprocess.Popen(
        ["/bin/sh", "-c", '"$0" -c "$1"; true', sys.executable, BUSY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    try:
        parent.stdout.readline()
        own = psutil.Process(parent.pid).cpu_times()
        assert own.user + own.system < 0.2
        assert 0.25 <= cpu_s(parent.pid) < 5
    finally:
        parent.communicate(b"\n")
    assert cpu_s(parent.pid) == 0.0
