"""A tiny causal language model: a real tokenizer, chat template and transformers layout.

Its answers mean nothing, but prompt, seed and settings all change them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

BEGIN, END, TURN_END = "<|begin|>", "<|end|>", "<|turn|>"
VOCABULARY: Final = 400
WIDTH: Final = 64
CHAT_TEMPLATE: Final = """\
{{- '<|begin|>' -}}
{%- if tools %}tools: {% for tool in tools %}{{ tool | tojson }} {% endfor %}<|turn|>{% endif -%}
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant', 'tool'] -%}
{{- raise_exception('unknown role') -}}
{%- endif -%}
{{- message.role + ': ' -}}
{%- if message.content %}{{ message.content }}{% endif -%}
{%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif -%}
{%- if message.tool_call_id %} ({{ message.tool_call_id }}){% endif -%}
{{- '<|turn|>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}assistant: {% endif -%}
"""
_CORPUS: Final = (
    "system user assistant tool: the a of to and in is what which how you we they say tell name",
    "a cat and a dog in the house by the river under the moon",
    "what is the name of the sea? tell me of the mountain, the forest and the lake.",
)


def make_language_model(folder: Path, seed: int) -> None:
    """Write the model into `folder`."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    torch.manual_seed(seed)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
        pad_token_id=None,
        **ids,
    )
    make: Any = LlamaForCausalLM
    settings: Any = GenerationConfig
    model = make(config)
    model.generation_config = settings(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The template on its own, as most models have it, is what other versions of the library read.
    written = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(written, indent=2, sort_keys=True))


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bytes_first = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained: Any = Tokenizer(models.BPE())
    trained.pre_tokenizer = bytes_first
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(_CORPUS, trainer)
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(
        tokenizer_object=trained, bos_token=BEGIN, eos_token=END, model_max_length=2048
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
