"""One config for every dense Transformer, at home in transformers. Importing this registers it with `Auto*`."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .model.configuration_variant import VariantConfig
from .model.modeling_variant import (
    VariantForCausalLM,
    VariantForQuestionAnswering,
    VariantForSequenceClassification,
    VariantForTokenClassification,
    VariantModel,
    VariantPreTrainedModel,
)
from .presets import presets


AutoConfig.register(VariantConfig.model_type, VariantConfig, exist_ok=True)
AutoModel.register(VariantConfig, VariantModel, exist_ok=True)
AutoModelForCausalLM.register(VariantConfig, VariantForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(VariantConfig, VariantForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(VariantConfig, VariantForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(VariantConfig, VariantForQuestionAnswering, exist_ok=True)

from .conversion import from_native, to_native  # noqa: E402 (reads the classes above)


__version__ = "0.1.0"
