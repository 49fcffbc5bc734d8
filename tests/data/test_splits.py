import json

import pytest
from datasets import Dataset

from hycam.data.config import DataConfig, StreamingConfig, TaskConfig
from hycam.data.splits import never_tested, split_dataset
from hycam.data.tokenization import tokenize_dataset
from hycam.errors import InputError
from hycam.training.tasks import load_rows, tokenize_split
from tests.data.tokenizers import byte_tokenizer

PARTS = ("train", "validation", "test")


def rows(number):
    return [{"instruction": f"question {i}", "input": f"{i % 7}", "output": f"answer {i}"} for i in range(number)]


def parts_of(dataset, fold=0):
    return {part: set(split["output"][:]) for part, split in split_dataset(dataset, fold).items()}


def test_seven_two_one():
    split = split_dataset(Dataset.from_list(rows(4000)))
    assert tuple(split) == PARTS
    assert sum(map(len, split.values())) == 4000
    shares = [len(split[part]) / 4000 for part in PARTS]
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.02)  # a bin's share has a deviation of 0.005


def test_half_of_the_validation_rows_are_tested_by_no_fold():
    dataset = Dataset.from_list(rows(600))
    tested = set().union(*(parts_of(dataset, fold)["test"] for fold in range(5)))
    untested = never_tested(dataset, "instruction")["output"]
    assert tested | set(untested) == set(dataset["output"]) and not tested & set(untested)
    assert len(tested) == pytest.approx(300, abs=50)


def test_order_of_the_file_does_not_matter_and_is_kept():
    dataset = Dataset.from_list(rows(500))
    assert parts_of(dataset) == parts_of(dataset.shuffle(seed=1))
    answers = [int(answer.split()[1]) for answer in split_dataset(dataset)["train"]["output"]]
    assert answers == sorted(answers)
    more = Dataset.from_list(rows(900))
    assert all(parts_of(dataset)[part] <= parts_of(more)[part] for part in PARTS)


def test_folds_are_made_of_ten_bins():
    dataset = Dataset.from_list(rows(1000))
    folds = [parts_of(dataset, fold) for fold in range(5)]
    everything = set(dataset["output"][:])
    for fold in folds:
        assert fold["train"] | fold["validation"] | fold["test"] == everything
        assert sum(len(fold[part]) for part in PARTS) == 1000
    # Validation covers every row once; a fold's test bin is the first validation bin of the next fold.
    assert sum(len(fold["validation"]) for fold in folds) == 1000
    assert set().union(*(fold["validation"] for fold in folds)) == everything
    for fold, following in zip(folds, [*folds[1:], folds[0]], strict=True):
        assert fold["test"] < following["validation"]
    assert not set.intersection(*(fold["test"] for fold in folds[:2]))


def questions(count, rows_of_each=3):
    """Comparisons as WebGPT's: one question, each time with other quotes and another answer."""
    return Dataset.from_list(
        [
            {"instruction": f"Why is {n}?", "input": f"quote {n}.{i}", "output": f"answer {n}.{i}"}
            for n in range(count)
            for i in range(rows_of_each)
        ]
    )


@pytest.mark.parametrize("fold", range(5))
def test_no_question_is_in_two_parts_whatever_its_input(fold):
    split = split_dataset(questions(400), fold)
    asked = {part: set(split[part]["instruction"]) for part in PARTS}
    assert sum(map(len, asked.values())) == 400
    assert not asked["test"] & asked["train"]


def test_case_and_spacing_make_no_other_question():
    texts = [("Why is {}?", ""), ("  WHY  is\t{}?\n", "quote")]
    rows = [
        {"instruction": text.format(n), "input": context, "output": f"{n}"}
        for n in range(200)
        for text, context in texts
    ]
    parts = parts_of(Dataset.from_list(rows))
    assert not parts["train"] & parts["test"] and not parts["train"] & parts["validation"]


def test_one_instruction_over_many_inputs_is_split_by_the_prompt():
    rows = [{"instruction": "Translate.", "input": f"text {n % 150}", "output": f"{n}"} for n in range(300)]
    with pytest.raises(InputError, match="no row of 300 falls to the"):
        split_dataset(Dataset.from_list(rows))
    split = split_dataset(Dataset.from_list(rows), split_by="prompt")
    inputs = {part: set(split[part]["input"]) for part in PARTS}
    assert sum(map(len, inputs.values())) == 150 and all(inputs.values())


def test_prompt_fields_are_kept_apart():
    """`("a", "b")` and `("ab", "")` are other prompts: they must not always share a bin."""
    joined = [f"{i}" for i in range(200)]
    left = Dataset.from_list([{"instruction": f"x{i}", "input": "", "output": i} for i in joined])
    right = Dataset.from_list([{"instruction": "x", "input": i, "output": i} for i in joined])
    left, right = (set(split_dataset(rows, split_by="prompt")["train"]["output"]) for rows in (left, right))
    assert left != right


@pytest.mark.parametrize("streamed", [False, True])
def test_an_instruction_that_heads_many_rows_is_warned_of(tmp_path, caplog, streamed):
    rows = [{"instruction": f"ask {n}", "input": "", "output": "yes"} for n in range(180)]
    rows += [{"instruction": "Translate.", "input": f"{n}", "output": "no"} for n in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(streaming=StreamingConfig() if streamed else None)
    load_rows([TaskConfig("mine", str(path))], config)
    assert (
        "mine: one instruction heads 20 of 200 rows (10%), which all fall to one part: the task's split_by"
        in caplog.text
    )
    caplog.clear()
    load_rows([TaskConfig("mine", str(path), split_by="prompt")], config)
    assert not caplog.text


def test_token_rows_on_disk_are_those_of_the_split(tmp_path):
    """The same rows, split otherwise, are other token rows of the part."""
    rows = [{"instruction": f"ask {n % 60}", "input": f"{n}", "output": "yes"} for n in range(120)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(cache_dir=str(tmp_path / "cache"))
    for split_by in ("prompt", "instruction"):
        loaded = load_rows([TaskConfig("mine", str(path), split_by=split_by)], config)
        tokens = tokenize_split(loaded, "test", byte_tokenizer(), config)["mine"]
        alone = tokenize_dataset(loaded["mine"].split("test"), byte_tokenizer(), config, 0).dataset
        assert tokens["input_ids"][:] == alone["input_ids"][:]


def test_bins_never_change():
    """Published results depend on them."""
    split = split_dataset(Dataset.from_list(rows(40)), fold=3)
    assert split["test"]["output"][:] == [f"answer {i}" for i in (21, 25)]
    assert split["validation"]["output"][:] == [f"answer {i}" for i in (2, 6, 8, 12, 24, 30, 31, 33)]


def test_empty_part_is_refused():
    with pytest.raises(InputError, match=r"fold 0: no row of 1 falls to the \w+ part, wanted more rows"):
        split_dataset(Dataset.from_list(rows(1)))


@pytest.mark.parametrize("fold", [-1, 5, 1.0, True, None, "0"])
def test_fold_out_of_range(fold):
    with pytest.raises(InputError, match=r"fold: .*, wanted an integer from 0 to 4"):
        split_dataset(Dataset.from_list(rows(50)), fold)
