"""`hf-variants generate` and `chat`: the text that `generate` gives, streamed, from every kind of checkpoint folder."""

import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import hf_variants_cli
from hf_variants import quantize_int8
from hf_variants.text_generation import Generator, chat, generate, generation_options, open_checkpoint
from tests.tools import kinds


PROMPT = "the cat sees"
GREEDY = {"max_new_tokens": 7}


def save(model, folder):
    model.save_pretrained(folder)
    kinds.tokenizer().save_pretrained(folder)
    return str(folder)


def expected(model, text=PROMPT, **options):
    tokenizer = kinds.tokenizer()
    inputs = tokenizer(text, return_tensors="pt")
    options = {"max_new_tokens": 7, "do_sample": False, **options}
    tokens = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)[0]
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return tokenizer.decode(tokens[start:], skip_special_tokens=True)


@pytest.mark.parametrize("kind", [*kinds.DECODERS, "seq2seq"])
def test_generate_writes_what_the_model_generates(kind, tmp_path):
    model = kinds.model(kind)
    source = save(model, tmp_path)
    for options in ({}, {"num_beams": 3}):
        out = io.StringIO()
        (text,) = generate(source, [PROMPT], {**GREEDY, **options}, out=out)
        assert text.split() == expected(model, **options).split()
        assert out.getvalue() == text + "\n"


def test_native_checkpoints_and_adapters(tmp_path):
    torch.manual_seed(0)
    sizes = {name: kinds.SIZES[name] for name in kinds.SIZES if name != "num_key_value_heads"}
    native = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    source = save(native, tmp_path / "native")
    (text,) = generate(source, [PROMPT], GREEDY, out=io.StringIO())
    assert text.split() == expected(native).split()

    variant = save(kinds.model("llama"), tmp_path / "variant")
    base = open_checkpoint(variant).model
    tuned = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    # The tokenizer is the base's, which the adapter names.
    (text,) = generate(str(tmp_path / "adapter"), [PROMPT], GREEDY, out=io.StringIO())
    assert text.split() == expected(tuned.eval()).split()
    assert text.split() != expected(kinds.model("llama")).split()


@pytest.mark.parametrize("kind", ["llama", "seq2seq"])
def test_fast_and_in_8_bits(kind, tmp_path, capsys):
    model = kinds.model(kind)
    source = save(model.bfloat16(), tmp_path)
    model.float()
    fast = open_checkpoint(source, fast=True)
    assert fast.model.dtype == torch.float32
    (text,) = generate(source, [PROMPT], GREEDY, fast=True, out=io.StringIO())
    assert text.split() == expected(model).split()
    assert "forward" in fast.model.__dict__
    both = open_checkpoint(source, fast=True, quantize="int8")
    text = both.stream(PROMPT, generation_options(both.model, {**GREEDY, "do_sample": False}), io.StringIO())
    assert both.model.forward.steps > 0
    assert text.split() == expected(quantize_int8(model)).split()
    for option in (["--fast"], ["--quantize", "int8"]):
        assert hf_variants_cli.main(["generate", source, PROMPT, "--dtype", "bfloat16", *option]) == 2
        assert "float32" in capsys.readouterr().err


def test_sampling_follows_its_seed(tmp_path):
    source = save(kinds.model("llama"), tmp_path)
    options = {"max_new_tokens": 12, "temperature": 5.0}

    def texts(seed):
        return generate(source, [PROMPT, PROMPT], options, seed=seed, out=io.StringIO())

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    assert len(set(texts(1))) == 2


