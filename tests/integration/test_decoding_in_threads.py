"""The first messages of a process may be decoded by several threads at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedtt.manifest import encode_manifest
from tests.support.tiny import tiny_manifest

ROOT = Path(__file__).parents[2]
PROCESSES = 6  #: without decoders made at import, about every third ended with a segmentation fault

DECODE_AT_ONCE = """
import sys, threading
from pathlib import Path
from fedtt.manifest import decode_manifest
sys.setswitchinterval(1e-6)
data, together = Path(sys.argv[1]).read_bytes(), threading.Barrier(8)
def decode():
    together.wait()
    decode_manifest(data)
threads = [threading.Thread(target=decode) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


@pytest.mark.slow
def test_threads_that_decode_a_manifest_first_and_at_once_do_not_end_the_process(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(encode_manifest(tiny_manifest()))
    command = [sys.executable, "-c", DECODE_AT_ONCE, str(path)]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(PROCESSES)]
    assert [process.wait() for process in processes] == [0] * PROCESSES
