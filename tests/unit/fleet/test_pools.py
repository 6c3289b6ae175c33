from __future__ import annotations

from pathlib import Path

import pytest

from fedtt.errors import ConfigError
from fleet.pools import check_pool, open_pool
from fleet.spec import Size
from tests.support.edge import small_bundle


def test_a_name_there_is_no_pool_of_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fleet\.trainer = 'gpu' .*'batched'.*'one-by-one'"):
        open_pool("gpu", small_bundle(tmp_path), 1)


@pytest.mark.parametrize("name", ["batched", "batched-torch"])
def test_a_pool_that_runs_torch_wants_the_model_before_anything_starts(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fleet\.model = None"):
        open_pool(name, small_bundle(tmp_path), 1)


def test_a_pool_without_compiled_graphs_wants_it_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model = None"):
        open_pool("batched-onnx", small_bundle(tmp_path), 1)


@pytest.mark.parametrize("name", ["batched", "batched-onnx", "batched-torch"])
def test_a_model_that_lies_nowhere_is_refused_before_torch_is_loaded(name: str, tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    for missing in (str(tmp_path / "nope"), "./nope", "../nope"):
        with pytest.raises(ConfigError, match=r"fleet\.model = '.*nope' .*a directory"):
            check_pool(name, bundle, missing)
    for there in (str(tmp_path), "some/name-on-a-hub"):
        check_pool(name, bundle, there)


@pytest.mark.parametrize("name", ["noop", "one-by-one"])
def test_the_others_open_without_it_and_say_whose_graphs_they_run(name: str, tmp_path: Path) -> None:
    pool = open_pool(name, small_bundle(tmp_path), 1)
    assert pool.runtime == "onnxruntime"
    pool.close()


def test_who_names_a_model_trains_batched_unless_another_trainer_is_named() -> None:
    assert Size(devices=1).chosen_trainer == "one-by-one"
    assert Size(devices=1, model="m").chosen_trainer == "batched"
    assert Size(devices=1, model="m", trainer="batched-onnx").chosen_trainer == "batched-onnx"
