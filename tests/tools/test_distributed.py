"""Beyond one device: what several processes, or a disk, compute is what one process computes."""

import re

import pytest
import torch
from accelerate import infer_auto_device_map, init_empty_weights
from torch import nn
from transformers.activations import ACT2CLS, ACT2FN

from hf_variants.model.feed_forward import LEARNED_ACTIVATIONS
from tests.tools import kinds
from tests.tools.kinds import DECODERS, SHARDED_KINDS
from tests.tools.launch import launched
from tests.tools.shapes import SHAPES
from tests.tools.shapes import batch as shape_batch
from tests.tools.shapes import model as shape


QUICK_KINDS = ("llama", "seq2seq")
WHOLE_KINDS = tuple(kind for kind in SHARDED_KINDS if kind not in QUICK_KINDS)
PIPELINE_KINDS = (*DECODERS, "multi-query")
# Where something stands before or behind the layers, or enters every one of them.
PIPELINE_SHAPES = ("alibi", "relative bias", "factorised", "scaled embedding", "layers differ")
PIPELINE_LAUNCH = (*PIPELINE_KINDS, *PIPELINE_SHAPES)
# What has tensors that only a careful walk over modules finds, or sizes that two devices do not divide.
TRAINED_SHAPES = (
    "sinks", "sub-norms", "relative bias", "factorised", "learned activation", "layers differ", "odd sizes",
)  # fmt: skip
# accelerate's groups do not take three tables that are one, as a test below shows; these are apart.
FSDP_NAMES = {kind: "tables apart" if kind == "seq2seq" else kind for kind in SHARDED_KINDS}
FSDP_LAUNCH = (*FSDP_NAMES.values(), "seq2seq", *TRAINED_SHAPES)

tensor_parallel = pytest.mark.tool("Tensor parallel (2 processes)", package="transformers")


@tensor_parallel
@pytest.mark.parametrize("kind", QUICK_KINDS)
def test_tensor_parallel(kind, tmp_path_factory):
    assert not launched(tmp_path_factory, "tensor_parallel", QUICK_KINDS)[kind]


@pytest.mark.whole
@tensor_parallel
@pytest.mark.parametrize("kind", WHOLE_KINDS)
def test_tensor_parallel_of_more_kinds(kind, tmp_path_factory):
    assert not launched(tmp_path_factory, "tensor_parallel", (*WHOLE_KINDS, *SHAPES))[kind]


@pytest.mark.whole
@pytest.mark.parametrize("name", SHAPES)
def test_tensor_parallel_of_every_axis(name, tmp_path_factory):
    assert not launched(tmp_path_factory, "tensor_parallel", (*WHOLE_KINDS, *SHAPES))[name]


