"""Recovery: a changed model is trained towards its source on a text."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from . import tokenizer_data
from .subject import APPROXIMATE, Outcome, Subject, SurgeryError


CURVE = "distillation.json"
# Of the text, the part that is not trained on; and of the windows in it, as many as are measured.
HELD_OUT, MEASURED = 0.05, 16
# In the folder of a run that is not finished.
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Distillation:
    """
    How a result is trained towards its source.

    Attributes:
        text: to train on; its end is held out.
        steps: of the optimizer, AdamW with a warm-up and a cosine.
        learning_rate: its largest.
        batch_size: windows a step.
        window: tokens of each.
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
    windows = _windows(after, settings)
    held_out = windows[-max(1, min(MEASURED, round(len(windows) * HELD_OUT))) :]
    windows = windows[: -len(held_out)]
    _claim(workplace, before, after, settings)
    student, teacher = after.model().float(), before.to_measure().float().requires_grad_(False)
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
        parts = [difference(student, window[None].to(arguments.device)).item() for window in held_out]
        return sum(parts) / len(parts)

    first = measured()
    student.config.use_cache = False
    trainer = Towards(
        difference, model=student, args=arguments, train_dataset=[{"input_ids": window} for window in windows]
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(workplace)))
    keys = ("step", "loss", "learning_rate")
    curve = [{key: entry[key] for key in keys} for entry in trainer.state.log_history if "loss" in entry]
    tokens = settings.steps * settings.batch_size * settings.window
    recovery = Recovery(loss, settings.steps, tokens, first, measured(), curve)
    state = {name: tensor.cpu() for name, tensor in student.state_dict().items()}
    shutil.rmtree(workplace)
    headers = after.headers()

    def load(name: str) -> torch.Tensor:
        return state[name].to(headers[name].dtype) if name in state else after.source(name)

    what = f"trained towards the source for {settings.steps} steps on {tokens:,} tokens"
    outcome = Outcome(what, APPROXIMATE, (str(recovery),))
    return replace(after, source=load, outcomes=(*after.outcomes, outcome)), recovery


def _windows(after: Subject, settings: Distillation) -> list[torch.Tensor]:
    """The text in pieces of equal length, as the result's tokenizer cuts it."""
    ids = tokenizer_data.load(after)(settings.text, add_special_tokens=False, verbose=False).input_ids
    size = min(settings.window, *(config.max_position_embeddings for config in after.stacks.values()))
    windows = [torch.tensor(ids[start : start + size]) for start in range(0, len(ids) - size + 1, size)]
    if len(windows) < 2:
        raise SurgeryError(
            f"The text has {len(ids)} tokens, and training needs at least two windows of {size}. Give a longer one."
        )
    if after.tokens is not None and any(after.tokens[token] < 0 for token in {i for w in windows for i in w.tolist()}):
        raise SurgeryError("The text has tokens that the source does not have. Add tokens after the training.")
    return windows


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
    """(model, ids) -> how far it is from the source, and what that is called."""
    columns = None if after.tokens is None else torch.tensor(after.tokens)
    kept = None if columns is None else (columns >= 0).nonzero()[:, 0]
    has_logits = teacher.get_output_embeddings() is not None

    def outputs(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        both = {"decoder_input_ids": ids} if teacher.config.is_encoder_decoder else {}
        # An encoder has no cache to leave out.
        result = model(input_ids=ids, **both)
        return result.logits if has_logits else result[0]

    def difference(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = outputs(teacher, ids if columns is None else columns.to(ids.device)[ids])
        made = outputs(model, ids)
        if not has_logits:
            return F.mse_loss(made, target) / target.var()
        if columns is not None and kept is not None:
            # Of the tokens that both have.
            target, made = target[..., columns[kept].to(ids.device)], made[..., kept.to(ids.device)]
        made, target = (logits.float().log_softmax(-1).flatten(0, -2) for logits in (made, target))
        return F.kl_div(made, target, log_target=True, reduction="batchmean")

    return difference, "KL" if has_logits else "hidden states"
