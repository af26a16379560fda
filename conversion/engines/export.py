"""One checkpoint in, a folder for another runtime out, if that computes the same."""

import copy
import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, logging

from ... import card
from ...model.block import Block
from .. import output_folder
from ..companions import has_tokenizer, refuse_broken_files
from ..errors import ConversionError, VerificationFailed
from ..in_memory import build
from ..on_disk import lineage_of_source
from ..opened_variant import open_variant
from ..record import command_line, last_part, write_record
from ..skeleton import loading, stored_tensors
from ..tokenization import differences, load_tokenizer
from ..verification import Check


# Engines, as the rooms that write for them are called. Imported when asked for: each needs a package of its own.
ENGINES = ("ctranslate2", "gguf", "onnx")


def engine_room(name: str) -> ModuleType:
    """
    The room of an engine: `refuse_unrepresentable`, `refuse_quantization`, `losses`, `write`, `prove`, `version`, how to
    `USE` what comes out, and whether it `TAKES_COMPANIONS`, all that travels beside a model.

    Raises:
        ConversionError: if there is none.
    """
    if name not in ENGINES:
        raise ConversionError(f"There is no engine {name!r}. Use one of {', '.join(sorted(ENGINES))}.")
    return importlib.import_module(f".{name}", __package__)


@dataclass
class EngineReport:
    """
    What an export to an engine did.

    Attributes:
        source, destination: where from and where to.
        engine: with its version.
        quantization: of the weights; empty for as they were stored.
        model_type: what the source is a checkpoint of.
        tensors, parameters: how many.
        checks: what was compared while both ran, each with what was seen.
        notes: what the engine cannot be told, or does not take.
        command: what does the same in a shell.
    """

    source: str
    destination: str
    engine: str
    quantization: str
    model_type: str
    tensors: int
    parameters: int
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    command: str = ""

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def record(self) -> dict[str, Any]:
        """What a `Report` of a conversion says as well, under the same names, and the engine."""
        checks = [{**asdict(check), "ok": bool(check.ok)} for check in self.checks]
        return {
            **self.to_dict(),
            "direction": "export",
            "exactness": f"rounded to {self.quantization}" if self.quantization else "as stored",
            "folds": [],
            "deviations": [],
            "non_finite": [],
            "tokenizer": [],
            "verification": {"checks": checks, "ok": self.ok},
        }

    def to_markdown(self) -> str:
        how = f", {self.quantization}" if self.quantization else ""
        return "\n".join(
            [
                f"**variant -> {self.engine}**{how}: {self.parameters:,} parameters.",
                *(f"- {'ok' if check.ok else 'DIFFERS'}: {check.name}: {check.detail}" for check in self.checks),
                *(f"- {note}." for note in self.notes),
            ]
        )


def export_to_engine(
    source: str | Path,
    destination: str | Path,
    engine: str,
    *,
    quantization: str | None = None,
    ignore_keys: Iterable[str] = (),
) -> EngineReport:
    """
    Write a checkpoint for another runtime, run it beside ours, and keep it if both compute the same.

    Args:
        source: a native folder, a Hub id, a GGUF file, or a folder of a variant.
        destination: a folder that does not exist yet; it appears when the comparison has held.
        engine: one of `ENGINES`.
        quantization: of the weights, in the engine's words; by default as they are stored.
        ignore_keys: as `convert` takes them.

    Raises:
        NotRepresentable: naming every field that the engine does not compute, before a weight is read.
        VerificationFailed: if it computes something else all the same; nothing is left behind.
        ConversionError: if the engine's package is not installed; otherwise as `convert`.
    """
    room = engine_room(engine)
    room.refuse_quantization(quantization)
    output_folder.refuse_occupied(destination)
    opened = open_variant(source, ignore_keys)
    # All that config and class say against it, before a weight is read.
    room.losses(opened.skeleton)
    if opened.files.is_dir():
        refuse_broken_files(opened.files)
    version = room.version()
    stored = stored_tensors(opened.skeleton)
    weights = {name: opened.load(name).clone(memory_format=torch.contiguous_format) for name in stored}
    has_config = (opened.files / CONFIG_NAME).is_file()
    with loading(opened.path, opened.model_class) if has_config else nullcontext():
        model = build(opened.model_class, copy.deepcopy(opened.config), weights)
    del weights
    tokenizer, notes = tokenizer_of(opened.files)
    report = EngineReport(
        source=str(source),
        destination=str(destination),
        engine=version,
        quantization=quantization or "",
        model_type=opened.model_type,
        tensors=len(stored),
        parameters=model.num_parameters(),
        command=command_line("export", source, destination, engine=engine, quantization=quantization),
    )
    with output_folder.new_folder(destination) as temporary:
        report.notes = [*room.write(model, tokenizer, temporary, quantization), *notes]
        if room.TAKES_COMPANIONS:
            report.notes += opened.write_companions(temporary)
        elif tokenizer is not None:
            tokenizer.save_pretrained(temporary)
            reread = load_tokenizer(temporary)
            report.notes += [reread] if isinstance(reread, str) else differences(tokenizer, reread)
        with _without_bars():
            report.checks, figures = room.prove(temporary, in_float32(model), tokenizer, quantization)
        report.notes += figures
        if not report.ok:
            raise VerificationFailed(report, "Please report it; with rounded weights, try a wider quantization.")
        write_record(temporary, report.record(), opened.files)
        lineage = lineage_of_source(report.source, opened.path)
        card.write_engine_card(temporary, report, room.USE, last_part(destination), lineage)
    return report


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without transformers' progress bars, of which every reading of what was written would show another."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, cast in place: what it was in fewer bits has been written. It takes inputs of any length."""
    model = model.float()
    model.config.dtype = torch.float32
    for module in model.modules():
        if isinstance(module, Block):
            # The same network in chunks of `ffn_chunk_size`, of which an input has to be a multiple.
            vars(module).pop("feed_forward", None)
    return model.eval()


def tokenizer_of(path: Path) -> tuple[Any, list[str]]:
    """The tokenizer in a checkpoint's folder or file, `None` for none, and notes where it cannot be read."""
    if path.is_dir() and not has_tokenizer(path):
        return None, []
    found = load_tokenizer(path)
    return (None, [found]) if isinstance(found, str) else (found, [])
