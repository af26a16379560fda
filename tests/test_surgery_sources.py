"""What edit is given: checkpoints of several dtypes, for an attention that is not here, with damaged modules beside them."""

import hashlib
import json
import re
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_variants.conversion import convert
from hf_variants.conversion.errors import ConversionError
from hf_variants.conversion.opened_variant import open_variant
from hf_variants.conversion.tensor_files import Unread
from hf_variants.surgery import (
    ContextLength,
    DropLayers,
    FeedForwardWidth,
    FuseNorms,
    GrowLayers,
    KeyValueHeads,
    SelectLayers,
    Subject,
    edit,
)
from hf_variants_cli import main
from tests.parity import hostile_


SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_the_record_has_the_hashes_of_what_was_read_and_of_the_result(tmp_path):
    native = hostile_(LlamaForCausalLM(LlamaConfig(**SIZES)))
    native.save_pretrained(tmp_path / "native")
    edit(tmp_path / "native", tmp_path / "edited", [DropLayers("1"), KeyValueHeads(2)], measure=False)
    record = json.loads((tmp_path / "edited" / "conversion_report.json").read_text())
    assert record["sha256"] == record["source_sha256"] == {}
    for key, place in (("tensor_sha256", "edited"), ("source_tensor_sha256", "native")):
        tensors = load_file(tmp_path / place / "model.safetensors")
        if place == "native":
            tensors = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
        assert record[key] == {
            name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()
        }


def test_tensors_that_no_operation_changes_come_unread(tmp_path):
    native = hostile_(LlamaForCausalLM(LlamaConfig(**SIZES)))
    native.save_pretrained(tmp_path / "native")
    subject = Subject.of(open_variant(tmp_path / "native"))
    for operation, changed in (
        (DropLayers("1"), "nothing"),
        (FeedForwardWidth(32), "mlp"),
        (GrowLayers("0"), "1.*_proj"),
    ):
        after = operation.apply(subject)
        read = {name for name, tensor in after.tensors() if not isinstance(tensor, Unread)}
        assert read == {name for name in read if re.search(changed, name)}
        assert bool(read) == (changed != "nothing")


