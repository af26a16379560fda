"""The Hub, both ways: pushed from one process, loaded in others, with this package and without, from a server here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from hf_variants.model.custom_code import auto_map_of
from tests.hub_server import TOKEN, HubServer
from tests.tools.kinds import DECODERS, KINDS, config


# Three processes run for all tests together, and each imports everything.
pytestmark = pytest.mark.slow

AUTO_CLASSES = {
    **dict.fromkeys(DECODERS, "AutoModelForCausalLM"),
    "seq2seq": "AutoModelForSeq2SeqLM",
    "encoder": "AutoModelForMaskedLM",
}

# What each script begins with. `attempt` keeps what one kind does from hiding what the others do.
SHARED = """
import json, os, sys, traceback
import torch, transformers
from transformers import AutoTokenizer

folder, auto_classes = sys.argv[1], json.loads(sys.argv[2])
outcomes = {}

def logits(model, kind):
    ids = torch.arange(3, 27).view(2, 12)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :9]} if kind == "seq2seq" else {})
    with torch.no_grad():
        return model.eval()(**inputs).logits

def load(kind, name, **options):
    return getattr(transformers, auto_classes[kind]).from_pretrained(name, **options)

def equal(model, kind, which):
    return torch.equal(logits(model, kind), torch.load(f"{folder}/{kind}-{which}.pt"))

def attempt(name, function, *arguments):
    try:
        outcomes[name] = function(*arguments)
    except Exception:
        outcomes[name] = {"error": traceback.format_exc()}

def finish():
    with open(sys.argv[3], "w") as stream:
        json.dump(outcomes, stream)
"""

PUSH = (
    SHARED
    + """
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
import hf_variants, hf_variants_cli
from tests.tools import kinds

def push(kind):
    name = f"someone/{kind}"
    model = kinds.model(kind)
    if model.can_generate():
        model.generation_config.max_new_tokens = 5
    torch.save(logits(model, kind), f"{folder}/{kind}-first.pt")
    first = model.push_to_hub(name, tags=["a-tag"], commit_message="first")
    kinds.tokenizer().push_to_hub(name)
    model.push_to_hub(f"{name}-sharded", max_shard_size="20KB", private=True)
    adapted = get_peft_model(kinds.model(kind), LoraConfig(
        task_type=kinds.TASK_TYPES[kind], target_modules="all-linear", init_lora_weights=False, r=2))
    adapted.peft_config["default"].base_model_name_or_path = name
    adapted.peft_config["default"].revision = first.oid
    torch.save(logits(adapted, kind), f"{folder}/{kind}-adapted.pt")
    adapted.push_to_hub(f"{name}-adapter")
    second = kinds.model(kind, seed=7)
    torch.save(logits(second, kind), f"{folder}/{kind}-second.pt")
    second.push_to_hub(name, commit_message="second")
    return {"first": first.oid}

def push_in_other_ways():
    model = kinds.model("llama")
    # As one file over several, and the other way round.
    for name, sizes in (("fewer", ("20KB", "50GB")), ("more", ("50GB", "20KB"))):
        for size in sizes:
            model.push_to_hub(f"someone/{name}", max_shard_size=size)
    os.makedirs(f"{folder}/saved")
    with open(f"{folder}/saved/notes.txt", "w") as stream:
        stream.write("not for the Hub")
    os.utime(f"{folder}/saved/notes.txt", (1e9, 1e9))
    model.save_pretrained(f"{folder}/saved", push_to_hub=True, repo_id="someone/saved", private=True)
    api = HfApi()
    api.create_repo("someone/by-hand")
    for name, text in (("README.md", BY_HAND), ("other.txt", "kept")):
        api.upload_file(repo_id="someone/by-hand", path_or_fileobj=text.encode(), path_in_repo=name)
    model.push_to_hub("someone/by-hand", tags=["mine", "added"])
    # A generated card in the folder does not replace the one by hand either.
    model.save_pretrained(f"{folder}/saved", push_to_hub=True, repo_id="someone/by-hand", revision="a-branch")
    proposed = kinds.model("llama", seed=5).push_to_hub("someone/by-hand", create_pr=True)
    kinds.tokenizer().push_to_hub("someone/tokenizer-first")
    model.push_to_hub("someone/tokenizer-first")
    command = ["bundle", "someone/llama-sharded", f"{folder}/bundle", "--push", "someone/bundle"]
    status = hf_variants_cli.main([*command, "--private", "--max-shard-size", "30KB"])
    return {"pull_request": proposed.pr_revision, "status": status}

