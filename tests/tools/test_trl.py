"""TRL: what its trainers compute with our models and with stock classes, with adapters, and what they would leave out."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer

from hf_variants import VariantConfig, VariantForCausalLM, VariantForSequenceClassification, presets, to_native
from hf_variants.model import losses

from . import kinds


pytestmark = pytest.mark.whole

# With the marks that tell the assistant's words, which training on them alone needs.
TRAINING_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' : ' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + ' <eos> ' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' <eos> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)
ANSWERS = {
    "who": "the cat",
    "what": "a red bird",
    "where": "here and there",
    "when": "now",
    "how": "good",
    "why": "not now",
}


def tokenizer():
    built = kinds.tokenizer()
    built.chat_template = TRAINING_TEMPLATE
    return built


def conversations():
    from datasets import Dataset

    return Dataset.from_list([
        {"messages": [{"role": "user", "content": f"{question} sees the dog ?"},
                      {"role": "assistant", "content": answer}]}
        for question, answer in ANSWERS.items()
    ])  # fmt: skip


def preferences():
    from datasets import Dataset

    return Dataset.from_list([
        {"prompt": f"{question} sees the dog ?", "chosen": f" {answer}", "rejected": " w1 w2 w3"}
        for question, answer in ANSWERS.items()
    ])  # fmt: skip


OPTIONS = {
    "per_device_train_batch_size": 3, "learning_rate": 5e-3, "logging_steps": 1, "save_strategy": "no", "report_to": [],
    "use_cpu": True, "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False, "max_length": 64,
    "dataloader_pin_memory": False,
}  # fmt: skip


def lora():
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def sft(model, folder, trainer_class=None, dataset=None, adapter=False, **options):
    from trl import SFTConfig, SFTTrainer

    return (trainer_class or SFTTrainer)(
        model=model, args=SFTConfig(output_dir=str(folder), **{**OPTIONS, "max_steps": 12, **options}),
        train_dataset=conversations() if dataset is None else dataset, processing_class=tokenizer(),
        peft_config=lora() if adapter else None,
    )  # fmt: skip


def seen_losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def own_loss(trainer_class):
    class OwnLossTrainer(trainer_class):
        compute_loss = Trainer.compute_loss

    return OwnLossTrainer


# Supervised fine-tuning


@pytest.mark.tool("TRL: SFT", package="trl")
@pytest.mark.parametrize("form", ["plain", "packing", "padding_free", "assistant_only_loss", "checkpointing"])
@pytest.mark.parametrize("kind", kinds.DECODERS)
def test_sft(kind, form, tmp_path):
    options = {
        "plain": {}, "packing": {"packing": True}, "padding_free": {"padding_free": True, "max_length": None},
        "assistant_only_loss": {"assistant_only_loss": True}, "checkpointing": {"gradient_checkpointing": True},
    }[form]  # fmt: skip
    trainer = sft(kinds.model(kind), tmp_path, **options)
    inputs = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        expected = trainer.model(**{name: inputs[name] for name in inputs if name != "seq_idx"}).loss
        computed = trainer.compute_loss(trainer.model, dict(inputs))
    assert abs(computed - expected) < 1e-5 * expected
    trainer.train()
    assert sum(seen_losses(trainer)[-3:]) < 0.7 * sum(seen_losses(trainer)[:3])


@pytest.mark.tool("TRL: SFT with LoRA", package="trl")
@pytest.mark.parametrize("kind", kinds.DECODERS)
def test_sft_with_an_adapter(kind, tmp_path):
    model = kinds.model(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = sft(model, tmp_path, adapter=True, learning_rate=2e-2)
    trainer.train()
    assert sum(seen_losses(trainer)[-3:]) < 0.8 * sum(seen_losses(trainer)[:3])
    merged = trainer.model.merge_and_unload().state_dict()
    frozen = "model.embed_tokens.weight"
    assert torch.equal(merged[frozen], before[frozen])
    assert not torch.equal(
        merged["model.layers.0.mlp.down_proj.weight"], before["model.layers.0.mlp.down_proj.weight"]
    )


@pytest.mark.tool("TRL: SFT with packing", package="trl")
@pytest.mark.parametrize("strategy", ["packing", "padding_free"])
@pytest.mark.parametrize("kind", kinds.DECODERS)
def test_packed_training_is_that_of_the_documents(kind, strategy, tmp_path):
    """What TRL's collator makes of several conversations, on sdpa or eager, weighs each as alone."""
    start = kinds.model(kind)

    def trained(**options):
        model = copy.deepcopy(start)
        sft(model, tmp_path, optim="sgd", learning_rate=0.1, max_steps=2, max_grad_norm=0.0, **options).train()
        return dict(model.named_parameters())

    count = len(ANSWERS)
    expected = trained(per_device_train_batch_size=count)
    # All conversations fit into two rows of 64 tokens, which become one.
    options = {"packing": {"packing": True, "per_device_train_batch_size": 2},
               "padding_free": {"padding_free": True, "max_length": None, "per_device_train_batch_size": count}}  # fmt: skip
    out = trained(**options[strategy])
    largest = max(value.abs().max() for value in expected.values())
    assert max((expected[name] - value).abs().max() for name, value in start.named_parameters()) > 1e-3 * largest
    for name, value in expected.items():
        assert (out[name] - value).abs().max() < 2e-6 * largest, name


