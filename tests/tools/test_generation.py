"""transformers' own ways to generate and its pipelines, which look classes up by name."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, pipeline

from hf_variants import VariantForSequenceClassification, VariantForTokenClassification

from . import kinds


WRITERS = (*kinds.DECODERS, "seq2seq")
STRATEGIES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3},
}


@pytest.mark.tool("generate: greedy, beams, sampling, static cache", package="transformers")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", WRITERS)
def test_generate_is_the_same_with_any_cache(kind, strategy):
    model, ids = kinds.model(kind), kinds.batch(kind)["input_ids"]
    ids = torch.cat([ids[:1], torch.cat([torch.zeros(1, 4, dtype=torch.long), ids[1:, 4:]], 1)])
    inputs = {"input_ids": ids, "attention_mask": ids.ne(0).long(), "max_new_tokens": 9, "min_new_tokens": 9}

    def tokens(**options):
        torch.manual_seed(0)
        # Random weights like to repeat themselves, and then a stale cache would go unnoticed.
        return model.generate(**inputs, **STRATEGIES[strategy], no_repeat_ngram_size=1, **options)

    expected = tokens(use_cache=False)
    assert expected.unique().numel() > 4
    assert torch.equal(tokens(), expected)
    assert torch.equal(tokens(cache_implementation="static"), expected)


@pytest.mark.tool("generate: assisted by a smaller model", package="transformers")
@pytest.mark.parametrize("kind", WRITERS)
def test_assisted_generation(kind):
    model, assistant = kinds.model(kind), kinds.model(kind, seed=5, num_hidden_layers=1)
    ids = kinds.batch(kind, rows=1)["input_ids"]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=assistant), expected)


BATCHING = pytest.mark.tool("generate: continuous batching", package="transformers")


def batched(model, prompts):
    # A small cache: the default one takes the machine's free memory.
    outputs = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64),
    )
    return [output.generated_tokens for output in outputs.values()]


@BATCHING
@pytest.mark.parametrize("kind", ["llama", "gpt-neox"])
def test_continuous_batching(kind):
    model, ids = kinds.model(kind), kinds.batch(kind)["input_ids"]
    prompts = [ids[0], ids[1, :5]]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    expected = [model.generate(prompt[None], **options)[0, len(prompt) :].tolist() for prompt in prompts]
    assert batched(model, [prompt.tolist() for prompt in prompts]) == expected


@pytest.mark.tool("generate: continuous batching", package="transformers", refused=True)
@pytest.mark.parametrize("kind", ["gemma2"])
def test_continuous_batching_is_refused_where_paged_attention_ignores_a_soft_cap(kind):
    with pytest.raises(ValueError, match="`attn_logit_softcapping`"):
        batched(kinds.model(kind), [[3, 4, 5]])


@pytest.mark.tool("pipeline", package="transformers")
@pytest.mark.parametrize("kind", kinds.DECODERS)
def test_text_generation_pipeline(kind, caplog):
    model, tokenizer = kinds.model(kind), kinds.tokenizer()
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    ids = tokenizer("the cat sees", return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=5, do_sample=False)[0], skip_special_tokens=True)
    (out,) = writer("the cat sees", max_new_tokens=5, do_sample=False)
    assert out["generated_text"].replace(" ", "") == expected.replace(" ", "")
    assert "is not supported" not in caplog.text


@pytest.mark.tool("pipeline", package="transformers")
@pytest.mark.parametrize("kind", ["encoder"])
def test_pipelines_of_an_encoder(kind, caplog):
    tokenizer = kinds.tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    fill = pipeline("fill-mask", model=kinds.model(kind), tokenizer=tokenizer, top_k=3)
    ids = tokenizer("the <mask> sees", return_tensors="pt")["input_ids"]
    expected = kinds.model(kind)(ids).logits[0, 1].topk(3).indices.tolist()
    assert [out["token"] for out in fill("the <mask> sees")] == expected

    classify = pipeline(
        "text-classification", model=kinds.model(kind, VariantForSequenceClassification), tokenizer=tokenizer
    )
    assert classify("the cat")[0]["label"] in ("LABEL_0", "LABEL_1")
    tag = pipeline("token-classification", model=kinds.model(kind, VariantForTokenClassification), tokenizer=tokenizer)
    assert len(tag("the cat sees")) == 3
    extract = pipeline("feature-extraction", model=kinds.model(kind).model, tokenizer=tokenizer)
    assert torch.tensor(extract("the cat")).shape == (1, 2, 32)
    assert "is not supported" not in caplog.text
