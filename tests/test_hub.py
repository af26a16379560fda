"""A bundle is all that a variant needs, from whatever wrote it; and its code says which versions it needs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

import hf_variants
import hf_variants_cli
from hf_variants.card import TASKS
from hf_variants.conversion import ConversionError
from hf_variants.hub import bundle
from hf_variants.model import versions
from hf_variants.model.custom_code import auto_map_of
from tests.test_packaging import project  # noqa: F401 (a fixture, found by name)
from tests.tools import kinds


OURS = {path.name for path in Path(versions.__file__).parent.glob("*.py")} - {"__init__.py"}
AUTO_CLASSES = {"llama": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM", "encoder": "AutoModelForMaskedLM"}


def inputs(kind: str) -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 27).view(2, 12)
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :9]} if kind == "seq2seq" else {})


def saved(kind: str, folder: Path, **changes) -> torch.Tensor:
    """Save a model as something that writes no code would, change its config.json, and return its logits."""
    model = kinds.model(kind)
    model.save_pretrained(folder)
    kinds.tokenizer().save_pretrained(folder)
    for path in [*folder.glob("*.py"), folder / "README.md", folder / "block.svg"]:
        path.unlink(missing_ok=True)
    edit_config(folder, **{"auto_map": None, **changes})
    with torch.no_grad():
        return model(**inputs(kind)).logits


def edit_config(folder: Path, **changes) -> None:
    """Set keys of a config.json, or remove those that are set to `None`."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


# Runs in a fresh interpreter in which this package cannot be imported.
WITHOUT_THE_PACKAGE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_variants":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch, transformers
from transformers import AutoTokenizer

for line in sys.argv[1:]:
    folder, auto_class = line.split(":")
    inputs, expected, heads = torch.load(folder + "-expected.pt")
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    assert torch.equal(model(**inputs).logits, expected)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert len(tokenizer("the cat sees").input_ids) == 3
    for head in heads:
        getattr(transformers, head).from_pretrained(folder, trust_remote_code=True)
