"""Heads, ties and kinds: against stock models and against what is defined."""

import copy

import pytest
import torch
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, T5EncoderModel

from hf_variants import (
    VariantConfig,
    VariantForCausalLM,
    VariantForMaskedLM,
    VariantForSequenceClassification,
    VariantModel,
)
from hf_variants.conversion import from_native
from hf_variants.surgery import (
    DropHead,
    EncoderAlone,
    KeyValueHeads,
    Subject,
    SurgeryError,
    Tie,
    ToClassifier,
    ToEncoder,
    Untie,
    edit,
    edit_model,
)
from hf_variants_cli import main
from tests.parity import hostile_, inputs_of, logits_of, random_native, relative_error
from tests.surgery_models import NAMED, ROWS, SIZES


@pytest.mark.parametrize("model_type", NAMED)
def test_repeated_heads_keep_the_function_and_come_back(model_type):
    row = ROWS[model_type]
    native = random_native(row, 0)
    ours = from_native(native)
    stacks = Subject.of_model(ours).stacks
    made = edit_model(ours, [KeyValueHeads(config.num_attention_heads, name) for name, config in stacks.items()])
    assert all(
        stack.num_key_value_heads == stack.num_attention_heads for stack in Subject.of_model(made).stacks.values()
    )
    batch = inputs_of(native, row.length)["long"]
    assert relative_error(logits_of(made.double(), batch), logits_of(ours.double(), batch)) < 1e-5
    back = edit_model(
        made.float(), [KeyValueHeads(config.num_key_value_heads, name) for name, config in stacks.items()]
    )
    # The mean of equal heads is each of them.
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), ours.float().state_dict().values()))


@pytest.mark.parametrize("count", [1, 2])
def test_pooled_heads_are_means_of_neighbours(count):
    native = hostile_(LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4, attention_bias=True))).eval()
    made = edit_model(from_native(native), [KeyValueHeads(count)])
    config = copy.deepcopy(native.config)
    config.num_key_value_heads = count
    by_hand = LlamaForCausalLM(config).eval()
    state = native.state_dict()
    for name in state:
        if "k_proj" in name or "v_proj" in name:
            heads = state[name].chunk(4)
            step = 4 // count
            state[name] = torch.cat([sum(heads[i : i + step]) / step for i in range(0, 4, step)])
    by_hand.load_state_dict(state)
    ids = torch.arange(20)[None]
    assert relative_error(made(ids).logits, by_hand(ids).logits) < 1e-5


@pytest.mark.parametrize("qk_norm", ["full", "per_head"])
def test_norms_with_a_part_per_head_follow(qk_norm):
    model = (
        hostile_(
            VariantForCausalLM(
                VariantConfig(**SIZES, num_key_value_heads=2, qk_norm=qk_norm, norm_casting_mode="none")
            )
        )
        .double()
        .eval()
    )
    made = edit_model(model, [KeyValueHeads(4)])
    ids = torch.arange(20)[None]
    assert relative_error(made(ids).logits, model(ids).logits) < 1e-12
    assert edit_model(model, [KeyValueHeads(1)])(ids).logits.isfinite().all()


def test_layers_with_heads_of_their_own():
    own = {1: {"num_key_value_heads": 1, "intermediate_size": 8}}
    model = hostile_(VariantForCausalLM(VariantConfig(**SIZES, num_key_value_heads=2, per_layer_config=own))).eval()
    made = edit_model(model, [KeyValueHeads(2)])
    assert made.config.to_dict()["per_layer_config"] == {"1": {"intermediate_size": 8}}
    ids = torch.arange(20)[None]
    assert relative_error(made(ids).logits, model(ids).logits) < 1e-5


