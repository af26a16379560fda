"""The structure that is walked before anything is built, against what is built."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import hf_variants
from hf_variants import VariantConfig
from hf_variants.conversion.skeleton import empty_model
from hf_variants.model.part import Part

from .strategies import variant_fields
from .test_initialisation import OTHERS, SMALL, config_of


def assert_structure(model_class: type, config) -> None:
    """That every part stands where the structure says, and no module with weights stands anywhere else."""
    model = empty_model(model_class, config)
    parts = dict(Part(model_class, config=config).walk())
    for path, part in parts.items():
        built = model.get_submodule(path) if not path.endswith("unread_bias") else model.get_parameter(path)
        if isinstance(part.cls, type):
            assert type(built) is part.cls, path
        for name, value in part.attributes.items():
            assert isinstance(value, Part) or getattr(built, name) == value, path
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    # Tables that a bias makes by itself.
    owners = {path.partition(".tables.")[0] for path in owners}
    assert owners <= set(parts)
    assert {path for path, module in model.named_modules() if isinstance(module, nn.Linear)} <= set(parts)


@pytest.mark.parametrize("name", [*hf_variants.presets(), *OTHERS])
def test_structure_is_what_is_built(name):
    config = config_of(name)
    head = hf_variants.VariantForCausalLM if config.is_causal else hf_variants.VariantForMaskedLM
    others = (
        hf_variants.VariantModel,
        hf_variants.VariantForSequenceClassification,
        hf_variants.VariantForTokenClassification,
        hf_variants.VariantForQuestionAnswering,
    )
    for model_class in (head, *others):
        assert_structure(model_class, config)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(variant_fields())
def test_structure_of_random_configs(fields):
    assert_structure(hf_variants.VariantForCausalLM, VariantConfig(**fields))


def test_structure_of_two_stacks():
    options = {"share_embeddings": False, "unread_shared_embedding": True}
    config = hf_variants.VariantSeq2SeqConfig(encoder=SMALL, decoder=SMALL, **options, decoder_start_token_id=1)
    assert_structure(hf_variants.VariantForConditionalGeneration, config)


def test_nothing_is_built_by_a_walk(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a module was built")

    monkeypatch.setattr(nn.Module, "__init__", refuse)
    monkeypatch.setattr(torch.Tensor, "__new__", refuse)
    paths = [path for path, _ in Part(hf_variants.VariantForCausalLM, config=VariantConfig(**SMALL)).walk()]
    assert "model.layers.1.self_attn.q_proj" in paths
