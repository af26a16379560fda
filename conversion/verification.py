"""Proof that two checkpoints are the same model: configs, tensors, logits, generated tokens, tokenizers."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from hf_variants.model.configuration_variant import VariantConfig

from . import block_configs, checkpoint, folds, rules, tensor_files
from .casting import as_dtype
from .companions import has_tokenizer
from .config_map import differing_fields
from .errors import ConversionError, NotRepresentable, reading
from .family import Family, family_and_head, family_of, head_of_variant, is_variant, read_config, stacks, variant_class
from .folds import Folding
from .foreign import is_foreign
from .generation_settings import stored_generation_config
from .gguf_files.proof import Reading, readings
from .gguf_source import is_gguf, load_gguf
from .in_memory import from_native
from .json_files import read_object
from .layout import NO_PLACE, as_transformers_reads, output_embedding
from .memory import lay_alike
from .native_source import native_family_and_head, refuse_more_layers_than_tensors
from .skeleton import empty_model, loading, stored_tensors
from .tokenization import differences, load_tokenizer, probe_texts


# Longest input that is tried, to leave a laptop usable. Longer windows are narrowed and farther positions given.
MAX_LENGTH = 640
NARROW_WINDOW = 20


@dataclass
class Check:
    """One comparison: its name, whether it holds, and what was seen."""

    name: str
    ok: bool
    detail: str


@dataclass
class VerificationReport:
    """
    The outcome of `verify`.

    Attributes:
        a, b: what was compared.
        checks: all comparisons.
        deviations: listed reasons for rounding differences, which widen the bound from equality.
        limits: what was not compared, where memory was bounded.
    """

    a: str
    b: str
    checks: list[Check] = field(default_factory=list)
    deviations: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(check.ok for check in self.checks)

    @property
    def _verdict(self) -> str:
        return "DIFFERENT" if not self.ok else "Equal, as far as compared" if self.limits else "Equal"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}

    def to_markdown(self) -> str:
        lines = [
            f"**{self._verdict}**: `{self.a}` and `{self.b}`",
            "",
            "| check | holds | seen |",
        ]
        lines.append("|---|---|---|")
        lines += [f"| {check.name} | {'yes' if check.ok else 'NO'} | {check.detail} |" for check in self.checks]
        lines += ["", *(f"Rounding differs by design: {reason}." for reason in self.deviations)]
        lines += [f"Not the whole of it: {limit}." for limit in self.limits]
        return "\n".join(lines).rstrip()


@dataclass
class _Loaded:
    """A model with the weights' own dtype, its folder or file, what was wrong with it, and what other readers see."""

    model: PreTrainedModel
    path: Path | None = None
    faults: list[str] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)


def _load(source: str | Path | PreTrainedModel, dtype: torch.dtype | None, ignore_keys: Iterable[str]) -> _Loaded:
    if isinstance(source, PreTrainedModel):
        return _Loaded(source if dtype in (None, source.dtype) else copy.deepcopy(source).to(dtype))
    if is_gguf(source):
        model = load_gguf(Path(source), ignore_keys)
        seen = readings(Path(source), model, ignore_keys)
        if model is None:
            model = from_native(source, ignore_keys=ignore_keys)
        return _Loaded(model if dtype is None else model.to(dtype), Path(source), readings=seen)
    if is_foreign(source):
        # No class of transformers computes it: what a conversion in memory makes is what one on disk must.
        return _Loaded(from_native(source, dtype=dtype))
    folder = checkpoint.resolve_folder(source)
    config = read_config(folder)
    if block_configs.overrides(config):
        # The stock class has layers that are alike.
        return _Loaded(from_native(source, dtype, ignore_keys=ignore_keys))
    if not is_variant(config):
        family_of(config.model_type)
    # Refuses indexes that leave the folder, before transformers follows them.
    weights = checkpoint.weights_of(source, folder)
    refuse_more_layers_than_tensors(config, weights)
    if is_variant(config):
        model_class = variant_class((config.architectures or ["VariantForCausalLM"])[0])
    else:
        family, head = native_family_and_head(config, weights)
        model_class = family.native_class(head)
    is_file = Path(source).is_file()
    by_itself = {"config": config, "state_dict": {name: weights(name) for name in weights.names()}} if is_file else {}
    if "add_pooling_layer" in signature(model_class).parameters and not any(
        "pooler." in name for name in weights.names()
    ):
        # It would be a random one.
        by_itself["add_pooling_layer"] = False
    # transformers fills missing tensors with random values, and leaves out what it has no place for.
    if (folder / GENERATION_CONFIG_NAME).is_file():
        read_object(folder / GENERATION_CONFIG_NAME)
    with loading(folder, model_class):
        _refuse_larger_model(empty_model(model_class, config), folder, weights)
        model, info = model_class.from_pretrained(
            None if is_file else folder, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True,
            **by_itself,
        )  # fmt: skip
    if is_file and model.can_generate():
        model.generation_config = stored_generation_config(folder)
    unread: Iterable[str] = ()
    if info["unexpected_keys"]:
        # Layers that the config does not have are faults.
        with suppress(ConversionError):
            layout = as_transformers_reads(empty_model(model_class, config), weights)
            # Whatever else a native checkpoint has; what we write has nothing else.
            unread = {
                name for name, stored in layout.apart.items()
                if not is_variant(config) or layout.passed_over[stored] != NO_PLACE
            }  # fmt: skip
    faults = [
        f"{kind} {name if isinstance(name, str) else name[0]}"
        for kind in ("missing", "unexpected", "mismatched")
        for name in sorted(info[f"{kind}_keys"])
        if kind != "unexpected" or name not in unread
    ]
    start = getattr(config, "decoder_start_token_id", None)
    if isinstance(start, int) and start >= _vocab_size(model):
        faults.append(f"no embedding for the decoder_start_token_id {start}")
    if getattr(config, "quantization_config", None) is None:
        expected, prefix = model.state_dict(), f"{model.base_model_prefix}."
        for name in weights.names():
            place = expected.get(name, expected.get(prefix + name))
            dtype_of = weights.header(name).dtype
            if place is not None and place.is_floating_point() and dtype_of not in tensor_files.FLOATS:
                faults.append(f"{dtype_of} {name}")
    return _Loaded(model, folder, faults)


