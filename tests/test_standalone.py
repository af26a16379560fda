"""One model file per variant: that it is short, clean and the variant bit for bit, and refused where it is not."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DynamicCache,
)

import hf_variants
from hf_variants import VariantConfig
from hf_variants.conversion.family import family_of
from hf_variants.standalone import NotStandalone, standalone, write_source
from hf_variants.standalone.proof import differences, loaded, models, reduced
from hf_variants.standalone.writing import LINE_LENGTH
from tests.strategies import hostile_
from tests.test_seq2seq import stack
from tests.tools.test_generation import batched


PRESETS = list(hf_variants.presets())
SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# Every feature that no preset has, a few at a time.
OTHERS = {
    "encoder": {"is_causal": False, "norm_placement": "post", "norm_type": "layernorm", "type_vocab_size": 2,
                "position_embedding_type": "learned", "embedding_norm": True, "pooler": True, "lm_head_transform": True,
                "lm_head_bias": True, "attention_bias": True, "mlp_bias": True, "layer_types": "FS", "sliding_window": 4},
    "roberta-like": {"is_causal": False, "norm_placement": "post", "norm_type": "layernorm", "type_vocab_size": 1,
                     "position_embedding_type": "learned", "position_ids_source": "input_ids", "pooler": True,
                     "pooler_scope": "base", "loss_in_float32": False, "initializer_positions": "sinusoidal"},
    "gates and sinks": {"attention_gate": "headwise", "attention_sinks": True, "clip_qkv": 1.5, "attention_sub_norm": True,
                        "ffn_sub_norm": True, "learned_scale_type": "channel", "qk_norm": "per_head"},
    "relative": {"position_embedding_type": "relative_bias", "norm_type": "dynamic_tanh", "label_smoothing": 0.1,
                 "z_loss_coefficient": 0.01, "layer_types": "FS", "sliding_window": 4, "initializer_scheme": "fan_in"},
    "relative per layer": {"position_embedding_type": "relative_bias", "relative_attention_per_layer": True,
                           "attention_score_form": "biased", "num_key_value_heads": 2, "learned_scale_type": "scalar"},
    "longrope": {"rope_parameters": {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 8,
                                     "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
                 "longrope_recomputes_cache": True, "embedding_multiplier": 4.5, "embedding_multiplier_position": "stack"},
    "layers of other sizes": {"num_key_value_heads": 2, "per_layer_config": {1: {"num_key_value_heads": 1},
                              3: {"intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 8}}},
    "layers that differ": {"per_layer_config": {0: {"attention_sinks": True, "qk_norm": "head"},
                                                1: {"norm_placement": "post"},
                                                3: {"norm_placement": "post", "ffn_type": "mlp", "mlp_bias": True}}},
    "layers without a sublayer": {"norm_type": "layernorm", "unfused_bias": True, "learned_scale_type": "channel",
                                  "per_layer_config": {1: {"skip": ["mlp"], "attention_bias": True},
                                                       2: {"skip": ["self_attn"], "learned_scale_type": "none"}}},
    "parallel layers": {"parallel_block": "two_norms", "is_causal": False, "position_embedding_type": "alibi",
                        "per_layer_config": {2: {"parallel_block": "shared_norm", "residual_multiplier": 0.5},
                                             3: {"parallel_block": "none", "attn_logit_softcapping": 20.0}}},
    "roformer-like": {"rope_turns_values": True, "rope_table_in_checkpoint": True, "rope_interleaved": True,
                      "hidden_act": "xielu", "ffn_type": "mlp", "eager_by_default": True, "generation_counts_padding": True,
                      "loss_in_float32": False, "z_loss_coefficient": 0.01},
    "parts of heads": {"layer_types": "FS", "sliding_window": 4, "hidden_act": "prelu", "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10.0}}},
    "bases by layer": {"layer_rope_theta": [10.0, 500.0, 0, 10.0], "layer_types": "FSFS", "sliding_window": 4},
    "bases by layer, scaled": {"layer_rope_theta": [10.0, 500.0, 10.0, 500.0], "no_rope_layers": [1, 1, 1, 0],
                               "is_causal": False,
                               "rope_parameters": {"rope_type": "linear", "rope_theta": 10.0, "factor": 2.0}},
    "heads of other sizes": {"per_layer_config": {1: {"head_dim": 8}, 3: {"head_dim": 8, "num_attention_heads": 6,
                                                                         "num_key_value_heads": 3}}},
    "parts of heads of other sizes": {"is_causal": False, "per_layer_config": {0: {"head_dim": 32}}, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10.0, "factor": 2.0, "original_max_position_embeddings": 32,
        "partial_rotary_factor": 0.5}},
    "chunks": {"ffn_chunk_size": 4, "norm_placement": "sandwich", "clamp_in_float16": "blocks"},
    "chunks in some layers": {"per_layer_config": {1: {"ffn_chunk_size": 4},
                                                   2: {"ffn_chunk_size": 6, "skip": ["self_attn"]}}},
    "batchnorm": {"norm_type": "batchnorm", "attention_sub_norm": True, "embedding_norm": True},
    "batchnorm of all batches": {"norm_type": "batchnorm", "norm_momentum": None, "is_causal": False, "norm_bias": False,
                                 "per_layer_config": {1: {"norm_placement": "sandwich"}, 3: {"skip": ["mlp"]}}},
    "labels in place": {"shift_labels": False, "attention_sinks": True, "initializer_sinks": "zero"},
    "narrow embeddings": {"embedding_size": 24, "output_projection": True, "scale_query": True, "lm_head_normalized": True,
                          "padding_mask_source": "input_ids", "first_layer_pre_norm": False, "embedding_norm": True},
}  # fmt: skip


def small(preset: str, **fields) -> VariantConfig:
    if VariantConfig.from_preset(preset).sliding_window:
        fields["sliding_window"] = 5
    return VariantConfig.from_preset(preset, **SIZES, **fields)


def config_of(name: str) -> VariantConfig:
    return small(name) if name in PRESETS else VariantConfig(**SIZES, **OTHERS[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A variant of gemma3's kind, written as one file, and the variant."""
    path = tmp_path_factory.mktemp("standalone")
    model = hostile_(hf_variants.VariantForCausalLM(small("gemma3", num_key_value_heads=2, layer_types="SSSF"))).eval()
    model.save_pretrained(path / "variant")
    standalone(path / "variant", path / "my-model")
    return path / "my-model", model


