"""Proof that two checkpoints are the same model: configs, tensors, logits, generated tokens, tokenizers."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, set_seed

from . import checkpoint, rules
from .family import Family, family_of, head_of_variant, is_variant, variant_class
from .translate import _is_gguf, _load_gguf, _native_head, stored_tensors


# Longest input that is tried; enough to pass most windows of small models, and to leave a laptop usable.
MAX_LENGTH = 640


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
    """

    a: str
    b: str
    checks: list[Check] = field(default_factory=list)
    deviations: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_markdown(self) -> str:
        lines = [f"**{'Equal' if self.ok else 'DIFFERENT'}**: `{self.a}` and `{self.b}`", "", "| check | holds | seen |"]
        lines.append("|---|---|---|")
        lines += [f"| {check.name} | {'yes' if check.ok else 'NO'} | {check.detail} |" for check in self.checks]
        lines += ["", *(f"Rounding differs by design: {reason}." for reason in self.deviations)]
        return "\n".join(lines).rstrip()


def _load(source: str | Path | PreTrainedModel) -> tuple[PreTrainedModel, Path | None]:
    """A model in evaluation mode with the weights' own dtype, and its folder."""
    if isinstance(source, PreTrainedModel):
        return source, None
    if _is_gguf(source):
        return _load_gguf(Path(source)).eval(), Path(source)
    folder = checkpoint.resolve_folder(source)
    config = AutoConfig.from_pretrained(folder)
    # Refuses indexes that leave the folder, before transformers follows them.
    checkpoint.SafetensorsReader(folder)
    if is_variant(config):
        head = head_of_variant((config.architectures or ["VariantForCausalLM"])[0])
        model_class = variant_class(head)
    else:
        family = family_of(config.model_type)
        model_class = family.native_class(_native_head(family, config)) or AutoModel
    return model_class.from_pretrained(folder, dtype="auto").eval(), folder


def _inputs(model: PreTrainedModel, length: int, batch: int = 2) -> torch.Tensor:
    """Random token ids without padding tokens, the same for models of one vocabulary: (batch, length)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)
    pad = model.config.pad_token_id
    if pad is not None:
        ids[ids == pad] = (pad + 1) % model.config.vocab_size
    return ids


def _outputs(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits, or hidden states of a model without a head."""
    with torch.no_grad():
        outputs = model(**inputs)
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def _interesting_length(model: PreTrainedModel) -> int:
    """Past the sliding window and the original context, as far as `MAX_LENGTH` allows."""
    config = model.config
    marks = [64]
    if getattr(config, "sliding_window", None):
        marks.append(config.sliding_window + 16)
    rope = getattr(config, "rope_parameters", None) or {}
    for entry in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if entry.get("original_max_position_embeddings"):
            marks.append(entry["original_max_position_embeddings"] + 16)
    longest = MAX_LENGTH
    if getattr(config, "position_embedding_type", "") in ("learned", "sinusoidal"):
        longest = min(longest, config.max_position_embeddings)
    return min(max(marks), longest)


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference, relative to the reference's standard deviation."""
    spread = reference.double().std().item() or 1.0
    return (ours.double() - reference.double()).abs().max().item() / spread


def _compare(name: str, a: torch.Tensor, b: torch.Tensor, bound: float) -> Check:
    if a.shape != b.shape:
        return Check(name, False, f"shapes {tuple(a.shape)} and {tuple(b.shape)}")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return Check(name, torch.equal(a, b), "values that are not finite")
    if torch.equal(a, b):
        return Check(name, True, "bit-identical")
    error = relative_error(a, b)
    return Check(name, error <= bound, f"largest difference {error:.1e} of the standard deviation (bound {bound:.0e})")


def _family_and_variant(a: PreTrainedModel, b: PreTrainedModel) -> tuple[Family | None, PreTrainedModel | None]:
    variants = [model for model in (a, b) if is_variant(model.config)]
    natives = [model for model in (a, b) if not is_variant(model.config)]
    if len(variants) == len(natives) == 1:
        return family_of(natives[0].config.model_type), variants[0]
    return None, None


