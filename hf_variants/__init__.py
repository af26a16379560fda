"""One config for every dense Transformer, at home in transformers. Importing this registers it with `Auto*`."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .model.configuration_variant import VariantConfig
from .model.configuration_variant_seq2seq import VariantSeq2SeqConfig
from .model.modeling_variant import (
    VariantForCausalLM,
    VariantForMaskedLM,
    VariantForQuestionAnswering,
    VariantForSequenceClassification,
    VariantForTokenClassification,
    VariantModel,
    VariantPreTrainedModel,
)
from .model.modeling_variant_seq2seq import (
    VariantForConditionalGeneration,
    VariantSeq2SeqModel,
    VariantSeq2SeqPreTrainedModel,
)
from .presets import presets


AutoConfig.register(VariantConfig.model_type, VariantConfig, exist_ok=True)
AutoModel.register(VariantConfig, VariantModel, exist_ok=True)
AutoModelForCausalLM.register(VariantConfig, VariantForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(VariantConfig, VariantForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(VariantConfig, VariantForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(VariantConfig, VariantForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(VariantConfig, VariantForQuestionAnswering, exist_ok=True)
AutoConfig.register(VariantSeq2SeqConfig.model_type, VariantSeq2SeqConfig, exist_ok=True)
AutoModel.register(VariantSeq2SeqConfig, VariantSeq2SeqModel, exist_ok=True)
AutoModelForSeq2SeqLM.register(VariantSeq2SeqConfig, VariantForConditionalGeneration, exist_ok=True)

try:
    from . import peft_targets
except ImportError:  # peft is not installed: nothing to tell it
    pass
else:
    peft_targets.register(VariantConfig.model_type)
    peft_targets.register(VariantSeq2SeqConfig.model_type)

from .conversion import from_native, to_native  # noqa: E402 (reads the classes above)


__version__ = "0.1.0"

__all__ = [
    "VariantConfig",
    "VariantForCausalLM",
    "VariantForConditionalGeneration",
    "VariantForMaskedLM",
    "VariantForQuestionAnswering",
    "VariantForSequenceClassification",
    "VariantForTokenClassification",
    "VariantModel",
    "VariantPreTrainedModel",
    "VariantSeq2SeqConfig",
    "VariantSeq2SeqModel",
    "VariantSeq2SeqPreTrainedModel",
    "from_native",
    "presets",
    "to_native",
]
