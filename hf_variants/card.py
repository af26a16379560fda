"""What a published variant says about itself: a model card with a drawing, generated from a model or its folder."""

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedModel
from transformers.utils import logging

import hf_variants
import hf_variants.model_cards

from .conversion.checkpoint import Weights
from .conversion.family import stacks
from .conversion.layout import refuse_other_shapes
from .conversion.record import read_record, speaks_of
from .conversion.skeleton import empty_model
from .describe import axes, load_config
from .drawing import block_svg
from .evaluation import read_results
from .model.normalization import NORM_KINDS
from .model.versions import MINIMUM
from .sizes import cache_sizes, readable, sizes_in


logger = logging.get_logger(__name__)

TEMPLATES = Path(next(iter(hf_variants.model_cards.__path__)))
CARD = "README.md"
DRAWING = "block.svg"
# A README.md with this line is ours to write anew; one without it is somebody's work.
MARKER = "<!-- Written by hf-variants, anew on each save: remove this line to keep the file as you edit it. -->"

# our class -> (auto class, the Hub's name of the task)
TASKS = {
    "VariantForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "VariantForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "VariantForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "VariantForMultipleChoice": ("AutoModelForMultipleChoice", "multiple-choice"),
    "VariantForNextSentencePrediction": ("AutoModelForNextSentencePrediction", "text-classification"),
    "VariantForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "VariantForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    # The Hub has one task for both; what a model was trained for, such as translation, is not known here.
    "VariantForConditionalGeneration": ("AutoModelForSeq2SeqLM", "text-generation"),
    "VariantSeq2SeqForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "VariantSeq2SeqForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "VariantSeq2SeqForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "VariantModel": ("AutoModel", "feature-extraction"),
    "VariantSeq2SeqModel": ("AutoModel", "feature-extraction"),
}
TAGS = ("hf-variants", "custom_code")
SEQ2SEQ_TAG = "text2text-generation"
NORM_TAGS = {placement: f"{placement}-norm" for placement in ("pre", "post", "branch", "sandwich")}
NORM_TAGS["deepnorm"] = "deepnorm"
POSITION_TAGS = {
    "rope": "rope",
    "alibi": "alibi",
    "learned": "learned-positions",
    "sinusoidal": "sinusoidal-positions",
    "relative_bias": "relative-position-bias",
    "none": "no-positions",
}
# Metadata on where weights come from, which holds for what is made from them as well.
LINEAGE = ("license", "license_name", "license_link", "language", "base_model", "datasets")
# Metadata that is made here each time.
DERIVED = ("library_name", "pipeline_tag", "model_name", "tags", "eval_results", "model-index")
# Options that say where a model lies, which a README.md by hand says for itself.
WHERE = ("repo_id", "name", "lineage", "skeleton")
# Fields of an encoder-decoder beside those of its stacks.
SHARED_FIELDS = ("share_embeddings", "tie_word_embeddings", "final_logits_bias", "label_shift")


def write_card(folder: str | Path, model: PreTrainedModel | None = None, **options: Any) -> Path:
    """
    Write README.md and the drawing beside it, block.svg, into the folder of a variant.

    A README.md that was not generated, or from which the line that says so was removed, is left alone.

    Args:
        folder: of the checkpoint.
        model: what is saved there; without it, the folder's own files are read.
        options: as `model_card` takes them.

    Returns:
        the path of README.md.

    Raises:
        FileExistsError: if there is metadata to add to a README.md that was not generated.
        ValueError: as `model_card`.
    """
    path = Path(folder) / CARD
    if is_by_hand(path):
        given = [f"`{name}`" for name, value in options.items() if value is not None and name not in WHERE]
        if given:
            raise FileExistsError(
                f"{path} exists already and was not generated, so {', '.join(given)} cannot be added to it. "
                "Write it there yourself, or remove the file to have one generated."
            )
        return path
    config = _config_of(path.parent, model)
    card = model_card(folder, model, **options)
    (path.parent / DRAWING).write_text(block_svg(config, _class_name(config, model)), encoding="utf-8")
    card.save(path)
    return path


