"""What tools make of a checkpoint: which run it as it is, which lose something, which refuse it, and over what field."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import hf_variants
import hf_variants.docs

from .conversion import NotRepresentable, engines, folds
from .conversion.checkpoint import resolve_folder
from .conversion.companions import refuse_broken_files
from .conversion.engines.export import tokenizer_of
from .conversion.errors import ConversionError
from .conversion.family import head_of_variant, stacks
from .conversion.foreign import is_foreign
from .conversion.gguf_source import is_gguf
from .conversion.native_target import native_config_for
from .conversion.opened_variant import open_variant
from .conversion.skeleton import empty_model
from .describe import load_config
from .model.configuration_variant import FIELDS
from .model.distribution import tensor_parallel_plan


WORKS, DEGRADED, REFUSED = "works", "degraded", "refused"
TOOLS_PAGE = "tools.md"
# Implementations of attention, as `unsupported_attention_features` calls them, and what people call them.
BACKENDS = {
    "eager": "attention: eager", "sdpa": "attention: sdpa", "flex_attention": "attention: flex_attention",
    "flash_attention": "attention: flash_attention", "paged": "generate: continuous batching",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """
    What one tool makes of a checkpoint.

    Attributes:
        tool: as docs/tools.md calls it, where it has a row.
        status: `"works"`, `"degraded"` or `"refused"`.
        detail: what is lost, or why it is refused, with the field.
        evidence: what was asked: the code's own answer for this config, or a test on a kind like it.
    """

    tool: str
    status: str
    detail: str
    evidence: str


@dataclass(frozen=True)
class Subject:
    """
    A checkpoint, or a config alone: ours, and the model without memory for its weights.

    Attributes:
        tokenizer: that lies with it, or `None`.
        notes: why one that lies there cannot be read.
    """

    config: Any
    model: Any
    tokenizer: Any = None
    notes: tuple[str, ...] = ()


def doctor(source: str | Path, tool: str | None = None) -> list[Finding]:
    """
    Ask every tool that is known here about a checkpoint; no weight is read, but its small files are.

    Args:
        source: a variant, native folder, Hub id or GGUF file; a config.json of ours; the name of a preset.
        tool: only those whose name holds this text, in any case.

    Raises:
        ConversionError: as `convert`, where there is no variant to ask about; ValueError: if no tool is called so.
    """
    subject = _subject(source)
    probes = _probes()
    tested = {finding.tool: finding for finding in _tested(subject) if finding.tool not in probes}
    wanted = [name for name in (*probes, *tested) if tool is None or tool.lower() in name.lower()]
    if not wanted:
        names = ", ".join(sorted((*probes, *tested)))
        raise ValueError(f"No tool that is known here is called {tool!r}. Use a part of one of: {names}.")
    found = []
    for name in wanted:
        if name in tested:
            found.append(tested[name])
        elif (answer := probes[name](subject)) is not None:
            found.append(Finding(name, *answer))
    return sorted(found, key=_order)


def report(findings: list[Finding]) -> str:
    """As lines for people, the refusals first."""
    width = max(len(finding.tool) for finding in findings)
    lines = [f"{each.status:<9} {each.tool:<{width}}  {each.detail or each.evidence}" for each in findings]
    counts = {status: sum(each.status == status for each in findings) for status in (WORKS, DEGRADED, REFUSED)}
    return "\n".join([*lines, "", ", ".join(f"{count} {status}" for status, count in counts.items())])


def as_json(source: str | Path, findings: list[Finding]) -> dict[str, Any]:
    return {"source": str(source), "findings": [asdict(finding) for finding in findings]}


def _order(finding: Finding) -> tuple[int, str]:
    return (REFUSED, DEGRADED, WORKS).index(finding.status), finding.tool.lower()


def _config_and_class(source: str | Path) -> tuple[Any, str]:
    """Of one of ours as its config.json says it, of anything else as it is converted."""
    if not is_foreign(source):
        try:
            config = load_config(str(source))
            return config, next(iter(config.architectures or ()), None) or _usual_class(config)
        except ConversionError:
            raise
        except (ValueError, FileNotFoundError):
            # It is none of ours.
            pass
    opened = open_variant(source)
    return opened.config, opened.model_class.__name__


def _subject(source: str | Path) -> Subject:
    config, name = _config_and_class(source)
    model = empty_model(getattr(hf_variants, name), config)
    tokenizer, notes = _tokenizer(Path(source).expanduser())
    return Subject(config, model, tokenizer, tuple(notes))


def _tokenizer(path: Path) -> tuple[Any, list[str]]:
    """The tokenizer of a folder or GGUF file."""
    if path.is_dir():
        path = resolve_folder(path)
        refuse_broken_files(path)
    elif not is_gguf(path):
        return None, []
    return tokenizer_of(path)


def _usual_class(config: Any) -> str:
    if config.is_encoder_decoder:
        return "VariantForConditionalGeneration"
    return "VariantForCausalLM" if config.is_causal else "VariantForMaskedLM"


# The code's own answers

# Status, detail and evidence; `None` where a tool does not apply.
Answer = tuple[str, str, str] | None
Probe = Callable[[Subject], Answer]


def _probes() -> dict[str, Probe]:
    """By tool, what it is asked."""
    found: dict[str, Probe] = {tool: partial(_attention, backend) for backend, tool in BACKENDS.items()}
    found["export to a native type"] = _native
    for name in engines.ENGINES:
        room = engines.engine_room(name)
        found[f"{room.NAME}: export --engine"] = partial(_engine, room)
    found["Pipeline (2 processes)"] = _pipeline
    found["Tensor parallel (2 processes)"] = _tensor_parallel
    found["torchao: int4 weight-only, packed"] = _packed_int4
    found["torchao: LoRA on dynamic int8"] = _adapters_before_dynamic_int8
    found["transformers serve, OpenAI client"] = _chat_server
    found["vLLM, SGLang: the transformers backend"] = _serving
    return found | {
        f"PEFT: {name}": partial(_adapter, *options) for name, options in ADAPTERS.items() if _installed("peft")
    }


def _attention(backend: str, subject: Subject) -> Answer:
    if backend == "paged" and (subject.config.is_encoder_decoder or not subject.model.can_generate()):
        return None
    fields = subject.config.unsupported_attention_features(backend)
    why = f"does not compute {', '.join(f'`{field}`' for field in fields)}" if fields else ""
    return REFUSED if fields else WORKS, why, "the config's own list of what an implementation does not compute"


def _native(subject: Subject) -> Answer:
    evidence = "the translation of the config"
    head = head_of_variant(type(subject.model).__name__)
    try:
        family, _ = native_config_for(copy.deepcopy(subject.config), head=head)
    except NotRepresentable as error:
        nearest, fields = error.model_type, error.fields
    else:
        return WORKS, f"as {family.model_type}", evidence
    try:
        *_, folding = folds.plan(copy.deepcopy(subject.config), nearest, head)
    except ConversionError:
        return REFUSED, _in_the_way(nearest, fields), evidence
    ways = "; ".join(folding.sentences(subject.config.dtype or torch.float32))
    return DEGRADED, f"as {nearest}, with --to {nearest}, after: {ways}", evidence


def _in_the_way(name: str, fields: dict[str, tuple]) -> str:
    shown = [f"`{field}` {ours!r:.40}" for field, (ours, _) in list(fields.items())[:4]]
    more = f" and {len(fields) - 4} more" if len(fields) > 4 else ""
    return f"{name} comes nearest; in the way: {', '.join(shown)}{more}"


def _engine(room: ModuleType, subject: Subject) -> Answer:
    evidence = "the engine's refusals by field"
    try:
        lost = [*room.losses(subject.model, subject.tokenizer), *subject.notes]
    except ConversionError as error:
        return REFUSED, _why(error), evidence
    return DEGRADED if lost else WORKS, "; ".join(lost), evidence


def _why(error: ConversionError) -> str:
    if not isinstance(error, NotRepresentable):
        return str(error)
    ways = [
        f"`{field}` {ours!r:.40}: {' '.join(str(native).split()):.160}"
        for field, (ours, native) in error.fields.items()
    ]
    return f"{error.model_type}: " + "; ".join(ways[:4]) + (f"; and {len(ways) - 4} more" if len(ways) > 4 else "")


def _pipeline(subject: Subject) -> Answer:
    try:
        subject.model.refuse_pipeline(RANKS)
    except ValueError as error:
        return REFUSED, str(error), "the model's own check"
    return WORKS, "", "the model's own check"


def _tensor_parallel(subject: Subject) -> Answer:
    plans = [(tensor_parallel_plan(stack), tensor_parallel_plan(stack, RANKS)) for stack in stacks(subject.config)]
    whole = {
        name
        for general, fitting in plans
        for name, style in general.items()
        if fitting.get(name) != style or "gather" in style
    }
    lost = f"every rank computes or gathers the whole of {', '.join(sorted(whole)[:6])}" if whole else ""
    return DEGRADED if whole else WORKS, lost, f"the plan of the config for {RANKS} ranks"


def _packed_int4(subject: Subject) -> Answer:
    lost = "its kernels are MSLK's, CUDA's and an XPU's: on a CPU take int8, or int4 by `IntxWeightOnlyConfig`"
    return DEGRADED, lost, "docs/tools.md, what torchao says on a CPU"


def _adapters_before_dynamic_int8(subject: Subject) -> Answer:
    lost = "no gradient passes a quantised layer, and adapters before one do not train: take int8 of weights alone"
    return DEGRADED, lost, "tests/tools/test_torchao.py, the gradients of adapters"


def _chat_server(subject: Subject) -> Answer:
    if not subject.model.can_generate():
        return None
    evidence = "docs/tools.md, chats over loopback"
    if subject.config.is_encoder_decoder:
        lost = "an answer lacks as many tokens as the prompt has, as those of native encoder-decoders, unless streamed"
        return DEGRADED, lost, evidence
    return WORKS, "started by `hf-variants serve`: --trust-remote-code is not enough for it", evidence


def _serving(subject: Subject) -> Answer:
    """Engines that bring their own attention and head, and take the layers from transformers."""
    config, evidence = (
        subject.config,
        "what their attention is given and their head rebuilds, as the contract's tests do",
    )
    if config.is_encoder_decoder:
        return REFUSED, "they serve one stack, and this is an encoder-decoder", evidence
    # They read a cap of the scores under its name.
    passed = [
        name for name, active in config.attention_features.items() if active and name != "attn_logit_softcapping"
    ]
    if passed:
        return REFUSED, f"their attention is not given {', '.join(f'`{name}`' for name in passed)}", evidence
    lost = [name for name in OF_THE_HEAD if getattr(config, name) != FIELDS[name].default] if config.is_causal else []
    said = [f"their head leaves out {', '.join(f'`{name}`' for name in lost)}"] if lost else []
    if config.base_model_pp_plan is None:
        said.append("no pipeline: more than modules stands before the layers")
    return DEGRADED if said else WORKS, "; ".join(said), evidence


def _adapter(kind: str, options: dict[str, Any], subject: Subject) -> Answer:
    """An adapter put on a model without memory for its weights, as PEFT does it."""
    import peft

    evidence = "PEFT's own layers on a model without weights"
    try:
        peft.get_peft_model(empty_model(type(subject.model), subject.config), getattr(peft, kind)(**options))
    except ValueError as error:
        return REFUSED, " ".join(str(error).split()), evidence
    return WORKS, "", evidence


# What a language-modelling head computes beside one projection, a factor and a cap.
OF_THE_HEAD = ("lm_head_transform", "lm_head_normalized", "lm_head_input_scale")
RANKS = 2
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {}),
    "all-linear": ("LoraConfig", {"target_modules": "all-linear"}),
    "DoRA": ("LoraConfig", {"use_dora": True}),
    "IA3": ("IA3Config", {}),
    "LN-tuning": ("LNTuningConfig", {}),
    "LoHa": ("LoHaConfig", {}),
    "LoKr": ("LoKrConfig", {}),
    "OFT": ("OFTConfig", {}),
    "VeRA": ("VeraConfig", {}),
}


# What tests have shown


def _tested(subject: Subject) -> Iterator[Finding]:
    """Of every other tool, what its test on the kinds like this one has shown."""
    header, *rows = _table()
    kinds = [kind for kind in header[2:] if kind in _kinds_like(subject.config)]
    for row in rows:
        cells = dict(zip(header[2:], row[2:]))
        seen = {kind: cells[kind] for kind in kinds if cells.get(kind, "-") != "-"}
        if not seen or ("with z-loss" in row[0] and not _has_z_loss(subject.config)):
            continue
        package, _, tested = row[1].partition(" ")
        evidence = f"docs/tools.md, tested on {', '.join(seen)}" + (f" with {row[1]}" if row[1] != "-" else "")
        installed = _installed(package)
        contract = "what it asks of a model was checked, not the tool itself" if "contract" in seen.values() else ""
        note = f"installed is {installed}, tested was {tested}" if installed and installed != tested else contract
        refused = [kind for kind, cell in seen.items() if cell == "refused"]
        if refused:
            yield Finding(row[0], REFUSED, f"refused on {', '.join(refused)}", evidence)
        else:
            yield Finding(row[0], WORKS, note, evidence)


def _has_z_loss(config: Any) -> bool:
    return any(stack.z_loss_coefficient for stack in stacks(config))


def _table() -> list[list[str]]:
    text = (Path(next(iter(hf_variants.docs.__path__))) / TOOLS_PAGE).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _kinds_like(config: Any) -> tuple[str, ...]:
    """The kinds of variant of docs/tools.md that stand for a config."""
    if config.is_encoder_decoder:
        return ("seq2seq",)
    if not config.is_causal:
        return ("encoder",)
    if config.attn_logit_softcapping is not None:
        return ("gemma2",)
    if config.parallel_block != "none":
        return ("multi-query",) if config.num_key_value_heads == 1 else ("gpt-neox",)
    return ("llama",)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
