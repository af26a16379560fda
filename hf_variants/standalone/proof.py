"""What has to be the same in a variant and in its standalone files before anyone gets them."""

import contextlib
import copy
import importlib
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..model.configuration_variant_seq2seq import DECODER_FIELDS
from .axes import NotStandalone
from .writing import Source, variant_class, write_files


# Of the model that is compared: enough layers for every kind that a stack has, and tokens for every special id.
LAYERS = 2
VOCABULARY = 256
LENGTH = 12


@contextlib.contextmanager
def loaded(source: Source) -> Iterator[ModuleType]:
    """The written model file, imported from a folder and under a name of its own."""
    package = f"standalone_{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory() as folder:
        write_files(source, Path(folder))
        parent = ModuleType(package)
        parent.__path__ = [folder]
        sys.modules[package] = parent
        try:
            importlib.invalidate_caches()
            yield importlib.import_module(f"{package}.modeling_{source.stem}")
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] == package]:
                del sys.modules[name]


def reduced(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with few layers and tokens: as it is in all that the written file has resolved."""
    if config.is_encoder_decoder:
        values = config.to_dict()
        parts = {"encoder": reduced(config.encoder).to_dict(), "decoder": reduced(config.decoder).to_dict()}
        same = max(parts["encoder"]["vocab_size"], parts["decoder"]["vocab_size"])
        if config.share_embeddings:
            parts["encoder"]["vocab_size"] = parts["decoder"]["vocab_size"] = same
        for name in ("model_type", *DECODER_FIELDS):
            values.pop(name, None)
        return type(config)(**{**values, **parts})
    layers = [_features_of(layer) if config.is_heterogeneous else None for layer in config.per_layer_config]
    kinds = [
        (config.layer_types[i], str(config.rope_parameters_of(i)), layers[i]) for i in range(config.num_hidden_layers)
    ]
    depth = min(max([LAYERS, *(kinds.index(kind) + 1 for kind in kinds)]), config.num_hidden_layers)
    values = config.to_dict()
    special = [config.bos_token_id, config.eos_token_id, config.pad_token_id]
    ids = [i for entry in special for i in (entry if isinstance(entry, list) else [entry]) if i is not None]
    values |= {"num_hidden_layers": depth, "vocab_size": min(config.vocab_size, max([VOCABULARY, *ids]) + 1)}
    for name in ("layer_types", "no_rope_layers", "layer_rope_theta"):
        if values.get(name) is not None:
            values[name] = values[name][:depth]
    if config.is_heterogeneous:
        values["per_layer_config"] = {i: own for i, own in values["per_layer_config"].items() if int(i) < depth}
    for fields in (values, *(values.get("per_layer_config") or {}).values()):
        if fields.get("ffn_chunk_size"):
            # It must divide every length, that of a single token included.
            fields["ffn_chunk_size"] = 1
    values.pop("model_type", None)
    return type(config)(**values)


def _features_of(layer: PreTrainedConfig) -> str:
    """What tells the kind of a layer: all that `per_layer_config` can change but sizes."""
    fields = [name for name in sorted(layer.per_layer_fields()) if type(getattr(layer, name)) is not int]
    return str([getattr(layer, name) for name in fields] + list(getattr(layer, "skip", ())))


def models(
    source: Source, module: ModuleType, config: PreTrainedConfig, head: str
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The variant and the written model of this config and head, the variant with random weights."""
    own_class = getattr(module, source.name + head)
    variant = variant_class(config, head)(config)
    standalone = own_class(own_class.config_class(**source.values(config), id2label=config.id2label))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in variant.state_dict().items():
            if tensor.is_floating_point():
                # Far from where new weights are, and of a size that keeps activations finite.
                scale = tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 0.5
                noise = torch.randn(tensor.shape, generator=generator) * scale
                tensor.copy_(noise + (0.7 if tensor.ndim == 1 else 0.0))
                if name.endswith("running_var"):
                    tensor.abs_()
    return variant.eval(), standalone.eval()


def differences(source: Source, config: PreTrainedConfig) -> list[str]:
    """What the written file computes otherwise than the variant; nothing where all is the same."""
    with loaded(source) as module:
        variant, standalone = models(source, module, reduced(config), source.heads[0])
        names, own = variant.state_dict(), standalone.state_dict()
        if names.keys() != own.keys():
            return [f"the names of tensors ({', '.join(sorted(names.keys() ^ own.keys())[:4])})"]
        if shapes := [name for name in names if names[name].shape != own[name].shape]:
            return [f"the shapes of tensors ({', '.join(shapes[:4])})"]
        defaults = [model.config._attn_implementation for model in (variant, standalone)]
        if defaults[0] != defaults[1]:
            return [f"the default attention ({' and '.join(defaults)})"]
        standalone.load_state_dict(names)
        standalone.tie_weights()
        return [
            what for dtype in (torch.float32, torch.bfloat16) for what in _differences_in(variant, standalone, dtype)
        ]


def _differences_in(variant: PreTrainedModel, standalone: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    found = []
    config = getattr(variant.config, "encoder", variant.config)
    pair = [model.to(dtype).eval() for model in (variant, standalone)]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, config.vocab_size, (2, LENGTH), generator=generator)
    if config.pad_token_id is not None:
        ids[ids == config.pad_token_id] = (config.pad_token_id + 1) % config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, : LENGTH // 3] = 0
    inputs = {"whole rows": {"input_ids": ids}, "padded rows": {"input_ids": ids, "attention_mask": mask}}
    if config.type_vocab_size > 1:
        types = torch.randint(0, config.type_vocab_size, ids.shape, generator=generator)
        inputs["token types"] = {"input_ids": ids, "token_type_ids": types}
    if config.pad_token_id is None and type(variant).__name__.endswith(("SequenceClassification", "MultipleChoice")):
        # Which tells the last real token.
        inputs["whole rows"]["attention_mask"] = torch.ones_like(ids)
    if getattr(variant.config, "decoder", config).classifier_pooling == "end_of_sequence":
        ids[:, -1] = torch.tensor(variant.config.eos_token_id).flatten()[0]
    generates = variant.can_generate()
    of_sequences = type(variant).__name__.endswith("SequenceClassification")
    # The place of a sequence's vector in the decoder is found in the source.
    if variant.config.is_encoder_decoder and not of_sequences:
        vocab_size = variant.config.decoder.vocab_size
        target = torch.randint(0, vocab_size, (2, LENGTH - 3), generator=generator)
        inputs = {name: {**batch, "decoder_input_ids": target} for name, batch in inputs.items()}
    if variant.config.is_encoder_decoder:
        inputs["padded rows"]["attention_mask"] = mask.flip(1)
    if type(variant).__name__.endswith("MultipleChoice"):
        # (batch, length) -> (batch, choices, length), of the same two in either order
        inputs = {
            name: {key: torch.stack([each, each.flip(0)], dim=1) for key, each in batch.items()}
            for name, batch in inputs.items()
        }
        ids = inputs["whole rows"]["input_ids"]
    for backend in ("eager", "sdpa"):
        if backend == "sdpa" and variant.config.unsupported_attention_features("sdpa"):
            continue
        for model in pair:
            model.set_attn_implementation(backend)
        where = f"in {str(dtype).removeprefix('torch.')}, {backend}"
        for name, batch in inputs.items():
            with torch.no_grad():
                one, two = (logits_of(model(**batch)) for model in pair)
            real = batch.get("attention_mask", torch.ones_like(ids)).bool()
            if "decoder_input_ids" in batch or one.shape[:2] != real.shape:
                real = torch.ones(one.shape[:2], dtype=torch.bool)
            if not torch.equal(one[real], two[real]):
                found.append(f"the logits of {name} {where}")
        gradients = []
        for model in pair:
            model.zero_grad()
            arguments = {"use_cache": False} if generates else {}
            scored = labels_for(model, inputs["whole rows"].get("decoder_input_ids", ids))
            model(**inputs["whole rows"], **scored, **arguments).loss.backward()
            gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        of_variant, of_file = gradients
        if wrong := [name for name in of_variant if not _same(of_variant[name], of_file[name])]:
            found.append(f"the gradients of {', '.join(wrong[:3])} {where}")
        if any(name.endswith("running_mean") for name in variant.state_dict()):
            found += [f"{what} in training {where}" for what in _differences_in_training(pair, inputs["padded rows"])]
        if generates:
            tokens = [
                model.generate(
                    ids, attention_mask=inputs["padded rows"]["attention_mask"], max_new_tokens=6, min_new_tokens=6,
                    do_sample=False,
                    pad_token_id=config.pad_token_id or 0, eos_token_id=None, output_logits=True,
                    return_dict_in_generate=True,
                )
                for model in pair
            ]  # fmt: skip
            logits = [torch.stack(made.logits) for made in tokens]
            if not torch.equal(tokens[0].sequences, tokens[1].sequences) or not torch.equal(*logits):
                found.append(f"cached generation {where}")
    return found


def _differences_in_training(pair: list[PreTrainedModel], batch: dict[str, torch.Tensor]) -> list[str]:
    """What differs after a step of models whose norms see the batch, without dropout."""
    gradients, statistics = [], []
    for model in pair:
        before = copy.deepcopy(model.state_dict())
        model.train().zero_grad()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
        arguments = {"use_cache": False} if model.can_generate() else {}
        labels = labels_for(model, batch.get("decoder_input_ids", batch["input_ids"]))
        model(**batch, **labels, **arguments).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        statistics.append({name: buffer.clone() for name, buffer in model.named_buffers() if name in before})
        model.load_state_dict(before)
        model.eval()
    found = []
    for what, (one, two) in (("the gradients of", gradients), ("the statistics", statistics)):
        if wrong := [name for name in one if not _same(one[name], two[name])]:
            found.append(f"{what} {', '.join(wrong[:3])}")
    return found


def logits_of(output: ModelOutput) -> torch.Tensor:
    """The logits of a head; of a span classifier, (batch, length, 2)."""
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], dim=-1)


def labels_for(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model of this head is scored against, made of tokens, (batch, length) or (batch, choices, length)."""
    head = type(model).__name__
    if head.endswith("QuestionAnswering"):
        return {"start_positions": tokens[:, 0] % LENGTH, "end_positions": tokens[:, 1] % LENGTH}
    if head.endswith("SequenceClassification"):
        return {"labels": tokens[:, 0] % model.config.num_labels}
    if head.endswith("MultipleChoice"):
        return {"labels": tokens[:, 0, 0] % tokens.shape[1]}
    return {"labels": tokens % model.config.num_labels if head.endswith("TokenClassification") else tokens}


def _same(one: torch.Tensor | None, two: torch.Tensor | None) -> bool:
    return one is two if one is None or two is None else torch.equal(one, two)


def refuse_differences(source: Source, config: PreTrainedConfig) -> None:
    """Raise if the written file is not the variant."""
    if found := differences(source, config):
        raise NotStandalone(f"The standalone file differs from the variant in {'; '.join(found[:4])}")
