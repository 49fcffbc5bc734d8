from functools import partial

import pytest
from datasets import Dataset, load_from_disk

from hycam.data.cache import RowCache
from hycam.data.closing import closing_of
from hycam.data.config import DataConfig
from hycam.data.prompts import prompt_text
from hycam.data.tokenization import check_tokenizer, encode_prompt, encode_row_prompt, tokenize_dataset
from hycam.errors import InputError
from tests.data.tokenizers import CHAT_WITH_BOS, CHAT_WITH_GENERATION, SPECIAL, byte_tokenizer, sentencepiece_tokenizer

BOS, EOS = SPECIAL.index("<s>"), SPECIAL.index("</s>")
ROWS = [
    {"instruction": "Name three colours.", "input": "", "output": "Red, green and blue."},
    {"instruction": "Add.", "input": "a, b", "output": "def add(a, b):\n    return a + b\n"},
    {"instruction": "What is the capital of France?", "input": "", "output": ":// is no answer"},
    {"instruction": "Say it.", "input": "", "output": " blank first"},
]
TOKENIZERS = {
    "bare": lambda **kw: byte_tokenizer(**kw),
    "bos": lambda **kw: byte_tokenizer(adds="bos", **kw),
    "bos and eos": lambda **kw: byte_tokenizer(adds="bos eos", **kw),
    "sentencepiece": lambda **kw: sentencepiece_tokenizer(**kw),
}


def tokenize(tokenizer, rows=ROWS, **config):
    return tokenize_dataset(Dataset.from_list(rows), tokenizer, DataConfig(**config), task_id=3)


def split_of(row):
    """Prompt ids (no loss) and response ids (loss) of a token row; the loss's part is the row's end."""
    start = next(i for i, label in enumerate(row["labels"]) if label != -100)
    assert row["labels"] == [-100] * start + row["input_ids"][start:]
    return row["input_ids"][:start], row["input_ids"][start:]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_alpaca_rows(kind):
    tokenizer = TOKENIZERS[kind]()
    task = tokenize(tokenizer)
    assert (task.truncated, task.dropped) == (0, 0)
    assert task.dataset.column_names == ["input_ids", "labels", "task_id"]
    assert task.dataset["task_id"][:] == [3] * 4
    for row, tokens in zip(ROWS, task.dataset, strict=True):
        prompt, response = split_of(tokens)
        text = prompt_text(row, "alpaca", tokenizer)
        assert prompt == encode_prompt(text, tokenizer)
        assert prompt.count(BOS) == (kind != "bare")
        assert prompt[0] == BOS or kind == "bare"
        assert EOS not in prompt
        assert response[-1] == EOS
        assert response.count(EOS) == 1
        # Only the output with "://" may gain SentencePiece's blank: there a token reaches over the prompt's colon.
        if not (kind == "sentencepiece" and row["output"].startswith(":")):
            assert tokenizer.decode(prompt + response[:-1], skip_special_tokens=True) == text + row["output"]


def test_response_that_merges_with_the_prompt_leaves_the_prompt_alone():
    tokenizer = byte_tokenizer()
    merging = byte_tokenizer()
    merging.add_tokens([":://"])  # one token over the border of "### Response:" and "://"
    text = prompt_text(ROWS[2], "alpaca", merging)
    joint = merging(text + ROWS[2]["output"])["input_ids"]
    assert joint[: len(merging(text)["input_ids"])] != merging(text)["input_ids"]
    prompt, response = split_of(tokenize(merging, ROWS[2:3]).dataset[0])
    assert prompt == encode_prompt(text, merging) == encode_prompt(text, tokenizer)
    assert merging.decode(response[:-1]) == ROWS[2]["output"]


def test_prompt_loss():
    for row in tokenize(byte_tokenizer(adds="bos"), train_on_prompt=True).dataset:
        assert row["labels"] == row["input_ids"]


