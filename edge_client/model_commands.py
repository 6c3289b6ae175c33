"""What `fedtt predict` and `fedtt evaluate` do."""

from __future__ import annotations

from argparse import Namespace

from edge_client.example_files import read_examples
from edge_client.inference import Model
from fedtt.cli import print_json

__all__ = ["evaluate", "predict"]

_SHOWN = 3  #: labels shown to a person


def predict(args: Namespace) -> None:
    """Label each text, or continue it where the model is a language model."""
    model = Model.open(args.version, args.bundle, threads=args.threads)
    if not model.manifest.labels:
        for text in args.texts:
            found = model.continuation(text)
            print_json({"text": text, "continuation": found}) if args.json else print(found)
        return
    for prediction in model.predict(args.texts):
        if args.json:
            print_json(prediction)
            continue
        best = sorted(prediction.probabilities.items(), key=lambda item: -item[1])[:_SHOWN]
        print(f"{prediction.text}: " + ", ".join(f"{label} {p:.1%}" for label, p in best))


def evaluate(args: Namespace) -> None:
    """Loss and accuracy on the rows of a file."""
    examples = read_examples(args.file)
    found = Model.open(args.version, args.bundle, threads=args.threads).evaluate(examples)
    if args.json:
        print_json(found)
        return
    accuracy = "" if found.accuracy is None else f"accuracy {found.accuracy:.1%}, "
    print(f"{accuracy}loss {found.loss:.4f} on {found.examples} examples")
