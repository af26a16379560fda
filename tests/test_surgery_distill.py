"""Recovery: a changed model comes nearer to its source, goes on where it was stopped, and says how it went."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_variants import VariantForCausalLM
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
