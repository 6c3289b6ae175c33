"""Results for NVIDIA FLARE's edge server, reported by devices of one process as fast as they are taken.

`python -m benchmarks.serving.in_flare JOB ANSWER` in an environment of its own,
`benchmarks/peer/flare.txt`.

A server and one leaf client, which is where devices connect, run as FLARE provisions and starts them. The
job is one of two of FLARE's own edge jobs: one takes changes of a model, lists of decimals as its JSON has
them that as float32 are as long as our results, and averages them; one adds numbers, each with text as
long as our results that nobody reads. Devices report over the leaf's gRPC service; timed are those calls,
each of which ends once the job has taken the result into its sum. What flatters FLARE: nothing is on a
disk; there is no TLS and no signature; the routing proxy before the leaf is left out; reports are made and
devices announced, all in one call, before. How many results the server's next version was made of is read
from its log.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from nvflare.apis.dxo import DXO, DataKind
from nvflare.app_common.np.constants import NPConstants
from nvflare.app_common.np.np_model_persistor import NPModelPersistor
from nvflare.edge.aggregators.model_update_dxo_factory import ModelUpdateDXOAggrFactory
from nvflare.edge.aggregators.num_dxo_factory import NumDXOAggrFactory
from nvflare.edge.assessors.buff_device_manager import BuffDeviceManager
from nvflare.edge.assessors.buff_model_manager import BuffModelManager
from nvflare.edge.assessors.model_update import ModelUpdateAssessor
from nvflare.edge.assessors.num import NumAssessor
from nvflare.edge.constants import CookieKey, EdgeApiStatus, SpecialDeviceId
from nvflare.edge.tools.edge_job import EdgeJob
from nvflare.edge.web.models.capabilities import Capabilities
from nvflare.edge.web.models.device_info import DeviceInfo
from nvflare.edge.web.models.job_request import JobRequest
from nvflare.edge.web.models.result_report import ResultReport
from nvflare.edge.web.models.task_request import TaskRequest
from nvflare.edge.web.models.user_info import UserInfo
from nvflare.edge.web.service.edge_api_pb2_grpc import EdgeApiStub
from nvflare.edge.web.service.utils import (
    job_request_to_grpc_request,
    result_report_to_grpc_request,
    task_request_to_grpc_request,
)
from nvflare.fuel.flare_api.flare_api import new_secure_session
from nvflare.lighter.entity import Participant, ParticipantType, Project
from nvflare.lighter.impl.cert import CertBuilder
from nvflare.lighter.impl.edge import EdgeBuilder
from nvflare.lighter.impl.signature import SignatureBuilder
from nvflare.lighter.impl.static_file import StaticFileBuilder
from nvflare.lighter.impl.workspace import WorkspaceBuilder
from nvflare.lighter.provisioner import Provisioner

from benchmarks.serving.processes import cpu_s

__all__ = ["main"]

_JOB, _ADMIN = "results", "admin@example.org"
_START_S, _REPORT_S = 60.0, 600.0
_CHANNELS = 8  #: HTTP/2 connections that the devices share
_BUILDERS = (
    lambda: WorkspaceBuilder(["master_template.yml"]),
    lambda: StaticFileBuilder(config_folder="config", scheme="http"),
    CertBuilder,
    SignatureBuilder,
    EdgeBuilder,
)


def _ports(count: int) -> list[int]:
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


def _provision(folder: Path, edge_port: int) -> Path:
    """A server, a leaf client and an admin; returns the directory of their kits."""
    learn, admin = _ports(2)
    people = [
        (
            "server",
            ParticipantType.SERVER,
            {"fed_learn_port": learn, "admin_port": admin, "default_host": "localhost"},
        ),
        ("leaf", ParticipantType.CLIENT, {"listening_host": "localhost", "edge_service_port": edge_port}),
        (_ADMIN, ParticipantType.ADMIN, {"role": "project_admin", "connect_to": "localhost"}),
    ]
    settings = {"api_version": 3, "connection_security": "clear"}
    project = Project(name="project", description="results", props=settings)
    for name, kind, props in people:
        project.add_participant(Participant(type=kind, name=name, org="org", props=props))
    Provisioner(str(folder), [builder() for builder in _BUILDERS]).provision(project)
    kits = next(folder.glob("project/prod_*"))
    for site in ("server", "leaf"):  # jobs may use FLARE's own classes, those of its edge package among them
        resources = kits / site / "local" / "resources.json.default"
        settings = json.loads(resources.read_text())
        settings["class_allow_list"] = ["nvflare."]
        resources.with_name("resources.json").write_text(json.dumps(settings))
    for name in ("server.crt", "server.key"):  # with which devices would have to speak TLS
        (kits / "leaf" / "startup" / name).unlink()
    return kits


def _make_job(folder: Path, results: int, numbers: int | None) -> Path:
    """A job whose second version is made of exactly so many results, and ends it; numbers: of its model."""
    job = EdgeJob(name=_JOB, edge_method="results", min_clients=1)
    if numbers is None:
        assessor = NumAssessor(
            num_updates_for_model=results,
            max_model_version=2,
            max_model_history=3,
            device_selection_size=results,
        )
        job.configure_client(aggregator_factory=NumDXOAggrFactory())
    else:
        model = BuffModelManager(num_updates_for_model=results, max_model_history=3)
        devices = BuffDeviceManager(device_selection_size=results, device_reuse=False)
        assessor = ModelUpdateAssessor(
            persistor_id=job.to_server(NPModelPersistor(model=[0.0] * numbers), id="persistor"),
            model_manager_id=job.to_server(model, id="model_manager"),
            device_manager_id=job.to_server(devices, id="device_manager"),
            max_model_version=2,
        )
        job.configure_client(aggregator_factory=ModelUpdateDXOAggrFactory())
    job.configure_server(assessor=assessor)
    job.export_job(str(folder / "jobs"))
    return folder / "jobs" / _JOB


@contextmanager
def _started(kit: Path) -> Iterator[int]:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (kit / "started.log").open("w") as log:
        process = subprocess.Popen(
            ["/bin/bash", str(kit / "startup" / "sub_start.sh"), "--once"],
            cwd=kit,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield process.pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _until(what: str, found: Callable[[], Any], limit_s: float = _START_S) -> Any:
    deadline, why = time.monotonic() + limit_s, ""
    while time.monotonic() < deadline:
        try:
            if answer := found():
                return answer
        except Exception as error:  # it may not be there yet
            why = f": {error!r}"
        time.sleep(0.5)
    raise RuntimeError(f"{what} within {limit_s:g} s{why}")


def _submit(kits: Path, job: Path) -> None:
    def submit() -> Any:
        session = new_secure_session(_ADMIN, str(kits / _ADMIN), timeout=10.0)
        try:
            if not session.get_connected_client_list():
                return None
            return session.submit_job(str(job))
        finally:
            session.close()

    _until("the server did not take the job", submit)


def _ask(address: str, request: Any) -> dict[str, Any]:
    with grpc.insecure_channel(address) as channel:
        reply = EdgeApiStub(channel).Query(request, timeout=20.0)
    found: dict[str, Any] = json.loads(reply.payload)
    return found if reply.status == EdgeApiStatus.OK and isinstance(found, dict) else {}


def _device(name: str) -> dict[str, Any]:
    return {"device_info": DeviceInfo(name), "user_info": UserInfo("someone")}


def _announce(address: str, results: int) -> dict[str, Any]:
    """All devices, in one call; and the task that the first of them then gets."""

    def job() -> Any:
        found = _ask(
            address,
            job_request_to_grpc_request(
                JobRequest(**_device("d#0"), capabilities=Capabilities(["results"]), job_name=_JOB)
            ),
        )
        return found if found.get("job_id") else None

    job_id = _until("no job reached the leaf", job)["job_id"]

    def task() -> Any:
        everyone = TaskRequest(
            **_device(f"d{SpecialDeviceId.MAX_INDICATOR}{results}"), job_id=job_id, cookie={}
        )
        _ask(address, task_request_to_grpc_request(everyone))
        one = TaskRequest(**_device("d#0"), job_id=job_id, cookie={})
        found = _ask(address, task_request_to_grpc_request(one))
        return found if found.get("task_data") else None

    given: dict[str, Any] = _until("no device was given a task", task)
    return {"job_id": job_id} | given


def _results(count: int, result_bytes: int, numbers: int | None) -> Iterator[DXO]:
    """A number with text as long as a result; or changes of a model, which as float32 are as long."""
    for seed in range(count):
        if numbers is None:
            yield DXO("number", data={"value": 1.0, "delta": secrets.token_hex(result_bytes // 2)})
        else:
            delta = np.random.default_rng(seed).normal(0, 0.01, numbers).round(4).tolist()
            yield DXO(DataKind.WEIGHT_DIFF, data={"dict": {NPConstants.NUMPY_KEY: delta}})


def _reports(task: dict[str, Any], results: Iterator[DXO]) -> list[Any]:
    cookie = {CookieKey.MODEL_VERSION: 1, CookieKey.DEVICE_SELECTION_ID: 1}
    return [
        result_report_to_grpc_request(
            ResultReport(
                **_device(f"d#{number}"),
                job_id=task["job_id"],
                task_id=task["task_id"],
                task_name=task["task_name"],
                result=result.to_dict(),
                cookie=cookie,
            )
        )
        for number, result in enumerate(results)
    ]


async def _report(address: str, reports: list[Any], connections: int, servers: list[int]) -> dict[str, Any]:
    waiting, latencies_s = iter(reports), []
    channels = [
        grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(_CHANNELS)
    ]

    async def device(number: int) -> None:
        stub = EdgeApiStub(channels[number % _CHANNELS])
        for report in waiting:
            started = time.perf_counter()
            reply = await stub.Query(report, timeout=_REPORT_S)
            taken = json.loads(reply.payload) if reply.status == EdgeApiStatus.OK else {}
            if taken.get("status") != EdgeApiStatus.OK:
                raise RuntimeError(f"a result was not taken: {reply.status} {reply.payload[:300]!r}")
            latencies_s.append(time.perf_counter() - started)

    own_s, servers_s, started = time.process_time(), sum(map(cpu_s, servers)), time.perf_counter()
    await asyncio.gather(*(device(number) for number in range(connections)))
    seconds = time.perf_counter() - started
    own_s, servers_s = time.process_time() - own_s, sum(map(cpu_s, servers)) - servers_s
    for channel in channels:
        await channel.close()
    return {
        "results": len(latencies_s),
        "seconds": seconds,
        "cpu_s": own_s,
        "server_cpu_s": servers_s,
        "p99_ms": 1000 * sorted(latencies_s)[int(0.99 * (len(latencies_s) - 1))],
    }


def _counted(server: Path) -> int:
    """Results that the server made its next version of."""
    said = re.compile(r"model V1 got (\d+) updates|generated new model version 2 with (\d+) updates")
    for log in server.rglob("log.txt"):
        if found := said.search(log.read_text(errors="replace")):
            return int(found[1] or found[2])
    return 0


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    job, answer = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    folder = Path(job["folder"])
    (edge_port,) = _ports(1)
    kits = _provision(folder, edge_port)
    numbers = job["result_bytes"] // 4 if job["adds"] == "models" else None
    definition = _make_job(folder, job["results"], numbers)
    address = f"localhost:{edge_port}"
    with _started(kits / "server") as server, _started(kits / "leaf") as leaf:
        _submit(kits, definition)
        task = _announce(address, job["results"])
        reports = _reports(task, _results(job["results"], job["result_bytes"], numbers))
        measured = asyncio.run(_report(address, reports, job["connections"], [server, leaf]))
        measured["counted"] = _until("the server made no version", lambda: _counted(kits / "server"))
    answer.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
