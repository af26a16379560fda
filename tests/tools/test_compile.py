"""torch.compile and torch.export: one graph, few of them, and what they compute."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig

from . import kinds


# One kind on every run, the others with all tools: each takes seconds.
FEW = [pytest.param(kind, marks=[] if kind == "llama" else pytest.mark.whole) for kind in kinds.KINDS]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled_with_counter(model, backend="eager", **options):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True, **options), counter


def gradients(model, batch, run=None):
    model.zero_grad()
    loss = (model if run is None else run)(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad.clone() for name, parameter in model.named_parameters()}}


def assert_close(out, expected, tolerance=1e-5):
    assert out.keys() == expected.keys()
    for name, value in expected.items():
        assert (out[name] - value).abs().max() <= tolerance * max(value.abs().max(), 1e-3), name


@pytest.mark.tool("torch.compile", package="torch")
@pytest.mark.parametrize("kind", FEW)
def test_training_compiles_to_one_graph(kind):
    """Forward, loss and backward, padded, with the terms that are ours; the same graph again for the next batch."""
    model = kinds.model(kind, z_loss_coefficient=0.1, label_smoothing=0.1).train()
    run, counter = compiled_with_counter(model, "aot_eager")
    for seed in (3, 4, 5):
        batch = kinds.batch(kind, seed=seed)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, -seed:] = 0
        batch["labels"][0, -2:] = -100
        expected = gradients(copy.deepcopy(model), batch)
        assert_close(gradients(model, batch, run), expected)
    assert counter.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.whole
@pytest.mark.tool("torch.compile: other lengths", package="torch")
@pytest.mark.parametrize("kind", kinds.KINDS)
def test_new_lengths_compile_once_more_at_most(kind):
    model = kinds.model(kind).train()
    run, counter = compiled_with_counter(model)
    for rows, length in ((2, 12), (2, 15), (2, 9), (3, 21), (5, 17), (4, 10)):
        batch = kinds.batch(kind, rows, length)
        assert abs(run(**batch).loss - model(**batch).loss) < 1e-5
    # As it is, with a symbol for the length, and with one for the number of rows.
    assert counter.frame_count <= 3


@pytest.mark.whole
@pytest.mark.tool("torch.compile: bf16", package="torch")
@pytest.mark.parametrize("kind", kinds.KINDS)
def test_autocast_and_checkpointing_compile(kind):
    model = kinds.model(kind, use_cache=False).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    run, counter = compiled_with_counter(model, "aot_eager")
    batch = kinds.batch(kind)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(copy.deepcopy(model), batch)
        out = gradients(model, batch, run)
    assert counter.frame_count == 1
    assert_close(out, expected, 0.02)


@pytest.mark.whole
@pytest.mark.compiler
@pytest.mark.slow
@pytest.mark.tool("torch.compile: inductor", package="torch")
@pytest.mark.parametrize("kind", ["llama", "encoder"])
def test_inductor(kind):
    model = kinds.model(kind, num_hidden_layers=1).train()
    batch = kinds.batch(kind)
    expected = gradients(copy.deepcopy(model), batch)
    assert_close(gradients(model, batch, torch.compile(model, fullgraph=True)), expected, 1e-4)


# A sliding layer's cache has three states: filling, full, and the step between.
@pytest.mark.whole
@pytest.mark.tool("torch.compile: static cache", package="torch")
@pytest.mark.parametrize(("kind", "graphs"), [("llama", 1), ("gemma2", 3), ("gpt-neox", 1), ("seq2seq", 2)])
def test_a_static_cache_compiles_decoding_once(kind, graphs):
    model = kinds.model(kind)
    # Prompts shorter than the window; the tokens generated go past it.
    ids = kinds.batch(kind, 2, 5)["input_ids"]
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **options)
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": config, **options}
    assert torch.equal(model.generate(ids, **static), expected)
    seen = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < seen <= graphs
    # Warm: further prompts find what they need.
    other = kinds.batch(kind, 2, 5, seed=8)["input_ids"]
    assert torch.equal(model.generate(other, **static), model.generate(other, **options))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == seen


@pytest.mark.whole
@pytest.mark.tool("torch.export", package="torch")
@pytest.mark.parametrize("kind", kinds.KINDS)
@torch.no_grad()
def test_export_with_any_length(kind):
    model = kinds.model(kind, use_cache=False)
    batch = kinds.batch(kind)
    arguments = {"input_ids": batch["input_ids"]}
    if kind == "seq2seq":
        arguments["decoder_input_ids"] = batch["labels"]
    dimensions = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in arguments}
    exported = torch.export.export(model, (), arguments, dynamic_shapes=dimensions, strict=False).module()
    for rows, length in ((2, 12), (3, 17)):
        other = kinds.batch(kind, rows, length)
        given = {"input_ids": other["input_ids"]}
        if kind == "seq2seq":
            given["decoder_input_ids"] = other["labels"]
        out, expected = exported(**given).logits, model(**given).logits
        assert (out - expected).abs().max() < 1e-5 * expected.std()
