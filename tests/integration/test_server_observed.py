"""Metrics, population and activity of a real server over real sockets: who may read them, and what moves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from aggregator.dashboard import page
from fedtt.manifest import MANIFEST, bundle_digest
from fedtt.messages import Code
from tests.support.served import Answer, Served, frame_of, refused, send, served, task_text, until

Samples = dict[tuple[str, ...], float]
OBSERVED = ("/metrics", "/v1/admin/population", "/v1/admin/activity")
LEASE = "/v1/leases/{lease}"


async def observed(server: Served, path: str, token: str | None = None) -> Answer:
    """GET from the admin listener, with its token unless another is given."""
    given = server.listening.admin_token if token is None else token
    url = URL(server.listening.admin_url + path, encoded=True)
    return await send(url, "GET", None, {"Authorization": f"Bearer {given}"} if given else {})


async def samples(server: Served) -> Samples:
    """What a scrape reads: (name, values of its labels in the order of their names) -> value."""
    answer = await observed(server, "/metrics")
    assert (answer.status, answer.headers["Content-Type"]) == (
        200,
        "text/plain; version=0.0.4; charset=utf-8",
    )
    found: Samples = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        assert family.documentation
        for sample in family.samples:
            key = (sample.name, *(value for _, value in sorted(sample.labels.items())))
            assert key not in found
            found[key] = sample.value
    return found


async def shown(server: Served, path: str) -> Any:
    answer = await observed(server, path)
    assert answer.status == 200
    return msgspec.json.decode(answer.body)


def risen(before: Samples, after: Samples) -> Samples:
    """What has changed, and by how much."""
    return {key: now - before.get(key, 0) for key, now in after.items() if now != before.get(key, 0)}


def requests(listener: str, method: str, route: str, status: int) -> tuple[str, ...]:
    return ("fedtt_http_requests_total", listener, method, route, str(status))


async def version(server: Served, number: int, task: str = "lights") -> None:
    async def made() -> bool:
        return bool((await server.admin.task(task))["version"] >= number)

    await until(made)


# who may read


@pytest.mark.parametrize("token", ["", "guessed"])
async def test_what_a_server_does_is_shown_to_holders_of_the_admin_token(tmp_path: Path, token: str) -> None:
    async with served(tmp_path) as server:
        for path in OBSERVED:
            refused(
                await observed(server, path, token), Code.FORBIDDEN, "the admin token is missing or wrong"
            )
            refused(await server.raw("GET", path), Code.NOT_FOUND)  # nor is it on the devices' listener
        assert (await samples(server))[("fedtt_refusals_total", "forbidden")] == 3


async def test_the_dashboard_is_open_and_holds_no_secret(tmp_path: Path) -> None:
    async with served(tmp_path, task_text("secret-task")) as server:
        answer = await observed(server, "/", "")
        assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'sha256-")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        for secret in (server.listening.admin_token, server.token, "secret-task"):
            assert secret not in answer.body.decode()
        assert (await observed(server, "/?token=x", "")).status == 200
        for path in ("//", "/.", "/index.html"):
            refused(await observed(server, path, ""), Code.FORBIDDEN)
        refused(await send(URL(server.listening.admin_url), "POST", None, {}), Code.FORBIDDEN)


# values


async def test_a_round_moves_every_value_it_should_by_what_it_was(tmp_path: Path) -> None:
    async with served(tmp_path, task_text(cohort=2)) as server, server.device() as a, server.device() as b:
        before = await samples(server)
        assert before[("fedtt_devices", "active")] == 2
        assert before[("fedtt_tasks", "active")] == 1
        assert before[("fedtt_task_version", "lights")] == 0
        works = [await peer.work() for peer in (a, b)]
        frames = [frame_of(work.plan) for work in works]
        await a.transport.upload(works[0].lease, frames[0])
        waiting = risen(before, await samples(server))
        assert waiting[("fedtt_round_updates", "lights")] == 1
        assert waiting[("fedtt_rounds", "open", "lights")] == 1
        await a.transport.upload(works[0].lease, frames[0])  # the same again is no second update
        await b.transport.upload(works[1].lease, frames[1])
        await version(server, 1)
        moved = risen(before, await samples(server))
        assert moved[("fedtt_updates_total", "accepted")] == 2
        assert moved[("fedtt_updates_total", "folded")] == 2
        assert ("fedtt_updates_total", "discarded") not in moved
        assert moved[("fedtt_check_ins_total", "work")] == 2
        assert moved[("fedtt_fold_duration_seconds_count",)] == 1
        assert 0 < moved[("fedtt_fold_duration_seconds_sum",)] < 10
        assert moved[("fedtt_fold_updates_sum",)] == 2
        assert moved[("fedtt_task_version", "lights")] == 1
        assert moved[("fedtt_rounds", "folded", "lights")] == 1
        assert moved[("fedtt_rounds", "open", "lights")] == 1
        assert ("fedtt_round_updates", "lights") not in moved
        route = f"{LEASE}/update"
        assert moved[requests("devices", "PUT", route, 200)] == 3
        sent_bytes = len(frames[0]) * 2 + len(frames[1])
        assert moved[("fedtt_http_received_bytes_total", "devices", route)] == sent_bytes
        assert moved[("fedtt_http_request_duration_seconds_count", "devices", "PUT", route)] == 3
        assert moved[("fedtt_commit_changes_sum",)] >= moved[("fedtt_commit_changes_count",)] >= 5
        assert 0 < moved[("fedtt_commit_duration_seconds_sum",)] < 10
        assert not [key for key in moved if key[0] == "fedtt_refusals_total"]


async def test_updates_that_come_to_nothing_are_counted_as_discarded(tmp_path: Path) -> None:
    async with served(tmp_path, task_text()) as server, server.device() as a, server.device() as b:
        await a.update()
        await b.update()
        await b.transport.leave(erase=True)
        leaving = await samples(server)
        assert leaving[("fedtt_updates_total", "discarded")] == 1
        assert (leaving[("fedtt_devices", "active")], leaving[("fedtt_devices", "erased")]) == (1, 1)
        await server.admin.task("lights", "/stop", "POST")
        stopped = risen(leaving, await samples(server))
        assert stopped[("fedtt_updates_total", "discarded")] == 1
        assert stopped[("fedtt_rounds", "abandoned", "lights")] == 1
        assert stopped[("fedtt_tasks", "stopped")] == 1


async def test_every_refusal_is_counted_once_by_its_code(tmp_path: Path) -> None:
    async with served(tmp_path, task_text()) as server, server.device() as peer:
        before = await samples(server)
        work = await peer.work()
        await peer.request("POST", "/v1/check-in", b"\xc1")
        await peer.request("POST", "/v1/check-in", b"ab", claimed=b"cd")
        await peer.request("PUT", f"/v1/leases/{'0' * 32}/update", b"x")
        await peer.request("PUT", f"/v1/leases/{work.lease}/update", b"x" * 100_000)
        await server.raw("PATCH", "/v1/enroll")
        await server.people("GET", "/tasks/nobody")
        moved = risen(before, await samples(server))
        codes = {key[1]: count for key, count in moved.items() if key[0] == "fedtt_refusals_total"}
        assert codes == {
            "malformed": 1,
            "bad_signature": 1,
            "unknown_lease": 1,
            "too_large": 1,
            "not_found": 2,
        }
        assert moved[requests("devices", "POST", "/v1/check-in", 400)] == 1
        assert moved[requests("devices", "POST", "/v1/check-in", 401)] == 1
        assert moved[requests("devices", "other", "unmatched", 405)] == 1
        assert moved[requests("admin", "GET", "/v1/admin/tasks/{task}", 404)] == 1


async def test_no_series_is_made_by_what_a_stranger_names(tmp_path: Path) -> None:
    async with served(tmp_path, task_text()) as server:

        async def ask(number: int) -> None:
            await server.raw("GET", f"/nowhere/{number}")
            await server.raw("PROPFIND", f"/v1/leases/{number:032x}")
            await server.raw("GET", f"/v1/leases/{number:032x}")
            await server.raw("GET", f"/v1/versions/{number:064x}")
            await server.people("GET", f"/tasks/nobody{number}/rounds")
            reader, writer = await server.connect()
            writer.write(f"BREW{number} / HTTP/1.1\r\n\r\n".encode())
            await reader.read()
            writer.close()

        await ask(1)
        await samples(server)
        known = await samples(server)
        for number in range(2, 30):
            await ask(number)
        later = await samples(server)
        assert later.keys() == known.keys()
        assert len(known) < 1000
        assert not [key for key in later if re.search(r"nobody|nowhere|BREW|[0-9a-f]{32}", " ".join(key))]
        assert risen(known, later)[requests("devices", "other", "unmatched", 400)] == 28


async def test_bytes_sent_are_bodies_that_arrived_whole(tmp_path: Path) -> None:
    async with served(tmp_path, task_text()) as server, server.device() as peer:
        bundle = bundle_digest((server.bundle / MANIFEST).read_bytes())
        path = f"/v1/bundles/{bundle}/base.bin"  # 1,000 bytes
        before = await samples(server)
        headers = peer.signed("GET", path)
        assert len((await server.raw("GET", path, None, headers)).body) == 1000
        part = await server.raw("GET", path, None, headers | {"Range": "bytes=900-"})
        assert (part.status, len(part.body)) == (206, 100)
        none = await server.raw("GET", path, None, headers | {"Range": "bytes=1000-"})
        await server.people("HEAD", f"/blobs/{'0' * 64}")
        moved = risen(before, await samples(server))
        route = "/v1/bundles/{sha256}/{file}"
        assert moved[("fedtt_http_sent_bytes_total", "devices", route)] == 1100 + len(none.body)
        for status in (200, 206, 416):
            assert moved[requests("devices", "GET", route, status)] == 1
        assert ("fedtt_http_sent_bytes_total", "admin", "/v1/admin/blobs/{sha256}") not in moved


async def test_two_servers_of_one_process_count_apart(tmp_path: Path) -> None:
    async with served(tmp_path / "one", task_text()) as one, served(tmp_path / "two") as two:
        async with one.device() as peer:
            await peer.update()
        assert (await samples(one))[("fedtt_updates_total", "accepted")] == 1
        assert (await samples(two))[("fedtt_updates_total", "accepted")] == 0
        assert ("fedtt_task_version", "lights") not in await samples(two)


async def test_what_operators_are_told_to_watch_is_there(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    named = set(re.findall(r"`(fedtt_\w+)", page))
    assert len(named) >= 4
    async with served(tmp_path, task_text()) as server:
        there = {name for name, *_ in await samples(server)}
    assert {name for name in named if not any(sample.startswith(name) for sample in there)} == set()


# what the dashboard reads


async def test_population_says_how_many_devices_there_are_and_were_seen(tmp_path: Path) -> None:
    async with served(tmp_path, task_text()) as server, server.device() as a, server.device():
        await a.transport.leave(erase=False)
        assert await shown(server, "/v1/admin/population") == {
            "devices": {"active": 1, "left": 1, "erased": 0},
            "seen": [{"within_s": 3600, "devices": 1}, {"within_s": 86400, "devices": 1}],
        }


async def test_activity_sums_what_the_metrics_count(tmp_path: Path) -> None:
    async with served(tmp_path, task_text()) as server, server.device() as peer:
        await peer.update()
        await peer.request("POST", "/v1/check-in", b"\xc1")
        found = await shown(server, "/v1/admin/activity")
        assert 0 < found["now"] - found["since"] < 60
        assert found["requests"]["devices"] == 4  # enrol, check in, upload, and nonsense
        assert found["updates"] == {"accepted": 1, "folded": 0, "discarded": 0}
        assert found["check_ins"] == {"work": 1, "judge": 0, "wait": 0, "retired": 0, "tell": 0}
        assert found["refusals"]["malformed"] == sum(found["refusals"].values()) == 1
        by_route = {
            k: v
            for k, v in (await samples(server)).items()
            if k[:2] == ("fedtt_http_received_bytes_total", "devices")
        }
        assert found["received_bytes"]["devices"] == sum(by_route.values()) > 500
        assert found["sent_bytes"]["devices"] > 100


async def test_rounds_say_what_has_become_of_their_updates(tmp_path: Path) -> None:
    async with served(tmp_path, task_text(cohort=2)) as server, server.device() as a, server.device() as b:
        await a.update()
        await b.update()
        await version(server, 1)
        await a.update()
        newest, first = await shown(server, "/v1/admin/tasks/lights/rounds")
        assert (newest["number"], newest["state"]) == (2, "open")
        assert newest["updates"] == {"accepted": 1, "folded": 0, "discarded": 0}
        assert first["updates"] == {"accepted": 0, "folded": 2, "discarded": 0}
        assert newest["invited"] == 2
        assert await shown(server, "/v1/admin/tasks/lights/rounds?limit=1") == [newest]


async def test_a_limit_that_is_none_is_refused(tmp_path: Path) -> None:
    async with served(tmp_path, task_text()) as server:
        for limit in ("0", "-1", "1001", "1e2", "all", "", "%D9%A3", "9" * 3000):
            answer = await server.people("GET", f"/tasks/lights/rounds?limit={limit}")
            refused(answer, Code.MALFORMED, "limit must be a whole number from 1 to 1000")


async def test_every_call_of_the_dashboard_is_answered(tmp_path: Path) -> None:
    script = page()[0].decode()
    paths = re.findall(r'= "(/v1/admin/\w+)";', script)
    assert sorted(paths) == ["/v1/admin/activity", "/v1/admin/population", "/v1/admin/tasks"]
    below = re.findall(r"taskPath\(card\.name, [`\"]([^`\"]+)[`\"]\)", script)
    assert sorted(below) == ["/${change}", "/rounds?limit=${LATEST}", "/versions"]
    async with served(tmp_path, task_text()) as server:
        task = "/v1/admin/tasks/lights"
        for path in (*paths, task, f"{task}/versions", f"{task}/rounds?limit=8"):
            await shown(server, path)
        for change in ("pause", "resume", "stop"):
            assert (await server.people("POST", f"/tasks/lights/{change}")).status == 200