def test_options():
    model = kinds.model("llama")
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    assert generation_options(model, {}).do_sample
    greedy = generation_options(model, {"temperature": 0})
    assert not greedy.do_sample
    assert greedy.temperature is None
    assert generation_options(model, {"do_sample": False, "top_k": None}).do_sample is False
    assert generation_options(kinds.model("llama"), {"top_p": 0.5}).do_sample
    assert generation_options(model, {}).max_new_tokens == 256
    assert generation_options(model, {"max_length": 40}).max_new_tokens is None
    model.generation_config.max_length = 20
    assert generation_options(model, {}).max_new_tokens == 256
    model.generation_config.max_length = 100
    assert generation_options(model, {}).max_new_tokens is None
    assert generation_options(model, {}).max_length == 100
    assert generation_options(model, {"max_new_tokens": 5}).max_length is None
    model.generation_config.max_length = None
    model.generation_config.max_new_tokens = 9
    assert generation_options(model, {}).max_new_tokens == 9
    with pytest.raises(ValueError, match=r"`temprature` is not a generation option; did you mean `temperature`"):
        generation_options(model, {"temprature": 1.0})
    with pytest.raises(ValueError, match="max_new_tokens"):
        generation_options(model, {"max_new_tokens": -1})


def test_chat_keeps_the_conversation_and_clears_it(tmp_path, monkeypatch):
    source = save(kinds.model("llama"), tmp_path)
    seen = []
    stream = Generator.stream

    def recorded(self, text, *args, **kwargs):
        seen.append(text)
        return stream(self, text, *args, **kwargs)

    monkeypatch.setattr(Generator, "stream", recorded)
    lines = iter(["the cat", "", "the dog", "/clear", "who sees", "/exit", "never read"])
    messages = chat(source, GREEDY, system="yes", read=lambda prompt: next(lines), out=io.StringIO())
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[1]["content"] == "who sees"
    assert next(lines) == "never read"
    assert seen[0] == "system : yes <eos> user : the cat <eos> assistant : "
    assert "user : the cat <eos> assistant : " in seen[1]
    assert seen[1].endswith("user : the dog <eos> assistant : ")
    assert seen[2] == "system : yes <eos> user : who sees <eos> assistant : "

    def ended(prompt):
        raise EOFError

    assert chat(source, GREEDY, read=ended, out=io.StringIO()) == []


def test_an_interrupted_answer_keeps_what_was_written(tmp_path):
    generator = open_checkpoint(save(kinds.model("llama"), tmp_path))
    whole = generator.stream(PROMPT, generation_options(generator.model, GREEDY), io.StringIO())
    calls = []

    def interrupt(*_):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt

    generator.model.register_forward_pre_hook(interrupt)
    part = generator.stream(PROMPT, generation_options(generator.model, GREEDY), io.StringIO())
    assert part.split()
    assert whole.startswith(part.strip())
    assert len(part) < len(whole)


def test_what_cannot_write_text_is_refused(tmp_path, capsys):
    encoder = save(kinds.model("encoder"), tmp_path / "encoder")
    with pytest.raises(ValueError, match="does not write text"):
        open_checkpoint(encoder)
    kinds.model("llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(OSError, match="--tokenizer"):
        open_checkpoint(str(tmp_path / "bare"))
    assert open_checkpoint(str(tmp_path / "bare"), tokenizer=encoder).tokenizer is not None
    without_template = kinds.tokenizer()
    without_template.chat_template = None
    without_template.save_pretrained(tmp_path / "bare")
    assert hf_variants_cli.main(["chat", str(tmp_path / "bare")]) == 2
    assert "hf-variants generate" in capsys.readouterr().err
    assert hf_variants_cli.main(["generate", str(tmp_path / "nowhere"), "hi"]) == 2
    assert "is not a checkpoint" in capsys.readouterr().err


def test_command_line(tmp_path, capsys, monkeypatch):
    model = kinds.model("llama")
    source = save(model, tmp_path)
    command = ["generate", source, "--max-new-tokens", "7", "--set", "suppress_tokens=[5, 6]"]
    assert hf_variants_cli.main([*command, PROMPT]) == 0
    assert capsys.readouterr().out.split() == expected(model, suppress_tokens=[5, 6]).split()
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    assert hf_variants_cli.main([*command, "-"]) == 0
    assert capsys.readouterr().out.split() == expected(model, suppress_tokens=[5, 6]).split()
    with pytest.raises(SystemExit):
        hf_variants_cli.main([*command, PROMPT, "--set", "nothing"])
