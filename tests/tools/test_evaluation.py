"""Tools that load a folder by themselves: the lm-evaluation-harness, and sentence-transformers for an encoder."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard

import hf_variants_cli
from hf_variants import VariantForSequenceClassification

from . import kinds


def save(kind, folder, model=None):
    (model or kinds.model(kind)).save_pretrained(folder)
    tokenizer = kinds.tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if kind == "encoder":
        # sentence-transformers would wrap every sentence into a conversation.
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return str(folder)


def log_likelihood(kind, prompt, continuation):
    """Of a continuation, straight from the model's logits, and whether it is the greedy one."""
    model, tokenizer = kinds.model(kind), kinds.tokenizer()
    source, target = tokenizer(prompt)["input_ids"], tokenizer(continuation)["input_ids"]
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            start = [model.config.decoder_start_token_id]
            logits = model(
                input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([start + target[:-1]])
            ).logits[0]
        else:
            logits = model(torch.tensor([source + target])).logits[0, len(source) - 1 : -1]
    scores = logits.log_softmax(-1)
    chosen = torch.tensor(target)
    return scores.gather(1, chosen[:, None]).sum().item(), torch.equal(logits.argmax(-1), chosen)


@pytest.mark.whole
@pytest.mark.tool("lm-evaluation-harness", package="lm_eval")
@pytest.mark.parametrize("kind", [*kinds.DECODERS, "seq2seq"])
def test_lm_evaluation_harness(kind, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    evaluated = HFLM(pretrained=save(kind, tmp_path), batch_size=2, device="cpu", dtype="float32")
    # Told apart by the table of names, without `backend=`.
    assert evaluated.backend == ("seq2seq" if kind == "seq2seq" else "causal")
    assert evaluated.max_length == kinds.SIZES["max_position_embeddings"]
    pairs = [("the cat", " sees the dog"), ("a big dog hears", " one bird")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    for (score, is_greedy), pair in zip(evaluated.loglikelihood(requests), pairs, strict=True):
        expected, expected_greedy = log_likelihood(kind, *pair)
        assert score == pytest.approx(expected, rel=1e-5)
        assert is_greedy == expected_greedy
    options = {"until": ["<unk>"], "max_gen_toks": 5, "do_sample": False}
    (text,) = evaluated.generate_until([Instance("generate_until", {}, ("the cat", options), 0)])
    model, tokenizer = kinds.model(kind), kinds.tokenizer()
    ids = tokenizer("the cat", return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=5, do_sample=False)[0]
    new = written[1:] if kind == "seq2seq" else written[ids.shape[1] :]
    assert text.split()[:4] == tokenizer.decode(new, skip_special_tokens=True).split()[:4]


# A harness's task in a file of its own, over rows that lie beside it.
TASK = """
task: sees
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""


@pytest.mark.whole
@pytest.mark.tool("lm-evaluation-harness: results on the card", package="lm_eval")
@pytest.mark.parametrize("kind", ["llama", "seq2seq"])
def test_results_of_the_harness_on_the_card(kind, tmp_path):
    """Its own command, then ours: what the card says is what the logits say."""
    folder = save(kind, tmp_path / "model")
    rows = [{"question": f"the {word}", "choices": ["sees", "hears", "likes"], "answer": index % 3}
            for index, word in enumerate(kinds.WORDS[14:24])]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    task = TASK.replace("ROWS", json.dumps(str(tmp_path / "rows.jsonl")))
    (tmp_path / "tasks" / "sees.yaml").write_text(task, encoding="utf-8")
    # Registered, as in a user's own script.
    command = "import hf_variants; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    options = {"model": "hf", "model_args": f"pretrained={folder},dtype=float32", "tasks": "sees", "device": "cpu",
               "include_path": tmp_path / "tasks", "output_path": tmp_path / "out"}  # fmt: skip
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", command, *arguments], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-2000:]

    assert hf_variants_cli.main(["card", folder, "--eval-results", str(tmp_path / "out")]) == 0
    (result,) = ModelCard.load(f"{folder}/README.md").data.eval_results
    right = 0
    for row in rows:
        scores = [log_likelihood(kind, row["question"], f" {choice}")[0] for choice in row["choices"]]
        right += scores.index(max(scores)) == row["answer"]
    assert 0 < right < len(rows)
    assert result.metric_value == pytest.approx(right / len(rows))
    assert (result.metric_type, result.dataset_name, result.dataset_split) == ("acc", "sees", "test")
    assert result.task_type == "text-generation"


@pytest.mark.whole
@pytest.mark.tool("sentence-transformers", package="sentence-transformers")
@pytest.mark.parametrize("kind", ["encoder"])
@torch.no_grad()
def test_sentence_transformers(kind, tmp_path):
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    model, tokenizer = kinds.model(kind), kinds.tokenizer()
    sentences = ["the cat sees", "a big dog hears the small bird"]
    body = Transformer(save(kind, tmp_path / "model", model.model))
    embedder = SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension(), "mean"), Normalize()])
    vectors = embedder.encode(sentences, convert_to_tensor=True)
    for sentence, vector in zip(sentences, vectors, strict=True):
        ids = tokenizer(sentence, return_tensors="pt")["input_ids"]
        expected = F.normalize(model.model(ids).last_hidden_state.mean(1))[0]
        assert (vector - expected).abs().max() < 1e-5
    embedder.save(str(tmp_path / "embedder"))
    again = SentenceTransformer(str(tmp_path / "embedder")).encode(sentences, convert_to_tensor=True)
    assert torch.equal(again, vectors)

    classifier = kinds.model(kind, VariantForSequenceClassification, num_labels=1)
    ranker = CrossEncoder(save(kind, tmp_path / "classifier", classifier))
    ids = tokenizer(*sentences, return_tensors="pt")["input_ids"]
    (score,) = ranker.predict([tuple(sentences)])
    assert score == pytest.approx(classifier(ids).logits.sigmoid().item(), rel=1e-5)