print("equal")
"""


def run(script: str, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), **environment}
    command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=folder, env=environment, check=False
    )


@pytest.mark.slow
def test_bundles_load_where_the_package_is_absent(tmp_path):
    arguments = []
    for kind, auto_class in AUTO_CLASSES.items():
        expected = saved(kind, tmp_path / "source" / kind)
        destination = tmp_path / kind
        bundle(tmp_path / "source" / kind, destination, max_shard_bytes=20_000)
        assert len(list(destination.glob("*.safetensors"))) > 1
        config = kinds.config(kind)
        assert json.loads((destination / "config.json").read_text())["auto_map"] == auto_map_of(config)
        assert {path.name for path in destination.glob("*.py")} == OURS
        heads = [name for name in auto_map_of(config) if name != "AutoConfig"]
        torch.save((inputs(kind), expected, heads), tmp_path / f"{kind}-expected.pt")
        arguments.append(f"{destination}:{auto_class}")
    finished = run(WITHOUT_THE_PACKAGE, tmp_path, *arguments)
    assert finished.stdout.splitlines()[-1:] == ["equal"], finished.stderr[-2000:]


def test_a_bundle_holds_what_it_should_and_nothing_else(tmp_path):
    source, destination = tmp_path / "source", tmp_path / "bundle"
    expected = saved(
        "llama",
        source,
        _name_or_path=str(source),
        auto_map={"AutoConfig": "other/repo--configuration_old.OldConfig"},
    )
    GenerationConfig(max_new_tokens=7, eos_token_id=2).save_pretrained(source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "name_or_path": str(source)}))
    (source / "LICENSE").write_text("As you like it.")
    (source / "README.md").write_text("# By hand\n")
    for name in ("pytorch_model.bin", "training_args.bin", "modeling_old.py", "train.py", "optimizer.pt"):
        (source / name).write_text("raise SystemExit")
    # As the Hub's cache has them.
    (source / "model.safetensors").rename(tmp_path / "blob")
    (source / "model.safetensors").symlink_to(tmp_path / "blob")
    assert hf_variants_cli.main(["bundle", str(source), str(destination)]) == 0

    names = {path.relative_to(destination).as_posix() for path in destination.rglob("*")}
    assert names == OURS | {
        "LICENSE", "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert not any(path.is_symlink() for path in destination.rglob("*"))
    for path in destination.glob("*.json"):
        assert str(tmp_path) not in path.read_text(), path
    config = json.loads((destination / "config.json").read_text())
    assert config["auto_map"] == auto_map_of(kinds.config("llama"))
    assert config["architectures"] == ["VariantForCausalLM"]
    assert (destination / "README.md").read_text() == "# By hand\n"
    model = AutoModelForCausalLM.from_pretrained(destination)
    with torch.no_grad():
        assert torch.equal(model(**inputs("llama")).logits, expected)
    assert model.generation_config.max_new_tokens == 7
    tokenizer = AutoTokenizer.from_pretrained(destination)
    assert tokenizer.chat_template == kinds.CHAT_TEMPLATE


def test_a_bundle_gets_a_card(tmp_path):
    saved("encoder", tmp_path / "source")
    bundle(tmp_path / "source", tmp_path / "named")
    assert '"named"' in (tmp_path / "named" / "README.md").read_text()
    assert (tmp_path / "named" / "block.svg").is_file()


def test_keeps_the_dtype_and_every_bit(tmp_path):
    source, destination = tmp_path / "source", tmp_path / "bundle"
    kinds.model("gemma2").to(torch.bfloat16).save_pretrained(source, max_shard_size="20KB")
    bundle(source, destination)
    stored = {}
    for path in source.glob("*.safetensors"):
        stored |= load_file(path)
    copied = load_file(destination / "model.safetensors")
    assert stored.keys() == copied.keys()
    assert all(torch.equal(stored[name], copied[name]) for name in stored)
    assert {tensor.dtype for tensor in copied.values()} == {torch.bfloat16}
    assert json.loads((destination / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", TASKS)
def test_every_class_is_bundled_as_itself(name, tmp_path):
    kind = "seq2seq" if TASKS[name][0] == "AutoModelForSeq2SeqLM" or "Seq2Seq" in name else "encoder"
    kind = "llama" if name == "VariantForCausalLM" else kind
    model = kinds.model(kind, getattr(hf_variants, name))
    model.save_pretrained(tmp_path / "source")
    bundle(tmp_path / "source", tmp_path / "bundle")
    loaded = getattr(transformers, TASKS[name][0]).from_pretrained(tmp_path / "bundle")
    assert type(loaded) is type(model)
    states = model.state_dict(), loaded.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][tensor], states[1][tensor]) for tensor in states[0])


def test_tied_copies_are_left_out_if_they_are_equal(tmp_path):
    source = tmp_path / "source"
    saved("encoder", source)
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path)
    bundle(source, tmp_path / "equal")
    assert "lm_head.weight" not in load_file(tmp_path / "equal" / "model.safetensors")
    tensors["lm_head.weight"] += 1
    save_file(tensors, path)
    with pytest.raises(ConversionError, match=r"ties lm_head\.weight to"):
        bundle(source, tmp_path / "different")
    assert not (tmp_path / "different").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda tensors: tensors.update(other=torch.zeros(2)), "other is not the model's"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(2)}), r"shape \[2\] instead of \[32\]"),
    ],
)
def test_refuses_weights_that_are_not_the_configs(tmp_path, change, message):
    source = tmp_path / "source"
    saved("llama", source)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ConversionError, match=message):
        bundle(source, tmp_path / "bundle")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "`architectures` of .* is None.*Write one of VariantForCausalLM"),
        ({"architectures": ["LlamaForCausalLM"]}, "`architectures` of .*LlamaForCausalLM"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "is quantized.*push_to_hub"),
    ],
)
def test_refuses_what_it_cannot_bundle(tmp_path, changes, message):
    saved("llama", tmp_path / "source", **changes)
    with pytest.raises(ConversionError, match=message):
        bundle(tmp_path / "source", tmp_path / "bundle")


def test_refuses_sources_that_are_no_variant(tmp_path, capsys):
    config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "native")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "pickled").mkdir()
    kinds.config("llama", architectures=["VariantForCausalLM"]).save_pretrained(tmp_path / "pickled")
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    for name, message in {
        "native": "`hf-variants convert`", "adapter": "an adapter without its model",
        "pickled": "model.embed_tokens.weight is missing",
        "absent": "not a folder",
    }.items():  # fmt: skip
        assert hf_variants_cli.main(["bundle", str(tmp_path / name), str(tmp_path / "bundle")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_options_of_an_upload_need_one(tmp_path):
    saved("llama", tmp_path / "source")
    with pytest.raises(ValueError, match="`revision` is about an upload"):
        bundle(tmp_path / "source", tmp_path / "bundle", revision="next")


def test_warns_of_keys_that_a_newer_version_may_have_written(tmp_path, caplog):
    for kind in ("llama", "seq2seq"):
        saved(kind, tmp_path / kind)
        bundle(tmp_path / kind, tmp_path / f"{kind}-bundle")
    assert "means nothing" not in caplog.text
    edit_config(tmp_path / "llama", some_later_axis="on")
    bundle(tmp_path / "llama", tmp_path / "later")
    assert "`some_later_axis` of" in caplog.text
    decoder = json.loads((tmp_path / "seq2seq" / "config.json").read_text())["decoder"]
    edit_config(tmp_path / "seq2seq", decoder={**decoder, "another_axis": 1})
    bundle(tmp_path / "seq2seq", tmp_path / "later-seq2seq")
    assert "`decoder.another_axis` of" in caplog.text


@pytest.mark.parametrize(
    ("text", "expected"), [("5GB", 5_000_000_000), ("20kb", 20_000), ("3MiB", 3 * 2**20), ("1kib", 1024)]
)
def test_sizes(text, expected):
    arguments = hf_variants_cli.build_parser().parse_args(["bundle", "a", "b", "--max-shard-size", text])
    assert arguments.max_shard_bytes == expected


@pytest.mark.parametrize("text", ["5", "GB", "0GB", "5PB", "5.5GB"])
def test_refuses_what_is_no_size(text, capsys):
    with pytest.raises(SystemExit):
        hf_variants_cli.build_parser().parse_args(["bundle", "a", "b", "--max-shard-size", text])
    assert "--max-shard-size" in capsys.readouterr().err


def test_a_save_leaves_no_weights_of_an_earlier_one(tmp_path):
    first, second = kinds.model("llama"), kinds.model("llama", seed=5)
    for sizes in (("50GB", "20KB"), ("20KB", "50GB")):
        folder = tmp_path / sizes[0]
        for model, size in zip((first, second), sizes, strict=True):
            model.save_pretrained(folder, max_shard_size=size)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), second.parameters(), strict=True))
        # What converts and bundles reads the folder's index first.
        bundle(folder, tmp_path / f"{sizes[0]}-bundle")


def test_the_code_needs_what_the_package_needs(project):  # noqa: F811
    requirements = [Requirement(text) for text in project["project"]["dependencies"]]
    lower_ends = {
        requirement.name: specifier.version
        for requirement in requirements
        for specifier in requirement.specifier
        if specifier.operator == ">="
    }
    assert {name: lower_ends[name] for name in versions.MINIMUM} == versions.MINIMUM


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ("5.17", False), ("5.17.0", False), ("5.18.0.dev0", False), ("5.17.0rc1", False), ("5.17.0.dev0", False),
        ("5.17.1+cpu", False), ("5.17.0a0+gitabc", False), ("6.0", False), ("10.0", False), ("5.16.9", True),
        ("5.9.0", True), ("5.16.0+cpu", True), ("5.16.0.post1", True), ("4.57.6", True),
    ],
)  # fmt: skip
def test_versions_are_compared_as_pip_does(installed, expected):
    assert versions.too_old(installed, "5.17") is expected


OLD = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        # What a transformers of another time lacks is asked for only after its version.
        if name.partition(".")[0] == "hf_variants" or name in ("huggingface_hub.dataclasses", "transformers.activations"):
            raise ModuleNotFoundError(name)

import torch, transformers
from transformers import AutoConfig

package, version, folders = sys.argv[1], sys.argv[2], sys.argv[3:]
setattr({"torch": torch, "transformers": transformers}[package], "__version__", version)
for name in ("huggingface_hub.dataclasses", "transformers.activations"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Absent())
for folder in folders:
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=True)
    except ImportError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("package", "installed"),
    [("transformers", "5.16.4"), pytest.param("torch", "2.10.0+cu128", marks=pytest.mark.whole)],
)
def test_an_old_version_is_refused_in_words(package, installed, tmp_path):
    folders = []
    for kind in ("llama", "seq2seq"):
        kinds.model(kind).save_pretrained(tmp_path / kind)
        folders.append(str(tmp_path / kind))
    finished = run(OLD, tmp_path, package, installed, *folders)
    minimum = versions.MINIMUM[package]
    expected = (
        f"This model needs {package} {minimum} or newer, and {installed} is installed. "
        f"Run `pip install --upgrade '{package}>={minimum}'` and start again."
    )
    assert finished.stdout.splitlines() == [expected, expected], finished.stderr[-2000:]


def test_the_version_is_asked_for_first():
    folder = Path(versions.__file__).parent
    for name in ("configuration_variant", "configuration_variant_seq2seq"):
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        imports = re.findall(r"^(?:from|import) (\S+)", text, flags=re.MULTILINE)
        assert imports[0] == ".versions"
