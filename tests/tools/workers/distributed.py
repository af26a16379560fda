"""
What two processes compute beside what one does; run by `torch.distributed.run`, see `tests/tools/launch.py`.

    tests.tools.workers.distributed COMMAND FOLDER NAME...

For every kind or shape of that name rank 0 writes `FOLDER/NAME.txt`: empty where all is equal, or the traceback.
"""

import copy
import datetime
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from hf_variants.model.block import Block
from tests.tools import shapes


def relative_error(value: torch.Tensor, expected: torch.Tensor, noise: float = 0.0) -> float:
    """Largest difference in standard deviations, of no less than `noise`: some gradients are zero but for rounding."""
    assert value.shape == expected.shape, (value.shape, expected.shape)
    scale = (expected.std() if expected.numel() > 1 else expected.abs()).clamp(min=noise)
    return ((value - expected).abs().max() / scale).item()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_gradients(model, reference, tolerance: float) -> None:
    expected, found = (
        {name: whole(parameter.grad) for name, parameter in each.named_parameters() if parameter.grad is not None}
        for each in (reference, model)
    )
    assert set(found) == set(expected), set(found) ^ set(expected)
    noise = 1e-3 * max(gradient.std().item() for gradient in expected.values() if gradient.numel() > 1)
    errors = {name: relative_error(found[name], expected[name], noise) for name in expected}
    worst = max(errors, key=errors.get)
    assert errors[worst] < tolerance, (worst, errors[worst])


def save_once(model, folder: Path) -> Path:
    """Saved by rank 0, seen by both."""
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return folder


def assert_same_weights(folder: Path, reference) -> None:
    """What lies in `folder` loads as `reference` in one process, bit for bit."""
    again = type(reference).from_pretrained(folder)
    expected = reference.state_dict()
    assert set(again.state_dict()) == set(expected)
    different = [name for name, tensor in again.state_dict().items() if not torch.equal(tensor, expected[name])]
    assert not different, different


def generate(model, batch: dict[str, torch.Tensor], **options) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(batch["input_ids"], max_new_tokens=12, min_new_tokens=12, do_sample=False, **options)


def tensor_parallel(kind: str, folder: Path) -> None:
    """Logits, gradients, tokens from the cache, and what is saved."""
    from transformers.distributed import DistributedConfig

    reference, batch = shapes.model(kind), shapes.batch(kind)
    path = save_once(reference, folder / "whole")
    config = DistributedConfig(tp_plan="auto", tp_size=2)
    model = type(reference).from_pretrained(path, distributed_config=config)
    sharded = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    assert any(".q_proj." in name for name in sharded), sharded
    with torch.no_grad():
        error = relative_error(model(**batch).logits, reference(**batch).logits)
    assert error < 1e-5, error
    outputs, expected = model(**batch), reference(**batch)
    assert relative_error(outputs.logits, expected.logits) < 1e-5
    outputs.loss.backward()
    expected.loss.backward()
    assert_same_gradients(model, reference, 1e-3)
    if reference.can_generate():
        tokens = generate(reference, batch)
        for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(generate(model, batch, **options), tokens), options
    model.save_pretrained(folder / "saved")
    assert_same_weights(folder / "saved", reference)


def pipeline_parallel(kind: str, folder: Path) -> None:
    """Logits on both ranks and tokens, with and without the cache and padding."""
    from transformers.distributed import DistributedConfig

    reference, batch = shapes.model(kind), shapes.batch(kind)
    path = save_once(reference, folder / "whole")
    model = type(reference).from_pretrained(path, distributed_config=DistributedConfig(pp_size=2))
    owned = sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert 0 < owned < sum(parameter.numel() for parameter in reference.model.layers.parameters())
    with torch.no_grad():
        error = relative_error(model(batch["input_ids"]).logits, reference(batch["input_ids"]).logits)
    assert error < 1e-6, error
    padding = torch.ones_like(batch["input_ids"])
    padding[0, :5] = 0
    for mask in (None, padding):
        tokens = generate(reference, batch, attention_mask=mask)
        for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(generate(model, batch, attention_mask=mask, **options), tokens), options