# What the fused head of TRL's trainers computes


SIZES = {**kinds.SIZES, "num_hidden_layers": 4}
ACTIVE = {
    "logits": {"lm_head_transform": {"lm_head_transform": True}, "lm_head_input_scale": {"lm_head_input_scale": 0.3},
               "lm_head_normalized": {"lm_head_normalized": True}},
    "loss": {"z_loss_coefficient": {"z_loss_coefficient": 0.1}, "label_smoothing": {"label_smoothing": 0.2}},
}  # fmt: skip
HARMLESS = {
    "scale and cap": {"logit_scale": 0.5, "final_logit_softcapping": 2.0},
    "division": {"logit_scale": 0.125, "logit_scale_by_division": True},
    "bias": {"lm_head_bias": True},
    "unread bias": {"lm_head_bias": True, "lm_head_unread_bias": True},
    "output projection": {"embedding_size": 16, "output_projection": True},
}


def fused_and_own(model):
    from trl.trainer.utils import add_fused_lm_head

    batch = kinds.batch("llama")
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, -4:] = 0
    batch["labels"][1, -4:] = -100
    own = model(**batch)
    targets = batch["labels"][:, 1:]
    expected = own.logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    add_fused_lm_head(model)
    fused = model(**batch, fused_lm_head=True)
    # Without the word, the forward is ours as before.
    assert torch.equal(model(**batch).loss, own.loss)
    return fused, own, expected.masked_fill(targets == -100, 0)


