"""A downloaded version back as a torch model: `model, tokenizer = load_version("version", "base")`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from fedtt.errors import BundleError, WireError
from fedtt.factor_file import decode_factors
from fedtt.layout import Theta
from fedtt.version_config import CONFIG, FACTORS, VersionConfig, decode_config
from fedtt.wire import decode_theta, encode_theta

from .base import load_base
from .step import AdaptedModel

__all__ = ["FineTunedClassifier", "load_version"]

_REMEDY = "download the version again"


class FineTunedClassifier(nn.Module):
    """A classifier at one version's factors, which are an ordinary parameter and may be trained on."""

    def __init__(self, model: AdaptedModel, theta: Theta, labels: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.theta = nn.Parameter(torch.from_numpy(theta))  #: (P,)
        self.config = model.base.config
        self.config.id2label = dict(enumerate(labels))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object
    ) -> SequenceClassifierOutput:
        """ids and mask (B, S) -> an output whose `logits` are (B, C); takes all that a tokenizer returns."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return SequenceClassifierOutput(logits=self.model(self.theta, input_ids, mask))


def load_version(
    directory: str | Path, base: str | None = None
) -> tuple[FineTunedClassifier | PreTrainedModel, PreTrainedTokenizerBase]:
    """The fine-tuned model of a version directory, and its tokenizer.

    base: the model it was exported from, a directory or hub id; by default the name in the config.
    A causal-lm comes back as the transformers model itself, adapters inserted, so `generate` works.
    Raises BundleError for a damaged directory or another base, LayoutError for other factors.
    """
    directory = Path(directory)
    config = _read_config(directory)
    theta = _read_theta(directory / FACTORS, config)
    source = base or config.model.name
    loaded = load_base(source, config.task, config.model.precision, config.model.products)
    if loaded.sha256 != config.model.base_sha256:
        raise BundleError(
            f"{directory} was trained on other weights than {source} holds; "
            f"give the model {config.model.name!r} that its bundle was exported from"
        )
    model = AdaptedModel(loaded, config.adapter, config.labels)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if config.task == "causal-lm":
        model.adapters.hold(torch.from_numpy(theta)[: model.adapters.size])
        return loaded.model, tokenizer
    return FineTunedClassifier(model, theta, config.labels).eval(), tokenizer


def _read_config(directory: Path) -> VersionConfig:
    try:
        return decode_config((directory / CONFIG).read_bytes(), str(directory / CONFIG))
    except OSError as error:
        raise BundleError(
            f"{directory} is not a version: {CONFIG} cannot be read ({error.strerror})"
        ) from None


def _read_theta(path: Path, config: VersionConfig) -> Theta:
    layout = config.adapter.layout
    try:
        theta = decode_factors(path.read_bytes(), layout, str(path), _REMEDY)
        return decode_theta(encode_theta(theta), layout, config.version_sha256)
    except (OSError, WireError) as error:
        raise BundleError(f"{path} cannot be used: {error}; {_REMEDY}") from None
