"""The kinds of variant on which every tool is run, small, with weights that hide nothing, and a tokenizer for them."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_variants import (
    VariantConfig,
    VariantForCausalLM,
    VariantForConditionalGeneration,
    VariantForMaskedLM,
    VariantSeq2SeqConfig,
)


VOCABULARY = 96
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, **SPECIAL,
}  # fmt: skip

DECODERS = ("llama", "gemma2", "gpt-neox")
KINDS = (*DECODERS, "seq2seq", "encoder")
# Further shapes for what depends on how layers are cut across devices.
SHARDED_KINDS = (*KINDS, "multi-query")


def config(kind: str, **fields):
    """The config of a kind; `fields` replace its own, in both stacks of an encoder-decoder."""
    if kind == "llama":
        return VariantConfig.from_preset("llama", **{**SIZES, "num_key_value_heads": 2, **fields})
    if kind == "gemma2":
        return VariantConfig.from_preset(
            "gemma2", **{**SIZES, "num_key_value_heads": 2, "sliding_window": 8, **fields}
        )
    if kind == "gpt-neox":
        return VariantConfig.from_preset("gpt-neox", **{**SIZES, **fields})
    if kind == "multi-query":
        return VariantConfig.from_preset("palm", **{**SIZES, **fields})
    if kind == "encoder":
        return VariantConfig(
            **{
                **SIZES, "is_causal": False, "norm_type": "layernorm", "norm_placement": "post", "ffn_type": "mlp",
                "hidden_act": "gelu", "attention_bias": True, "mlp_bias": True, "position_embedding_type": "learned",
                "type_vocab_size": 2, "tie_word_embeddings": True, **fields,
            }
        )  # fmt: skip
    if kind == "seq2seq":
        # transformers' Seq2SeqTrainer and PEFT meet both stacks through the same names.
        ties = {name: fields.pop(name) for name in ("share_embeddings", "tie_word_embeddings") if name in fields}
        encoder, decoder = (VariantConfig.from_preset("vanilla", **{**SIZES, **fields}).to_dict() for _ in range(2))
        return VariantSeq2SeqConfig(encoder=encoder, decoder=decoder, decoder_start_token_id=1, **ties)
    raise KeyError(kind)


MODEL_CLASSES = {
    **dict.fromkeys((*DECODERS, "multi-query"), VariantForCausalLM),
    "seq2seq": VariantForConditionalGeneration,
    "encoder": VariantForMaskedLM,
}
# The name of the task in PEFT, where it has one: an encoder's masked-LM head is wrapped without.
TASK_TYPES = {**dict.fromkeys((*DECODERS, "multi-query"), "CAUSAL_LM"), "seq2seq": "SEQ_2_SEQ_LM", "encoder": None}


def model(kind: str, model_class=None, seed: int = 0, **fields):
    """A model of this kind in eval mode, each parameter moved far from where initialisation leaves it."""
    torch.manual_seed(seed)
    built = (model_class or MODEL_CLASSES[kind])(config(kind, **fields)).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return built


def batch(kind: str, rows: int = 2, length: int = 12, seed: int = 3) -> dict[str, torch.Tensor]:
    """Token ids with labels, no padding; of an encoder-decoder the target is shorter than the source."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels = torch.randint(3, VOCABULARY, (rows, length - 3), generator=generator) if kind == "seq2seq" else ids
    return {"input_ids": ids, "labels": labels.clone()}


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' : ' + message['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)
WORDS = [
    "user", "assistant", "system", ":", ".", ",", "?", "the", "a", "one", "two", "three", "four", "five", "cat", "dog",
    "bird", "sees", "hears", "likes", "asks", "answers", "and", "or", "not", "red", "blue", "green", "big", "small",
    "old", "new", "here", "there", "now", "then", "who", "what", "where", "why", "how", "yes", "no", "good", "bad",
]  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """Words of a small English vocabulary, with padding, a mask and a chat template."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<mask>"]
    words = special + WORDS
    words += [f"w{index}" for index in range(VOCABULARY - len(words))]
    fast = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        mask_token="<mask>", model_max_length=SIZES["max_position_embeddings"],
    )  # fmt: skip
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
