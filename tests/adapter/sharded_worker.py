"""One of two processes that train a sharded model on the same batch; prints its deviation from an unsharded model.

Arguments: fsdp2, zero2 or zero3; the kind of checkpointing; and settings of the adapter to turn on.
"""

import sys

import torch
import torch.distributed as dist

from tests.adapter.builders import adapted_model, batch, gradients, largest_error

LR = 0.1
STEPS = 3


def built(checkpointing="none", settings=()):
    model = adapted_model(noise="never", balance_coef=1.0, **dict.fromkeys(settings, True))
    if checkpointing != "none":
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"}
        )
        model.enable_input_require_grads()
    return model


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def fsdp2(checkpointing, settings):
    from torch.distributed.fsdp import fully_shard

    wanted = built(settings=settings)
    wanted(**batch()).loss.backward()
    model = built(checkpointing, settings)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model(**batch()).loss.backward()
    got = {name: gradient.full_tensor() for name, gradient in gradients(model).items()}
    return largest_error(got, gradients(wanted))


def zero(stage, checkpointing, adapter_settings):
    import deepspeed

    wanted = built(settings=adapter_settings)
    optimizer = torch.optim.SGD(trainable(wanted), lr=LR)
    for _ in range(STEPS):
        wanted(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model = built(checkpointing, adapter_settings)
    settings = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_clipping": 1e9,
        "zero_allow_untested_optimizer": True,
        # Every parameter is really sharded, and released as soon as it may be.
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_model_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        },
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(trainable(model), lr=LR),
        config=settings,
        model_parameters=trainable(model),
    )
    for _ in range(STEPS):
        engine.backward(engine(**batch()).loss)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        got = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
        return largest_error(got, {name: p.detach() for name, p in wanted.named_parameters() if p.requires_grad})


def main():
    kind, checkpointing, *settings = sys.argv[1:]
    dist.init_process_group("gloo")
    error = fsdp2(checkpointing, settings) if kind == "fsdp2" else zero(int(kind[-1]), checkpointing, settings)
    if dist.get_rank() == 0:
        print("error", error)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
