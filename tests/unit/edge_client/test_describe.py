"""Events as lines: whoever runs a server cannot write a second one, or command the terminal."""

from __future__ import annotations

import pytest

from edge_client import events
from edge_client.describe import describe
from edge_client.events import Event
from fedtt.errors import Refused
from fedtt.messages import Code, FailureCode, Problem

HOSTILE = "\x1b[2Jno work\r\nupdate taken (folded)\x07\x9b31m\u2028\u202e\x7f"
SHOWN = r"\x1b[2Jno work\r\nupdate taken (folded)\x07\x9b31m\u2028\u202e\x7f"


@pytest.mark.parametrize(
    "event",
    [
        events.Granted(lease="1", task=HOSTILE, round=1, version_number=1),
        events.Waiting(reason=HOSTILE),
        events.Resting(reason=HOSTILE),
        events.Dropped(lease="1", reason=HOSTILE),
        events.GaveUp(lease="1", code=FailureCode.MEMORY, detail=HOSTILE),
        events.Retrying(error=str(Refused(Problem(code=Code.BUSY, detail=HOSTILE)))),
        events.Retired(reason=HOSTILE),
        events.Judged(task=HOSTILE, version_number=1, examples=1, loss_before=1.0, loss=1.0),
        events.Downloading(file=HOSTILE, bytes=1, offset=0),
        events.Redownloading(file=HOSTILE),
    ],
    ids=lambda event: type(event).__name__,
)
def test_what_a_server_wrote_stays_on_the_line_and_moves_no_cursor(event: Event) -> None:
    line = describe(event)
    assert SHOWN in line
    assert line.isprintable()


def test_words_of_any_language_are_shown_as_they_are() -> None:
    assert describe(events.Waiting(reason="später … ε 日本", pause_s=3.0)) == "waiting 3 s: später … ε 日本"
