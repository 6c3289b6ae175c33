"""The data set that the demo ships."""

from __future__ import annotations

import re
from collections import Counter
from importlib.resources import files

from fedtt.task import parse_task
from fleet.demo import TASK, assistant


def plain(text: str) -> str:
    return re.sub("[^a-z0-9 ]", "", text.lower())


def test_every_intent_has_at_least_forty_utterances_and_there_are_sixteen() -> None:
    by_user, labels = assistant()
    counts = Counter(example.label for examples in by_user.values() for example in examples)
    assert set(counts) == set(labels)
    assert len(labels) == 16
    assert min(counts.values()) >= 40


def test_no_utterance_stands_twice() -> None:
    texts = Counter(plain(e.text) for examples in assistant()[0].values() for e in examples)
    assert [text for text, n in texts.items() if n > 1] == []


def test_labels_are_not_given_away_by_their_own_words() -> None:
    by_user, _ = assistant()
    examples = [example for own in by_user.values() for example in own]
    telling = [e for e in examples if set(plain(e.text).split()) & set(str(e.label).split("_")) - {"to"}]
    assert len(telling) / len(examples) < 0.3


def test_users_are_skewed_towards_few_intents() -> None:
    for examples in assistant()[0].values():
        top = Counter(e.label for e in examples).most_common(3)
        assert sum(n for _, n in top) >= 0.45 * len(examples)


def test_the_data_carry_their_licence() -> None:
    assert "CC0" in (files("fleet") / "assistant" / "LICENSE").read_text()


def test_the_demos_task_is_one_the_server_takes() -> None:
    assert parse_task(TASK.format(seed=0, rounds=3)).rounds.count == 3
