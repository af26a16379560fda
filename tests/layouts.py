"""Layouts in which older releases and other code wrote checkpoints, made of what today's classes save."""

import json

import torch
from safetensors.torch import load_file, save_file

import hf_variants
from hf_variants.conversion.family import all_families
from tests.native_rows import all_rows
from tests.parity import hostile_, random_native


def native_of(model_type, head, seed=1):
    """A stock model with a random config and hostile weights."""
    model = random_native(all_rows()[model_type], seed, head)
    for name, module in model.named_modules():
        if name.endswith("embed_positions") and hasattr(module, "create_weight"):
            # The class leaves the table out when it saves, and computes it when it loads.
            module.weight.data = module.create_weight()
    return model


def write_config(folder, model):
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def write(folder, model, tensors, file="model.safetensors"):
    """A checkpoint of these tensors, with the config of a model of that class."""
    write_config(folder, model)
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    if file.endswith(".index.json"):
        suffix = ".safetensors" if "safetensors" in file else ".bin"
        names = sorted(tensors)
        parts = {f"part-{number}{suffix}": names[number::3] for number in range(min(3, len(names)))}
        for part, members in parts.items():
            write(folder, model, {name: tensors[name] for name in members}, part)
        weight_map = {name: part for part, members in parts.items() for name in members}
        (folder / file).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    elif file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


def tied_native_of(model_type, head):
    """The same with tensors that are tied, if a config of the type ties any."""
    models = (native_of(model_type, head, seed) for seed in range(1, 6))
    return next((model for model in models if model.all_tied_weights_keys), None)


