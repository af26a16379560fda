"""From a checkpoint through operations to a new folder: what `hf-variants edit` runs."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from .. import card
from ..conversion import output_folder, tensor_writer
from ..conversion.checkpoint_writer import Writing, write_checkpoint
from ..conversion.companions import refuse_broken_files
from ..conversion.errors import NotRepresentable
from ..conversion.garbage import own_garbage
from ..conversion.on_disk import export
from ..conversion.opened_variant import open_variant
from ..conversion.record import command_line, is_hub_id, last_part, write_record
from ..conversion.report import Report
from ..conversion.tokenization import load_tokenizer
from . import tokenizer_data
from .distill import Distillation, Recovery, distill
from .measure import Difference, OnText, difference, on_text
from .operation import Operation, apply
from .subject import EXACTNESS, SAME_BITS, Outcome, Subject, SurgeryError
from .vocabulary import renumber_generation_config


@dataclass
class EditReport:
    """
    What operations did to a checkpoint.

    Attributes:
        source, destination: where from and where to.
        model_type: what the source was a checkpoint of.
        parameters_before, parameters: how many of the source and of the result.
        tensors: how many of the result.
        command: what does the same in a shell, as far as the caller said.
        operations: what each did, and how exact it is.
        exactness: the weakest of theirs.
        difference: of the outputs on random tokens, where both models have the same kind and it was measured.
        text: both on a text, where one was given.
        recovery: the training towards the source, where one was asked for; `text` is then of the trained model.
        text_unrecovered: the same before that training.
        deviations: where the arithmetic of the source's native class differs from ours, and why.
        non_finite: tensors of the result with NaN or infinite values.
        tokenizer: in which respects the tokenizer of the result is another than it should be.
        native: of the export to a native type; or, as a sentence, why no native type can express the result.
    """

    source: str
    destination: str
    model_type: str
    parameters_before: int
    parameters: int
    tensors: int
    command: str
    operations: list[Outcome]
    exactness: str = SAME_BITS
    difference: Difference | None = None
    text: OnText | None = None
    recovery: Recovery | None = None
    text_unrecovered: OnText | None = None
    deviations: list[str] = field(default_factory=list)
    non_finite: list[str] = field(default_factory=list)
    tokenizer: list[str] = field(default_factory=list)
    native: Report | str | None = None

    def to_dict(self) -> dict[str, Any]:
        """What conversion_report.json and `--json` have, with the keys of a conversion's."""
        values = asdict(self) | {"direction": "edit", "folds": [], "verification": None}
        values["native"] = self.native.to_dict() if isinstance(self.native, Report) else self.native
        return values

    def to_markdown(self) -> str:
        lines = [
            f"**{self.model_type} -> variant, operated on**: {self.parameters_before:,} -> {self.parameters:,} parameters, "
            f"{self.tensors} tensors, {self.exactness}.",
        ]
        for outcome in self.operations:
            lines.append(f"- {outcome.operation}: {outcome.exactness}")
            lines += [f"  - {note}" for note in outcome.notes]
        if self.difference is not None:
            lines.append(f"- Measured on random tokens: {self.difference}")
        if self.text_unrecovered is not None:
            lines.append(f"- Measured on the text, before the training: {self.text_unrecovered}")
        if self.text is not None:
            lines.append(f"- Measured on the text: {self.text}")
        lines += [f"- Rounding differs from the source's stock class: {reason}" for reason in self.deviations]
        lines += [f"- NaN or infinite values in {name}" for name in self.non_finite]
        lines += [f"- Tokenizer: {note}" for note in self.tokenizer]
        if isinstance(self.native, Report):
            lines += ["", self.native.to_markdown()]
        elif self.native is not None:
            lines.append(f"- No native checkpoint: {self.native}")
        return "\n".join(lines)


