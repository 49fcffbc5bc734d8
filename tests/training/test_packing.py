"""Packing is refused where a backbone would make something else of packed rows than of each alone."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from hycam.data.config import DataConfig
from hycam.errors import InputError
from hycam.training.packing import check_packing
from hycam.training.prepare import prepare
from hycam.training.run import train
from tests.decoders import tiny_decoder, tiny_decoder_config
from tests.models import longrope
from tests.training.runs import run_recipe, save_tokenizer


def _with_longrope(backbone: Path, folder: Path) -> Path:
    changed = shutil.copytree(backbone, folder / "longrope")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"rope_parameters": longrope(32)}))
    return changed


@pytest.mark.parametrize(
    ("data", "rows", "warned"),
    [
        ({"max_length": 64}, 4, True),
        ({"max_length": 64}, 1, False),
        ({"max_length": 32}, 4, False),
        ({"max_length": 32, "packing": True}, 4, False),
    ],
)
def test_rows_of_both_sides_of_longropes_switch(
    tmp_path: Path, backbone: Path, caplog: pytest.LogCaptureFixture, data: dict[str, Any], rows: int, warned: bool
) -> None:
    trainer = {"per_device_train_batch_size": rows}
    recipe = run_recipe(tmp_path, _with_longrope(backbone, tmp_path), data=data, trainer=trainer)
    with caplog.at_level(logging.WARNING):
        prepare(recipe, resume=False, overwrite=False)
    assert (
        "longrope gives every row of a micro-batch other frequencies where one is longer than 32" in caplog.text
    ) == warned


def test_packed_rows_of_both_sides_are_refused(tmp_path: Path, backbone: Path) -> None:
    recipe = run_recipe(tmp_path, _with_longrope(backbone, tmp_path), data={"max_length": 64, "packing": True})
    message = r"data\.packing: got true with data\.max_length: 64, wanted at most 32: beyond it, longrope"
    with pytest.raises(InputError, match=message):
        prepare(recipe, resume=False, overwrite=False)


def test_attention_scaled_by_the_place_in_the_batch_is_refused() -> None:
    data = DataConfig(max_length=16, packing=True)
    check_packing(tiny_decoder_config("llama4_text", floor_scale=64), data, 4)
    check_packing(tiny_decoder_config("llama4_text", floor_scale=64, attn_temperature_tuning=False), data, 8)
    with pytest.raises(InputError, match=r"got true with 8 bins of 16 tokens in a micro-batch, wanted at most 64"):
        check_packing(tiny_decoder_config("llama4_text", floor_scale=64), data, 8)


@pytest.mark.parametrize("packing", [True, False])
def test_a_backbone_that_mixes_packed_rows_is_refused_before_a_step(tmp_path: Path, packing: bool) -> None:
    """One whose convolutions go on over a row's border; unpacked it trains."""
    folder = tmp_path / "backbone"
    tokenizer = save_tokenizer(folder)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    tiny_decoder("lfm2", vocab_size=320, **ends).save_pretrained(folder)
    values = {"max_steps": 1, "eval_steps": 1, "save_steps": 1}
    recipe = run_recipe(tmp_path, folder, data={"packing": packing}, trainer=values)
    if not packing:
        assert train(recipe)["steps"] == 1
        return
    with pytest.raises(
        InputError, match=r"^data\.packing: got true, wanted false: Lfm2ForCausalLM doesn't keep packed"
    ):
        train(recipe)


def test_a_backbone_that_keeps_them_apart_trains(tmp_path: Path, backbone: Path) -> None:
    assert train(run_recipe(tmp_path, backbone, data={"packing": True}, trainer={"max_steps": 2}))["steps"] == 2


def test_a_cache_in_training_mixes_rows(tmp_path: Path, backbone: Path) -> None:
    recipe = run_recipe(tmp_path, backbone, data={"packing": True}, trainer={"use_cache": True})
    with pytest.raises(
        InputError, match=r"^data\.packing: got true, wanted false: LlamaForCausalLM doesn't keep packed"
    ):
        train(recipe)
