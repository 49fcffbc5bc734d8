"""What a plan follows, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hycam_cli
from hycam.errors import InputError
from hycam.planning.engines import ENGINES, engine_of
from hycam.planning.plan import plan_memory
from hycam.study.recipe import load_study
from hycam.training.callbacks import read_metrics
from hycam.training.engines import packaged_engines
from hycam.training.method import MethodConfig
from hycam.training.prepare import adapted
from hycam_cli import main
from tests.models import tiny_config
from tests.planning.cases import config, recipe
from tests.study.studies import save_study, study_values
from tests.training.runs import recipe_values, rows, save_backbone, save_recipe, save_rows, save_tokenizer

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only there a process reads what it holds from /proc")


def plan(run=None, *, engine=None, world_sizes=(1,), shape=None):
    run = run or recipe()
    plans = plan_memory(run, shape or config(), engine_of(run, engine), list(world_sizes))
    return plans if len(plans) > 1 else plans[0]


def test_the_parser_knows_the_engines():
    assert hycam_cli.ENGINES == ENGINES


def test_counts_are_the_modules_own():
    found = plan(shape=config("gemma2"))
    r, d, experts, layers = 16, 128, 4, 2
    assert found.trained == layers * (d * d + experts * (2 * r * d + r * r) + experts * d)
    assert found.gradients == 4 * found.trained
    # AdamW: two moments, and a float32 step for each parameter
    assert found.optimizer == 2 * found.gradients + 4 * 5 * layers
    assert found.to_dict()["sum"] == found.sum == found.parameters + 3 * found.gradients + 40 + found.activations


@pytest.mark.timeout(60)
def test_a_plan_takes_as_long_for_a_million_experts():
    experts, r, d, layers = 10**6, 4, 128, 2
    found = plan(recipe(method={"r": r, "num_experts": experts}), shape=config())
    assert found.trained == layers * (d * d + experts * (2 * r * d + r * r + d))


def test_sizes_beyond_any_memory_are_refused():
    with pytest.raises(InputError, match=r"^method: "):
        plan(recipe(method={"r": 10**12}))


def test_replicas_share_nothing_and_shards_everything():
    one, two, eight = plan(engine="ddp", world_sizes=(1, 2, 8))
    assert (two.parameters, two.optimizer) == (eight.parameters, eight.optimizer) == (one.parameters, one.optimizer)
    assert (one.buckets, two.buckets) == (0, two.gradients)
    run = recipe()
    run.method.options["num_experts"] = 8  # what is stacked over experts is sharded by experts
    one, two, eight = plan(run, engine="fsdp2", world_sizes=(1, 2, 8))
    for part in ("parameters", "gradients", "optimizer"):
        assert getattr(one, part) == pytest.approx(8 * getattr(eight, part), rel=0.03)
    assert one.activations == eight.activations


def test_precision():
    fp32, mixed = plan(recipe("float32")), plan(recipe("bfloat16"))
    pure = recipe("bfloat16")
    pure.method.autocast_adapter_dtype = False
    pure = plan(pure)
    assert fp32.dtypes == {"backbone": "float32", "adapter": "float32", "products": "float32"}
    assert mixed.dtypes == {"backbone": "bfloat16", "adapter": "float32", "products": "bfloat16"}
    assert pure.dtypes == {"backbone": "bfloat16", "adapter": "bfloat16", "products": "bfloat16"}
    assert fp32.gradients == mixed.gradients == 2 * pure.gradients
    assert fp32.parameters > mixed.parameters > pure.parameters
    assert fp32.activations > mixed.activations
    autocast = plan(recipe("float32", bf16=True))
    assert autocast.dtypes["products"] == "bfloat16"
    assert (autocast.parameters, autocast.gradients) == (fp32.parameters, fp32.gradients)
    zero = plan(recipe("float32", bf16=True), engine="zero2", world_sizes=(2,))
    assert zero.parameters * 2 == pytest.approx(fp32.parameters, rel=0.01)


def test_activations_follow_batch_length_and_checkpointing():
    small, wide = plan(recipe()), plan(recipe(per_device_train_batch_size=8))
    assert wide.activations == pytest.approx(2 * small.activations, rel=0.05)
    assert plan(recipe(gradient_checkpointing=True)).saved_activations < 0.6 * small.saved_activations
    packed = recipe()
    packed.data.packing = True
    assert plan(packed).activations > 0.8 * small.activations


@pytest.mark.parametrize(
    ("optim", "states"), [("sgd", 0), ("adamw_torch", 2), ("adamw_torch_fused", 2), ("rmsprop", 1)]
)
def test_optimizer_state_is_the_optimizers_own(optim, states):
    found = plan(recipe(optim=optim))
    assert found.optimizer == pytest.approx(states * found.gradients, rel=0.01)


def test_a_factored_optimizer_state_follows_the_shapes():
    assert plan(recipe(optim="adafactor")).optimizer < 0.1 * plan(recipe()).optimizer


def test_an_offloaded_optimizer_is_the_hosts(tmp_path):
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 100}
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    here, there = plan(engine="zero2"), plan(recipe(deepspeed=str(file)))
    assert (there.engine, there.optimizer, there.gradients) == ("zero2", 0, 0)
    assert there.host > here.optimizer
    assert there.buckets == 400


def test_deepspeeds_numbers_may_be_transformers_own():
    found = plan(
        recipe(deepspeed={"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto", "overlap_comm": True}})
    )
    assert found.buckets == 2 * 4 * 128**2


def test_deepspeeds_settings_that_ship():
    for name, file in packaged_engines().items():
        named = plan(recipe(deepspeed=name), world_sizes=(4,))
        assert named == plan(recipe(deepspeed=str(file)), world_sizes=(4,))
        assert named.engine == name.removesuffix("_offload")
        assert (named.host > 0, named.optimizer == 0) == (name.endswith("_offload"),) * 2
    # its own settings, not the defaults of the engine that has its name
    assert plan(recipe(deepspeed="zero2")).buckets == 2 * plan(engine="zero2").buckets


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
@pytest.mark.parametrize("name", ["lora", "multilora", "moelora"])
def test_every_adapter_is_planned(name, engine):
    one, four = plan(recipe("bfloat16", method={"name": name, "r": 8}), engine=engine, world_sizes=(1, 4))
    model = adapted(AutoModelForCausalLM.from_config(config()), MethodConfig(name, options={"r": 8}))
    assert (one.trained, one.total) == model.get_nb_trainable_parameters()
    assert one.dtypes["adapter"] == "float32"
    assert one.activations > one.saved_activations > 0
    assert (four.gradients < 0.5 * one.gradients) == (engine != "ddp")


def test_full_fine_tuning_is_planned_without_an_adapter():
    found = plan(recipe("bfloat16", method={"name": "full"}))
    assert found.trained == found.total == AutoModelForCausalLM.from_config(config()).num_parameters()
    assert found.dtypes == {"backbone": "bfloat16", "products": "bfloat16"}
    assert found.gradients == 2 * found.total
    two = plan(recipe("bfloat16", method={"name": "full"}), engine="zero2", world_sizes=(2,))
    assert two.gradients == pytest.approx(found.total, rel=0.01)


@pytest.mark.parametrize(
    ("name", "engine"),
    [("riemoe", "zero1"), ("riemoe", "zero3"), ("riemoe", "fsdp2"), ("full", "zero3"), ("full", "fsdp2")],
)
def test_refuses_what_a_run_would_refuse(name, engine):
    with pytest.raises(InputError, match=f"method.name: {name}"):
        plan(recipe(method={"name": name}), engine=engine, world_sizes=(2,))


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"torch_compile": True}, "trainer.torch_compile: got True, which can't be planned"),
        ({"optim": "adamw_bnb_8bit"}, "trainer.optim: got .*adamw_bnb_8bit, which can't be planned"),
        ({"deepspeed": {}, "fsdp": True, "fsdp_config": {"version": 1}}, "trainer.fsdp_config.version: got 1"),
        (
            {"fsdp": True, "fsdp_config": {"fsdp_cpu_offload": True}},
            "trainer.fsdp_config.cpu_offload: got True",
        ),
        (
            {"fsdp": True, "fsdp_config": {"activation_checkpointing": True}},
            "trainer.fsdp_config.activation_checkpointing: got True",
        ),
        ({"deepspeed": "absent.json"}, "trainer.deepspeed: 'absent.json' is neither a file nor one that ships"),
        ({"deepspeed": __file__}, "trainer.deepspeed: .*test_plan.py: can't be read"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, "zero_optimization.stage: got 0"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}},
            "zero_optimization.offload_param: got .*cpu.*, which can't be planned",
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}},
            "zero_optimization.offload_optimizer: only cpu can be planned",
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}},
            "zero_optimization.zero_hpz_partition_size: got 8, which can't be planned",
        ),
    ],
)
def test_refusals_name_what_cannot_be_planned(trainer, message):
    with pytest.raises(InputError, match=message):
        plan(recipe(**trainer))


def test_refuses_a_family_whose_step_does_not_run_on_fake_tensors():
    """The experts' grouped product in float32, which a CPU and a GPU compute and fake tensors don't."""
    with pytest.raises(
        InputError, match=r"^backbone: got Qwen3MoeForCausalLM in torch.float32, which can't be planned: "
    ):
        plan(shape=config("qwen3_moe"))


@pytest.mark.parametrize(("field", "value"), [("liger", True), ("quantization", "bnb-4bit")])
def test_refuses_backbones_that_cannot_be_built_on_fake_tensors(field, value):
    run = recipe()
    setattr(run.backbone, field, value)
    with pytest.raises(InputError, match=f"backbone.{field}: got .*, which can't be planned"):
        plan(run)


def test_refuses_more_tokens_than_positions():
    run = recipe()
    run.data.max_length = 129
    with pytest.raises(InputError, match=r"data.max_length: 129 given, the backbone has 128 positions"):
        plan(run)


def test_nothing_is_allocated():
    # ten billion parameters
    shape = tiny_config(hidden_size=8192, intermediate_size=65536, num_hidden_layers=4, vocab_size=256000)
    found = plan(recipe("bfloat16"), shape=shape)
    assert found.parameters > 14 * 2**30
    assert torch.zeros(1).item() == 0  # the mode is left


@pytest.fixture
def planned(tmp_path):
    tiny_config().save_pretrained(tmp_path / "backbone")  # a configuration without weights or tokenizer
    values = recipe_values(tmp_path, tmp_path / "backbone")
    return str(save_recipe(tmp_path, values)), tmp_path


def test_the_command_prints_a_table_and_json(planned, capsys):
    path, folder = planned
    files = sorted(folder.rglob("*"))
    assert main(["plan", path, "--world-size", "1", "8", "--engine", "zero3"]) == 0
    table = capsys.readouterr().out
    for text in ("zero3: GiB per GPU", "1 GPU", "8 GPUs", "optimizer state", "activations", "4 rows of 64 tokens"):
        assert text in table
    assert main(["plan", path, "--world-size", "2", "--json", "--data.max_length", "32"]) == 0
    (shorter,) = json.loads(capsys.readouterr().out)
    assert main(["plan", path, "--world-size", "2", "--json"]) == 0
    (longer,) = json.loads(capsys.readouterr().out)
    assert shorter["engine"] == "ddp"
    assert shorter["activations"] < longer["activations"]
    assert longer["sum"] == sum(
        longer[part] for part in ("parameters", "gradients", "optimizer", "activations", "gathered", "buckets")
    )
    assert sorted(folder.rglob("*")) == files


def test_a_study_is_planned_method_by_method(tmp_path, capsys):
    tiny_config().save_pretrained(tmp_path / "backbone")
    path = str(save_study(tmp_path, study_values(tmp_path, tmp_path / "backbone")))
    assert main(["plan", path, "--world-size", "1", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {backbone: list(methods) for backbone, methods in found.items()} == {"tiny": ["lora", "hycam"]}
    run = load_study(path).recipe("tiny", "lora", fold=0, seed=0, learning_rate=1.0, folder=".")
    assert found["tiny"]["lora"] == [plan.to_dict() for plan in plan_memory(run, tiny_config(), engine_of(run), [1, 2])]
    assert main(["plan", path]) == 0
    table = capsys.readouterr().out
    for text in ("tiny, ddp: GiB per GPU", "│ lora", "│ hycam", f"{found['tiny']['hycam'][0]['trained']:,}"):
        assert text in table


def test_a_study_that_ships_is_planned_without_the_hub(capsys):
    assert (
        main(["plan", "study_small", "--json", "--data.max_length", "16", "--trainer.per_device_train_batch_size", "1"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)


def test_a_backbone_from_scratch_is_planned_untrained(capsys):
    assert main(["plan", "demo", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["total"] > 900_000


@pytest.mark.parametrize("world_size", ["0", "-1", "two"])
def test_world_sizes_are_counts(world_size, capsys):
    with pytest.raises(SystemExit) as status:
        main(["plan", "demo", "--world-size", world_size])
    assert status.value.code == 2
    assert "wanted an integer of 1 or more" in capsys.readouterr().err or world_size == "-1"


def _planned_and_measured(path):
    """Bytes that a run on a CPU is planned with, and those that it had, each in a process of its own."""

    def hycam(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "hycam", *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    (planned,) = json.loads(hycam("plan", str(path), "--json"))
    hycam("train", str(path))
    return planned, max(line.get("peak_bytes", 0) for line in read_metrics(path.parent / "run" / "metrics.jsonl"))


@on_linux
def test_a_run_on_a_cpu_holds_what_was_planned_with_its_packages(tmp_path):
    """Most of a small run's memory is that of the process itself."""
    backbone = save_backbone(tmp_path / "backbone")
    planned, measured = _planned_and_measured(save_recipe(tmp_path, recipe_values(tmp_path, backbone)))
    assert planned["process"] > 2**28
    assert planned["on_cpu"] == pytest.approx(measured, rel=0.05)


