from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from hycam.data.collation import Collator
from hycam.data.packing import pack_dataset
from hycam.errors import InputError
from tests.models import tiny_model


def token_rows(lengths, seed=0, prompt=1):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(3, 128, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * min(prompt, length - 1) + ids[min(prompt, length - 1) :]})
    return Dataset.from_list([row | {"task_id": 0} for row in rows])


def unpack(packed):
    """The rows inside the bins, found by the positions."""
    rows = []
    for bin_ in packed:
        starts = [i for i, position in enumerate(bin_["position_ids"]) if position == 0] + [len(bin_["input_ids"])]
        for start, end in pairwise(starts):
            assert bin_["position_ids"][start:end] == list(range(end - start))
            rows.append((bin_["input_ids"][start:end], bin_["labels"][start:end]))
    return rows


def test_bins_hold_every_row_once_and_whole():
    dataset = token_rows([1 + (7 * i) % 50 for i in range(300)], prompt=0)
    packed = pack_dataset(dataset, 60)
    assert packed.column_names == ["input_ids", "labels", "position_ids"]
    assert max(map(len, packed["input_ids"])) <= 60
    expected = sorted((row["input_ids"], [-100, *row["labels"][1:]]) for row in dataset)
    assert sorted(unpack(packed)) == expected
    tokens = sum(map(len, dataset["input_ids"]))
    assert len(packed) <= 1.05 * tokens / 60 + 1


def test_deterministic_and_in_the_order_of_the_rows():
    dataset = token_rows([3, 2, 5, 6, 3])
    packed = pack_dataset(dataset, 8)
    assert packed.to_list() == pack_dataset(dataset, 8).to_list()
    # 6, then 5, then the first 3 with the 5, the other 3 alone, 2 where it fits exactly
    ids = dataset["input_ids"][:]
    assert packed["input_ids"][:] == [ids[0] + ids[2], ids[1] + ids[3], ids[4]]
    assert [len(ids) for ids in pack_dataset(token_rows([8, 8]), 8)["input_ids"]] == [8, 8]


def test_row_longer_than_a_bin():
    with pytest.raises(InputError, match="row 1 has 9 tokens, wanted at most max_length 8"):
        pack_dataset(token_rows([8, 9]), 8)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_packed_logits_and_loss_equal_the_unpacked(family, attention):
    model = tiny_model(family, attn_implementation=attention)
    dataset = token_rows([9, 4, 13, 1, 7, 2], prompt=2)
    packed = pack_dataset(dataset, 16)
    assert len(packed) < len(dataset)
    batch = Collator(0, packing=True)(packed.to_list())
    assert batch["input_ids"].shape == (1, 36)
    padded = Collator(0)(dataset.to_list())
    with torch.no_grad():
        together = model(**batch, use_cache=False)
        alone = model(**padded, use_cache=False)
    torch.testing.assert_close(together.loss, alone.loss, rtol=1e-5, atol=1e-6)

    ends = [i for i, position in enumerate(batch["position_ids"][0].tolist()) if position == 0] + [36]
    logits_of = {
        tuple(ids.tolist()): logits
        for start, end in pairwise(ends)
        for ids, logits in [(batch["input_ids"][0, start:end], together.logits[0, start:end])]
    }
    for i, row in enumerate(dataset):
        length = len(row["input_ids"])
        torch.testing.assert_close(logits_of[tuple(row["input_ids"])], alone.logits[i, :length], rtol=1e-4, atol=1e-5)


def test_neighbours_do_matter_to_the_model():
    """The equality above says something: without restarting positions, rows see their neighbours."""
    model = tiny_model("llama")
    batch = Collator(0, packing=True)(token_rows([9, 4, 13]).to_list())
    with torch.no_grad():
        apart = model(**batch, use_cache=False).logits
        batch["position_ids"] = torch.arange(26)[None]
        mixed = model(**batch, use_cache=False).logits
    torch.testing.assert_close(apart[:, :9], mixed[:, :9], rtol=1e-4, atol=1e-5)
    assert (apart - mixed)[:, 9:].abs().max() > 0.1


@pytest.mark.parametrize("bins", [True, False])
def test_first_token_of_a_row_is_no_target(bins):
    """With the loss on the prompt too, the loss is the mean over the rows' own targets and nothing else."""
    model = tiny_model("llama")
    dataset = token_rows([5, 3, 6], prompt=0)
    rows = pack_dataset(dataset, 14).to_list() if bins else dataset.to_list()
    batch = Collator(0, packing=True)(rows)
    with torch.no_grad():
        loss = model(**batch, use_cache=False).loss
        losses = []
        for row in dataset:
            ids = torch.tensor([row["input_ids"]])
            logits = model(input_ids=ids, use_cache=False).logits
            losses.append(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
    torch.testing.assert_close(loss, sum(losses) / (4 + 2 + 5), rtol=1e-5, atol=1e-6)


def test_gradients_do_not_cross_rows():
    model = tiny_model("llama")
    batch = Collator(0, packing=True)(token_rows([5, 6]).to_list())
    embeddings = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    batch["labels"][:, 5:] = -100
    model(inputs_embeds=embeddings, **batch, use_cache=False).loss.backward()
    assert embeddings.grad[0, :4].abs().min(dim=0).values.max() > 0
    assert torch.equal(embeddings.grad[0, 5:], torch.zeros_like(embeddings.grad[0, 5:]))


def test_trainer_keeps_packed_rows_apart(tmp_path):
    """`Trainer` switches the key-value cache off, so the borders count in training and in evaluation."""
    model = tiny_model("llama")
    assert model.config.use_cache
    dataset = token_rows([9, 4, 13, 1, 7, 2], prompt=2)
    with torch.no_grad():
        expected = model(**Collator(0)(dataset.to_list()), use_cache=False).loss.item()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        learning_rate=0.0,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    packed = pack_dataset(dataset, 16)
    trainer = Trainer(model, arguments, Collator(0, packing=True), train_dataset=packed, eval_dataset=packed)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
