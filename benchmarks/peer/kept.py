"""Answers of runs that have finished, kept so that a benchmark that was cut short can go on."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import msgspec

from benchmarks.peer.job import Answer, read_answer, write

__all__ = ["KeptAnswers"]


class KeptAnswers:
    """A directory of answers with their factors, by what was asked; emptied first unless resumed."""

    def __init__(self, directory: Path, *, resume: bool) -> None:
        self._directory = directory
        if not resume:
            shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)

    def find(self, *asked: object) -> Answer | None:
        path = self._path(asked)
        return read_answer(path) if path.is_file() else None

    def keep(self, answer: Answer, *asked: object) -> Answer:
        """The answer, with its factors where the next run does not delete them."""
        path = self._path(asked)
        if answer.theta is not None:
            theta = path.with_suffix(".npy")
            shutil.copy(answer.theta, theta)
            answer = msgspec.structs.replace(answer, theta=theta)
        write(path, answer)
        return answer

    def _path(self, asked: tuple[object, ...]) -> Path:
        return self._directory / f"{hashlib.sha256(repr(asked).encode()).hexdigest()[:24]}.json"
