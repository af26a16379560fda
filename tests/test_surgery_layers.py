"""Depth: against stock models whose module lists and configs were edited by hand."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from hf_variants import VariantConfig, VariantForCausalLM, VariantForConditionalGeneration, VariantSeq2SeqConfig
from hf_variants.conversion import convert, from_native
from hf_variants.conversion.family import family_of
from hf_variants.surgery import DropLayers, GrowLayers, SelectLayers, Subject, SurgeryError, edit, edit_model
from hf_variants.surgery.layers import parse_layers
from hf_variants_cli import main
from tests.parity import hostile_, inputs_of, logits_of, random_native, relative_error, set_backend
from tests.surgery_models import NAMED, ROWS


# Every other type the same way.
TYPES = [pytest.param(name, marks=() if name in NAMED else pytest.mark.slow) for name in ROWS]
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}


def by_hand(native, layers, stack=""):
    """A stock model with copies of these layers in its module list, and the lists and the depth of its config edited."""
    native = copy.deepcopy(native)
    body = getattr(native, f"get_{stack}")() if stack else native.base_model
    configs = {id(config): config for config in (native.config, body.config)}
    parent, name, blocks = next(
        (parent, name, module)
        for parent in body.modules()
        for name, module in parent.named_children()
        if isinstance(module, nn.ModuleList)
    )
    first = blocks[0]
    setattr(parent, name, nn.ModuleList(copy.deepcopy(blocks[layer], configs.copy()) for layer in layers))
    attention = getattr(getattr(first, "layer", [None])[0], "SelfAttention", None) if hasattr(first, "layer") else None
    if attention is not None and native.config.model_type in ("t5", "mt5"):
        # The table of the stack lies in its first layer.
        for place, block in enumerate(getattr(parent, name)):
            own = block.layer[0].SelfAttention
            own.has_relative_attention_bias = place == 0
            if place == 0:
                own.relative_attention_bias = copy.deepcopy(attention.relative_attention_bias)
    for config in configs.values():
        for key, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == len(blocks) and key != "architectures":
                setattr(config, key, [value[layer] for layer in layers])
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if key in vars(body.config):
            setattr(body.config, key, len(layers))
    return native


def stacks_of(model):
    return ("encoder", "decoder") if model.config.is_encoder_decoder else ("",)


def assert_same(a, b, native, row):
    backends = row.backends if isinstance(row.backends, tuple) else row.backends(native.config)
    set_backend(a, b, backends[0])
    bound = 0.0 if type(a) is type(b) else family_of(native.config.model_type).bound(b.config)
    for name, batch in inputs_of(native, row.length).items():
        # Stock caches have as many layers as the config said on construction.
        batch = batch | ({"use_cache": False} if row.generates and native.can_generate() else {})
        # Equal bits, but for what the family says of the installed release (GPT-J since 5.24).
        assert relative_error(logits_of(b, batch), logits_of(a, batch)) <= bound, name


@pytest.mark.parametrize("model_type", TYPES)
def test_layers_are_those_of_a_stock_model_edited_by_hand(model_type):
    row = ROWS[model_type]
    native = random_native(row, 1)
    ours = from_native(native)
    for stack in stacks_of(native):
        depth = Subject.of_model(ours).stacks[stack].num_hidden_layers
        layers = [depth - 1, *range(depth - 1), depth - 1]
        if not Subject.of_model(ours).stacks[stack].first_layer_pre_norm:
            layers = [0, depth - 1, *range(1, depth)]
        assert_same(by_hand(native, layers, stack), edit_model(ours, [SelectLayers(layers, stack)]), native, row)


@pytest.mark.parametrize("model_type", TYPES)
def test_grown_layers_are_the_identity_or_refused_by_name(model_type):
    row = ROWS[model_type]
    native = random_native(row, 1)
    ours = from_native(native)
    for stack in stacks_of(native):
        config = Subject.of_model(ours).stacks[stack]
        last = config.num_hidden_layers - 1
        grow = GrowLayers([last, last, min(1, last)], stack)
        if config.norm_placement == "post":
            with pytest.raises(SurgeryError, match="norm_placement"):
                edit_model(ours, [grow])
        elif config.residual_from_norm:
            with pytest.raises(SurgeryError, match="residual_from_norm"):
                edit_model(ours, [grow])
        else:
            grown = edit_model(ours, [grow])
            assert Subject.of_model(grown).stacks[stack].num_hidden_layers == last + 4
            assert_same(ours, grown, native, row)


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_placement": "branch"},
        {"norm_placement": "branch", "norm_affine": False},
        {"norm_placement": "sandwich", "norm_unit_offset": True},
        {"norm_placement": "sandwich", "norm_type": "layernorm"},
        {"norm_type": "layernorm", "norm_placement": "sandwich", "norm_casting_mode": "gemma", "norm_bias": False},
        {"learned_scale_type": "channel"},
        {"learned_scale_type": "scalar"},
        {"parallel_block": "shared_norm", "attention_output_bias": True, "mlp_output_bias": True},
        {"parallel_block": "two_norms"},
        {"attention_sub_norm": True, "ffn_sub_norm": True, "residual_multiplier": 0.3},
    ],
)
def test_new_layers_learn_and_are_the_identity_under_every_placement(fields):
    model = hostile_(VariantForCausalLM(VariantConfig(**SIZES, num_hidden_layers=3, **fields))).eval()
    grown = edit_model(model, [GrowLayers("0-2,1")])
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, grown(ids).logits)
    grown(ids, labels=ids).loss.backward()
    new = [p for name, p in grown.named_parameters() if ".layers.1." in name]
    assert all(torch.isfinite(p.grad).all() for p in new)
    assert any(p.grad.abs().max() > 0 for p in new)


def test_layers_with_fields_of_their_own_take_them_along():
    own = {1: {"num_key_value_heads": 1, "head_dim": 8}, 2: {"skip": ["mlp"]}, 3: {"intermediate_size": 40}}
    model = hostile_(VariantForCausalLM(VariantConfig(**SIZES, num_hidden_layers=4, per_layer_config=own))).eval()
    made = edit_model(model, [SelectLayers("3,1-2,1")])
    assert made.config.to_dict()["per_layer_config"] == {
        "0": {"intermediate_size": 40},
        "1": {"num_key_value_heads": 1, "head_dim": 8},
        "2": {"skip": ["mlp"]},
        "3": {"num_key_value_heads": 1, "head_dim": 8},
    }
    for new, old in enumerate((3, 1, 2, 1)):
        ours, theirs = made.model.layers[new].state_dict(), model.model.layers[old].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_first_layer_without_a_norm_stays_first_or_goes():
    model = VariantForCausalLM(VariantConfig(**SIZES, num_hidden_layers=3, first_layer_pre_norm=False))
    assert not edit_model(model, [SelectLayers("0,2")]).config.first_layer_pre_norm
    assert edit_model(model, [SelectLayers("2,1")]).config.first_layer_pre_norm
    for layers in ("1,0", "0,0", "0-2,0"):
        with pytest.raises(SurgeryError, match="first_layer_pre_norm"):
            edit_model(model, [SelectLayers(layers)])


def test_deepnorm_keeps_its_constants_or_derives_them_anew():
    config = VariantConfig.from_preset("deepnorm", **SIZES, num_hidden_layers=8)
    model = VariantForCausalLM(config)
    kept = edit_model(model, [SelectLayers("0-1")]).config
    assert (kept.deepnorm_alpha, kept.deepnorm_beta) == (config.deepnorm_alpha, config.deepnorm_beta)
    derived = edit_model(model, [SelectLayers("0-1", deepnorm="derive")]).config
    assert derived.deepnorm_alpha == 4**0.25
    with pytest.raises(SurgeryError, match="norm_placement"):
        edit_model(model, [GrowLayers("1")])


def test_deepnorm_of_an_encoder_decoder_is_derived_from_both_depths():
    deepnorm = VariantConfig.from_preset("deepnorm", **SIZES).to_dict()
    for name in ("deepnorm_alpha", "deepnorm_beta", "num_hidden_layers", "layer_types", "no_rope_layers"):
        deepnorm.pop(name)

    def config(encoder, decoder):
        return VariantSeq2SeqConfig(
            encoder=deepnorm | {"num_hidden_layers": encoder}, decoder=deepnorm | {"num_hidden_layers": decoder}
        )

    model = VariantForConditionalGeneration(config(4, 6))
    made = edit_model(model, [SelectLayers("0-2", "decoder", deepnorm="derive")]).config
    kept = edit_model(model, [SelectLayers("0-2", "decoder")]).config
    for stack in ("encoder", "decoder"):
        assert getattr(made, stack).deepnorm_alpha == getattr(config(4, 3), stack).deepnorm_alpha
        assert getattr(kept, stack).deepnorm_alpha == getattr(model.config, stack).deepnorm_alpha


@pytest.mark.parametrize("model_type", ["qwen2", "smollm3", "gemma3_text", "olmo3", "t5"])
def test_a_native_folder_becomes_one_of_the_same_type(model_type, tmp_path):
    row = ROWS[model_type]
    native = random_native(row, 0)
    native.save_pretrained(tmp_path / "native")
    stack = stacks_of(native)[-1]
    layers = [2, 0, 1, 1] if Subject.of_model(from_native(native)).stacks[stack].num_hidden_layers > 2 else [1, 0, 0]
    report = edit(tmp_path / "native", tmp_path / "ours", [SelectLayers(layers, stack)], native=tmp_path / "back")
    assert report.native.model_type == model_type
    back = type(native).from_pretrained(tmp_path / "back").eval()
    assert_same(by_hand(native, layers, stack), back, native, row)


def test_depth_in_leftovers_follows(tmp_path):
    config = Qwen2Config(**SIZES, num_key_value_heads=2, num_hidden_layers=4, max_window_layers=4)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "native")
    edit(tmp_path / "native", tmp_path / "ours", [DropLayers("1")], native=tmp_path / "back")
    # Engines take it for the depth.
    assert json.loads((tmp_path / "back" / "config.json").read_text())["max_window_layers"] == 3


def test_report_card_and_json_say_what_was_done(tmp_path, capsys):
    random_native(ROWS["llama"], 0).save_pretrained(tmp_path / "native")
    command = ["edit", str(tmp_path / "native"), str(tmp_path / "ours"), "--json", str(tmp_path / "report.json")]
    assert main([*command, "--grow-layers", "0,1", "--drop-layers", "0", "--native"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert [outcome["exactness"] for outcome in report["operations"]] == ["same bits", "approximate"]
    assert report["exactness"] == "approximate"
    assert not report["difference"]["same_bits"]
    assert json.loads((tmp_path / "ours" / "conversion_report.json").read_text())["operations"] == report["operations"]
    for text in (printed, (tmp_path / "ours" / "README.md").read_text()):
        assert "2 new layers behind 0-1, as the identity: same bits" in text
        assert "approximate" in text
    assert AutoConfig.from_pretrained(tmp_path / "ours-native").model_type == "llama"
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours")


def test_identity_growth_is_measured(tmp_path):
    random_native(ROWS["gemma3_text"], 0).save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "variant")
    for source in ("native", "variant"):
        report = edit(tmp_path / source, tmp_path / f"from-{source}", [GrowLayers("1")])
        assert report.difference.same_bits
        assert report.exactness == "same bits"
        assert report.parameters > report.parameters_before


def test_what_no_native_type_expresses_is_written_as_a_variant(tmp_path, capsys):
    row = ROWS["gpt2"]
    config = GPT2Config(
        vocab_size=40,
        n_embd=16,
        n_head=4,
        n_layer=2,
        scale_attn_by_inverse_layer_idx=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    native = hostile_(GPT2LMHeadModel(config)).eval()
    native.save_pretrained(tmp_path / "native")
    command = ["edit", str(tmp_path / "native"), str(tmp_path / "ours"), "--layers", "1,0", "--no-measure"]
    assert main([*command, "--native", "--to", "gpt2"]) == 1
    assert "attention_scaling" in capsys.readouterr().out
    made = VariantForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert_same(by_hand(native, [1, 0]), made, native, row)


def test_layers_are_read():
    assert parse_layers("0-2, 1-3") == (0, 1, 2, 1, 2, 3)
    assert parse_layers("3-1,7") == (3, 2, 1, 7)
    for text in ("", "a", "1-", "-1", "1,,2", "1.5"):
        with pytest.raises(SurgeryError, match="list of layers"):
            parse_layers(text)


def test_refusals(tmp_path):
    model = VariantForCausalLM(VariantConfig(**SIZES, num_hidden_layers=3))
    for operation in (SelectLayers("0-3"), DropLayers([3]), GrowLayers("5"), SelectLayers([-1])):
        with pytest.raises(SurgeryError, match="There is no layer"):
            edit_model(model, [operation])
    with pytest.raises(SurgeryError, match="No layer is left"):
        edit_model(model, [DropLayers("0-2")])
    with pytest.raises(SurgeryError, match="one stack"):
        edit_model(model, [SelectLayers("0", "encoder")])
    two = VariantForConditionalGeneration(
        VariantSeq2SeqConfig(encoder=SIZES | {"num_hidden_layers": 2}, decoder=SIZES | {"num_hidden_layers": 2})
    )
    with pytest.raises(SurgeryError, match="two stacks"):
        edit_model(two, [SelectLayers("0")])
    with pytest.raises(SurgeryError, match="nothing to do"):
        edit(tmp_path, tmp_path / "new", [])
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(FileExistsError):
        edit(tmp_path / "ours", tmp_path / "ours", [DropLayers("0")])
    settings = json.loads((tmp_path / "ours" / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "ours" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="quantised"):
        edit(tmp_path / "ours", tmp_path / "new", [DropLayers("0")])
    assert not (tmp_path / "new").exists()