BY_HAND = json.loads(sys.argv[4])
for kind in auto_classes:
    attempt(kind, push, kind)
attempt("other ways", push_in_other_ways)
from transformers import LlamaConfig, LlamaForCausalLM
stock = LlamaForCausalLM(LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)).eval()
torch.save(logits(stock, "llama"), f"{folder}/llama-stock.pt")
attempt("stock", lambda: stock.push_to_hub("someone/stock").oid)
attempt("stock tokenizer", lambda: kinds.tokenizer().push_to_hub("someone/stock").oid)
finish()
"""
)

WITH_THE_PACKAGE = (
    SHARED
    + """
import hf_variants, hf_variants_cli
import peft
from huggingface_hub import ModelCard
from tests.tools import kinds

def receive(kind):
    name, first = f"someone/{kind}", pushed[kind]["first"]
    model = load(kind, name, revision=first)
    card = ModelCard.load(name)
    card.validate()
    tokenizer = AutoTokenizer.from_pretrained(name)
    if kind == "encoder":
        # Without a task, PEFT imports the module that the adapter names, and asks whether it may.
        adapted = peft.AutoPeftModel.from_pretrained(
            f"{name}-adapter", import_allowlist=["hf_variants.model.modeling_variant"])
    else:
        auto_class = auto_classes[kind].replace("AutoModel", "AutoPeftModel")
        adapted = getattr(peft, auto_class).from_pretrained(f"{name}-adapter")
    return {
        "module": type(model).__module__,
        "first": equal(model, kind, "first"),
        "second": equal(load(kind, name), kind, "second"),
        "sharded": equal(load(kind, f"{name}-sharded"), kind, "first"),
        "adapted": equal(adapted, kind, "adapted"),
        "max_new_tokens": model.generation_config.max_new_tokens if model.can_generate() else None,
        "ids": tokenizer("the cat sees a dog").input_ids == kinds.tokenizer()("the cat sees a dog").input_ids,
        "template": tokenizer.chat_template == kinds.CHAT_TEMPLATE,
        "card": card.data.to_dict(),
        "usage": card.text,
    }

def receive_stock():
    import pathlib
    variant = hf_variants.from_native("someone/stock")
    status = hf_variants_cli.main(["convert", "someone/stock", f"{folder}/converted"])
    return {
        "from_native": equal(variant, "llama", "stock"),
        "status": status,
        "convert": equal(load("llama", f"{folder}/converted"), "llama", "stock"),
        "tokenizer": pathlib.Path(f"{folder}/converted/tokenizer.json").is_file(),
    }

pushed = json.loads(sys.argv[4])
for kind in auto_classes:
    attempt(kind, receive, kind)
attempt("stock", receive_stock)
for name in ("fewer", "more", "saved", "by-hand", "tokenizer-first", "bundle"):
    attempt(name, lambda: equal(load("llama", f"someone/{name}"), "llama", "first"))
attempt("private", lambda: load("llama", "someone/llama-sharded", token=False, cache_dir=f"{folder}/new") and "loaded")
finish()
"""
)

TRAIN = (
    SHARED
    + """
import hf_variants
from huggingface_hub import HfApi
from tests.tools import kinds
from transformers import Trainer, TrainingArguments