def _check_tensors(a: PreTrainedModel, b: PreTrainedModel, family: Family | None) -> Check:
    """Bit equality of the weights: through the rules in both directions, or name by name for one class."""
    if family is None:
        left, right = stored_tensors(a), stored_tensors(b)
        if type(a) is not type(b):
            return Check("weights", True, "two types, compared by outputs only")
        different = sorted(
            name
            for name in left.keys() | right.keys()
            if name not in left or name not in right or not torch.equal(left[name], right[name])
        )
        return Check("weights", not different, f"different: {different[:4]}" if different else "bit-identical")
    variant, native = (a, b) if is_variant(a.config) else (b, a)
    head = head_of_variant(type(variant).__name__)
    ours, theirs = stored_tensors(variant), stored_tensors(native)
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    native_shapes = {name: tensor.shape for name, tensor in theirs.items()}
    try:
        steps = rules.plan(family.rules_for(head), list(theirs), shapes)
        made = dict(rules.run(steps, theirs.__getitem__, variant.config, shapes))
        back = rules.plan(family.rules_for(head), list(ours), native_shapes, to_native=True)
        restored = dict(rules.run(back, ours.__getitem__, variant.config, native_shapes, to_native=True))
    except ValueError as error:
        return Check("weights", False, str(error))
    different = [name for name, tensor in made.items() if not torch.equal(tensor, ours[name])]
    different += [name for name, tensor in restored.items() if not torch.equal(tensor, theirs[name])]
    seen = f"{len(made)} tensors, both ways" if not different else f"different: {sorted(different)[:4]}"
    return Check("weights", not different, seen)


def _first_divergence(a: PreTrainedModel, b: PreTrainedModel, ids: torch.Tensor, bound: float) -> str:
    """The first hidden state that differs, to say where to look."""
    with torch.no_grad():
        states = [model(input_ids=ids, output_hidden_states=True).hidden_states for model in (a, b)]
    for index, (left, right) in enumerate(zip(*states)):
        if left.shape != right.shape or relative_error(left, right) > bound:
            return "in the embeddings" if index == 0 else f"in layer {index - 1}"
    return "after the last layer"


def _greedy(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, tokens: int, beams: int) -> torch.Tensor:
    set_seed(0)
    settings = copy.deepcopy(model.generation_config)
    settings.update(
        do_sample=False, num_beams=beams, max_new_tokens=tokens, min_new_tokens=tokens, max_length=None,
        pad_token_id=model.config.pad_token_id if model.config.pad_token_id is not None else 0,
        temperature=None, top_p=None, top_k=None, eos_token_id=None,
    )  # fmt: skip
    return model.generate(ids, attention_mask=mask, generation_config=settings)


def _check_tokenizers(a: Path | None, b: Path | None) -> Check | None:
    if a is None or b is None or not all(_has_tokenizer(path) for path in (a, b)):
        return None
    first, second = (
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        if path.is_file()
        else AutoTokenizer.from_pretrained(path)
        for path in (a, b)
    )
    samples = ["The quick brown fox.", "naïve café, 北京, \n\ttabs  and   spaces", "def f(x): return x**2  # ½"]
    same = (
        len(first) == len(second)
        and first.all_special_ids == second.all_special_ids
        and first.chat_template == second.chat_template
        and all(first(text).input_ids == second(text).input_ids for text in samples)
    )
    return Check("tokenizer", same, f"{len(first)} and {len(second)} tokens, chat template and special ids compared")


def _has_tokenizer(path: Path) -> bool:
    return path.is_file() or (path / "tokenizer_config.json").is_file() or (path / "tokenizer.json").is_file()


