"""transformers' own ways to generate and its pipelines, which look classes up by name."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, pipeline

from hf_variants import (
    VariantForSequenceClassification,
    VariantForTokenClassification,
    VariantModel,
    VariantSeq2SeqForSequenceClassification,
    VariantSeq2SeqForTokenClassification,
)

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


@pytest.mark.tool("pipeline: text-generation", package="transformers")
@pytest.mark.parametrize("kind", kinds.DECODERS)
def test_text_generation_pipeline(kind, caplog):
    model, tokenizer = kinds.model(kind), kinds.tokenizer()
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    ids = tokenizer("the cat sees", return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=5, do_sample=False)[0], skip_special_tokens=True)
    (out,) = writer("the cat sees", max_new_tokens=5, do_sample=False)
    assert out["generated_text"].replace(" ", "") == expected.replace(" ", "")
    assert "is not supported" not in caplog.text


@pytest.mark.tool("pipeline: fill-mask", package="transformers")
@pytest.mark.parametrize("kind", ["encoder"])
def test_fill_mask_pipeline(kind, caplog):
    tokenizer = kinds.tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    fill = pipeline("fill-mask", model=kinds.model(kind), tokenizer=tokenizer, top_k=3)
    ids = tokenizer("the <mask> sees", return_tensors="pt")["input_ids"]
    expected = kinds.model(kind)(ids).logits[0, 1].topk(3).indices.tolist()
    assert [out["token"] for out in fill("the <mask> sees")] == expected
    assert "is not supported" not in caplog.text


# A row ends a sequence once, by which an encoder-decoder's classifier goes.
TEXT = "the cat sees a dog <eos>"
CLASSIFIERS = {
    **dict.fromkeys(kinds.KINDS, (VariantForSequenceClassification, {})),
    # As BART's. By `last`, as T5Gemma's, a row without padding is read one token earlier than one with.
    "seq2seq": (VariantSeq2SeqForSequenceClassification, {"classifier_pooling": "end_of_sequence"}),
}
TAGGERS = {"seq2seq": VariantSeq2SeqForTokenClassification}


def reader(task, kind, model_class, fields=()):
    """A pipeline and its model."""
    tokenizer = kinds.tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    model = kinds.model(kind, model_class, **dict(fields))
    return pipeline(task, model=model, tokenizer=tokenizer), model


def ids_of(*texts):
    return kinds.tokenizer()(*texts, return_tensors="pt")["input_ids"]


@pytest.mark.tool("pipeline: text-classification", package="transformers")
@pytest.mark.parametrize("kind", kinds.KINDS)
@torch.no_grad()
def test_text_classification_pipeline(kind, caplog):
    classify, model = reader("text-classification", kind, *CLASSIFIERS[kind])
    texts = [TEXT, "w20 w21 <eos>", "who likes the old bird and the big dog <eos>"]
    for text, scores in zip(texts, classify(texts, top_k=None, batch_size=3), strict=True):
        expected = model(ids_of(text)).logits[0].softmax(-1)
        # Padded among the others it is what it is alone.
        for score in scores:
            assert score["score"] == pytest.approx(expected[model.config.label2id[score["label"]]].item(), rel=1e-4)
    assert "is not supported" not in caplog.text


@pytest.mark.tool("pipeline: token-classification", package="transformers")
@pytest.mark.parametrize("kind", kinds.KINDS)
@torch.no_grad()
def test_token_classification_pipeline(kind, caplog):
    tag, model = reader("token-classification", kind, TAGGERS.get(kind, VariantForTokenClassification))
    found = tag(TEXT)
    expected, labels = model(ids_of(TEXT)).logits[0].softmax(-1).max(-1)
    assert [model.config.label2id[each["entity"]] for each in found] == labels.tolist()
    assert [float(each["score"]) for each in found] == pytest.approx(expected.tolist(), rel=1e-5)
    assert "is not supported" not in caplog.text


@pytest.mark.tool("pipeline: zero-shot-classification", package="transformers")
@pytest.mark.parametrize("kind", kinds.KINDS)
@torch.no_grad()
def test_zero_shot_classification_pipeline(kind):
    choose, model = reader("zero-shot-classification", kind, *CLASSIFIERS[kind])
    model.config.label2id = {"contradiction": 0, "entailment": 1}
    labels = ["red", "old", "small"]
    out = choose("the cat sees", candidate_labels=labels, hypothesis_template="who likes {} <eos>")
    logits = torch.stack([model(ids_of("the cat sees", f"who likes {label} <eos>")).logits[0, 1] for label in labels])
    expected = dict(zip(labels, logits.softmax(0).tolist(), strict=True))
    assert dict(zip(out["labels"], out["scores"], strict=True)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.tool("pipeline: feature-extraction", package="transformers")
@pytest.mark.parametrize("kind", [*kinds.DECODERS, "encoder"])
@torch.no_grad()
def test_feature_extraction_pipeline(kind):
    extract, model = reader("feature-extraction", kind, VariantModel)
    expected = model(ids_of(TEXT))[0]
    assert torch.equal(extract(TEXT, return_tensors=True), expected)
