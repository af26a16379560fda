"""`python -m tests.published [FOLDER]`: which published configs convert, and in what they equal the stock class."""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, set_seed
from transformers.utils import logging

from hf_variants.conversion import convert, export
from hf_variants.conversion.errors import ConversionError
from hf_variants.conversion.family import Family, read_config, variant_class
from hf_variants.conversion.native_source import native_family_and_head
from hf_variants.conversion.verification import lay_alike, relative_error, set_attention
from hf_variants.model.axis import VariantConfigError

from ..parity import hostile_
from .shrink import shrunk


CONFIGS = Path(__file__).parent / "configs"
# What is compared, in the order of the table's columns.
ASPECTS = ("loads", "float32", "as stored", "generate", "loss", "config back", "tensors back")
# What must refuse configs, and with which words: no class of transformers is right for them, or their stock class
# computes one function in a forward pass and another in generation.
REFUSED = {
    "bert-relative-key-query": "relative_key_query",
    "bitnet-b1.58-2b-4t-bf16": "quantised",
    "gemma3-eagle3-draft": "sliding_window",
    "gpt-j-as-gpt-neo": "encodes positions otherwise",
    "gte-qwen2-7b-instruct": "is_causal",
    "jina-embeddings-v2-base-en": "position_embedding_type",
    "llama-2-7b-awq": "quantised",
    "llama-3.2-chunked-attention": "attention_chunk_size",
    "llama-fp8-compressed-tensors": "compressed-tensors",
    "llama-gptq-2023": "gptq",
    "memlong-llama": "encodes positions otherwise",
    "qwen3-fp8": "fp8",
    "qwen3-mlx-4bit": "mlx",
    "unsloth-qwen2.5-bnb-4bit": "bitsandbytes",
}
NEW_TOKENS = 6
# What transformers writes for itself.
OF_THE_FRAMEWORK = {"_name_or_path", "transformers_version", "auto_map", "architectures", "dtype"}


