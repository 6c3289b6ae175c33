"""What the server logs, and how a line is found from an answer."""

from __future__ import annotations

from pathlib import Path

from fedtt.messages import Code
from tests.support.logged import lines_of_a_failure
from tests.support.served import refused, served, task_text


async def test_an_answer_names_its_request_and_takes_a_proxys_name_for_it(tmp_path: Path) -> None:
    async with served(tmp_path, task_text()) as server:
        plain = await server.raw("GET", "/healthz")
        again = await server.raw("GET", "/healthz")
        assert plain.headers["X-Request-ID"] != again.headers["X-Request-ID"]
        named = await server.raw("GET", "/nothing", None, {"X-Request-ID": "proxy-17"})
        assert named.headers["X-Request-ID"] == "proxy-17"
        refused(named, Code.NOT_FOUND)
        for bad in ("x" * 65, "a b", "\x22"):
            answer = await server.raw("GET", "/healthz", None, {"X-Request-ID": bad})
            assert answer.headers["X-Request-ID"] != bad
        assert "X-Request-ID" in (await server.people("GET", "/tasks")).headers


async def test_a_line_of_the_log_is_json_with_the_request_it_is_about(tmp_path: Path) -> None:
    (line,) = await lines_of_a_failure(tmp_path)
    assert line["level"] == "error"
    assert "process" not in line  # it is alone
    assert f"/v1/admin/blobs/{'0' * 64} failed" in line["message"]
