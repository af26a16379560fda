"""Every Auto class finds its model, and so does everything that looks a class up by its name."""

import pytest
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from hf_variants import auto_classes
from hf_variants.model import custom_code


@pytest.mark.parametrize(("auto_class", "model_class", "names"), auto_classes.MODELS)
def test_auto_class_and_names_agree(auto_class, model_class, names):
    config_class = model_class.config_class
    assert type(AutoConfig.for_model(config_class.model_type)) is config_class
    assert auto_class._model_mapping[config_class] is model_class
    assert names[config_class.model_type] == model_class.__name__
    # Else the mapping would look for the name among transformers' own models.
    assert config_class.model_type not in auto_class._model_mapping._config_mapping


def test_the_tables_are_those_that_the_auto_classes_read():
    for auto_class, _, names in auto_classes.MODELS:
        assert auto_class._model_mapping._model_mapping is names
    assert "VariantForCausalLM" in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def test_what_travels_with_a_checkpoint_names_the_same_classes():
    registered = {(auto_class.__name__, model_class.__name__) for auto_class, model_class, _ in auto_classes.MODELS}
    maps = (custom_code.DECODER_CLASSES, custom_code.ENCODER_CLASSES, custom_code.SEQ2SEQ_CLASSES)
    travelling = {
        (name, target.rpartition(".")[2])
        for auto_map in maps
        for name, target in auto_map.items()
        if name != "AutoConfig"
    }
    assert travelling == registered