def evaluation_results(
    folder: str | Path, paths: Iterable[str | Path], pipeline_tag: str | None = None
) -> list[EvalResult]:
    """
    What the lm-evaluation-harness wrote on a saved variant, as `write_card` takes it.

    Args:
        folder: of the checkpoint.
        paths: of results_*.json, or of folders that hold such.
        pipeline_tag: the Hub's task; by default as on the card.

    Raises:
        OSError: if there is no such file; ValueError: as `evaluation.read_results`, or if the folder holds no variant.
    """
    folder = Path(folder)
    config = _config_of(folder, None)
    class_name = _class_name(config, None)
    task = pipeline_tag or _earlier(folder / CARD).pipeline_tag or TASKS[class_name][1]
    return read_results(paths, task, empty_model(getattr(hf_variants, class_name), config).num_parameters())


def model_card(
    folder: str | Path,
    model: PreTrainedModel | None = None,
    *,
    repo_id: str | None = None,
    name: str | None = None,
    lineage: dict[str, Any] | None = None,
    skeleton: PreTrainedModel | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    language: str | list[str] | None = None,
    pipeline_tag: str | None = None,
    base_model: str | list[str] | None = None,
    base_model_relation: str | None = None,
    datasets: str | list[str] | None = None,
    tags: list[str] | None = None,
    metrics: list[str] | None = None,
    eval_results: list[EvalResult] | None = None,
) -> ModelCard:
    """
    The card of a saved variant, or of one that is being saved.

    What is not given is taken from the generated card that stands in the folder; or, as far as it speaks of the origin
    of the weights, from the one beside the checkpoint that the model was loaded from.

    Args:
        folder: of the checkpoint.
        model: what is saved there; without it, the folder's own files are read.
        repo_id: where it lies on the Hub; by default the usage code names the folder.
        name: of the folder that this one becomes, where it is still under another.
        lineage: metadata of what it was made from; by default as `lineage_of` knows what the model was loaded from.
        skeleton: of the folder, the model without memory for its weights, where the caller has it.
        license, license_name, license_link, language, base_model, base_model_relation, datasets, tags, metrics,
            eval_results: the Hub's metadata, as in `huggingface_hub.ModelCardData`; `tags` beside those made here.
        pipeline_tag: the Hub's task, such as `"translation"`; by default what the model's class says.

    Raises:
        ValueError: if the folder holds no variant, or the licence is incomplete.
    """
    folder = Path(folder)
    config = _config_of(folder, model)
    class_name = _class_name(config, model)
    model_class = getattr(hf_variants, class_name)
    described = model or skeleton or empty_model(model_class, config)
    if model is None and getattr(config, "quantization_config", None) is None:
        # A config alone has no weights.
        with suppress(FileNotFoundError):
            refuse_other_shapes(described, Weights(folder))
    auto_class, task = TASKS[class_name]
    earlier = _earlier(folder / CARD)
    where = repo_id or name or earlier.where or folder.resolve().name
    title = where.rpartition("/")[2]
    given = {
        "license": license,
        "license_name": license_name,
        "license_link": license_link,
        "language": language,
        "base_model": base_model,
        "base_model_relation": base_model_relation,
        "datasets": datasets,
        "metrics": metrics,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if lineage is None:
        lineage = {} if model is None else lineage_of(model.name_or_path)
    metadata = {**lineage, **earlier.metadata}
    metadata = _with_license(metadata, given) | given
    if metadata.get("base_model") == repo_id:
        # Loaded from where it goes.
        metadata.pop("base_model", None)
    results = earlier.eval_results if eval_results is None else eval_results
    if results and metrics is None:
        known = metadata.get("metrics") or []
        known = [known] if isinstance(known, str) else known
        metadata["metrics"] = sorted({*known, *(result.metric_type for result in results)})
    records = {} if (found := read_record(folder)) is None else {found["direction"]: found}
    record, edited = records.get("convert"), records.get("edit")
    decoder = config.decoder if config.is_encoder_decoder else config
    smallest_vocabulary = min(stack.vocab_size for stack in stacks(config))
    return ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag=pipeline_tag or earlier.pipeline_tag or task,
            model_name=title,
            tags=[*TAGS, *_axis_tags(config), *(earlier.tags if tags is None else tags)],
            eval_results=results or None,
            **metadata,
        ),
        template_path=str(TEMPLATES / "template.md"),
        marker=MARKER,
        title=title,
        summary=summary(config),
        drawing=DRAWING,
        where=json.dumps(where, ensure_ascii=False),
        auto_class=auto_class,
        has_tokenizer=(folder / "tokenizer_config.json").is_file(),
        generates=model_class.can_generate(),
        token_ids=[min(token, smallest_vocabulary - 1) for token in (1, 2, 3)],
        chooses=auto_class == "AutoModelForMultipleChoice",
        # A table of positions ends; what the sentence takes of it is not known here.
        new_tokens=max(1, min(20, decoder.max_position_embeddings - 20)),
        requirements=[f"{package}>={version}" for package, version in MINIMUM.items()],
        tables=_tables(config),
        sizes=sizes_in(folder, described),
        cache=cache_sizes(config),
        readable=readable,
        results=results,
        origin=(config.native_leftovers or {}).get("model_type"),
        record=record,
        # What is being saved may have been trained since.
        is_as_converted=record is not None and model is None and speaks_of(record, folder),
        edited=edited,
        is_as_edited=edited is not None and model is None and speaks_of(edited, folder),
    )


