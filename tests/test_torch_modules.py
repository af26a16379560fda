"""torch.nn's Transformer modules against the variants that they convert to, and back."""

import itertools

import pytest
import torch
from torch import nn

import hf_variants
from hf_variants.conversion import ConversionError, NotRepresentable, from_torch, to_torch


OPTIONS = list(itertools.product((False, True), (False, True), ("relu", "gelu")))


def randomise_(module: nn.Module) -> nn.Module:
    """Weights far from their initial values, so that no norm or bias can be lost unnoticed."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = 0.3 if parameter.ndim > 1 else 0.5
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, spread)
    return module.eval()


def assert_close(ours: torch.Tensor, reference: torch.Tensor) -> None:
    # torch computes q, k and v as one product, we as three: the same sums in another order.
    assert (ours - reference).abs().max() < 1e-5 * reference.std()


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(("norm_first", "bias", "activation"), OPTIONS)
@pytest.mark.parametrize("final_norm", [False, True])
def test_encoder(norm_first, bias, activation, final_norm):
    layer = nn.TransformerEncoderLayer(
        32, 4, 48, activation=activation, batch_first=True, norm_first=norm_first, bias=bias
    )
    norm = nn.LayerNorm(32, bias=bias) if final_norm else None
    module = randomise_(nn.TransformerEncoder(layer, 3, norm, enable_nested_tensor=False))
    ours = from_torch(module)
    x = torch.randn(2, 9, 32)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    assert_close(ours(inputs_embeds=x).last_hidden_state, module(x))
    padded = ours(inputs_embeds=x, attention_mask=mask).last_hidden_state[mask.bool()]
    assert_close(padded, module(x, src_key_padding_mask=mask == 0)[mask.bool()])
    assert same_weights(to_torch(ours), module)


@pytest.mark.parametrize(("norm_first", "bias", "activation"), OPTIONS)
def test_encoder_decoder(norm_first, bias, activation):
    module = randomise_(
        nn.Transformer(32, 4, 2, 3, 48, activation=activation, batch_first=True, norm_first=norm_first, bias=bias)
    )
    ours = from_torch(module)
    source, target = torch.randn(2, 9, 32), torch.randn(2, 6, 32)
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    made = ours(inputs_embeds=source, decoder_inputs_embeds=target).last_hidden_state
    assert_close(made, module(source, target, tgt_mask=causal))
    assert same_weights(to_torch(ours), module)


def test_decoder_alone():
    layer = nn.TransformerDecoderLayer(32, 4, 48, batch_first=True)
    module = randomise_(nn.TransformerDecoder(layer, 2))
    ours = from_torch(module)
    memory, target = torch.randn(2, 9, 32), torch.randn(2, 6, 32)
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    made = ours(inputs_embeds=target, encoder_hidden_states=memory, use_cache=False).last_hidden_state
    assert_close(made, module(target, memory, tgt_mask=causal))
    assert same_weights(to_torch(ours), module)


def test_single_layers():
    layer = randomise_(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=True))
    x, memory = torch.randn(2, 9, 32), torch.randn(2, 5, 32)
    ours = from_torch(layer)
    assert_close(ours(inputs_embeds=x).last_hidden_state, layer(x))
    assert same_weights(to_torch(ours).layers[0], layer)
    layer = randomise_(nn.TransformerDecoderLayer(32, 4, 48, batch_first=True))
    ours = from_torch(layer)
    causal = nn.Transformer.generate_square_subsequent_mask(9)
    made = ours(inputs_embeds=x, encoder_hidden_states=memory, use_cache=False).last_hidden_state
    assert_close(made, layer(x, memory, tgt_mask=causal))
    assert same_weights(to_torch(ours).layers[0], layer)


def test_state_dict_needs_the_number_of_heads():
    module = randomise_(nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2))
    with pytest.raises(ConversionError, match="num_heads"):
        from_torch(module.state_dict())
    ours = from_torch(module.state_dict(), num_heads=4)
    x = torch.randn(2, 9, 32)
    assert_close(ours(inputs_embeds=x).last_hidden_state, module(x))


def test_other_modules_are_refused():
    with pytest.raises(ConversionError, match="no torch"):
        from_torch(nn.Linear(3, 3))
    with pytest.raises(ConversionError, match="in_proj_weight"):
        from_torch(nn.Linear(3, 3).state_dict(), num_heads=1)


def test_what_torch_cannot_express_is_named():
    config = hf_variants.VariantConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(NotRepresentable) as error:
        to_torch(hf_variants.VariantForCausalLM(config))
    assert {"norm_type", "ffn_type", "position_embedding_type"} <= error.value.fields.keys()


def test_the_vanilla_preset_is_the_2017_model():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    stack = hf_variants.VariantConfig.from_preset("vanilla", vocab_size=40, pad_token_id=0, **sizes)
    config = hf_variants.VariantSeq2SeqConfig(encoder=stack, decoder=stack, decoder_start_token_id=1)
    ours = randomise_(hf_variants.VariantForConditionalGeneration(config))
    module = to_torch(ours)
    source, target = torch.randint(1, 40, (2, 9)), torch.randint(1, 40, (2, 6))

    def embed(model, ids):
        # Embedding times sqrt(d), plus the paper's sinusoids.
        steps = torch.arange(ids.shape[1], dtype=torch.float64)[:, None]
        angles = steps / 10000 ** (2 * torch.arange(16, dtype=torch.float64) / 32)
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()
        return model.embed_tokens.weight[ids] * 32**0.5 + table

    causal = nn.Transformer.generate_square_subsequent_mask(6)
    states = module(embed(ours.model.encoder, source), embed(ours.model.decoder, target), tgt_mask=causal)
    expected = states @ ours.lm_head.weight.T
    assert_close(ours(input_ids=source, decoder_input_ids=target).logits, expected)
