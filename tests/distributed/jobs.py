"""What the processes of `tests.distributed.ranks` do: a step whose gradient is kept, or a command of `hycam`."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import hycam.training.resume as resuming
from hycam.data.collation import Collator
from hycam.evaluation.perplexity import evaluate_perplexity
from hycam.training.adapters import keeps_dtype
from hycam.training.callbacks import SaveOnSignal
from hycam.training.engines import join_processes, packaged_engines
from hycam.training.recipe import BackboneConfig, Recipe
from hycam.training.trainer import HyCAMTrainer
from hycam_cli import main
from tests.adapter.builders import adapted_model, by_saved_name

# Every parameter in parts, and let go as soon as it may be.
EVERYTHING_PARTED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_model_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
_PAD = 0


class GradientAsWeight(torch.optim.Optimizer):
    """A step that puts every gradient in its parameter's place, whatever part of them an engine hands over."""

    def __init__(self, params: Any, lr: float = 0.0, **_: Any) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.copy_(parameter.grad)


class _KeepsBatches(HyCAMTrainer):
    """Notes each micro-batch, with the state of the generator that its noise is drawn from."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kept: list[dict[str, Any]] = []

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.kept.append({"random_state": torch.get_rng_state(), "inputs": dict(inputs)})
        return super().training_step(model, inputs, *args, **kwargs)


def setting_name(engine: str, checkpointing: str, accumulation: int, dtype: str, loss: str) -> str:
    return f"{engine}-{checkpointing}-{accumulation}-{dtype}-{loss}"


def step_model(dtype: str) -> Any:
    return adapted_model(dtype=getattr(torch, dtype), balance_coef=1.0, noise="train")


def step_rows(accumulation: int) -> Dataset:
    """One step's rows, all of different lengths; two processes with micro-batches of two rows lack one at its end."""
    count = 4 * accumulation - 1
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 128, (4 + row,), generator=generator).tolist() for row in range(count)]
    labels = [[-100] * (len(row) // 3) + row[len(row) // 3 :] for row in rows]
    return Dataset.from_dict({"input_ids": rows, "labels": labels})


def engine_fields(engine: str) -> dict[str, Any]:
    """The recipe's `trainer` fields of an engine, such that it parts even the smallest parameter."""
    if engine == "fsdp2":
        return {"fsdp": True}
    if engine.startswith("zero"):
        settings = json.loads(packaged_engines()[engine].read_text(encoding="utf-8"))
        if settings["zero_optimization"]["stage"] == 3:
            settings["zero_optimization"] |= EVERYTHING_PARTED
        return {"deepspeed": settings}
    assert engine == "ddp"
    return {}


def loss_outside(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    """The model's own loss, made where no gradient of it tells the balance loss its scale."""
    logits = outputs["logits"][:, :-1].float().flatten(0, 1)
    return cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def gradient(folder: Path, *, engine: str, checkpointing: str, accumulation: int, dtype: str, loss: str) -> int:
    """One step; leaves the gradients as an adapter's weights, and each rank's micro-batches, in a folder.

    `loss` is "model" for the model's own, "outside" for the same one made by the trainer.
    """
    folder = folder / setting_name(engine, checkpointing, accumulation, dtype, loss)
    trainer_fields: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 1,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": dtype == "bfloat16" and engine.startswith("zero"),
        **engine_fields(engine),
    }
    if checkpointing != "none":
        trainer_fields |= {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing == "reentrant"},
        }
    recipe = Recipe(BackboneConfig("unused"), output_dir=str(folder), trainer=trainer_fields, seed=3)
    trainer = _KeepsBatches(
        model=step_model(dtype),
        args=recipe.training_arguments(),
        train_dataset=step_rows(accumulation),
        data_collator=Collator(_PAD),
        validation={"unused": step_rows(1)},
        evaluation_collator=Collator(_PAD),
        on_signal=SaveOnSignal(),
        prepare_optimizer=lambda optimizer, model: None,
        optimizer_cls_and_kwargs=(GradientAsWeight, {}),
        compute_loss_func=loss_outside if loss == "outside" else None,
    )
    trainer.train()
    _check_parted(trainer, engine)
    trainer.save_model(str(folder))
    assert trainer.state.global_step == 1
    _check_file(trainer, folder, dtype)
    torch.save(trainer.kept, folder / f"rank{trainer.args.process_index}.pt")
    return 0


def _check_parted(trainer: HyCAMTrainer, engine: str) -> None:
    """Every parameter is in parts where the engine's are, and the engine is the one that the recipe names."""
    parameters = list(trainer.adapted.parameters())
    if engine == "fsdp2":
        assert all(parameter.placements[0].is_shard() for parameter in parameters)
    elif engine == "ddp":
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    else:
        stage = int(engine.removeprefix("zero")[0])
        assert trainer.deepspeed.zero_optimization_stage() == stage
        assert all((parameter.numel() == 0) == (stage == 3) for parameter in parameters)


def _check_file(trainer: HyCAMTrainer, folder: Path, dtype: str) -> None:
    """The file's weights are the engine's, to the bit, and in a plain model they give the engine's model's very logits.

    In the dtype that they have, as `load_run` loads them; and as PEFT does by default, in float32, where gradients are
    taken and a weight is rounded to the products' dtype.
    """
    engine = _engine_weights(trainer)
    trainer.accelerator.wait_for_everyone()
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved.keys() == engine.keys()
    assert all(torch.equal(saved[name], engine[name].to(saved[name].dtype)) for name in saved)
    batch = {"input_ids": torch.arange(3, 40)[None]}
    model = trainer.adapted.eval()
    with torch.no_grad():
        inferred = model(**batch).logits
    got = model(**batch).logits
    unset_hf_deepspeed_config()  # else the plain model is in parts too
    plain = step_model(dtype)
    plain.load_adapter(str(folder), "default")
    torch.testing.assert_close(plain.eval()(**batch).logits, got, rtol=0, atol=0)
    base = plain.unload()
    plain = PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=not keeps_dtype(folder, base))
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(**batch).logits, inferred, rtol=0, atol=0)


