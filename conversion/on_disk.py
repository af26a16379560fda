"""Conversion on disk: `convert` and `export`, by the rules that models in memory go by."""

from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers.utils import CONFIG_NAME

from hf_variants import card

from . import checkpoint, output_folder, rules, tensor_files, tensor_writer
from .casting import as_dtype, cast, cast_headers, dtype_name, refuse_to_verify_a_cast
from .checkpoint_writer import Writing, task_of, write_checkpoint
from .companions import copy_companions, refuse_broken_files, root_of
from .errors import ConversionError, VerificationFailed, reading
from .family import head_of_variant, is_variant, read_config, variant_class
from .foreign import is_foreign, open_foreign
from .garbage import own_garbage
from .generation_settings import write_generation_config
from .gguf_source import is_gguf, open_gguf, write_gguf_companions
from .json_files import read_config_values
from .layout import Stored, as_transformers_reads, refuse_other_shapes
from .native_source import NativeSource, open_native, refuse_more_layers_than_tensors, refuse_quantised
from .native_target import exported, target_of
from .record import Digests, command_line, is_hub_id, last_part, public_name, write_record
from .report import (
    Report,
    count_parameters,
    note_cast,
    note_folds,
    note_non_finite,
    note_widened,
    report_of,
    unread_keys,
)
from .skeleton import empty_model
from .translation import check_ties, for_other_heads
from .verification import VerificationReport, verify


@own_garbage()
def convert(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    ignore_keys: Iterable[str] = (),
    max_shard_bytes: int = tensor_writer.MAX_SHARD_BYTES,
    workers: int | None = None,
    verify: bool = False,
    memory: int | None = None,
) -> Report:
    """
    Convert a native checkpoint into a new folder that `AutoModel*.from_pretrained` loads as a variant, with a model card
    and, in conversion_report.json, what was done.

    Args:
        source: a folder, a Hub id, a file of weights beside a config.json (safetensors, or a state dict that torch
            saved), a GGUF file, or a checkpoint of another code base (see `foreign`).
        destination: a folder that does not exist yet; it appears when everything is written.
        dtype: cast the weights; by default they are copied as they are.
        ignore_keys: keys of the native config that its class reads and that are known to be meaningless all the same.
        max_shard_bytes: largest size of one file.
        workers: threads that read, hash, look through and write tensors; by default one for each of up to four cores.
        verify: compare the result with the source, as `verify` does, which loads both; the card shows the comparison.
        memory: of that comparison, see `verify`.

    A run that was killed is gone on with by the next of the same source, destination and options.

    Raises:
        as `from_native`; FileExistsError if the destination is not empty; VerificationFailed, and nothing is written, if
            the two differ.
    """
    output_folder.refuse_occupied(destination)
    target_dtype = as_dtype(dtype)
    if memory is not None and (is_gguf(source) or is_foreign(source)):
        raise ConversionError(f"`memory` is for checkpoints in folders, and {source} is none. Leave it out.")
    writing = Writing(max_shard_bytes, workers)
    if is_gguf(source):
        return _convert_gguf(Path(source), destination, target_dtype, ignore_keys, writing, verify)
    if is_foreign(source):
        return _convert_foreign(source, destination, target_dtype, writing, verify)
    opened = open_native(source, ignore_keys)
    refuse_broken_files(opened.path)
    with _converted(opened, source, destination, target_dtype, writing, verify, ignore_keys) as (
        folder,
        report,
        digests,
    ):
        report.tokenizer = copy_companions(opened.path, folder)
        write_generation_config(folder, opened.native, opened.path)
        _complete(folder, report, opened.path, verify, ignore_keys, digests, memory)
    return report


