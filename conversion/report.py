"""What did a conversion do? The report, and what is noted in it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from . import rules
from .config_map import training_fields
from .family import Family
from .folds import Folding
from .skeleton import stored_tensors


if TYPE_CHECKING:
    from .verification import VerificationReport


logger = logging.get_logger(__name__)


@dataclass
class Report:
    """
    What a conversion did.

    Attributes:
        source, destination: where from and where to.
        direction: `"convert"` (native to variant) or `"export"` (variant to native).
        model_type: the native type.
        head: `"base"`, `"causal_lm"`, ...
        tensors, parameters: how many of the result.
        exactness: `"bit-exact"`: every value is a copy; or the weakest class of the folds (see `folds`), or the dtypes
            that values were cast from and to, and how many tensors were.
        folds: rewrites of the weights that the native type asked for needed, each with its class.
        deviations: where the two classes' arithmetic differs, and why.
        non_finite: tensors of the result with NaN or infinite values.
        passed_over: stored tensors that transformers does not load either, each with the reason.
        dropped: training settings that the native config has no place for, with their values.
        tokenizer: in which respects `AutoTokenizer` reads another one from the result, or why that is not known.
        part: what was taken of a checkpoint whose class is not here as a whole; empty for all of it.
        unread: keys of the native config that change nothing, because its class does not read them or does not act on
            their values; kept for the way back.
        notes: what a GGUF file does not say and had to be taken from elsewhere; where the result follows the weights and
            not the config, as transformers does; which of several sets of weights was read.
        command: what does the same in a shell.
        verification: the comparison of source and destination, where it was asked for.
    """

    source: str
    destination: str
    direction: str
    model_type: str
    head: str
    tensors: int
    parameters: int
    exactness: str = "bit-exact"
    folds: list[str] = field(default_factory=list)
    deviations: list[str] = field(default_factory=list)
    non_finite: list[str] = field(default_factory=list)
    passed_over: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, Any] = field(default_factory=dict)
    tokenizer: list[str] = field(default_factory=list)
    command: str = ""
    part: str = ""
    unread: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    verification: "VerificationReport | None" = None

    def _passed_over(self) -> dict[str, str]:
        """Reason -> the first names of tensors."""
        names: dict[str, list[str]] = {}
        for name, reason in self.passed_over.items():
            names.setdefault(reason, []).append(f"`{name}`")
        return {reason: rules.some(found) for reason, found in names.items()}

    def to_dict(self) -> dict[str, Any]:
        verification = None if self.verification is None else self.verification.to_dict()
        return {**asdict(self), "verification": verification}

    def to_markdown(self) -> str:
        what = f"{self.model_type} -> variant" if self.direction == "convert" else f"variant -> {self.model_type}"
        lines = [
            f"**{what}** ({self.head}): {self.tensors} tensors, {self.parameters:,} parameters, {self.exactness}.",
            *([f"- A part: {self.part}"] if self.part else []),
            *(f"- Folded: {fold}" for fold in self.folds),
            *(f"- Rounding differs from the stock class: {reason}" for reason in self.deviations),
            *(f"- NaN or infinite values in {name}" for name in self.non_finite),
            *(f"- Passed over ({reason}): {names}" for reason, names in self._passed_over().items()),
            *(f"- Not kept, for training only: `{name}` = {value!r}" for name, value in self.dropped.items()),
            *(f"- Tokenizer: {note}" for note in self.tokenizer),
            *(f"- {note[0].upper()}{note[1:]}." for note in self.notes),
        ]
        if self.unread:
            names = ", ".join(f"`{name}`" for name in sorted(self.unread))
            lines.append(f"- Kept for the way back, and without effect on the stock class: {names}")
        if self.verification is not None:
            lines += ["", self.verification.to_markdown()]
        return "\n".join(lines)


def count_parameters(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def report_of(source, destination, direction, family, head, config, target) -> Report:
    tensors = stored_tensors(target)
    return Report(
        source=str(source),
        destination=str(destination),
        direction=direction,
        model_type=family.model_type,
        head=head,
        tensors=len(tensors),
        parameters=count_parameters(tensors),
        deviations=[deviation.reason for deviation in family.deviations_of(config)],
        dropped=_dropped(family, head, config, target.config) if direction == "export" else {},
    )


def _dropped(family: Family, head: str, config: PreTrainedConfig, native: PreTrainedConfig) -> dict[str, Any]:
    """The training settings of a variant that do not come out of its native config again."""
    kept = training_fields(family.config_map.to_variant(native, config.native_leftovers or (), head))
    dropped = {name: value for name, value in training_fields(config).items() if value != kept[name]}
    is_classifier = head not in ("base", "causal_lm", "masked_lm", "seq2seq_lm")
    return {name: value for name, value in dropped.items() if is_classifier or "classifier" not in name}


def unread_keys(family: Family, config: PreTrainedConfig, head: str) -> dict[str, Any]:
    """The keys that change nothing, without those that stand at what their class has in any case."""
    usual = type(config)().to_dict()
    found = family.config_map.unread(config, head)
    return {key: value for key, value in found.items() if key not in usual or usual[key] != value}


def note_folds(report: Report, folding: Folding, dtype: torch.dtype) -> None:
    """Put the folds into a report, and say them aloud: nothing is folded silently."""
    if not folding.rewrites:
        return
    report.folds = folding.sentences(dtype)
    report.exactness = folding.exactness(dtype)
    logger.warning(
        f"This variant is a {report.model_type} model only after changes to its weights, which keep its function: "
        f"{'; '.join(report.folds)}."
    )


def note_cast(report: Report, headers: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> None:
    """What a dtype that was asked for does to weights of these: `headers` are those before."""
    floats = [header.dtype for header in headers.values() if header.is_floating_point()]
    cast = [stored for stored in floats if stored != dtype]
    if dtype is None or not cast:
        return
    stored = " and ".join(sorted({str(stored).removeprefix("torch.") for stored in cast}))
    report.exactness = f"cast from {stored} to {str(dtype).removeprefix('torch.')}"
    if len(cast) < len(floats):
        report.exactness += f" ({len(cast)} of {len(floats)} tensors)"


def note_widened(report: Report, names: list[str]) -> None:
    if names:
        report.notes.append(f"In the wider of their parts' dtypes, which keeps every value: {rules.some(names)}")


def note_non_finite(report: Report, names: list[str]) -> None:
    report.non_finite = names
    warn_of_non_finite(names)


def warn_of_non_finite(names: list[str]) -> None:
    """Say aloud which tensors have values that are no numbers."""
    if names:
        logger.warning(
            f"{len(names)} tensors have NaN or infinite values, {names[0]} first: the source is damaged, or "
            "its values are too large for the dtype."
        )
