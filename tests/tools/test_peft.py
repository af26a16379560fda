"""PEFT: each method with its default targets on each kind of variant, and adapters where embeddings are tied."""

import copy
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
from peft.utils import constants
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import hf_variants
from hf_variants import (
    VariantConfig,
    VariantForCausalLM,
    VariantForMultipleChoice,
    VariantForQuestionAnswering,
    VariantForSequenceClassification,
    VariantForTokenClassification,
    VariantSeq2SeqConfig,
)
from hf_variants.conversion.memory import lay_alike
from hf_variants.model import adapters
from tests.tools import kinds
from tests.tools.kinds import DECODERS, KINDS, VOCABULARY, batch, model


AUTO_CLASSES = {
    "CAUSAL_LM": peft.AutoPeftModelForCausalLM,
    "SEQ_2_SEQ_LM": peft.AutoPeftModelForSeq2SeqLM,
    "SEQ_CLS": peft.AutoPeftModelForSequenceClassification,
    "TOKEN_CLS": peft.AutoPeftModelForTokenClassification,
    "QUESTION_ANS": peft.AutoPeftModelForQuestionAnswering,
    # The class is read from the adapter, which PEFT does for modules that it is told to trust.
    None: partial(peft.AutoPeftModel.from_pretrained, import_allowlist=["hf_variants"]),
}
LAYER_METHODS = {
    "LoRA": partial(peft.LoraConfig, r=4),
    "DoRA": partial(peft.LoraConfig, r=4, use_dora=True),
    "rsLoRA": partial(peft.LoraConfig, r=4, use_rslora=True),
    "AdaLoRA": partial(peft.AdaLoraConfig, init_r=4, target_r=2, total_step=20, tinit=2, tfinal=2),
    "IA3": peft.IA3Config,
    "LN-tuning": peft.LNTuningConfig,
    "OFT": partial(peft.OFTConfig, oft_block_size=8),
    "VeRA": partial(peft.VeraConfig, r=4),
    "LoHa": partial(peft.LoHaConfig, r=4),
    "LoKr": partial(peft.LoKrConfig, r=4),
    "all-linear": partial(peft.LoraConfig, r=4, target_modules="all-linear"),
    "modules_to_save": partial(peft.LoraConfig, r=4, modules_to_save=["embed_tokens", "lm_head"]),
}
PROMPT_METHODS = {
    "prefix tuning": partial(peft.PrefixTuningConfig, num_virtual_tokens=3),
    "prompt tuning": partial(peft.PromptTuningConfig, num_virtual_tokens=3),
    "P-tuning": partial(peft.PromptEncoderConfig, num_virtual_tokens=3, encoder_hidden_size=16),
}


def cells(names):
    """Method and kind, with the mark of their cell in the table of tools; LoRA is the one that `make test` tries."""
    for name in names:
        for kind in KINDS:
            marks = [pytest.mark.tool(f"PEFT: {name}", package="peft")]
            if name != "LoRA" and kind != ("seq2seq" if name in PROMPT_METHODS else "llama"):
                marks.append(pytest.mark.whole)
            yield pytest.param(name, kind, marks=marks, id=f"{name}-{kind}")


def outputs(wrapped, kind: str, **options) -> torch.Tensor:
    """Logits, from inputs without labels: PEFT's AdaLoRA looks for a trained adapter wherever it meets a loss."""
    inputs = batch(kind)
    labels = inputs.pop("labels")
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = labels
    with torch.no_grad():
        logits = wrapped(**inputs, **options).logits
    # Virtual tokens in front have logits too.
    return logits if logits.ndim == 2 else logits[:, -inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1] :]