@own_garbage()
def export(
    source: str | Path,
    destination: str | Path,
    *,
    model_type: str | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_bytes: int = tensor_writer.MAX_SHARD_BYTES,
    workers: int | None = None,
    verify: bool = False,
    memory: int | None = None,
) -> Report:
    """
    Write a variant's checkpoint as a native one that stock transformers and every engine load.

    Args:
        source: a folder or Hub id of one of our checkpoints.
        destination: a folder that does not exist yet.
        model_type: as in `to_native`.
        dtype, max_shard_bytes, workers, verify, memory: as in `convert`.

    Raises:
        NotRepresentable: naming every field in the way; ConversionError if the source is not a variant;
            VerificationFailed, and nothing is written, if the two differ.
    """
    target_dtype = as_dtype(dtype)
    output_folder.refuse_occupied(destination)
    folder = checkpoint.resolve_folder(source)
    config = read_config(folder)
    if not is_variant(config):
        raise ConversionError(
            f"{source} is a {config.model_type} checkpoint, not a variant. Convert it first, or export another folder."
        )
    refuse_quantised(folder / CONFIG_NAME, read_config_values(folder / CONFIG_NAME))
    head = head_of_variant((config.architectures or ["VariantForCausalLM"])[0])
    weights = checkpoint.weights_of(source, folder)
    refuse_more_layers_than_tensors(config, weights)
    variant = empty_model(variant_class((config.architectures or ["VariantForCausalLM"])[0]), config)
    refuse_other_shapes(variant, weights)
    with reading(folder / CONFIG_NAME):
        family, native_config, folding = target_of(config, model_type, head)
    refuse_broken_files(folder)
    layout = as_transformers_reads(variant, weights)
    refuse_to_verify_a_cast(verify, layout.dtypes(), target_dtype)
    apart = for_other_heads(family, head, layout.apart, variant, to_native=True)
    names = check_ties(variant, layout.names, layout.load)
    target, translation = exported(family, head, variant, names, layout.load, native_config, folding)
    _, header = folding.apply(names, layout.header)
    stored = config.dtype if config.dtype in tensor_files.FLOATS else weights.dtype()
    native_config.dtype = target_dtype or stored
    headers = translation.headers(header) | {native: layout.header(name) for name, native in apart.items()}
    as_written = Stored(
        target,
        cast_headers(headers, target_dtype),
        lambda name: target_dtype in (None, headers[name].dtype) and translation.is_recomputed(name),
    )
    report = report_of(source, destination, "export", family, head, config, target)
    options = {"to": model_type, "dtype": dtype_name(target_dtype), "verify": verify}
    report.command = command_line("export", source, destination, **options)
    report.tensors, report.parameters = len(as_written.headers), count_parameters(as_written.headers)
    report.passed_over, report.notes = layout.passed_over_but(apart), list(weights.notes)
    depth = (config.decoder if config.is_encoder_decoder else config).num_hidden_layers
    cached = getattr(native_config.get_text_config(decoder=True), "num_hidden_layers", depth)
    if target.can_generate() and cached < depth:
        report.notes.append(
            f"transformers makes the stock class's cache for {cached} layers, and its decoder has {depth}: generate with "
            "`use_cache=False`"
        )
    note_folds(report, folding, target_dtype or stored)
    note_widened(report, translation.widened(header))
    note_cast(report, headers, target_dtype)
    writing = Writing(max_shard_bytes, workers)
    writing.task = task_of(
        folder, native_config, as_written.headers, max_shard_bytes, "export", config.to_json_string(), report.folds
    )

    def tensors(but: Set[str]) -> Iterator[tuple[str, Any]]:
        but = as_written.made_of_all(but)
        beside = ((native, layout.stored(name)) for name, native in apart.items() if native not in but)
        unread = None if folding.rewrites else layout.stored
        return as_written(cast(chain(translation.tensors(unread=unread, but=but), beside), target_dtype))

    with output_folder.new_folder(destination, writing.task) as temporary:
        written = write_checkpoint(
            temporary, native_config, target, tensors, as_written.headers, writing, folder, weights
        )
        report.tokenizer = copy_companions(folder, temporary, to_native=True)
        note_non_finite(report, written.non_finite)
        if verify:
            report.verification = _verified(report, temporary, (), memory)
        write_record(temporary, report.to_dict(), folder, written.digests)
        card.write_native_card(
            temporary,
            report,
            family.variant_class(head).__name__,
            last_part(destination),
            lineage_of_source(report.source, folder),
        )
        weights.refuse_changed()
    return report


@contextmanager
def _converted(
    opened: NativeSource,
    source: str | Path,
    destination: str | Path,
    dtype: torch.dtype | None,
    writing: Writing,
    verify: bool,
    ignore_keys: Iterable[str],
) -> Iterator[tuple[Path, Report, Digests]]:
    """Weights and config of a variant, in a folder that becomes `destination` when the block ends well."""
    target = empty_model(opened.family.variant_class(opened.head), opened.config)
    translation = opened.translation(target)
    refuse_to_verify_a_cast(verify, opened.layout.dtypes(), dtype)
    layout = opened.layout
    apart = for_other_heads(opened.family, opened.head, layout.apart, target)
    headers = translation.headers(layout.header) | {ours: layout.header(name) for name, ours in apart.items()}
    if dtype is not None:
        opened.config.dtype = dtype
    report = report_of(source, destination, "convert", opened.family, opened.head, opened.config, target)
    options = {"dtype": dtype_name(dtype), "ignore-key": list(ignore_keys), "verify": verify}
    report.command = command_line("convert", source, destination, **options)
    report.unread = unread_keys(opened.family, opened.native.config, opened.head)
    report.part = opened.family.taken_part(next(iter(opened.native.config.architectures or [""])), opened.head)
    report.passed_over, report.notes = layout.passed_over_but(apart), opened.notes
    note_widened(report, translation.widened(opened.layout.header))
    note_cast(report, headers, dtype)
    as_written = cast_headers(headers, dtype)
    files = Path(source) if is_gguf(source) else opened.path
    writing.task = task_of(files, opened.config, as_written, writing.max_shard_bytes, "convert")

    def tensors(but: Set[str]) -> Iterator[tuple[str, Any]]:
        beside = ((ours, layout.stored(name)) for name, ours in apart.items() if ours not in but)
        return cast(chain(translation.tensors(unread=layout.stored, but=but), beside), dtype)

    with output_folder.new_folder(destination, writing.task) as temporary:
        written = write_checkpoint(
            temporary, opened.config, target, tensors, as_written, writing, files, opened.weights
        )
        note_non_finite(report, written.non_finite)
        yield temporary, report, written.digests
        if opened.weights is not None:
            opened.weights.refuse_changed()


