from __future__ import annotations

from pathlib import Path

import pytest

from edge_client.example_files import read_examples
from edge_client.examples import Example
from fedtt.errors import DataError


def write(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_jsonl_rows_become_examples_with_their_row(tmp_path: Path) -> None:
    path = write(
        tmp_path, "a.jsonl", '{"text": "é on", "label": "on", "user": 3}\n\n{"text": "off", "label": 0}\n'
    )
    assert read_examples(path) == [Example("é on", "on", "a.jsonl row 1"), Example("off", 0, "a.jsonl row 3")]


def test_csv_rows_become_examples_with_quotes_and_line_ends_inside(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", '\ufefftext,label\r\n"on, please",on\r\n"two\r\nlines",\r\n')
    assert read_examples(path) == [
        Example("on, please", "on", "a.csv row 2"),
        Example("two\r\nlines", None, "a.csv row 4"),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "a.jsonl",
            '{"text": "a cat", "text_pair": "an animal", "label": 1}\n{"text": "x", "text_pair": null}',
        ),
        ("a.csv", "text,text_pair,label\na cat,an animal,1\nx,,\n"),
    ],
)
def test_a_row_may_have_two_texts(tmp_path: Path, name: str, content: str) -> None:
    first, second = read_examples(write(tmp_path, name, content))
    assert (first.text, first.text_pair, first.words) == ("a cat", "an animal", ("a cat", "an animal"))
    assert (second.text_pair, second.words) == (None, "x")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl holds no examples"),
        ("a.csv", "", "a.csv holds no examples"),
        ("a.csv", "text,label\n", "a.csv holds no examples"),
        ("a.jsonl", '{"text": "x"}\n{"label": "on"}', "a.jsonl row 2 has no text"),
        ("a.jsonl", '{"text": "  "}', "a.jsonl row 1 has no text"),
        ("a.jsonl", '{"text": 3}', "a.jsonl row 1 has no text"),
        ("a.jsonl", '{"text": "x", "text_pair": " "}', "a.jsonl row 1 has an empty 'text_pair'"),
        ("a.jsonl", '{"text": "x", "text_pair": 3}', "a.jsonl row 1 has an empty 'text_pair'"),
        ("a.jsonl", '{"text": "x", "label": 1.5}', r"row 1 has label 1.5: a label is a name or an index"),
        ("a.jsonl", '{"text": "x", "label": true}', "row 1 has label True"),
        ("a.jsonl", '{"text": "x"}\nnot json', "a.jsonl row 2 is not a JSON object"),
        ("a.jsonl", "[1]", "a.jsonl row 1 is not a JSON object"),
        ("a.jsonl", '{"text": "x", "of": ' + "[" * 100_000, "a.jsonl row 1 is not a JSON object"),
        ("a.csv", "words,label\nx,on\n", "row 1 is a header without a column 'text': words, label"),
        ("a.csv", "text,label\n,on\n", "a.csv row 2 has no text"),
        ("a.csv", b"text,label\n\xff\xfe,on\n", "is not UTF-8"),
        ("a.jsonl", b'{"text": "\xe9"}', "is not UTF-8"),
        ("a.txt", "x", "read from .jsonl and .csv files"),
    ],
)
def test_an_unusable_file_is_named_with_its_row(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_examples(write(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.csv cannot be read \(No such file or directory\)"):
        read_examples(tmp_path / "none.csv")
