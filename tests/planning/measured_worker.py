"""One of several processes that train under an engine and print the bytes that they hold."""

import gc
import json
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from hycam.training.prepare import adapted
from tests.planning.cases import batch, config, deepspeed, recipe


def local(tensor):
    """A sharded tensor's part in this process."""
    tensor = getattr(tensor, "ds_tensor", tensor)
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()


def storages(tensors):
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr():
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def alive(model):
    """Bytes of every tensor that Python or a parameter's gradient holds."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter)]
    gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
    shards = [local(p) for p in model.parameters()]
    return storages([*tensors, *gradients, *shards])


def measure(engine, dtype):
    before = alive(torch.nn.Module())
    model = AutoModelForCausalLM.from_config(config(), dtype=getattr(torch, dtype))
    model = adapted(model, recipe(dtype).method).train()
    step = model
    masters = []
    if engine.startswith("zero"):
        import deepspeed as ds

        trained = [p for p in model.parameters() if p.requires_grad]
        step, optimizer, *_ = ds.initialize(
            model=model,
            optimizer=torch.optim.AdamW(trained),
            config=deepspeed(int(engine[-1]), dtype),
            model_parameters=trained,
        )
        masters = (
            optimizer.single_partition_of_fp32_groups if engine != "zero3" else optimizer.fp32_partitioned_groups_flat
        )
        states = optimizer.optimizer.state
        del trained
    else:
        if engine == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            for layer in model.get_base_model().model.layers:
                fully_shard(layer)
            fully_shard(model)
        elif engine == "ddp":
            step = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        states = optimizer.state
    bytes_of = {"parameters": storages([*map(local, model.parameters()), *model.buffers()])}
    for _ in range(2):  # in the second cycle the optimizer has its state
        held, gradients = [], []
        for _ in range(2):
            loss = step(**batch()).loss
            step.backward(loss) if engine.startswith("zero") else loss.backward()
            del loss
            held.append(alive(model) - before)
            gradients.append(storages(gradients_of(model, engine, optimizer)))
            if engine.startswith("zero"):
                step.step()
        if not engine.startswith("zero"):
            optimizer.step()
            optimizer.zero_grad()
    state = [local(value) for entry in states.values() for value in entry.values() if torch.is_tensor(value)]
    bytes_of |= {"gradients": max(gradients), "optimizer": storages([*masters, *state]), "held": max(held)}
    if engine.startswith("zero"):
        step.destroy()
    return bytes_of


def gradients_of(model, engine, optimizer):
    if engine == "zero3":
        return [optimizer.grad_partitions_flat_buffer]
    found = [local(p.grad) for p in model.parameters() if p.grad is not None]
    if engine == "zero2":
        for part in optimizer.averaged_gradients.values():
            found += [part] if torch.is_tensor(part) else part or []
    return found


def main():
    dist.init_process_group("gloo")
    for case in sys.argv[1:]:
        measured = measure(*case.split(":"))
        if dist.get_rank() == dist.get_world_size() - 1:
            print("measured", json.dumps([case, measured]), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