def _convert_gguf(
    path: Path,
    destination: str | Path,
    dtype: torch.dtype | None,
    ignore_keys: Iterable[str],
    writing: Writing,
    verify: bool,
) -> Report:
    checkpoint_file, opened = open_gguf(path, ignore_keys)
    with _converted(opened, path, destination, dtype, writing, verify, ignore_keys) as (folder, report, digests):
        report.tokenizer = write_gguf_companions(path, checkpoint_file, folder)
        _complete(folder, report, path.parent, verify, ignore_keys, digests)
    return report


def _convert_foreign(
    source: str | Path, destination: str | Path, dtype: torch.dtype | None, writing: Writing, verify: bool
) -> Report:
    """A checkpoint of another code base."""
    opened = open_foreign(source)
    refuse_broken_files(opened.path)
    target, shapes = opened.target()
    refuse_to_verify_a_cast(verify, {header.dtype for header in opened.weights.values()}, dtype)
    steps = opened.plan(shapes)
    headers = {name: tensor.to("meta") for name, tensor in opened.tensors(steps, shapes, opened.weights.__getitem__)}
    if dtype is not None:
        opened.config.dtype = dtype
    report = Report(
        source=str(source),
        destination=str(destination),
        direction="convert",
        model_type=opened.code_base,
        head=head_of_variant(opened.class_name),
        tensors=len(headers),
        parameters=count_parameters(headers),
        passed_over=dict.fromkeys(opened.computed, "the model computes it"),
        notes=list(opened.notes),
    )
    report.command = command_line("convert", source, destination, dtype=dtype_name(dtype), verify=verify)
    note_cast(report, headers, dtype)
    as_written = cast_headers(headers, dtype)
    states = [tensor_files.state_of(path) for path in opened.files]
    writing.task = task_of(opened.path, opened.config, as_written, writing.max_shard_bytes, "foreign", states)

    def tensors(but: Set[str]) -> Iterator[tuple[str, Any]]:
        return cast(opened.tensors(rules.without(steps, but), shapes), dtype)

    with output_folder.new_folder(destination, writing.task) as temporary:
        written = write_checkpoint(temporary, opened.config, target, tensors, as_written, writing, opened.path)
        note_non_finite(report, written.non_finite)
        report.tokenizer = opened.write_companions(temporary)
        _complete(temporary, report, opened.path, verify, (), written.digests)
    return report


def _complete(
    folder: Path,
    report: Report,
    opened: Path,
    verify: bool,
    ignore_keys: Iterable[str],
    digests: Digests,
    memory: int | None = None,
) -> None:
    """
    Compare a converted checkpoint with its source, if asked, and write down what was done and seen.

    Args:
        folder: where the checkpoint is until it has its name.
        opened: the folder of the source.
        digests: of the weights.
        memory: of the comparison.
    """
    if verify:
        report.verification = _verified(report, folder, ignore_keys, memory)
    write_record(folder, report.to_dict(), Path(report.source) if is_gguf(report.source) else opened, digests)
    card.write_card(folder, name=last_part(report.destination), lineage=lineage_of_source(report.source, opened))


def _verified(report: Report, folder: Path, ignore_keys: Iterable[str], memory: int | None) -> VerificationReport:
    names = {report.source: public_name(report.source), str(folder): last_part(report.destination)}
    verification = verify(report.source, folder, ignore_keys=ignore_keys, memory=memory)
    verification.a, verification.b = names.values()
    for check in verification.checks:
        for path, name in names.items():
            check.name = check.name.replace(f"tensors of {path}", f"tensors of {name}")
    if not verification.ok:
        raise VerificationFailed(verification)
    return verification


def lineage_of_source(source: str, opened: Path) -> dict[str, Any]:
    """What the card of a result takes from its source, whose folder is `opened`."""
    lineage = card.lineage_of(root_of(opened))
    return {**lineage, "base_model": source} if is_hub_id(source) else lineage
