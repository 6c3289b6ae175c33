"""Judging versions while they appear, on data no device trains on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from aggregator.admin_client import AdminClient
from edge_client.bundle import open_bundle
from edge_client.examples import Example
from edge_client.inference import Evaluation, Model
from edge_client.onnx_runtime import OnnxRuntime
from fedtt.factor_file import decode_factors
from fedtt.version_config import FACTORS

__all__ = ["Judge"]


class Judge:
    """Keeps the frozen base loaded; each version brings only its factors."""

    def __init__(self, bundle: Path, examples: Sequence[Example], *, threads: int = 2) -> None:
        self._bundle = open_bundle(bundle)
        self._runtime = OnnxRuntime(self._bundle, threads=threads)
        self._examples = examples

    async def judge(self, admin: AdminClient, task: str, number: int) -> Evaluation:
        """Loss and accuracy of one version of a task."""
        path = f"/tasks/{task}/versions/{number}/{FACTORS}"
        data, layout = await admin.call("GET", path), self._bundle.manifest.adapter.layout
        theta = decode_factors(data, layout, path, "is it trained with this bundle, by a server of fedtt?")
        model = Model(self._bundle, theta, self._runtime)
        return await asyncio.to_thread(model.evaluate, self._examples)
