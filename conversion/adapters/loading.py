"""An adapter onto a variant."""

import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from .. import checkpoint
from ..family import head_of_variant, is_variant, read_config
from ..skeleton import empty_model
from .files import Adapter, read_adapter, save_adapter
from .pair import Pair, vocabulary_of
from .parts import check
from .translation import translate_adapter


def load_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    ignore_keys: Iterable[str] = (),
) -> PeftModel:
    """
    A variant with an adapter on it, which was trained on this variant or on the native model that it comes from.

    Args:
        model: one of ours; its vocabulary is resized in place where the adapter was trained with more tokens.
        folder: the adapter's.
        base: the checkpoint it was trained on; by default the one that it names. A variant's adapter needs none.

    Raises:
        ConversionError: if its tensors do not belong to the model, or a method cannot be carried over exactly.
    """
    adapter = read_adapter(folder)
    name = base or adapter.config.base_model_name_or_path
    config = None if not name else read_config(checkpoint.resolve_folder(name))
    head = head_of_variant(type(model).__name__)
    if config is not None and not is_variant(config):
        pair = Pair.of_native(config, head, ignore_keys)
        rows = pair.fit(adapter, to_native=False)
        adapter, _ = translate_adapter(adapter, pair, to_native=False)
        adapter.config.base_model_name_or_path = str(name)
    else:
        rows = vocabulary_of(adapter, model)
    tokens = _tokenizer_length(folder)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    elif tokens is not None and tokens > model.get_input_embeddings().weight.shape[0]:
        # As PEFT's own loader does.
        model.resize_token_embeddings(tokens)
    skeleton = empty_model(type(model), model.config)
    check(adapter, skeleton, f"The adapter in {folder}")
    return put_on(model, adapter)


def _tokenizer_length(folder: str | Path) -> int | None:
    if not (Path(folder).expanduser() / "tokenizer_config.json").is_file():
        return None
    return len(AutoTokenizer.from_pretrained(folder))


def put_on(model: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """PEFT's own loading, from a folder: it knows what each method needs."""
    model_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(adapter.config.task_type, PeftModel)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*save_embedding_layers.*")
        save_adapter(adapter, Path(folder))
        return model_class.from_pretrained(model, folder).eval()
