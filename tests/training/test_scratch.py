import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hycam.data.prompts import prompt_text
from hycam.data.synthetic import general_text
from hycam.data.tokenization import encode_prompt
from hycam.errors import InputError
from hycam.training.scratch import ScratchConfig, train_scratch_backbone, train_tokenizer

SMALL = {
    "num_documents": 300,
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "steps": 30,
    "batch_size": 4,
    "sequence_length": 32,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return train_scratch_backbone(ScratchConfig(**SMALL), tmp_path_factory.mktemp("run"), seed=0)


def test_trains_and_saves_what_from_pretrained_reads(folder):
    assert {"model.safetensors", "tokenizer.json", "config.json", "training.json"} <= {f.name for f in folder.iterdir()}
    record = json.loads((folder / "training.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    assert record["parameters"] == model.num_parameters()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(text)["input_ids"][:32] for text in general_text(60, seed=9) if len(text) > 120])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert record["first_loss"] == pytest.approx(torch.log(torch.tensor(300.0)).item(), abs=0.3)
    assert record["last_loss"] < record["first_loss"] - 1.0
    assert loss < record["first_loss"] - 1.0, "text that it never saw"
    ends = model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id
    assert ends == (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.tie_word_embeddings


def test_same_seed_same_weights_and_the_caller_s_random_state_stays(folder, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = train_scratch_backbone(ScratchConfig(**SMALL), tmp_path, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.name == folder.name
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    other = train_scratch_backbone(ScratchConfig(**SMALL), tmp_path, seed=1)
    assert other.name != folder.name
    assert (other / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()


def test_is_trained_once_per_settings(folder, monkeypatch):
    def fail(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr("hycam.training.scratch._train", fail)
    assert train_scratch_backbone(ScratchConfig(**SMALL), folder.parent, seed=0) == folder
    with pytest.raises(AssertionError, match="trained again"):
        train_scratch_backbone(ScratchConfig(**SMALL | {"steps": 31}), folder.parent, seed=0)


def test_a_killed_training_leaves_nothing_to_take(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    config = ScratchConfig(**SMALL | {"steps": 1})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", kill)
        train_scratch_backbone(config, tmp_path, seed=0)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".unfinished"]
    folder = train_scratch_backbone(config, tmp_path, seed=0)
    assert list(tmp_path.iterdir()) == [folder]
    assert (folder / "tokenizer.json").is_file()


def test_tokenizer_round_trips_and_chats():
    tokenizer = train_tokenizer(general_text(500, seed=0), ScratchConfig())
    text = 'def f(x):\n    return x * 12  # été, 数\n- "a"'
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer("12345", add_special_tokens=False)["input_ids"]) == 5, "one token a digit"
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    prompt = prompt_text(row, "chat", tokenizer)
    turns = [{"role": "user", "content": "Add.\n\n1 and 2"}, {"role": "assistant", "content": "3"}]
    encoded = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    answer = [i for i, kept in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if kept]
    assert prompt == f"{tokenizer.bos_token}User: Add.\n\n1 and 2\nAssistant:"
    assert tokenizer.decode(answer) == " 3" + tokenizer.eos_token
    assert encoded["input_ids"] == encode_prompt(prompt, tokenizer) + answer


def test_reads_a_corpus_of_json_lines(tmp_path):
    path = tmp_path / "corpus.jsonl"
    texts = [f"zebra {n} quagga {n % 7} zebra" for n in range(400)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = ScratchConfig(**SMALL | {"corpus": str(path), "num_documents": 350, "steps": 2})
    folder = train_scratch_backbone(config, tmp_path, seed=0)
    assert json.loads((folder / "training.json").read_text())["documents"] == 350
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer("zebra quagga", add_special_tokens=False)["input_ids"]) <= 4
    path.write_text(path.read_text().replace("quagga 3", "quagga 4"))
    assert train_scratch_backbone(config, tmp_path, seed=0) != folder, "other text, other backbone"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "a"}\n{"text": \n', r"corpus\.jsonl:2: not JSON"),
        ('{"text": "a"}\n{"txt": "b"}\n', r"corpus\.jsonl:2: text: None given"),
        ('["a"]\n', r"corpus\.jsonl:1: text: None given"),
        ('{"text": "short"}\n', "tokens in 1 documents, wanted at least batch_size x sequence_length = 128"),
        (None, "can't be read as JSON Lines of text: .*No such file"),
    ],
)
def test_a_wrong_corpus_is_named(tmp_path, lines, message):
    path = tmp_path / "corpus.jsonl"
    if lines is not None:
        path.write_text(lines)
    with pytest.raises(InputError, match=message):
        train_scratch_backbone(ScratchConfig(**SMALL | {"corpus": str(path)}), tmp_path, seed=0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps: got 0, wanted at least 1"),
        ("vocab_size", 258, "vocab_size: got 258, wanted at least 259"),
        ("hidden_size", 30, "hidden_size: got 30, wanted a multiple of 2 x num_attention_heads = 4"),
        ("num_key_value_heads", 3, "num_key_value_heads: got 3, wanted a divisor of num_attention_heads = 2"),
        ("sequence_length", 65, "sequence_length: got 65, wanted 2 to max_position_embeddings = 64"),
        ("sequence_length", 1, "sequence_length: got 1, wanted 2 to"),
        ("learning_rate", 0.0, "learning_rate: got 0.0, wanted a positive number"),
        ("learning_rate", float("nan"), "learning_rate: got nan, wanted a positive number"),
    ],
)
def test_wrong_settings_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        ScratchConfig(**SMALL | {field: value})


def test_every_step_has_the_gradient_of_its_own_batch_alone(monkeypatch, tmp_path):
    held = []
    step = torch.optim.AdamW.step

    def recorded(optimizer, *args, **kwargs):
        held.append([parameter.grad.clone() for parameter in optimizer.param_groups[0]["params"]])
        return step(optimizer, *args, **kwargs)

    # With a learning rate of next to nothing the weights stay, so one batch again and again has one gradient.
    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_: None)
    monkeypatch.setattr("hycam.training.scratch._batches", lambda sequences, *_: iter([sequences[:4]] * 3))
    train_scratch_backbone(ScratchConfig(**SMALL | {"steps": 3, "learning_rate": 1e-12}), tmp_path, seed=0)
    assert len(held) == 3
    for later in held[1:]:
        torch.testing.assert_close(later, held[0], rtol=1e-4, atol=1e-6)
