"""One run: a model of one config, trained from one seed with transformers' Trainer."""

import copy
import math
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..cost.parameters import structure
from .data import Batch, Data, Shuffle, stack
from .plan import Arm, Training, tokens_of
from .probes import Probe, probe, score


# Points of the training curve.
POINTS = 50


@dataclass(frozen=True)
class Settings:
    """
    What a run is, beside its arm.

    Attributes:
        seed: of initial weights, dropout and the order of examples.
        learning_rate: its largest.
        shuffled: whether labels are permuted: the control that must fail.
        lengths: sizes to test beside training's.
        probes: how often the model is looked at.
    """

    seed: int
    learning_rate: float
    shuffled: bool = False
    lengths: tuple[int, ...] = ()
    probes: int = 2


def train_one(arm: Arm, data: Data, settings: Settings) -> dict[str, Any]:
    """
    Train a model of a config and measure it.

    Returns:
        `validation` and `test` (loss and accuracy), `lengths` (the same by size), `initial_loss`, `curve` of (step, loss,
        gradient norm), `probes`, `diverged`, `step_ms` (median processor time of a step), `seconds`.
    """
    started = time.perf_counter()
    torch.manual_seed(settings.seed)
    model_class: Any = structure(arm.config).cls
    # A model writes into its config, by which runs are told apart.
    model = model_class(copy.deepcopy(arm.config))
    return {**train_model(model, arm.training, data, settings), "seconds": time.perf_counter() - started}


def train_model(model: PreTrainedModel, training: Training, data: Data, settings: Settings) -> dict[str, Any]:
    """Train a given model; see `train_one`."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(training, settings, folder)
        if arguments.train_batch_size != training.batch_size:
            raise ValueError(
                f"{arguments.n_gpu} devices would see {arguments.train_batch_size} examples a step, and runs are paired by "
                "batches. Leave one device visible, with CUDA_VISIBLE_DEVICES=0."
            )
        model.to(arguments.device)
        look = _Look(data.held_out("validation")[0], training.steps, settings.probes)
        initial = score(model, data.held_out("validation")[:2])["loss"]
        look.at(model, 0)
        curve: list[list] = []
        if training.steps:
            trainer = InOrder(
                model=model, args=arguments, callbacks=[look],
                train_dataset=Examples(data, settings.seed, training),
                data_collator=Shuffle(settings.seed) if settings.shuffled else stack,
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            history = trainer.state.log_history
            curve = [[each["step"], each["loss"], each.get("grad_norm")] for each in history if "loss" in each]
            look.at(model, training.steps)
    # Of an untrained model there is little to know.
    least = None if training.steps else 1
    test = score(model, data.held_out("test")[:least])
    return {
        "tokens": tokens_of(training, data),
        "initial_loss": initial,
        "validation": score(model, data.held_out("validation")[:least]),
        "test": test,
        "lengths": {str(size): score(model, data.held_out("test", size)) for size in settings.lengths},
        "curve": curve,
        "probes": [asdict(each) for each in look.found],
        "diverged": not math.isfinite(test["loss"]) or test["loss"] > 1.2 * initial,
        "step_ms": 1e3 * statistics.median(look.times) if look.times else None,
    }


def _arguments(training: Training, settings: Settings, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup" if training.schedule == "constant" else training.schedule,
        warmup_steps=training.warmup,
        weight_decay=training.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=training.max_grad_norm,
        logging_steps=max(1, training.steps // POINTS),
        # A run that diverges shows it.
        logging_nan_inf_filter=False,
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        seed=settings.seed,
    )


class InOrder(Trainer):
    """Takes examples as they lie: their order is the data's, and so the same for every config."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


class Examples(Dataset):
    """What one seed trains on."""

    def __init__(self, data: Data, seed: int, training: Training):
        self.data, self.seed, self.count = data, seed, training.steps * training.batch_size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        return self.data.example(self.seed, index)


class _Look(TrainerCallback):
    """Probes a model now and then, takes the time of steps, and ends a run whose loss is no number."""

    def __init__(self, batch: Batch, steps: int, probes: int):
        self.batch = batch
        self.found: list[Probe] = []
        self.times: list[float] = []
        self.steps = {round(index * steps / max(1, probes - 1)) for index in range(probes)}
        self.begun = 0.0

    def at(self, model: Any, step: int) -> None:
        if step in self.steps and step not in [each.step for each in self.found]:
            self.found.append(probe(model, self.batch, step))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at(kwargs["model"], state.global_step)
        self.begun = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.process_time() - self.begun)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and not math.isfinite(logs.get("loss", 0.0)):
            control.should_training_stop = True
