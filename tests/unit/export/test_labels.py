from __future__ import annotations

from pathlib import Path

import pytest

from export.labels import read_labels
from fedtt.errors import DataError


def _file(directory: Path, text: str) -> Path:
    path = directory / "labels.json"
    path.write_text(text)
    return path


def test_a_list_and_an_object_with_a_list_are_read(tmp_path: Path) -> None:
    assert read_labels(_file(tmp_path, '["no", "yes"]')) == ("no", "yes")
    assert read_labels(_file(tmp_path, '{"name": "x", "labels": ["no", "yes"]}')) == ("no", "yes")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "JSON list of names"),
        ("{}", "JSON list of names"),
        ('{"labels": "yes"}', "JSON list of names"),
        ('["no", 1]', "JSON list of names"),
        ("3", "JSON list of names"),
        ('["only"]', "at least 2"),
        ("[]", "holds 0 labels"),
        ('["a", "b", "a"]', "label 2 is 'a'"),
        ('["a", " "]', "label 1 is ' '"),
    ],
)
def test_other_contents_are_refused_with_the_file_and_the_reason(
    text: str, complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        read_labels(_file(tmp_path, text))
    assert "labels.json" in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.json.*cannot be read"):
        read_labels(tmp_path / "absent.json")
