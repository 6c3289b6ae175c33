"""The options of `fedtt serve` by which floods are kept out."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aggregator.limits import Rate

__all__ = ["limit_arguments"]

_MOST = 10**9  #: of whatever is counted


def limit_arguments(serve: argparse.ArgumentParser) -> None:
    limits = serve.add_argument_group(
        "limits of the devices' listener",
        "Each process counts for itself: N of them let N times as much pass, and take N times the memory.",
    )
    limits.add_argument(
        "--device-rate",
        type=_rate,
        default="50:500",
        metavar="PER_S[:BURST]",
        help="requests that one device may send, per process, or none for any number (default %(default)s)",
    )
    limits.add_argument(
        "--address-rate",
        type=_rate,
        default="500:5000",
        metavar="PER_S[:BURST]",
        help="requests from one /24 or /56, per process, refused before they are read (default %(default)s)",
    )
    limits.add_argument(
        "--max-connections",
        type=_positive,
        default=16_000,
        metavar="N",
        help="of devices at a time, per process; more are closed at once (default %(default)s)",
    )
    limits.add_argument(
        "--max-connections-per-range",
        type=_number_or_none,
        default="2000",
        metavar="N",
        help="of them from one /24 or /56, per process, not counted behind a proxy "
        "(default %(default)s, or none)",
    )
    limits.add_argument(
        "--idle-s",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="after which a connection without a whole request is closed (default %(default)s)",
    )
    limits.add_argument(
        "--body-s",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="for a request's body to arrive, and for more of an answer to be taken (default %(default)s)",
    )


def _rate(text: str) -> Rate | None:
    """`50` or `50:500`: so many a second, and at once (ten times as many unless said)."""
    from aggregator.limits import Rate

    if text == "none":
        return None
    per_s, _, burst = text.partition(":")
    rate = _seconds(per_s)
    return Rate(per_s=rate, burst=_positive(burst) if burst else max(1, round(10 * rate)))


def _number_or_none(text: str) -> int | None:
    return None if text == "none" else _positive(text)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= _MOST):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {_MOST}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= _MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0, at most {_MOST}")
    return value
