"""One config for every dense Transformer, at home in transformers. Importing this registers it with `Auto*`."""

from . import auto_classes, peft_targets
from .model.configuration_variant import VariantConfig
from .model.configuration_variant_seq2seq import VariantSeq2SeqConfig
from .model.modeling_variant import (
    VariantForCausalLM,
    VariantForMaskedLM,
    VariantForMultipleChoice,
    VariantForNextSentencePrediction,
    VariantForQuestionAnswering,
    VariantForSequenceClassification,
    VariantForTokenClassification,
    VariantModel,
    VariantPreTrainedModel,
)
from .model.modeling_variant_seq2seq import (
    VariantForConditionalGeneration,
    VariantSeq2SeqForQuestionAnswering,
    VariantSeq2SeqForSequenceClassification,
    VariantSeq2SeqForTokenClassification,
    VariantSeq2SeqModel,
    VariantSeq2SeqPreTrainedModel,
)
from .presets import presets


auto_classes.register()

peft_targets.register(VariantConfig.model_type, VariantSeq2SeqConfig.model_type)

from . import card  # noqa: E402 (these read the classes above)
from .conversion import from_native, to_native  # noqa: E402
from .fast import accelerate_decoding, chunk_loss, quantize_int8, save_training_memory  # noqa: E402


# Where the package is not installed, a model is saved without a card.
VariantPreTrainedModel.cards = card


__version__ = "0.1.0"

__all__ = [
    "VariantConfig",
    "VariantForCausalLM",
    "VariantForConditionalGeneration",
    "VariantForMaskedLM",
    "VariantForMultipleChoice",
    "VariantForNextSentencePrediction",
    "VariantForQuestionAnswering",
    "VariantForSequenceClassification",
    "VariantForTokenClassification",
    "VariantModel",
    "VariantPreTrainedModel",
    "VariantSeq2SeqConfig",
    "VariantSeq2SeqForQuestionAnswering",
    "VariantSeq2SeqForSequenceClassification",
    "VariantSeq2SeqForTokenClassification",
    "VariantSeq2SeqModel",
    "VariantSeq2SeqPreTrainedModel",
    "accelerate_decoding",
    "chunk_loss",
    "from_native",
    "presets",
    "quantize_int8",
    "save_training_memory",
    "to_native",
]
