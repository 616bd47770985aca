"""A tiny model with a tokenizer, for tests in which many processes start and many tokens flow."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.router_support import EOS_ID, write_tiny_tokenizer

#: Long enough for streams that a test ends before they end themselves.
MAX_MODEL_LEN = 8192
#: What a worker needs for it, and some hundred KV blocks.
WORKER_MEMORY = "24MiB"


def write_tiny_model(directory: Path) -> Path:
    """A random llama over bytes; its output does not fall into a loop, greedy or not."""
    write_tiny_tokenizer(directory)
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=EOS_ID + 1,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_MODEL_LEN,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 3.0
    model.save_pretrained(directory)
    return directory