def _engine_weights(trainer: HyCAMTrainer) -> dict[str, torch.Tensor]:
    """The adapter's weights by their names in a file: DeepSpeed's float32 ones, gathered, or FSDP2's whole."""
    if trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_get_full_fp32_param as whole
    else:

        def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
            return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter

    named = ((name, parameter) for name, parameter in trainer.adapted.named_parameters() if "hycam_" in name)
    return by_saved_name((name, whole(parameter).detach().cpu()) for name, parameter in named)


def hycam(folder: Path, *, arguments: list[str], fault: dict[str, Any] | None = None, status: int = 0) -> int:
    """A command of `hycam`, which is to end with `status`; 0 where it did.

    `fault` is what befalls one `rank` at one `step`: `"signal"` (SIGTERM), `"hang"`, or `"kill"` while it saves.
    """
    undo = [] if fault is None or fault["rank"] != int(os.environ["RANK"]) else _plant(fault)
    ended = main(arguments)
    for target, name, original in undo:
        setattr(target, name, original)
    return 0 if ended == status else ended or 97


def apart(folder: Path, *, arguments: list[str]) -> int:
    """A command of `hycam` that is to be refused; each rank's own number stands for `{rank}` in its arguments."""
    resuming._SEEN_WITHIN = 1.0
    return 0 if main([argument.format(rank=os.environ["RANK"]) for argument in arguments]) == 2 else 97


def _plant(fault: dict[str, Any]) -> list[tuple[Any, str, Any]]:
    if fault["kind"] == "kill":
        save = HyCAMTrainer._save_rng_state

        def killed(self: HyCAMTrainer, output_dir: str) -> None:
            if self.state.global_step == fault["step"]:
                os.kill(os.getpid(), signal.SIGKILL)
            save(self, output_dir)

        HyCAMTrainer._save_rng_state = killed
        return [(HyCAMTrainer, "_save_rng_state", save)]
    step = HyCAMTrainer.training_step

    def disturbed(self: HyCAMTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step + 1 == fault["step"]:
            if fault["kind"] == "hang":
                time.sleep(fault["seconds"])
                os._exit(96)
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    HyCAMTrainer.training_step = disturbed
    return [(HyCAMTrainer, "training_step", step)]


def evaluate(folder: Path, *, row_counts: dict[str, int], batch_size: int) -> int:
    """A perplexity that the processes part, beside one that each makes by itself; and the rows of each forward."""
    join_processes({"use_cpu": True})
    model = step_model("float32")
    tasks = {name: step_rows(2).select(range(count)) for name, count in row_counts.items()}
    forwards: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: forwards.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    progress: list[int] = []
    found = {}
    for distributed in (False, True):
        forwards.clear()
        progress.clear()
        found[str(distributed)] = evaluate_perplexity(
            model, tasks, Collator(_PAD), batch_size=batch_size, progress=progress.append, distributed=distributed
        )
    values = {"found": found, "forwards": forwards, "progress": progress}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(values), encoding="utf-8")
    return 0


JOBS = {"apart": apart, "evaluate": evaluate, "gradient": gradient, "hycam": hycam}
