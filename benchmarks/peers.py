"""Our fleet beside the simulations of Flower and pfl-research: the same job, on the same machine, in one run.

What is compared
  noop          devices that train nothing and send 1,000 numbers; everyone takes part in every round
  depth-6, -2   MiniLM-L6 with TT adapters in its last 6 (all) or 2 blocks, CLINC150 on 100 devices with
                Dirichlet(0.5) skew, 10 devices a round, 10 local steps of 16 with AdamW, FedAvg

How it is kept fair
  - The rate is device-rounds a second from the end of the first round, which starts actors and loads
    models, to the end of the last. Nobody evaluates in between.
  - Real training is the same arithmetic for all: our torch module with our adapters and first factors, the
    same tokens, shards and batch sizes. Batches and cohorts are drawn by each program's own generator, so
    the curves differ by noise alone; all final factors are judged by one evaluator (`..._accuracy`).
  - Peers get their tokens ready-made, batches padded to their longest text alone, PyTorch's fused attention,
    blocks called without the wrappers around them, and models that stay loaded. Ours tokenises as it goes.
  - Each peer runs once with as many processes of one thread as there are cores and once as one process of
    as many threads, for a few rounds; the better one is measured.
  - At depth 2 peers run twice: with the frozen blocks computed without gradients in every step, as a user of
    torch would have it ("frozen"), and with their output kept for each row in memory and on disk, which
    takes a user some code of his own ("cached"). Late figures are of the last third of the rounds, when
    most of what is cached has been met before; everybody's cache is empty when the first round begins.
  - `ours_int8` beside it is the same job with the frozen matrices multiplied in int8, as devices train that
    were given such a bundle (`fedtt export --base int8 --products int8`): other arithmetic, so other ratios.
  - Without training pfl-research serialises nothing and sends no messages; devices are iterations of a loop
    over one model. Beside our in-process transport with typed messages (`ours`) there is therefore the one
    where each becomes bytes and is read again (`ours_framed`), which is nearer to what Flower does. Here pfl
    and ours have one process each, Flower an actor on every core.

Peers live in environments of their own (.bench/peers), made on the first run in a few minutes. Whoever takes
longer than a limit, or fails, is said to and left out. What was cut short goes on with `--resume`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from statistics import fmean, median
from typing import Any

import numpy as np

from benchmarks.federated import WORK
from benchmarks.harness import Report, arguments, machine, reporting
from benchmarks.peer.environments import Missing, main_pin
from benchmarks.peer.job import Answer, Job, PrefixKind
from benchmarks.peer.kept import KeptAnswers
from benchmarks.peer.preparation import LAYERS, RealJob
from benchmarks.peer.programs import Failed, Program, start

PEERS = ("flower", "pfl")
MEASURES = ("noop", f"depth-{LAYERS}", "depth-2")
MOST_SPREAD = 0.03  #: of accuracies that drawn batches and cohorts explain after ten rounds
QUICK = ("noop", "depth-2")
Figures = dict[str, Any]


class Bench:
    """One run of this benchmark."""

    def __init__(
        self, report: Report, kept: KeptAnswers, peers: Iterable[str], args: argparse.Namespace
    ) -> None:
        self._report, self._kept, self._limit_s = report, kept, args.limit_s
        self._quick, self._repeats, self._seed = args.quick, args.repeats, args.seed
        self._peers = [peer for peer in peers if self._can(peer)]
        self._cores: int = machine()["cores"]

    def noop(self, devices: int) -> Figures:
        """Rates of the bare machinery, after the ratios."""
        rounds = {"ours": 20_000, "ours-framed": 20_000, "pfl": 20_000, "flower": 2_000}
        rates: dict[str, float] = {}
        for name in ("ours", "ours-framed", *self._peers):
            program = Program.peer(name) if name in PEERS else Program.ours(name)
            processes = self._cores if name == "flower" else 1
            count = max(2, rounds[name] // devices // (10 if self._quick else 1))
            job = self._job(devices, devices, count, processes, 1)
            found = [
                rate for turn in range(self._repeats) if (rate := self._rate("noop", program, job, turn=turn))
            ]
            if found:
                rates[name] = median(found)
        return self._against_ours(f"noop_{devices}", rates)

    def training(self, depth: int, rounds: int, trainer: str) -> Figures:
        """Rates of real training at one depth, after the ratios; and what came of it."""
        steps, cohort = (2, 2) if self._quick else (10, 10)
        rows = 150 if self._quick else 1500
        real = RealJob(depth=depth, trainer=trainer, local_steps=steps, test_rows=rows)
        whole = depth == LAYERS
        rates: dict[str, float] = {}
        late: dict[str, float] = {}
        outcomes: Figures = {}
        for name, program in self._programs(whole=whole).items():
            make = self._best(program, real, cohort)
            if make is None:
                continue
            answers = [
                self._run(f"depth-{depth}", program, make(rounds), real, turn)
                for turn in range(self._repeats)
            ]
            if done := [answer for answer in answers if answer]:
                rates[name] = median(answer.updates / answer.wall_s for answer in done)
                late[name] = median(answer.late_updates / answer.late_wall_s for answer in done)
                outcomes |= self._outcome(f"depth_{depth}_{name}", done[-1], real)
        figures = self._against_ours(f"depth_{depth}", rates)
        if not whole:
            figures |= self._against_ours(f"depth_{depth}_late", late)
        return figures | outcomes | self._spread(f"depth_{depth}", outcomes)

    def _programs(self, *, whole: bool) -> dict[str, Program]:
        programs = {"ours": Program.ours()}
        if not self._quick:
            programs["ours-int8"] = Program.ours("ours-int8")
        prefixes: tuple[PrefixKind, ...] = ("cached",) if self._quick else ("frozen", "cached")
        for peer in self._peers:
            if whole:
                programs[peer] = Program.peer(peer)
            else:
                programs |= {f"{peer}-{prefix}": Program.peer(peer, prefix) for prefix in prefixes}
        return programs

    def _best(self, program: Program, real: RealJob, cohort: int) -> Callable[[int], Job] | None:
        """How many processes and threads a peer is fastest with, as jobs of so many rounds."""
        ways = list(dict.fromkeys([(self._cores, 1), (1, self._cores)]))
        if program.is_ours:
            ways = ways[-1:]
        elif self._quick:
            ways = ways[:1]
        tried: dict[tuple[int, int], float] = {}
        if len(ways) > 1:
            for way in ways:
                job = self._job(100, cohort, 2, *way)
                if rate := self._rate(f"depth-{real.depth} tried", program, job, real):
                    tried[way] = rate
            if not tried:
                return None
        best = max(tried, key=tried.__getitem__) if tried else ways[0]
        return lambda rounds: self._job(100, cohort, rounds, *best)

    def _outcome(self, name: str, answer: Answer, real: RealJob) -> Figures:
        """Judged with ours; training losses are of the last third of the rounds."""
        if answer.theta is None:
            return {}
        judged = real.judge(np.load(answer.theta), threads=self._cores)
        late = answer.losses[-max(1, len(answer.losses) // 3) :]
        found = {
            "accuracy": round(judged.accuracy or 0.0, 4),
            "test_loss": round(judged.loss, 4),
            "training_loss": round(fmean(late), 4),
        }
        self._report.line(program=name, **found)
        return {f"{name}_{key}".replace("-", "_"): value for key, value in found.items()}

    def _spread(self, what: str, outcomes: Figures) -> Figures:
        """The largest accuracy less the smallest: noise, if all did the same job."""
        found = [value for name, value in outcomes.items() if name.endswith("_accuracy")]
        spread = round(max(found) - min(found), 4) if found else 0.0
        if spread > MOST_SPREAD and not self._quick:
            print(f"BEWARE: at {what} accuracies differ by {spread}; was it the same job?", file=sys.stderr)
        return {f"{what}_accuracy_spread": spread}

    def _against_ours(self, what: str, rates: dict[str, float]) -> Figures:
        ratios = {
            f"{what}_{ours}_over_{name}".replace("-", "_"): round(rates[ours] / rate, 2)
            for ours in ("ours", "ours-int8")
            for name, rate in rates.items()
            if ours in rates and not name.startswith("ours")
        }
        own = {
            f"{what}_{name}_device_rounds_per_s".replace("-", "_"): round(rate, 3)
            for name, rate in rates.items()
        }
        return ratios | own

    def _rate(
        self, measure: str, program: Program, job: Job, real: RealJob | None = None, turn: int = 0
    ) -> float | None:
        answer = self._run(measure, program, job, real, turn)
        return answer.updates / answer.wall_s if answer else None

    def _run(
        self, measure: str, program: Program, job: Job, real: RealJob | None, turn: int
    ) -> Answer | None:
        """None, said loudly, where the program fails."""
        asked = measure, program, job, real, turn
        known = self._kept.find(*asked)
        try:
            answer = known or self._kept.keep(start(program, job, real, limit_s=self._limit_s), *asked)
        except Failed as error:
            print(f"FAILED: {error}", file=sys.stderr)
            self._report.line(measure=measure, program=program.name, failed=str(error).splitlines()[0])
            return None
        self._report.line(
            measure=measure,
            program=program.name,
            prefix=program.prefix,
            resumed=known is not None,
            devices=job.devices,
            processes=job.processes,
            threads=job.threads,
            rounds=job.rounds,
            wall_s=round(answer.wall_s, 3),
            device_rounds_per_s=round(answer.updates / answer.wall_s, 3),
            late_device_rounds_per_s=round(answer.late_updates / answer.late_wall_s, 3),
            training_losses=[round(loss, 4) for loss in answer.losses],
        )
        return answer

    def _job(self, devices: int, cohort: int, rounds: int, processes: int, threads: int) -> Job:
        return Job(
            devices=devices,
            cohort=cohort,
            rounds=rounds,
            seed=self._seed,
            processes=processes,
            threads=threads,
            scratch=WORK,
        )

    def _can(self, peer: str) -> bool:
        try:
            Program.peer(peer)
        except Missing as error:
            print(f"SKIPPED: {error}", file=sys.stderr)
            self._report.line(peer=peer, skipped=str(error))
            return False
        return True


def main() -> None:
    parser = arguments("peers", "Our fleet beside Flower's and pfl-research's simulations.")
    names = (*PEERS, *MEASURES)
    parser.add_argument("--only", action="append", choices=names, help="one peer or measure; may be repeated")
    parser.add_argument("--repeats", type=int, default=1, help="of every run; medians are reported")
    parser.add_argument("--rounds", type=int, help="of real training (10 at full depth, 30 at depth 2)")
    parser.add_argument("--trainer", default="batched", help="of our fleet in real training")
    parser.add_argument("--limit-s", type=float, default=1800.0, help="of one run, which fails after it")
    parser.add_argument("--resume", action="store_true", help="take what an earlier start has finished")
    args = parser.parse_args()
    only: list[str] = args.only or []
    peers = [name for name in PEERS if name in only] or PEERS
    measures = [name for name in MEASURES if name in only] or (QUICK if args.quick else MEASURES)
    figures: Figures = {}
    with reporting("peers", args.out) as report:
        bench = Bench(report, KeptAnswers(WORK / "peers" / "kept", resume=args.resume), peers, args)
        if "noop" in measures:
            for devices in (100,) if args.quick else (100, 1000):
                figures |= bench.noop(devices)
        for depth, rounds in ((LAYERS, 10), (2, 30)):
            if f"depth-{depth}" in measures:
                rounds = args.rounds or (2 if args.quick else rounds)
                figures |= bench.training(depth, rounds, args.trainer)
        report.summary(
            figures,
            {
                "depth_6_ours_over_flower": "at least 2",
                "depth_2_ours_over_flower_cached": "at least 5",
                "training": "10 local steps of 16 texts, 10 devices a round",
                "peers": {peer: main_pin(peer) for peer in PEERS},
            },
        )


if __name__ == "__main__":
    main()
