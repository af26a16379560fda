"""Recovery: a changed model is trained towards its source on a text."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from . import tokenizer_data
from .subject import APPROXIMATE, Outcome, Subject, SurgeryError, of_no_file


CURVE = "distillation.json"
# Of the text, the part that is not trained on; and of the windows in it, as many as are measured.
HELD_OUT, MEASURED = 0.05, 16
# In the folder of a run that is not finished.
SETTINGS, ANSWERS = "settings.json", "answers.json"
# By name: ids of a window, or of a line and of what is said to it.
Example = dict[str, list[int]]


@dataclass(frozen=True)
class Distillation:
    """
    How a result is trained towards its source.

    Attributes:
        text: to train on; its end is held out. Of an encoder-decoder every line is an example: an input, a tab and what is
            said to it; or inputs alone, to which the source says something first (https://arxiv.org/abs/1606.07947).
        steps: of the optimizer, AdamW with a warm-up and a cosine.
        learning_rate: its largest.
        batch_size: windows, or lines, a step.
        window: tokens of each; of a line at most.
        seed: of their order.
    """

    text: str
    steps: int = 200
    learning_rate: float = 3e-4
    batch_size: int = 4
    window: int = 256
    seed: int = 0


@dataclass
class Recovery:
    """
    What the training did.

    Attributes:
        loss: `"KL"`: of the next-token distributions, in nats per token, the source's first; or `"hidden states"`: mean
            squared difference, relative to the variance of the source's.
        steps, tokens: that were trained on.
        before, after: the loss on the end of the text, which was held out.
        curve: `step`, `loss` and `learning_rate` in training.
    """

    loss: str
    steps: int
    tokens: int
    before: float
    after: float
    curve: list[dict[str, float]] = field(default_factory=list)

    def __str__(self) -> str:
        figures = f"{self.before:.4g} before and {self.after:.4g} after {self.steps} steps"
        return f"{self.loss} to the source on held-out text {figures}"

    def write(self, folder: Path) -> None:
        """The curve, beside the weights."""
        (folder / CURVE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def distill(before: Subject, after: Subject, settings: Distillation, workplace: Path) -> tuple[Subject, Recovery]:
    """
    The changed model after some training towards its source, both of which are in memory.

    Args:
        before, after: the source, and what became of it.
        workplace: a folder for checkpoints of the training; a run that finds one there goes on from it. It is removed at
            the end.

    Returns:
        the trained one, whose tensors have the dtypes that they had; and how it went.

    Raises:
        SurgeryError: for models of different kinds, a text that is too short, or a folder of another run.
    """
    # Seconds, which other operations need not wait for.
    from transformers import TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    from .towards import Towards

    if before.model_class is not after.model_class:
        raise SurgeryError(
            f"A {after.model_class.__name__} cannot be trained towards a {before.model_class.__name__}. Leave `--distill` "
            "out, or the operation that makes it another kind of model."
        )
    if min(settings.steps, settings.batch_size, settings.window) < 1:
        raise SurgeryError("Training needs at least one step of one window of one token (`--distill-steps`).")
    pairs = after.config.is_encoder_decoder and after.skeleton.get_output_embeddings() is not None
    examples = _lines(after, settings) if pairs else _windows(after, settings)
    _claim(workplace, before, after, settings)
    # Both in float32, whatever they are stored in.
    student, teacher = after.to_measure().float(), before.to_measure().float().requires_grad_(False)
    if pairs:
        examples = _answered(examples, before, after, teacher, settings, workplace)
    pad = after.config.pad_token_id or 0
    held_out = examples[-max(1, min(MEASURED, round(len(examples) * HELD_OUT))) :]
    examples = examples[: -len(held_out)]
    arguments = TrainingArguments(
        output_dir=str(workplace),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, settings.steps // 20),
        weight_decay=0.0,
        logging_steps=max(1, settings.steps // 50),
        logging_first_step=True,
        save_steps=max(1, settings.steps // 10),
        save_total_limit=1,
        remove_unused_columns=False,
        report_to=[],
        seed=settings.seed,
    )
    teacher.to(arguments.device)
    student.to(arguments.device)
    difference, loss = _difference(teacher, after)

    @torch.no_grad()
    def measured() -> float:
        student.eval()
        batches = [_batch([example], pad) for example in held_out]
        parts = [
            difference(student, {name: ids.to(arguments.device) for name, ids in batch.items()}).item()
            for batch in batches
        ]
        return sum(parts) / len(parts)

    first = measured()
    student.config.use_cache = False
    trainer = Towards(
        difference, model=student, args=arguments, train_dataset=examples, data_collator=partial(_batch, pad=pad)
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(workplace)))
    keys = ("step", "loss", "learning_rate")
    curve = [{key: entry[key] for key in keys} for entry in trainer.state.log_history if "loss" in entry]
    predicted = sum(len(example["decoder_input_ids" if pairs else "input_ids"]) for example in examples)
    tokens = round(settings.steps * settings.batch_size * predicted / len(examples))
    recovery = Recovery(loss, settings.steps, tokens, first, measured(), curve)
    state = {name: tensor.cpu() for name, tensor in student.state_dict().items()}
    shutil.rmtree(workplace)
    headers = after.headers()

    def load(name: str) -> torch.Tensor:
        return state[name].to(headers[name].dtype) if name in state else after.source(name)

    what = f"trained towards the source for {settings.steps} steps on {tokens:,} tokens"
    outcome = Outcome(what, APPROXIMATE, (str(recovery),))
    return replace(after, source=load, unread=of_no_file, outcomes=(*after.outcomes, outcome)), recovery


def _windows(after: Subject, settings: Distillation) -> list[Example]:
    """The text in pieces of equal length, as the result's tokenizer cuts it."""
    ids = tokenizer_data.load(after)(settings.text, add_special_tokens=False, verbose=False).input_ids
    size = min(settings.window, after.context)
    windows = [{"input_ids": ids[start : start + size]} for start in range(0, len(ids) - size + 1, size)]
    if len(windows) < 2:
        raise SurgeryError(
            f"The text has {len(ids)} tokens, and training needs at least two windows of {size}. Give a longer one."
        )
    _refuse_new_tokens(after, windows)
    return windows


def _lines(after: Subject, settings: Distillation) -> list[Example]:
    """The lines of the text, with what is said to each where that stands behind a tab; no more than will be used."""
    tokenizer = tokenizer_data.load(after)
    lines = [line for line in settings.text.splitlines() if line.strip()]
    if len(lines) < 2:
        raise SurgeryError(
            f"The text has {len(lines)} lines, and training an encoder-decoder needs at least two. Write an input on each, "
            "and behind a tab what is said to it."
        )
    told = [len(line.split("\t")) == 2 for line in lines]
    if any(told) and not all(told):
        raise SurgeryError(
            f"Line {told.index(False) + 1} of the text has not one tab, and others have. Write an input, a tab and what is "
            "said to it on every line, or inputs alone."
        )
    size = min(settings.window, after.context)

    def ids(**text: str) -> list[int]:
        return tokenizer(**text, truncation=True, max_length=size, verbose=False).input_ids

    examples: list[Example] = []
    # As many as there are steps for, and the part that is held out.
    for line in lines[: settings.steps * settings.batch_size + MEASURED]:
        text, _, target = line.partition("\t")
        example = {"input_ids": ids(text=text)}
        if all(told):
            # As labels are given to the decoder: one place further.
            made = ids(text_target=target)
            example["decoder_input_ids"] = [after.config.decoder_start_token_id, *made][: len(made)]
        if all(example.values()):
            examples.append(example)
    _refuse_new_tokens(after, examples)
    return examples


def _answered(
    examples: list[Example],
    before: Subject,
    after: Subject,
    teacher: PreTrainedModel,
    settings: Distillation,
    workplace: Path,
) -> list[Example]:
    """The examples with what the source says to them, where nothing is given."""
    if all("decoder_input_ids" in example for example in examples):
        return examples
    path = workplace / ANSWERS
    if not path.is_file():
        folder = before.tokenizer_path
        if folder is not None and (folder / GENERATION_CONFIG_NAME).is_file():
            teacher.generation_config = GenerationConfig.from_pretrained(folder)
        old = range(after.config.encoder.vocab_size) if after.tokens is None else after.tokens
        answers = []
        with torch.no_grad():
            for example in tqdm(examples, desc="Asking the source", delay=1.0):
                said = teacher.generate(
                    torch.tensor([[old[token] for token in example["input_ids"]]]),
                    do_sample=False, num_beams=1, max_length=None, max_new_tokens=settings.window,
                )  # fmt: skip
                # The last token is only predicted.
                answers.append(said[0, :-1].tolist())
        path.write_text(json.dumps(answers), encoding="utf-8")
    answers = json.loads(path.read_text(encoding="utf-8"))
    new = None if after.tokens is None else {token: place for place, token in enumerate(after.tokens) if token >= 0}
    made = [
        {**example, "decoder_input_ids": said if new is None else [new[token] for token in said]}
        for example, said in zip(examples, answers)
        if new is None or new.keys() >= set(said)
    ]
    if len(made) < 2:
        raise SurgeryError(
            "The result has not the tokens that the source answers with. Trim the vocabulary to a text with them "
            "(`--trim-vocab`), or leave `--distill` out."
        )
    return made


def _refuse_new_tokens(after: Subject, examples: list[Example]) -> None:
    used = {token for example in examples for ids in example.values() for token in ids}
    if after.tokens is not None and any(after.tokens[token] < 0 for token in used):
        raise SurgeryError("The text has tokens that the source does not have. Add tokens after the training.")


def _batch(examples: list[Example], pad: int) -> dict[str, torch.Tensor]:
    """Examples of one length, or padded on the right with masks for both sides."""
    batch: dict[str, torch.Tensor] = {}
    for name in examples[0]:
        rows = [torch.tensor(example[name]) for example in examples]
        batch[name] = pad_sequence(rows, batch_first=True, padding_value=pad)
        if len(examples[0]) > 1:
            ones = [torch.ones_like(row) for row in rows]
            batch[f"{name.removesuffix('input_ids')}attention_mask"] = pad_sequence(ones, batch_first=True)
    return batch


def _claim(workplace: Path, before: Subject, after: Subject, settings: Distillation) -> None:
    """Make the folder of this run, or find it."""
    own = {
        **asdict(settings),
        "text": hashlib.sha256(settings.text.encode()).hexdigest(),
        "operations": [outcome.operation for outcome in after.outcomes],
        "model": hashlib.sha256(json.dumps(before.config.to_dict(), sort_keys=True, default=str).encode()).hexdigest(),
    }
    path = workplace / SETTINGS
    if not workplace.exists():
        workplace.mkdir(parents=True)
        path.write_text(json.dumps(own, indent=2), encoding="utf-8")
    elif not path.is_file() or json.loads(path.read_text(encoding="utf-8")) != own:
        raise SurgeryError(
            f"{workplace} is of another training. Finish that with the same command, or remove the folder."
        )


def _difference(teacher: PreTrainedModel, after: Subject) -> tuple[Callable, str]:
    """(model, batch) -> how far it is from the source, and what that is called."""
    columns = None if after.tokens is None else torch.tensor(after.tokens)
    kept = None if columns is None else (columns >= 0).nonzero()[:, 0]
    has_logits = teacher.get_output_embeddings() is not None

    def outputs(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        # A body of two stacks reads the text with both. An encoder has no cache to leave out.
        both = {"decoder_input_ids": batch["input_ids"]} if teacher.config.is_encoder_decoder else {}
        result = model(**both | batch)
        return result.logits if has_logits else result[0]

    def of_teacher(name: str, ids: torch.Tensor) -> torch.Tensor:
        if columns is None or not name.endswith("input_ids"):
            return ids
        # What is padded may be a token that only the result has.
        return columns.clamp(min=0).to(ids.device)[ids]

    def difference(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            target = outputs(teacher, {name: of_teacher(name, ids) for name, ids in batch.items()})
        made = outputs(model, batch)
        if not has_logits:
            return F.mse_loss(made, target) / target.var()
        if columns is not None and kept is not None:
            # Of the tokens that both have.
            target, made = target[..., columns[kept].to(target.device)], made[..., kept.to(made.device)]
        if (is_real := batch.get("decoder_attention_mask")) is not None:
            target, made = target[is_real.bool()], made[is_real.bool()]
        made, target = (logits.float().log_softmax(-1).flatten(0, -2) for logits in (made, target))
        return F.kl_div(made, target, log_target=True, reduction="batchmean")

    return difference, "KL" if has_logits else "hidden states"
