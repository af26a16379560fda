"""The code that travels with a checkpoint, for those who have transformers but not this package."""

import shutil
from pathlib import Path

from transformers import PreTrainedConfig


# Auto class -> file and class. vLLM and the task heads need `AutoModel` too, which a plain save leaves out.
STACK_CLASSES = {
    "AutoConfig": "configuration_variant.VariantConfig",
    "AutoModel": "modeling_variant.VariantModel",
    "AutoModelForSequenceClassification": "modeling_variant.VariantForSequenceClassification",
    "AutoModelForMultipleChoice": "modeling_variant.VariantForMultipleChoice",
    "AutoModelForNextSentencePrediction": "modeling_variant.VariantForNextSentencePrediction",
    "AutoModelForTokenClassification": "modeling_variant.VariantForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_variant.VariantForQuestionAnswering",
}
DECODER_CLASSES = {**STACK_CLASSES, "AutoModelForCausalLM": "modeling_variant.VariantForCausalLM"}
ENCODER_CLASSES = {**STACK_CLASSES, "AutoModelForMaskedLM": "modeling_variant.VariantForMaskedLM"}
SEQ2SEQ_CLASSES = {
    "AutoConfig": "configuration_variant_seq2seq.VariantSeq2SeqConfig",
    "AutoModel": "modeling_variant_seq2seq.VariantSeq2SeqModel",
    "AutoModelForSeq2SeqLM": "modeling_variant_seq2seq.VariantForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_variant_seq2seq.VariantSeq2SeqForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_variant_seq2seq.VariantSeq2SeqForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_variant_seq2seq.VariantSeq2SeqForQuestionAnswering",
}


def auto_map_of(config: PreTrainedConfig, class_name: str = "") -> dict[str, str]:
    """The complete `auto_map` of a config: every head that usually goes with it, and the class that is named."""
    if config.is_encoder_decoder:
        return dict(SEQ2SEQ_CLASSES)
    usual, other = DECODER_CLASSES, ENCODER_CLASSES
    if not config.is_causal:
        usual, other = other, usual
    return usual | {auto: where for auto, where in other.items() if where.endswith(f".{class_name}")}


def write_code(folder: str | Path) -> None:
    """
    Copy the files of this folder next to a checkpoint. They import nothing but each other, torch and transformers,
    which is what lets transformers load them with `trust_remote_code=True`.
    """
    destination = Path(folder)
    destination.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).resolve().parent
    for path in sorted(source.glob("*.py")):
        if path.name != "__init__.py" and source != destination.resolve():
            shutil.copyfile(path, destination / path.name)
