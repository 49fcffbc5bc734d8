import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerFast

from hycam.errors import InputError
from hycam.evaluation.generation import (
    end_with_answers,
    evaluate_generation,
    evaluate_generation_tasks,
    generate_responses,
    note_on_bleu,
)
from tests.evaluation.test_rope import KINDS as LONGROPE_KINDS
from tests.evaluation.test_rope import SWITCH
from tests.models import tiny_model

PROMPTS = ["the cat", "a", "one two three four five six", "where is the cat that I saw", "b c"]


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes as tokens, with pad, bos and eos at the tiny models' ids; its own padding is on the right."""
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet())[:125]:
        vocab[character] = len(vocab)
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="right"
    )


def greedy_tokens(model, tokenizer, prompt: str, max_new_tokens: int) -> list[int]:
    """Argmax of a whole forward pass per token: no cache, no padding."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids = [*ids, token]
    return ids[start:]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_equals_greedy_by_hand(tokenizer, family, batch_size):
    model, decode = tiny_model(family), partial(tokenizer.decode, skip_special_tokens=True)
    expected = [decode(greedy_tokens(model, tokenizer, prompt, 12)) for prompt in PROMPTS]
    assert len(set(expected)) > 2
    given = generate_responses(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size)
    assert given == expected


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("family", LONGROPE_KINDS)
def test_longrope_gives_each_prompt_what_it_gives_alone(tokenizer, family, batch_size):
    """Beside longer ones, and where a text grows into the long factors; with a cache it would be another text."""
    model, decode = tiny_model(family, **LONGROPE_KINDS[family]), partial(tokenizer.decode, skip_special_tokens=True)
    kinds = {(len(prompt) > SWITCH, len(prompt) + 11 > SWITCH) for prompt in PROMPTS}
    assert kinds == {(False, False), (False, True), (True, True)}
    expected = [decode(greedy_tokens(model, tokenizer, prompt, 12)) for prompt in PROMPTS]
    assert generate_responses(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size) == expected


@pytest.mark.parametrize("owner", ["model", "tokenizer"])
def test_stops_at_each_end_token(tokenizer, owner):
    model, tokenizer = tiny_model(), copy.deepcopy(tokenizer)
    tokens = greedy_tokens(model, tokenizer, PROMPTS[0], 12)
    end = next(token for i, token in enumerate(tokens) if i > 1 and token not in tokens[:i])
    if owner == "model":
        model.generation_config.eos_token_id = [2, end]
    else:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    stopped = generate_responses(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=5)[0]
    assert stopped == tokenizer.decode(tokens[: tokens.index(end)])


def test_text_is_told_as_it_is_made(tokenizer):
    """In pieces, without an end token that is no special one."""
    model = tiny_model()
    tokens = greedy_tokens(model, tokenizer, PROMPTS[0], 12)
    model.generation_config.eos_token_id = end = next(token for token in tokens[4:] if token not in tokens[:4])
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.decoder = decoders.Replace(tokenizer.decode([tokens[1]]), " ")  # pieces end at blanks
    pieces = []
    (whole,) = generate_responses(model, tokenizer, PROMPTS[:1], max_new_tokens=12, on_text=pieces.append)
    assert whole == tokenizer.decode(tokens[: tokens.index(end)])
    assert "".join(pieces) == whole and len([piece for piece in pieces if piece]) > 1
    with pytest.raises(InputError, match="on_text: given with 5 prompts, wanted one"):
        generate_responses(model, tokenizer, PROMPTS, max_new_tokens=3, on_text=pieces.append)


@pytest.mark.parametrize("adapted", [False, True])
def test_ends_where_the_chat_template_closes_an_answer(tokenizer, adapted):
    """For a base model too, whose own settings know the eos token alone."""
    model, tokenizer = tiny_model(), copy.deepcopy(tokenizer)
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM"))
    tokens = greedy_tokens(model, tokenizer, PROMPTS[0], 12)
    end = next(token for i, token in enumerate(tokens) if i > 1 and token not in tokens[:i])
    closing = tokenizer.convert_ids_to_tokens(end)
    tokenizer.add_tokens([closing])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% if m['role'] == 'assistant' %}"
        "{{ '" + closing + "' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    model.generation_config.update(do_sample=False, temperature=0.7)  # published, and refused where it is changed
    end_with_answers(model, tokenizer, "alpaca")
    assert model.generation_config.eos_token_id == [2]
    end_with_answers(model, tokenizer, "chat")
    assert model.generation_config.eos_token_id == [2, end]
    assert model.generation_config.temperature == 0.7
    stopped = generate_responses(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=5)[0]
    assert stopped == tokenizer.decode(tokens[: tokens.index(end)])


def test_a_closing_that_is_no_token_is_named(tokenizer, caplog):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + 'STOP' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    end_with_answers(tiny_model(), tokenizer, "chat")
    (record,) = caplog.records
    assert "closes an answer with 'STOP', in which there is no token of its own: '<eos>' is trained" in record.message


def test_the_model_s_sampling_settings_do_not_matter(tokenizer):
    model = tiny_model()
    expected = generate_responses(model, tokenizer, PROMPTS, max_new_tokens=12)
    model.generation_config.update(
        do_sample=True, temperature=5.0, top_k=3, top_p=0.5, repetition_penalty=4.0, num_beams=3
    )
    model.generation_config.no_repeat_ngram_size = 1
    assert generate_responses(model, tokenizer, PROMPTS, max_new_tokens=12) == expected


# What a backbone's own generation_config.json may bring: each changes the text, or ends in an exception.
FOREIGN = {
    "suppress_tokens": list(range(3, 60)),
    "begin_suppress_tokens": list(range(3, 127)),
    "bad_words_ids": [[token] for token in range(3, 60)],
    "sequence_bias": [[[token], 10.0] for token in range(3, 30)],
    "encoder_repetition_penalty": 5.0,
    "exponential_decay_length_penalty": [1, 5.0],
    "forced_eos_token_id": 5,
    "guidance_scale": 3.0,
    "max_time": 1e-9,
    "watermarking_config": {"greenlist_ratio": 0.1, "bias": 50.0},
    "stop_strings": ["a"],
    "num_return_sequences": 2,
    "prompt_lookup_num_tokens": 3,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "return_dict_in_generate": True,
    "cache_implementation": "offloaded_static",
    "assistant_early_exit": 1,
    "no_repeat_ngram_size": 1,
}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_no_setting_of_the_backbone_reaches_greedy_generation(tokenizer, name, adapted):
    model = tiny_model()
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM"))
    expected = generate_responses(model, tokenizer, PROMPTS, max_new_tokens=12)
    inner = model.get_base_model() if adapted else model
    setattr(inner.generation_config, name, FOREIGN[name])
    before = inner.generation_config
    assert generate_responses(model, tokenizer, PROMPTS, max_new_tokens=12) == expected
    assert inner.generation_config is before and model.generation_config is before


def test_prompts_may_be_encoded_already(tokenizer):
    expected = generate_responses(tiny_model(), tokenizer, PROMPTS, max_new_tokens=5)
    encoded = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert generate_responses(tiny_model(), tokenizer, encoded, max_new_tokens=5) == expected


def test_leaves_tokenizer_and_model_as_they_were(tokenizer):
    model = get_peft_model(tiny_model(), LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
    model.train()
    before = (
        copy.deepcopy(tokenizer.init_kwargs),
        tokenizer.padding_side,
        tokenizer.backend_tokenizer.to_str(),
    )
    generate_responses(model, tokenizer, PROMPTS, max_new_tokens=3)
    after = tokenizer.init_kwargs, tokenizer.padding_side, tokenizer.backend_tokenizer.to_str()
    assert after == before
    assert all(module.training for module in model.modules())


def test_distributed_wrapper_gives_the_same_text(tokenizer, tmp_path):
    expected = generate_responses(tiny_model(), tokenizer, PROMPTS, max_new_tokens=3)
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(tiny_model())
        assert generate_responses(wrapped, tokenizer, PROMPTS, max_new_tokens=3) == expected
    finally:
        torch.distributed.destroy_process_group()


def test_no_prompt_gives_no_response(tokenizer):
    assert generate_responses(tiny_model(), tokenizer, [], max_new_tokens=3) == []


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        (
            ["a", "b" * 100],
            {"max_new_tokens": 29},
            "prompt 1 has 100 tokens.*max_new_tokens=29.*128 positions",
        ),
        (["a", ""], {"max_new_tokens": 2}, "prompt 1 is empty"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens: 0 given"),
        (["a"], {"max_new_tokens": 1, "batch_size": 0}, "batch_size: 0 given"),
    ],
)
def test_wrong_input_is_named(tokenizer, prompts, settings, message):
    with pytest.raises(InputError, match=message):
        generate_responses(tiny_model(), tokenizer, prompts, **settings)


def test_the_last_position_can_be_used(tokenizer):
    generate_responses(tiny_model("gpt2"), tokenizer, ["b" * 100], max_new_tokens=28)


def test_identical_text_scores_100():
    text = ["the cat sat on the mat .", "a dog ran in the park today ."]
    assert evaluate_generation(text, text) == pytest.approx({"bleu4": 100.0, "rougeL": 100.0})


def test_known_numbers():
    """By hand. Matches of 1- to 4-grams: 5 of 6, 4 of 5, 3 of 4, 2 of 3, equal lengths: BLEU = (1/3)^(1/4).
    The longest common subsequence has 5 of 6 words on both sides."""
    scores = evaluate_generation(["the cat sat on the rug"], ["the cat sat on the mat"])
    assert scores["bleu4"] == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    assert scores["rougeL"] == pytest.approx(100 * 5 / 6)


def test_brevity_penalty_and_unequal_rouge():
    """4 words against 6: every n-gram matches, BLEU = exp(1 - 6/4); LCS 4: precision 1, recall 4/6."""
    scores = evaluate_generation(["the cat sat on"], ["the cat sat on the mat"])
    assert scores["bleu4"] == pytest.approx(100 * torch.exp(torch.tensor(-0.5, dtype=torch.float64)).item())
    assert scores["rougeL"] == pytest.approx(80.0)


def test_no_smoothing_and_no_stemming():
    scores = evaluate_generation(["cats run home quickly now"], ["cat runs home quickly now"])
    assert scores["bleu4"] == 0.0  # no 4-gram matches
    assert scores["rougeL"] == pytest.approx(60.0)  # cats / cat and run / runs differ


def test_13a_splits_punctuation():
    scores = evaluate_generation(["Hello, my dear world!"], ["Hello , my dear world !"])
    assert scores["bleu4"] == pytest.approx(100.0)


def test_bleu_is_of_the_corpus_not_a_mean():
    predictions = {"a": ["the cat sat on the rug"], "b": ["one two three four", "x y z w"]}
    references = {"a": ["the cat sat on the mat"], "b": ["one two three four", "x y z v"]}
    result = evaluate_generation_tasks(predictions, references)
    assert result["tasks"]["b"]["rows"] == 2
    # n-gram matches pooled over the three rows, lengths 6 + 4 + 4 on both sides
    pooled = 100 * (12 / 14 * 9 / 11 * 6 / 8 * 3 / 5) ** 0.25
    assert result["overall"]["bleu4"] == pytest.approx(pooled)
    assert result["overall"]["rougeL"] == pytest.approx(100 * (5 / 6 + 1 + 3 / 4) / 3)
    assert result["tasks"]["b"]["bleu4"] == pytest.approx(100 * (7 / 8 * 5 / 6 * 3 / 4 * 1 / 2) ** 0.25)


def test_scores_refuse_unpaired_text():
    with pytest.raises(InputError, match="1 given with 2 references"):
        evaluate_generation(["a"], ["a", "b"])
    with pytest.raises(InputError, match="0 given"):
        evaluate_generation([], [])
    with pytest.raises(InputError, match="references: tasks"):
        evaluate_generation_tasks({"a": ["x"]}, {"b": ["x"]})


def test_sampling_draws_by_the_distribution_that_is_asked_for(tokenizer):
    """By the seed; of one likeliest token it is greedy; at a temperature near 0 too; at 1 no token is left out."""
    model = tiny_model()
    draw = partial(generate_responses, model, tokenizer, PROMPTS, max_new_tokens=12)
    greedy = draw()
    assert draw(sampling={"top_k": 1}) == draw(sampling={"temperature": 1e-4}) == greedy
    torch.manual_seed(0)
    first = draw(sampling={"temperature": 1.0})
    torch.manual_seed(0)
    assert draw(sampling={"temperature": 1.0}) == first != greedy
    # the likeliest half of this model's probability is more than 50 tokens, transformers' own limit
    torch.manual_seed(0)
    seen = {c for _ in range(6) for text in draw(sampling={"temperature": 3.0}) for c in text}
    assert len(seen) > 50


@pytest.mark.parametrize(
    ("responses", "is_told"),
    [(["Paris", "Yes."], True), (["the cat sat on the mat"] * 2, False), (["", "the cat sat on the mat"], False)],
)
def test_a_bleu_of_0_is_explained(responses, is_told):
    """Not one that is low, and not where nothing was generated."""
    right = {"a": ["the cat sat on the mat"] * 2, "b": responses}
    report = evaluate_generation_tasks(right, right)
    assert report["tasks"]["b"]["rougeL"] >= 50
    note = note_on_bleu([report])
    assert (note is not None and "no run of four tokens matched" in note) == is_told
    perplexities = {"tasks": {"a": {"perplexity": 2.0}}, "overall": {"perplexity": 2.0}}
    assert note_on_bleu([perplexities]) is None