@on_linux
def test_what_is_held_free_on_a_cpu_is_told(tmp_path, capsys):
    tiny_config().save_pretrained(tmp_path / "backbone")
    path = str(save_recipe(tmp_path, recipe_values(tmp_path, tmp_path / "backbone")))
    assert main(["plan", path, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["on_cpu"] - found["sum"] - found["process"] == pytest.approx(found["activations"] / 6, abs=1)
    assert main(["plan", path]) == 0
    said, later = " ".join(capsys.readouterr().out.split()), found["activations"] / 2**30
    assert f"over many steps up to about {later:.3f} more that glibc's allocator holds free" in said


@pytest.mark.slow
@on_linux
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("method", "limit"), [("hycam", 0.07), ("lora", 0.15)])
def test_a_run_of_smollm2s_size_holds_what_was_planned(method, limit, dtype, tmp_path):
    """What the allocator holds free is no one share: least beside HyCAM in float32, most beside LoRA in it."""
    sizes = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
    shape = tiny_config(hidden_size=576, vocab_size=49152, max_position_embeddings=256, **sizes)
    tokenizer = save_tokenizer(tmp_path / "backbone")
    shape.eos_token_id, shape.pad_token_id, shape.bos_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id, None
    AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype)).save_pretrained(tmp_path / "backbone")
    values = recipe_values(tmp_path, tmp_path / "backbone", data={"max_length": 192})
    values["backbone"] |= {"dtype": dtype, "attn_implementation": "sdpa"}
    values["method"] = {"name": method}
    values["trainer"] |= {"max_steps": 3, "eval_strategy": "no", "save_strategy": "no"}
    for task in values["tasks"]:
        save_rows(Path(task["source"]), [row | {"output": row["output"] * 40} for row in rows(40)])
    planned, measured = _planned_and_measured(save_recipe(tmp_path, values))
    assert planned["on_cpu"] == pytest.approx(measured, rel=limit)
