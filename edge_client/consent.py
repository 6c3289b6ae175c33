"""What the owner of a device agrees to, in words, and how the question is asked."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edge_client.label_counts import LABEL_SETS
from edge_client.server_address import server_url
from fedtt.errors import ConfigError

__all__ = ["ask", "consent_text"]

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def consent_text(
    server: str, home: Path, examples: int, *, old_server: str = "", label_epsilon: float = 0.0
) -> str:
    """A few plain sentences: what is trained, what is sent, what is never sent, how to stop.

    old_server: the one the device goes away from, if any.
    label_epsilon: of the counts of labels that may be told; 0 for none.
    """
    told = f"  Once for each set of labels that it asks about, {LABEL_SETS} at most:\n"
    told += "  how many examples of each label you have, made vague by random noise"
    counts = [f"{told} (epsilon {label_epsilon:g})."] if label_epsilon else []
    moving = [
        f"This device belongs to {old_server} and is to go over to {server}, with what it has not sent yet.",
        "  The old server is not told, and keeps what it was sent.",
    ]
    lines = [
        *(moving if old_server else []),
        f"Trained: a small part of a language model, here, on your {examples} examples.",
        f"Sent to {server}: how that part changed (a few kilobytes a round), the number of your examples,",
        "  the memory it may use if you said so, training losses, how well new versions of the model do on",
        "  your examples (unless you said --no-judging) and a key made for this device.",
        *counts,
        "  Whoever runs the server can study these numbers; how a part changed tells roughly which labels",
        "  your examples have.",
        "Never sent: your texts and which label each has."
        if counts
        else "Never sent: your texts and their labels.",
        f"You can stop at any time: fedtt client pause | leave | forget --home {home}",
    ]
    url = server_url(server)
    if url.scheme == "http" and url.host not in _LOOPBACK:
        lines.append("Beware: http:// is not encrypted; others on the network can read what is sent.")
    return "\n".join(lines)


def ask(text: str, *, given: bool) -> bool:
    """Whether the owner agrees: said beforehand (`given`, or FEDTT_CONSENT=yes) or asked on a terminal.

    Raises ConfigError where nobody can be asked.
    """
    print(text, file=sys.stderr, flush=True)
    if given or os.environ.get("FEDTT_CONSENT") == "yes":
        return True
    if not sys.stdin.isatty():
        raise ConfigError(
            "consent", "unasked", "agree with --yes or FEDTT_CONSENT=yes where there is no terminal to ask on"
        )
    print("Take part? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}
