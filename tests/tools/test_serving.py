"""`transformers serve`, asked by an OpenAI client: the answers are those of `generate`."""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from . import kinds


pytestmark = pytest.mark.whole

WRITERS = (*kinds.DECODERS, "seq2seq")
MESSAGES = [{"role": "user", "content": "who sees the dog ?"}]
NEW = 12
# Random weights like to repeat themselves, which would hide a token too many.
GREEDY = {"min_new_tokens": NEW, "do_sample": False, "no_repeat_ngram_size": 1}
# A client says how many; without it the server takes a thousand.
ASKED = {"temperature": 0, "max_tokens": NEW}


TRANSFORMERS = "from transformers.cli.transformers import main; main()"


@contextmanager
def server(folder: Path, *command: str):
    """Its address, once it answers; what it wrote is in `folder/log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # It lists what lies in the cache, which has to be there.
    (folder / "cache").mkdir(parents=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "cache")}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            stdout=log, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            with socket.socket() as asked:
                if asked.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        if process.poll() is not None:
            raise RuntimeError((folder / "log").read_text(encoding="utf-8"))
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def save(kind: str, folder: Path, **fields):
    model = kinds.model(kind, **fields)
    model.generation_config = GenerationConfig(**GREEDY, **kinds.SPECIAL, decoder_start_token_id=1)
    model.save_pretrained(folder)
    kinds.tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    # One for all kinds: it loads what it is asked for.
    with server(tmp_path_factory.mktemp("server"), "-c", f"import hf_variants; {TRANSFORMERS}", "serve") as address:
        yield openai_client(address)


def openai_client(address: str):
    from openai import OpenAI

    return OpenAI(base_url=address, api_key="none", max_retries=0)


def prompt_ids() -> torch.Tensor:
    text = kinds.tokenizer().apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    return kinds.tokenizer()(text, return_tensors="pt")["input_ids"]


def own_words(model, prompt: str | None = None) -> list[str]:
    """What `generate` writes for the same messages, or the same text."""
    tokenizer = kinds.tokenizer()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"] if prompt else prompt_ids()
    with torch.no_grad():
        written = model.generate(ids, max_new_tokens=NEW)[0]
    words = tokenizer.decode(
        written[0 if model.config.is_encoder_decoder else ids.shape[1] :], skip_special_tokens=True
    )
    assert len(set(words.split())) > 8
    return words.split()


def streamed(client, model: str) -> list[str]:
    chunks = client.chat.completions.create(model=model, messages=MESSAGES, stream=True, **ASKED)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks).split()


@pytest.mark.tool("transformers serve, OpenAI client", package="transformers")
@pytest.mark.parametrize("kind", kinds.DECODERS)
def test_chat(kind, client, tmp_path):
    folder, model = str(tmp_path / kind), save(kind, tmp_path / kind)
    expected = own_words(model)
    answer = client.chat.completions.create(model=folder, messages=MESSAGES, **ASKED)
    assert answer.choices[0].message.content.split() == expected
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt_ids().shape[1], NEW)
    prompt = "the old dog"
    completed = client.completions.create(model=folder, prompt=prompt, **ASKED)
    assert completed.choices[0].text.split() == own_words(model, prompt)


@pytest.mark.tool("transformers serve, OpenAI client: streaming", package="transformers")
@pytest.mark.parametrize("kind", WRITERS)
def test_streaming(kind, client, tmp_path):
    model = save(kind, tmp_path / kind)
    assert streamed(client, str(tmp_path / kind)) == own_words(model)


def test_the_command_serves_one_model(tmp_path):
    model = save("llama", tmp_path / "model")
    with server(tmp_path / "server", "-m", "hf_variants_cli", "serve", str(tmp_path / "model")) as address:
        assert streamed(openai_client(address), str(tmp_path / "model")) == own_words(model)


def test_an_answer_of_an_encoder_decoder_that_is_not_streamed_is_cut(client, tmp_path):
    """As of stock ones: transformers takes the prompt off what has no prompt in it. The doctor says so."""
    model = save("seq2seq", tmp_path)
    answer = client.chat.completions.create(model=str(tmp_path), messages=MESSAGES, **ASKED)
    # The first token of what is cut is the one that starts every answer.
    expected, cut = own_words(model), prompt_ids().shape[1] - 1
    assert 0 < cut < NEW
    assert answer.choices[0].message.content.split() == expected[cut:]


def test_custom_code_is_not_served(tmp_path):
    """transformers looks for the class in itself alone, whatever `auto_map` and --trust-remote-code say."""
    save("llama", tmp_path / "model")
    with (
        pytest.raises(RuntimeError, match="has no attribute VariantForCausalLM"),
        server(tmp_path / "server", "-c", TRANSFORMERS, "serve", str(tmp_path / "model"), "--trust-remote-code"),
    ):
        pass