def plan_names(model: nn.Module) -> set[str]:
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    return {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", [*SHARDED_KINDS, *SHAPES])
def test_tensor_parallel_plan_fits(name, ranks):
    """It names what is there, cuts no head in two, and sums the gradients of what is shared by channels."""
    model = shape(name)
    model.fit_tensor_parallel_plan(ranks)
    plan = model.tp_plan
    assert not set(plan) - plan_names(model)
    for name, module in model.named_modules():
        generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        if isinstance(module, nn.Linear) and ".layers." in name:
            assert generic in plan, name
        if generic.endswith(("_attn.k_proj", "_attn.q_proj")) and plan[generic] == "colwise":
            assert module.out_features % (ranks * model.get_submodule(name.rpartition(".")[0]).head_dim) == 0
        shared = generic.endswith(("act_fn", "q_norm", "k_norm", "sub_norm")) or hasattr(module, "sinks")
        if shared and next(module.parameters(recurse=False), None) is not None:
            parent = generic if hasattr(module, "sinks") else generic.rpartition(".")[0]
            projection = "up_proj" if parent.endswith("mlp") else "q_proj"
            is_summed = plan.get(generic) == "replicated_with_grad_allreduce"
            assert is_summed == (plan[f"{parent}.{projection}"] == "colwise"), name


def test_every_activation_that_learns_is_known():
    # Of functions that wait for a size or a package there is nothing to ask.
    learned = {name for name in ACT2CLS if any(True for _ in getattr(ACT2FN[name], "parameters", tuple)())}
    assert learned == set(LEARNED_ACTIVATIONS)


@pytest.mark.whole
@pytest.mark.tool("Pipeline (2 processes)", package="transformers")
@pytest.mark.parametrize("kind", PIPELINE_KINDS)
def test_pipeline(kind, tmp_path_factory):
    assert not launched(tmp_path_factory, "pipeline_parallel", PIPELINE_LAUNCH)[kind]


@pytest.mark.whole
@pytest.mark.parametrize("name", PIPELINE_SHAPES)
def test_pipeline_of_what_stands_around_the_layers(name, tmp_path_factory):
    assert not launched(tmp_path_factory, "pipeline_parallel", PIPELINE_LAUNCH)[name]


@pytest.mark.tool("Pipeline (2 processes)", package="transformers", refused=True)
@pytest.mark.parametrize("kind", ["seq2seq", "encoder"])
def test_pipeline_of_others_is_refused(kind):
    with pytest.raises(ValueError, match=r"`pp_size` is 2, but .* Use `tp_size` or `fsdp_size`"):
        kinds.model(kind).refuse_pipeline(2)


def test_pipeline_that_needs_token_ids_is_refused():
    model = kinds.model("llama", position_ids_source="input_ids")
    with pytest.raises(ValueError, match="`position_ids_source` input_ids reads token ids"):
        model.refuse_pipeline(2)
    assert model.config.base_model_pp_plan is None


@pytest.mark.parametrize("name", [*SHARDED_KINDS, *SHAPES])
def test_pipeline_plan_names_all_that_only_one_stage_has(name):
    model = shape(name)
    for stack in [model.model.encoder, model.model.decoder] if model.config.is_encoder_decoder else [model.model]:
        plan = stack.config.base_model_pp_plan
        children = [child for child, _ in stack.named_children()]
        assert [child for child in children if child in plan] == list(plan), (children, list(plan))
        # Positions are turned and biased in every layer; what else has weights is of the first or the last stage.
        weighty = {child for child, module in stack.named_children() if next(module.parameters(), None) is not None}
        assert weighty - {"rotary_emb", "position_bias"} <= set(plan)
        assert [child for child, module in stack.named_modules() if isinstance(module, nn.ModuleList)] == ["layers"]


def test_no_pipeline_plan_where_the_stack_multiplies_embeddings():
    config = kinds.config("llama", embedding_multiplier=2.0, embedding_multiplier_position="stack")
    assert config.base_model_pp_plan is None


@pytest.mark.whole
@pytest.mark.tool("DDP (2 processes)", package="accelerate")
@pytest.mark.parametrize("kind", SHARDED_KINDS)
def test_ddp(kind, tmp_path_factory):
    assert not launched(tmp_path_factory, "ddp", SHARDED_KINDS)[kind]


@pytest.mark.whole
def test_batch_statistics(tmp_path_factory):
    assert not launched(tmp_path_factory, "batch_statistics", ("batchnorm",))["batchnorm"]


@pytest.mark.whole
@pytest.mark.tool("FSDP2 (2 processes)", package="accelerate")
@pytest.mark.parametrize("kind", SHARDED_KINDS)
def test_fsdp2(kind, tmp_path_factory):
    assert not launched(tmp_path_factory, "fsdp2", FSDP_LAUNCH)[FSDP_NAMES[kind]]


@pytest.mark.whole
@pytest.mark.parametrize("name", TRAINED_SHAPES)
def test_fsdp2_of_axes(name, tmp_path_factory):
    assert not launched(tmp_path_factory, "fsdp2", FSDP_LAUNCH)[name]


@pytest.mark.whole
def test_fsdp2_names_tables_that_three_modules_share(tmp_path_factory):
    """As of native encoder-decoders: the limit is accelerate's and torch's, and no table trains on its own."""
    result = launched(tmp_path_factory, "fsdp2", FSDP_LAUNCH)["seq2seq"]
    assert "embed_tokens.weight' is shared with a parameter already managed by another FSDP group" in result


@pytest.mark.whole
@pytest.mark.tool("FSDP2, activation checkpointing, weights from rank 0", package="accelerate")
@pytest.mark.parametrize("kind", SHARDED_KINDS)
def test_fsdp2_sparing(kind, tmp_path_factory):
    assert not launched(tmp_path_factory, "fsdp2_sparing", FSDP_NAMES.values())[FSDP_NAMES[kind]]


@pytest.mark.whole
@pytest.mark.tool("Trainer: FSDP2 (2 processes)", package="transformers")
@pytest.mark.parametrize("kind", FSDP_NAMES)
def test_trainer_with_fsdp2(kind, tmp_path_factory):
    assert not launched(tmp_path_factory, "trainer_fsdp2", FSDP_NAMES.values())[FSDP_NAMES[kind]]


@pytest.mark.whole
@pytest.mark.tool("FSDP2 by transformers' plan", package="transformers")
@pytest.mark.parametrize("kind", SHARDED_KINDS)
def test_fsdp_plan(kind, tmp_path_factory):
    assert not launched(tmp_path_factory, "fsdp_plan", SHARDED_KINDS)[kind]


@pytest.mark.whole
@pytest.mark.tool("DeepSpeed ZeRO-3 (2 processes)", package="deepspeed")
@pytest.mark.parametrize("kind", SHARDED_KINDS)
def test_zero3(kind, tmp_path_factory):
    assert not launched(tmp_path_factory, "zero3", (*SHARDED_KINDS, *TRAINED_SHAPES))[kind]


@pytest.mark.whole
@pytest.mark.parametrize("name", TRAINED_SHAPES)
def test_zero3_of_axes(name, tmp_path_factory):
    assert not launched(tmp_path_factory, "zero3", (*SHARDED_KINDS, *TRAINED_SHAPES))[name]


@pytest.mark.parametrize("name", [*SHARDED_KINDS, "layers differ"])
def test_blocks_are_what_is_not_split(name):
    """Exactly the kinds that are there: accelerate's FSDP fails on a name that it does not find."""
    model = shape(name)
    stacks = [module for _, module in model.stacks()]
    assert model._no_split_modules == {type(layer).__name__ for stack in stacks for layer in stack.layers}


def assert_offloads(name: str, tmp_path) -> None:
    model = shape(name, **({} if name == "layers differ" else {"num_hidden_layers": 4}))
    model.save_pretrained(tmp_path / "whole")
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    offloaded = type(model).from_pretrained(
        tmp_path / "whole",
        device_map="auto",
        max_memory={"cpu": int(size * 0.6)},
        offload_folder=tmp_path / "disk",
    )
    on_disk = [parameter for parameter in offloaded.parameters() if parameter.is_meta]
    assert size * 0.25 < sum(parameter.numel() * parameter.element_size() for parameter in on_disk) < size * 0.9
    batch = shape_batch(name)
    with torch.no_grad():
        assert torch.equal(offloaded(**batch).logits, model(**batch).logits)
    if model.can_generate():
        options = {"max_new_tokens": 6, "do_sample": False}
        expected = model.generate(batch["input_ids"], **options)
        assert torch.equal(offloaded.generate(batch["input_ids"], **options), expected)


@pytest.mark.tool("device_map with disk offload", package="accelerate")
@pytest.mark.parametrize("kind", SHARDED_KINDS)
def test_disk_offload(kind, tmp_path):
    assert_offloads(kind, tmp_path)


@pytest.mark.parametrize("name", SHAPES)
def test_disk_offload_of_every_axis(name, tmp_path):
    assert_offloads(name, tmp_path)


@pytest.mark.parametrize("kind", SHARDED_KINDS)
def test_device_map_without_weights(kind):
    """Blocks stay whole, and every parameter has a device, on a model that was never in memory."""
    with init_empty_weights():
        model = kinds.MODEL_CLASSES[kind](kinds.config(kind, num_hidden_layers=4))
    model.tie_weights()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    budget = {0: int(size * 0.4), 1: int(size * 0.4), "cpu": size}
    placed = infer_auto_device_map(model, budget, no_split_module_classes=list(model._no_split_modules))
    assert len(set(placed.values())) > 1
    for name, _ in model.named_parameters(remove_duplicate=False):
        assert sum(name == part or name.startswith(f"{part}.") for part in placed) == 1, name
    assert not [part for part in placed if re.search(r"layers\.\d+\.", part)]


MEMORY = (
    "tp llama", "fsdp llama", "dp llama", "pp llama", "fsdp seq2seq", "tp odd sizes", "fsdp odd sizes", "pp layers differ",
    "tp odd heads", "tp one key-value head",
)  # fmt: skip


@pytest.mark.parametrize("name", MEMORY)
def test_a_rank_holds_what_cost_says(name, tmp_path_factory):
    """Weights, gradients and AdamW's states, within 2 %."""
    assert not launched(tmp_path_factory, "memory", MEMORY)[name]
