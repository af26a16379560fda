"""Arguments that the stock classes take: by name, in their order, with the same effect."""

import inspect
import random

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.cache_utils import DynamicCache
from transformers.models.auto import modeling_auto

import hf_variants
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
    VariantSeq2SeqForQuestionAnswering,
    VariantSeq2SeqForSequenceClassification,
    VariantSeq2SeqForTokenClassification,
    VariantSeq2SeqModel,
)
from hf_variants.conversion import supported_model_types
from hf_variants.conversion.family import family_of
from hf_variants.model import arguments
from hf_variants.model.arguments import CACHE, argument_names, order_of

from .native_rows import all_rows
from .parity import hostile_, relative_error


VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(1))

HEADS = {
    VariantModel: "MODEL_MAPPING",
    VariantSeq2SeqModel: "MODEL_MAPPING",
    VariantForCausalLM: "MODEL_FOR_CAUSAL_LM_MAPPING",
    VariantForMaskedLM: "MODEL_FOR_MASKED_LM_MAPPING",
    VariantForSequenceClassification: "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    VariantForMultipleChoice: "MODEL_FOR_MULTIPLE_CHOICE_MAPPING",
    VariantForNextSentencePrediction: "MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING",
    VariantForTokenClassification: "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    VariantForQuestionAnswering: "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    VariantForConditionalGeneration: "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    VariantSeq2SeqForSequenceClassification: "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    VariantSeq2SeqForTokenClassification: "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    VariantSeq2SeqForQuestionAnswering: "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
}
# Taken as keywords, as the newer stock classes take them.
OF_EVERY_MODEL = {"output_attentions", "output_hidden_states", "return_dict"}
# BioGPT's classifier cuts the tokens by it and pools at indices into the whole.
UNUSABLE = {("biogpt", VariantForSequenceClassification): {"logits_to_keep"}}


def named(function):
    return [name for name, parameter in inspect.signature(function).parameters.items()
            if name != "self" and parameter.kind is not parameter.VAR_KEYWORD]  # fmt: skip


def stock_classes():
    """Every stock class of every native type that has a counterpart here, with that."""
    for model_type in supported_model_types():
        if model_type not in CONFIG_MAPPING:
            continue
        for ours, mapping_name in HEADS.items():
            mapping = getattr(modeling_auto, mapping_name)
            if CONFIG_MAPPING[model_type] in mapping:
                classes = mapping[CONFIG_MAPPING[model_type]]
                for stock in classes if isinstance(classes, tuple) else (classes,):
                    # A head stands on one stack or on the decoder of two.
                    if ("decoder_input_ids" in named(stock.forward)) == ("decoder_input_ids" in named(ours.forward)):
                        yield model_type, ours, stock


def test_every_argument_of_a_stock_class_has_its_name():
    """Trainer drops the columns, and `generate` refuses the inputs, that a forward does not name."""
    seen = 0
    for model_type, ours, stock in stock_classes():
        missing = set(named(stock.forward)) - set(named(ours.forward)) - OF_EVERY_MODEL
        assert missing <= UNUSABLE.get((model_type, ours), set()), (model_type, ours.__name__, missing)
        seen += 1
    assert seen > 200


@pytest.mark.parametrize(
    ("ours", "stock"),
    [
        (VariantForCausalLM, LlamaForCausalLM),
        (VariantForMaskedLM, BertForMaskedLM),
        (VariantForConditionalGeneration, BartForConditionalGeneration),
    ],
)
def test_the_order_is_that_of_the_stock_classes(ours, stock):
    shared = [name for name in named(stock.forward) if name != "kwargs"]
    assert named(ours.forward)[: len(shared)] == shared


def test_places_are_those_of_the_stock_class_in_every_class():
    rows, configs, seen = all_rows(), {}, 0
    for model_type, ours, stock in stock_classes():
        # BART's decoder, T5's encoder: a class of one stack of two has a config of its own.
        families = [family_of(model_type), *family_of(model_type).parts]
        family = next(one for one in families if stock in [one.native_class(head) for head in one.converted_heads])
        if (model_type, family.part) not in configs:
            native = family.config_map.native_class(**rows[model_type].draw(random.Random(f"{model_type}-0")))
            configs[model_type, family.part] = family.config_map.to_variant(native)
        names = argument_names(stock.forward)
        assert order_of(ours, configs[model_type, family.part])[: len(names)] == names, (model_type, stock)
        seen += names != argument_names(ours.forward)[: len(names)]
    assert seen > 60


