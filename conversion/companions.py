"""What travels beside weights and config: tokenizer, templates, processors, sentence encoders' modules, licences."""

import ast
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import save_file
from transformers import utils
from transformers.utils import logging

from .errors import ConversionError
from .json_files import read_config_values, read_json, read_object, read_text
from .pickles import load_state_dict
from .tokenization import are_alike, differences, load_tokenizer


logger = logging.get_logger(__name__)

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILE = "tokenizer.json"
MODULES = "modules.json"
# Of a tokenizer, those that are one whatever its class.
OBJECTS = (TOKENIZER_CONFIG, TOKENIZER_FILE, "special_tokens_map.json", "added_tokens.json")
# In the tokenizer's config of a converted folder: the class that the source's named there, null where it named none.
ORIGINAL_CLASS = "native_tokenizer_class"
# Models of a tokenizer that can be empty, which those of scored pieces cannot.
EMPTIED: dict[str, dict[str, Any]] = {
    "BPE": {"vocab": {}, "merges": []},
    "WordPiece": {"vocab": {}},
    "WordLevel": {"vocab": {}},
}
# For more tokens, transformers asks config.json once more: for the regular expression that cuts texts.
MAX_EMPTIED = 100_000

# Names that are a pattern in the library that reads them: versions of a tokenizer's file and the formats that
# transformers looks for in its place; the settings of a sentence encoder's first module, by the type of its model.
PATTERNS = (
    r"tokenizer.*\.json", r"(tokenizer|tiktoken)\.model.*", r"tekken\.json", r"special_tokens_map\.json",
    r"added_tokens\.json", r"sentence_[\w-]+_config\.json", r"config_sentence_transformers\.json", r"router_config\.json",
)  # fmt: skip
TERMS = re.compile(r"(.*[-_.])?((un)?licen[cs]e|notices?|copying|copyright|(acceptable_)?use_policy)([-_.].*)?", re.I)
# What to fetch of a repository for these, as the Hub's client matches names, case included.
HUB_PATTERNS = (
    "*.json", "*.jinja", "*.txt", "*.model", "*.model.*", "*.spm", "*.codes", "*.tokenizer",
    *(f"*{''.join(f'[{c.upper()}{c}]' for c in word)}*" for word in ("licens", "licenc", "notice", "copying", "policy")),
)  # fmt: skip
# By their endings: what can run, or carries a model's weights in a form of its own.
NEVER_COPIED = (".py", ".pyc", ".so", ".sh", ".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")


@lru_cache(maxsize=1)
def companion_names() -> frozenset[str]:
    """Names of files beside a model that the installed transformers reads: of tokenizers, templates and processors."""
    names = {
        value
        for name, value in {**vars(utils), **vars(utils.hub)}.items()
        if isinstance(value, str) and name.endswith(("_NAME", "_FILE")) and value.endswith((".json", ".jinja"))
    }
    names -= {utils.CONFIG_NAME, utils.WEIGHTS_INDEX_NAME, utils.SAFE_WEIGHTS_INDEX_NAME, "adapter_config.json"}
    names = {name for name in names if not name.endswith(".index.json")}
    root = Path(transformers.__path__[0])
    # Where they are: to look everywhere takes four times as long.
    for path in (*root.glob("tokenization*.py"), *root.glob("models/*/tokenization*.py")):
        for table in re.findall(r"VOCAB_FILES_NAMES[^=\n]*=\s*(\{.*?\})", path.read_text(encoding="utf-8"), re.S):
            # Names that are constants elsewhere are those of `PATTERNS`.
            names.update(value.value for value in ast.parse(table).body[0].value.values if hasattr(value, "value"))
    return frozenset(name for name in names if isinstance(name, str))