def verify(
    a: str | Path | PreTrainedModel,
    b: str | Path | PreTrainedModel,
    *,
    new_tokens: int = 32,
    progress: bool = True,
) -> VerificationReport:
    """
    Prove that two models are the same, whichever of them is native.

    Compared, in the weights' own dtype and with eager attention: every tensor through the conversion rules in both
    directions; logits on a long input, with right and with left padding; greedy and beam-search tokens with the cache;
    the tokenizers, where both are folders. Equality is exact unless the family lists an operation that must round
    differently; its bound is relative to the logits' standard deviation.

    Args:
        a, b: folders, Hub ids, GGUF files or loaded models.
        new_tokens: number of tokens to generate.

    Returns:
        a report; `.ok` is the verdict.
    """
    names = [str(x) if not isinstance(x, PreTrainedModel) else type(x).__name__ for x in (a, b)]
    report = VerificationReport(*names)
    (left, left_path), (right, right_path) = _load(a), _load(b)
    if left.config.vocab_size != right.config.vocab_size:
        report.checks.append(
            Check("vocabulary", False, f"sizes {left.config.vocab_size} and {right.config.vocab_size}")
        )
        return report
    family, variant = _family_and_variant(left, right)
    deviations = family.deviations_of(variant.config) if family is not None and variant is not None else []
    report.deviations = [deviation.reason for deviation in deviations]
    exact = 0.0 if not deviations else max(deviation.bound for deviation in deviations)
    # bfloat16 has 2^16 times coarser rounding than float32, of which the bounds speak.
    coarse = {torch.bfloat16: 2.0**16, torch.float16: 2.0**13}.get(left.dtype, 1.0)
    bound = exact * coarse
    if family is None and type(left) is not type(right):
        bound = 1e-5 * coarse

    backends = [model.config._attn_implementation for model in (left, right)]
    for model in (left, right):
        model.set_attn_implementation("eager")
    length = _interesting_length(variant if variant is not None else left)
    ids = _inputs(left, length)
    short = ids[:, : min(24, length)]
    mask = torch.ones_like(short)
    right_padded, left_padded = mask.clone(), mask.clone()
    right_padded[1, short.shape[1] // 2 :] = 0
    left_padded[1, : short.shape[1] // 2] = 0
    left_positions = (left_padded.cumsum(-1) - 1).clamp(min=0)
    prompt, prompt_mask = ids[:, :12], torch.ones_like(ids[:, :12])
    prompt_mask[1, :5] = 0

    def logits(name: str, keep: torch.Tensor | None = None, **inputs: torch.Tensor) -> Callable[[], Check]:
        def check() -> Check:
            outputs = [_outputs(model, **inputs) for model in (left, right)]
            if keep is not None:
                outputs = [output[keep.bool()] for output in outputs]
            result = _compare(name, *outputs, bound)
            if not result.ok:
                result.detail += f", first {_first_divergence(left, right, inputs['input_ids'], bound)}"
            return result

        return check

    work: list[Callable[[], Check | None]] = [
        lambda: _check_tensors(left, right, family),
        logits(f"outputs on {length} tokens", input_ids=ids),
    ]
    has_language_head = left.can_generate() and right.can_generate()
    if has_language_head or "Classification" not in type(left).__name__:
        work += [
            logits("outputs with right padding", right_padded, input_ids=short, attention_mask=right_padded),
            logits(
                "outputs with left padding", left_padded, input_ids=short, attention_mask=left_padded,
                position_ids=left_positions,
            ),
        ]  # fmt: skip
    if has_language_head and new_tokens:
        for beams in (1, 2):

            def tokens(beams: int = beams) -> Check:
                results = [_greedy(model, prompt, prompt_mask, new_tokens, beams) for model in (left, right)]
                kind = "greedy" if beams == 1 else "beam-search"
                return Check(f"{new_tokens} {kind} tokens", torch.equal(*results), "token by token, with the cache")

            work.append(tokens)
    work.append(lambda: _check_tokenizers(left_path, right_path))
    try:
        for step in tqdm(work, desc="Verifying", unit="check", delay=1.0, disable=not progress):
            if (check := step()) is not None:
                report.checks.append(check)
    finally:
        for model, backend in zip((left, right), backends):
            model.set_attn_implementation(backend)
    return report