def test_single_and_batched_encoding_agree():
    tokenizer = byte_tokenizer(adds="bos")
    together = tokenize(tokenizer, ROWS * 300).dataset
    alone = [tokenize(tokenizer, [row]).dataset[0] for row in ROWS]
    assert together[1000:1004]["input_ids"] == [row["input_ids"] for row in alone]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_chat_mask_equals_the_generation_marks(kind):
    tokenizer = TOKENIZERS[kind](chat_template=CHAT_WITH_GENERATION)
    rows = ROWS[:3] if kind == "sentencepiece" else ROWS
    for row, tokens in zip(rows, tokenize(tokenizer, rows, prompt="chat").dataset, strict=True):
        user = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
        oracle = tokenizer.apply_chat_template(
            [{"role": "user", "content": user}, {"role": "assistant", "content": row["output"]}],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        end = oracle["input_ids"].index(EOS) + 1
        assert tokenizer.decode(oracle["input_ids"][end:]) == "\n"
        assert tokens["input_ids"] == oracle["input_ids"][:end], "what the template renders, without a BOS of our own"
        assert [int(label != -100) for label in tokens["labels"]] == oracle["assistant_masks"][:end]


def test_chat_template_without_generation_marks():
    """The template brings BOS itself, trims the answer, and closes it with a token that is not eos."""
    tokenizer = byte_tokenizer(adds="bos", chat_template=CHAT_WITH_BOS)
    for row, tokens in zip(ROWS, tokenize(tokenizer, prompt="chat").dataset, strict=True):
        prompt, response = split_of(tokens)
        assert prompt == encode_prompt(prompt_text(row, "chat", tokenizer), tokenizer)
        assert prompt[0] == BOS
        assert tokens["input_ids"].count(BOS) == 1
        assert tokenizer.decode(prompt).endswith("<|assistant|>")
        assert tokenizer.decode(response) == row["output"].strip() + "<|end|>"


CLOSINGS = {
    "{{ eos_token }}": "</s>",
    "{{ '<|end|>\\n' }}": "<|end|>",
    "{{ '<|end|>\\n' + eos_token }}": "<|end|>",
    "{{ '\\n<|end|>\\n' }}": "\n<|end|>",
    "{{ ' ' + eos_token + '<|user|>' }}": " </s>",
    "": "</s>",
    "{{ '\\n' }}": "</s>",
    "{{ '<stop>\\n' }}": "</s>",
    "{{ '<turn>\\n' }}": "<turn>",
}


@pytest.mark.parametrize("closing", CLOSINGS)
def test_an_answer_ends_in_one_token_whatever_the_template_writes_after_it(closing):
    """The first added token, special or not; eos where there is none. Nothing that no generation makes follows it."""
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}" + closing + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    tokenizer = byte_tokenizer(chat_template=template)
    tokenizer.add_tokens(["<turn>"])
    for row, tokens in zip(ROWS, tokenize(tokenizer, prompt="chat").dataset, strict=True):
        assert tokenizer.decode(split_of(tokens)[1]) == row["output"] + CLOSINGS[closing]
        assert split_of(tokens)[1][-1] == closing_of("chat", tokenizer).token_id
        assert split_of(tokens)[1][-1] in tokenizer.added_tokens_decoder


@pytest.mark.parametrize(("closing", "end"), [("\\n<turn>\\n", "<turn>"), ("\\n", "</s>")])
def test_added_white_space_ends_no_answer(closing, end):
    """Answers have line breaks in them, which some tokenizers have as added tokens."""
    tokenizer = byte_tokenizer(chat_template=CHAT_WITH_BOS.replace("'<|end|>'", f"'{closing}'"))
    tokenizer.add_tokens(["\n", "<turn>"])
    assert tokenizer.convert_ids_to_tokens(closing_of("chat", tokenizer).token_id) == end


def test_a_template_that_closes_answers_in_two_ways():
    template = CHAT_WITH_BOS.replace("'<|end|>'", "('<|end|>' if m['content'] | length < 16 else eos_token)")
    with pytest.raises(InputError, match=r"closes an answer with .*</s>', others with '<\|end\|>': wanted"):
        tokenize(byte_tokenizer(chat_template=template), prompt="chat")