STEPS = 3


def step_alone(reference, batch) -> list[float]:
    """Losses of gradient descent in one process, on the whole batch."""
    optimizer = make_optimizer(reference)
    losses = []
    for _ in range(STEPS):
        loss = reference(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def make_optimizer(model) -> torch.optim.Optimizer:
    # Not Adam, which makes steps of full size from gradients that are zero but for rounding.
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def own_half(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.chunk(2)[dist.get_rank()] for name, tensor in batch.items()}


def train_with(kind: str, folder: Path, fsdp_plugin=None) -> None:
    """Steps through accelerate: losses, the weights at the end, and what is saved."""
    from accelerate import Accelerator, DistributedType
    from accelerate.state import AcceleratorState, PartialState
    from torch.distributed.fsdp import FSDPModule

    AcceleratorState._reset_state()
    PartialState._reset_state()
    accelerator = Accelerator(cpu=True, fsdp_plugin=fsdp_plugin)
    if fsdp_plugin is not None:
        # accelerate looks at the plugin on accelerators only and takes DDP on a CPU; what follows runs there as well.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = fsdp_plugin
    reference, batch = shapes.model(kind), shapes.batch(kind, rows=4)
    path = save_once(reference, folder / "whole")
    start = copy.deepcopy(reference.state_dict())
    reference.train()
    expected = step_alone(reference, batch)

    model = type(reference).from_pretrained(path).train()
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    if fsdp_plugin is not None:
        units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
        layers = [name for name, module in model.named_modules() if isinstance(module, Block)]
        assert layers, layers
        assert set(layers) < set(units), units
    for step in range(STEPS):
        # As Trainer does: a cache would be filled again where activations are recomputed.
        loss = model(**own_half(batch), use_cache=False).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        assert_mean(loss, expected[step])
    # What accelerate gathers on accelerators is still in shards on a CPU.
    state = {name: whole(tensor) for name, tensor in accelerator.get_state_dict(model).items()}
    accelerator.unwrap_model(model).save_pretrained(
        folder / "saved", is_main_process=accelerator.is_main_process, state_dict=state
    )
    accelerator.wait_for_everyone()
    trained = type(reference).from_pretrained(folder / "saved").state_dict()
    assert_trained(trained, reference)
    still = [name for name, tensor in start.items() if tensor.ndim > 1 and torch.equal(trained[name], tensor)]
    assert not still, still


def fsdp2(kind: str, folder: Path) -> None:
    """Blocks are wrapped by `_no_split_modules`."""
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    train_with(kind, folder, plugin)


def fsdp2_sparing(kind: str, folder: Path) -> None:
    """The same with activation checkpointing, and with weights that rank 0 sends to the others."""
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", activation_checkpointing=True,
        cpu_ram_efficient_loading=True,
    )  # fmt: skip
    train_with(kind, folder, plugin)


def ddp(kind: str, folder: Path) -> None:
    train_with(kind, folder)


