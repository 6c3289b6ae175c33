"""Living a bound of a federation: each device by itself, or all data in one place (`fleet.bound`)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from safetensors.numpy import save

from edge_client.inference import Evaluation
from edge_client.runtime import Scorer
from fedtt.layout import Theta
from fedtt.version_config import CONFIG, FACTORS, encode_config, version_config
from fedtt.wire import encode_theta
from fleet.bounds import trained_bound
from fleet.computed import Computed
from fleet.experiment import Experiment
from fleet.judging import VersionJudge
from fleet.pool import Pool
from fleet.run_files import Outcome, RunFiles, VersionLine
from storage.blobs import MemoryBlobs
from storage.blobs import save as save_blob

__all__ = ["Alone"]

Judged = Mapping[int, Evaluation]


class Alone:
    """A run without a server, which leaves the files of any run.

    Its two lines of versions are the start, and what came of the steps of as many rounds as the task has: of
    devices by themselves their mean, of which there is no version.
    """

    def __init__(
        self,
        experiment: Experiment,
        files: RunFiles,
        pool: Pool,
        computed: Computed,
        on_version: Callable[[VersionLine], None],
        judge: Scorer | None,
    ) -> None:
        self._experiment, self._files, self._pool, self._tell = experiment, files, pool, on_version
        self._blobs, self._began = MemoryBlobs(), time.monotonic()
        self._judge = VersionJudge(experiment, computed, self._blobs, judge)
        self._together = experiment.spec.fleet.bound == "centralised"
        by_shard = np.argsort(held := experiment.population.shard, kind="stable")
        ends = np.cumsum(np.bincount(held, minlength=len(experiment.shards)))
        self._devices = np.split(by_shard, ends[:-1])  #: of each shard

    def live(self, stopped: Callable[[], bool]) -> Outcome:
        """Train shard after shard; `stopped` is asked before each, for none is kept that has not ended.

        What was trained and judged before is taken from `computed`.
        """
        bundle, spec = self._experiment.bundle, self._experiment.spec
        count = 1 if self._together else len(self._devices)
        sha256 = save_blob(self._blobs, encode_theta(bundle.first_theta()))
        self._version(0, sha256, self._evaluated(sha256))
        trained = trained_bound(self._experiment, spec.fleet.bound or "local-only", self._pool)
        found, tested, own = list[Evaluation](), dict[int, Evaluation](), dict[int, Evaluation]()
        for shard in range(count):
            if stopped():
                return self._outcome("interrupted", "", None, 0)
            theta = next(trained)
            sha256 = save_blob(self._blobs, encode_theta(theta))
            found = self._evaluated(sha256)
            if not self._together:
                devices = self._devices[shard].tolist()
                tested |= {device: judged for device in devices for judged in found}
                drawn = self._judge.drawn.intersection(devices)
                own |= {device: self._judge.judge_own(sha256, device) for device in sorted(drawn)}
            self._blobs.delete(sha256)
        judged = found if self._together else list(tested.values())
        line = self._version(spec.task.rounds.count, sha256 if self._together else "", judged)
        if self._together:
            self._files.result(self._result(theta, sha256))
        how = "all rows lay in one place" if self._together else "each device trained by itself"
        outcome = self._outcome("finished", f"{how}, for {spec.steps_alone} steps", line, count)
        self._files.end(outcome, self._experiment.population, own, tested)
        return outcome

    def _evaluated(self, sha256: str) -> list[Evaluation]:
        return [self._judge.judge(sha256)] if self._experiment.evaluation is not None else []

    def _version(self, number: int, sha256: str, judged: Sequence[Evaluation]) -> VersionLine:
        accuracies = [found.accuracy for found in judged if found.accuracy is not None]
        spread = {"worst_device": min(accuracies), "best_device": max(accuracies)} if accuracies else {}
        line = VersionLine(
            version=number,
            round=None,
            sha256=sha256,
            virtual_s=0.0,
            wall_s=round(time.monotonic() - self._began, 3),
            updates=0,
            examples=0,
            staleness={},
            train_loss_first=None,
            train_loss_last=None,
            loss=statistics.fmean(found.loss for found in judged) if judged else None,
            accuracy=statistics.fmean(accuracies) if accuracies else None,
            sent_bytes=0,
            received_bytes=0,
            bundle_bytes=0,
            frame_bytes=0,
            outcomes={},
            participations=None,
            report={} if sha256 else spread,
        )
        self._files.version(line)
        self._tell(line)
        return line

    def _outcome(self, state: str, reason: str, line: VersionLine | None, shards: int) -> Outcome:
        spec = self._experiment.spec
        return Outcome(
            task=spec.task.name,
            state=state,
            reason=reason,
            versions=None if line else 0,
            sha256=line.sha256 or None if line else None,
            accuracy=line.accuracy if line else None,
            loss=line.loss if line else None,
            virtual_s=0.0,
            wall_s=round(time.monotonic() - self._began, 3),
            devices=self._experiment.population.size,
            took_part=0,
            left_out={},
            outcomes={},
            steps=shards * spec.steps_alone,
            sent_bytes=0,
            received_bytes=0,
            bundle_bytes=0,
            frame_bytes=0,
            directory=str(self._files.directory),
        )

    def _result(self, theta: Theta, sha256: str) -> dict[str, bytes]:
        """As `fedtt version download` has it."""
        bundle, task = self._experiment.bundle, self._experiment.spec.task
        config = version_config(bundle.manifest, bundle.digest, task.name, task.rounds.count, sha256)
        factors = save(bundle.manifest.adapter.layout.unflatten(theta), metadata={"format": "fedtt"})
        return {CONFIG: encode_config(config), FACTORS: factors}
