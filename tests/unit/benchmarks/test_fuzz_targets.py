from __future__ import annotations

from benchmarks.fuzz_targets import targets


def test_every_fuzzed_decoder_takes_the_inputs_that_fuzzing_begins_with() -> None:
    for target in targets().values():
        assert target.sound
        for data in target.sound:
            target.take(data)