def distance(outputs: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference, in standard deviations of the reference."""
    return ((outputs - reference).abs().max() / reference.std()).item()


def saved_base(folder, kind: str, **options):
    """A model that was loaded from `folder`, as an adapter wants it that is to find its base again."""
    built = model(kind, **options)
    built.save_pretrained(folder)
    return type(built).from_pretrained(folder).eval()


def train(wrapped, inputs: dict, steps: int = 6, rate: float = 0.02) -> None:
    """A few steps, which must lower the loss and reach every trainable parameter."""
    trained = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    untouched = set(trained)
    optimizer = torch.optim.Adam(trained.values(), lr=rate)
    losses = []
    wrapped.train()
    for step in range(steps):
        loss = wrapped(**inputs).loss
        loss.backward()
        untouched -= {name for name in untouched if trained[name].grad is not None and trained[name].grad.any()}
        optimizer.step()
        if hasattr(wrapped.base_model, "update_and_allocate"):
            wrapped.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    wrapped.eval()
    assert min(losses[1:]) < losses[0], losses
    assert not untouched, f"no gradient: {sorted(untouched)}"


def check_reloaded(wrapped, folder, base_folder, kind: str) -> None:
    """Saved and loaded again, onto a base of one's own and with PEFT finding the base."""
    expected = outputs(wrapped, kind)
    wrapped.save_pretrained(folder)
    task = wrapped.active_peft_config.task_type
    base = type(wrapped.get_base_model()).from_pretrained(base_folder).eval()
    # AdaLoRA leaves the ranks that it has pruned out of the file, where each product is a sum of fewer terms.
    limit = 1e-5 if isinstance(wrapped.active_peft_config, peft.AdaLoraConfig) else 0
    assert distance(outputs(peft.PeftModel.from_pretrained(base, folder).eval(), kind), expected) <= limit
    found = AUTO_CLASSES[task]
    found = found.from_pretrained(folder) if isinstance(found, type) else found(folder)
    assert isinstance(found.get_base_model(), type(wrapped.get_base_model()))
    assert distance(outputs(found.eval(), kind), expected) <= limit


def check_generation(wrapped, kind: str) -> None:
    """Greedy tokens with a cache are those of whole forward passes, and the adapter takes part in them."""
    if kind not in (*DECODERS, "seq2seq"):
        return
    ids = batch(kind)["input_ids"]
    wrapped.get_base_model().generation_config.eos_token_id = None
    generated = wrapped.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    tokens = torch.full_like(ids[:, :1], 1) if kind == "seq2seq" else ids
    for _ in range(6):
        with torch.no_grad():
            if kind == "seq2seq":
                logits = wrapped(input_ids=ids, decoder_input_ids=tokens, use_cache=False).logits
            else:
                logits = wrapped(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, tokens)


def check_merged(wrapped, folder, kind: str) -> None:
    """Merged, unmerged, merged for good and saved as a model without PEFT: the outputs stay."""
    live = outputs(wrapped, kind)
    wrapped.merge_adapter()
    assert distance(outputs(wrapped, kind), live) < 1e-5
    wrapped.unmerge_adapter()
    assert distance(outputs(wrapped, kind), live) < 1e-5
    merged = wrapped.merge_and_unload()
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in merged.modules())
    assert distance(outputs(merged, kind), live) < 1e-5
    merged.save_pretrained(folder)
    loaded = type(merged).from_pretrained(folder).eval()
    assert loaded.state_dict().keys() == model_keys(merged)
    assert torch.equal(outputs(loaded, kind), outputs(merged, kind))


def model_keys(built) -> set[str]:
    return set(type(built)(built.config).state_dict())


@pytest.mark.parametrize(("method", "kind"), cells(LAYER_METHODS))
def test_adapters_in_layers(method, kind, tmp_path):
    base = saved_base(tmp_path / "base", kind)
    before = outputs(base, kind)
    wrapped = peft.get_peft_model(base, LAYER_METHODS[method](task_type=kinds.TASK_TYPES[kind])).eval()
    prefixes = (wrapped.base_model.prefix, "modules_to_save.")
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(any(prefix in name for prefix in prefixes) for name in trained), trained
    train(wrapped, batch(kind))
    after = outputs(wrapped, kind)
    assert distance(after, before) > 1e-2
    with wrapped.disable_adapter():
        assert torch.equal(outputs(wrapped, kind), before)
    assert torch.equal(outputs(wrapped, kind), after)
    check_generation(wrapped, kind)
    check_reloaded(wrapped, tmp_path / "adapter", tmp_path / "base", kind)
    check_merged(wrapped, tmp_path / "merged", kind)


