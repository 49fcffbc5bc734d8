"""PEFT's own tests of its methods, run on HyCAM: from its source distribution, on tiny models in place of the hub's."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import peft
import pytest
import torch

from tests.decoders import tiny_decoder

HERE = Path(__file__).parent
FILES = ["test_decoder_models.py", "test_custom_models.py", "testing_common.py", "testing_utils.py"]
# from_pretrained takes a folder of the hub's name in the working directory for the hub's model
STAND_INS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": "opt",
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": "gpt2",
    "peft-internal-testing/tiny-random-GPTJForCausalLM": "gptj",
    "trl-internal-testing/tiny-random-LlamaForCausalLM": "llama",
    "peft-internal-testing/tiny-dummy-qwen2": "qwen2",
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": "gemma3_text",
}


def fetch_suite(folder: Path) -> None:
    """PEFT's test files of the installed version, and ours beside them, as a package."""
    wanted = f"peft=={peft.__version__}"
    options = ["--no-deps", "--no-binary", "peft", "--disable-pip-version-check", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *options, wanted], check=True)
    package = folder / "peft_suite"
    package.mkdir()
    (package / "__init__.py").touch()
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
        for name in FILES:
            member = archive.extractfile(f"peft-{peft.__version__}/tests/{name}")
            assert member is not None
            (package / name).write_bytes(member.read())
    shutil.copy(HERE / "peft_suite" / "suite.py", package / "test_hycam.py")
    shutil.copy(HERE / "peft_suite" / "differences.py", package / "conftest.py")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pefts_own_suites(tmp_path):
    fetch_suite(tmp_path)
    models = tmp_path / "models"
    for name, model_type in STAND_INS.items():
        model = tiny_decoder(model_type)
        for parameter in model.parameters():
            if parameter.ndim > 1:  # large enough that an adapter changes the tokens that are generated
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(models / name)
    report = tmp_path / "report.xml"
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-n0", "-W", "ignore", "--tb=short", "--timeout", "300"),
            *("-c", os.devnull, "--rootdir", str(tmp_path), "--junitxml", str(report)),
            str(tmp_path / "peft_suite" / "test_hycam.py"),
        ],
        cwd=models,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(tmp_path)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    skipped = [case.find("skipped") for case in ElementTree.parse(report).iter("testcase")]
    # what PEFT's tests skip for most methods aside, they did run
    assert sum(found is None for found in skipped) >= 700
    assert sum(found is not None and found.get("type") == "pytest.xfail" for found in skipped) >= 140