def write_native_card(folder: Path, report: Any, class_name: str, name: str, lineage: dict[str, Any]) -> Path:
    """
    Write the card of a variant that was exported to a native architecture.

    Args:
        folder: of the checkpoint, until it has its name.
        report: of the export, a `conversion.Report`.
        class_name: of the variant's model.
        name: that the folder is going to have.
        lineage: metadata of the variant's own card.
    """
    auto_class, task = TASKS[class_name]
    card = ModelCard.from_template(
        ModelCardData(library_name="transformers", pipeline_tag=task, tags=[TAGS[0]], **lineage),
        template_path=str(TEMPLATES / "native.md"),
        title=name,
        auto_class=auto_class,
        report=report,
    )
    path = folder / CARD
    card.save(path)
    return path


def write_engine_card(folder: Path, report: Any, use: str, name: str, lineage: dict[str, Any]) -> Path:
    """
    Write the card of a model that was exported to another runtime.

    Args:
        folder: of what the runtime reads, until it has its name.
        report: of the export, a `conversion.engines.EngineReport`.
        use: a line on how it is run.
        name: that the folder is going to have.
        lineage: metadata of the source's own card.
    """
    card = ModelCard.from_template(
        ModelCardData(library_name=report.engine.partition(" ")[0].lower(), tags=[TAGS[0]], **lineage),
        template_path=str(TEMPLATES / "engine.md"),
        title=name,
        report=report,
        use=use,
    )
    path = folder / CARD
    card.save(path)
    return path


def is_by_hand(path: Path) -> bool:
    """Whether there is a README.md that is not ours to replace."""
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8")
    if MARKER not in text.splitlines() and not _is_empty_form(text):
        return True
    if _metadata(path) is None:
        logger.warning(f"The metadata of {path} cannot be read, so the file is left as it is. Mend or remove it.")
        return True
    return False


def _is_empty_form(text: str) -> bool:
    """Whether it is the form that transformers puts beside a model which it pushes, with nothing filled in."""
    form = ModelCard.from_template(
        ModelCardData(),
        model_description="This is the model card of a 🤗 transformers model that has been pushed on the Hub. "
        "This model card has been automatically generated.",
    )
    return text.strip().endswith(form.text.strip())


def lineage_of(source: str | Path | None) -> dict[str, Any]:
    """The metadata that holds for whatever is made from a checkpoint, which is a folder or was fetched from the Hub."""
    if not source:
        return {}
    if Path(source).is_dir():
        data = _metadata(Path(source) / CARD)
        return {} if data is None else {key: data[key] for key in LINEAGE if data.get(key)}
    try:
        is_fetched = isinstance(try_to_load_from_cache(str(source), "config.json"), str)
    except HFValidationError:
        return {}
    return {"base_model": str(source)} if is_fetched else {}


def summary(config: Any) -> str:
    """One line: what kind of model, and what distinguishes it; of a `VariantConfig` or `VariantSeq2SeqConfig`."""
    if config.is_encoder_decoder:
        return f"an encoder-decoder; encoder: {summary(config.encoder)}; decoder: {summary(config.decoder)}"
    kind = "a decoder" if config.is_causal else "an encoder"
    norm = NORM_KINDS[config.norm_type].name
    layers = list(config.per_layer_config)
    placements = [
        layer.norm_placement if layer.parallel_block == "none" else f"parallel, {layer.norm_placement}"
        for layer in layers
    ]
    ffns = [f"{layer.hidden_act} {layer.ffn_type}" for layer in layers if "mlp" not in getattr(layer, "skip", ())]
    return (
        f"{kind} of {config.num_hidden_layers} layers, width {config.hidden_size}, {norm} ({_kinds(placements)}), "
        f"{_kinds(ffns) or 'no feed-forward'}, positions: {config.position_embedding_type}"
    )


