"""How good versions are: on the evaluation data while they appear, and the last one on devices' own data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from edge_client.examples import Example
from edge_client.inference import Evaluation, Model
from edge_client.onnx_runtime import OnnxRuntime
from edge_client.runtime import Scorer
from fedtt.rng import Purpose, rng_for
from fedtt.wire import decode_theta
from fleet.computed import Computed
from fleet.experiment import Experiment
from storage.blobs import MemoryBlobs, load

__all__ = ["VersionJudge"]


class VersionJudge:
    """Judges what `computed` does not hold yet; the model is loaded when it is needed.

    blobs: where versions lie, by their sha256. runtime: None for ONNX Runtime.
    """

    def __init__(
        self,
        experiment: Experiment,
        computed: Computed,
        blobs: MemoryBlobs,
        runtime: Scorer | None = None,
    ) -> None:
        self._experiment, self._computed, self._blobs = experiment, computed, blobs
        self._runtime = runtime
        self._model: tuple[str, Model] | None = None
        self.drawn = _drawn(experiment)  #: the devices that are judged on their own examples

    def judge(self, version: str) -> Evaluation:
        """On the evaluation data."""
        return self._judged(version, version, lambda: self._experiment.evaluation or ())

    def judge_devices(self, version: str, stopped: Callable[[], bool]) -> dict[int, Evaluation]:
        """On some of the own examples of some devices, both drawn: a partition may have sorted them.

        Nothing where the experiment has no evaluation. What several devices share is judged once. Ends
        early once `stopped` says so.
        """
        found: dict[int, Evaluation] = {}
        for index in sorted(self.drawn):
            if stopped():
                break
            found[index] = self.judge_own(version, index)
        return found

    def judge_own(self, version: str, index: int) -> Evaluation:
        """On some of a device's own examples."""
        evaluation, shard = self._experiment.spec.evaluation, int(self._experiment.population.shard[index])
        most = evaluation and evaluation.per_device_examples
        return self._judged(f"{version}/{shard}/{most}", version, partial(self._own, shard))

    def _own(self, number: int) -> list[Example]:
        """Examples of a shard, as many as are wanted."""
        spec, shard = self._experiment.spec, self._experiment.shards[number]
        wanted = spec.evaluation.per_device_examples if spec.evaluation else 0
        rows = rng_for(spec.fleet.seed, Purpose.JUDGED, 1, number).permutation(shard.count())[:wanted]
        examples = shard.read()
        return [examples[row] for row in sorted(rows.tolist())]

    def _judged(self, key: str, version: str, examples: Callable[[], Sequence[Example]]) -> Evaluation:
        found = self._computed.judged(key)
        if found is None:
            found = self._opened(version).evaluate(examples())
            self._computed.keep_judged(key, found)
        return found

    def _opened(self, version: str) -> Model:
        if self._model is None or self._model[0] != version:
            bundle = self._experiment.bundle
            if self._runtime is None:
                self._runtime = OnnxRuntime(bundle, threads=self._experiment.spec.fleet.threads)
            theta = decode_theta(load(self._blobs, version), bundle.manifest.adapter.layout, version)
            self._model = version, Model(bundle, theta, self._runtime)
        return self._model[1]


def _drawn(experiment: Experiment) -> frozenset[int]:
    evaluation, population = experiment.spec.evaluation, experiment.population
    if evaluation is None or not evaluation.per_device:
        return frozenset()
    order = rng_for(population.seed, Purpose.JUDGED).permutation(population.size)
    return frozenset(order[: evaluation.per_device].tolist())
