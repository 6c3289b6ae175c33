"""The frozen base: a transformers model and its tokenizer, from a directory or the Hugging Face hub."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn

try:  # transformers imports torchao where it is, which speaks of itself and of libraries for CUDA
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    logging.disable(logging.WARNING)
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoTokenizer,
        PretrainedConfig,
        PreTrainedModel,
    )
    from transformers.utils import logging as transformers_logging
    from transformers.utils.hub import cached_file
finally:
    logging.disable(logging.NOTSET)

from fedtt.errors import ConfigError
from fedtt.kinds import Target
from fedtt.manifest import Precision, Products

from .quantise import Stored, quantise
from .registry import Architecture, architecture_of
from .request import TaskKind

__all__ = ["Base", "attention_bias", "load_base"]

_HIDDEN = -1e4  #: added to scores of positions that must not be seen; e^-10000 is 0 in float32


@dataclass(frozen=True)
class Base:
    """A frozen model in evaluation mode, float32, with attention that can be traced."""

    name: str  #: the hub id, or the last part of the directory
    architecture: Architecture
    model: PreTrainedModel  #: the backbone, for causal-lm with its language-model head
    tokenizer: Tokenizer  #: neither cuts nor pads
    precision: Precision = "fp32"  #: in which its matrices are stored; the model holds them rounded to it
    stored: dict[str, Stored] = field(default_factory=dict)  #: by the names of its parameters
    products: Products = "fp32"  #: of the frozen matrices of its blocks

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def hidden(self) -> int:
        return int(self.config.hidden_size)

    @property
    def pad_id(self) -> int:
        """Padding is masked, so a model without a padding token may use any id."""
        return int(self.config.pad_token_id or 0)

    @property
    def first_position(self) -> int:
        return self.architecture.first_position(self.pad_id)

    @property
    def blocks(self) -> list[nn.Module]:
        backbone = self.model.base_model
        return list(cast("nn.ModuleList", backbone.get_submodule(self.architecture.blocks)))

    @property
    def projections(self) -> dict[Target, tuple[int, int]]:
        """(d_in, d_out) of each projection of a block's attention; all blocks are alike."""
        block, paths = self.blocks[-1], self.architecture.projections
        layers = {name: cast("nn.Linear", block.get_submodule(path)) for name, path in paths.items()}
        return {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}

    @property
    def longest(self) -> int:
        """The most tokens its positions and its attention window allow."""
        positions = int(self.config.max_position_embeddings) - self.first_position
        return min(positions, getattr(self.config, "sliding_window", None) or positions)

    def run(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, S) -> the last hidden state (B, S, H), for causal-lm the logits (B, S, V)."""
        decoder = {"use_cache": False} if self.architecture.is_decoder else {}
        output = self.model(
            input_ids=ids,
            attention_mask=attention_bias(mask, is_decoder=self.architecture.is_decoder),
            position_ids=torch.arange(ids.shape[1], device=ids.device)[None, :] + self.first_position,
            **decoder,
        )
        return cast("Tensor", output[0])

    @cached_property
    def sha256(self) -> str:
        """Over names and float32 bytes of all weights, as rounded, and how they are multiplied: equal bases
        give equal gradients.
        """
        digest = hashlib.sha256(b"" if self.products == "fp32" else f"products {self.products}\n".encode())
        for name, weight in sorted(self.model.named_parameters()):
            digest.update(f"{name} {tuple(weight.shape)}\n".encode())
            digest.update(weight.detach().numpy().tobytes())
        return digest.hexdigest()


def attention_bias(mask: Tensor, *, is_decoder: bool) -> Tensor:
    """mask (B, S), 1 for tokens -> what is added to the attention scores, (B, 1, S, S).

    Made here because the masks that transformers builds branch on the data and cannot be traced.
    """
    batch, length = mask.shape
    bias = ((1.0 - mask.to(torch.float32)) * _HIDDEN)[:, None, None, :].expand(batch, 1, length, length)
    if not is_decoder:
        return bias
    position = torch.arange(length, device=mask.device)
    future = (position[None, :] > position[:, None]).to(torch.float32) * _HIDDEN
    return bias + future[None, None]


def load_base(
    source: str, task: TaskKind, precision: Precision = "fp32", products: Products = "fp32"
) -> Base:
    """Load a base for one kind of task, its matrices rounded to a precision, for products in one.

    Raises ConfigError with what is wrong with `source`.
    """
    if not Path(source).is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ConfigError("model", source, "a model directory or a hub id; there is no such directory")
    with _quiet(), _explained(source):
        config = AutoConfig.from_pretrained(source)
        architecture = architecture_of(config.model_type, source)
        if task == "causal-lm" and not architecture.is_decoder:
            raise ConfigError("task", task, f"only with a decoder; {config.model_type} is an encoder")
        auto = AutoModelForCausalLM if task == "causal-lm" else AutoModel
        loaded: Any = auto.from_pretrained(
            source, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        tokenizer = _load_tokenizer(source)
    model, info = loaded
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith("pooler.")):
        raise ConfigError("model", source, f"weights for every layer; {missing[0]} and others are missing")
    if hasattr(model, "pooler"):
        model.pooler = None  # the graphs pool by themselves, and its weights may be untrained
    model.float().eval().requires_grad_(False)  # some activations keep numbers of their own in others
    name = Path(source).name if Path(source).is_dir() else source
    multiplied = set() if products == "fp32" else _matrices_of_blocks(model, architecture)
    return Base(
        name, architecture, model, tokenizer, precision, quantise(model, precision, multiplied), products
    )


def _matrices_of_blocks(model: PreTrainedModel, architecture: Architecture) -> set[str]:
    """The names of the weights of all linear layers in the blocks, the attention's and the MLP's."""
    blocks = set(model.base_model.get_submodule(architecture.blocks).modules())
    layers = ((name, module) for name, module in model.named_modules() if module in blocks)
    return {f"{name}.weight" for name, module in layers if isinstance(module, nn.Linear)}


def _load_tokenizer(source: str) -> Tokenizer:
    """`tokenizer.json` where there is one, else what transformers converts from older files."""
    path = cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    if path:
        tokenizer = Tokenizer.from_file(path)
    else:
        tokenizer = Tokenizer.from_str(AutoTokenizer.from_pretrained(source).backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own progress bars and load reports off the terminal."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turn what transformers raises for unusable sources into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            "model", source, f"config.json, weights and tokenizer must load ({reason})"
        ) from error
