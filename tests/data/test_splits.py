import pytest
from datasets import Dataset

from hycam.data.splits import split_dataset
from hycam.errors import InputError

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


def test_one_prompt_falls_to_one_part():
    dataset = Dataset.from_list([row | {"output": f"{row['output']}.{i}"} for row in rows(300) for i in range(3)])
    for fold in range(5):
        split = split_dataset(dataset, fold)
        prompts = {part: set(zip(split[part]["instruction"], split[part]["input"], strict=True)) for part in PARTS}
        assert sum(map(len, prompts.values())) == 300


def test_prompt_fields_are_kept_apart():
    """`("a", "b")` and `("ab", "")` are other prompts: they must not always share a bin."""
    joined = [f"{i}" for i in range(200)]
    left = parts_of(Dataset.from_list([{"instruction": f"x{i}", "input": "", "output": i} for i in joined]))
    right = parts_of(Dataset.from_list([{"instruction": "x", "input": i, "output": i} for i in joined]))
    assert left != right


def test_bins_never_change():
    """Published results depend on them."""
    split = split_dataset(Dataset.from_list(rows(40)), fold=3)
    assert split["test"]["output"][:] == [f"answer {i}" for i in (3, 4, 27)]
    assert split["validation"]["output"][:] == [f"answer {i}" for i in (2, 14, 19, 21, 23, 24, 28, 35, 38)]


def test_empty_part_is_refused():
    with pytest.raises(InputError, match=r"fold 0: no row of 1 falls to the \w+ part, wanted more rows"):
        split_dataset(Dataset.from_list(rows(1)))


@pytest.mark.parametrize("fold", [-1, 5, 1.0, True, None, "0"])
def test_fold_out_of_range(fold):
    with pytest.raises(InputError, match=r"fold: .*, wanted an integer from 0 to 4"):
        split_dataset(Dataset.from_list(rows(50)), fold)