def test_tensors_of_several_dtypes_keep_their_own(tmp_path):
    native = hostile_(LlamaForCausalLM(LlamaConfig(**SIZES)))
    native.save_pretrained(tmp_path / "native")
    state = load_file(tmp_path / "native" / "model.safetensors")
    mixed = {name: tensor.to(DTYPES[place % 3]) for place, (name, tensor) in enumerate(state.items())}
    save_file(mixed, tmp_path / "native" / "model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "native", tmp_path / "ours")
    before = load_file(tmp_path / "ours" / "model.safetensors")
    for place, operation in enumerate(
        (DropLayers("2"), GrowLayers("2"), KeyValueHeads(1), FeedForwardWidth(32), FuseNorms())
    ):
        report = edit(tmp_path / "native", tmp_path / str(place), [operation])
        assert report.difference is not None
        after = load_file(tmp_path / str(place) / "model.safetensors")
        assert {name: after[name].dtype for name in before if name in after} == {
            name: tensor.dtype for name, tensor in before.items() if name in after
        }
    assert edit(tmp_path / "native", tmp_path / "grown", [GrowLayers("2")]).difference.same_bits


@pytest.mark.parametrize("attention", ["flash_attention_2", "kernels-community/flash-attn"])
def test_an_attention_that_is_not_here_is_not_run(attention, tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "native")
    path = tmp_path / "native" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attn_implementation": attention}))
    assert edit(tmp_path / "native", tmp_path / "ours", [GrowLayers("1")]).difference.same_bits


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 is no archive", b"\x80\x04garbage"])
def test_damaged_weights_of_a_module_are_named_before_anything_is_written(content, tmp_path, capsys):
    source, dense = tmp_path / "native", tmp_path / "native" / "1_Dense"
    BertModel(BertConfig(**SIZES)).save_pretrained(source)
    dense.mkdir()
    kind = "sentence_transformers.models.Dense"
    (source / "modules.json").write_text(json.dumps([{"idx": 1, "name": "1", "path": "1_Dense", "type": kind}]))
    (dense / "pytorch_model.bin").write_bytes(content)
    assert main(["edit", str(source), str(tmp_path / "ours"), "--drop-layers", "1"]) == 2
    assert "1_Dense" in capsys.readouterr().err
    with pytest.raises(ConversionError, match="1_Dense"):
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_each_operation_is_told_the_stack_named_before_it(tmp_path):
    config = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_heads=4, num_layers=3, decoder_start_token_id=0)
    native = hostile_(T5ForConditionalGeneration(config)).eval()
    native.save_pretrained(tmp_path / "native")
    both = ["--stack", "encoder", "--drop-layers", "1", "--drop-layers", "0", "--stack", "decoder", "--layers", "2,0"]
    for name, options, kept in (
        ("both", both, ([2], [2, 0])),
        ("named behind", ["--drop-layers", "1", "--stack", "decoder"], ([0, 1, 2], [0, 2])),
    ):
        assert main(["edit", str(tmp_path / "native"), str(tmp_path / name), *options]) == 0
        record = json.loads((tmp_path / name / "conversion_report.json").read_text())
        assert record["command"] == shlex.join(["hf-variants", "edit", "native", name, *options])
        stock = T5ForConditionalGeneration.from_pretrained(tmp_path / "native").eval()
        for stack, layers in zip((stock.encoder, stock.decoder), kept):
            # The table of relative positions stands in the first layer, and is all layers'.
            table = stack.block[0].layer[0].SelfAttention.relative_attention_bias
            stack.block = torch.nn.ModuleList(stack.block[layer] for layer in layers)
            for place, block in enumerate(stack.block):
                block.layer[0].SelfAttention.relative_attention_bias = table
                block.layer[0].SelfAttention.has_relative_attention_bias = place == 0
                block.layer[0].SelfAttention.layer_idx = block.layer[-2].layer_idx = place
        ids = torch.arange(3, 15)[None]
        ours = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name).eval()
        results = [m(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits for m in (ours, stock)]
        assert torch.equal(*results)


def test_a_stock_decoder_too_deep_for_its_cache_is_noted(tmp_path):
    """T5 names two depths, and transformers makes the cache of the decoder for the encoder's."""
    config = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_heads=4, num_layers=2, decoder_start_token_id=0)
    hostile_(T5ForConditionalGeneration(config)).save_pretrained(tmp_path / "native")
    for name, layers, noted in (("deep", "0,1,1", True), ("shallow", "0", False)):
        report = edit(
            tmp_path / "native", tmp_path / name, [SelectLayers(layers, "decoder")], native=tmp_path / f"{name}-native"
        )
        assert ("use_cache=False" in report.to_markdown()) == noted
        stock = T5ForConditionalGeneration.from_pretrained(tmp_path / f"{name}-native").eval()
        ours = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name).eval()
        ids = torch.arange(3, 15)[None]
        made = [model.generate(ids, max_new_tokens=4, use_cache=not noted) for model in (stock, ours)]
        assert torch.equal(*made)


def test_an_adapter_alone_is_named(tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert main(["edit", str(tmp_path / "adapter"), str(tmp_path / "ours"), "--drop-layers", "1"]) == 2
    assert "holds an adapter (adapter_config.json) and no model" in capsys.readouterr().err


def test_a_table_whose_first_rows_are_no_positions_is_measured_and_cut(tmp_path):
    sizes = SIZES | {"max_position_embeddings": 40, "vocab_size": 60, "pad_token_id": 1}
    native = hostile_(RobertaForMaskedLM(RobertaConfig(**sizes))).eval()
    native.save_pretrained(tmp_path / "native")
    report = edit(tmp_path / "native", tmp_path / "ours", [ContextLength(20)], native=tmp_path / "cut")
    assert report.difference.same_bits
    cut = RobertaForMaskedLM.from_pretrained(tmp_path / "cut").eval()
    ids = torch.arange(3, 21)[None]
    assert cut.roberta.embeddings.position_embeddings.weight.shape[0] == 20
    native = RobertaForMaskedLM.from_pretrained(tmp_path / "native").eval()
    assert torch.equal(cut(ids).logits, native(ids).logits)
