"""The admin listener: who may use it, and nonsense that is refused with field, value and remedy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from aggregator.admin_client import AdminClient
from fedtt.errors import BundleError, FedttError, Unreachable
from fedtt.manifest import MANIFEST, bundle_digest
from fedtt.messages import Code
from tests.support.edge import write_small_bundle
from tests.support.lying_factors import LIES, with_first_factors
from tests.support.served import Attacked, Body, refused, task_text

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("nothing_accepted_is_lost")]

NOBODY = "0" * 64
TASK = task_text("second")


@pytest.fixture
def bundle(place: Attacked, tmp_path: Path) -> Path:
    """A copy of the bundle the server knows, to damage."""
    write_small_bundle(tmp_path, base_bytes=1000)
    return tmp_path


@pytest_asyncio.fixture(loop_scope="module")
async def known(place: Attacked) -> AsyncIterator[str]:
    """The sha256 of the bundle the server knows."""
    yield bundle_digest((place.server.bundle / MANIFEST).read_bytes())


# who may


@pytest.mark.parametrize("given", ["", "Bearer ", "Bearer guessed", "Basic guessed", "Bearer \udcff"])
@pytest.mark.parametrize(("method", "path"), [("GET", "/tasks"), ("POST", "/tasks"), ("GET", "/nowhere")])
async def test_without_the_admin_token_nothing_is_shown(
    place: Attacked, given: str, method: str, path: str
) -> None:
    answer = await place.server.people(method, path, headers={"Authorization": given})
    refused(
        answer, Code.FORBIDDEN, "the admin token is missing or wrong", "admin-token in its data directory"
    )


async def test_the_admin_token_opens_nothing_on_the_devices_listener(place: Attacked) -> None:
    headers = {"Authorization": f"Bearer {place.server.listening.admin_token}"}
    refused(await place.server.raw("GET", "/v1/admin/tasks", None, headers), Code.NOT_FOUND)


async def test_wrong_paths_and_methods_are_typed(place: Attacked) -> None:
    refused(await place.server.people("GET", "/nowhere"), Code.NOT_FOUND, "there is no GET /v1/admin/nowhere")
    answer = await place.server.people("DELETE", "/tasks")
    refused(answer, Code.NOT_FOUND, "DELETE is not taken", "use GET, POST", status=405)


# task files

NONSENSE = {
    "= [": ["task = '…' is not allowed: valid TOML"],
    "[" * 30_000: ["task"],
    "a = " + "[" * 30_000: ["task"],
    "seed = 1\n[rounds]\ncount = 1\ncohort = 1\n": ["name = None is not allowed: it must be given"],
    TASK.replace("second", "Not A Name"): ["name = 'Not A Name' is not allowed", "regex"],
    TASK.replace("cohort = 1000", "cohort = 0"): ["rounds.cohort = 0 is not allowed", ">= 1"],
    TASK.replace("cohort = 1000", "cohort = 'many'"): [
        "rounds.cohort = 'many' is not allowed",
        "Expected `int`",
    ],
    TASK.replace("cohort = 1000", "cohort = 5\nbuffer = 6"): [
        "rounds.buffer = 6 is not allowed",
        "from 1 to rounds.cohort = 5",
    ],
    TASK.replace("cohort", "cohrt"): [
        "rounds.cohrt = 1000 is not allowed",
        "known settings here are",
        "cohort",
    ],
    TASK.replace('"fp32"', '"int5"'): [
        "codec.quantise = 'int5' is not allowed",
        "one of 'fp32', 'int2', 'int3'",
    ],
    TASK + "[method]\nname = 'fedsgd'\n": [
        "method.name = 'fedsgd' is not allowed",
        "one of 'dense-adapter'",
    ],
    TASK + "#" * 70_000: ["longer than the 65536 bytes"],
}


@pytest.mark.parametrize(("text", "words"), NONSENSE.items(), ids=range(len(NONSENSE)))
async def test_a_task_file_of_nonsense_is_refused_with_field_value_and_what_is_allowed(
    place: Attacked, known: str, text: str, words: list[str]
) -> None:
    answer = await place.server.people("POST", f"/tasks?bundle={known}", text.encode())
    refused(answer, Code.TOO_LARGE if len(text) > 65_536 else Code.MALFORMED, *words)
    assert [task["name"] for task in await place.server.admin.rows("/tasks")] == ["lights"]


async def test_a_task_file_that_is_no_text_is_refused(place: Attacked, known: str) -> None:
    answer = await place.server.people("POST", f"/tasks?bundle={known}", b"\xff\xfe\x00name")
    refused(answer, Code.MALFORMED, "valid TOML")


@pytest.mark.parametrize(
    ("query", "code", "said"),
    [
        ("", Code.MALFORMED, "the query must name bundle=<sha256 of its manifest>"),
        ("?bundle=../etc", Code.MALFORMED, "the query must name bundle"),
        (f"?bundle={NOBODY}", Code.NOT_FOUND, "there is no bundle 000000000000"),
    ],
)
async def test_a_task_needs_a_bundle_the_server_knows(
    place: Attacked, query: str, code: Code, said: str
) -> None:
    refused(await place.server.people("POST", f"/tasks{query}", TASK.encode()), code, said)


async def test_a_tasks_name_is_taken_once(place: Attacked, known: str) -> None:
    answer = await place.server.people("POST", f"/tasks?bundle={known}", task_text("lights").encode())
    refused(answer, Code.CONFLICT, "a task named 'lights' exists already", "choose another name")


# what there is to see and to change


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("POST", "/pause"), ("POST", "/stop"), ("GET", "/rounds"), ("GET", "/versions")],
)
@pytest.mark.parametrize("name", ["nobody", "a%2Fb", "x" * 2000])
async def test_a_task_that_is_not_there_is_named(place: Attacked, name: str, method: str, path: str) -> None:
    refused(await place.server.people(method, f"/tasks/{name}{path}"), Code.NOT_FOUND, "there is no task '")


@pytest.mark.parametrize("number", ["1", "999999999"])
async def test_a_version_that_is_not_there_is_named(place: Attacked, number: str) -> None:
    answer = await place.server.people("GET", f"/tasks/lights/versions/{number}/config.json")
    refused(answer, Code.NOT_FOUND, f"there is no version {number} of task 'lights'")


@pytest.mark.parametrize("number", ["-1", "1e3", "9999999999", "latest"])
async def test_a_version_is_named_by_a_number(place: Attacked, number: str) -> None:
    answer = await place.server.people("GET", f"/tasks/lights/versions/{number}/config.json")
    refused(answer, Code.NOT_FOUND, "there is no GET")


async def test_a_version_has_two_files(place: Attacked) -> None:
    answer = await place.server.people("GET", "/tasks/lights/versions/0/fedtt.db")
    refused(answer, Code.NOT_FOUND, "there is no file 'fedtt.db' in a version")


async def test_a_task_that_has_ended_says_so_when_it_is_resumed(place: Attacked, known: str) -> None:
    admin = place.server.admin
    await admin.create_task(task_text("over"), known)
    assert (await admin.task("over", "/pause", "POST"))["state"] == "paused"
    assert (await admin.task("over", "/resume", "POST"))["state"] == "active"
    stopped = await admin.task("over", "/stop", "POST")
    assert (stopped["state"], stopped["reason"]) == ("stopped", "by an operator")
    assert await admin.task("over", "/stop", "POST") == stopped
    for change in ("pause", "resume"):
        answer = await place.server.people("POST", f"/tasks/over/{change}")
        refused(
            answer, Code.CONFLICT, "task 'over' is stopped and cannot be", "create a task with a new name"
        )
    shown: dict[str, object] = {"spec": None, "groups": []}
    assert await admin.task("over") | shown == stopped | shown


@pytest.mark.parametrize("after", ["", "%FF", "'%20OR%201=1", "f" * 2000])
async def test_devices_are_listed_without_their_keys_from_any_point(place: Attacked, after: str) -> None:
    answer = await place.server.people("GET", f"/devices?after={after}")
    assert answer.status == 200
    known = [device["id"] for device in json.loads(answer.body)]
    assert known == ([place.honest.identity.device] if after in ("", "'%20OR%201=1") else [])
    assert b"public_key" not in answer.body


# bundles


async def test_a_bundle_whose_files_did_not_come_is_refused_with_the_file(
    place: Attacked, bundle: Path
) -> None:
    manifest = json.loads((bundle / MANIFEST).read_bytes())
    manifest["files"]["step.onnx"]["sha256"] = NOBODY
    answer = await place.server.people("POST", "/bundles", json.dumps(manifest).encode())
    refused(answer, Code.NOT_FOUND, "there is no file 'step.onnx' of the bundle", "000000000000")
    manifest = json.loads((bundle / MANIFEST).read_bytes())
    manifest["files"]["step.onnx"]["bytes"] = 5
    answer = await place.server.people("POST", "/bundles", json.dumps(manifest).encode())
    refused(answer, Code.NOT_FOUND, "there is no file 'step.onnx' of the bundle", "5 bytes")


MANIFESTS: dict[str, Any] = {
    "is not a bundle manifest": b"\xff",
    "has format 1, this program reads format 3": {"format": 1},
    "names a file '../x'": {"files": {"../x": {"sha256": NOBODY, "bytes": 1}}},
    "unknown field `surprise`": {"surprise": 1},
    "does not list 'base.bin' among its files": {"files": {}},
    "describes another factor layout": {"layout_sha256": NOBODY},
}


@pytest.mark.parametrize("said", MANIFESTS)
async def test_a_manifest_that_is_none_is_refused(place: Attacked, bundle: Path, said: str) -> None:
    change = MANIFESTS[said]
    sound = json.loads((bundle / MANIFEST).read_bytes())
    body = change if isinstance(change, bytes) else json.dumps(sound | change).encode()
    refused(await place.server.people("POST", "/bundles", body), Code.MALFORMED, said)


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_file_that_is_not_what_its_name_says_is_not_kept(place: Attacked, chunked: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"some"
        yield b"thing else"

    sha256 = hashlib.sha256(b"something").hexdigest()
    body: Body = pieces() if chunked else b"something else"
    answer = await place.server.people("PUT", f"/blobs/{sha256}", body)
    refused(answer, Code.MALFORMED, f"blob {sha256[:12]}… came with sha256", "send it again")
    assert (await place.server.people("HEAD", f"/blobs/{sha256}")).status == 404
    assert (await place.server.people("PUT", f"/blobs/{sha256}", b"something")).status == 201
    assert (await place.server.people("HEAD", f"/blobs/{sha256}")).status == 200
    place.server.service.blobs.delete(sha256)


@pytest.mark.parametrize("data", LIES)
async def test_a_bundle_whose_first_factors_lie_opens_no_task(
    place: Attacked, bundle: Path, data: bytes
) -> None:
    with_first_factors(bundle, data)
    digest = await place.server.admin.send_bundle(bundle)
    answer = await place.server.people("POST", f"/tasks?bundle={digest}", TASK.encode())
    refused(answer, Code.MALFORMED, "the bundle's initial factors cannot be read: factors", "export")


# the client that people use


async def test_a_bundle_is_checked_before_it_is_sent(place: Attacked, bundle: Path) -> None:
    with pytest.raises(
        BundleError, match=r"nowhere/manifest.json cannot be read: No such file .* is it a bundle"
    ):
        await place.server.admin.send_bundle(bundle / "nowhere")
    (bundle / "base.bin").write_bytes(bytes(1000))
    with pytest.raises(BundleError, match=r"base.bin does not match its sha256 in manifest.json: export"):
        await place.server.admin.send_bundle(bundle)
    (bundle / "base.bin").unlink()
    with pytest.raises(BundleError, match=r"base.bin cannot be read: No such file or directory; export"):
        await place.server.admin.send_bundle(bundle)


async def test_a_wrong_token_is_said_even_where_much_was_to_be_sent(place: Attacked) -> None:
    async def much() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield bytes(65536)

    async with AdminClient(place.server.listening.admin_url, "guessed") as stranger:
        with pytest.raises(FedttError, match="the admin token is missing or wrong"):
            await stranger.call("PUT", f"/blobs/{NOBODY}", much())


async def test_a_server_that_is_not_there_is_named_with_what_to_look_at() -> None:
    async with AdminClient("http://127.0.0.1:9", "x") as nobody:
        with pytest.raises(
            Unreachable, match=r"127.0.0.1:9/v1/admin does not answer .* is `fedtt serve` running"
        ):
            await nobody.rows("/tasks")


async def test_another_kind_of_server_is_told_apart(place: Attacked) -> None:
    async with AdminClient(place.server.url, "x") as devices:
        with pytest.raises(FedttError, match="answered 404 without a reason: is --server its admin address"):
            await devices.rows("/tasks")
