"""ONNX on exported models: onnxruntime gives our scores and tokens, or a refusal by field; and what its check catches."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

import hf_variants
from hf_variants import VariantConfig, presets
from hf_variants.conversion import ConversionError, NotRepresentable, VerificationFailed, from_native
from hf_variants.conversion.engines import export_to_engine
from hf_variants.conversion.engines import onnx as room
from hf_variants.conversion.engines.export import in_float32
from hf_variants.conversion.engines.onnx import proof
from hf_variants.conversion.engines.onnx.graphs import MODEL, graphs_of
from tests.native_rows import all_rows
from tests.parity import random_native

from . import kinds
from .features import BASE, FEATURES, HEADS, RARER, variant, with_and_without


pytestmark = pytest.mark.whole

# A masked LM does not use a pooler; `HEADS` has a model that does.
ALL = {name: configs for name, configs in {**FEATURES, **RARER}.items() if name != "pooler"}
# Quick enough for every run; the others take several minutes.
SOME_FEATURES = (
    "norm kind",
    "window",
    "soft-cap of the scores",
    "interleaved",
    "layers that lack a sublayer",
    "pooler",
)
SOME_TYPES = ("gemma3_text", "mpt", "t5", "modernbert")


def sampled(names, some):
    return [name if name in some else pytest.param(name, marks=pytest.mark.exhaustive) for name in names]


def exported(model, folder, quantization=None):
    """What the check says of an exported model."""
    folder.mkdir()
    room.write(model, None, folder, quantization)
    return room.prove(folder, in_float32(model), None, quantization)[0]


def failed(checks):
    assert checks
    return [f"{check.name}: {check.detail}" for check in checks if not check.ok]


@pytest.mark.tool("ONNX, onnxruntime: export --engine", package="onnxruntime")
@pytest.mark.parametrize("kind", kinds.SHARDED_KINDS)
def test_a_folder_runs_and_has_what_lies_beside_a_model(kind, tmp_path):
    model, tokenizer = kinds.model(kind), kinds.tokenizer()
    model.save_pretrained(tmp_path / "variant")
    tokenizer.save_pretrained(tmp_path / "variant")
    report = export_to_engine(tmp_path / "variant", tmp_path / "engine", "onnx")
    assert report.ok
    assert report.checks
    read = AutoTokenizer.from_pretrained(tmp_path / "engine")
    assert read("the cat sees a red bird") == tokenizer("the cat sees a red bird")
    config = AutoConfig.from_pretrained(tmp_path / "engine")
    assert config.vocab_size == kinds.VOCABULARY
    assert json.loads((tmp_path / "engine" / "conversion_report.json").read_text())["verification"]["ok"]
    if kind in ("seq2seq", "encoder"):
        return
    assert GenerationConfig.from_pretrained(tmp_path / "engine").eos_token_id == model.generation_config.eos_token_id
    # As a user runs it: greedily, from the names in the file alone.
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "engine" / MODEL))
    ids = tokenizer("the cat sees a red bird", return_tensors="pt")["input_ids"]
    ours = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    past = {
        each.name: torch.zeros(1, each.shape[1], 0, each.shape[3]).numpy()
        for each in session.get_inputs()
        if each.name.startswith("past_key_values.")
    }
    assert len(past) == 2 * model.config.num_hidden_layers
    tokens, length = [], 0
    while len(tokens) < 8:
        length += ids.shape[1]
        fed = {
            "input_ids": ids, "attention_mask": torch.ones(1, length, dtype=torch.long),
            "position_ids": torch.arange(length - ids.shape[1], length)[None],
        }  # fmt: skip
        out = session.run(None, {name: tensor.numpy() for name, tensor in fed.items()} | past)
        named = dict(zip([each.name for each in session.get_outputs()], out))
        scores = torch.from_numpy(named["logits"])[0, -1]
        # As `min_new_tokens` has it.
        scores[model.generation_config.eos_token_id] = -torch.inf
        tokens.append(int(scores.argmax()))
        past = {name: named[name.replace("past_key_values", "present")] for name in past}
        ids = torch.tensor([tokens[-1:]])
    assert tokens == ours.tolist()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters"),
        ({"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_what_a_graph_cannot_do_is_refused_by_field(fields, named, tmp_path):
    variant({**BASE, **fields}).save_pretrained(tmp_path / "variant")
    with pytest.raises(NotRepresentable, match=f"`{named}`"):
        export_to_engine(tmp_path / "variant", tmp_path / "engine", "onnx")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("head", sampled(HEADS, ("reward model", "next sentence", "embeddings with a pooler")))
def test_heads(head, tmp_path):
    class_name, kind, fields = HEADS[head]
    model = kinds.model(kind, getattr(hf_variants, class_name), **fields)
    room.refuse_unrepresentable(model.config)
    checks = exported(model, tmp_path / "engine")
    assert not failed(checks)
    if "pooler" in fields:
        assert any("pooler_output" in check.name for check in checks)


@pytest.mark.parametrize("model_type", sampled(all_rows(), SOME_TYPES))
def test_every_native_type_runs_alike_or_is_refused(model_type, tmp_path):
    model = from_native(random_native(all_rows()[model_type], 0), dtype=torch.float32)
    in_the_way = {field for fields in room.stacks_in_the_way(model.config).values() for field in fields}
    assert in_the_way <= {"rope_parameters", "add_cross_attention"}
    if in_the_way:
        with pytest.raises(NotRepresentable):
            room.refuse_unrepresentable(model.config)
        return
    if not getattr(model.config, "decoder", model.config).is_causal and model.can_generate():
        with pytest.raises(ConversionError, match="`is_causal=False`"):
            room.losses(model)
        return
    assert not failed(exported(model, tmp_path / "engine"))


@pytest.mark.parametrize("name", sampled(presets(), ("falcon",)))
def test_every_preset_runs_alike(name, tmp_path):
    sizes = {**kinds.SIZES, "num_hidden_layers": 3}
    model = variant(VariantConfig.from_preset(name, **sizes).to_dict() | {"model_type": "hf_variant"})
    assert not failed(exported(model, tmp_path / "engine"))


@pytest.mark.parametrize("feature", sampled(ALL, SOME_FEATURES))
def test_a_feature_is_exported_and_missed_where_it_is_off(feature, tmp_path):
    """The mutation: what was written of the model that has a feature does not pass for the same one without it."""
    on, off = with_and_without(*ALL[feature])
    assert not failed(exported(on, tmp_path / "on"))
    off = in_float32(off)
    if sorted(names(on)) == sorted(names(off)):
        assert failed(proof.check(tmp_path / "on", off, None))


def names(model):
    return [tensor.name for graph in graphs_of(model) for tensor in (*graph.inputs, *graph.outputs)]


def test_tied_tables_and_several_graphs_store_a_weight_once(tmp_path):
    model = kinds.model("seq2seq", vocab_size=4096)
    model.save_pretrained(tmp_path / "variant")
    report = export_to_engine(tmp_path / "variant", tmp_path / "engine", "onnx")
    assert report.ok
    (weights,) = (tmp_path / "engine").glob("*_data")
    assert weights.name == "encoder_model.onnx_data"
    stored = sum(tensor.nbytes for tensor in {id(t): t for t in model.parameters()}.values())
    assert stored < weights.stat().st_size < 1.4 * stored


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_stored_as_it_is_and_computed_in_float32(dtype, tmp_path):
    model = kinds.model("llama", vocab_size=4096).to(dtype)
    model.save_pretrained(tmp_path / "variant")
    assert export_to_engine(tmp_path / "variant", tmp_path / "engine", "onnx").ok
    (weights,) = (tmp_path / "engine").glob("*_data")
    assert weights.stat().st_size < 1.3 * 2 * model.num_parameters()


def test_weights_are_rounded_on_request(tmp_path):
    model = kinds.model("llama", vocab_size=4096)
    model.save_pretrained(tmp_path / "variant")
    report = export_to_engine(tmp_path / "variant", tmp_path / "engine", "onnx", quantization="float16")
    assert report.ok
    assert any("KL" in check.detail for check in report.checks)
    with pytest.raises(ValueError, match="float16"):
        export_to_engine(tmp_path / "variant", tmp_path / "other", "onnx", quantization="int4")


def test_nothing_is_left_of_an_export_that_differs(tmp_path, monkeypatch):
    kinds.model("llama").save_pretrained(tmp_path / "variant")
    traced = room.traced

    def wrong(graph):
        graph.model.model.layers[1].self_attn.scaling *= 1.1
        made = traced(graph)
        graph.model.model.layers[1].self_attn.scaling /= 1.1
        return made

    monkeypatch.setattr(room, "traced", wrong)
    with pytest.raises(VerificationFailed, match="scores of"):
        export_to_engine(tmp_path / "variant", tmp_path / "engine", "onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["variant"]