@own_garbage()
def edit(
    source: str | Path,
    destination: str | Path,
    operations: Sequence[Operation],
    *,
    native: str | Path | None = None,
    model_type: str | None = None,
    text: str | None = None,
    measure: bool = True,
    recover: Distillation | None = None,
    ignore_keys: Iterable[str] = (),
    max_shard_bytes: int = tensor_writer.MAX_SHARD_BYTES,
    options: Sequence[tuple[str, Any]] = (),
) -> EditReport:
    """
    Apply operations to a checkpoint, tensor by tensor, and write the result as a new folder of a variant.

    Args:
        source: a native folder, a Hub id, a GGUF file, or a folder of a variant.
        destination: a folder that does not exist yet; it appears when everything is written.
        operations: in their order.
        native: a folder for the result as a native checkpoint, too, where a native type can express it.
        model_type: of that checkpoint, as `export` takes it.
        text: that perplexities are measured on, which loads source and result.
        measure: compare the outputs on random tokens, which loads one after the other.
        recover: train the result towards the source, which loads both. Its checkpoints lie in a folder beside the
            destination, DST-distilling, from which the same call goes on if it was stopped.
        ignore_keys, max_shard_bytes: as `convert` takes them.
        options: of the command that does the same, in their order, for the record.

    Raises:
        SurgeryError: if an operation is not possible; otherwise as `convert`, and nothing is written.
    """
    if not operations:
        raise SurgeryError(
            "There is nothing to do. Name at least one operation (`hf-variants edit --help` lists them)."
        )
    for folder in (destination, native):
        if folder is not None:
            output_folder.refuse_occupied(folder)
    opened = open_variant(source, ignore_keys)
    if opened.files.is_dir():
        refuse_broken_files(opened.path)
    before = Subject.of(opened)
    after = apply(before, operations)
    changed, recovery = after, None
    if recover is not None:
        workplace = Path(destination).with_name(f"{Path(destination).name}-distilling")
        after, recovery = distill(before, after, recover, workplace)
    headers = after.headers()
    report = EditReport(
        source=str(source),
        destination=str(destination),
        model_type=opened.model_type,
        parameters_before=_parameters(before),
        parameters=_parameters(after),
        tensors=len(headers),
        command=command_line("edit", source, destination, *options),
        operations=list(after.outcomes),
        exactness=max((outcome.exactness for outcome in after.outcomes), key=EXACTNESS.index),
        deviations=opened.deviations,
        recovery=recovery,
    )
    with output_folder.new_folder(destination) as temporary:
        written = write_checkpoint(
            temporary, after.config, after.skeleton, lambda but: after.tensors(), headers, Writing(max_shard_bytes),
            opened.files, opened.weights,
        )  # fmt: skip
        report.non_finite = written.non_finite
        report.tokenizer = opened.write_companions(temporary)
        if after.tokenizer_json is not None:
            report.tokenizer += tokenizer_data.write(after, temporary)
        for name, text_of_file in after.files:
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(text_of_file, encoding="utf-8")
        generation_config = temporary / GENERATION_CONFIG_NAME
        if not after.skeleton.can_generate():
            generation_config.unlink(missing_ok=True)
        elif after.tokens is not None and generation_config.is_file():
            renumber_generation_config(generation_config, after.tokens)
        if measure:
            report.difference = difference(before, after)
        if text is not None:
            tokenizers = (load_tokenizer(opened.files), load_tokenizer(temporary))
            report.text = on_text(before, after, text, tokenizers)
            if recovery is not None:
                report.text_unrecovered = on_text(before, changed, text, tokenizers)
        if recovery is not None:
            recovery.write(temporary)
        write_record(temporary, report.to_dict(), opened.files, written.digests)
        lineage = card.lineage_of(opened.path) | ({"base_model": str(source)} if is_hub_id(source) else {})
        card.write_card(temporary, name=last_part(destination), lineage=lineage, skeleton=after.skeleton)
        if opened.weights is not None:
            opened.weights.refuse_changed()
    if native is not None:
        try:
            report.native = export(destination, native, model_type=model_type, max_shard_bytes=max_shard_bytes)
        except NotRepresentable as error:
            report.native = str(error)
    return report


def edit_model(model: PreTrainedModel, operations: Sequence[Operation]) -> PreTrainedModel:
    """A loaded variant after operations, as a new model that shares no memory with it."""
    return apply(Subject.of_model(model), operations).model()


def _parameters(subject: Subject) -> int:
    return sum(tensor.numel() for tensor in subject.stored.values())
