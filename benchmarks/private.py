"""What differential privacy by example costs in accuracy: that of `benchmarks.products`, trained by DP-SGD.

One bundle with the step that clips each example's gradient (`fedtt export --dp`), one seed. ε counts all that
a device sends in the run: it is that of a device with as many examples as they have on average and as many
trainings as they had on average, rounded up, δ being 1e-5; who has fewer examples spends more. Ten updates a
round are few for noise that each device adds by itself: that of a version falls with their number.
"""

from __future__ import annotations

import math

from benchmarks.claims.data import prepared
from benchmarks.harness import arguments, reporting
from benchmarks.products import bundle_of, say, trained
from fedtt.privacy import PrivacySpec, epsilon_of

_CLIP = 0.5
_NOISE = (0.0, 0.3, 1.0)  #: multipliers; 0 trains without [privacy], by the same bundle
_LOCAL_STEPS, _BATCH, _COHORT, _DEVICES = 8, 16, 10, 100


def main() -> None:
    parser = arguments("private", "accuracy of a federation with differential privacy, by noise")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds
    data = prepared("clinc150", judged_rows=100 if args.quick else 1500)
    bundle = bundle_of("private", ("--dp",), data)
    rows = len(data.train.read_text().splitlines())
    figures: dict[str, float] = {}
    with reporting("private", args.out) as report:
        for noise in _NOISE:
            parts: dict[str, object] = {}
            if noise:
                parts["privacy"] = {"clip": _CLIP, "noise_multiplier": noise}
            lines = trained(bundle, data, rounds, args.seed, f"private-{noise}", task_parts=parts)
            say(report, lines, noise_multiplier=noise)
            name = f"noise_{noise:g}".replace(".", "_")
            figures |= {
                f"accuracy_{name}": lines[-1].accuracy or 0.0,
                f"loss_{name}": lines[-1].loss or 0.0,
            }
            if noise:
                figures[f"epsilon_{name}"] = round(_epsilon(noise, rounds, rows), 2)
        report.summary(figures, {"accuracy_noise_0_3": "accuracy_noise_0, in the same run"})


def _epsilon(noise: float, rounds: int, rows: int) -> float:
    """By all the trainings of an average device."""
    privacy = PrivacySpec(clip=_CLIP, noise_multiplier=noise)
    trainings = math.ceil(rounds * _COHORT / _DEVICES)
    return epsilon_of(trainings * privacy.spent(rows // _DEVICES, _BATCH, _LOCAL_STEPS), privacy.delta)


if __name__ == "__main__":
    main()