def saved(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


# Names that differ from those of today. Each takes what the class saves, and returns None where it changes nothing.


def without_prefix(model, tensors, rng):
    prefix = f"{model.base_model_prefix}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def with_prefix(model, tensors, rng):
    prefix = f"{model.base_model_prefix}."
    return {name if name.startswith(prefix) else prefix + name: tensor for name, tensor in tensors.items()}


def first_names_of_norms(model, tensors, rng):
    ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    return {
        next((name.removesuffix(end) + old for end, old in ends.items() if name.endswith(end)), name): tensor
        for name, tensor in tensors.items()
    }


def names_of_today(model, tensors, rng):
    """Those of the class, where it writes older ones."""
    tied = model.all_tied_weights_keys
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


# Tensors that the class computes or ignores.


def buffers(model, tensors, rng):
    more = {name: buffer for name, buffer in model.named_buffers() if name not in model.state_dict()}
    return tensors | {name: buffer for name, buffer in more.items() if name not in tensors}


def _attentions(model):
    return [
        name for name, module in model.named_modules() if "Attention" in type(module).__name__ and [*module.children()]
    ]


def rotary_tables(model, tensors, rng):
    """A table in every attention, as before transformers 4.48."""
    if not any(name.endswith("rotary_emb.inv_freq") for name, _ in model.named_buffers()):
        return None
    return tensors | {f"{name}.rotary_emb.inv_freq": torch.rand(4) for name in _attentions(model)}


def masks(model, tensors, rng):
    """GPT-2's and its successors' buffers."""
    more = {}
    for name in _attentions(model):
        mask = torch.ones(1, 1, 24, 24).tril()
        more[f"{name}.bias"] = rng.choice((mask.bool(), mask.to(torch.uint8), mask))
        more[f"{name}.masked_bias"] = torch.tensor(rng.choice((-1e9, -1e4)))
    return tensors | {name: tensor for name, tensor in more.items() if name not in tensors}


def window_masks(model, tensors, rng):
    mask = torch.ones(24, 24).tril().triu(-7).bool()[None, None]
    more = {f"{name}.causal_mask": mask for name in _attentions(model)}
    return tensors | {name: tensor for name, tensor in more.items() if name not in tensors}


def position_ids(model, tensors, rng):
    more = {
        f"{name}.position_ids": torch.arange(40)[None]
        for name, _ in model.named_modules()
        if name.endswith("embeddings")
    }
    return tensors | more if more else None


def position_tables(model, tensors, rng):
    """Sinusoidal tables and the marks of fairseq, which older releases stored."""
    more = {}
    for name, module in model.named_modules():
        if name.endswith("embed_positions") and f"{name}.weight" not in tensors:
            if isinstance(getattr(module, "weight", None), torch.Tensor):
                more[f"{name}.weight"] = module.weight
            if isinstance(getattr(module, "weights", None), torch.Tensor):
                more[f"{name}.weights"] = module.weights
            more[f"{name}._float_tensor"] = torch.zeros(1)
        if name.split(".")[-1] in ("encoder", "decoder"):
            more[f"{name}.version"] = torch.tensor([3.0])
    return tensors | more if more else None


# Parts of other classes.


def in_another_head(model, tensors, rng):
    """The checkpoint of a class that has a head of its own."""
    family = all_families()[model.config.model_type]
    others = [other for head in family.converted_heads if (other := family.native_class(head)) is not type(model)]
    if not others:
        return None
    torch.manual_seed(3)
    other = hostile_(rng.choice(others)(type(model.config).from_dict(model.config.to_dict())), 3)
    prefix = f"{model.base_model_prefix}."
    ours = {name.removeprefix(prefix): tensor for name, tensor in model.state_dict().items()}
    stored = {name: tensor for name, tensor in other.state_dict().items() if name not in other.all_tied_weights_keys}
    # What both have is ours, and so is a head that the other class lacks.
    inside = {name: ours.get(name.removeprefix(prefix), tensor) for name, tensor in stored.items()}
    names = {name.removeprefix(prefix) for name in stored}
    return inside | {name: tensor for name, tensor in tensors.items() if name.removeprefix(prefix) not in names}


def pretraining_head(model, tensors, rng):
    """BERT's two heads, of which a class has one or none."""
    if all_families()[model.config.model_type].primary != "masked_lm":
        return None
    more = {"cls.seq_relationship.weight": torch.randn(2, model.config.hidden_size)}
    return tensors | more


# Tied tensors and tensors that may be absent.


def every_copy(model, tensors, rng):
    return dict(model.state_dict()) if model.all_tied_weights_keys else None


def one_copy(model, tensors, rng):
    """Of tensors that are tied, another one is stored than the class would store."""
    tied = [pair for pair in model.all_tied_weights_keys.items() if pair[1] in tensors]
    if not tied:
        return None
    target, source = rng.choice(tied)
    return {target if name == source else name: tensor for name, tensor in tensors.items()}


def some_copies(model, tensors, rng):
    state = model.state_dict()
    tied = [name for name in model.all_tied_weights_keys if name not in tensors]
    chosen = [name for name in tied if rng.random() < 0.5]
    return tensors | {name: state[name] for name in chosen} if chosen else None


def without(*endings):
    def layout(model, tensors, rng):
        kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(endings)}
        return kept if len(kept) < len(tensors) else None

    layout.__name__ = f"without_{endings[0].strip('.').replace('.', '_')}"
    return layout


# Dtypes.


def mixed_dtypes(model, tensors, rng):
    return {
        name: tensor.to(rng.choice((torch.float32, torch.bfloat16, torch.float16)))
        if tensor.is_floating_point()
        else tensor
        for name, tensor in tensors.items()
    }


LAYOUTS = (
    without_prefix, with_prefix, first_names_of_norms, names_of_today, buffers, rotary_tables, masks, window_masks,
    position_ids, position_tables, in_another_head, pretraining_head, every_copy, one_copy, some_copies,
    without("final_logits_bias"), without("pooler.dense.weight", "pooler.dense.bias", "pooler.weight", "pooler.bias"),
    without("decoder.bias"), without("predictions.bias", "lm_head.bias"), mixed_dtypes,
)  # fmt: skip
OF_TIES = (every_copy, one_copy, some_copies)
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def differences(folder, model):
    """
    Names of tensors in which ours, taken back, is not the model that the stock class loads from the same files; None
    where that class would make up weights, or cannot read them.
    """
    try:
        stock, info = type(model).from_pretrained(folder, output_loading_info=True)
    except RuntimeError:
        return None
    if info["missing_keys"] or info["mismatched_keys"]:
        return None
    ours = hf_variants.from_native(folder, dtype=stock.dtype)
    back = hf_variants.to_native(ours, model.config.model_type)
    expected, made = stock.state_dict(), back.state_dict()
    different = [name for name in expected if name not in made or not torch.equal(expected[name], made[name])]
    return different + sorted(made.keys() - expected.keys())
