"""CTranslate2 on exported models: the same scores and tokens as ours, or a refusal by field; and what its check catches."""

import pytest
import torch

import hf_variants
from hf_variants import VariantConfig, presets
from hf_variants.conversion import ConversionError, NotRepresentable, VerificationFailed, from_native
from hf_variants.conversion.engines import ctranslate2, export_to_engine
from hf_variants.conversion.engines.export import in_float32
from tests.native_rows import all_rows
from tests.parity import random_native

from . import kinds
from .features import FEATURES, HEADS, variant, with_and_without


ENGINE = pytest.mark.tool("CTranslate2: export --engine", package="ctranslate2")
pytestmark = pytest.mark.whole


def exported(model, folder, quantization=None, reference=None):
    """What the engine's check says of an exported model, compared with `reference` or itself."""
    folder.mkdir()
    ctranslate2.write(model, None, folder, quantization)
    checks, _ = ctranslate2.prove(folder, in_float32(reference or model), None, quantization)
    return checks


def failed(checks):
    assert checks
    return [f"{check.name}: {check.detail}" for check in checks if not check.ok]


@ENGINE
@pytest.mark.parametrize("kind", [kind for kind in kinds.KINDS if kind != "gemma2"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_folder_runs_and_has_its_tokenizer(kind, quantization, tmp_path):
    model, tokenizer = kinds.model(kind), kinds.tokenizer()
    model.save_pretrained(tmp_path / "variant")
    tokenizer.save_pretrained(tmp_path / "variant")
    report = export_to_engine(tmp_path / "variant", tmp_path / "engine", "ctranslate2", quantization=quantization)
    assert report.checks
    assert report.ok
    assert (tmp_path / "engine" / "tokenizer.json").is_file()
    if kind in kinds.DECODERS:
        # As its users call it: text in, text out.
        import ctranslate2 as engine
        from transformers import AutoTokenizer

        read = AutoTokenizer.from_pretrained(tmp_path / "engine")
        text = "the cat sees a red bird"
        generator = engine.Generator(str(tmp_path / "engine"), compute_type="default" if quantization else "float32")
        prompt = read.convert_ids_to_tokens(read(text)["input_ids"])
        made = generator.generate_batch([prompt], max_length=8, sampling_topk=1, include_prompt_in_result=False)[0]
        ours = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=8, do_sample=False)[0]
        expected = [index for index in ours[len(prompt) :].tolist() if index != tokenizer.eos_token_id]
        if quantization is None:
            assert made.sequences_ids[0] == expected


@pytest.mark.tool("CTranslate2: export --engine", package="ctranslate2", refused=True)
@pytest.mark.parametrize("kind", ["gemma2"])
def test_what_the_engine_would_drop_is_refused(kind, tmp_path):
    kinds.model(kind).save_pretrained(tmp_path / "variant")
    with pytest.raises(NotRepresentable, match="`attn_logit_softcapping`"):
        export_to_engine(tmp_path / "variant", tmp_path / "engine", "ctranslate2")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("model_type", all_rows())
def test_every_native_type_runs_alike_or_is_refused(model_type, tmp_path):
    outcomes = []
    for seed in range(3):
        model = from_native(random_native(all_rows()[model_type], seed), dtype=torch.float32)
        try:
            ctranslate2.refuse_unrepresentable(model.config)
        except NotRepresentable as refusal:
            outcomes.append(refusal.fields)
            continue
        outcomes.append(failed(exported(model, tmp_path / str(seed))))
    assert all(isinstance(outcome, dict) or not outcome for outcome in outcomes), outcomes


@pytest.mark.parametrize("name", presets())
def test_every_preset_runs_alike_or_is_refused(name, tmp_path):
    sizes = {**kinds.SIZES, "num_hidden_layers": 3}
    model = variant(VariantConfig.from_preset(name, **sizes).to_dict() | {"model_type": "hf_variant"})
    refused = {"deepnorm", "exaone4", "gemma2", "nanochat", "nemotron", "olmo2", "olmo3"}
    if name in refused:
        with pytest.raises(NotRepresentable):
            ctranslate2.refuse_unrepresentable(model.config)
        return
    ctranslate2.refuse_unrepresentable(model.config)
    assert not failed(exported(model, tmp_path / "engine"))


@pytest.mark.parametrize("head", HEADS)
def test_encoders_leave_their_head_behind_and_decoders_without_one_are_refused(head, tmp_path):
    class_name, kind, fields = HEADS[head]
    kinds.model(kind, getattr(hf_variants, class_name), **fields).save_pretrained(tmp_path / "variant")
    if kind == "encoder":
        report = export_to_engine(tmp_path / "variant", tmp_path / "engine", "ctranslate2")
        assert report.ok
        assert any(class_name in note for note in report.notes)
        return
    with pytest.raises(ConversionError, match=f"{class_name} has no head that gives tokens"):
        export_to_engine(tmp_path / "variant", tmp_path / "engine", "ctranslate2")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_is_exported_and_missed_where_it_is_off(feature, tmp_path):
    """The mutation: the same weights written without the feature do not pass for the model that has it."""
    on, off = with_and_without(*FEATURES[feature])
    ctranslate2.refuse_unrepresentable(on.config)
    ctranslate2.refuse_unrepresentable(off.config)
    assert failed(exported(off, tmp_path / "off", reference=on))
    assert not failed(exported(on, tmp_path / "on"))


def test_nothing_is_left_of_an_export_that_differs(tmp_path, monkeypatch):
    kinds.model("llama").save_pretrained(tmp_path / "variant")
    build_spec = ctranslate2.build_spec

    def wrong(model):
        spec = build_spec(model)
        spec.decoder.layer[1].self_attention.rotary_interleave = True
        return spec

    monkeypatch.setattr(ctranslate2, "build_spec", wrong)
    with pytest.raises(VerificationFailed, match="scores of"):
        export_to_engine(tmp_path / "variant", tmp_path / "engine", "ctranslate2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["variant"]


def test_half_precision_is_written_as_it_is_stored(tmp_path):
    model = kinds.model("llama", residual_multiplier=0.3).bfloat16()
    model.save_pretrained(tmp_path / "variant")
    assert export_to_engine(tmp_path / "variant", tmp_path / "engine", "ctranslate2").ok
    small, large = ((tmp_path / "engine").joinpath("model.bin").stat().st_size, 4 * model.num_parameters())
    assert small < 0.8 * large


def test_unknown_quantizations_are_refused(tmp_path):
    with pytest.raises(ValueError, match="int8_float16"):
        export_to_engine(tmp_path, tmp_path / "engine", "ctranslate2", quantization="int4")