@pytest.mark.parametrize("stock_class", [BertModel, BertForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM])
def test_arguments_by_place_are_the_same(stock_class, tmp_path):
    stock = hostile_(stock_class(stock_class.config_class(**SIZES, type_vocab_size=2))).eval()
    hf_variants.from_native(stock).save_pretrained(tmp_path)
    ours = type(hf_variants.from_native(stock)).from_pretrained(tmp_path)
    mask, types = torch.ones_like(IDS), IDS % 2
    mask[1, :3] = 0
    given = {"attention_mask": mask, "token_type_ids": types, "position_ids": torch.arange(2, 11).expand(2, 9)}
    by_place = [given.get(name) for name in named(stock.forward)[1 : named(stock.forward).index("inputs_embeds")]]
    expected, got = stock(IDS, *by_place), ours(IDS, *by_place)
    assert torch.equal(got[0], expected[0])
    assert not torch.equal(ours(IDS, mask)[0] if stock_class is not GPT2LMHeadModel else ours(IDS)[0], got[0])


@pytest.mark.parametrize("pair", [False, True])
def test_the_cache_has_either_name_where_transformers_renamed_it(pair, monkeypatch):
    """`cache` since 5.24, which `generate` and users pass there; `past_key_values` before, and in configs."""
    native = BartForConditionalGeneration(BartConfig(**SIZES)) if pair else GPT2LMHeadModel(GPT2Config(**SIZES))
    model = hf_variants.from_native(native).eval()
    assert CACHE in named(model.forward)
    assert CACHE == "past_key_values" or "past_key_values" not in named(model.forward)
    ids = {"decoder_input_ids": IDS, "encoder_outputs": model.get_encoder()(IDS)} if pair else {"input_ids": IDS}
    last = {name: value[:, -1:] if name.endswith("input_ids") else value for name, value in ids.items()}
    first = {name: value[:, :-1] if name.endswith("input_ids") else value for name, value in ids.items()}
    expected = model(**last, past_key_values=model(**first, use_cache=True)[CACHE]).logits
    monkeypatch.setattr(arguments, "CACHE", "cache")
    cache = model(**first, use_cache=True)[CACHE]
    assert torch.equal(model(**last, cache=cache).logits, expected)
    with pytest.raises(TypeError, match="two names of one argument"):
        model(**last, cache=cache, past_key_values=cache)


def test_an_argument_in_another_place_is_an_error_that_names_it():
    gpt2 = hf_variants.from_native(GPT2LMHeadModel(GPT2Config(**SIZES)))
    with pytest.raises(TypeError, match="Tensor is given in the place of `past_key_values`"):
        gpt2(IDS, torch.ones_like(IDS))
    with pytest.raises(TypeError, match="DynamicCache is given in the place of `attention_mask`"):
        decoder()(IDS, DynamicCache())
    with pytest.raises(TypeError, match="11 arguments are given by place, and 10 have one"):
        decoder()(IDS, *[None] * 10)
    with pytest.raises(TypeError, match="`attention_mask` is given twice"):
        decoder()(IDS, torch.ones_like(IDS), attention_mask=torch.ones_like(IDS))


def decoder(**fields):
    return hostile_(VariantForCausalLM(VariantConfig(**{**SIZES, **fields}))).eval()


@pytest.mark.parametrize("fields", [
    {},
    {"position_embedding_type": "learned", "norm_type": "layernorm", "norm_placement": "post"},
    {"position_embedding_type": "alibi", "num_key_value_heads": 2},
    {"embedding_multiplier": 3.0, "layer_types": "SF", "sliding_window": 4},
], ids=["llama", "learned", "alibi", "gemma"])  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_generation_from_embeddings_is_that_from_tokens(fields, options):
    model = decoder(**fields)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **options}
    expected = model.generate(IDS, **options)
    assert torch.equal(model.generate(inputs_embeds=model.get_input_embeddings()(IDS), **options), expected[:, 9:])


