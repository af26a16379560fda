"""Which of our classes each of transformers' Auto classes stands for."""

import sys

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    processing_utils,
)
from transformers.models.auto import modeling_auto

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
)
from .model.modeling_variant_seq2seq import (
    VariantForConditionalGeneration,
    VariantSeq2SeqForQuestionAnswering,
    VariantSeq2SeqForSequenceClassification,
    VariantSeq2SeqForTokenClassification,
    VariantSeq2SeqModel,
)


# Auto class, our class, and the table of names that stands beside the Auto class.
MODELS = (
    (AutoModel, VariantModel, modeling_auto.MODEL_MAPPING_NAMES),
    (AutoModel, VariantSeq2SeqModel, modeling_auto.MODEL_MAPPING_NAMES),
    (AutoModelForCausalLM, VariantForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (AutoModelForMaskedLM, VariantForMaskedLM, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    (AutoModelForMultipleChoice, VariantForMultipleChoice, modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES),
    (
        AutoModelForNextSentencePrediction,
        VariantForNextSentencePrediction,
        modeling_auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES,
    ),
    (
        AutoModelForSeq2SeqLM,
        VariantForConditionalGeneration,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ),
    (
        AutoModelForSequenceClassification,
        VariantForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    (
        AutoModelForSequenceClassification,
        VariantSeq2SeqForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    (
        AutoModelForTokenClassification,
        VariantForTokenClassification,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    (
        AutoModelForTokenClassification,
        VariantSeq2SeqForTokenClassification,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    (
        AutoModelForQuestionAnswering,
        VariantForQuestionAnswering,
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    ),
    (
        AutoModelForQuestionAnswering,
        VariantSeq2SeqForQuestionAnswering,
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    ),
)


def register() -> None:
    """
    Make `AutoConfig` and the Auto models know our types.

    Their `register` does not fill the tables of names, and those are what others read: Trainer's label smoothing
    shifts the labels of a class that is listed there, and only of such; pipelines call any other class unsupported;
    the lm-evaluation-harness takes it for a decoder. `transformers serve` and TRL look for the class that a config
    names among transformers' own names.
    """
    # `processing_utils` makes the module anew when it is first imported.
    transformers = sys.modules[processing_utils.__package__]
    for config_class in (VariantConfig, VariantSeq2SeqConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class, model_class, names in MODELS:
        auto_class.register(model_class.config_class, model_class, exist_ok=True)
        names[model_class.config_class.model_type] = model_class.__name__
        setattr(transformers, model_class.__name__, model_class)
