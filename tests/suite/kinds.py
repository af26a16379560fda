"""One config per kind of variant for transformers' testers, and what these ask of a model's tester."""

import torch

from hf_variants import (
    VariantConfig,
    VariantForCausalLM,
    VariantForConditionalGeneration,
    VariantForMaskedLM,
    VariantForMultipleChoice,
    VariantForNextSentencePrediction,
    VariantForQuestionAnswering,
    VariantForSequenceClassification,
    VariantForTokenClassification,
    VariantModel,
    VariantSeq2SeqConfig,
    VariantSeq2SeqModel,
)


SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LAYERNORM = {
    "norm_type": "layernorm",
    "ffn_type": "mlp",
    "hidden_act": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
}

DECODERS = {
    "llama": {"num_key_value_heads": 2},
    "learned": {**LAYERNORM, "norm_placement": "post", "position_embedding_type": "learned", "tie_word_embeddings": True},
    "parallel": {**LAYERNORM, "parallel_block": "shared_norm", "rope_interleaved": True},
    "sandwich": {"norm_placement": "sandwich", "layer_types": "SF", "sliding_window": 16, "num_key_value_heads": 2,
                 "norm_unit_offset": True, "embedding_multiplier": 5.0, "qk_norm": "head"},
    "deepnorm": {"norm_placement": "deepnorm", "norm_type": "layernorm", "position_embedding_type": "sinusoidal"},
    "alibi": {**LAYERNORM, "position_embedding_type": "alibi", "embedding_norm": True},
}  # fmt: skip
ENCODERS = {
    "bert": {**LAYERNORM, "norm_placement": "post", "position_embedding_type": "learned", "type_vocab_size": 2,
             "embedding_norm": True, "lm_head_transform": True, "lm_head_bias": True, "tie_word_embeddings": True},
    "modernbert": {"layer_types": "SF", "sliding_window": 16, "norm_type": "layernorm", "first_layer_pre_norm": False},
}  # fmt: skip
SEQ2SEQ = {
    "bart": {**LAYERNORM, "norm_placement": "post", "position_embedding_type": "learned", "embedding_norm": True},
    "t5": {"position_embedding_type": "relative_bias"},
}
# Those that make decoder inputs of the source, as BART does.
FROM_SOURCE = ("bart",)

HEADS = (
    VariantForSequenceClassification, VariantForMultipleChoice, VariantForNextSentencePrediction,
    VariantForTokenClassification, VariantForQuestionAnswering,
)  # fmt: skip


class ModelTester:
    """
    Args:
        parent: the test case.
        kind: a key of one of the tables above.
    """

    batch_size = 3
    seq_length = 9
    encoder_seq_length = decoder_seq_length = key_length = 9
    is_training = True
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    num_choices = 3
    causal_lm_class = None
    conditional_generation_class = None
    sequence_classification_class = None

    def __init__(self, parent, kind: str):
        self.parent = parent
        self.kind = kind
        self.is_encoder_decoder = kind in SEQ2SEQ
        if kind in DECODERS:
            self.causal_lm_class = VariantForCausalLM
        elif kind in SEQ2SEQ:
            self.conditional_generation_class = VariantForConditionalGeneration
        else:
            self.sequence_classification_class = VariantForMaskedLM

    @property
    def all_model_classes(self) -> tuple[type, ...]:
        if self.kind in SEQ2SEQ:
            return (VariantSeq2SeqModel, VariantForConditionalGeneration)
        return (VariantModel, VariantForCausalLM if self.kind in DECODERS else VariantForMaskedLM, *HEADS)

    def get_config(self) -> VariantConfig | VariantSeq2SeqConfig:
        if self.kind in SEQ2SEQ:
            stack = {**SIZES, **SEQ2SEQ[self.kind]}
            whole = {"decoder_start_token_id": 1, "decoder_inputs_from_source": self.kind in FROM_SOURCE}
            return VariantSeq2SeqConfig(encoder=stack, decoder=stack, pad_token_id=0, eos_token_id=2, **whole)
        if self.kind in DECODERS:
            return VariantConfig(**{**SIZES, **DECODERS[self.kind]})
        return VariantConfig(**{**SIZES, **ENCODERS[self.kind]}, is_causal=False)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, SIZES["vocab_size"], (self.batch_size, self.seq_length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.is_encoder_decoder:
            inputs |= {"decoder_input_ids": ids.flip(-1), "decoder_attention_mask": torch.ones_like(ids)}
        return self.get_config(), inputs
