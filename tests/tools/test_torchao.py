"""Models quantised by torchao on a CPU: what is quantised, what it computes, saved, loaded, generated with and tuned."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import TorchAoConfig

from hf_variants import VariantForSequenceClassification
from hf_variants.conversion import export, to_native
from hf_variants.conversion.errors import ConversionError
from hf_variants.fast import accelerate_decoding, quantize_int8
from tests.tools import kinds
from tests.tools.kinds import KINDS, batch, model
from tests.tools.test_quantised import distance, logits, train


pytestmark = pytest.mark.whole

# Groups of 32 weights share a scale.
SIZES = {"hidden_size": 64, "intermediate_size": 128}
GROUP = 32


def int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def int8_dynamic():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def int4_unpacked():
    """Of 4 bits in value, held in bytes: what torchao has for a CPU and can save."""
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))


def quantised(folder, kind: str, config, model_class=None, **options):
    model_class = model_class or kinds.MODEL_CLASSES[kind]
    return model_class.from_pretrained(folder, quantization_config=TorchAoConfig(config, **options))


def weights(built) -> dict[str, torch.Tensor]:
    """Of the linear layers that are not the head."""
    heads = (built.get_output_embeddings(), getattr(built, "score", None))
    return {
        name: layer.weight
        for name, layer in built.named_modules()
        if isinstance(layer, nn.Linear) and layer not in heads
    }


def check_quantised(built) -> None:
    """Every linear layer but the head is rounded, and remains an exact `nn.Linear`."""
    head = built.get_output_embeddings()
    assert type(head.weight) is nn.Parameter
    for name, weight in weights(built).items():
        assert type(built.get_submodule(name)) is nn.Linear
        assert type(weight) not in (nn.Parameter, torch.Tensor), name
        assert weight.qdata.dtype == torch.int8, name


def rounded(original, base):
    """A float model with the weights that the quantised one stands for."""
    copied = copy.deepcopy(original)
    for name, weight in weights(base).items():
        copied.get_submodule(name).weight.data.copy_(weight.dequantize())
    return copied


def tokens(built, kind: str) -> torch.Tensor:
    ids = batch(kind)["input_ids"]
    return built.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, no_repeat_ngram_size=1)


def check_saved(base, kind: str, folder) -> None:
    """To the last bit, and a table that is tied is stored once and tied again."""
    expected = logits(base, kind)
    base.save_pretrained(folder)
    again = type(base).from_pretrained(folder)
    check_quantised(again)
    assert torch.equal(logits(again, kind), expected)
    assert again.config.quantization_config.quant_method == "torchao"
    if again.config.tie_word_embeddings:
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def check_weight_only(kind: str, config, folder, tied: bool) -> None:
    from torchao.quantization import quantize_

    # Both ways, on every kind: a quantiser that follows names would meet the head under another.
    original = model(kind, **SIZES, tie_word_embeddings=tied)
    original.save_pretrained(folder / "base")
    base = quantised(folder / "base", kind, config)
    check_quantised(base)
    expected = rounded(original, base)
    assert distance(logits(expected, kind), logits(original, kind)) > 1e-3
    assert distance(logits(base, kind), logits(expected, kind)) < 1e-5
    if base.can_generate():
        written = tokens(base, kind)
        assert torch.equal(written, tokens(expected, kind))
        with accelerate_decoding(base) as acceleration:
            assert torch.equal(tokens(base, kind), written)
        assert acceleration.steps
    check_saved(base, kind, folder / "quantised")

    head = original.get_output_embeddings()
    quantize_(original, config, lambda module, name: isinstance(module, nn.Linear) and module is not head)
    check_quantised(original)
    assert torch.equal(logits(original, kind), logits(base, kind))


@pytest.mark.tool("torchao: int8 weight-only", package="torchao")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_int8(kind, tied, tmp_path):
    check_weight_only(kind, int8(), tmp_path, tied)


@pytest.mark.tool("torchao: int4 weight-only, unpacked", package="torchao")
@pytest.mark.parametrize("kind", KINDS)
def test_int4(kind, tmp_path):
    check_weight_only(kind, int4_unpacked(), tmp_path, tied=True)


@pytest.mark.tool("torchao: int8 weights, dynamic int8 activations", package="torchao")
@pytest.mark.parametrize("kind", KINDS)
def test_int8_dynamic(kind, tmp_path):
    original = model(kind, **SIZES)
    original.save_pretrained(tmp_path / "base")
    base = quantised(tmp_path / "base", kind, int8_dynamic())
    check_quantised(base)
    expected = logits(rounded(original, base), kind)
    out = logits(base, kind)
    assert 1e-4 < (out - expected).std() / expected.std() < 0.05
    # Rows are rounded each by itself: others in the batch change nothing.
    alone = base(**{name: rows[:1] for name, rows in batch(kind).items()}).logits
    assert distance(out[:1], alone.detach()) < 1e-5
    if base.can_generate():
        written = tokens(base, kind)
        with accelerate_decoding(base):
            assert torch.equal(tokens(base, kind), written)
    check_saved(base, kind, tmp_path / "quantised")


@pytest.mark.tool("torchao: int4 weight-only, packed", package="torchao", refused=True)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("packing", "error", "reason"),
    [
        ("plain", ImportError, "mslk"),
        ("plain_int32", NotImplementedError, "does not support device 'cpu'"),
        ("tile_packed_to_4d", (AssertionError, RuntimeError), "CUDA"),
    ],
)
def test_packed_int4_has_no_kernels_here(kind, packing, error, reason, tmp_path):
    """torchao says itself what is missing: MSLK's kernels, an XPU, CUDA; and transformers passes it on."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    if torch.cuda.is_available() or torch.xpu.is_available():
        pytest.skip("has an accelerator, which may have the kernels")
    original = model(kind, **SIZES).bfloat16()
    config = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format=packing)
    head = original.get_output_embeddings()
    with pytest.raises(error, match=reason):
        quantize_(
            copy.deepcopy(original), config, lambda module, _: isinstance(module, nn.Linear) and module is not head
        )
    original.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        quantised(tmp_path, kind, config)


