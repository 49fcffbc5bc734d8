"""What this package uses of others beyond their documented interface, and whether the installed versions still have it.

A name stands here as ``module:qualified.name``, with the parameters that it must take: private ones, methods that a
subclass here overrides or calls, and names of modules that a package doesn't document.
"""

import importlib
import importlib.metadata
import inspect
import warnings
from collections.abc import Iterator, Mapping

from hycam_kernels.versions import release

# The newest release of each that the whole of the tests passed with. A newer one is taken as it is, and looked through
# for the names below.
NEWEST_TESTED = {"transformers": "5.24.0", "peft": "0.21.2"}

# package -> what would break -> name -> the parameters that it must take
RELIANCES: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "peft": {
        "adding a HyCAM adapter": {
            "peft.mapping:PEFT_TYPE_TO_CONFIG_MAPPING": "",
            "peft.mapping:PEFT_TYPE_TO_TUNER_MAPPING": "",
            "peft.mapping:PEFT_TYPE_TO_PREFIX_MAPPING": "",
            "peft.config:PeftConfigMixin.__post_init__": "",
            "peft.tuners.tuners_utils:BaseTuner._check_new_adapter_config": "config",
            "peft.tuners.tuners_utils:BaseTuner._check_target_module_exists": "peft_config key",
            "peft.tuners.tuners_utils:BaseTuner._create_and_replace": "adapter_name target target_name parent",
            "peft.tuners.tuners_utils:BaseTuner._get_learnable_bias_state_dict": "",
            "peft.tuners.tuners_utils:BaseTuner._prepare_adapter_config": "peft_config model_config",
            "peft.tuners.tuners_utils:BaseTuner._prepare_model": "peft_config model",
            "peft.tuners.tuners_utils:BaseTuner._replace_module": "parent child_name new_module child",
            "peft.tuners.tuners_utils:BaseTuner.inject_adapter": "model adapter_name autocast_adapter_dtype",
            "peft.tuners.tuners_utils:BaseTunerLayer._move_adapter_to_device_of_base_layer": "adapter_name device",
            "peft.tuners.tuners_utils:BaseTunerLayer.adapter_layer_names": "",
            "peft.tuners.tuners_utils:BaseTunerLayer.other_param_names": "",
        },
        "which parameters of a HyCAM adapter train": {
            "peft.tuners.tuners_utils:BaseTuner._mark_only_adapters_as_trainable": "model",
        },
        "switching an adapter off and taking it away": {
            "peft:PeftModel._enable_peft_forward_hooks": "",
            "peft.tuners.tuners_utils:BaseTuner.disable_adapter_layers": "",
            "peft.tuners.tuners_utils:BaseTuner.unload": "",
        },
        "merging, and its refusal": {
            "peft.tuners.tuners_utils:BaseTuner._check_merge_allowed": "",
            "peft.tuners.tuners_utils:BaseTunerLayer.merge": "safe_merge adapter_names",
            "peft.tuners.tuners_utils:BaseTunerLayer.unmerge": "",
            "peft.tuners.tuners_utils:check_adapters_to_merge": "module adapter_names",
        },
        "saving, loading and exchanging adapters": {
            "peft.config:PeftConfigMixin.save_pretrained": "save_directory",
            "peft.tuners.tuners_utils:BaseTuner._remove_adapter_name_from_key": "key adapter_name",
            "peft.utils:AuxiliaryTrainingWrapper": "",
            "peft.utils:CONFIG_NAME": "",
            "peft.utils:ModulesToSaveWrapper": "",
            "peft.utils:SAFETENSORS_WEIGHTS_NAME": "",
            "peft.utils.save_and_load:get_peft_model_state_dict": "model state_dict adapter_name",
            "peft.utils.save_and_load:load_peft_weights": "model_id device",
            "peft.utils.save_and_load:set_peft_model_state_dict": "model peft_model_state_dict adapter_name",
        },
    },
    "transformers": {
        "the optimizer of a run": {
            "transformers.trainer:Trainer.create_optimizer": "model",
        },
        "the order of a run's rows": {
            "transformers.trainer:Trainer._get_train_sampler": "train_dataset",
            "transformers.trainer_pt_utils:get_length_grouped_indices": "lengths batch_size generator",
        },
        "the loss of a step, its log and its end where it isn't finite": {
            "transformers.trainer:Trainer.compute_loss": "model inputs return_outputs num_items_in_batch",
            "transformers.trainer:Trainer.get_batch_samples": "",
            "transformers.trainer:Trainer.log": "logs start_time",
            "transformers.trainer:Trainer.train": "resume_from_checkpoint",
            "transformers.trainer:Trainer.training_step": "model inputs",
            "transformers.trainer:DEFAULT_PROGRESS_CALLBACK": "",
        },
        "the balance loss's weight under trainers": {
            "transformers.loss.loss_utils:ForCausalLMLoss": "logits labels shift_labels",
            "transformers.loss.loss_utils:LOSS_MAPPING": "",
            "transformers.trainer:Trainer.get_tp_size": "",
        },
        "backbones in files and in the hub's cache": {
            "transformers.utils:CONFIG_NAME": "",
            "transformers.utils:GENERATION_CONFIG_NAME": "",
            "transformers.utils:SAFE_WEIGHTS_NAME": "",
            "transformers.utils:cached_file": "path_or_repo_id filename",
        },
        "validation in a run": {
            "transformers.trainer:Trainer._determine_best_metric": "metrics trial",
            "transformers.trainer:Trainer._evaluate": "trial ignore_keys_for_eval skip_scheduler",
            "transformers.trainer:Trainer._finalize_training": "",
            "transformers.trainer:Trainer._run_epoch": "",
            "transformers.trainer:Trainer.evaluate": "eval_dataset ignore_keys metric_key_prefix",
        },
        "checkpoints, and going on from one": {
            "transformers.trainer:Trainer._get_output_dir": "trial",
            "transformers.trainer:Trainer._load_best_model": "",
            "transformers.trainer:Trainer._load_from_checkpoint": "resume_from_checkpoint model",
            "transformers.trainer:Trainer._prepare_for_training": "",
            "transformers.trainer:Trainer._save": "output_dir state_dict",
            "transformers.trainer:Trainer._save_checkpoint": "model trial",
            "transformers.trainer:Trainer.save_model": "output_dir _internal_call",
            "transformers.trainer_callback:ExportableState.state": "",
            "transformers.trainer_callback:TrainerState": "",
            "transformers.trainer_utils:PREFIX_CHECKPOINT_DIR": "",
            "transformers.trainer_utils:rotate_checkpoints": "output_dir save_total_limit best_model_checkpoint",
        },
        "FSDP on CPUs and DeepSpeed": {
            "transformers.integrations:is_deepspeed_zero3_enabled": "",
            "transformers.trainer:Trainer.create_accelerator_and_postprocess": "",
        },
        "the checks of a recipe": {
            "transformers.integrations:get_available_reporting_integrations": "",
            "transformers.trainer_utils:IntervalStrategy": "",
            "transformers.trainer_utils:SaveStrategy": "",
            "transformers.utils.peft_utils:find_adapter_config_file": "model_id",
        },
        "liger's kernels": {"transformers.integrations.liger:apply_liger_kernel": "model kernel_config"},
        "MultiLoRA and MoE-LoRA on GPT-2": {"transformers.pytorch_utils:Conv1D": ""},
    },
    "accelerate": {
        "FSDP on CPUs": {
            "accelerate.utils:DistributedType.FSDP": "",
            "accelerate.utils:FullyShardedDataParallelPlugin.set_mixed_precision": "mixed_precision",
        },
    },
    "datasets": {
        "the cache of tokens": {"datasets.arrow_writer:ArrowWriter": "features path"},
    },
    "torch": {
        "hycam plan": {
            "torch._subclasses.fake_tensor:FakeTensor": "",
            "torch._subclasses.fake_tensor:FakeTensorMode": "",
            "torch.utils._python_dispatch:TorchDispatchMode": "",
            "torch.utils._pytree:tree_leaves": "tree",
        },
        "DeepSpeed's time limit": {"torch.distributed.distributed_c10d:_set_pg_timeout": "timeout group"},
        "the op under torch.func": {"torch._C:_are_functorch_transforms_active": ""},
    },
    "triton": {
        "builds of kernels without a GPU, and tuning": {
            "triton.backends.compiler:GPUTarget": "",
            "triton.compiler:ASTSource": "",
            "triton.testing:do_bench": "fn",
        },
    },
}


def broken(package: str) -> Iterator[str]:
    """A line for each name that the installed version of `package` lacks or that takes other parameters; imports it."""
    found = f"{package} {importlib.metadata.version(package)}"
    for use, names in RELIANCES[package].items():
        for name, wanted in names.items():
            module, path = name.split(":")
            try:
                value = importlib.import_module(module)
                for attribute in path.split("."):
                    value = getattr(value, attribute)
            except (ImportError, AttributeError):
                yield f"{found} has no {name}: {use} may not work"
                continue
            if missing := set(wanted.split()) - _parameters(value if wanted else None):
                yield f"{found}: {name} takes no {', '.join(sorted(missing))}: {use} may not work"


def warn_where_broken(package: str) -> None:
    """Warn, where `package` is newer than the newest that was tested, of what it lacks."""
    installed, tested = importlib.metadata.version(package), NEWEST_TESTED[package]
    if release(installed) > release(tested):
        for line in broken(package):
            warnings.warn(f"{line}; {package} {tested} is the newest that was tested", stacklevel=2)


def _parameters(value: object) -> set[str]:
    return set(inspect.signature(value).parameters) if callable(value) else set()