def check(path: Path) -> dict[str, str]:
    """
    One config's row: aspect -> `"yes"`, `"-"` where it does not apply, or what was seen.

    Args:
        path: a config.json under any name.
    """
    published = json.loads(path.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        return _checked(published, Path(folder), REFUSED.get(path.stem))


def _checked(published: dict[str, Any], folder: Path, refusal: str | None) -> dict[str, str]:
    source = folder / "source"
    source.mkdir()

    def write(values: dict[str, Any]) -> None:
        (source / "config.json").write_text(json.dumps(values), encoding="utf-8")

    write(published)
    try:
        config = read_config(source)
        family, head = native_family_and_head(config)
        values = shrunk(published, type(config))
        write(values)
        config = read_config(source)
        dtype = config.dtype or torch.float32
        native_class = family.native_class(head)
        # The class that is named writes the weights, a head of its own included; the config stays as it was published.
        writer_class = family.class_of_transformers(next(iter(config.architectures or ()), "")) or native_class
        writer = _built(writer_class, read_config(source))
        if isinstance(writer, Exception):
            # What stops the stock class is nothing to compare with.
            return {"loads": f"- (stock: {type(writer).__name__})"}
        hostile_(writer).to(dtype).save_pretrained(source)
        write(values)
        (source / "generation_config.json").unlink(missing_ok=True)
        convert(source, folder / "variant")
    except Exception as error:  # Also those that are no message to a user, which the table has to show.
        refused = error.__cause__
        if isinstance(refused, StrictDataclassError) and not isinstance(refused, VariantConfigError):
            return {"loads": f"- (stock: {type(refused).__name__})"}
        said = f"{type(error).__name__}: " * (not isinstance(error, (ValueError, OSError))) + str(error).split(". ")[0]
        right = refusal is not None and refusal in str(error)
        return {"loads": "refused, rightly" if right else f"NO: {said}"}
    if refusal is not None:
        return {"loads": "NO: loads, and must be refused"}
    row = {"loads": "yes"}
    ours_class = variant_class(json.loads((folder / "variant" / "config.json").read_text())["architectures"][0])
    sides = {"stock": (native_class, source), "ours": (ours_class, folder / "variant")}
    if family.own_config is None:
        row |= _compared(family, head, sides, dtype)
    row |= _exported(folder, source, None if writer_class is native_class else native_class)
    return row


def _built(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel | Exception:
    torch.manual_seed(0)
    try:
        return model_class(config)
    except Exception as error:  # whatever a class says to a config that it does not take
        return error


def _compared(family: Family, head: str, sides: dict[str, tuple], dtype: torch.dtype) -> dict[str, str]:
    row = {}
    for name, wanted in (("float32", torch.float32), ("as stored", dtype)):
        stock, ours = (cls.from_pretrained(path, dtype=wanted).eval() for cls, path in sides.values())
        set_attention(ours, stock.config._attn_implementation)
        lay_alike(stock, ours)
        bound = max((d.bound for d in family.deviations_of(ours.config) if not d.gradients_only), default=0.0)
        bound *= 1.0 if wanted == torch.float32 else {torch.float16: 2.0**13, torch.bfloat16: 2.0**16}.get(wanted, 1.0)
        inputs = _inputs(stock)
        row[name] = _equal(partial(_outputs, inputs=inputs), stock, ours, bound)
        if wanted == torch.float32:
            row["generate"] = _equal(partial(_generated, inputs=inputs), stock, ours) if stock.can_generate() else "-"
            row["loss"] = _equal(partial(_loss, inputs=inputs), stock, ours, bound) if head != "base" else "-"
    return row


def _inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    config = model.config
    generator = torch.Generator().manual_seed(0)
    length = min(40, (getattr(config, "max_position_embeddings", None) or 40) - 4)
    ids = torch.randint(3, 200, (1, length), generator=generator)
    ids[ids == getattr(config, "pad_token_id", None)] = 7
    if "MultipleChoice" in type(model).__name__:
        # (1, length) -> (1, choices, length)
        ids = torch.stack([ids, ids.flip(1)], dim=1)
    inputs = {"input_ids": ids}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)[:, : length // 2]
    return inputs


@torch.no_grad()
def _outputs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    outputs = model(**inputs)
    if "start_logits" in outputs:
        return torch.stack([outputs.start_logits, outputs.end_logits])
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


@torch.no_grad()
def _generated(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    set_seed(0)
    made = model.generate(inputs["input_ids"][:, :12], max_new_tokens=NEW_TOKENS, max_length=None)
    # With more than the tokens where the settings ask for it.
    return made if torch.is_tensor(made) else made.sequences


@torch.no_grad()
def _loss(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = inputs["input_ids"]
    name = type(model).__name__
    if "MultipleChoice" in name:
        return model(**inputs, labels=torch.tensor([0])).loss
    if "SequenceClassification" in name:
        if model.config.problem_type == "multi_label_classification":
            return model(**inputs, labels=torch.ones(1, model.config.num_labels)).loss
        is_regression = model.config.num_labels == 1
        return model(**inputs, labels=torch.tensor([0.5] if is_regression else [1])).loss
    if "QuestionAnswering" in name:
        return model(**inputs, start_positions=torch.tensor([3]), end_positions=torch.tensor([7])).loss
    labels = ids % model.config.num_labels if "TokenClassification" in name else ids.flip(1)
    return model(input_ids=ids, labels=labels).loss


def _equal(
    measure: Callable[[PreTrainedModel], torch.Tensor],
    stock: PreTrainedModel,
    ours: PreTrainedModel,
    bound: float = 0.0,
) -> str:
    try:
        theirs = measure(stock)
    except Exception as error:  # What stops the stock class is nothing to compare with.
        return f"- (stock: {type(error).__name__})"
    try:
        made = measure(ours)
    except Exception as error:
        return f"NO: {type(error).__name__}: {error}"
    if made.shape != theirs.shape:
        return f"NO: shapes {tuple(made.shape)}, {tuple(theirs.shape)}"
    if torch.equal(made, theirs) or (
        (made.isnan() == theirs.isnan()).all() and torch.equal(made.nan_to_num(), theirs.nan_to_num())
    ):
        return "yes"
    error = relative_error(made, theirs) if made.numel() > 1 else abs(made / theirs - 1).item()
    return "yes" if error <= bound else f"NO: {error:.1e} of the spread"


def _exported(folder: Path, source: Path, part: type[PreTrainedModel] | None) -> dict[str, str]:
    """
    What comes back of a config and its tensors.

    Args:
        part: the class of what was taken, where the checkpoint had a head of its own beside it.
    """
    try:
        export(folder / "variant", folder / "back")
    except (ConversionError, ValueError, OSError) as error:
        return {"config back": f"NO: {error}", "tensors back": "NO"}
    theirs, ours = (read_config(path).to_dict() for path in (source, folder / "back"))
    different = {k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k)} - OF_THE_FRAMEWORK
    left, right = (
        load_file(path / "model.safetensors") if part is None else part.from_pretrained(path).state_dict()
        for path in (source, folder / "back")
    )
    same = left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )
    return {
        "config back": "yes" if not different else f"NO: {', '.join(sorted(different))}",
        "tensors back": "yes" if same else f"NO: {sorted(left.keys() ^ right.keys())[:3]}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.published", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=CONFIGS, help="of config.json files under any names")
    parser.add_argument("--only", default="", help="files whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    started, rows = time.perf_counter(), {}
    for path in tqdm(sorted(arguments.folder.rglob("*.json")), unit="config", delay=2.0):
        if arguments.only in path.stem:
            rows[path.stem] = check(path)
    print("| config |", " | ".join(ASPECTS), "|")
    print("|---" * (len(ASPECTS) + 1) + "|")
    for name, row in rows.items():
        print(f"| {name} |", " | ".join(row.get(aspect, "") for aspect in ASPECTS), "|")
    wrong = [name for name, row in rows.items() if any(seen.startswith("NO") for seen in row.values())]
    print(
        f"\n{len(rows) - len(wrong)} of {len(rows)} are right in every respect, {time.perf_counter() - started:.0f} s."
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