@pytest.mark.parametrize("name", presets())
def test_the_fused_head_computes_every_presets_logits(name):
    torch.manual_seed(0)
    model = VariantForCausalLM(VariantConfig.from_preset(name, **SIZES)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    fused, own, log_probs = fused_and_own(model)
    assert (fused.log_probs - log_probs).abs().max() < 1e-5 * log_probs.abs().max()
    assert abs(fused.loss - own.loss) < 1e-5 * own.loss


@pytest.mark.parametrize("name", HARMLESS)
def test_the_fused_head_computes_our_forms_of_scaling(name):
    fused, own, log_probs = fused_and_own(kinds.model("llama", **HARMLESS[name]))
    assert (fused.log_probs - log_probs).abs().max() < 1e-5 * log_probs.abs().max()
    assert abs(fused.loss - own.loss) < 1e-5 * own.loss


def test_every_field_of_the_head_and_the_loss_is_here():
    """A new field of either kind belongs to one of the two tables above."""
    known = {field for fields in (*HARMLESS.values(), *ACTIVE["logits"].values(), *ACTIVE["loss"].values())
             for field in fields}  # fmt: skip
    fields = {name for name in VariantConfig().to_dict()
              if name.startswith(("lm_head", "logit", "final_logit", "z_loss", "label_smoothing"))}  # fmt: skip
    of_the_transform = {name for name in fields if name.startswith("lm_head_transform_")}
    assert fields - of_the_transform == known - {"embedding_size", "output_projection"}


@pytest.mark.parametrize("field", [*ACTIVE["logits"], *ACTIVE["loss"]])
def test_the_fused_head_is_refused_where_it_computes_something_else(field):
    from trl.trainer.utils import add_fused_lm_head

    of_logits = field in ACTIVE["logits"]
    model = kinds.model("llama", **{**ACTIVE["logits"], **ACTIVE["loss"]}[field])
    own = model(**kinds.batch("llama")).loss
    add_fused_lm_head(model)
    assert torch.equal(model(**kinds.batch("llama")).loss, own)
    assert model.generate(kinds.batch("llama")["input_ids"], max_new_tokens=2, min_new_tokens=2).shape == (2, 14)
    what = "other logits" if of_logits else "the loss"
    with pytest.raises(ValueError, match=rf"computes {what} without|computes {what}, without `{field}`"):
        model(**kinds.batch("llama"), fused_lm_head=True)
    # A copy, as TRL makes of reference models, refuses as well, and by itself.
    with pytest.raises(ValueError, match=f"`{field}`"):
        copy.deepcopy(model)(**kinds.batch("llama"), fused_lm_head=True)


@torch.no_grad()
def test_a_copy_of_a_guarded_model_is_its_own():
    from trl.trainer.utils import add_fused_lm_head

    model = kinds.model("llama", z_loss_coefficient=0.1)
    add_fused_lm_head(model)
    copied = copy.deepcopy(model)
    copied.lm_head.weight.zero_()
    loss = copied(**kinds.batch("llama"), fused_lm_head=True).loss
    assert abs(loss - torch.tensor(kinds.VOCABULARY).log()) < 1e-5


@pytest.mark.tool("TRL: SFT, default loss with z-loss", package="trl", refused=True)
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("kind", kinds.DECODERS)
def test_sft_does_not_lose_the_z_loss(kind, adapter, tmp_path):
    trainer = sft(kinds.model(kind, z_loss_coefficient=1e-2), tmp_path, adapter=adapter)
    with pytest.raises(ValueError, match=r"the loss without `z_loss_coefficient` of the config. Use a trainer that"):
        trainer.train()


@pytest.mark.tool("TRL: SFT, own loss with z-loss", package="trl")
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("kind", kinds.DECODERS)
def test_sft_with_the_models_own_loss(kind, adapter, tmp_path):
    """As the error says: with one line, over several micro-batches, packed."""
    from trl import SFTTrainer

    start = kinds.model(kind, z_loss_coefficient=0.1, label_smoothing=0.1)

    def trained(**options):
        torch.manual_seed(0)
        trainer = sft(copy.deepcopy(start), tmp_path, own_loss(SFTTrainer), adapter=adapter, max_steps=6, **options)
        trainer.train()
        return trainer

    trainer = trained(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert seen_losses(trainer)[-1] < seen_losses(trainer)[0]
    for other in (
        trained(per_device_train_batch_size=6),
        trained(per_device_train_batch_size=6, padding_free=True, max_length=None),
    ):
        difference = [abs(a - b) for a, b in zip(seen_losses(other), seen_losses(trainer), strict=True)]
        assert max(difference) < 1e-4
    without = sft(copy.deepcopy(start), tmp_path, own_loss(SFTTrainer), per_device_train_batch_size=6, max_steps=6)
    batch = next(iter(without.get_train_dataloader()))
    with torch.no_grad():
        out = start(**batch)
        kept = batch["labels"][:, 1:] != -100
        logits = out.logits[:, :-1][kept]
        expected = F.cross_entropy(logits, batch["labels"][:, 1:][kept], label_smoothing=0.1)
        expected = expected + 0.1 * logits.logsumexp(-1).square().mean()
    assert abs(seen_losses(trainer)[0] - expected) < 1e-3


def test_evaluation_without_the_z_loss_says_so(tmp_path, caplog):
    losses.logger.warning_once.__func__.cache_clear()
    losses.logger.propagate = True
    trainer = sft(kinds.model("llama", z_loss_coefficient=1e-2), tmp_path)
    with caplog.at_level(logging.WARNING):
        trainer.evaluate(trainer.train_dataset)
    assert "The loss of a fused LM head is without `z_loss_coefficient`" in caplog.text


# Preferences


@pytest.mark.tool("TRL: DPO", package="trl")
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("kind", kinds.DECODERS)
def test_dpo(kind, adapter, tmp_path):
    from trl import DPOConfig, DPOTrainer

    reference = kinds.model(kind)
    trainer = DPOTrainer(
        model=copy.deepcopy(reference), ref_model=None if adapter else copy.deepcopy(reference),
        args=DPOConfig(output_dir=str(tmp_path), **{**OPTIONS, "max_steps": 12, "learning_rate": 1e-2, "beta": 0.5}),
        train_dataset=preferences(), processing_class=kinds.tokenizer(), peft_config=lora() if adapter else None,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        # By the formula, from the logits of the plain forward; the policy is the reference still.
        logits = reference(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        completion = batch["completion_mask"][:, 1:].bool()
        log_probs = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        expected = (log_probs * completion).sum(1)
        chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
        assert (torch.cat((chosen, rejected)) - expected).abs().max() < 1e-5 * expected.abs().max()
        assert abs(trainer.compute_loss(trainer.model, dict(batch)) - F.softplus(torch.zeros(()))) < 1e-5
    trainer.train()
    assert sum(seen_losses(trainer)[-3:]) < 0.5 * sum(seen_losses(trainer)[:3])


# The trainers of a stock class with the same weights, on the same seeds: losses, and the weights at the end.


def beside_stock(model, folder, run):
    """
    Trained as a variant and as its native type, both from folders, as TRL loads reference models from there.

    Returns:
        the variant's trainer; the losses of both; the largest distance of a weight, by that of its training.
    """
    start, trainers = to_native(model), []
    for name, built in (("variant", model), ("native", start)):
        built.save_pretrained(folder / name)
        torch.manual_seed(0)
        trainer = run(type(built).from_pretrained(folder / name), folder / f"{name} trained")
        trainer.train()
        trainers.append(trainer)
    ours, stock = to_native(trainers[0].model).state_dict(), trainers[1].model.state_dict()
    moved = max((stock[name] - tensor).abs().max() for name, tensor in start.state_dict().items())
    assert moved > 1e-3
    apart = max((ours[name] - tensor).abs().max() for name, tensor in stock.items())
    return trainers[0], [seen_losses(trainer) for trainer in trainers], (apart / moved).item()


# Not Adam, which makes whole steps of what is zero but for rounding; GPT-NeoX's products are others.
DESCENT = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
APART = {"llama": (0, 0), "gemma2": (0, 0), "gpt-neox": (1e-5, 1e-3)}


def check_beside_stock(kind, losses_seen, apart):
    of_losses, of_weights = APART[kind]
    assert all(abs(ours - stock) <= of_losses for ours, stock in zip(*losses_seen, strict=True)), losses_seen
    assert apart <= of_weights


@pytest.mark.tool("TRL: KTO", package="trl")
@pytest.mark.parametrize("kind", kinds.DECODERS)
def test_kto(kind, tmp_path):
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    examples = Dataset.from_list([
        {"prompt": pair["prompt"], "completion": pair[label], "label": label == "chosen"}
        for pair in preferences() for label in ("chosen", "rejected")
    ])  # fmt: skip

    def run(model, folder):
        options = {**OPTIONS, **DESCENT, "max_steps": 6, "per_device_train_batch_size": 4}
        return KTOTrainer(
            model=model, ref_model=copy.deepcopy(model), args=KTOConfig(output_dir=str(folder), **options),
            train_dataset=examples, processing_class=kinds.tokenizer(),
        )  # fmt: skip

    _, losses_seen, apart = beside_stock(kinds.model(kind), tmp_path, run)
    # Of a policy that is its reference.
    assert losses_seen[0][0] == 0.5
    assert losses_seen[0][-1] < losses_seen[0][0]
    check_beside_stock(kind, losses_seen, apart)


@pytest.mark.tool("TRL: reward model", package="trl")
@pytest.mark.parametrize("kind", [*kinds.DECODERS, "encoder"])
def test_reward(kind, tmp_path):
    from trl import RewardConfig, RewardTrainer

    def run(model, folder):
        return RewardTrainer(
            model=model, args=RewardConfig(output_dir=str(folder), **{**OPTIONS, **DESCENT, "max_steps": 4}),
            train_dataset=preferences(), processing_class=kinds.tokenizer(),
        )  # fmt: skip

    start = kinds.model(kind, VariantForSequenceClassification, num_labels=1)
    trainer = run(copy.deepcopy(start), tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        # Each row alone, without padding.
        scores = [start(ids[mask.bool()][None]).logits[0, 0]
                  for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]  # fmt: skip
        chosen, rejected = torch.stack(scores).chunk(2)
        expected = F.softplus(rejected - chosen).mean()
        assert abs(trainer.compute_loss(trainer.model.eval(), dict(batch)) - expected) < 1e-5 * expected
    if kind == "encoder":
        trainer.train()
        assert seen_losses(trainer)[-1] < seen_losses(trainer)[0]
        return
    _, losses_seen, apart = beside_stock(start, tmp_path, run)
    assert losses_seen[0][-1] < 0.5 * losses_seen[0][0]
    check_beside_stock(kind, losses_seen, apart)


@pytest.mark.tool("TRL: GRPO", package="trl")
@pytest.mark.parametrize("kind", kinds.DECODERS)
def test_grpo(kind, tmp_path):
    """With a reference model, several steps per generation and a reward that only the words decide."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    written = {}

    def repetitions(completions, trainer_state, **_):
        written.setdefault(len(written), completions)
        return [float(len(words := text.split()) - len(set(words))) for text in completions]

    def run(model, folder):
        written.clear()
        options = {name: value for name, value in OPTIONS.items() if name != "max_length"}
        options |= {"per_device_train_batch_size": 4, "num_generations": 4, "num_iterations": 2, "beta": 0.1,
                    "max_completion_length": 8, "max_steps": 6, **DESCENT}  # fmt: skip
        return GRPOTrainer(
            model=model, reward_funcs=repetitions, args=GRPOConfig(output_dir=str(folder), **options),
            train_dataset=Dataset.from_list([{"prompt": f"{question} sees the dog ?"} for question in ANSWERS]),
            processing_class=kinds.tokenizer(),
        )  # fmt: skip

    trainer, losses_seen, apart = beside_stock(kinds.model(kind), tmp_path, run)
    assert len({*written[0]}) > 1
    assert any(losses_seen[0])
    assert any(entry.get("kl", 0) > 0 for entry in trainer.state.log_history)
    check_beside_stock(kind, losses_seen, apart)