@pytest.mark.parametrize("model_type", ["granite", "granite_swa", "hyperclovax", "t5gemma", "marian", "pegasus", "bart",
                                        "m2m_100", "xglm", "gemma"])  # fmt: skip
def test_embeddings_that_are_given_are_multiplied_where_the_stock_class_multiplies_them(model_type):
    family, row = family_of(model_type), all_rows()[model_type]
    known = inspect.signature(family.config_map.native_class).parameters
    scales = {
        name: value for name, value in (("scale_embedding", True), ("embedding_multiplier", 3.0)) if name in known
    }
    config = family.config_map.native_class(**{**row.draw(random.Random(f"{model_type}-0")), **scales})
    stock = hostile_(family.native_class(family.primary)(config)).eval()
    ours = hf_variants.from_native(stock)
    vectors = torch.randn(2, 9, stock.get_input_embeddings().embedding_dim)
    batches = [{"inputs_embeds": vectors}]
    if config.is_encoder_decoder:
        batches = [{"inputs_embeds": vectors, "decoder_input_ids": IDS % 50},
                   {"input_ids": IDS % 50, "decoder_inputs_embeds": vectors}]  # fmt: skip
    with torch.no_grad():
        for batch in batches:
            assert torch.equal(ours(**batch).logits, stock(**batch).logits), batch.keys()


GPTS = ("gpt2", "openai-gpt", "gptj", "codegen", "gpt_neo", "gpt_bigcode")


@pytest.mark.parametrize("model_type", GPTS)
def test_token_types_among_the_tokens_equal_the_stock_class(model_type):
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    if model_type in ("gptj", "codegen"):
        sizes["rotary_dim"] = 4
    if model_type == "gpt_neo":
        sizes = {**SIZES, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    config = CONFIG_MAPPING[model_type](**sizes, attn_implementation="eager")
    stock = hostile_(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)).eval()
    model = hf_variants.from_native(stock)
    model.set_attn_implementation("eager")
    types = torch.where(torch.arange(9) < 4, 90, 91).expand(2, -1)
    with torch.no_grad():
        expected = stock(IDS, token_type_ids=types).logits
        assert relative_error(model(IDS, token_type_ids=types).logits, expected) <= family_of(model_type).bound(
            model.config
        )
        assert relative_error(model(IDS).logits, expected) > 0.1
    text = model.generate(IDS, token_type_ids=types, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert torch.equal(text[:, -1], expected[:, -1].argmax(-1))
    assert hf_variants.to_native(model).config.model_type == model_type
    # What was converted before the field existed is still of that type.
    model.config.token_type_table = "own"
    assert hf_variants.to_native(model).config.model_type == model_type


def test_a_table_of_token_types_is_read_instead_of_the_tokens():
    with_table = decoder(token_type_table="tokens", type_vocab_size=2)
    alone = decoder(type_vocab_size=2)
    alone.load_state_dict(with_table.state_dict())
    types = torch.ones_like(IDS)
    assert torch.equal(with_table(IDS, token_type_ids=types).logits, alone(IDS, token_type_ids=types).logits)


@pytest.mark.parametrize("parallel", ["none", "shared_norm"])
def test_cross_attention_takes_a_plain_cache_and_is_left_out_without_a_source(parallel):
    model = decoder(add_cross_attention=True, parallel_block=parallel, layer_types="SF", sliding_window=3)
    source = torch.randn(2, 7, 32)
    with torch.no_grad():
        whole = model(TARGETS, encoder_hidden_states=source, use_cache=False).logits
        for cache in (None, DynamicCache(config=model.config), DynamicCache()):
            first = model(TARGETS[:, :3], encoder_hidden_states=source, past_key_values=cache, use_cache=True)
            again = first.past_key_values
            second = model(TARGETS[:, 3:], encoder_hidden_states=source, past_key_values=again).logits
            assert (torch.cat([first.logits, second], 1) - whole).abs().max() < 1e-5 * whole.std()
        alone = model(TARGETS).logits
        assert not torch.allclose(alone, whole)
        # As the stack without cross-attention, whose other weights are the same.
        without = decoder(parallel_block=parallel, layer_types="SF", sliding_window=3)
        without.load_state_dict(model.state_dict(), strict=False)
        assert torch.equal(without(TARGETS).logits, alone)
    with pytest.raises(ValueError, match="`encoder_hidden_states` are given to a stack without cross-attention"):
        without(TARGETS, encoder_hidden_states=source)


def test_gpt2_with_a_plain_cache_and_without_a_source_does_the_same():
    """The reference for the test above: what the stock class accepts."""
    stock = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, add_cross_attention=True)).eval()
    source = torch.randn(2, 7, 32)
    assert stock(TARGETS).logits.shape == (2, 5, 96)
    first = stock(TARGETS, encoder_hidden_states=source, past_key_values=DynamicCache(config=stock.config))
    assert first.past_key_values.cross_attention_cache.get_seq_length() == 7