def batch_statistics(name: str, folder: Path) -> None:
    """Norms over a batch go by the process's own share, as torch's do; before a step DDP hands out rank 0's running ones."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    def step(model, rank: int) -> float:
        share = {name: tensor.chunk(2)[rank] for name, tensor in batch.items()}
        loss = model(**share, use_cache=False).loss
        loss.backward()
        return loss.item()

    batch, rank = shapes.batch(name, rows=4), dist.get_rank()
    for wrap in (DistributedDataParallel, fully_shard):
        alone = [shapes.model(name).train() for _ in range(2)]
        losses = [step(model, rank) for rank, model in enumerate(alone)]
        for one, two in zip(*(model.parameters() for model in alone), strict=True):
            if one.grad is not None:
                one.grad = (one.grad + two.grad) / 2
        model = shapes.model(name).train()
        inner, whole = model, wrap(model)
        assert abs(step(whole, rank) - losses[rank]) < 1e-5
        assert_same_gradients(inner, alone[0], 1e-3)
        assert_same_statistics(inner, alone[rank])
        if wrap is DistributedDataParallel:
            # Both go on from what rank 0 has seen.
            expected = copy.deepcopy(alone[0])
            step(expected, rank)
            step(whole, rank)
            assert_same_statistics(inner, expected)


def assert_same_statistics(model, reference) -> None:
    expected = {name: buffer for name, buffer in reference.named_buffers() if ".running_" in name}
    assert expected
    for name, buffer in model.named_buffers():
        if name in expected:
            torch.testing.assert_close(buffer, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def trainer_fsdp2(kind: str, folder: Path) -> None:
    """transformers' Trainer: losses, the weights at the end, and a sharded checkpoint from which another one goes on."""
    from accelerate import DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from torch.distributed.fsdp import FSDPModule
    from transformers import Trainer, TrainingArguments

    class TrainerOnCPU(Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            # accelerate looks at the plugin on accelerators only and takes DDP on a CPU; what follows runs there as well.
            self.accelerator.state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    AcceleratorState._reset_state()
    PartialState._reset_state()
    reference, batch = shapes.model(kind), shapes.batch(kind, rows=4)
    path = save_once(reference, folder / "whole")
    reference.train()
    expected = step_alone(reference, batch)
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]

    def trainer(**options) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(folder / "run"), fsdp="full_shard",
            fsdp_config={"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "cpu_ram_efficient_loading": False,
                         "state_dict_type": "SHARDED_STATE_DICT"},
            use_cpu=True, per_device_train_batch_size=2, max_steps=STEPS, optim="sgd", optim_args="momentum=0.9",
            learning_rate=0.05, lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, report_to=[],
            disable_tqdm=True, dataloader_pin_memory=False, **options,
        )  # fmt: skip
        return TrainerOnCPU(type(reference).from_pretrained(path), arguments, train_dataset=rows)

    def assert_saves(run: Trainer, where: Path) -> None:
        # What accelerate gathers on accelerators is still in shards on a CPU.
        state = {name: whole(tensor) for name, tensor in run.accelerator.get_state_dict(run.model_wrapped).items()}
        run.accelerator.unwrap_model(run.model_wrapped).save_pretrained(
            where, is_main_process=run.is_world_process_zero(), state_dict=state
        )
        dist.barrier()
        assert_trained(type(reference).from_pretrained(where).state_dict(), reference)

    run = trainer(save_strategy="steps", save_steps=1)
    run.train()
    assert any(isinstance(module, FSDPModule) for module in run.model_wrapped.modules())
    assert all(isinstance(parameter, DTensor) for parameter in run.model_wrapped.parameters())
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert max(abs(ours - alone) for ours, alone in zip(losses, expected, strict=True)) < 1e-4, (losses, expected)
    assert_saves(run, folder / "saved")

    again = trainer(save_strategy="no")
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-1"))
    assert again.state.global_step == STEPS
    assert_saves(again, folder / "resumed")