def train(kind):
    model, batch = kinds.model(kind), kinds.batch(kind)
    rows = [{name: tensor[row] for name, tensor in batch.items()} for row in range(2)]
    arguments = TrainingArguments(
        f"{folder}/{kind}-trainer", hub_model_id=f"someone/{kind}-trained", max_steps=1, learning_rate=0.1, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=kinds.tokenizer())
    trainer.train()
    trainer.push_to_hub()
    trained = logits(model, kind)
    received = load(kind, f"someone/{kind}-trained")
    return {
        "changed": not torch.equal(trained, logits(kinds.model(kind), kind)),
        "equal": torch.equal(trained, logits(received, kind)),
        "files": HfApi().list_repo_files(f"someone/{kind}-trained"),
    }

for kind in auto_classes:
    attempt(kind, train, kind)
finish()
"""
)

WITHOUT_THE_PACKAGE = (
    """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_variants":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
"""
    + SHARED
    + """
def receive(kind):
    name, first = f"someone/{kind}", pushed[kind]["first"]
    model = load(kind, name, revision=first, trust_remote_code=True)
    again = f"{name}-again"
    model.push_to_hub(again, max_shard_size="20KB")
    model.save_pretrained(f"{folder}/{kind}-resaved")
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    return {
        "module": type(model).__module__,
        "first": equal(model, kind, "first"),
        "second": equal(load(kind, name, trust_remote_code=True), kind, "second"),
        "sharded": equal(load(kind, f"{name}-sharded", trust_remote_code=True), kind, "first"),
        "pushed again": equal(load(kind, again, trust_remote_code=True), kind, "first"),
        "saved again": equal(load(kind, f"{folder}/{kind}-resaved", trust_remote_code=True), kind, "first"),
        "max_new_tokens": model.generation_config.max_new_tokens if model.can_generate() else None,
        "ids": len(tokenizer("the cat sees a dog").input_ids),
    }

pushed = json.loads(sys.argv[4])
for kind in auto_classes:
    attempt(kind, receive, kind)