def test_ties(tmp_path):
    tied = hostile_(VariantForCausalLM(VariantConfig(**SIZES, tie_word_embeddings=True))).eval()
    ids = torch.arange(20)[None]
    untied = edit_model(tied, [Untie()])
    assert torch.equal(untied(ids).logits, tied(ids).logits)
    assert untied.lm_head.weight.data_ptr() != untied.model.embed_tokens.weight.data_ptr()
    again = edit_model(untied, [Tie()])
    assert torch.equal(again(ids).logits, tied(ids).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    other = hostile_(VariantForCausalLM(VariantConfig(**SIZES))).eval()
    with pytest.raises(SurgeryError, match="--force"):
        edit_model(other, [Tie()])
    forced = edit_model(other, [Tie(force=True)])
    assert torch.equal(forced.lm_head.weight, other.model.embed_tokens.weight)
    other.save_pretrained(tmp_path / "ours")
    assert main(["edit", str(tmp_path / "ours"), str(tmp_path / "tied"), "--tie"]) == 2
    assert main(["edit", str(tmp_path / "ours"), str(tmp_path / "tied"), "--tie", "--force"]) == 0


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "bloom", "gpt2", "smollm3", "olmo3"])
def test_a_decoder_becomes_an_encoder(model_type):
    row = ROWS[model_type]
    native = random_native(row, 1)
    ours = from_native(native)
    masked, base = (edit_model(ours, [ToEncoder(head)]) for head in ("masked-lm", "base"))
    assert isinstance(masked, VariantForMaskedLM)
    assert isinstance(base, VariantModel)
    batch = {"input_ids": inputs_of(native, row.length)["long"]["input_ids"]}
    with torch.no_grad():
        assert torch.equal(masked.model(**batch).last_hidden_state, base(**batch).last_hidden_state)
        # The first token sees the last, and of the decoder it does not.
        changed = batch["input_ids"].clone()
        changed[:, 3] = (changed[:, 3] + 1) % native.config.vocab_size
        assert not torch.equal(masked(changed).logits[:, 0], masked(**batch).logits[:, 0])
        assert torch.equal(ours(changed).logits[:, 0], ours(**batch).logits[:, 0])
    assert base.config.classifier_pooling == "mean"


@pytest.mark.parametrize("model_type", ["llama", "bert", "bart", "t5"])
def test_models_without_their_heads(model_type):
    row = ROWS[model_type]
    native = random_native(row, 0)
    ours = from_native(native)
    body = edit_model(ours, [DropHead()])
    for batch in inputs_of(native, row.length).values():
        assert torch.equal(body(**batch)[0], ours.base_model(**batch)[0])
    with pytest.raises(SurgeryError, match="no head"):
        edit_model(body, [DropHead()])


def test_encoder_alone_is_the_stock_class(tmp_path):
    native = random_native(ROWS["t5"], 0)
    native.save_pretrained(tmp_path / "native")
    report = edit(tmp_path / "native", tmp_path / "ours", [EncoderAlone()], native=tmp_path / "back")
    assert report.difference.same_bits
    assert not isinstance(report.native, str), report.native
    back = T5EncoderModel.from_pretrained(tmp_path / "back").eval()
    ids = torch.arange(20)[None]
    assert torch.equal(back(ids).last_hidden_state, native.encoder(ids).last_hidden_state)
    AutoModel.from_pretrained(tmp_path / "ours")
    with pytest.raises(SurgeryError, match="one stack"):
        edit_model(from_native(random_native(ROWS["llama"], 0)), [EncoderAlone()])


def test_a_classifier_on_the_body_of_a_language_model(tmp_path):
    ours = from_native(random_native(ROWS["llama"], 0))
    ours.save_pretrained(tmp_path / "ours")
    edit(tmp_path / "ours", tmp_path / "classifier", [ToClassifier(5)])
    made = VariantForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert made.config.num_labels == 5
    assert not (tmp_path / "classifier" / "generation_config.json").exists()
    state = made.state_dict()
    assert all(torch.equal(tensor, state[f"model.{name}"]) for name, tensor in ours.model.state_dict().items())
    again = edit_model(ours, [ToClassifier(5)]).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())


def test_refusals():
    model = VariantForCausalLM(VariantConfig(**SIZES, num_key_value_heads=4))
    for count in (0, 3, 8, -1):
        with pytest.raises(SurgeryError, match="do not divide"):
            edit_model(model, [KeyValueHeads(count)])
    six = VariantForCausalLM(
        VariantConfig(**SIZES | {"num_attention_heads": 12, "head_dim": 4}, num_key_value_heads=4)
    )
    with pytest.raises(SurgeryError, match="neither a divisor nor a multiple"):
        edit_model(six, [KeyValueHeads(6)])
    encoder = VariantModel(VariantConfig(**SIZES, is_causal=False))
    with pytest.raises(SurgeryError, match="encoder already"):
        edit_model(encoder, [ToEncoder()])
    with pytest.raises(SurgeryError, match="no LM head"):
        edit_model(encoder, [Untie()])
    with pytest.raises(SurgeryError, match="no LM head"):
        edit_model(VariantModel(VariantConfig(**SIZES)), [ToEncoder("masked-lm")])