def _is_companion(name: str) -> bool:
    if name.endswith(NEVER_COPIED):
        return False
    return (
        name in companion_names()
        or any(re.fullmatch(pattern, name) for pattern in PATTERNS)
        or TERMS.fullmatch(name) is not None
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a file from which a tokenizer is made."""
    return bool(tokenizer_files(folder))


def tokenizer_files(folder: Path) -> list[Path]:
    """The files from which a tokenizer is made."""
    others = {value for name, value in vars(utils).items() if name.endswith("_NAME")}
    return [
        path
        for path in folder.iterdir()
        if path.is_file()
        and (
            path.name == TOKENIZER_CONFIG
            or re.fullmatch("|".join(PATTERNS[:3]), path.name)
            or (path.name in companion_names() - others and not path.name.startswith("chat_template"))
        )
    ]


def belongs(path: Path, folder: Path) -> bool:
    """Whether a file is the folder's own: links may go to files in it, and to the Hub cache's store beside it."""
    target, root = path.resolve(), folder.resolve()
    # Of a snapshot, or of a folder in one.
    stores = [root, *(place.parents[1] / "blobs" for place in (root, root.parent) if place.parent.name == "snapshots")]
    if target.is_file() and any(target.is_relative_to(store) for store in stores):
        return True
    logger.warning(f"{path} is a link that leaves its folder, and is not copied. Put the file itself there.")
    return False


def copy_files(source: Path, destination: Path) -> None:
    """
    Copy what belongs to a model besides its weights and config. Code is never copied, nor a pointer to it.

    Raises:
        ConversionError: for a modules.json that leaves the folder.
    """
    root = root_of(source)
    # The model's own last, which stand for those of the same name.
    for place in dict.fromkeys((root, source)):
        for path in sorted(place.iterdir()):
            if path.is_file() and _is_companion(path.name) and belongs(path, place):
                shutil.copyfile(path, destination / path.name)
                # tokenizer.json is long, and read by the tokenizers library alone, which knows no code.
                if path.suffix == ".json" and path.name != TOKENIZER_FILE:
                    _forget_code(destination / path.name)
    _copy_tree(source / utils.CHAT_TEMPLATE_DIR, destination / utils.CHAT_TEMPLATE_DIR, source)
    for module in modules_of(root):
        if root / module != source:
            _copy_tree(root / module, destination / module, root)
    if (root / MODULES).is_file() and belongs(root / MODULES, root):
        shutil.copyfile(root / MODULES, destination / MODULES)
        if root != source:
            entries = [{**entry, "path": ""} if root / entry["path"] == source else entry for entry in _entries(root)]
            _write_settings(destination / MODULES, entries)


def _forget_code(path: Path) -> None:
    settings = read_json(path)
    if isinstance(settings, dict) and settings.pop("auto_map", None) is not None:
        _write_settings(path, settings)


def refuse_broken_files(folder: Path) -> None:
    """
    Look at what travels beside the weights before any long work.

    Raises:
        ConversionError: for a file that cannot be read as what it must be.
    """
    for path in sorted(folder.iterdir()):
        if not _is_companion(path.name) or not path.is_file() or not belongs(path, folder):
            continue
        if path.suffix == ".jinja":
            read_text(path)
        elif path.name == utils.GENERATION_CONFIG_NAME:
            read_object(path)
        elif path.suffix == ".json":
            content = read_json(path)
            if path.name in OBJECTS and not isinstance(content, dict):
                raise ConversionError(f"{path} holds no JSON object. The file is damaged; fetch it again, or mend it.")
    root = root_of(folder)
    for module in modules_of(root):
        for path in sorted((root / module).rglob(utils.WEIGHTS_NAME)) if root / module != folder else ():
            if belongs(path, root) and not path.with_name(utils.SAFE_WEIGHTS_NAME).is_file():
                load_state_dict(path)


def _entries(folder: Path) -> list[dict[str, Any]]:
    """Sentence Transformers' modules.json; empty where there is none."""
    path = folder / MODULES
    if not path.is_file():
        return []
    entries = read_json(path)
    try:
        for entry in entries:
            entry["path"], entry["type"]
    except (ValueError, TypeError, KeyError) as error:
        raise ConversionError(f"{path} is no list of modules ({error!r}). Mend or remove it.") from error
    for where in (entry["path"] for entry in entries):
        if not isinstance(where, str) or Path(where).is_absolute() or ".." in Path(where).parts or "\\" in where:
            raise ConversionError(f"{MODULES} names the path {where!r}, which leaves its folder. Do not trust it.")
    return entries


def modules_of(folder: Path) -> Iterator[str]:
    """Folders of a sentence encoder's modules, as Sentence Transformers' modules.json lists them."""
    for entry in _entries(folder):
        if not str(entry["type"]).startswith("sentence_transformers."):
            logger.warning(
                f"{MODULES} names code of its own, {entry['type']}, which is not copied. Add it yourself if you trust it."
            )
        if Path(entry["path"]).parts:
            yield entry["path"]


def model_folder(folder: Path) -> Path:
    """Where the model itself lies: with sentence encoders saved by old releases in a folder of its own, `0_Transformer`."""
    if not (folder / utils.CONFIG_NAME).is_file():
        for entry in _entries(folder):
            if str(entry["type"]).endswith(".Transformer") and (folder / entry["path"] / utils.CONFIG_NAME).is_file():
                return folder / entry["path"]
    return folder


def is_sentence_encoder(folder: Path) -> bool:
    """Whether a folder is, or holds the model of, what Sentence Transformers loads by a modules.json."""
    return (root_of(folder) / MODULES).is_file()


def root_of(folder: Path) -> Path:
    """The sentence encoder of which a folder is the model (see `model_folder`), or the folder itself."""
    parent = folder.parent
    is_part = (parent / MODULES).is_file() and model_folder(parent).resolve() == folder.resolve()
    return parent if is_part else folder


def _copy_tree(source: Path, destination: Path, root: Path) -> None:
    """Copy a folder's files, pickled weights as safetensors."""
    for path in sorted(source.rglob("*")) if source.is_dir() else ():
        if not path.is_file() or path.name.endswith(NEVER_COPIED) or not belongs(path, root):
            continue
        target = destination / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.name == utils.WEIGHTS_NAME:
            if not path.with_name(utils.SAFE_WEIGHTS_NAME).is_file():
                # Copies, since tensors of a pickle may share memory.
                weights = {name: tensor.clone() for name, tensor in load_state_dict(path).items()}
                save_file(weights, target.with_name(utils.SAFE_WEIGHTS_NAME), metadata={"format": "pt"})
        elif path.suffix != ".bin":
            shutil.copyfile(path, target)


def copy_companions(source: Path, destination: Path, to_native: bool = False) -> list[str]:
    """
    Copy what belongs to a model, and have `AutoTokenizer` read from `destination`, whose config.json has been written,
    what it reads from `source`.

    The files alone do not decide it: transformers takes the class of a tokenizer from the `model_type` in config.json,
    and for some types against what the tokenizer's config says.

    Returns:
        in which respects the two tokenizers differ all the same; of a tokenizer that cannot be read without its code,
        or not with what is installed, that.
    """
    copy_files(source, destination)
    if not has_tokenizer(destination):
        return []
    is_as_copied = not (to_native and ORIGINAL_CLASS in _settings(destination))
    if is_as_copied and _is_read_alike(source, destination) and not isinstance(load_tokenizer(destination), str):
        return []
    reference, notes = _reference(source, destination)
    if isinstance(reference, str):
        return [*notes, reference]
    copied = {path: path.read_bytes() for path in destination.iterdir() if path.is_file() and _is_companion(path.name)}
    left: list[str] = []
    for change in (_restore_class, _name_class, _save):
        for path in destination.iterdir():
            if path in copied:
                path.write_bytes(copied[path])
        change(destination, reference, to_native)
        made = load_tokenizer(destination)
        left = [made] if isinstance(made, str) else differences(reference, made)
        if not left:
            return notes
    logger.warning(f"AutoTokenizer reads from {destination} another tokenizer than from {source}: {'; '.join(left)}.")
    return [*notes, *left]


def _is_read_alike(source: Path, destination: Path) -> bool:
    """
    Whether the files of a tokenizer, which were copied as they are, are the same tokenizer beside either config.json: what
    config.json decides shows without the vocabulary, which takes long to read. `False` where it may not show so.
    """
    path = destination / TOKENIZER_FILE
    others = {file.name for file in tokenizer_files(destination)} - set(OBJECTS)
    if others or not path.is_file() or "auto_map" in _settings(source):
        return False
    content = read_json(path)
    model, added = (content.get(key) if isinstance(content, dict) else None for key in ("model", "added_tokens"))
    if not isinstance(model, dict) or not isinstance(vocab := model.get("vocab"), dict) or not isinstance(added, list):
        return False
    emptied = EMPTIED.get(str(model.get("type")))
    if emptied is None or len(vocab) + len(added) > MAX_EMPTIED:
        return False
    small = json.dumps({**content, "model": {**model, **emptied}, "added_tokens": []})
    made = []
    for folder, repository in ((source, _repository(source)), (destination, None)):
        with tempfile.TemporaryDirectory() as place:
            staged = Path(place)
            for file in destination.iterdir():
                if file.is_file() and _is_companion(file.name) and file != path:
                    shutil.copyfile(file, staged / file.name)
            (staged / path.name).write_text(small, encoding="utf-8")
            _write_config(folder, staged)
            made.append(load_tokenizer(staged, repository=repository))
    return not any(isinstance(one, str) for one in made) and are_alike(*made)


def _write_config(source: Path, staged: Path) -> None:
    """The config.json of a folder, without a pointer to code; none where it has none, as other code bases' have."""
    if not (source / utils.CONFIG_NAME).is_file():
        (staged / utils.CONFIG_NAME).unlink(missing_ok=True)
        return
    config = read_config_values(source / utils.CONFIG_NAME)
    config.pop("auto_map", None)
    (staged / utils.CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")


def _reference(source: Path, destination: Path) -> tuple[Any, list[str]]:
    """
    What `AutoTokenizer` reads from the files that were copied, beside the source's config.json; or why it reads nothing.
    Of one that has code of its own, what is read without; that is noted.
    """
    notes = []
    with tempfile.TemporaryDirectory() as place:
        staged = Path(place)
        shutil.copytree(
            destination, staged, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "*.py")
        )
        _write_config(source, staged)
        code = _settings(source).get("auto_map")
        if code is not None:
            _write_settings(staged / TOKENIZER_CONFIG, {**_settings(staged), "auto_map": code})
            notes.append("it has code of its own, which was neither run nor copied: compare it yourself")
            tokenizer = load_tokenizer(staged, repository=_repository(source))
            if not isinstance(tokenizer, str):
                return tokenizer, notes
            own = {name: value for name, value in _settings(staged).items() if name != "auto_map"}
            _write_settings(staged / TOKENIZER_CONFIG, own)
        return load_tokenizer(staged, repository=_repository(source)), notes


def _repository(folder: Path) -> str | None:
    """The Hub id of a folder in the Hub's cache: transformers knows some repositories' tokenizers by it."""
    root = folder.resolve()
    name = root.parent.parent.name
    return name.removeprefix("models--").replace("--", "/") if root.parent.name == "snapshots" else None


def _restore_class(folder: Path, reference: Any, to_native: bool) -> None:
    """The class that the native folder's config named, where a conversion has put another there."""
    settings = _settings(folder)
    if not to_native or ORIGINAL_CLASS not in settings:
        return
    named = settings.pop(ORIGINAL_CLASS)
    settings["tokenizer_class"] = named
    if named is None:
        del settings["tokenizer_class"]
    _write_settings(folder / TOKENIZER_CONFIG, settings)


def _name_class(folder: Path, reference: Any, to_native: bool) -> None:
    """The class that was read, by its name."""
    settings = _settings(folder)
    original = settings.pop(ORIGINAL_CLASS, settings.get("tokenizer_class"))
    settings["tokenizer_class"] = type(reference).__name__
    _write_settings(folder / TOKENIZER_CONFIG, settings if to_native else {**settings, ORIGINAL_CLASS: original})


def _save(folder: Path, reference: Any, to_native: bool) -> None:
    """What transformers itself writes of the tokenizer that was read."""
    reference.save_pretrained(folder)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER_CONFIG
    # As transformers reads it: its values are passed on, and decide nothing here.
    return read_object(path, lambda values, key: False) if path.is_file() else {}


def _write_settings(path: Path, settings: dict[str, Any] | list[dict[str, Any]]) -> None:
    """In the form of the file that is there, so that a change that is undone leaves its bytes."""
    if not settings:
        path.unlink(missing_ok=True)
        return
    form: dict[str, Any] = {"indent": 2, "ensure_ascii": False}
    end = "\n"
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        forms: list[dict[str, Any]] = [
            {"indent": indent, "ensure_ascii": ascii} for indent in (2, 4, None) for ascii in (False, True)
        ]
        before = json.loads(text)
        form = next((f for f in forms if json.dumps(before, **f) == text.rstrip("\n")), form)
        end = text[len(text.rstrip("\n")) :]
    path.write_text(json.dumps(settings, **form) + end, encoding="utf-8")
