"""transformers' Trainer and Seq2SeqTrainer: what they train, accumulate, checkpoint, stop and resume."""

import copy
import logging

import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorForMultipleChoice,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_variants import (
    VariantForMultipleChoice,
    VariantForSequenceClassification,
    VariantForTokenClassification,
)
from hf_variants.model import losses

from . import kinds


# Padding of different lengths: micro-batches have different numbers of labels.
LENGTHS = (12, 5, 9, 3, 11, 6, 8, 4)


class Rows(Dataset):
    """Learnable token sequences: each counts upwards from its first token."""

    def __init__(self, kind, lengths=LENGTHS):
        self.rows = []
        for index, length in enumerate(lengths):
            ids = [3 + (7 * index + 5 * step) % (kinds.VOCABULARY - 3) for step in range(length)]
            row = {"input_ids": ids, "attention_mask": [1] * length, "labels": list(ids)}
            if kind == "seq2seq":
                row["labels"] = ids[: max(2, length - 2)]
            if kind == "encoder":
                row["labels"] = [token if step % 3 == 0 else -100 for step, token in enumerate(ids)]
                row["input_ids"] = [4 if step % 3 == 0 else token for step, token in enumerate(ids)]
            self.rows.append(row)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def pad(rows):
    """Batches padded on the right, labels with -100."""

    def column(name, value):
        longest = max(len(row[name]) for row in rows)
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    return {"input_ids": column("input_ids", 0), "attention_mask": column("attention_mask", 0),
            "labels": column("labels", -100)}  # fmt: skip


class Losses(TrainerCallback):
    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.values.append(logs["loss"])


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def trainer(model, folder, kind, trainer_class=Trainer, dataset=None, collate=pad, callbacks=(), **options):
    arguments = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "learning_rate": 5e-3, "max_steps": 8,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "lr_scheduler_type": "constant", "dataloader_pin_memory": False, **options,
    }  # fmt: skip
    is_seq2seq = trainer_class is Seq2SeqTrainer
    losses_seen = Losses()
    built = trainer_class(
        model=model, args=(Seq2SeqTrainingArguments if is_seq2seq else TrainingArguments)(**arguments),
        train_dataset=Rows(kind) if dataset is None else dataset, data_collator=collate,
        callbacks=[losses_seen, *callbacks],
    )  # fmt: skip
    built.losses = losses_seen.values
    return built


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_close(out, expected, tolerance):
    assert out.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert (out[name] - value).abs().max() <= tolerance * largest, name


# Where a test trains several models, `make test` has one kind, and two decoders are left to `make test-all`.
KINDS = [
    pytest.param(
        kind,
        marks={"gemma2": [], "llama": [pytest.mark.whole, pytest.mark.exhaustive],
               "gpt-neox": [pytest.mark.whole, pytest.mark.exhaustive]}.get(kind, [pytest.mark.whole]),
    )
    for kind in kinds.KINDS
]  # fmt: skip
DROPOUTS = {"attention_dropout": 0.1, "residual_dropout": 0.2, "embedding_dropout": 0.1}


