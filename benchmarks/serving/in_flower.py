"""Results for Flower's SuperLink, sent by nodes of one process as fast as they are taken.

`python -m benchmarks.serving.in_flower JOB ANSWER` in an environment of its own,
`benchmarks/peer/superlink.txt`.

The nodes speak the Fleet API with Flower's own messages: over gRPC, which this release still has behind an
internal variable and which costs the SuperLink a quarter of the CPU time, or over HTTP, which its
SuperNodes speak. A ServerApp, started by `flwr run`, addresses one message to a node for each result.
Timed is a reply alone: PushMessages, then PushObject for each part of it that the SuperLink asks for. A
result is bytes in a ConfigRecord, three objects; a model in an ArrayRecord would be more. What flatters
the SuperLink: it keeps all in memory, its default; a node signs once before and pulls its messages before;
nodes send at a fraction of a SuperNode's CPU time; the ServerApp sleeps meanwhile and takes the replies
afterwards.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import (
    FLWR_INTERNAL_GRPC_FLEET_API,
)
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, message_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from benchmarks.serving.flower_transports import Identity, Ports, transport_to
from benchmarks.serving.processes import cpu_s

__all__ = ["main"]

_START_S, _PUSH_S = 90.0, 600.0
_HEARTBEAT_S = 1800.0
_APP = """
import time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    settings = context.run_config
    results, nodes, result_bytes = (settings[key] for key in ("results", "nodes", "result_bytes"))
    folder = Path(settings["folder"])
    while len(known := sorted(grid.get_node_ids())) < nodes:
        time.sleep(0.2)
    ask = RecordDict({"ask": ConfigRecord({"train": True})})
    messages = [
        Message(content=ask, dst_node_id=known[n % nodes], message_type="train", ttl=3600.0)
        for n in range(results)
    ]
    waiting = set(grid.push_messages(messages))
    (folder / "pushed").write_text(str(len(waiting)))
    while not (folder / "sent").exists():
        time.sleep(0.2)
    taken = 0
    while waiting:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            taken += len(reply.content["result"]["delta"]) == result_bytes
    (folder / "taken").write_text(str(taken))
"""
_PROJECT = """
[project]
name = "results"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "fedtt"
[tool.flwr.app.components]
serverapp = "results.app:app"
clientapp = "results.app:app"
[tool.flwr.app.config]
results = {results}
nodes = {nodes}
result_bytes = {result_bytes}
folder = "{folder}"
"""


class _Node:
    """One node of the federation."""

    def __init__(self, ports: Ports, number: int) -> None:
        identity = Identity()
        self.public_key, self.node = identity.public_key, Node()
        transport = transport_to(ports, identity, number)
        self.connect, self.call = transport.connect, transport.call

    async def register(self) -> None:
        await self.connect()
        key = fleet_pb2.RegisterNodeFleetRequest(public_key=self.public_key)
        await self.call("RegisterNode", key, fleet_pb2.RegisterNodeFleetResponse)
        answer = await self.call(
            "ActivateNode",
            fleet_pb2.ActivateNodeRequest(public_key=self.public_key, heartbeat_interval=_HEARTBEAT_S),
            fleet_pb2.ActivateNodeResponse,
        )
        self.node = Node(node_id=answer.node_id)

    async def pull(self) -> Message | None:
        request = fleet_pb2.PullMessagesRequest(node=self.node)
        found = await self.call("PullMessages", request, fleet_pb2.PullMessagesResponse)
        return message_from_proto(found.messages_list[0]) if found.messages_list else None

    async def push(self, reply: _Reply) -> None:
        request = fleet_pb2.PushMessagesRequest(
            node=self.node,
            messages_list=[reply.message],
            message_object_trees=[reply.tree],
            clientapp_runtime_list=[1.0],
        )
        taken = await self.call("PushMessages", request, fleet_pb2.PushMessagesResponse)
        for name in taken.objects_to_push:
            part = message_pb2.PushObjectRequest(
                node=self.node,
                run_id=reply.run_id,
                session_id=taken.session_id,
                object_id=name,
                object_content=reply.objects[name],
            )
            stored = await self.call("PushObject", part, message_pb2.PushObjectResponse)
            if not stored.stored:
                raise RuntimeError(f"the SuperLink did not store object {name}")


class _Reply:
    """A client's result, as the SuperLink takes it: as few objects as a result can have."""

    def __init__(self, asked: Message, result_bytes: int) -> None:
        record = ConfigRecord({"delta": os.urandom(result_bytes)})
        reply = Message(RecordDict({"result": record}), reply_to=asked)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.run_id, self.tree = asked.metadata.run_id, get_object_tree(reply)
        self.objects = {name: found.deflate() for name, found in get_all_nested_objects(reply).items()}
        self.message = message_to_proto(remove_content_from_message(reply))