STOCK = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager")),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES, attn_implementation="eager")),
    "classifier": lambda: BertForSequenceClassification(BertConfig(**SIZES, attn_implementation="eager")),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
            encoder_attention_heads=4, decoder_attention_heads=4, attn_implementation="eager",
        )
    ),
}  # fmt: skip


def flat(output):
    return [leaf for part in output for leaf in (flat(part) if isinstance(part, (tuple, list)) else [part])]


@pytest.mark.parametrize("kind", STOCK)
def test_tuples_hold_what_the_stock_classes_return(kind):
    stock = hostile_(STOCK[kind]()).eval()
    model = hf_variants.from_native(stock)
    model.set_attn_implementation("eager")
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": TARGETS} if kind == "bart" else {})
    for asked in ({}, {"output_hidden_states": True, "output_attentions": True}):
        ours, theirs = model(**inputs, **asked, return_dict=False), stock(**inputs, **asked, return_dict=False)
        assert isinstance(ours, tuple)
        assert [type(part) for part in ours] == [type(part) for part in theirs]
        for left, right in zip(flat(ours), flat(theirs), strict=True):
            assert not torch.is_tensor(left) or torch.equal(left, right)
    expected = model(**inputs).logits
    # Here some stock classes fail.
    model.config.return_dict = False
    assert torch.equal(model(**inputs)[0], expected)


def encoder(**fields):
    layernorm = {"norm_type": "layernorm", "position_embedding_type": "learned", "is_causal": False}
    return VariantModel(VariantConfig(**{**SIZES, **layernorm, **fields}))