def test_a_template_that_can_think_is_told_not_to():
    """As Qwen 3's: the generation prompt and the conversation agree on an answer without thoughts."""
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
        "{% if m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}{{ m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif %}{% endif %}"
    )
    tokenizer = byte_tokenizer(chat_template=template)
    for row, tokens in zip(ROWS, tokenize(tokenizer, prompt="chat").dataset, strict=True):
        prompt, response = split_of(tokens)
        assert tokenizer.decode(response) == row["output"] + "</s>"
        assert tokenizer.decode(prompt).endswith("<|assistant|><think></think>")


def test_chat_template_that_hides_the_answer():
    template = "{% for m in messages %}{{ m['role'] }}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    with pytest.raises(InputError, match="chat template: makes '' of the answer"):
        tokenize(byte_tokenizer(chat_template=template), prompt="chat")


@pytest.mark.parametrize("train_on_prompt", [False, True])
@pytest.mark.parametrize("style", ["alpaca", "chat"])
def test_a_cut_row_is_the_beginning_of_the_whole_row_without_an_end(style, train_on_prompt):
    """A false end would be learnt, and scored, in the middle of a sentence."""
    tokenizer = byte_tokenizer(adds="bos", chat_template=CHAT_WITH_BOS)
    settings = {"prompt": style, "train_on_prompt": train_on_prompt}
    whole = tokenize(tokenizer, **settings).dataset
    end = closing_of(style, tokenizer).token_id
    assert end == (EOS if style == "alpaca" else SPECIAL.index("<|end|>"))
    prompts = [len(encode_row_prompt(row, style, tokenizer)) for row in ROWS]
    lengths = [len(row["input_ids"]) for row in whole]
    smallest, largest = min(prompts) + 1, max(lengths)
    for limit in [smallest, smallest + 1, *range(smallest + 5, largest - 2, 11), largest - 1, largest, largest + 1]:
        task = tokenize(tokenizer, max_length=limit, **settings)
        fits = [prompt < limit for prompt in prompts]
        assert task.dropped == fits.count(False)
        assert task.truncated == sum(fit and length > limit for fit, length in zip(fits, lengths, strict=True))
        kept = [(row, prompt) for row, prompt, fit in zip(whole, prompts, fits, strict=True) if fit]
        for row, (original, prompt) in zip(task.dataset, kept, strict=True):
            assert row["input_ids"] == original["input_ids"][:limit]
            assert row["labels"] == original["labels"][:limit]
            assert row["input_ids"][prompt:].count(end) == (len(original["input_ids"]) <= limit)


def test_max_length_that_no_prompt_fits():
    with pytest.raises(InputError, match="max_length: 3, wanted more: no row of 4 has a prompt"):
        tokenize(byte_tokenizer(), max_length=3)


def test_row_that_fits_exactly_is_whole_even_without_a_response_token():
    tokenizer = byte_tokenizer()
    row = ROWS[0] | {"output": ""}
    length = len(encode_prompt(prompt_text(row, "alpaca", tokenizer), tokenizer)) + 1
    task = tokenize(tokenizer, [row], max_length=length)
    assert (task.truncated, task.dropped) == (0, 0)
    assert split_of(task.dataset[0])[1] == [EOS]


@pytest.mark.parametrize("style", ["alpaca", "chat"])
def test_generation_prompt_is_the_training_prompt(style):
    """What `generate` reads is, id for id, what stands before the first target in training."""
    for make in TOKENIZERS.values():
        tokenizer = make(chat_template=CHAT_WITH_BOS)
        for row, tokens in zip(ROWS, tokenize(tokenizer, prompt=style).dataset, strict=True):
            assert split_of(tokens)[0] == encode_row_prompt(row, style, tokenizer)
            assert split_of(tokens)[0] == encode_prompt(prompt_text(row, style, tokenizer), tokenizer)


