"""`hycam exec`: other packages' commands, in which adapters load."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from hycam_cli import main
from tests.adapter.builders import config, randomise
from tests.training.runs import save_backbone

_QUESTIONS = [
    {"question": "Say the colour of cat 1:", "choices": ["red", "green", "blue"], "answer": 1},
    {"question": "Say the colour of owl 22:", "choices": ["white", "red", "a green dog"], "answer": 0},
    {"question": "Say:", "choices": ["bee", "hen", "cow 3"], "answer": 2},
]
_TASKS = {
    "likelihood": {
        "output_type": "loglikelihood",
        "doc_to_target": " {{choices[answer]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with `backbone` and `adapter`."""
    folder = tmp_path_factory.mktemp("saved")
    save_backbone(folder / "backbone")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "backbone"), config())
    randomise(model)
    model.save_pretrained(folder / "adapter")
    return folder


def test_the_tools_name_is_looked_up_before_it_is_run(capsys):
    assert main(["exec", "lm-evil", "--tasks", "mine"]) == 2
    assert capsys.readouterr().err.startswith("hycam: error: TOOL: got 'lm-evil', wanted the command of an installed")


def test_a_tool_gets_its_own_arguments_and_gives_its_status(monkeypatch, capsys):
    """Names among them that are a recipe's elsewhere: --tasks, --seed, a dotted one."""
    seen = []

    class Script:
        @staticmethod
        def load():
            def script():
                seen.append(sys.argv)
                return 3

            return script

    monkeypatch.setattr("hycam.commands.exec.entry_points", lambda group, name: [Script] if name == "lm-eval" else [])
    monkeypatch.setattr(sys, "argv", ["hycam"])
    arguments = ["--tasks", "mine", "--seed", "3", "--data.fold=1", "--help", "-m", "x"]
    with pytest.raises(SystemExit) as ended:
        main(["exec", "lm-eval", *arguments])
    assert ended.value.code == 3
    assert seen == [["lm-eval", *arguments]]


def _log_likelihood(model, tokenizer, context, continuation):
    """Of the continuation's tokens, and whether each is the likeliest."""
    ids = tokenizer(context + continuation)["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)[start - 1 : -1]
    wanted = torch.tensor(ids[start:])
    return log_probs.gather(1, wanted[:, None]).sum().item(), bool((log_probs.argmax(-1) == wanted).all())


def _answer(model, tokenizer, question):
    ids = tokenizer(question)["input_ids"]
    end = len(ids)
    with torch.no_grad():
        while len(ids) < end + 5 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tokenizer.decode(ids[end:], skip_special_tokens=True).split("\n\n")[0]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_lm_eval_measures_an_adapter(saved, tmp_path):
    """The three kinds of request, in a process that only `hycam exec` starts, against the model called by hand."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in _QUESTIONS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    for name, task in _TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | common | task))
    model_args = f"pretrained={saved / 'backbone'},peft={saved / 'adapter'},dtype=float32"
    command = ["lm-eval", "--model", "hf", "--model_args", model_args, "--device", "cpu", "--batch_size", "2"]
    command += ["--tasks", ",".join(_TASKS), "--include_path", str(tmp_path)]
    command += ["--output_path", str(tmp_path / "results"), "--log_samples"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "hycam", "exec", *command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    samples = {}
    for name in _TASKS:
        (file,) = (tmp_path / "results").rglob(f"samples_{name}_*.jsonl")
        lines = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda line: line["doc_id"])
        samples[name] = lines

    tokenizer = AutoTokenizer.from_pretrained(saved / "backbone")
    model = AutoModelForCausalLM.from_pretrained(saved / "backbone").eval()
    base = [_answer(model, tokenizer, row["question"]) for row in _QUESTIONS]
    model = PeftModel.from_pretrained(model, saved / "adapter").eval()
    for number, row in enumerate(_QUESTIONS):
        by_hand = [_log_likelihood(model, tokenizer, row["question"], f" {choice}") for choice in row["choices"]]
        for place, (likelihood, is_greedy) in enumerate(by_hand):
            got = samples["choice"][number]["filtered_resps"][place]
            assert (float(got[0]), str(got[1])) == (pytest.approx(likelihood, abs=1e-3), str(is_greedy))
        best = max(range(3), key=lambda place: by_hand[place][0])
        assert samples["choice"][number]["acc"] == float(best == row["answer"])
        (got,) = samples["likelihood"][number]["filtered_resps"]
        assert float(got[0]) == pytest.approx(by_hand[row["answer"]][0], abs=1e-3)
        (got,) = samples["answer"][number]["filtered_resps"]
        assert got == _answer(model, tokenizer, row["question"])
    assert base != [sample["filtered_resps"][0] for sample in samples["answer"]]


def test_transformers_loads_an_adapter_that_lies_in_its_backbones_folder(saved, tmp_path):
    """As `transformers serve` loads a model: by the class that its config.json names."""
    folder = shutil.copytree(saved / "backbone", tmp_path / "served")
    for file in (saved / "adapter").glob("adapter_*"):
        shutil.copy(file, folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(saved / "backbone"), saved / "adapter"
    ).eval()
    with torch.no_grad():
        want = model(ids).logits
        with model.disable_adapter():
            assert not torch.allclose(model(ids).logits, want, atol=0.1)
        for loader in (LlamaForCausalLM, AutoModelForCausalLM):
            torch.testing.assert_close(loader.from_pretrained(folder).eval()(ids).logits, want)