PAIRS = {
    "both": (encoder, decoder),
    "beside gpt2": (
        encoder,
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, add_cross_attention=True)),
    ),
    "beside bert": (lambda: BertModel(BertConfig(**SIZES)), decoder),
    "of two widths": (lambda: encoder(hidden_size=48), decoder),
    "sliding": (encoder, lambda: decoder(layer_types="SF", sliding_window=3)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_either_half_of_an_encoder_decoder_model(pair, tmp_path):
    for name, make in zip(("encoder", "decoder"), PAIRS[pair], strict=True):
        make().save_pretrained(tmp_path / name)
    halves = (tmp_path / "encoder", tmp_path / "decoder")
    model = hostile_(EncoderDecoderModel.from_encoder_decoder_pretrained(*halves)).eval()
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    outputs = model(input_ids=IDS, attention_mask=mask, labels=TARGETS)
    outputs.loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    # BERT's pooler, which no decoder reads.
    assert all("pooler" in name for name in without)
    options = {"attention_mask": mask, "max_new_tokens": 7, "decoder_start_token_id": 1, "pad_token_id": 0,
               "eos_token_id": None, "do_sample": False}  # fmt: skip
    for beams in (1, 2):
        text = model.generate(IDS, num_beams=beams, **options)
        assert torch.equal(text, model.generate(IDS, num_beams=beams, use_cache=False, **options))
    model.save_pretrained(tmp_path / "whole")
    reloaded, info = EncoderDecoderModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(reloaded.eval()(input_ids=IDS, attention_mask=mask, labels=TARGETS).logits, outputs.logits)


def seq2seq(model_class=VariantForConditionalGeneration, source_vocabulary=VOCABULARY, **fields):
    encoder = {**SIZES, "vocab_size": source_vocabulary}
    return model_class(VariantSeq2SeqConfig(encoder=encoder, decoder=SIZES, decoder_start_token_id=1, **fields))


RESIZED = {
    "stack": lambda: VariantModel(VariantConfig(**SIZES)),
    "head": decoder,
    "tied, biased": lambda: decoder(tie_word_embeddings=True, lm_head_bias=True),
    "tied, factorised": lambda: decoder(tie_word_embeddings=True, embedding_size=16, output_projection=True),
    "normalised": lambda: decoder(lm_head_normalized=True, embedding_multiplier=2.0),
    "masked LM": lambda: VariantForMaskedLM(VariantConfig(
        **SIZES, is_causal=False, lm_head_transform=True, lm_head_bias=True, lm_head_unread_bias=True)),
    "sequence": lambda: VariantForSequenceClassification(VariantConfig(**SIZES)),
    "tokens": lambda: VariantForTokenClassification(VariantConfig(**SIZES)),
    "spans": lambda: VariantForQuestionAnswering(VariantConfig(**SIZES)),
    "stacks": lambda: seq2seq(VariantSeq2SeqModel),
    "stacks apart": lambda: seq2seq(VariantSeq2SeqModel, 80, share_embeddings=False, tie_word_embeddings=False),
    "shared": lambda: seq2seq(final_logits_bias=True),
    "shared, untied": lambda: seq2seq(tie_word_embeddings=False),
    "apart": lambda: seq2seq(source_vocabulary=80, share_embeddings=False, final_logits_bias=True),
    "apart, untied": lambda: seq2seq(source_vocabulary=80, share_embeddings=False, tie_word_embeddings=False),
    "shared, multiplied by each": lambda: VariantForConditionalGeneration(VariantSeq2SeqConfig(
        encoder={**SIZES, "embedding_multiplier": 2.0}, decoder_start_token_id=1,
        decoder={**SIZES, "embedding_multiplier": 3.0, "embedding_multiplier_position": "stack"})),
    "unread": lambda: seq2seq(share_embeddings=False, tie_word_embeddings=False, unread_shared_embedding=True),
}  # fmt: skip


@pytest.mark.parametrize("kind", RESIZED)
def test_token_embeddings_of_every_class_are_resized(kind, tmp_path):
    model = RESIZED[kind]().eval()
    apart = "apart" in kind

    def first_output(model):
        ids = IDS % 80
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]

    for size in (VOCABULARY + 8, VOCABULARY - 8):
        before = first_output(model)
        assert model.resize_token_embeddings(size).weight.shape[0] == size
        assert model.resize_token_embeddings().weight.shape[0] == size
        if apart:
            assert model.resize_decoder_token_embeddings(size - 1, pad_to_multiple_of=8).weight.shape[0] == size
        elif model.config.is_encoder_decoder:
            with pytest.raises(ValueError, match="the stacks share one"):
                model.resize_decoder_token_embeddings(size)
        after = first_output(model)
        kept = VOCABULARY - 8 if model.get_output_embeddings() is not None else None
        assert torch.equal(before[..., :kept], after[..., :kept])
        assert model.config.vocab_size == size
        if model.get_output_embeddings() is not None:
            assert after.shape[-1] == size
        model.save_pretrained(tmp_path)
        reloaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert torch.equal(first_output(reloaded.eval()), after)


def test_one_of_two_vocabularies_grows_without_the_other():
    model = seq2seq(source_vocabulary=80, share_embeddings=False, final_logits_bias=True)
    model.resize_token_embeddings(83)
    assert (model.config.encoder.vocab_size, model.config.vocab_size) == (83, VOCABULARY)
    model.resize_decoder_token_embeddings(99)
    assert (model.config.encoder.vocab_size, model.config.vocab_size) == (83, 99)
    assert model.final_logits_bias.shape == (1, 99)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
