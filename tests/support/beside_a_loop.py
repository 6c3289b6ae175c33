"""A real client in a process of its own whose loop is watched: `python -m tests.support.beside_a_loop`.

Arguments: home, server's address, runtime, and "unprepared", "prepared" or the directory of the bundle whose
tokenizer is read beforehand, too. Prints one JSON object when its update is
acknowledged: the longest that the loop was held up in milliseconds, and the extension modules and libraries
of ExecuTorch that were loaded since its trainer was made.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Set
from pathlib import Path

from edge_client.bundle import RuntimeName
from edge_client.device_config import DeviceConfig
from edge_client.events import Acknowledged, Step
from edge_client.examples import Example, Shard
from edge_client.executorch_runtime import executorch_runtimes
from edge_client.local_trainer import LocalTrainer
from edge_client.onnx_runtime import onnx_runtimes
from edge_client.preparation import prepare
from edge_client.session import open_device
from tests.support.in_process import TOKEN

EXAMPLES = Shard([Example(text, text) for text in ("alarm", "lights off", "pay", "weather")])


RUNTIMES = {"onnxruntime": onnx_runtimes, "executorch": executorch_runtimes}


async def live(home: Path, url: str, trainer: LocalTrainer) -> float:
    """Seconds: the longest pause of the loop, as far as this process used the processor in it.

    Where other programs keep it from running, or a thread runs beside the loop without holding it up, one of
    the two clocks stands nearly still.
    """
    worst_s = 0.0

    async def tick() -> None:
        nonlocal worst_s
        while True:
            began, used = time.perf_counter(), time.process_time()
            await asyncio.sleep(0.001)
            pause_s = min(time.perf_counter() - began, time.process_time() - used)
            worst_s = max(worst_s, pause_s)

    ticking = asyncio.create_task(tick())
    config = DeviceConfig(token=TOKEN)
    async with open_device(home, server=url, examples=EXAMPLES, config=config, trainer=trainer) as device:
        await device.consent()
        await device.run(until=_acknowledged)
    ticking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await ticking
    return worst_s


def _acknowledged(step: Step) -> bool:
    return isinstance(step, Acknowledged)


def loaded() -> Set[str]:
    """Modules of compiled code that are imported by now, and libraries of ExecuTorch."""
    files = {name: str(getattr(module, "__file__", "")) for name, module in sys.modules.items()}
    mapped = Path("/proc/self/maps").read_text().split()
    return {name for name, file in files.items() if file.endswith(".so")} | {
        Path(path).name for path in mapped if "libexecutorch" in path or "libfedtt_executorch" in path
    }


def main() -> None:
    home, url, name, how = sys.argv[1:]
    runtime: RuntimeName = "executorch" if name == "executorch" else "onnxruntime"
    if how != "unprepared":
        prepare(runtime)
    before = loaded()
    trainer = LocalTrainer(RUNTIMES[runtime]())
    if how not in {"unprepared", "prepared"}:
        trainer.read_tokenizer(Path(how))
    worst_s = asyncio.run(live(Path(home), url, trainer))
    print(json.dumps({"held_up_ms": 1e3 * worst_s, "loaded": sorted(loaded() - before)}))


if __name__ == "__main__":
    main()
