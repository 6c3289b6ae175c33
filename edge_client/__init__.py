"""One device: it trains on data that stays with it, and sends a few kilobytes of what was learned.

An app keeps examples and runs the device beside its other work:

    prepare()                                                       # where the app starts, before its loop
    store = ExampleStore(home / "examples.db")
    await asyncio.to_thread(store.add, "wake me at seven", "set_alarm")   # whenever it learns something
    config = DeviceConfig(token=token)
    async with open_device(home, server=url, examples=store, config=config) as device:
        await device.consent()                                      # once the owner has said yes
        await device.run()                                          # until cancelled or retired

Names are imported when first used, so that a cold start loads no more than it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_client.conditions import Conditions, Limits, Readings
    from edge_client.device import Device
    from edge_client.device_config import DeviceConfig
    from edge_client.example_files import read_examples
    from edge_client.examples import Example, ExampleLimits, ExampleStore
    from edge_client.executorch_runtime import executorch_runtimes
    from edge_client.http_transport import HttpTransport
    from edge_client.inference import Evaluation, Model, Prediction
    from edge_client.local_trainer import LocalTrainer
    from edge_client.onnx_runtime import onnx_runtimes
    from edge_client.preparation import prepare
    from edge_client.session import forget, leave, open_device

__all__ = [
    "Conditions",
    "Device",
    "DeviceConfig",
    "Evaluation",
    "Example",
    "ExampleLimits",
    "ExampleStore",
    "HttpTransport",
    "Limits",
    "LocalTrainer",
    "Model",
    "Prediction",
    "Readings",
    "executorch_runtimes",
    "forget",
    "leave",
    "onnx_runtimes",
    "open_device",
    "prepare",
    "read_examples",
]

_HOMES = {
    "Conditions": "conditions",
    "Device": "device",
    "DeviceConfig": "device_config",
    "Evaluation": "inference",
    "Example": "examples",
    "ExampleLimits": "examples",
    "ExampleStore": "examples",
    "HttpTransport": "http_transport",
    "Limits": "conditions",
    "LocalTrainer": "local_trainer",
    "Model": "inference",
    "Prediction": "inference",
    "Readings": "conditions",
    "executorch_runtimes": "executorch_runtime",
    "forget": "session",
    "leave": "session",
    "onnx_runtimes": "onnx_runtime",
    "open_device": "session",
    "prepare": "preparation",
    "read_examples": "example_files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
