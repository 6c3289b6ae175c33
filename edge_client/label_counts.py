"""What a device tells of its labels, where its owner has agreed: once for a set of labels, with noise.

The noise is the device's own, of the smaller ε of what the server asks and what its owner allows. The noisy
list is in the journal before anything is sent of it and stays there: told again and again, in whatever
order, it gives away no more than once, while the mean of lists with fresh noise would show the counts
themselves. Whoever asks by several sets of labels learns at most `LABEL_SETS` lists, of that ε each.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from edge_client.examples import Examples, label_index
from edge_client.journal import Journal
from fedtt.label_counts import (
    LABEL_LIMIT,
    decode_label_counts,
    encode_label_counts,
    noisy_label_counts,
)

__all__ = ["LABEL_SETS", "secure_uniform", "told_labels"]

LABEL_SETS = 4  #: different sets of labels of which a device tells anything, ever


def secure_uniform() -> float:
    """In [0, 1), from the operating system's generator."""
    return secrets.randbits(53) * 2.0**-53


def told_labels(
    journal: Journal,
    examples: Examples,
    labels: Sequence[str],
    epsilon: float,
    uniform: Callable[[], float] = secure_uniform,
) -> bytes:
    """The coded counts in the order of the labels, those told before if there are any; b"" where there is
    nothing to tell.

    Raises DataError where an example has none of the labels.
    """
    if not 0 < len(labels) <= LABEL_LIMIT:
        return b""
    order = sorted(range(len(labels)), key=labels.__getitem__)
    key = hashlib.sha256(msgspec.json.encode([labels[place] for place in order])).hexdigest()
    known = journal.state.label_counts
    if key not in known:
        if len(known) >= LABEL_SETS:
            return b""
        found = [label_index(example, labels) for example in examples.read()]
        noisy = noisy_label_counts(found, len(labels), epsilon, uniform)
        known = known | {key: _in_order(noisy, order)}
        journal.update(label_counts=known)
    return _in_order(known[key], np.argsort(order).tolist())


def _in_order(counts: bytes, order: list[int]) -> bytes:
    return encode_label_counts(decode_label_counts(counts, len(order))[order])