@pytest.mark.tool("torchao: packed int4 of its prototype", package="torchao")
@pytest.mark.parametrize("kind", KINDS)
def test_packed_int4_of_the_prototype(kind):
    """In memory alone: these weights cannot be saved, and no float model can be made of them."""
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    base = model(kind, **SIZES)
    expected = logits(base, kind)
    head = base.get_output_embeddings()
    quantize_(
        base, PrototypeInt4WeightOnlyConfig(group_size=GROUP),
        lambda module, _: isinstance(module, nn.Linear) and module is not head,
    )  # fmt: skip
    for name, weight in weights(base).items():
        # Two values to a byte.
        assert weight.qdata.numel() == base.get_submodule(name).in_features * weight.shape[0] / 2, name
    assert 1e-3 < (logits(base, kind) - expected).std() / expected.std() < 0.5


@pytest.mark.tool("torchao: LoRA on int8 weights", package="torchao")
@pytest.mark.parametrize("kind", KINDS)
def test_lora(kind, tmp_path):
    model(kind, **SIZES).save_pretrained(tmp_path / "base")
    options = {"r": 4, "target_modules": "all-linear", "task_type": kinds.TASK_TYPES[kind]}
    wrapped = peft.get_peft_model(quantised(tmp_path / "base", kind, int8()), peft.LoraConfig(**options))
    train(wrapped, kind)
    live = logits(wrapped.eval(), kind)
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(quantised(tmp_path / "base", kind, int8()), tmp_path / "adapter")
    assert torch.equal(logits(again, kind), live)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_before_dynamic_int8_do_not_train(kind, tmp_path):
    """What `doctor` and docs/using.md warn of, until torchao's product with rounded activations has a gradient."""
    model(kind, **SIZES).save_pretrained(tmp_path)
    options = {
        "target_modules": ["q_proj", "down_proj"],
        "task_type": kinds.TASK_TYPES[kind],
        "init_lora_weights": False,
    }
    for config, trains in ((int8(), True), (int8_dynamic(), False)):
        wrapped = peft.get_peft_model(quantised(tmp_path, kind, config), peft.LoraConfig(**options)).train()
        wrapped(**batch(kind)).loss.backward()
        trained = {
            name: parameter.grad is not None for name, parameter in wrapped.named_parameters() if "lora" in name
        }
        # On the residual stream of the last stack, and so with a gradient in any case.
        late = [name for name in trained if "down_proj" in name and ".encoder." not in name]
        assert late
        assert all(trained[name] for name in late)
        assert {has_gradient for name, has_gradient in trained.items() if "q_proj" in name} == {trains}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "encoder"])
def test_a_classifiers_head_stays_in_floats_by_name(kind, tmp_path):
    """Without the name it does where it has no bias, as transformers looks for the last parameter alone."""
    original = model(kind, VariantForSequenceClassification, **SIZES, num_labels=3)
    original.save_pretrained(tmp_path)
    base = quantised(tmp_path, kind, int8(), VariantForSequenceClassification, modules_to_not_convert=["score"])
    assert torch.equal(base.score.weight, original.score.weight)
    hidden = rounded(original, base)
    ids = batch(kind)["input_ids"]
    assert distance(base(ids).logits, original(ids).logits) > 1e-3
    assert distance(base(ids).logits, hidden(ids).logits) < 1e-5


def test_what_needs_floats_refuses_it(tmp_path):
    original = model("llama", **SIZES)
    original.save_pretrained(tmp_path / "base")
    base = quantised(tmp_path / "base", "llama", int8())
    base.save_pretrained(tmp_path / "quantised")
    with pytest.raises(ConversionError, match="The model is quantised"):
        to_native(base)
    with pytest.raises(ConversionError, match="quantised"):
        export(tmp_path / "quantised", tmp_path / "native")
    with pytest.raises(ValueError, match="quantised already"):
        quantize_int8(base)
