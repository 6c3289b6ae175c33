"""The two ways to Flower's Fleet API, for `in_flower.py` in its own environment."""

from __future__ import annotations

import asyncio
import re
from base64 import b64encode
from typing import Any, ClassVar, NamedTuple, Protocol

import grpc
from flwr.common.constant import PUBLIC_KEY_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes, sign_message

__all__ = ["Identity", "Ports", "transport_to"]

_CHANNELS = 8


class Ports(NamedTuple):
    """Where a SuperLink listens."""

    http: int
    grpc: int | None  #: for nodes, if they come over gRPC


class Transport(Protocol):
    """How a node reaches the SuperLink."""

    async def connect(self) -> None:
        """Anew: what was idle for five seconds may be closed."""
        ...

    async def call(self, name: str, request: Any, answers: Any) -> Any: ...


class Identity:
    """A node's key, and one signature, which is good for five minutes."""

    def __init__(self) -> None:
        private, public = generate_key_pairs()
        self.public_key, self.signed_at = public_key_to_bytes(public), now().isoformat()
        self.signature = sign_message(private, self.signed_at.encode())


class Http:
    """One connection that is kept alive."""

    def __init__(self, port: int, identity: Identity) -> None:
        self._port = port
        headers = {
            "host": f"127.0.0.1:{port}",
            "content-type": "application/protobuf",
            "accept": "application/protobuf",
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(identity.public_key).decode(),
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(identity.signature).decode(),
            TIMESTAMP_HEADER: identity.signed_at,
        }
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())

    async def connect(self) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)

    async def call(self, name: str, request: Any, answers: Any) -> Any:
        body, path = request.SerializeToString(), re.sub("(?<=[a-z])(?=[A-Z])", "-", name).lower()
        head = f"POST /v1/fleet/{path} HTTP/1.1\r\n{self._headers}content-length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length:"))
        found = await self._reader.readexactly(length)
        if " 200 " not in lines[0]:
            raise RuntimeError(f"{name}: {lines[0]}: {found[:300]!r}")
        return answers.FromString(found)


class Grpc:
    """One of a few HTTP/2 connections that all nodes share."""

    _channels: ClassVar[list[Any]] = []

    def __init__(self, port: int, identity: Identity, number: int) -> None:
        self._metadata = (
            (PUBLIC_KEY_HEADER, identity.public_key),
            (SIGNATURE_HEADER, identity.signature),
            (TIMESTAMP_HEADER, identity.signed_at),
        )
        self._port, self._number = port, number

    async def connect(self) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]  # or all would share one connection
        while len(self._channels) < _CHANNELS:
            self._channels.append(grpc.aio.insecure_channel(f"127.0.0.1:{self._port}", options=options))
        self._stub = FleetStub(self._channels[self._number % _CHANNELS])

    async def call(self, name: str, request: Any, answers: Any) -> Any:
        return await getattr(self._stub, name)(request, metadata=self._metadata)


def transport_to(ports: Ports, identity: Identity, number: int) -> Transport:
    return Http(ports.http, identity) if ports.grpc is None else Grpc(ports.grpc, identity, number)