@pytest.mark.parametrize(("method", "kind"), cells(PROMPT_METHODS))
def test_prompts(method, kind, tmp_path):
    """Virtual tokens; PEFT has no such method for a masked LM, so an encoder classifies."""
    encoder = kind == "encoder"
    base = saved_base(tmp_path / "base", kind, model_class=VariantForSequenceClassification if encoder else None)
    before = outputs(base, kind)
    task = "SEQ_CLS" if encoder else kinds.TASK_TYPES[kind]
    wrapped = peft.get_peft_model(base, PROMPT_METHODS[method](task_type=task)).eval()
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("prompt_encoder." in name or "modules_to_save." in name for name in trained), trained
    inputs = batch(kind)
    if encoder:
        inputs["labels"] = torch.tensor([0, 1])
    train(wrapped, inputs)
    assert distance(outputs(wrapped, kind), before) > 1e-2
    if not encoder:
        with wrapped.disable_adapter():
            assert torch.equal(outputs(wrapped, kind), before)
    check_generation(wrapped, kind)
    check_reloaded(wrapped, tmp_path / "adapter", tmp_path / "base", kind)


def randomise(wrapped, seed: int) -> None:
    """Give what is trained values of its own; many methods begin as the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.tool("PEFT: several adapters", package="peft")
@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters(kind, tmp_path):
    """Added, switched, loaded beside each other, mixed within a batch, combined with weights, deleted."""
    lora = partial(peft.LoraConfig, r=4, task_type=kinds.TASK_TYPES[kind])
    base = model(kind)
    before = outputs(base, kind)
    wrapped = peft.get_peft_model(base, lora(), adapter_name="first").eval()
    randomise(wrapped, 1)
    first = outputs(wrapped, kind)
    wrapped.add_adapter("second", lora(target_modules="all-linear"))
    wrapped.set_adapter("second")
    randomise(wrapped, 2)
    second = outputs(wrapped, kind)
    assert distance(first, before) > 1e-2
    assert distance(second, before) > 1e-2
    assert distance(second, first) > 1e-2
    wrapped.set_adapter("first")
    assert torch.equal(outputs(wrapped, kind), first)

    mixed = outputs(wrapped, kind, adapter_names=["second", "__base__"])
    assert distance(mixed[0], second[0]) < 1e-5
    assert distance(mixed[1], before[1]) < 1e-5

    wrapped.add_weighted_adapter(["first", "second"], [1.0, 0.0], "one", combination_type="linear")
    wrapped.set_adapter("one")
    assert distance(outputs(wrapped, kind), first) < 1e-5
    wrapped.add_weighted_adapter(["first", "second"], [0.7, 0.3], "both", combination_type="cat")
    wrapped.set_adapter("both")
    both = outputs(wrapped, kind)
    assert distance(both, first) > 1e-2
    assert distance(both, second) > 1e-2

    wrapped.save_pretrained(tmp_path, selected_adapters=["first", "second"])
    loaded = peft.PeftModel.from_pretrained(model(kind), tmp_path / "first", adapter_name="first").eval()
    loaded.load_adapter(tmp_path / "second", "second")
    assert torch.equal(outputs(loaded, kind), first)
    loaded.set_adapter("second")
    assert torch.equal(outputs(loaded, kind), second)
    loaded.delete_adapter("first")
    assert distance(outputs(loaded.merge_and_unload(), kind), second) < 1e-5


# Task of PEFT's, and the class; what chooses among sequences has no task of its own.
HEADS = [
    ("SEQ_CLS", VariantForSequenceClassification),
    ("SEQ_CLS", VariantForMultipleChoice),
    ("TOKEN_CLS", VariantForTokenClassification),
    ("QUESTION_ANS", VariantForQuestionAnswering),
]


@pytest.mark.tool("PEFT: heads", package="peft")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "seq2seq"])
@pytest.mark.parametrize(("task", "head"), HEADS)
def test_heads(task, head, kind, tmp_path):
    """PEFT trains and saves a head of these names whole, which a base model initialises anew each time."""
    model(kind).model.save_pretrained(tmp_path / "stack")
    # A fresh layer in front of the head, too, of which PEFT knows by its name, save in question answering.
    options = {"classifier_transform": True, "classifier_transform_on_tokens": True} if kind == "encoder" else {}
    extra = {"modules_to_save": ["pre_classifier"]} if options and task == "QUESTION_ANS" else {}
    ids = batch(kind)["input_ids"]
    inputs = {"input_ids": ids if head is not VariantForMultipleChoice else torch.stack([ids, ids.flip(0)], dim=1)}
    answers = ("logits",) if task != "QUESTION_ANS" else ("start_logits", "end_logits")

    def loaded(seed: int):
        torch.manual_seed(seed)
        return head.from_pretrained(tmp_path / "stack", **options).eval()

    def answered(wrapped) -> torch.Tensor:
        with torch.no_grad():
            result = wrapped(**inputs)
        return torch.cat([result[name] for name in answers], dim=-1)

    wrapped = peft.get_peft_model(loaded(0), peft.LoraConfig(r=4, task_type=task, **extra)).eval()
    randomise(wrapped, 1)
    expected = answered(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(loaded(1), tmp_path / "adapter").eval()
    assert torch.equal(answered(again), expected)
    assert distance(answered(again.merge_and_unload()), expected) < 1e-5


def test_layer_that_question_answering_leaves_out(monkeypatch):
    """PEFT saves `qa_outputs` alone, so a new layer in front of it would be another one after loading."""
    said = []
    monkeypatch.setattr(adapters.logger, "warning", said.append)
    fields = {"classifier_transform": True, "classifier_transform_on_tokens": True}
    for extra in ({}, {"modules_to_save": ["pre_classifier"]}):
        base = model("encoder", VariantForQuestionAnswering, **fields)
        peft.get_peft_model(base, peft.LoraConfig(task_type="QUESTION_ANS", **extra))
    assert len(said) == 1
    assert "pre_classifier" in said[0]


def test_tables():
    """An entry wherever Llama has one, for every model type, and IA3's feed-forward layers among its targets."""
    tables = {
        name: table
        for name, table in vars(constants).items()
        if isinstance(table, dict) and name.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in table
    }
    assert len(tables) > 30
    for model_type in (VariantConfig.model_type, VariantSeq2SeqConfig.model_type):
        assert [name for name, table in tables.items() if model_type not in table] == []
        feed_forward = set(tables["TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING"][model_type])
        assert feed_forward < set(tables["TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING"][model_type])