def fsdp_plan(kind: str, folder: Path) -> None:
    """FSDP2 by transformers' own plan, without accelerate."""
    from transformers.distributed import DistributedConfig

    reference, batch = shapes.model(kind), shapes.batch(kind, rows=4)
    path = save_once(reference, folder / "whole")
    reference.train()
    expected = step_alone(reference, batch)
    model = type(reference).from_pretrained(path, distributed_config=DistributedConfig(fsdp_size=2)).train()
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = make_optimizer(model)
    for step in range(STEPS):
        loss = model(**own_half(batch), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_mean(loss, expected[step])
    model.save_pretrained(folder / "saved")
    assert_trained(type(reference).from_pretrained(folder / "saved").state_dict(), reference)


def assert_mean(loss: torch.Tensor, expected: float) -> None:
    """Over the ranks."""
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    assert abs(mean.item() / 2 - expected) < 1e-5, (mean.item() / 2, expected)


def zero3(kind: str, folder: Path) -> None:
    """Parameters are in parts wherever no module is at work; transformers loads them so."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    # DeepSpeed would compile an all-reduce through shared memory, which needs a compiler and a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    reference, batch = shapes.model(kind), shapes.batch(kind, rows=4)
    path = save_once(reference, folder / "whole")
    reference.train()
    expected = step_alone(reference, batch)

    settings = {
        "train_micro_batch_size_per_gpu": 2,
        # Every parameter is taken apart, however small.
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    # transformers looks for it as long as it lives.
    partitioning = HfDeepSpeedConfig(settings)
    model = type(reference).from_pretrained(path).train()
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=settings)
    for step in range(STEPS):
        loss = engine(**own_half(batch), use_cache=False).loss
        engine.backward(loss)
        engine.step()
        assert_mean(loss, expected[step])
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del partitioning
    assert_trained(state, reference)
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "saved", state_dict=state)
        assert_trained(type(reference).from_pretrained(folder / "saved").state_dict(), reference)
    dist.barrier()


def assert_trained(state: dict[str, torch.Tensor], reference) -> None:
    """Every tensor is what it has become in one process."""
    expected = reference.state_dict()
    assert set(state) == set(expected), set(state) ^ set(expected)
    errors = {name: relative_error(state[name], tensor, 1e-3) for name, tensor in expected.items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] < 1e-4, (worst, errors[worst])


def memory(name: str, folder: Path) -> None:
    """
    What a rank holds after a step is what `cost` says: `NAME` is a way to spread a model, and its kind or shape. Of the
    ranks of a stage, the one that holds most.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from transformers.distributed import DistributedConfig

    from hf_variants.cost import Plan
    from hf_variants.cost.memory import rank_memory
    from hf_variants.cost.parameters import structure

    way, kind = name.split(" ", 1)
    reference, batch = shapes.model(kind), shapes.batch(kind)
    expected = rank_memory(structure(reference.config, type(reference).__name__), Plan(**{way: 2}), "float32")
    model = reference.train()
    if way in ("tp", "pp"):
        path = save_once(reference, folder / "whole")
        options = {"tp_plan": "auto", "tp_size": 2} if way == "tp" else {"pp_size": 2}
        model = type(reference).from_pretrained(path, distributed_config=DistributedConfig(**options)).train()
    elif way == "fsdp":
        for module in model.modules():
            if isinstance(module, Block):
                fully_shard(module)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    if way == "pp":
        # transformers' pipeline is one for inference: what a step would leave is laid down.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    else:
        model(**batch, use_cache=False).loss.backward()
    optimizer.step()
    states = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.ndim]
    found = {
        "weights": held(list(model.parameters())),
        "gradients": held([parameter.grad for parameter in model.parameters() if parameter.grad is not None]),
        "optimizer": held(states),
    }
    gathered: list[dict[str, int]] = [{}, {}]
    dist.all_gather_object(gathered, found)
    for stage, rank in enumerate(expected):
        for what in found:
            most = gathered[stage][what] if way == "pp" else max(each[what] for each in gathered)
            said = getattr(rank, what)
            assert abs(most - said) <= 0.02 * said, (name, stage, what, most, said)


def held(tensors: list[torch.Tensor]) -> int:
    """Bytes of this rank's part, each storage once."""
    own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in own if tensor.numel()}.values())


COMMANDS = (
    tensor_parallel, pipeline_parallel, fsdp2, fsdp2_sparing, trainer_fsdp2, fsdp_plan, ddp, zero3, memory,
    batch_statistics,
)  # fmt: skip


def main(name_of_command: str, folder: str, *names: str) -> None:
    command = {function.__name__: function for function in COMMANDS}[name_of_command]
    torch.set_num_threads(1)
    # A rank that is left alone in a collective is told so before the test's own limit.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    for name in names:
        problem = ""
        try:
            command(name, Path(folder) / "files" / name)
        except Exception:
            problem = f"rank {dist.get_rank()}: {traceback.format_exc()}"
            # Should the other rank be in another collective by now, this is all that is left.
            print(problem, file=sys.stderr, flush=True)
        problems: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        if dist.get_rank() == 0:
            (Path(folder) / f"{name}.txt").write_text("\n".join(filter(None, problems)), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