def _kinds(values: list[str]) -> str:
    """What layers have, each once."""
    return " and ".join(dict.fromkeys(values))


@dataclass
class _Earlier:
    """What a generated card that stands in the folder was told, and nothing can be computed from."""

    metadata: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    eval_results: list[EvalResult] | None = None
    pipeline_tag: str | None = None
    where: str | None = None


def _earlier(path: Path) -> _Earlier:
    if is_by_hand(path):
        return _Earlier()
    data = _metadata(path)
    if data is None:
        return _Earlier()
    made_here = {*TAGS, SEQ2SEQ_TAG, *NORM_TAGS.values(), *POSITION_TAGS.values()}
    repo = re.search(r'^name = "([^"/]+/[^"/]+)"$', path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return _Earlier(
        metadata={key: value for key, value in data.to_dict().items() if key not in DERIVED},
        tags=[tag for tag in data.tags or () if tag not in made_here],
        eval_results=data.eval_results,
        # A task that no class stands for was given.
        pipeline_tag=data.pipeline_tag if data.pipeline_tag not in {task for _, task in TASKS.values()} else None,
        where=repo[1] if repo else None,
    )


def _metadata(path: Path) -> ModelCardData | None:
    """The metadata of a card, or `None` where there is none that can be read."""
    if not path.is_file() or not (text := path.read_text(encoding="utf-8-sig")).startswith("---"):
        return None
    try:
        return ModelCard(text, ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError):
        return None


def _config_of(folder: Path, model: PreTrainedModel | None) -> Any:
    return load_config(str(folder)) if model is None else model.config


def _class_name(config: Any, model: PreTrainedModel | None) -> str:
    """The name of our class; a subclass, such as FSDP makes, loads as what it is a subclass of."""
    if model is not None:
        base = "VariantSeq2SeqModel" if config.is_encoder_decoder else "VariantModel"
        return next((kind.__name__ for kind in type(model).__mro__ if kind.__name__ in TASKS), base)
    name = (config.architectures or ["VariantModel"])[0]
    if name not in TASKS:
        raise ValueError(f"`architectures` names {name}, which is none of the models here. Save the model again.")
    return name


def _with_license(metadata: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """
    What is known, without a licence that is replaced.

    Raises:
        ValueError: if the licence that is given has no name of its own, or two.
    """
    if given.keys().isdisjoint(("license", "license_name", "license_link")):
        return metadata
    if "license" in given:
        metadata = {key: value for key, value in metadata.items() if not key.startswith("license")}
    merged = metadata | given
    if (merged.get("license") == "other") != ("license_name" in merged):
        raise ValueError(
            f"`license` is {merged.get('license')!r} and `license_name` is {merged.get('license_name')!r}. The Hub "
            "wants a name, and a link, with the licence 'other' and with no other."
        )
    return metadata


def _axis_tags(config: Any) -> list[str]:
    """How blocks are normalised and positions told, of all stacks; and whether there are two."""
    placements = [layer.norm_placement for stack in stacks(config) for layer in stack.per_layer_config]
    return [
        *[SEQ2SEQ_TAG] * config.is_encoder_decoder,
        *(NORM_TAGS[placement] for placement in dict.fromkeys(placements)),
        *(POSITION_TAGS[stack.position_embedding_type] for stack in stacks(config)),
    ]


def _tables(config: Any) -> dict[str, list[tuple[str, str, str]]]:
    """Rows of axis, field and value under a heading each, as Markdown shows them."""
    if not config.is_encoder_decoder:
        return {"": _cells(axes(config))}
    shared = [("both stacks", name, str(getattr(config, name))) for name in SHARED_FIELDS]
    return {
        "Encoder": _cells(axes(config.encoder)),
        "Decoder": _cells(axes(config.decoder)),
        "Encoder and decoder": _cells(shared),
    }


def _cells(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """An axis is named in its first row only; a bar would end the cell."""
    cells, previous = [], ""
    for axis, name, value in rows:
        cells.append(("" if axis == previous else axis, name, value.replace("|", "\\|")))
        previous = axis
    return cells
