"""Tiny language models with random weights, saved as ordinary Hugging Face folders; each is made once a process."""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

WORDS = [
    *("the", "cat", "dog", "sun", "moon", "king", "queen", "river", "stone", "sings", "sleeps", "runs"),
    *("and", "under", "over", "a", "red", "blue", "old", "new", ".", ","),
]  # numbered from 4


def _tokenizer(words=WORDS):
    """One token a word; <bos> first where the tokenizer is asked for special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def _save(model_class, config, tokenizer=None, change=lambda model: None) -> Path:
    import torch

    folder = Path(tempfile.mkdtemp(prefix="tiny-model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        for parameter in model.parameters():  # with the default of 0.02 all activations look alike
            torch.nn.init.normal_(parameter, std=0.2)
        change(model)
        model.save_pretrained(folder)
    (tokenizer or _tokenizer()).save_pretrained(folder)
    return folder


@functools.cache
def tiny_gpt2() -> Path:
    """Folder of a GPT-2 with 3 layers, d_model 12, 2 heads and a context of 16."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=4 + len(WORDS), n_positions=16, n_embd=12, n_layer=3, n_head=2, n_inner=20,
        bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return _save(GPT2LMHeadModel, config)


@functools.cache
def tiny_gemma2() -> Path:
    """Folder of a Gemma 2 with 2 layers, d_model 16, 4 heads that share 2 keys, and a context of 32."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=4 + len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, query_pre_attn_scalar=4, max_position_embeddings=32, sliding_window=8,
        bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return _save(Gemma2ForCausalLM, config)


LETTERS = "klmn"
SPELLED = [letter + a + b for letter in LETTERS for a in "aeiou" for b in "bcdfgh"]  # 30 words of each letter


@functools.cache
def spellers() -> tuple[Path, Path]:
    """Folders of a Gemma 2 and a GPT-2 with 3 layers, d_model 32 and a context of 128, whose words, but for random
    weights, hold their first letter: its direction is a part of their embeddings."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

    others = ["has", "the", "first", "letter", ":", ".", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    tokenizer, known = _tokenizer([*others, *SPELLED]), 4 + len(others)
    sizes = {"vocab_size": known + len(SPELLED), "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    gemma = Gemma2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, query_pre_attn_scalar=8, max_position_embeddings=128, sliding_window=64, **sizes,
    )  # fmt: skip
    gpt2 = GPT2Config(n_positions=128, n_embd=32, n_layer=3, n_head=4, n_inner=48, **sizes)

    def spell(model) -> None:
        rows = model.get_input_embeddings().weight.data[known:]
        rows += 2 * torch.eye(32)[[LETTERS.index(word[0]) for word in SPELLED]]

    return _save(Gemma2ForCausalLM, gemma, tokenizer, spell), _save(GPT2LMHeadModel, gpt2, tokenizer, spell)