def slow_but(quick: set[str], names: list[str]) -> list:
    """The names as parameters, all but some of them slow together."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


QUICK = {"gptj", "gemma2", "bloom", "command-a", "encoder", "gates and sinks", "narrow embeddings", "layers that differ",
         "batchnorm"}  # fmt: skip


@pytest.mark.parametrize("name", slow_but(QUICK, [*PRESETS, *OTHERS]))
def test_bits_are_the_variants(name):
    config = config_of(name)
    assert differences(write_source(config, name.replace(" ", "-")), config) == []


SEQ2SEQ = [("vanilla", "vanilla"), ("t5", "umt5"), ("modern", "sliding"), ("sinks", "softcap"), ("alibi", "t5")]


def pair(encoder: str, decoder: str, **top) -> hf_variants.VariantSeq2SeqConfig:
    given = {"decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 2, **top}
    return hf_variants.VariantSeq2SeqConfig(encoder=stack(encoder, 2), decoder=stack(decoder, 3), **given)


@pytest.mark.parametrize(
    ("stacks", "top"),
    [
        (("vanilla", "vanilla"), {}),
        (("modern", "sliding"), {"share_embeddings": False, "final_logits_bias": True, "label_shift": "last_token"}),
        *(pytest.param(stacks, {}, marks=pytest.mark.slow) for stacks in SEQ2SEQ),
        pytest.param(
            ("t5", "t5"),
            {"tie_word_embeddings": False, "decoder_inputs_from_source": True, "labels_disable_cache": True},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_bits_of_an_encoder_decoder(stacks, top):
    config = pair(*stacks, **top)
    assert differences(write_source(config, "pair"), config) == []


def test_arguments_stand_in_the_order_of_the_variant():
    config = VariantConfig(**SIZES, **OTHERS["encoder"])
    order = {"VariantForMaskedLM": "input_ids, inputs_embeds, attention_mask"}
    signatures = [write_source(config, "Tiny").modeling]
    config.argument_order = order
    signatures.append(write_source(config, "Tiny").modeling)
    heads = [re.search(r"class TinyForMaskedLM.*?def forward\((.*?)\*\*kwargs", text, re.S)[1] for text in signatures]
    names = [[line.split(":")[0].strip(" ,") for line in head.split("\n")[2:-1]] for head in heads]
    assert names[0] == [
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "inputs_embeds",
        "*",
        "labels",
    ]
    assert names[1] == ["input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "token_type_ids"]


def test_what_two_stacks_have_in_common_stands_once():
    same, other = (write_source(pair(*stacks), "pair").modeling for stacks in (("t5", "t5"), ("modern", "vanilla")))
    assert "class PairMLP(" in same
    # Which is told whether it is causal.
    for name in ("Attention", "RelativeBias"):
        assert len(re.findall(rf"class Pair(?:Encoder|Decoder)?{name}\(", same)) == 1
    assert "is_causal: bool" in same
    assert "is_causal: bool" not in other
    assert len(write_source(pair("vanilla", "vanilla"), "pair").modeling.splitlines()) <= 650
    assert "class PairEncoderMLP(" in other
    assert same.count("\ndef eager_attention_forward") == 0 or same.count("def eager_attention_forward") == 1


def test_an_encoder_decoder_is_written_and_generates(tmp_path):
    model = hostile_(hf_variants.VariantForConditionalGeneration(pair("modern", "vanilla"))).eval()
    model.save_pretrained(tmp_path / "variant")
    standalone(tmp_path / "variant", tmp_path / "pair")
    own = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "pair", trust_remote_code=True).eval()
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}):
        tokens = [m.generate(ids, max_new_tokens=6, do_sample=False, **options) for m in (own, model)]
        assert torch.equal(*tokens)


def test_stacks_whose_layers_differ():
    given = {"decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 2}
    encoder = {**stack("modern", 2), "per_layer_config": {1: {"norm_placement": "post", "intermediate_size": 40}}}
    decoder = {
        **stack("vanilla", 3),
        "norm_type": "batchnorm",
        "loss_in_float32": False,
        "per_layer_config": {1: {"ffn_type": "glu"}},
    }
    config = hf_variants.VariantSeq2SeqConfig(encoder=encoder, decoder=decoder, **given)
    source = write_source(config, "pair")
    assert differences(source, config) == []
    assert "class PairEncoderPostBlock" in source.modeling
    assert "class PairDecoderGluBlock" in source.modeling


def test_layers_that_differ_load_with_their_sizes(tmp_path):
    fields = {
        "per_layer_config": {1: {"num_key_value_heads": 1}, 3: {"norm_placement": "post", "intermediate_size": 96}}
    }
    model = hostile_(hf_variants.VariantForCausalLM(VariantConfig(**SIZES, **fields))).eval()
    model.save_pretrained(tmp_path / "variant")
    standalone(tmp_path / "variant", tmp_path / "mixed")
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "mixed", trust_remote_code=True).eval()
    own.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    ids = torch.randint(1, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    static = {"cache_implementation": "static", "disable_compile": True}
    tokens = [m.generate(ids, max_new_tokens=6, do_sample=False, **static) for m in (model, own, again)]
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])
    states = [m(ids, output_hidden_states=True, output_attentions=True) for m in (model, own)]
    for kind in ("hidden_states", "attentions"):
        assert all(torch.equal(one, two) for one, two in zip(*(output[kind] for output in states), strict=True))


def test_checkpointing_counts_no_batch_twice():
    config = VariantConfig(**SIZES, norm_type="batchnorm")
    source = write_source(config, "normed")
    ids, results = torch.arange(1, 17).view(2, 8), []
    with loaded(source) as module:
        for checkpoints in (False, True):
            torch.manual_seed(0)
            own = module.NormedForCausalLM(module.NormedForCausalLM.config_class(**source.values(config))).train()
            if checkpoints:
                own.gradient_checkpointing_enable()
            own(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            results.append([p.grad for p in own.parameters()] + list(own.buffers()))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize(
    "fields",
    [
        {"residual_dropout": 0.5, "attention_residual_dropout": False},
        {"residual_dropout": 0.5, "ffn_residual_dropout": False, "learned_scale_type": "channel"},
        {"residual_dropout": 0.5, "attention_residual_dropout": False, "learned_scale_type": "scalar"},
        {"residual_dropout": 0.5, "attention_residual_dropout": 0.2, "learned_scale_type": "channel"},
        {"residual_dropout": 0.5, "attention_residual_dropout": 0.5, "learned_scale_type": "channel"},
        {"residual_dropout": 0.5, "learned_scale_type": "channel", "per_layer_config": {1: {"skip": ["mlp"]}}},
        {"residual_dropout": 0.5, "attention_residual_dropout": 0.2},
    ],
    ids=str,
)
def test_each_branch_has_its_dropout(fields):
    config = VariantConfig(**SIZES, **fields)
    source = write_source(config, "dropped")
    ids, results = torch.arange(1, 17).view(2, 8), []
    with loaded(source) as module:
        variant, own = models(source, module, config, "ForCausalLM")
        own.load_state_dict(variant.state_dict())
        for model in (variant, own):
            torch.manual_seed(0)
            results.append(model.train()(input_ids=ids, use_cache=False).logits)
        assert not torch.equal(results[0], variant.eval()(input_ids=ids, use_cache=False).logits)
    assert torch.equal(*results)


def test_a_chunk_that_does_not_divide_the_length_is_an_error():
    config = VariantConfig(**SIZES, ffn_chunk_size=4)
    with loaded(source := write_source(config, "chunked")) as module:
        own = module.ChunkedForCausalLM(module.ChunkedForCausalLM.config_class(**source.values(config)))
        own(input_ids=torch.arange(8)[None])
        with pytest.raises(ValueError, match="chunk size 4"):
            own(input_ids=torch.arange(9)[None])


HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
TRANSFORM = {"classifier_transform": True, "classifier_transform_norm": True, "classifier_transform_on_tokens": True}
# Every pooling, transform, dropout and initialisation of classifiers, a few at a time.
CLASSIFIERS = {
    "pooler": ("encoder", {"classifier_dropout": 0.1}),
    "first": ("roberta-like", {"classifier_transform": True, "classifier_dropout": 0.1, "qa_dropout": 0.0}),
    "mean": ("encoder", {**TRANSFORM, "pooler": False, "classifier_pooling": "mean",
                         "initializer_scheme": "depth_scaled_and_heads", "token_classifier_loss_in_float32": False}),
    "mean in float32": ("encoder", {"pooler": False, "classifier_pooling": "mean_in_float32"}),
    "mean of logits": ("encoder", {"pooler": False, "classifier_pooling": "mean_of_logits"}),
    "end of sequence": ("narrow embeddings", {"classifier_pooling": "end_of_sequence", "initializer_scheme": "fan_in"}),
    "last": ("gates and sinks", {}),
    "last without padding": ("gates and sinks", {"pad_token_id": None, "initializer_scheme": "fan_out_heads"}),
}  # fmt: skip
CHOICES = "ForMultipleChoice"
QUICK_HEADS = {("mean", HEADS[1]), ("last", HEADS[0]), ("first", HEADS[2]), ("pooler", CHOICES), ("last", CHOICES)}


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        pytest.param(kind, head, marks=() if (kind, head) in QUICK_HEADS else pytest.mark.slow)
        for kind in CLASSIFIERS
        for head in (*HEADS, CHOICES)
    ],
)
def test_bits_of_a_classifier(kind, head):
    base, fields = CLASSIFIERS[kind]
    config = VariantConfig(**{**SIZES, "num_hidden_layers": 2, **OTHERS[base], **fields})
    source = write_source(config, "classifier", head)
    assert differences(source, config) == []
    # Nothing of other heads.
    assert "lm_head" not in source.modeling
    assert source.modeling.count("(ClassifierPreTrainedModel") == 2
    with loaded(source) as module:
        torch.manual_seed(0)
        own_class = getattr(module, f"Classifier{head}")
        own = own_class(own_class.config_class(**source.values(reduced(config))))
    torch.manual_seed(0)
    variant = getattr(hf_variants, f"Variant{head}")(reduced(config))
    for name, tensor in variant.state_dict().items():
        if tensor.ndim > 1 and not name.startswith("model."):
            assert own.state_dict()[name].std().item() == pytest.approx(tensor.std().item(), rel=0.5), name


def test_a_classifier_is_written(tmp_path):
    config = VariantConfig(**SIZES, **OTHERS["encoder"], num_labels=3)
    model = hostile_(hf_variants.VariantForSequenceClassification(config)).eval()
    model.save_pretrained(tmp_path / "variant")
    standalone(tmp_path / "variant", tmp_path / "classifier")
    own = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier", trust_remote_code=True).eval()
    ids = torch.randint(1, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    assert own(ids).logits.shape == (2, 3)
    assert torch.equal(own(ids).logits, model(ids).logits)


CHOICE_FIELDS = [
    ("encoder", {"pooler": False, "choice_pooling": "first_real", "choice_dropout": 0.1}),
    ("encoder", {"pooler": False, "choice_pooling": "last_position", "choice_transform": True,
                 "choice_transform_act": "gelu", "choice_dropout": 0.1}),
    ("encoder", {"pooler_scope": "base", "choice_pooling": "mean_of_positions", "choice_transform": True,
                 "choice_transform_dropout": False, "choice_dropout": 0.2, "classifier_transform_norm": True}),
    ("roberta-like", {"pooler": True, "pooler_scope": "base_and_choices", "classifier_transform": True,
                      "choice_transform": False}),
    ("gates and sinks", {"choice_pooling": "first", "classifier_bias": True}),
]  # fmt: skip


@pytest.mark.parametrize(("base", "fields"), CHOICE_FIELDS, ids=str)
def test_bits_of_a_model_that_chooses(base, fields):
    """Of fields that a classifier of sequences has otherwise or not at all, dropout and embeddings included."""
    config = VariantConfig(**{**SIZES, "num_hidden_layers": 2, **OTHERS[base], **fields})
    source = write_source(config, "choosing", CHOICES)
    assert differences(source, config) == []
    assert max(map(len, source.modeling.splitlines())) <= LINE_LENGTH
    with loaded(source) as module:
        variant, own = models(source, module, reduced(config), CHOICES)
        own.load_state_dict(variant.state_dict())
        ids = torch.randint(3, 99, (2, 3, 7), generator=torch.Generator().manual_seed(0))
        embedded = variant.get_input_embeddings()(ids)
        results = []
        for model in (variant, own):
            torch.manual_seed(5)
            with torch.no_grad():
                made = model.train()(input_ids=ids, labels=torch.tensor([2, 0]))
                results.append([made.logits, made.loss, model.eval()(inputs_embeds=embedded).logits])
    assert results[0][0].shape == (2, 3)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_a_model_that_chooses_is_written(tmp_path):
    model = hostile_(hf_variants.VariantForMultipleChoice(VariantConfig(**SIZES, **OTHERS["encoder"]))).eval()
    model.save_pretrained(tmp_path / "variant")
    standalone(tmp_path / "variant", tmp_path / "choosing")
    own = AutoModelForMultipleChoice.from_pretrained(tmp_path / "choosing", trust_remote_code=True).eval()
    assert type(own).__name__ == "ChoosingForMultipleChoice"
    ids = torch.randint(1, 99, (2, 3, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(own(ids).logits, model(ids).logits)


def test_a_head_without_a_template_is_refused():
    with pytest.raises(NotStandalone, match=r"the head of VariantForNothing .*hf-variants bundle"):
        write_source(VariantConfig(**SIZES), "nothing", "ForNothing")


POOLINGS_OF_PAIRS = ("first", "last", "mean", "mean_in_float32", "mean_of_logits", "end_of_sequence")
PAIR_CLASSIFIERS = [
    *((("vanilla", "vanilla"), head, {}) for head in HEADS),
    *((("vanilla", "vanilla"), HEADS[0], {"classifier_pooling": pooling}) for pooling in POOLINGS_OF_PAIRS),
    (("modern", "sliding"), HEADS[1], {**TRANSFORM, "token_classifier_loss_in_float32": False}),
    (("modern", "sliding"), HEADS[2], {**TRANSFORM, "qa_dropout": 0.1}),
    (("t5", "t5"), HEADS[0], {"classifier_pooling": "end_of_sequence", "initializer_scheme": "fan_in",
                              "classifier_transform": True, "classifier_transform_dropout": True,
                              "classifier_dropout": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("stacks", "head", "fields"),
    [
        pytest.param(*case, marks=() if place in (0, 1, 8) else pytest.mark.slow)
        for place, case in enumerate(PAIR_CLASSIFIERS)
    ],
    ids=str,
)
def test_bits_of_a_classifier_of_two_stacks(stacks, head, fields):
    given = {"decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 2, "num_labels": 3}
    decoder = {**stack(stacks[1], 3), **fields}
    config = hf_variants.VariantSeq2SeqConfig(encoder=stack(stacks[0], 2), decoder=decoder, **given)
    source = write_source(config, "pair", head)
    assert differences(source, config) == []
    assert "lm_head" not in source.modeling
    assert source.modeling.count("(PairPreTrainedModel") == 4
    assert max(map(len, source.modeling.splitlines())) <= LINE_LENGTH


def test_a_classifier_of_two_stacks_is_written(tmp_path):
    config = pair("vanilla", "vanilla", num_labels=3)
    model = hostile_(hf_variants.VariantSeq2SeqForSequenceClassification(config)).eval()
    model.save_pretrained(tmp_path / "variant")
    standalone(tmp_path / "variant", tmp_path / "classifier")
    own = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier", trust_remote_code=True).eval()
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[1, 6:] = 0
    outputs = [m(ids, attention_mask=ids.ne(0).long(), labels=torch.tensor([0, 2])) for m in (own, model)]
    assert outputs[0].logits.shape == (2, 3)
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].loss, outputs[1].loss)


def test_a_classifier_of_two_stacks_without_padding_is_refused():
    config = pair("vanilla", "vanilla", pad_token_id=None)
    with pytest.raises(NotStandalone, match="`classifier_pooling` is last"):
        write_source(config, "pair", "ForSequenceClassification")


def test_a_file_that_differs_is_not_written():
    config = small("granite")
    source = write_source(config, "granite")
    changed = source._replace(modeling=source.modeling.replace("self.residual_multiplier\n", "0.5\n"))
    assert changed != source
    assert any("logits" in what for what in differences(changed, config))


@pytest.mark.parametrize(
    "names", [["llama", "gemma3", "opt"], pytest.param(PRESETS, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_lengths_and_ruff(names, tmp_path):
    for name in names:
        source = write_source(small(name, num_key_value_heads=1 if name == "falcon" else 2), name)
        assert len(source.modeling.splitlines()) <= (350 if name in ("llama", "mistral", "qwen2", "qwen3") else 450)
        for file, text in source.files.items():
            (tmp_path / file).write_text(text, encoding="utf-8")
    ruff = [sys.executable, "-m", "ruff"]
    rules = ["--select", "E,W,F,I,B,UP,RET,SIM", "--ignore", "B905", "--target-version", "py310"]
    for command in (["check", *rules], ["format", "--check"]):
        made = subprocess.run(
            [*ruff, *command, "--isolated", "--line-length", "119", str(tmp_path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert made.returncode == 0, made.stdout + made.stderr


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bloom"])
def test_nothing_that_has_one_value(name):
    text = write_source(small(name), name).modeling
    branches = [line for line in text.splitlines() if line.strip().startswith("if") and "config." in line]
    assert not [line for line in branches if "> self.config.max_position_embeddings" not in line]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"per_layer_config": {1: {"head_dim": 8}}, "layer_rope_theta": [5.0, 10.0, 5.0, 5.0]}, "per_layer_config"),
        (
            {
                "layer_rope_theta": [5.0, 10.0, 5.0, 5.0],
                "layer_types": "FFFS",
                "sliding_window": 4,
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 100.0},
                    "sliding_attention": {"rope_type": "linear", "rope_theta": 10.0, "factor": 2.0},
                },
            },
            "layer_rope_theta",
        ),
        ({"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_what_is_not_covered_is_refused_by_field(fields, named):
    with pytest.raises(NotStandalone, match=rf"`{named}`.*hf-variants bundle"):
        write_source(VariantConfig(**SIZES, **fields), "foo")


@pytest.mark.parametrize(("head", "is_causal"), [("ForCausalLM", False), ("ForMaskedLM", True)])
def test_a_language_model_of_the_other_kind_is_refused(head, is_causal):
    with pytest.raises(NotStandalone, match=f"`is_causal` is {is_causal}"):
        write_source(VariantConfig(**SIZES, is_causal=is_causal), "foo", head)


def test_a_field_that_nothing_reads_is_refused(monkeypatch):
    from hf_variants.standalone import axes

    # As of an axis that is added tomorrow.
    monkeypatch.setitem(axes.FIELDS, "tomorrow", VariantConfig.__dataclass_fields__["hidden_size"])
    monkeypatch.setattr(VariantConfig, "tomorrow", True, raising=False)
    with pytest.raises(NotStandalone, match="`tomorrow`"):
        write_source(VariantConfig(**SIZES), "foo")


def test_a_folder_loads_with_its_own_code_and_generates(folder):
    path, model = folder
    assert sorted(p.name for p in path.glob("*.py")) == ["configuration_my_model.py", "modeling_my_model.py"]
    own = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    assert type(own).__name__ == "MyModelForCausalLM"
    assert "hf_variants.model" not in type(own).__module__
    ids = torch.randint(1, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(own(input_ids=ids).logits, model(input_ids=ids).logits)
    static = {"cache_implementation": "static", "disable_compile": True}
    tokens = [m.generate(ids, max_new_tokens=6, do_sample=False, **static) for m in (own, model)]
    assert torch.equal(*tokens)
    assert AutoConfig.from_pretrained(path, trust_remote_code=True).model_type == "my_model"


def test_continuous_batching(folder):
    path, model = folder
    own = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    prompts = [torch.arange(3, 12), torch.arange(20, 25)]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    expected = [model.generate(prompt[None], **options)[0, len(prompt) :].tolist() for prompt in prompts]
    assert batched(own, [prompt.tolist() for prompt in prompts]) == expected


def test_save_and_load_again(folder, tmp_path):
    own = AutoModelForCausalLM.from_pretrained(folder[0], trust_remote_code=True)
    own.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    weights = again.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in own.state_dict().items())


def test_a_mask_of_booleans_is_no_summand_in_eager_attention(folder):
    path, _ = folder
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, attn_implementation="eager").eval()
    ids = torch.arange(3, 11)[None]
    causal = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    assert torch.equal(model(ids, attention_mask=dict.fromkeys(model.config.layer_types, causal)).logits[:, :5],
                       model(ids).logits[:, :5])  # fmt: skip


def test_gradient_checkpointing_and_lora(folder):
    import peft

    own = AutoModelForCausalLM.from_pretrained(folder[0], trust_remote_code=True).train()
    ids = torch.arange(1, 17).view(2, 8)
    gradients = []
    for use in (False, True):
        if use:
            own.gradient_checkpointing_enable()
        own.zero_grad()
        # Also with a cache, which a layer that is computed twice must not fill.
        cache = DynamicCache(config=own.config) if use else None
        own(input_ids=ids, labels=ids, past_key_values=cache, use_cache=use).loss.backward()
        gradients.append([p.grad.clone() for p in own.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients))
    adapted = peft.get_peft_model(own, peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 2 * own.config.num_hidden_layers


def test_new_weights_are_drawn_as_the_variants_are():
    config = small("deepnorm", initializer_range=0.05)
    source = write_source(config, "deepnorm")
    with loaded(source) as module:
        torch.manual_seed(0)
        _, own = models(source, module, reduced(config), "ForCausalLM")
    torch.manual_seed(0)
    variant = hf_variants.VariantForCausalLM(reduced(config))
    for name, tensor in own.state_dict().items():
        if tensor.ndim > 1:
            assert tensor.std().item() == pytest.approx(variant.state_dict()[name].std().item(), rel=0.1), name


def test_the_plan_of_tensor_parallelism_is_the_variants(folder):
    path, model = folder
    own = AutoConfig.from_pretrained(path, trust_remote_code=True)
    assert own.base_model_tp_plan == model.config.base_model_tp_plan
    assert own.base_model_pp_plan == model.config.base_model_pp_plan


def test_new_weights_keep_within_their_limits():
    fields = {"initializer_cutoff_factor": 1.0, "attention_sinks": True, "initializer_sinks": "zero",
              "position_embedding_type": "learned", "initializer_positions": "sinusoidal"}  # fmt: skip
    config = VariantConfig(**SIZES, **fields)
    source = write_source(config, "limited")
    with loaded(source) as module:
        own = module.LimitedForCausalLM(module.LimitedForCausalLM.config_class(**source.values(config))).state_dict()
    variant = hf_variants.VariantForCausalLM(config).state_dict()
    for name, tensor in variant.items():
        if name.endswith(("sinks", "embed_positions.weight")):
            assert torch.equal(own[name], tensor), name
        elif tensor.ndim > 1:
            assert own[name].abs().max() <= config.initializer_range, name
            assert own[name].std().item() == pytest.approx(tensor.std().item(), rel=0.1), name


@pytest.mark.slow
def test_what_converts_is_written(monkeypatch):
    """Of every native type, with the fields that its conversion sets."""
    from hf_variants.standalone import writing
    from tests.native_rows import all_rows

    monkeypatch.setattr(writing, "_formatted", str)
    for name, row in all_rows().items():
        family = family_of(name)
        config = family.config_map.to_variant(family.config_map.native_class(**row.draw(random.Random(f"{name}-0"))))
        if not config.is_encoder_decoder and not config.is_causal and family.primary == "causal_lm":
            continue
        head = family.variant_class(family.primary).__name__.removeprefix("Variant").removeprefix("Seq2Seq")
        assert write_source(config, f"my {name}", head).modeling


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "encoder"])
def test_loads_where_this_package_is_absent(name, tmp_path):
    config = config_of(name)
    kind = "CausalLM" if config.is_causal else "MaskedLM"
    model = hostile_(getattr(hf_variants, f"VariantFor{kind}")(config)).eval()
    model.save_pretrained(tmp_path / "variant")
    standalone(tmp_path / "variant", tmp_path / "own")
    ids = torch.arange(1, 11).view(1, 10)
    torch.save(model(input_ids=ids).logits, tmp_path / "logits.pt")
    code = (
        "import sys, torch, transformers\n"
        f"model = transformers.AutoModelFor{kind}.from_pretrained("
        f"{str(tmp_path / 'own')!r}, trust_remote_code=True).eval()\n"
        "made = model(input_ids=torch.arange(1, 11).view(1, 10)).logits\n"
        f"assert torch.equal(made, torch.load({str(tmp_path / 'logits.pt')!r}))\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'hf_variants']\n"
    )
    made = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr


def test_a_name_that_no_class_can_have_is_refused():
    with pytest.raises(ValueError, match="begins with a letter"):
        write_source(VariantConfig(**SIZES), "3b")


def test_it_is_a_package_of_templates():
    import hf_variants.standalone as package

    assert {path.name for path in Path(package.__file__).parent.glob("*.jinja")} == {
        "heads.jinja", "layers.jinja", "model.jinja", "modeling.jinja", "seq2seq.jinja",
    }  # fmt: skip