def _refuse_larger_model(model: PreTrainedModel, folder: Path, weights: checkpoint.Weights) -> None:
    """Before memory is taken for weights that are not there; a file of 4 bits has an eighth of the numbers."""
    described = sum(tensor.numel() for tensor in model.state_dict().values())
    stored = sum(weights.header(name).numel() for name in weights.names())
    if described > 10 * stored + 1_000_000:
        raise ConversionError(
            f"{folder / CONFIG_NAME} describes {described:,} numbers, and the weights have {stored:,}: their shapes are "
            "others. Check that the config belongs to these weights."
        )


def _inputs(model: PreTrainedModel, length: int, batch: int = 2) -> torch.Tensor:
    """Random token ids without padding tokens, the same for models of one vocabulary: (batch, length)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, _vocab_size(model), (batch, length), generator=generator)
    pad = model.config.pad_token_id
    if pad is not None:
        ids[ids == pad] = (pad + 1) % _vocab_size(model)
    end = model.config.eos_token_id
    if _classifies_sequences(model) and model.config.is_encoder_decoder and isinstance(end, int):
        # The token whose vector BART's classifier reads, in any part of the input.
        ids[:, 1] = end
    return ids


def _classifies_sequences(model: PreTrainedModel) -> bool:
    return "SequenceClassification" in type(model).__name__


def _chooses(model: PreTrainedModel) -> bool:
    return "MultipleChoice" in type(model).__name__


def _adapted(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The inputs as this kind of model takes them: encoders count positions themselves, decoders need inputs, and rows are
    the choices of one question.
    """
    adapted = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    if _chooses(model):
        # (choices, length) -> (1, choices, length)
        adapted = {name: tensor.unsqueeze(0) for name, tensor in adapted.items()}
    if model.config.is_encoder_decoder or not model.can_generate():
        adapted.pop("position_ids", None)
    if model.config.is_encoder_decoder:
        ids = adapted["input_ids"]
        # What is classified stands in the decoder where it stands in the source.
        length = ids.shape[1] if _classifies_sequences(model) else max(ids.shape[1] * 3 // 4, 1)
        adapted["decoder_input_ids"] = ids.flip(1)[:, :length]
    return adapted


def _outputs(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits (of a span classifier both), or hidden states of a model without a head."""
    with torch.no_grad():
        outputs = model(**_adapted(model, inputs))
    if "start_logits" in outputs:
        return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1).cpu()
    return (outputs.logits if "logits" in outputs else outputs.last_hidden_state).cpu()


def _kind(model: PreTrainedModel) -> str:
    """The task of a model's head, as conversions name it, and of how many stacks it is."""
    name = type(model).__name__
    if is_variant(model.config):
        head, is_pair = head_of_variant(name), model.config.is_encoder_decoder
    else:
        family, head = family_and_head(model.config, name)
        is_pair = family.config_map.config_class is not VariantConfig
    return f"{head}, {'encoder-decoder' if is_pair else 'one stack'}"


def _vocab_size(model: PreTrainedModel) -> int:
    """The number of tokens that every stack has a row for, whatever a config says of it (Marian's says more)."""
    stacks = [model.get_encoder(), model.get_decoder()] if model.config.is_encoder_decoder else [model]
    return min(stack.get_input_embeddings().weight.shape[0] for stack in stacks)


def _position_limit(config: VariantConfig) -> int | None:
    """How many positions the model has a table for; `None` where it computes any."""
    has_table = config.position_embedding_type in ("learned", "sinusoidal") or (
        config.rope_table_stored or config.rope_table_in_checkpoint
    )
    if not has_table or config.sinusoidal_table_grows:
        return None
    # RoBERTa counts from behind the padding token, in a table of this size.
    skipped = config.pad_token_id + 1 if config.position_ids_source == "input_ids" else 0
    return config.max_position_embeddings - skipped


def _contexts(config: VariantConfig) -> list[int]:
    """Lengths at which the position encoding may change its formula."""
    if config.position_embedding_type != "rope":
        return []
    entries = filter(None, (config.rope_parameters_of(i) for i in range(config.num_hidden_layers)))
    originals = {entry.get("original_max_position_embeddings") for entry in entries}
    return sorted({config.max_position_embeddings, *filter(None, originals)})


def _interesting_length(config: PreTrainedConfig, limit: int | None) -> int:
    """Past the sliding windows and the original contexts, as far as `MAX_LENGTH` and position tables allow."""
    marks = [64]
    for stack in stacks(config):
        marks += [mark + 16 for mark in (*_contexts(stack), stack.sliding_window or 0)]
    return _in_whole_chunks(config, min(max(marks), MAX_LENGTH, limit or MAX_LENGTH))


def _in_whole_chunks(config: PreTrainedConfig, length: int) -> int:
    """About as many tokens; feed-forward networks in chunks take whole ones."""
    chunk = math.lcm(*(stack.ffn_chunk_size or 1 for stack in stacks(config)))
    return max(length - length % chunk, chunk)


def _far_positions(config: PreTrainedConfig, limit: int | None, length: int) -> list[torch.Tensor]:
    """
    Positions that a long input would reach, for a short one: across the borders where frequencies change, or at the
    end of the position table.
    """
    if not isinstance(config, VariantConfig) or not config.is_causal:
        return []
    starts = [context - length // 2 for context in _contexts(config)] if limit is None else [limit - length]
    return [torch.arange(start, start + length) for start in starts if start > 0]


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference, relative to the reference's standard deviation; of one number, to itself."""
    ours, reference = ours.double().cpu(), reference.double().cpu()
    spread = (reference.std() if reference.numel() > 1 else reference.abs().max()).item() or 1.0
    return (ours - reference).abs().max().item() / spread


def set_attention(model: PreTrainedModel, backend: str) -> None:
    """Switch a model's attention, also in stacks with copied configs, which transformers 5.17 leaves as they are."""
    model.set_attn_implementation(backend)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation_internal = model.config._attn_implementation


def _compare(name: str, a: torch.Tensor, b: torch.Tensor, bound: float) -> Check:
    if a.shape != b.shape:
        return Check(name, False, f"shapes {tuple(a.shape)} and {tuple(b.shape)}")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return Check(name, torch.equal(a, b), "values that are not finite")
    if torch.equal(a, b):
        return Check(name, True, "bit-identical")
    error = relative_error(a, b)
    return Check(name, error <= bound, f"largest difference {error:.1e} of the standard deviation (bound {bound:.0e})")


@dataclass
class _Pair:
    """
    What is known about two models before they run.

    Attributes:
        family: of the native one, where the other is a variant.
        folding: what was folded into the native one's weights, where the two configs differ by that alone.
        config: of the architecture, as ours.
        limit: how many positions both models have tables for.
        check: the comparison of the configs.
    """

    family: Family | None
    folding: Folding | None
    config: PreTrainedConfig
    limit: int | None
    check: Check


def _as_variant(model: PreTrainedModel, other: PreTrainedModel, ignore_keys: Iterable[str]) -> PreTrainedConfig:
    """The config of a model as ours; keys that `other` was converted without may be ignored again."""
    if is_variant(model.config):
        return model.config
    family, head = family_and_head(model.config, type(model).__name__)
    leftovers = getattr(other.config, "native_leftovers", None) or {}
    with reading(f"The config of {model.config.name_or_path or type(model).__name__}"):
        config = family.config_map.to_variant(model.config, [*leftovers, *ignore_keys], head)
    if family.loosely_tied in stored_tensors(model):
        # The config says otherwise; transformers went by the weights.
        config.tie_word_embeddings = False
    if getattr(config, "pooler", False) and not any("pooler." in name for name in stored_tensors(model)):
        # A bare encoder that was loaded without it, as those of GGUF files are.
        config.pooler = False
    return config


def _pair(a: PreTrainedModel, b: PreTrainedModel, ignore_keys: Iterable[str]) -> _Pair:
    """Compare the configs, each as ours; a native model may also be what folds make of the variant."""
    left, right = _as_variant(a, b, ignore_keys), _as_variant(b, a, ignore_keys)
    family = folding = None
    ours = a if is_variant(a.config) else b
    head = head_of_variant(type(ours).__name__) if is_variant(ours.config) else ""
    differences = differing_fields(left, right, head)
    if is_variant(a.config) != is_variant(b.config):
        variant, native, as_variant = (a, b, right) if is_variant(a.config) else (b, a, left)
        family, _ = family_and_head(native.config, type(native).__name__)
        if differences:
            folding = _folding_to(variant, native.config.model_type, as_variant)
    if folding is not None:
        check = Check("config", True, f"every field, after {'; '.join(folding.sentences(a.dtype))}")
    else:
        seen = "; ".join(f"{name}: {x!r} and {y!r}" for name, (x, y) in differences.items())
        check = Check("config", not differences, seen or "every field that changes what the model computes")
    limits = [_position_limit(stack) for config in (left, right) for stack in stacks(config)]
    limit = min(filter(None, limits), default=None)
    return _Pair(family, folding, left if is_variant(a.config) else right, limit, check)


def _folding_to(variant: PreTrainedModel, model_type: str, as_variant: PreTrainedConfig) -> Folding | None:
    """The folds that make this native model of a variant, if any do."""
    head = head_of_variant(type(variant).__name__)
    try:
        _, _, folding = folds.plan(variant.config, model_type, head)
    except NotRepresentable:
        return None
    return None if differing_fields(folding.config, as_variant, head) else folding


def _read_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A model's tensors; of two biases of a tied LM head that differ, the head's own, as it is converted."""
    tensors = {name: tensor.cpu() for name, tensor in stored_tensors(model).items()}
    head = output_embedding(model) or ""
    bias = head.removesuffix("weight") + "bias"
    source = model.get_expanded_tied_weights_keys(all_submodels=True).get(bias)
    if head not in tensors and bias in tensors and source in tensors:
        tensors[source] = tensors.pop(bias)
    return tensors


def _check_tensors(a: PreTrainedModel, b: PreTrainedModel, pair: _Pair) -> Check:
    """Bit equality of the weights: through the rules in both directions, or name by name for one class."""
    left, right = (_read_tensors(model) for model in (a, b))
    if pair.family is None:
        if type(a) is not type(b):
            # Rows of the vocabulary that no input draws count as well.
            left, right = (_as_ours(model, t, pair.config) for model, t in ((a, left), (b, right)))
        different = sorted(
            name
            for name in left.keys() | right.keys()
            if name not in left or name not in right or not torch.equal(left[name], right[name])
        )
        return Check("weights", not different, f"different: {different[:4]}" if different else "bit-identical")
    variant, ours, theirs = (a, left, right) if is_variant(a.config) else (b, right, left)
    try:
        made = _carried(variant, ours, theirs, pair, to_native=True)
        different = [name for name, tensor in made.items() if not torch.equal(tensor, theirs[name])]
        if pair.folding is None:
            back = _carried(variant, theirs, ours, pair, to_native=False)
            different += [name for name, tensor in back.items() if not torch.equal(tensor, ours[name])]
    except ValueError as error:
        return Check("weights", False, str(error))
    seen = f"{len(made)} tensors, {'both ways' if pair.folding is None else 'folded'}"
    return Check("weights", not different, seen if not different else f"different: {sorted(different)[:4]}")


def _as_ours(model: PreTrainedModel, tensors: dict[str, torch.Tensor], config: PreTrainedConfig) -> dict:
    """The tensors of a model of either kind in our layout."""
    if is_variant(model.config):
        return tensors
    family, head = family_and_head(model.config, type(model).__name__)
    shapes = {name: t.shape for name, t in stored_tensors(empty_model(family.variant_class(head), config)).items()}
    steps = rules.plan(family.rules_for(head), list(tensors), shapes, to_native=False)
    return dict(rules.run(steps, tensors.__getitem__, config, shapes, to_native=False))


def _carried(
    variant: PreTrainedModel,
    tensors: dict[str, torch.Tensor],
    targets: dict[str, torch.Tensor],
    pair: _Pair,
    to_native: bool,
) -> dict[str, torch.Tensor]:
    """Tensors in the other model's layout."""
    config, names, load = variant.config, list(tensors), tensors.__getitem__
    if pair.folding is not None:
        config, (names, load) = pair.folding.config, pair.folding.apply(names, load)
    shapes = {name: tensor.shape for name, tensor in targets.items()}
    head = head_of_variant(type(variant).__name__)
    steps = rules.plan(pair.family.rules_for(head), names, shapes, to_native=to_native)
    return dict(rules.run(steps, load, config, shapes, to_native=to_native))


def _first_divergence(a: PreTrainedModel, b: PreTrainedModel, inputs: dict[str, torch.Tensor], bound: float) -> str:
    """The first hidden state that differs, to say where to look."""
    with torch.no_grad():
        outputs = [model(**_adapted(model, inputs), output_hidden_states=True) for model in (a, b)]
    if a.config.is_encoder_decoder:
        sides = [[out.encoder_hidden_states[-1] for out in outputs], [out.decoder_hidden_states for out in outputs]]
        if relative_error(*sides[0]) > bound:
            return "in the encoder"
        states = sides[1]
    else:
        states = [out.hidden_states for out in outputs]
    for index, (left, right) in enumerate(zip(*states, strict=True)):
        if left.shape != right.shape or relative_error(left, right) > bound:
            return "in the embeddings" if index == 0 else f"in layer {index - 1}"
    return "after the last layer"


def _greedy(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, tokens: int, beams: int) -> torch.Tensor:
    torch.manual_seed(0)
    settings = copy.deepcopy(model.generation_config)
    settings.update(
        do_sample=False, num_beams=beams, max_new_tokens=tokens, min_new_tokens=tokens, max_length=None,
        pad_token_id=model.config.pad_token_id if model.config.pad_token_id is not None else 0,
        temperature=None, top_p=None, top_k=None, eos_token_id=None,
    )  # fmt: skip
    if model.config.is_encoder_decoder and settings.decoder_start_token_id is settings.bos_token_id is None:
        # Both models start with one token, whichever; without any `generate` refuses.
        settings.decoder_start_token_id = settings.pad_token_id
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    return model.generate(**inputs, generation_config=settings).cpu()


def _with_own_settings(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """What `generate` makes of one prompt with the checkpoint's own settings, sampling from one seed."""
    torch.manual_seed(0)
    settings = copy.deepcopy(model.generation_config)
    settings.max_new_tokens, settings.max_length = tokens, None
    return model.generate(ids.to(model.device), generation_config=settings)


def _check_tokens(
    name: str,
    seen: str,
    left: PreTrainedModel,
    right: PreTrainedModel,
    generate: Callable[[PreTrainedModel], torch.Tensor],
) -> Check:
    """What both generate; where both refuse alike, that."""
    made: list[Any] = []
    for model in (left, right):
        try:
            made.append(generate(model).tolist())
        # Settings that want more than a prompt or contradict each other, and feed-forward networks in chunks of
        # several tokens, which decoding has one at a time.
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            made.append(f"{type(error).__name__}: {error}")
    same = made[0] == made[1]
    return Check(name, same, f"{made[0]} and {made[1]}" if not same else made[0] if isinstance(made[0], str) else seen)


def _check_tokenizers(a: Path | None, b: Path | None) -> Check | None:
    """What `AutoTokenizer` reads from both; none if neither has one, or one of the models is in memory."""
    if a is None or b is None:
        return None
    present = [has_tokenizer(path) if path.is_dir() else not isinstance(load_tokenizer(path), str) for path in (a, b)]
    if not all(present):
        return Check("tokenizer", False, f"only {(a, b)[present.index(True)].name} has one") if any(present) else None
    first, second = load_tokenizer(a), load_tokenizer(b)
    unread = [made for made in (first, second) if isinstance(made, str)]
    if unread:
        # What is not installed here, or is code, is missing to both.
        return Check("tokenizer", len(unread) == 2, f"not compared: {unread[0]}") if len(unread) == 1 else None
    found = differences(first, second)
    seen = f"{len(first)} tokens, {len(probe_texts(first))} texts, settings, chat template"
    return Check("tokenizer", not found, "; ".join(found) or seen)


def _check_generation_configs(a: PreTrainedModel, b: PreTrainedModel) -> Check | None:
    """Every setting, since any of them may decide the text."""
    if not (a.can_generate() and b.can_generate()):
        return None
    metadata = ("transformers_version", "_from_model_config", "_commit_hash", "_original_object_hash")
    first, second = (
        {name: value for name, value in model.generation_config.to_dict().items() if name not in metadata}
        for model in (a, b)
    )
    names = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    seen = "; ".join(f"{name}: {first.get(name)!r} and {second.get(name)!r}" for name in names)
    return Check("generation config", not names, seen or "every setting")


class _CountedDropout(TorchFunctionMode):
    """
    Dropout whose n-th mask depends on n alone, since classes draw other random numbers between; no layer is skipped by
    LayerDrop, which draws one number per layer and which variants do not have.
    """

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.rand and args in (([],), ((),), ()):
            return torch.ones(())
        if func is not torch.nn.functional.dropout:
            return func(*args, **kwargs)
        given = signature(func).bind(*args, **kwargs)
        given.apply_defaults()
        states, rate = given.arguments["input"], given.arguments["p"]
        if not given.arguments["training"] or rate == 0:
            return states
        self.calls += 1
        generator = torch.Generator().manual_seed(self.calls)
        mask = torch.rand(states.numel(), generator=generator).view(states.shape).to(states.device) >= rate
        return states * mask / (1 - rate)


def _labelled(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """Inputs with labels for the model's head; none if it has no loss."""
    names, config = signature(model.forward).parameters, model.config
    inputs = {"input_ids": ids.to(model.device)}
    generator = torch.Generator().manual_seed(1)
    if "start_positions" in names:
        return {**inputs, "start_positions": ids[:, 0] % ids.shape[1], "end_positions": ids[:, 1] % ids.shape[1]}
    if "labels" not in names:
        return None
    if _chooses(model):
        return {"input_ids": inputs["input_ids"].unsqueeze(0), "labels": (ids[:1, 0] % len(ids)).to(model.device)}
    if "NextSentence" in type(model).__name__:
        return {**inputs, "labels": (ids[:, 0] % 2).to(model.device)}
    if _classifies_sequences(model):
        if config.problem_type == "multi_label_classification":
            labels = torch.randint(0, 2, (len(ids), config.num_labels), generator=generator).to(model.dtype)
        elif config.num_labels == 1 or config.problem_type == "regression":
            labels = torch.randn(len(ids), config.num_labels, generator=generator).squeeze(-1).to(model.dtype)
        else:
            labels = ids[:, 0] % config.num_labels
    else:
        labels = ids % config.num_labels if "TokenClassification" in type(model).__name__ else ids.clone()
        # What takes no part in a loss.
        labels[:, 1] = -100
    return {**inputs, "labels": labels.to(model.device)}


def _check_losses(left: PreTrainedModel, right: PreTrainedModel, ids: torch.Tensor, bound: float) -> Check | None:
    """The loss in training mode, with dropout as each class has it."""
    made = []
    for model in (left, right):
        inputs = _labelled(model, ids)
        if inputs is None:
            return None
        if model.can_generate() and not model.config.is_encoder_decoder:
            inputs["use_cache"] = False
        model.train()
        dropout = _CountedDropout()
        try:
            with torch.no_grad(), dropout:
                made.append((model(**inputs).loss.item(), dropout.calls))
        # An encoder-decoder whose config does not say what the decoder's inputs begin with has no loss of labels alone.
        except (ValueError, AttributeError) as error:
            if isinstance(error, AttributeError) and "decoder_start_token_id" not in str(error):
                raise
            made.append((str(error), None))
        # Marian's class takes logits to have as many columns as its config has tokens of the other language.
        except RuntimeError as error:
            if is_variant(model.config):
                raise
            return Check("training loss", True, f"not compared: {type(model).__name__} stops, {error}")
        finally:
            model.eval()
    (x, masks), (y, others) = made
    if masks is None or others is None:
        return None if masks is others is None else Check("training loss", False, f"{x} and {y}")
    same = x == y or abs(x - y) <= bound * max(abs(x), 1.0)
    seen = f"{x:.6g}, {masks} dropout masks" if same else f"{x!r} and {y!r}, {masks} and {others} dropout masks"
    return Check("training loss", same and masks == others, seen)


def verify(
    a: str | Path | PreTrainedModel,
    b: str | Path | PreTrainedModel,
    *,
    dtype: torch.dtype | str | None = None,
    new_tokens: int = 32,
    progress: bool = True,
    ignore_keys: Iterable[str] = (),
    memory: int | None = None,
) -> VerificationReport:
    """
    Prove that two models are the same, whichever of them is native.

    Compared, in the weights' own dtype and with eager attention: every field of the configs that matters; every tensor
    through the conversion rules in both directions; logits on a long input, with right and with left padding, at far
    positions and with a narrow window; greedy and beam-search tokens with the cache, and those of the checkpoint's own
    settings; all of these settings; the loss in training, with dropout; and where both are on disk, logits with the
    attention that each has by default, and what `AutoTokenizer` reads. Equality is exact unless the family lists an
    operation that must round differently; its bound is relative to the logits' standard deviation. A native model may
    also be what folds made of the variant (see `folds`): then the folded weights must be equal.

    Args:
        a, b: folders, Hub ids, GGUF files or loaded models.
        dtype: to which both are cast first; by default each stays as it is stored.
        new_tokens: number of tokens to generate.
        ignore_keys: as in `from_native`.
        memory: bytes that the weights of both may take together. Checkpoints that take more are compared tensor by tensor,
            and run as models of their first layers (see `bounded`); the report says so.

    Returns:
        a report; `.ok` is the verdict.
    """
    if memory is not None:
        # That module reads this one.
        from . import bounded

        if bounded.stored_bytes(a) + bounded.stored_bytes(b) > memory:
            if dtype is not None:
                raise ConversionError(
                    "`dtype` casts what is loaded, and `memory` compares stored tensors. Leave one out."
                )
            return bounded.verify_bounded(
                a, b, memory, new_tokens=new_tokens, progress=progress, ignore_keys=ignore_keys
            )  # fmt: skip
    names = [str(x) if not isinstance(x, PreTrainedModel) else type(x).__name__ for x in (a, b)]
    report = VerificationReport(*names)
    loaded = [_load(source, as_dtype(dtype), ignore_keys) for source in (a, b)]
    left, right = (side.model for side in loaded)
    for name, side in zip(names, loaded, strict=True):
        if side.path is not None:
            seen = "every tensor of the architecture, and no other" if not side.faults else ", ".join(side.faults[:6])
            report.checks.append(Check(f"tensors of {name}", not side.faults, seen))
        if side.readings:
            seen = "; ".join(f"{reading.name}: {reading.detail}" for reading in side.readings)
            report.checks.append(Check("GGUF file", all(each.ok is not False for each in side.readings), seen))
    for what, (x, y) in {
        "kind of model": (_kind(left), _kind(right)),
        "vocabulary": (_vocab_size(left), _vocab_size(right)),
        "dtype": (left.dtype, right.dtype),
    }.items():
        if x != y:
            report.checks.append(Check(what, False, f"{x} and {y}"))
    if not report.ok and report.checks:
        return report
    pair = _pair(left, right, ignore_keys)
    report.checks.append(pair.check)
    bound = _bound(left, right, pair, report)

    states = [(model, model.training, model.config._attn_implementation) for model in (left, right)]
    caching = [_use_cache(model) for model in (left, right)]
    put_back = lay_alike(left, right)
    if reason := _breaks_with_a_cache(left.eval(), right.eval(), pair):
        report.deviations.append(reason)
        for model in (left, right):
            _use_cache(model, False, False)
    if all(side.path is not None for side in loaded) and _runs(left, right, pair):
        report.checks.append(_check_default_attention(left.eval(), right.eval(), pair, bound))
    for model in (left, right):
        set_attention(model.eval(), "eager")
    # A class that cannot switch keeps its own (Falcon), and the other one follows.
    set_attention(left, right.config._attn_implementation)
    set_attention(right, left.config._attn_implementation)
    try:
        steps = _steps(left, right, pair, bound, new_tokens)
        steps.append(lambda: _check_generation_configs(left, right))
        steps.append(lambda: _check_tokenizers(*(side.path for side in loaded)))
        for step in tqdm(steps, desc="Verifying", unit="check", delay=1.0, disable=not progress):
            if (check := step()) is not None:
                report.checks.append(check)
    finally:
        put_back()
        for model, before in zip((left, right), caching, strict=True):
            _use_cache(model, *before)
        for model, training, backend in states:
            set_attention(model.train(training), backend)
    return report


def _bound(left: PreTrainedModel, right: PreTrainedModel, pair: _Pair, report: VerificationReport) -> float:
    """The largest difference of outputs that is accepted, relative to their spread; its reasons go to the report."""
    half = left.dtype in (torch.bfloat16, torch.float16)
    if pair.folding is not None:
        report.deviations = [f"folded: {fold}" for fold in pair.folding.sentences(left.dtype)]
        # Only against gross errors: the folded weights themselves are compared bit by bit.
        return 0.1 if half else 1e-4
    if pair.family is None:
        return 0.0 if type(left) is type(right) else (0.1 if half else 1e-5)
    deviations = [d for d in pair.family.deviations_of(pair.config) if not d.gradients_only]
    report.deviations = [deviation.reason for deviation in deviations]
    # bfloat16 has 2^16 times coarser rounding than float32, of which the bounds speak.
    coarse = {torch.bfloat16: 2.0**16, torch.float16: 2.0**13}.get(left.dtype, 1.0)
    return coarse * pair.family.bound(pair.config)


def _runs(left: PreTrainedModel, right: PreTrainedModel, pair: _Pair) -> bool:
    """A class that only holds the weights of a type with its own code does not run."""
    return pair.family is None or not {type(left), type(right)} & set(pair.family.own_models.values())


def _use_cache(model: PreTrainedModel, *values: bool | None) -> list[bool | None]:
    """Whether a model makes caches, by its config and by its generation settings; set both where values are given."""
    # OpenAI GPT's config has no such setting, and its class no cache.
    settings = [model.config, model.generation_config] if model.can_generate() else []
    settings = [each for each in settings if hasattr(each, "use_cache")]
    for each, value in zip(settings, values):
        each.use_cache = value
    return [each.use_cache for each in settings]


def _breaks_with_a_cache(left: PreTrainedModel, right: PreTrainedModel, pair: _Pair) -> str:
    """
    What to say where a class computes logits, and stops as soon as it makes a cache: decoders alone that have more layers
    than the encoder of their config (BART's relatives).
    """
    for model in (left, right):
        if not model.can_generate() or model.config.is_encoder_decoder or not _runs(left, right, pair):
            continue
        ids = _inputs(model, _in_whole_chunks(pair.config, 4), batch=1)
        try:
            _outputs(model, input_ids=ids)
        except IndexError as error:
            with suppress(IndexError), torch.no_grad():
                model(ids.to(model.device), use_cache=False)
                return f"compared without caches, with which {type(model).__name__} stops ({type(error).__name__}: {error})"
    return ""


def _check_default_attention(left: PreTrainedModel, right: PreTrainedModel, pair: _Pair, bound: float) -> Check:
    """Outputs with the attention that each has when it is loaded without a word about it."""
    length = min(_interesting_length(pair.config, pair.limit), 128)
    ids = _inputs(left, _in_whole_chunks(pair.config, length), batch=1)
    backends = sorted({str(model.config._attn_implementation) for model in (left, right)})
    name = f"outputs with {' and '.join(backends)} attention, as loaded"
    try:
        return _compare(name, *(_outputs(model, input_ids=ids) for model in (left, right)), bound)
    except (IndexError, RuntimeError, ValueError) as error:
        return Check(name, False, f"a model stopped with {type(error).__name__}: {error}")


def _steps(
    left: PreTrainedModel, right: PreTrainedModel, pair: _Pair, bound: float, new_tokens: int
) -> list[Callable[[], Check | None]]:
    """The comparisons that run the models, cheapest evidence first."""
    if not _runs(left, right, pair):
        return [lambda: _check_tensors(left, right, pair)]
    is_language_model = left.can_generate() and right.can_generate()
    # A classifier of sequences reads the last real token, which it finds by the padding id.
    is_classifier = _classifies_sequences(left)
    length = _interesting_length(pair.config, pair.limit)
    ids = _inputs(left, length, batch=1 if is_classifier else 2)
    short = ids[:, : _in_whole_chunks(pair.config, min(24, length))]

    def outputs(name: str, keep: torch.Tensor | None = None, **inputs: torch.Tensor) -> Check:
        try:
            made = [_outputs(model, **inputs) for model in (left, right)]
        except (IndexError, RuntimeError, ValueError) as error:
            return Check(name, False, f"a model stopped with {type(error).__name__}: {error}")
        if keep is not None and made[0].shape[:2] == keep.shape:
            made = [output[keep.bool()] for output in made]
        check = _compare(name, *made, bound)
        if not check.ok:
            check.detail += f", first {_first_divergence(left, right, inputs, bound)}"
        return check

    def narrow_window() -> Check:
        with _windows(left, right, NARROW_WINDOW):
            return outputs(f"outputs with a window of {NARROW_WINDOW}", input_ids=ids[:, :64])

    steps: list[Callable[[], Check | None]] = [
        lambda: _check_tensors(left, right, pair),
        lambda: outputs(f"outputs on {length} tokens", input_ids=ids),
    ]
    windows = [stack.sliding_window for stack in stacks(pair.config) if stack.sliding_window]
    if any(window >= length for window in windows) and all(
        getattr(model.config, "sliding_window", None) for model in (left, right)
    ):
        steps.append(narrow_window)
    takes_positions = all("position_ids" in signature(model.forward).parameters for model in (left, right))
    if is_language_model and takes_positions:
        for positions in _far_positions(pair.config, pair.limit, short.shape[1]):
            name = f"outputs at positions {positions[0]} to {positions[-1]}"
            position_ids = positions.expand(short.shape)
            steps.append(partial(outputs, name, input_ids=short, position_ids=position_ids))
    if not is_classifier:
        right_padded = torch.ones_like(short)
        left_padded = torch.ones_like(short)
        right_padded[1, short.shape[1] // 2 :] = 0
        left_padded[1, : short.shape[1] // 2] = 0
        # What a class does not name, it passes over.
        given = {"position_ids": (left_padded.cumsum(-1) - 1).clamp(min=0)} if takes_positions else {}
        steps += [
            partial(
                outputs, "outputs with right padding", right_padded, input_ids=short, attention_mask=right_padded
            ),
            partial(
                outputs, "outputs with left padding", left_padded, input_ids=short, attention_mask=left_padded, **given,
            ),
        ]  # fmt: skip
    prompt = ids[:, : _in_whole_chunks(pair.config, min(12, length))]
    prompt_mask = torch.ones_like(prompt)
    prompt_mask[-1, : prompt.shape[1] // 2] = 0
    new_tokens = min(new_tokens, (pair.limit or MAX_LENGTH) - prompt.shape[1])
    # Folds to half precision round the weights, so that tokens of nearly equal probability may change places.
    is_rounded = pair.folding is not None and left.dtype in (torch.bfloat16, torch.float16)
    if is_language_model and new_tokens > 0 and not is_rounded:
        for beams, kind in ((1, "greedy"), (2, "beam-search")):
            made = partial(_greedy, ids=prompt, mask=prompt_mask, tokens=new_tokens, beams=beams)
            seen = "token by token, with the cache"
            steps.append(partial(_check_tokens, f"{new_tokens} {kind} tokens", seen, left, right, made))
        name, seen = "tokens with the checkpoint's own settings", "token by token, beams and sampling as they are set"
        made = partial(_with_own_settings, ids=prompt[:1], tokens=new_tokens)
        steps.append(partial(_check_tokens, name, seen, left, right, made))
    # How a type with code of its own trains is that code's affair.
    if pair.family is None or not pair.family.own_models:
        steps.append(
            lambda: _check_losses(left, right, ids[:, : _in_whole_chunks(pair.config, min(16, length))], bound)
        )
    return steps


@contextmanager
def _windows(a: PreTrainedModel, b: PreTrainedModel, width: int) -> Iterator[None]:
    """Sliding windows of another width, to see them at work on short inputs; eager masks are made from the config."""
    saved = [model.config.sliding_window for model in (a, b)]
    try:
        for model in (a, b):
            model.config.sliding_window = width
        yield
    finally:
        for model, window in zip((a, b), saved, strict=True):
            model.config.sliding_window = window
