"""Small stock checkpoints with all that lies beside a model, made here, and the variants that they convert to."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_variants.conversion import convert


TEXT = "The quick brown fox jumps over the lazy dog, hello world. " * 4
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
SMALL = {"vocab_size": 280, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}

MAKERS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, **SMALL,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **SMALL)),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64, decoder_start_token_id=1,
            forced_eos_token_id=1, **SMALL,
        )
    ),
    "bert": lambda: BertForMaskedLM(
        BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=64, vocab_size=280, pad_token_id=1,
        )
    ),
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=280,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
    )


def make(root: Path) -> dict[str, dict[str, Path]]:
    """Folders by the kind of checkpoint, `"native"` or `"variant"`, and model type."""
    folders: dict[str, dict[str, Path]] = {"native": {}, "variant": {}}
    for number, (name, maker) in enumerate(MAKERS.items()):
        torch.manual_seed(number)
        native = root / "native" / name
        maker().eval().save_pretrained(native)
        tokenizer().save_pretrained(native)
        (native / "LICENSE").write_text("Do as you like.\n")
        variant = root / "variant" / name
        convert(native, variant)
        folders["native"][name], folders["variant"][name] = native, variant
    return folders


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
