"""Philox against the paper's round function and Random123's published vectors; both bind other languages."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedtt.rng import Purpose, rng_for, uniform_at

_WORD = 2**64
GOLDEN_DRAWS = [0.8721971213125475, 0.08159765285834197]
Words = tuple[int, int, int, int]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x64-10 as in Salmon et al. 2011, figure 4 and table 2: ten rounds, key bumped between them."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (p1 >> 64) ^ b ^ k0, p1 % _WORD, (p0 >> 64) ^ d ^ k1, p0 % _WORD
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % _WORD, (k1 + 0xBB67AE8584CAA73B) % _WORD
    return a, b, c, d


@pytest.mark.parametrize(
    ("counter", "key", "block"),
    [
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
        ),
        (
            (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
            (0x452821E638D01377, 0xBE5466CF34E90C6C),
            (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
        ),
    ],
)
def test_the_oracle_reproduces_the_vectors_of_random123(
    counter: Words, key: tuple[int, int], block: Words
) -> None:
    assert philox(counter, key) == block


@pytest.mark.parametrize(
    ("seed", "purpose", "round_number", "device"),
    [(0, Purpose.INITIAL, 0, 0), (7, Purpose.SAMPLING, 3, 0), (2**53, Purpose.ROUNDING, 12, 2**64 - 1)],
)
def test_a_stream_is_philox_with_the_address_in_key_and_counter(
    seed: int, purpose: Purpose, round_number: int, device: int
) -> None:
    drawn = rng_for(seed, purpose, round_number, device).bit_generator.random_raw(8).tolist()
    blocks = [philox((at, 0, round_number, device), (seed, purpose)) for at in (1, 2)]
    assert drawn == [word for block in blocks for word in block]


def test_golden_words_of_two_addresses() -> None:
    first = rng_for(0, Purpose.INITIAL).bit_generator.random_raw(2).tolist()
    other = rng_for(1, Purpose.BATCHES, round_number=2, device=3).bit_generator.random_raw(2).tolist()
    assert [f"{word:016x}" for word in first + other] == [
        "d037f8c3f9a1d176",
        "c057419b4c210765",
        "4803251bfe9a680d",
        "006655610524487f",
    ]


def test_every_part_of_an_address_changes_the_stream() -> None:
    addresses = itertools.product((0, 1), (Purpose.INITIAL, Purpose.SAMPLING), (0, 1), (0, 1))
    firsts = {rng_for(*address).bit_generator.random_raw() for address in addresses}
    assert len(firsts) == 16  # 2·2·2·2


def test_streams_do_not_depend_on_the_order_in_which_they_are_drawn() -> None:
    one, other = rng_for(1, Purpose.BATCHES, 0, 0), rng_for(1, Purpose.BATCHES, 0, 1)
    interleaved = [(one.random(), other.random()) for _ in range(50)]
    again = rng_for(1, Purpose.BATCHES, 0, 1).random(50)
    np.testing.assert_array_equal(again, [b for _, b in interleaved])


def test_addresses_wrap_at_64_bits() -> None:
    wrapped = rng_for(2**64 + 5, Purpose.BATCHES, 2**64, -1).bit_generator.random_raw(4)
    plain = rng_for(5, Purpose.BATCHES, 0, 2**64 - 1).bit_generator.random_raw(4)
    np.testing.assert_array_equal(wrapped, plain)


def test_no_two_purposes_share_a_number() -> None:
    assert len({int(purpose) for purpose in Purpose.__members__.values()}) == len(Purpose.__members__)


def test_golden_numbers_of_single_draws() -> None:
    found = [uniform_at(0, Purpose.BACKOFF), uniform_at(2**53, Purpose.ARRIVALS, 12, 2**64 - 1)]
    assert found == GOLDEN_DRAWS


def test_single_draws_are_uniform_and_differ_with_every_part_of_the_address() -> None:
    parts = list(itertools.product((0, 1), (Purpose.BACKOFF, Purpose.ARRIVALS), range(25), range(100)))
    drawn = np.sort([uniform_at(*address) for address in parts])
    assert len(set(drawn)) == len(parts)
    assert drawn[0] >= 0
    assert drawn[-1] < 1
    # Kolmogorov-Smirnov at n = 10,000: 1.95/√n is passed by one uniform sample in a thousand
    assert np.abs(drawn - (np.arange(len(parts)) + 0.5) / len(parts)).max() < 1.95 / len(parts) ** 0.5
