"""Recovery: a changed model comes nearer to its source, goes on where it was stopped, and says how it went."""

import json

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from hf_variants import VariantForCausalLM, VariantForConditionalGeneration
from hf_variants.surgery import Distillation, DropHead, DropLayers, KeepTokens, SurgeryError, ToClassifier, edit
from hf_variants.surgery.distill import CURVE
from hf_variants.surgery.towards import Towards
from hf_variants_cli import main
from tests.parity import hostile_
from tests.test_surgery_vocabulary import TEXT, trained


LONG = TEXT * 12
RUN = Distillation(LONG, steps=10, learning_rate=3e-3, batch_size=2, window=16)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill") / "native"
    tokenizer = trained("byte bpe")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=3,
        dtype="bfloat16",
    )  # fmt: skip
    hostile_(LlamaForCausalLM(config)).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_result_comes_nearer_to_its_source(source, tmp_path):
    (tmp_path / "text").write_text(LONG, encoding="utf-8")
    text = str(tmp_path / "text")
    command = ["edit", str(source), str(tmp_path / "ours"), "--drop-layers", "1", "--text", text, "--distill", text]
    options = ["--distill-steps", "40", "--distill-rate", "3e-3", "--distill-window", "16"]
    assert main([*command, *options, "--json", str(tmp_path / "report.json"), "--native"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    recovery = report["recovery"]
    assert recovery["loss"] == "KL"
    assert recovery["after"] < 0.8 * recovery["before"]
    assert report["text"]["kl"] < report["text_unrecovered"]["kl"]
    assert report["exactness"] == "approximate"
    curve = json.loads((tmp_path / "ours" / CURVE).read_text())["curve"]
    assert [curve[0]["step"], curve[-1]["step"]] == [1, 40]
    assert "trained towards the source for 40 steps" in (tmp_path / "ours" / "README.md").read_text()
    assert not (tmp_path / "ours-distilling").exists()
    made = VariantForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    assert made.config.use_cache


def test_a_stopped_run_goes_on(source, tmp_path, monkeypatch):
    edit(source, tmp_path / "whole", [DropLayers("1")], recover=RUN)
    steps = []
    compute = Towards.compute_loss

    def stopped(self, *arguments, **others):
        steps.append(self.state.global_step)
        if len(steps) == 7:
            raise KeyboardInterrupt
        return compute(self, *arguments, **others)

    monkeypatch.setattr(Towards, "compute_loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        edit(source, tmp_path / "parts", [DropLayers("1")], recover=RUN)
    assert not (tmp_path / "parts").exists()
    with pytest.raises(SurgeryError, match="another training"):
        edit(source, tmp_path / "parts", [DropLayers("2")], recover=RUN)
    edit(source, tmp_path / "parts", [DropLayers("1")], recover=RUN)
    # It began again behind the last step that was kept.
    assert steps[7] == 6
    whole, parts = (VariantForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_kept_tokens_are_compared_with_the_sources_and_bodies_by_their_states(source, tmp_path):
    tokens = trained("byte bpe").tokenize(LONG)
    report = edit(source, tmp_path / "trimmed", [KeepTokens(sorted(set(tokens)))], recover=RUN)
    # The same function, of which nothing is to be learned but the rounding of bfloat16.
    assert report.recovery.before < 1e-6
    edit(source, tmp_path / "body", [DropHead()])
    report = edit(tmp_path / "body", tmp_path / "shorter", [DropLayers("1")], recover=RUN)
    assert report.recovery.loss == "hidden states"
    assert report.recovery.after < report.recovery.before


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill") / "seq2seq"
    tokenizer = trained("byte bpe")
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    hostile_(BartForConditionalGeneration(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("trimmed", [True, False])
def test_encoder_decoders_learn_from_pairs_and_from_what_the_source_says(seq2seq, tmp_path, told, trimmed):
    tokenizer = trained("byte bpe")
    words = TEXT.split()
    lines = [" ".join(words[start : start + 5]) for start in range(len(words) - 5)]
    text = "\n".join(f"{line}\t{line[::-1]}" if told else line for line in lines)
    run = Distillation(text, steps=30, learning_rate=3e-3, batch_size=4, window=12)
    operations = [DropLayers("1", "decoder")]
    if trimmed:
        # All but a token that nothing of this uses; the others have other numbers.
        operations.append(
            KeepTokens(sorted(set(tokenizer.get_vocab()) - {tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)}))
        )
    report = edit(seq2seq, tmp_path / "ours", operations, recover=run)
    assert report.recovery.loss == "KL"
    assert report.recovery.after < 0.9 * report.recovery.before
    assert not (tmp_path / "ours-distilling").exists()


def test_the_source_is_asked_once(seq2seq, tmp_path, monkeypatch):
    run = Distillation("\n".join(TEXT.split("\n")[:1] * 6), steps=4, batch_size=1, window=8)
    asked, steps = [], []
    generate, compute = VariantForConditionalGeneration.generate, Towards.compute_loss
    monkeypatch.setattr(
        VariantForConditionalGeneration, "generate", lambda self, *a, **o: asked.append(1) or generate(self, *a, **o)
    )

    def stopped(self, *arguments, **others):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return compute(self, *arguments, **others)

    monkeypatch.setattr(Towards, "compute_loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        edit(seq2seq, tmp_path / "ours", [DropLayers("1", "decoder")], recover=run)
    count = len(asked)
    assert count == 6
    edit(seq2seq, tmp_path / "ours", [DropLayers("1", "decoder")], recover=run)
    assert len(asked) == count


def test_lines_of_which_some_have_a_tab_are_refused(seq2seq, tmp_path):
    for text, words in (("a\tb\nc", "Line 2"), ("a", "at least two")):
        with pytest.raises(SurgeryError, match=words):
            edit(seq2seq, tmp_path / "new", [DropLayers("1", "decoder")], recover=Distillation(text, steps=1))


def test_refusals(source, tmp_path):
    for operations, run, words in (
        ([ToClassifier(2)], RUN, "cannot be trained towards"),
        ([DropLayers("1")], Distillation(TEXT, window=4000, steps=1), "two windows"),
        ([DropLayers("1")], Distillation(LONG, steps=0), "--distill-steps"),
    ):
        with pytest.raises(SurgeryError, match=words):
            edit(source, tmp_path / "new", operations, recover=run)
        assert not (tmp_path / "new").exists()
        assert not (tmp_path / "new-distilling").exists()
