"""Two stacks of one or two models, and embedders."""

import json

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM

from hf_variants import VariantConfig, VariantForCausalLM, VariantModel
from hf_variants.conversion import from_native
from hf_variants.surgery import SurgeryError, ToEmbedder, ToEncoder, ToEncoderDecoder, edit_model
from hf_variants_cli import main
from tests.parity import hostile_, inputs_of, random_native
from tests.surgery_models import IDS, ROWS, SIZES
from tests.test_surgery_vocabulary import TEXT, trained


@pytest.mark.parametrize(
    "model_type",
    [
        "gemma3_text",
        "gpt2",
        *(pytest.param(name, marks=pytest.mark.whole) for name in ("llama", "qwen3", "smollm3", "olmo3", "bloom")),
    ],
)
def test_a_language_model_is_a_decoder_that_computes_what_it_did(model_type):
    row = ROWS[model_type]
    natives = (random_native(row, seed) for seed in range(9))
    # Where a branch joins the normalised input, one more normalises once more.
    native = next(n for n in natives if not getattr(n.config, "apply_residual_connection_post_layernorm", False))
    ours = from_native(native)
    made, copied = (edit_model(ours, [ToEncoderDecoder(cross)]) for cross in ("zero", "copy"))
    ids = inputs_of(native, row.length)["long"]["input_ids"]
    with torch.no_grad():
        expected = ours(input_ids=ids, use_cache=False).logits
        assert torch.equal(made(input_ids=ids.flip(1), decoder_input_ids=ids, use_cache=False).logits, expected)
        assert not torch.equal(copied(input_ids=ids.flip(1), decoder_input_ids=ids, use_cache=False).logits, expected)
        # The encoder is the model that sees all.
        encoded = edit_model(ours, [ToEncoder()])(input_ids=ids).last_hidden_state
        assert torch.equal(made.model.encoder(input_ids=ids).last_hidden_state, encoded)
    for number, layer in enumerate(copied.model.decoder.layers):
        state = ours.model.layers[number].self_attn.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in layer.cross_attn.state_dict().items())


@pytest.mark.parametrize("cross", ["zero", "copy"])
def test_a_first_layer_without_a_norm_gets_a_neutral_one_before_its_cross_attention(cross):
    model = hostile_(VariantForCausalLM(VariantConfig(**SIZES, first_layer_pre_norm=False))).eval()
    made = edit_model(model, [ToEncoderDecoder(cross)])
    assert (made.model.decoder.layers[0].cross_attn_pre_norm.weight == 1).all()
    if cross == "zero":
        assert torch.equal(made(IDS.flip(1), decoder_input_ids=IDS).logits, model(IDS).logits)


def test_an_encoder_of_another_checkpoint(tmp_path):
    decoder = hostile_(VariantForCausalLM(VariantConfig(**SIZES, tie_word_embeddings=True))).eval()
    encoder = hostile_(VariantModel(VariantConfig(**SIZES | {"num_hidden_layers": 3}, is_causal=False))).eval()
    decoder.save_pretrained(tmp_path / "decoder")
    encoder.save_pretrained(tmp_path / "encoder")
    command = ["edit", str(tmp_path / "decoder"), str(tmp_path / "both"), "--to-encoder-decoder", "zero"]
    assert main([*command, "--encoder", str(tmp_path / "encoder")]) == 0
    made = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "both").eval()
    assert torch.equal(made.model.encoder(IDS).last_hidden_state, encoder(IDS).last_hidden_state)
    assert torch.equal(made(IDS.flip(1), decoder_input_ids=IDS).logits, decoder(IDS).logits)
    assert made.generate(IDS, max_new_tokens=3).shape[1] <= 4
    report = json.loads((tmp_path / "both" / "conversion_report.json").read_text())
    assert report["exactness"] == "same bits"
    assert report["difference"]["same_bits"]
    made(IDS, labels=IDS).loss.backward()
    assert made.model.decoder.layers[0].cross_attn.o_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_an_embedder_has_its_pooling_beside_it(pooling, tmp_path):
    tokenizer = trained("byte bpe")
    native = hostile_(LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": len(tokenizer)}))).eval()
    native.save_pretrained(tmp_path / "native")
    tokenizer.save_pretrained(tmp_path / "native")
    assert main(["edit", str(tmp_path / "native"), str(tmp_path / "ours"), "--to-embedder", pooling]) == 0
    made = VariantModel.from_pretrained(tmp_path / "ours").eval()
    assert made.config.is_causal == (pooling == "last")
    settings = json.loads((tmp_path / "ours" / "1_Pooling" / "config.json").read_text())
    assert settings["pooling_mode_mean_tokens"] == (pooling == "mean")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    states = made(ids).last_hidden_state[0]
    expected = states.mean(0) if pooling == "mean" else states[-1]
    assert torch.allclose(torch.tensor(model.encode(TEXT)), expected, atol=1e-4)


def test_refusals(tmp_path):
    model = VariantForCausalLM(VariantConfig(**SIZES))
    body = VariantModel(VariantConfig(**SIZES, is_causal=False))
    VariantModel(VariantConfig(**SIZES | {"hidden_size": 32}, is_causal=False)).save_pretrained(tmp_path / "wide")
    VariantModel(VariantConfig(**SIZES | {"vocab_size": 50}, is_causal=False)).save_pretrained(tmp_path / "other")
    for subject, operation, words in (
        (body, ToEncoderDecoder(), "no language model"),
        (model, ToEncoderDecoder("one"), "zero or copy"),
        (model, ToEncoderDecoder("zero", str(tmp_path / "wide")), "--hidden-size"),
        (model, ToEncoderDecoder("zero", str(tmp_path / "other")), "50 tokens"),
        (body, ToEmbedder("last"), "Give mean"),
        (model, ToEmbedder("cls"), "mean or last"),
    ):
        with pytest.raises(SurgeryError, match=words):
            edit_model(subject, [operation])