@pytest.mark.parametrize("preset", hf_variants.presets())
def test_default_targets_of_every_preset(preset):
    """LoRA's and IA3's defaults find their layers in each block, LN-tuning's every norm that has parameters."""
    build = partial(VariantConfig.from_preset, preset, **kinds.SIZES)
    layers = build().num_hidden_layers
    for config, per_layer in ((peft.LoraConfig(), 2), (peft.IA3Config(), 3)):
        wrapped = peft.get_peft_model(VariantForCausalLM(build()), config)
        assert len(wrapped.targeted_module_names) == per_layer * layers
    base = VariantForCausalLM(build())
    norms = {name for name, module in base.named_modules()
             if name.rpartition(".")[2].endswith("norm") and not name.endswith((".q_norm", ".k_norm"))
             and list(module.parameters())}  # fmt: skip
    if norms:
        wrapped = peft.get_peft_model(base, peft.LNTuningConfig())
        trained = {name.split(".ln_tuning_layers")[0] for name, parameter in wrapped.named_parameters()
                   if parameter.requires_grad}  # fmt: skip
        assert trained == {f"base_model.model.{name}" for name in norms}
    else:
        with pytest.raises(ValueError, match="norm_affine"):
            peft.get_peft_model(base, peft.LNTuningConfig())


# PEFT 0.21 merges an adapter on either of two tied layers into the weight of both, and one on both of them twice.
TIED_CASES = {
    "embedding": peft.LoraConfig(r=4, target_modules=["embed_tokens"]),
    "head": peft.LoraConfig(r=4, target_modules=["lm_head"]),
    "both": peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "both, adapters tied": peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True),
    "DoRA": peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], use_dora=True),
    "IA3": peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
    "OFT": peft.OFTConfig(oft_block_size=8, target_modules=["lm_head"]),
    "saved embedding": peft.LoraConfig(r=4, modules_to_save=["embed_tokens"]),
    "saved, tied": peft.LoraConfig(r=4, modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True),
    "tokens": peft.LoraConfig(r=4, trainable_token_indices=[5, 44, 88]),
}
# Those that a merged model is still tied after.
STILL_TIED = ("saved, tied", "tokens")
# Those that PEFT has no way to do where a second embedding shares the weight.
TWO_LAYERS_ONLY = (*STILL_TIED, "both, adapters tied")


def tied_cells():
    for case in TIED_CASES:
        for kind in KINDS:
            marks = [pytest.mark.tool("PEFT: tied embeddings", package="peft")]
            if kind not in ("gemma2", "seq2seq"):
                marks.append(pytest.mark.whole)
            if case not in TWO_LAYERS_ONLY or kind != "seq2seq":
                yield pytest.param(case, kind, marks=marks, id=f"{case}-{kind}")


