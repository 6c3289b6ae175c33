from __future__ import annotations

from pathlib import Path

import pytest
import torch

from export.base import Base, load_base
from export.prefix import Prefix, run_above
from tests.support.models import save_tiny_model

IDS = torch.tensor([[1, 9, 10, 2], [1, 12, 2, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
FAMILIES = ["bert", "roberta", "distilbert", "llama", "mistral", "qwen2"]


def _base(directory: Path, family: str) -> Base:
    return load_base(str(save_tiny_model(directory, family)), "sequence-classification")


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_part_above_a_cut_gives_over_the_part_below_what_the_whole_base_gives(
    family: str, attention: bool, tmp_path: Path
) -> None:
    base = _base(tmp_path, family)
    with torch.no_grad():
        whole = base.run(IDS, MASK)
        below = Prefix(base, 1, attention=attention)(IDS, MASK)
        assert torch.equal(run_above(base, 1, below, MASK, attention=attention), whole)
        for state in below.chunk(1 + attention, -1):
            kept = state.clone()
            state.zero_()
            assert not torch.equal(run_above(base, 1, below, MASK, attention=attention), whole)
            state.copy_(kept)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_enters_a_block_is_what_transformers_calls_that_hidden_state(
    family: str, tmp_path: Path
) -> None:
    base = _base(tmp_path, family)
    with torch.no_grad():
        states = base.model(input_ids=IDS[:1], output_hidden_states=True).hidden_states
        found = Prefix(base, 1)(IDS[:1], MASK[:1])
    torch.testing.assert_close(found, states[1])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_cut_above_all_blocks_leaves_nothing_to_run(family: str, tmp_path: Path) -> None:
    base = _base(tmp_path, family)
    with torch.no_grad():
        below = Prefix(base, 2)(IDS, MASK)
        assert torch.equal(below, base.run(IDS, MASK))
        assert run_above(base, 2, below, MASK) is below


def test_the_base_is_whole_again_after_an_error(tmp_path: Path) -> None:
    base = _base(tmp_path, "bert")
    bare = base.run(IDS, MASK)
    with pytest.raises(IndexError):
        Prefix(base, 1)(IDS + 1000, MASK)
    with pytest.raises(RuntimeError):
        run_above(base, 1, torch.zeros(2, 4, 7), MASK)
    assert torch.equal(base.run(IDS, MASK), bare)