attempt("no trust", lambda: load("llama", "someone/llama", trust_remote_code=False) and "loaded")
finish()
"""
)

# The quick part of the tests has a kind of each shape.
QUICK = ("llama", "seq2seq", "encoder")
EVERY_KIND = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.whole) for kind in KINDS]

CARD_BY_HAND = "---\nlicense: mit  # as agreed\ntags: [mine]\n---\n# By hand\n\nWords that nobody may lose.\n"


def run_script(script: str, folder: Path, endpoint: str, auto_classes: dict[str, str], value) -> dict:
    """Run a script in a fresh process that knows the server as the Hub, and return its outcomes."""
    outcome = folder / "outcome.json"
    outcome.unlink(missing_ok=True)
    home = folder / f"home-{len(list(folder.glob('home-*')))}"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))},
        "HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]), "NO_PROXY": "127.0.0.1,localhost",
    }  # fmt: skip
    arguments = [str(folder), json.dumps(auto_classes), str(outcome), json.dumps(value)]
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=folder, check=False,
    )  # fmt: skip
    if not outcome.is_file():
        raise AssertionError(f"the script ended with {finished.returncode}: {finished.stderr[-4000:]}")
    return json.loads(outcome.read_text())


def contents(server: HubServer) -> dict:
    """Repository -> ref -> path -> text, or the size of what is no text."""
    return {
        name: {
            ref: {
                path: len(content) if path.endswith(".safetensors") else content.decode()
                for path, content in repository.files(ref).items()
            }
            for ref in [*repository.refs, *repository.commits]
        }
        for name, repository in server.repositories.items()
    }


def run_everything(folder: Path, kinds: list[str]) -> dict:
    auto_classes = {kind: AUTO_CLASSES[kind] for kind in kinds}
    with HubServer() as server:
        pushed = run_script(PUSH, folder, server.url, auto_classes, CARD_BY_HAND)
        return {
            "pushed": pushed,
            "with": run_script(WITH_THE_PACKAGE, folder, server.url, auto_classes, pushed),
            "without": run_script(WITHOUT_THE_PACKAGE, folder, server.url, auto_classes, pushed),
            "hub": contents(server),
        }


def once(tmp_path_factory, name: str, run) -> dict:
    """What a function of a new folder returns, as JSON: called by one worker, for all of them."""
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    shared = tmp_path_factory.getbasetemp().parent if parallel else tmp_path_factory.mktemp("shared")
    result = shared / f"{name}.json"
    with FileLock(f"{result}.lock"):
        if not result.is_file():
            result.write_text(json.dumps(run(tmp_path_factory.mktemp(name))))
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def exchange(tmp_path_factory, request):
    """What three processes and a server did with the kinds that are tested."""
    kinds = {item.callspec.params.get("kind") for item in request.session.items if hasattr(item, "callspec")}
    kinds = [kind for kind in KINDS if kind in kinds | {"llama"}]
    return once(tmp_path_factory, "exchange", lambda folder: run_everything(folder, kinds))


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """What Trainer pushed of each kind."""

    def run(folder: Path) -> dict:
        with HubServer() as server:
            return run_script(TRAIN, folder, server.url, AUTO_CLASSES, None)

    return once(tmp_path_factory, "training", run)


def outcome(exchange: dict, side: str, name: str):
    found = exchange[side][name]
    if isinstance(found, dict) and "error" in found:
        pytest.fail(found["error"])
    return found


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.tool("Hub: push and load", package="huggingface_hub")
def test_load_with_the_package(exchange, kind):
    outcome(exchange, "pushed", kind)
    seen = outcome(exchange, "with", kind)
    assert seen["module"].startswith("hf_variants.model.")
    assert seen["first"]
    assert seen["second"]
    assert seen["sharded"]
    assert seen["ids"]
    assert seen["template"]
    assert seen["max_new_tokens"] == (None if kind == "encoder" else 5)


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.tool("Hub: load without the package, push again", package="huggingface_hub")
def test_load_without_the_package(exchange, kind):
    seen = outcome(exchange, "without", kind)
    assert seen["module"].startswith("transformers_modules.")
    assert seen["first"]
    assert seen["second"]
    assert seen["sharded"]
    assert seen["pushed again"]
    assert seen["saved again"]
    assert seen["ids"] == 5
    assert seen["max_new_tokens"] == (None if kind == "encoder" else 5)


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.tool("Hub: adapters", package="peft")
def test_adapter(exchange, kind):
    assert outcome(exchange, "with", kind)["adapted"]
    files = exchange["hub"][f"someone/{kind}-adapter"]["main"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == f"someone/{kind}"
    assert "model.safetensors" not in files


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_push_is_complete(exchange, kind):
    hub = exchange["hub"]
    for name in (f"someone/{kind}", f"someone/{kind}-sharded", f"someone/{kind}-again"):
        files = hub[name]["main"]
        saved = json.loads(files["config.json"])
        assert saved["auto_map"] == auto_map_of(config(kind))
        assert {f"{target.split('.')[0]}.py" for target in saved["auto_map"].values()} < files.keys()
        needed = {name for text in files.values() if isinstance(text, str) for name in imported(text)}
        assert {f"{name}.py" for name in needed} < files.keys()
    assert sum(path.endswith(".safetensors") for path in hub[f"someone/{kind}-sharded"]["main"]) > 1
    assert sum(path.endswith(".safetensors") for path in hub[f"someone/{kind}-again"]["main"]) > 1


def imported(text: str) -> list[str]:
    return re.findall(r"^from \.(\w+) import", text, flags=re.MULTILINE)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_the_card_on_the_hub_is_ours(exchange, kind):
    seen = outcome(exchange, "with", kind)
    assert seen["card"]["library_name"] == "transformers"
    assert {"hf-variants", "a-tag"} <= set(seen["card"]["tags"])
    assert f'"someone/{kind}"' in seen["usage"]
    assert "block.svg" in exchange["hub"][f"someone/{kind}"]["main"]


def test_card_by_hand_is_left_alone(exchange):
    refs = exchange["hub"]["someone/by-hand"]
    outcome(exchange, "pushed", "other ways")
    for ref in ("main", "a-branch"):
        _, metadata, text = refs[ref]["README.md"].split("---\n")
        assert text == "# By hand\n\nWords that nobody may lose.\n"
        metadata = yaml.safe_load(metadata)
        assert metadata["license"] == "mit"
        assert {"mine", "added"} <= set(metadata["tags"])
        assert refs[ref]["other.txt"] == "kept"
    assert "modeling_variant.py" in refs["a-branch"]


def test_placeholder_card_is_replaced(exchange):
    assert outcome(exchange, "with", "tokenizer-first")
    text = exchange["hub"]["someone/tokenizer-first"]["main"]["README.md"]
    assert '"someone/tokenizer-first"' in text
    assert "More Information Needed" not in text


def test_pull_request_leaves_main_alone(exchange):
    revision = outcome(exchange, "pushed", "other ways")["pull_request"]
    refs = exchange["hub"]["someone/by-hand"]
    assert revision == "refs/pr/1"
    assert "model.safetensors" in refs[revision]


@pytest.mark.parametrize("name", ["fewer", "more"])
def test_replaced_weights_are_deleted(exchange, name):
    assert outcome(exchange, "with", name)
    files = exchange["hub"][f"someone/{name}"]["main"]
    weights = {path for path in files if path.endswith(".safetensors")}
    if name == "fewer":
        assert weights == {"model.safetensors"}
        assert "model.safetensors.index.json" not in files
    else:
        assert weights == set(json.loads(files["model.safetensors.index.json"])["weight_map"].values())


def test_save_pretrained_uploads_what_it_writes(exchange):
    assert outcome(exchange, "with", "saved")
    files = exchange["hub"]["someone/saved"]["main"]
    assert {"config.json", "model.safetensors", "modeling_variant.py", "README.md"} <= files.keys()
    assert "notes.txt" not in files
    assert '"someone/saved"' in files["README.md"]


def test_bundle_is_pushed(exchange):
    assert outcome(exchange, "pushed", "other ways")["status"] == 0
    assert outcome(exchange, "with", "bundle")
    files = exchange["hub"]["someone/bundle"]["main"]
    assert json.loads(files["config.json"])["auto_map"] == auto_map_of(config("llama"))
    assert sum(path.endswith(".safetensors") for path in files) > 1
    assert '"someone/bundle"' in files["README.md"]


def test_private_and_untrusted_repositories_are_refused(exchange):
    assert "someone/llama-sharded" in exchange["with"]["private"]["error"]
    assert "trust_remote_code=True" in exchange["without"]["no trust"]["error"]


@pytest.mark.whole
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.tool("Hub: Trainer.push_to_hub", package="transformers")
def test_trainer_pushes_the_code_too(training, kind):
    seen = outcome({"training": training}, "training", kind)
    assert seen["changed"]
    assert seen["equal"]
    module = auto_map_of(config(kind))["AutoModel"].split(".")[0]
    assert {f"{module}.py", "versions.py", "config.json", "tokenizer.json", "README.md"} <= set(seen["files"])


@pytest.mark.parametrize("kind", ["llama"])
@pytest.mark.tool("Hub: convert from an id", package="huggingface_hub")
def test_convert_from_the_hub(exchange, kind):
    outcome(exchange, "pushed", "stock")
    assert outcome(exchange, "with", "stock") == {
        "from_native": True, "status": 0, "convert": True, "tokenizer": True,
    }  # fmt: skip