@pytest.mark.parametrize("template", [CHAT_WITH_BOS, CHAT_WITH_GENERATION])
@pytest.mark.parametrize("style", ["alpaca", "chat"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_tokens_in_a_users_text_are_text(kind, style, template):
    """The marks that a row has are those of its row without them, and its text decodes to what the user wrote."""
    tokenizer = TOKENIZERS[kind](chat_template=template)
    row = {
        "instruction": "Strike <s>this</s> out.<|end|>",
        "input": "<|user|> said it",
        "output": "Was <s>this</s> it?<pad> Yes.",
    }
    harmless = {name: "".join(c for c in text if c not in "<>|") for name, text in row.items()}
    marks = list(range(len(SPECIAL)))
    counts = []
    for values in (row, harmless):
        (tokens,) = tokenize(tokenizer, [values], prompt=style).dataset
        assert split_of(tokens)[0] == encode_row_prompt(values, style, tokenizer)
        prompt, response = split_of(tokens)
        counts.append([[part.count(mark) for mark in marks] for part in (prompt, response)])
        text = tokenizer.decode([token for token in response if token not in marks])
        assert text.strip() == values["output"]
    assert counts[0] == counts[1]


def test_cached_tokens_are_those_that_the_template_renders_today(tmp_path, monkeypatch):
    """`strftime_now` writes the day's date, as Llama 3.1's template does."""
    template = "{{ strftime_now('%A') }}" + CHAT_WITH_GENERATION
    tokenizer = byte_tokenizer(chat_template=template)
    found = []
    for day in ("Monday", "Monday", "Tuesday"):
        now = tokenizer.chat_template.replace("strftime_now('%A')", f"'{day}'")
        monkeypatch.setattr(tokenizer, "apply_chat_template", partial(_rendered, tokenizer, now))
        cache = RowCache(tmp_path)
        task = tokenize_dataset(Dataset.from_list(ROWS), tokenizer, DataConfig(prompt="chat"), 0, cache)
        found.append(tokenizer.decode(task.dataset[0]["input_ids"]))
    assert [text.startswith("Monday") for text in found] == [True, True, False]
    assert len(list(tmp_path.glob("*.arrow"))) == 2


def _rendered(tokenizer, template, messages, **options):
    return type(tokenizer).apply_chat_template(tokenizer, messages, chat_template=template, **options)


def test_prompt_that_brings_bos_gets_no_second_one():
    tokenizer = byte_tokenizer(adds="bos eos")
    assert encode_prompt("<s>What", tokenizer) == encode_prompt("What", tokenizer)
    assert encode_prompt("", tokenizer) == [BOS]
    assert encode_prompt("What", byte_tokenizer())[0] != BOS


def test_tokenizer_without_eos_or_pad():
    with pytest.raises(InputError, match="no eos token, wanted one: it ends every response"):
        tokenize(byte_tokenizer(eos_token=None))
    tokenizer = byte_tokenizer(pad_token=None)
    with pytest.raises(InputError, match=r"no pad token, .*tokenizer\.pad_token = tokenizer\.eos_token"):
        tokenize(tokenizer)
    assert tokenizer.pad_token is None
    tokenizer.pad_token = tokenizer.eos_token
    check_tokenizer(tokenizer)


def test_missing_column():
    with pytest.raises(InputError, match="no column 'input'"):
        tokenize(byte_tokenizer(), [{"instruction": "a", "output": "b"}])


def test_cache_is_neither_read_nor_written(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path)
    before = sorted(tmp_path.iterdir())
    dataset = load_from_disk(tmp_path)
    short = tokenize_dataset(dataset, byte_tokenizer(), DataConfig(max_length=100), 0)
    again = tokenize_dataset(dataset, byte_tokenizer(), DataConfig(max_length=100), 0)
    assert short.dataset.to_list() == again.dataset.to_list()
    assert short.dataset.cache_files == []
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 2}, "max_length: 2, wanted an integer of 3 or more"),
        ({"max_length": 12.5}, "max_length: 12.5"),
        ({"prompt": "llama"}, "prompt: 'llama', wanted one of alpaca, chat"),
        ({"packing": "yes"}, "packing: 'yes', wanted true or false"),
        ({"train_on_prompt": 1}, "train_on_prompt: 1"),
        ({"fold": 5}, "fold: 5, wanted an integer from 0 to 4"),
        ({"fold": None}, "fold: None"),
    ],
)
def test_data_options(options, message):
    with pytest.raises(InputError, match=message):
        DataConfig(**options)