def tied_weights(built) -> list[torch.Tensor]:
    return [layer.weight for layer in (built.get_input_embeddings(), built.get_output_embeddings())]


@pytest.mark.parametrize(("case", "kind"), tied_cells())
def test_tied_embeddings(case, kind, tmp_path):
    """Whatever is adapted of tied embeddings, a merged model computes what the live one did, after saving, too."""
    base = saved_base(tmp_path / "base", kind, tie_word_embeddings=True)
    first, second = tied_weights(base)
    assert first is second
    before = outputs(base, kind)
    wrapped = peft.get_peft_model(base, copy.deepcopy(TIED_CASES[case])).eval()
    randomise(wrapped, 1)
    live = outputs(wrapped, kind)
    assert distance(live, before) > 1e-2
    with wrapped.disable_adapter():
        assert torch.equal(outputs(wrapped, kind), before)

    wrapped.save_pretrained(tmp_path / "adapter")
    fresh = type(base).from_pretrained(tmp_path / "base").eval()
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    # An adapter's tensors, too, lie where its file had them.
    lay_alike(wrapped, loaded)
    assert torch.equal(outputs(loaded, kind), outputs(wrapped, kind))
    check_merged(wrapped, tmp_path / "merged", kind)
    merged = type(base).from_pretrained(tmp_path / "merged")
    first, second = tied_weights(merged)
    assert merged.config.tie_word_embeddings == (first is second) == (case in STILL_TIED)
    if kind == "seq2seq":
        first, second = merged.model.encoder.embed_tokens.weight, merged.model.decoder.embed_tokens.weight
        assert merged.config.share_embeddings == (first is second)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_one_of_two_embeddings(stack, tmp_path):
    """With one stack's embedding changed, the head is still tied to whatever it was that stayed, or to nothing."""
    base = model("seq2seq")
    target = f"{stack}.embed_tokens"
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=[target])).eval()
    randomise(wrapped, 1)
    check_merged(wrapped, tmp_path / "merged", "seq2seq")
    merged = type(base).from_pretrained(tmp_path / "merged")
    assert not merged.config.share_embeddings
    assert merged.config.tie_word_embeddings == (stack == "encoder")


def test_later_adapter_on_tied_embeddings():
    """A second adapter reaches the embeddings, by PEFT's way and by transformers' own."""
    wrapped = peft.get_peft_model(model("llama", tie_word_embeddings=True), peft.LoraConfig(r=4)).eval()
    wrapped.add_adapter("second", peft.LoraConfig(r=4, target_modules=["lm_head"]))
    wrapped.set_adapter("second")
    randomise(wrapped, 1)
    live = outputs(wrapped, "llama")
    assert distance(outputs(wrapped.merge_and_unload(), "llama"), live) < 1e-5

    base = model("llama", tie_word_embeddings=True)
    base.add_adapter(peft.LoraConfig(r=4, target_modules=["lm_head"]))
    assert base.lm_head.base_layer.weight is not base.model.embed_tokens.weight


@pytest.fixture
def no_custom_code_before(tmp_path, monkeypatch):
    """As in a process that has loaded none, and nothing of the test's own stays."""

    def forget() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "transformers_modules"}

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    # The package of an earlier test looks for modules in that test's folder, which may still come first.
    elsewhere = [path for path in sys.path if not (Path(path) / "transformers_modules").is_dir()]
    monkeypatch.setattr("sys.path", elsewhere)
    before = forget()
    yield
    forget()
    sys.modules.update(before)


def test_tied_embeddings_through_remote_code(no_custom_code_before, tmp_path):
    """The guard travels with a checkpoint's code, to where this package is not."""
    model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    remote_class = get_class_from_dynamic_module("modeling_variant.VariantForCausalLM", tmp_path / "base")
    assert not issubclass(remote_class, VariantForCausalLM)
    base = remote_class.from_pretrained(tmp_path / "base").eval()
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"])).eval()
    randomise(wrapped, 1)
    check_merged(wrapped, tmp_path / "merged", "llama")