async def _all(nodes: list[_Node], work: Callable[[_Node], Awaitable[None]]) -> None:
    await asyncio.gather(*(work(node) for node in nodes))


async def _measure(job: dict[str, Any], ports: Ports, folder: Path, server: int) -> dict[str, Any]:
    nodes = [_Node(ports, number) for number in range(job["connections"])]
    for node in nodes:
        await node.register()
    deadline = time.monotonic() + _PUSH_S
    while not (folder / "pushed").exists():
        if time.monotonic() > deadline:
            raise RuntimeError("the ServerApp did not push its messages")
        await asyncio.sleep(0.2)
    replies: dict[int, list[_Reply]] = {id(node): [] for node in nodes}

    async def pull(node: _Node) -> None:
        await node.connect()
        while (asked := await node.pull()) is not None:
            replies[id(node)].append(_Reply(asked, job["result_bytes"]))

    async def push(node: _Node) -> None:
        for reply in replies[id(node)]:
            started = time.perf_counter()
            await node.push(reply)
            latencies_s.append(time.perf_counter() - started)

    latencies_s: list[float] = []
    await _all(nodes, pull)
    await _all(nodes, lambda node: node.connect())
    own_s, server_s, started = time.process_time(), cpu_s(server), time.perf_counter()
    await asyncio.wait_for(_all(nodes, push), _PUSH_S)
    seconds = time.perf_counter() - started
    sizes = [len(reply.objects) for found in replies.values() for reply in found]
    return {
        "results": len(latencies_s),
        "seconds": seconds,
        "cpu_s": time.process_time() - own_s,
        "server_cpu_s": cpu_s(server) - server_s,
        "p99_ms": 1000 * sorted(latencies_s)[int(0.99 * (len(latencies_s) - 1))],
        "objects": max(sizes),
    }


@contextmanager
def _superlink(ports: Ports, folder: Path) -> Iterator[int]:
    """Its process; over gRPC nodes come where a variable of its own has it listen."""
    binaries, port = Path(sys.executable).parent, ports.http
    over_grpc = [] if ports.grpc is None else ["--fleet-api-address", f"127.0.0.1:{ports.grpc}"]
    environment = os.environ | {FLWR_INTERNAL_GRPC_FLEET_API: "1" if over_grpc else "0"}
    with (folder / "superlink.log").open("w") as log:
        command = [
            str(binaries / "flower-superlink"),
            "--insecure",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        server = subprocess.Popen(
            [*command, "--disable-runtime-dependency-installation", *over_grpc],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            _wait_for(port, server)
            yield server.pid
        finally:
            _end(server)


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise RuntimeError("the SuperLink did not start")


def _end(server: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _run_app(job: dict[str, Any], port: int, folder: Path) -> None:
    """`flwr run` of an app whose ServerApp asks for so many results."""
    app = folder / "app"
    (app / "results").mkdir(parents=True)
    (app / "results" / "__init__.py").touch()
    (app / "results" / "app.py").write_text(_APP)
    settings = _PROJECT.format(**job, nodes=job["connections"])
    (app / "pyproject.toml").write_text(settings)
    home = Path(os.environ["FLWR_HOME"])
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    subprocess.run([str(Path(sys.executable).parent / "flwr"), "run", str(app)], check=True, timeout=120)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    job, answer = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    folder = Path(job["folder"])
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        http, over_grpc = one.getsockname()[1], other.getsockname()[1]
    ports = Ports(http, over_grpc if job["transport"] == "grpc" else None)
    with _superlink(ports, folder) as server:
        _run_app(job, ports.http, folder)
        measured = asyncio.run(_measure(job, ports, folder, server))
        (folder / "sent").touch()
        deadline = time.monotonic() + _PUSH_S
        while not (folder / "taken").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        measured["counted"] = int((folder / "taken").read_text())
    answer.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
