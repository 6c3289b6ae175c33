"""A benchmark that is killed takes its server with it, also one that runs under a tracer."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.with_parent import WITH_PARENT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WITH_PARENT, reason="setpriv is not installed (Debian: util-linux)"),
]

ROOT = Path(__file__).parents[2]
GONE_S = 10.0
TRACER = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync")

BENCHMARK = """
import asyncio, sys
from pathlib import Path
from benchmarks.faults.server import ServerProcess

async def main():
    async with ServerProcess(Path(sys.argv[1]), *sys.argv[2:]).running() as server:
        print(server.port, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("wrapper", [(), TRACER], ids=["alone", "traced"])
def test_a_killed_benchmark_takes_its_server_with_it(wrapper: tuple[str, ...], tmp_path: Path) -> None:
    if wrapper and shutil.which(wrapper[0]) is None:
        pytest.skip("strace is not installed: apt install strace")
    command = [sys.executable, "-c", BENCHMARK, str(tmp_path / "data"), *wrapper]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as benchmark:
        assert benchmark.stdout is not None
        port = int(benchmark.stdout.readline())
        assert listens(port)
        benchmark.kill()
    given_up_at = time.monotonic() + GONE_S
    while listens(port):
        assert time.monotonic() < given_up_at, "the server is still there"
        time.sleep(0.05)


def listens(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0
