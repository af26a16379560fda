"""The doctor: every line is an answer of the code itself, or of a test that is in the table."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import hf_variants
import hf_variants_cli
from hf_variants import VariantConfig, VariantForCausalLM
from hf_variants.conversion import NotRepresentable
from hf_variants.conversion.engines import ENGINES, engine_room
from hf_variants.doctor import BACKENDS, DEGRADED, REFUSED, WORKS, doctor
from tests.tools import kinds


SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip


def saved(folder, **fields):
    VariantConfig(**{**SIZES, **fields}).save_pretrained(folder)
    return folder


def statuses(source, tool=None):
    return {finding.tool: finding.status for finding in doctor(source, tool)}


def test_what_works_everywhere_is_refused_nowhere(tmp_path):
    found = statuses(saved(tmp_path / "plain", num_key_value_heads=2))
    assert REFUSED not in found.values()
    assert {*BACKENDS.values(), "export to a native type", "Pipeline (2 processes)", "PEFT: LoRA"} <= found.keys()


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_engines_are_asked_themselves(kind, tmp_path):
    config = kinds.config(kind)
    config.save_pretrained(tmp_path / kind)
    found = statuses(tmp_path / kind, "export --engine")
    assert len(found) == len(ENGINES)
    for name in ENGINES:
        room = engine_room(name)
        try:
            room.refuse_unrepresentable(config)
            refused = False
        except NotRepresentable:
            refused = True
        assert (found[f"{room.NAME}: export --engine"] == REFUSED) == refused


@pytest.mark.parametrize(
    ("fields", "tool", "status", "named"),
    [
        ({"attention_sinks": True}, "attention: sdpa", REFUSED, "attention_sinks"),
        ({"attention_sinks": True}, "attention: eager", WORKS, ""),
        ({"attn_logit_softcapping": 5.0}, "continuous batching", REFUSED, "attn_logit_softcapping"),
        ({"position_embedding_type": "alibi"}, "vLLM", REFUSED, "position_embedding_type"),
        ({"lm_head_transform": True}, "vLLM", DEGRADED, "lm_head_transform"),
        ({"attention_gate": "headwise"}, "GGUF", REFUSED, "attention_gate"),
        ({"attention_gate": "headwise"}, "CTranslate2", REFUSED, "attention_gate"),
        ({"attention_gate": "headwise"}, "ONNX", WORKS, ""),
        ({"add_cross_attention": True}, "ONNX", REFUSED, "add_cross_attention"),
        ({"type_vocab_size": 2}, "ONNX", DEGRADED, "token types"),
        ({"norm_unit_offset": True}, "export to a native type", DEGRADED, "offset of 1"),
        ({"per_layer_config": {1: {"skip": ["mlp"]}}}, "export to a native type", REFUSED, "skip"),
        ({"hidden_act": "gelu"}, "GGUF", REFUSED, "hidden_act"),
        ({"is_causal": False, "position_embedding_type": "learned"}, "Pipeline (", REFUSED, "pp_size"),
        ({"qk_norm": "full"}, "Tensor parallel", DEGRADED, "q_proj"),
        ({"norm_affine": False, "norm_type": "layernorm", "norm_bias": False}, "LN-tuning", REFUSED, ""),
    ],
    ids=str,
)
def test_a_field_is_named_where_a_tool_loses_or_refuses_it(fields, tool, status, named, tmp_path):
    (finding,) = doctor(saved(tmp_path / "variant", **fields), tool)
    assert finding.status == status, finding
    assert named in finding.detail
    assert finding.evidence


def test_a_native_folder_is_asked_what_it_would_lose(tmp_path):
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8, head_dim=8)
    MistralForCausalLM(config).save_pretrained(tmp_path / "mistral")
    (finding,) = doctor(tmp_path / "mistral", "GGUF")
    assert finding.status == REFUSED
    assert "sliding_window" in finding.detail
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "llama")
    (finding,) = doctor(tmp_path / "llama", "GGUF")
    assert finding.status == WORKS


def test_what_a_server_of_transformers_makes_of_it(tmp_path):
    kinds.config("seq2seq").save_pretrained(tmp_path / "pairs")
    finding, *_ = doctor(tmp_path / "pairs", "transformers serve, OpenAI client")
    assert (finding.status, "unless streamed" in finding.detail) == (DEGRADED, True)
    assert statuses("llama", "transformers serve, OpenAI client")["transformers serve, OpenAI client"] == WORKS


def test_a_preset_is_asked_without_a_folder():
    assert statuses("llama", "native") == {"export to a native type": WORKS}


def test_the_command_prints_lines_and_json(tmp_path, capsys):
    folder = saved(tmp_path / "variant", attention_gate="headwise")
    assert hf_variants_cli.main(["doctor", str(folder), "--for", "gguf"]) == 0
    assert "attention_gate" in capsys.readouterr().out
    assert hf_variants_cli.main(["doctor", str(folder), "--for", "attention", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert {(each["tool"], each["status"]) for each in found} == {
        (tool, WORKS) for tool in BACKENDS.values() if tool.startswith("attention")
    }
    assert hf_variants_cli.main(["doctor", str(folder), "--for", "abacus"]) == 2
    assert "abacus" in capsys.readouterr().err


def test_it_reads_no_weight(tmp_path, monkeypatch):
    torch.manual_seed(0)
    VariantForCausalLM(VariantConfig(**SIZES)).save_pretrained(tmp_path / "variant")
    (tmp_path / "variant" / "model.safetensors").write_bytes(b"")
    assert statuses(tmp_path / "variant", "GGUF")
    with pytest.raises(Exception):  # noqa: B017, PT011
        AutoModelForCausalLM.from_pretrained(tmp_path / "variant")
    assert hf_variants.__version__


def test_the_tokenizer_is_looked_at(tmp_path):
    config = kinds.config("llama")
    config.save_pretrained(tmp_path / "variant")
    (before,) = doctor(tmp_path / "variant", "GGUF")
    tokenizer = kinds.tokenizer()
    tokenizer.save_pretrained(tmp_path / "variant")
    (finding,) = doctor(tmp_path / "variant", "GGUF")
    # Its kind, of whole words, is none of llama.cpp's.
    assert (before.status, finding.status) == (WORKS, DEGRADED)
    assert "no vocabulary" in finding.detail
    assert "WordLevel" in finding.detail
    (tmp_path / "variant" / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    (finding,) = doctor(tmp_path / "variant", "ONNX")
    assert finding.status == DEGRADED
    assert "tokenizer" in finding.detail
    (tmp_path / "variant" / "tokenizer_config.json").write_text("{")
    assert hf_variants_cli.main(["doctor", str(tmp_path / "variant")]) == 2