def test_tied_again_after_unloading():
    base = model("llama", tie_word_embeddings=True)
    before = outputs(base, "llama")
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"])).eval()
    randomise(wrapped, 1)
    with pytest.raises(ValueError, match="unload"):
        base.tie_weights()
    unloaded = wrapped.unload()
    assert torch.equal(outputs(unloaded, "llama"), before)
    unloaded.tie_weights()
    first, second = tied_weights(unloaded)
    assert first is second
    assert unloaded.config.tie_word_embeddings


@pytest.mark.parametrize(
    "fields",
    [
        {"embedding_size": 16, "output_projection": True},
        {"embedding_multiplier": 3.0, "embedding_multiplier_position": "stack"},
        {"lm_head_bias": True, "logit_scale": 0.5},
    ],
    ids=["factorised", "multiplied", "biased"],
)
def test_tied_embeddings_of_other_shapes(fields, tmp_path):
    """Factorised or scaled embeddings, resized ones, a head with a bias."""
    base = model("llama", tie_word_embeddings=True, **fields)
    base.resize_token_embeddings(VOCABULARY + 5)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"])).eval()
    randomise(wrapped, 1)
    check_merged(wrapped, tmp_path / "merged", "llama")


BOTH_SAVED = r'modules_to_save=\["embed_tokens", "lm_head"\]'


@pytest.mark.parametrize(
    ("kind", "fields", "options"),
    [
        ("llama", {"lm_head_normalized": True}, {"target_modules": ["lm_head"]}),
        ("llama", {"lm_head_normalized": True}, {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
        ("llama", {"lm_head_bias": True}, {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
        ("encoder", {"lm_head_bias": True}, {"trainable_token_indices": [5]}),
        ("seq2seq", {}, {"trainable_token_indices": [5]}),
        ("seq2seq", {}, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("seq2seq", {}, {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
        ("seq2seq", {}, {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}),
    ],
)
def test_adapters_that_would_lose_something(kind, fields, options):
    """What PEFT would compute or merge wrongly is refused, with what to do instead, and that is possible."""
    base = model(kind, tie_word_embeddings=True, **fields)
    with pytest.raises(ValueError, match=BOTH_SAVED):
        peft.get_peft_model(base, peft.LoraConfig(**options))
    instead = peft.LoraConfig(modules_to_save=["embed_tokens", "lm_head"])
    wrapped = peft.get_peft_model(model(kind, tie_word_embeddings=True, **fields), instead).eval()
    randomise(wrapped, 1)
    live = outputs(wrapped, kind)
    assert distance(outputs(wrapped.merge_and_unload(), kind), live) < 1e-5


def test_norms_without_parameters():
    """Said by name, where PEFT fails on an attribute; norms that have parameters can still be named."""
    with pytest.raises(ValueError, match=r"self_attn_pre_norm.*norm_affine"):
        peft.get_peft_model(model("llama", norm_affine=False), peft.LNTuningConfig())
    learned = peft.LNTuningConfig(target_modules=["q_norm", "k_norm"])
    fields = {"norm_affine": False, "qk_norm": "head", "qk_norm_affine": True}
    wrapped = peft.get_peft_model(model("llama", **fields), learned)
    assert sum(parameter.requires_grad for parameter in wrapped.parameters()) == 4
    # Defaults leave queries and keys alone, so that they work where only those have nothing to train.
    peft.get_peft_model(model("llama", qk_norm="head", qk_norm_affine=False), peft.LNTuningConfig())


def test_other_models_are_left_alone():
    config = LlamaConfig(**{**kinds.SIZES, "tie_word_embeddings": True})
    wrapped = peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(target_modules=["lm_head"]))
    assert wrapped.get_base_model().lm_head.base_layer.weight is wrapped.get_input_embeddings().weight


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "IA3", "all-linear"])
def test_adapter_of_an_exported_model(method, tmp_path):
    """Where the native type's layers have the same names and values, an adapter fits the exported model as it is."""
    ours = model("llama")
    native = hf_variants.to_native(ours)
    wrapped = peft.get_peft_model(ours, LAYER_METHODS[method](task_type="CAUSAL_LM")).eval()
    randomise(wrapped, 1)
    wrapped.save_pretrained(tmp_path)
    fitted = peft.PeftModel.from_pretrained(native.eval(), tmp_path)
    assert isinstance(fitted.get_base_model(), LlamaForCausalLM)
    assert torch.equal(outputs(fitted, "llama"), outputs(wrapped, "llama"))