@pytest.mark.tool("Trainer", package="transformers")
@pytest.mark.parametrize("kind", kinds.KINDS)
def test_training_evaluating_and_saving(kind, tmp_path):
    model = kinds.model(kind)
    run = trainer(model, tmp_path / "run", kind, max_steps=16, save_strategy="steps", save_steps=16)
    before = run.evaluate(Rows(kind))["eval_loss"]
    run.train()
    assert sum(run.losses[-4:]) < 0.75 * sum(run.losses[:4])
    after = run.evaluate(Rows(kind))["eval_loss"]
    assert after < 0.75 * before
    # The last batch is smaller, and none of them is weighted; the loss of all rows lies near.
    batch = pad(Rows(kind).rows)
    with torch.no_grad():
        out = model.eval()(**batch)
        assert abs(out.loss - after) < 0.2 * after
    predicted = run.predict(Rows(kind)).predictions
    logits = torch.as_tensor(predicted[0] if isinstance(predicted, tuple) else predicted)
    assert (logits[0, : out.logits.shape[1]] - out.logits[0]).abs().max() < 1e-4

    run.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-16"):
        loaded, report = type(model).from_pretrained(folder, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(loaded.eval()(**batch).logits, out.logits)


@pytest.mark.tool("Trainer: masked LM", package="transformers")
@pytest.mark.parametrize("kind", ["encoder"])
def test_masked_language_modelling_with_the_collator(kind, tmp_path):
    collate = DataCollatorForLanguageModeling(kinds.tokenizer(), mlm_probability=0.3)
    rows = [{"input_ids": row["input_ids"]} for row in Rows("llama", (12,) * 8).rows]
    run = trainer(kinds.model(kind), tmp_path, kind, dataset=rows, collate=collate, max_steps=60, learning_rate=1e-2)
    run.train()
    assert sum(run.losses[-10:]) < 0.6 * sum(run.losses[:10])


@pytest.mark.tool("Trainer: sequence classification", package="transformers")
@pytest.mark.parametrize("kind", [*kinds.DECODERS, "encoder"])
def test_sequence_classification(kind, tmp_path):
    rows = [{**row, "labels": index % 3} for index, row in enumerate(Rows("llama").rows)]

    def collate(batch):
        return {
            **pad([{**row, "labels": []} for row in batch]),
            "labels": torch.tensor([row["labels"] for row in batch]),
        }

    model = kinds.model(kind, VariantForSequenceClassification, num_labels=3)
    run = trainer(model, tmp_path, kind, dataset=rows, collate=collate, max_steps=25)
    run.train()
    assert sum(run.losses[-3:]) < 0.3 * sum(run.losses[:3])


@pytest.mark.tool("Trainer: multiple choice", package="transformers")
@pytest.mark.parametrize("kind", [*kinds.DECODERS, "encoder"])
def test_multiple_choice_with_the_collator(kind, tmp_path):
    """Of three choices of unequal lengths one is a sentence that says what the others do not."""
    right, wrong = Rows("llama").rows[0]["input_ids"], [row["input_ids"] for row in Rows("llama").rows[1:]]
    rows = []
    for index in range(8):
        choices = [wrong[(index + shift) % len(wrong)] for shift in range(3)]
        choices[index % 3] = right
        rows.append({"input_ids": choices, "attention_mask": [[1] * len(ids) for ids in choices], "labels": index % 3})
    assert len({len(ids) for row in rows for ids in row["input_ids"]}) > 1
    collate = DataCollatorForMultipleChoice(kinds.tokenizer())
    run = trainer(
        kinds.model(kind, VariantForMultipleChoice), tmp_path, kind, dataset=rows, collate=collate, max_steps=25
    )
    run.train()
    assert sum(run.losses[-3:]) < 0.3 * sum(run.losses[:3])
    predicted = run.predict(rows)
    assert predicted.predictions.shape == (8, 3)
    assert (predicted.predictions.argmax(-1) == predicted.label_ids).all()


# Gradient accumulation


ACCUMULATED = [
    *[pytest.param(kind, {}, marks=pytest.mark.whole) for kind in kinds.KINDS],
    *[(kind, {"z_loss_coefficient": 0.1, "label_smoothing": 0.2}) for kind in ("gemma2", "seq2seq", "encoder")],
]


@pytest.mark.tool("Trainer: accumulation", package="transformers")
@pytest.mark.parametrize(("kind", "fields"), ACCUMULATED)
def test_accumulation_equals_one_large_batch(kind, fields, tmp_path):
    """In float64: parameters, and the loss that is logged, though micro-batches have different numbers of labels."""
    # The number that masks a score in float64 has no like in float32.
    start = kinds.model(kind, attention_softmax_in_float32=False, **fields).double()

    def trained(**options):
        model = copy.deepcopy(start)
        run = trainer(model, tmp_path, kind, optim="sgd", learning_rate=0.1, max_steps=3, **options)
        run.train()
        return parameters(model), run.losses

    expected, expected_losses = trained(per_device_train_batch_size=8, max_grad_norm=0.0)
    out, out_losses = trained(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_grad_norm=0.0)
    with torch.no_grad():
        assert abs(start.train()(**pad(Rows(kind).rows)).loss - expected_losses[0]) < 1e-4
    # Losses are computed in float32, here as in transformers.
    assert_close(out, expected, 2e-6)
    assert max(abs(a - b) for a, b in zip(out_losses, expected_losses, strict=True)) < 1e-4
    moved = max((expected[name] - value).abs().max() for name, value in parameters(start).items())
    assert moved > 1e-3


@pytest.mark.parametrize("problem", ["classes", "regression", "tokens"])
def test_accumulation_of_task_heads(problem, tmp_path):
    rows = Rows("llama").rows
    if problem == "tokens":
        model_class, fields = VariantForTokenClassification, {"num_labels": 3}
        rows = [{**row, "labels": [token % 3 for token in row["labels"]]} for row in rows]
        collate = pad
    else:
        model_class, fields = VariantForSequenceClassification, {"num_labels": 3 if problem == "classes" else 1}
        rows = [{**row, "labels": index % 3 if problem == "classes" else index / 3} for index, row in enumerate(rows)]

        def collate(batch):
            labels = torch.tensor([row["labels"] for row in batch])
            return {**pad([{**row, "labels": []} for row in batch]), "labels": labels}

    start = kinds.model("encoder", model_class, classifier_dropout=0.0, **fields)

    def trained(**options):
        model = copy.deepcopy(start)
        trainer(model, tmp_path, "encoder", dataset=rows, collate=collate, optim="sgd", learning_rate=0.1, max_steps=2,
                max_grad_norm=0.0, **options).train()  # fmt: skip
        return parameters(model)

    expected = trained(per_device_train_batch_size=8)
    out = trained(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_close(out, expected, 1e-5)


# Gradient checkpointing


@pytest.mark.tool("Trainer: gradient checkpointing", package="transformers")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_is_bit_equal_with_dropout(kind, reentrant, tmp_path):
    # Checkpointing switches the cache off, and sdpa's dropout rounds by how keys lie in memory.
    start = kinds.model(kind, **DROPOUTS, use_cache=False)
    # Reentrant checkpointing adds up what keys and values ask of the encoder's output layer by layer: another order.
    exact = kind != "seq2seq" or not reentrant
    if not exact:
        start = start.double()

    def trained(**options):
        model = copy.deepcopy(start)
        run = trainer(model, tmp_path, kind, max_steps=3, optim="sgd", learning_rate=0.1, **options)
        run.train()
        return parameters(model), run.losses, model

    expected, expected_losses, _ = trained()
    out, out_losses, model = trained(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    stacks = [module for module in model.modules() if hasattr(module, "layerdrop")]
    assert all(stack.layers[0].gradient_checkpointing for stack in stacks)
    if not exact:
        assert_close(out, expected, 1e-13)
        return
    assert out_losses == expected_losses
    for name, value in expected.items():
        assert torch.equal(out[name], value), name


# bf16


@pytest.mark.tool("Trainer: bf16", package="transformers")
@pytest.mark.parametrize("form", ["autocast", "weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_near_float32(kind, form, tmp_path):
    start = kinds.model(kind)

    def trained(model, **options):
        run = trainer(model, tmp_path, kind, learning_rate=2e-3, max_steps=6, **options)
        run.train()
        return run.losses

    expected = trained(copy.deepcopy(start))
    model = copy.deepcopy(start)
    losses_seen = trained(model.bfloat16() if form == "weights" else model, bf16=form == "autocast")
    assert next(model.parameters()).dtype == (torch.bfloat16 if form == "weights" else torch.float32)
    assert losses_seen != expected
    assert max(abs(a - b) / b for a, b in zip(losses_seen, expected, strict=True)) < 0.02


# Stop and resume


@pytest.mark.tool("Trainer: resume", package="transformers")
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_bit_equal_to_never_having_stopped(kind, tmp_path):
    """With every dropout and layerdrop, in the middle of an epoch, under a schedule: weights and optimizer."""
    fields = {**DROPOUTS, "layerdrop": 0.3, "num_hidden_layers": 3, "z_loss_coefficient": 1e-2}
    options = {"per_device_train_batch_size": 2, "max_steps": 7, "save_strategy": "steps", "save_steps": 3,
               "lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2}  # fmt: skip

    def states(folder):
        optimizer = torch.load(folder / "checkpoint-7" / "optimizer.pt", weights_only=True)
        return [value for entry in optimizer["state"].values() for value in entry.values() if torch.is_tensor(value)]

    model = kinds.model(kind, **fields)
    whole = trainer(model, tmp_path / "whole", kind, **options)
    whole.train()
    stopped = trainer(kinds.model(kind, **fields), tmp_path / "parts", kind, callbacks=[StopAt(3)], **options)
    stopped.train()
    assert stopped.state.global_step == 3
    # Another process would start with other random numbers and other weights.
    torch.manual_seed(77)
    resumed_model = kinds.model(kind, seed=9, **fields)
    resumed = trainer(resumed_model, tmp_path / "parts", kind, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert stopped.losses + resumed.losses[-4:] == whole.losses
    for name, value in parameters(model).items():
        assert torch.equal(dict(resumed_model.named_parameters())[name], value), name
    expected = states(tmp_path / "whole")
    assert expected
    assert all(torch.equal(a, b) for a, b in zip(states(tmp_path / "parts"), expected, strict=True))


# Label smoothing


@pytest.mark.tool("Trainer: label_smoothing_factor", package="transformers")
@pytest.mark.parametrize("kind", KINDS)
def test_the_trainers_label_smoothing_is_the_configs(kind, tmp_path):
    """The Trainer computes the smoothed loss itself, and must know which of our classes shift their labels."""
    batch = pad(Rows(kind).rows[:4])
    own = kinds.model(kind, label_smoothing=0.3)
    expected = own(**batch).loss
    run = trainer(kinds.model(kind), tmp_path, kind, label_smoothing_factor=0.3)
    run.model.eval()
    if kind == "seq2seq":
        decoder_input_ids = own.prepare_decoder_input_ids_from_labels(batch["labels"])
        batch["decoder_input_ids"] = decoder_input_ids
    assert abs(run.compute_loss(run.model, dict(batch)) - expected) < 1e-5 * expected


@pytest.mark.parametrize("kind", KINDS)
def test_terms_that_the_trainer_leaves_out_are_named(kind, tmp_path, caplog):
    losses.logger.warning_once.__func__.cache_clear()
    losses.logger.propagate = True
    collate = DataCollatorForSeq2Seq(kinds.tokenizer(), kinds.model(kind)) if kind == "seq2seq" else pad
    for fields, options, warns in (
        ({}, {"label_smoothing_factor": 0.1}, False),
        ({"z_loss_coefficient": 0.1}, {}, False),
        ({"z_loss_coefficient": 0.1}, {"label_smoothing_factor": 0.1}, True),
    ):
        with caplog.at_level(logging.WARNING):
            trainer(kinds.model(kind, **fields), tmp_path, kind, collate=collate, max_steps=1, **options).train()
        assert ("without `z_loss_coefficient` of the config. Set `label_smoothing`" in caplog.text) == warns


# Seq2SeqTrainer


@pytest.mark.tool("Seq2SeqTrainer", package="transformers")
@pytest.mark.parametrize("kind", ["seq2seq"])
def test_seq2seq_trainer(kind, tmp_path):
    """With the collator that asks the model for decoder inputs, and generation in evaluation."""
    model = kinds.model(kind)
    tokenizer = kinds.tokenizer()
    collate = DataCollatorForSeq2Seq(tokenizer, model)
    rows = Rows(kind).rows
    rows = [{**row, "labels": [*row["labels"], kinds.SPECIAL["eos_token_id"]]} for row in rows]
    batch = collate([dict(row) for row in rows])
    assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["labels"][:, :-1].masked_fill(
        batch["labels"][:, :-1] == -100, 0))  # fmt: skip
    assert (batch["decoder_input_ids"][:, 0] == 1).all()
    accuracy = {}

    def metrics(prediction):
        labels = torch.as_tensor(prediction.label_ids)
        predictions = torch.as_tensor(prediction.predictions)[:, 1 : labels.shape[1] + 1]
        kept = labels != -100
        width = predictions.shape[1]
        accuracy["value"] = (predictions == labels[:, :width])[kept[:, :width]].float().mean().item()
        return {"accuracy": accuracy["value"]}

    run = trainer(
        model, tmp_path, kind, Seq2SeqTrainer, dataset=rows, collate=collate, max_steps=60, learning_rate=1e-2,
        predict_with_generate=True, generation_max_length=16, per_device_train_batch_size=8,
    )  # fmt: skip
    run.compute_metrics = metrics
    before = run.evaluate(rows)["eval_accuracy"]
    run.train()
    assert run.losses[-1] < 0.1 * run.losses[0]
    after = run.evaluate(rows)
    assert after["eval_accuracy"] > 0.9 > before
    predictions = torch.as_tensor(run.predict(rows).predictions)
    alone = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_length=16, do_sample=False)
    assert torch.equal(predictions[0][: alone.shape[1]].clamp(min=0), alone[0][: predictions.shape[1]])


def test_a_saved_model_loads_by_its_auto_class(tmp_path):
    run = trainer(kinds.model("llama"), tmp_path / "run", "llama", max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")) is type(run.model)
