"""What this package relies on in others: each name is there, each that is used is named, old versions are refused."""

import ast
import importlib
import importlib.metadata
import inspect
import pkgutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import peft
import pytest
import transformers
from packaging.requirements import Requirement
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

import hycam
import hycam.data
import hycam.training
import hycam_kernels
from hycam import reliances
from hycam.reliances import NEWEST_TESTED, RELIANCES, broken, warn_where_broken
from hycam_kernels.versions import VersionError, release, require
from tests.models import tiny_model

ROOT = Path(__file__).parents[1]
NAMES = {name for uses in RELIANCES.values() for names in uses.values() for name in names}
# their documentation has these under the modules that they are imported from
DOCUMENTED = {
    "peft.config:PeftConfig",
    "peft.tuners.tuners_utils:BaseTuner",
    "peft.tuners.tuners_utils:BaseTunerLayer",
    "torch.autograd:forward_ad",
    "torch.distributed.tensor:DTensor",
    "torch.nn.parallel:DistributedDataParallel",
    "torch.nn:Parameter",
    "torch.optim:Optimizer",
    "torch.utils.data:IterableDataset",
    "torch.utils.data:Sampler",
    "torch.utils.data:get_worker_info",
    "torch.utils.hooks:RemovableHandle",
    "accelerate.utils:DistributedType",
    "accelerate.utils:FullyShardedDataParallelPlugin",
}


@pytest.mark.parametrize("package", RELIANCES)
def test_what_is_relied_on_is_there(package):
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    assert not list(broken(package))


def test_every_undocumented_import_is_named():
    used = set()
    for path in (file for folder in ("hycam", "hycam_kernels") for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) and node.module else ""
            if module.split(".")[0] in RELIANCES:
                used |= {f"{module}:{a.name}" for a in node.names if "." in module or a.name.startswith("_")}
    named = {name if "." not in name.split(":")[1] else name[: name.index(".", name.index(":"))] for name in NAMES}
    assert used - DOCUMENTED <= named


@pytest.mark.parametrize("base", [transformers.Trainer, BaseTuner, BaseTunerLayer, peft.PeftConfig])
def test_every_overridden_name_is_named(base):
    for module in pkgutil.walk_packages(hycam.__path__, "hycam."):
        if not module.name.endswith("__main__"):
            __import__(module.name)
    for subclass in _subclasses(base):
        if not subclass.__module__.startswith("hycam"):
            continue
        for name in vars(subclass):
            owner = next((theirs for theirs in subclass.__mro__[1:] if name in vars(theirs)), None)
            theirs = owner is not None and owner.__module__.startswith(("peft", "transformers"))
            if not theirs or name == "_abc_impl" or (name.startswith("__") and name != "__post_init__"):
                continue
            assert f"{owner.__module__}:{owner.__qualname__}.{name}" in NAMES, subclass


def _subclasses(base):
    for subclass in base.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def test_a_line_says_what_broke(monkeypatch):
    names = {
        "peft.mapping:GONE": "",
        "peft.gone:NAME": "",
        "peft:get_peft_model": "model new_argument",
        "peft:PeftModel": "",
    }
    monkeypatch.setattr(reliances, "RELIANCES", {"peft": {"adding an adapter": names}})
    found = f"peft {peft.__version__}"
    assert list(broken("peft")) == [
        f"{found} has no peft.mapping:GONE: adding an adapter may not work",
        f"{found} has no peft.gone:NAME: adding an adapter may not work",
        f"{found}: peft:get_peft_model takes no new_argument: adding an adapter may not work",
    ]


def test_only_a_newer_version_that_lacks_something_is_warned_of(monkeypatch):
    uses = {"adding an adapter": {"peft.mapping:GONE": ""}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setitem(NEWEST_TESTED, "peft", "0.1")
        warn_where_broken("peft")
        monkeypatch.setattr(reliances, "RELIANCES", {"peft": uses})
        monkeypatch.setitem(NEWEST_TESTED, "peft", peft.__version__)
        warn_where_broken("peft")
    monkeypatch.setitem(NEWEST_TESTED, "peft", "0.1")
    with pytest.warns(UserWarning, match=r"has no peft.mapping:GONE: .* peft 0.1 is the newest that was tested"):
        warn_where_broken("peft")


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("2.6.0+cpu", "2.10"),
        ("5.9", "5.17.0"),
        ("4.57.1", "5.0.0rc1"),
        ("0.21.0", "0.21.2"),
        ("2.9.1+rocm6.4", "2.10.0+xpu"),
        ("2.10.0a0+b558c986e8.nv25.11", "2.11.0.dev20260101+cu130"),
    ],
)
def test_versions_are_ordered(older, newer):
    assert release(older) < release(newer)


def test_an_old_version_is_refused_by_one_line():
    installed = peft.__version__
    require({"peft": installed, "a-package-that-is-not-there": "1"})
    with pytest.raises(VersionError) as refusal:
        require({"peft": "99.1"})
    assert str(refusal.value) == f"peft {installed} is installed, 99.1 or later is wanted: pip install 'peft>=99.1'"


@pytest.mark.parametrize(
    ("package", "imported"),
    [
        ("peft", "hycam"),
        ("transformers", "hycam"),
        ("torch", "hycam_kernels"),
    ],
)
def test_it_is_refused_before_it_is_imported(tmp_path, package, imported):
    """The command says the line alone."""
    folder = tmp_path / f"{package}-0.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
    paths = f"sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]"
    code = (
        f"import sys; {paths}\ntry:\n import {imported}\nexcept ImportError as e: print(e, {package!r} in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.startswith(f"{package} 0.1 is installed, ")
    assert told.endswith("' False\n")
    code = f"import sys; {paths}\nimport hycam_cli; sys.exit(hycam_cli.main(['env']))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith(f"hycam: error: {package} 0.1 is installed, ")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(("package", "imported"), [("datasets", "hycam.data"), ("accelerate", "hycam.training")])
def test_what_only_training_needs_is_refused_by_what_needs_it(monkeypatch, package, imported):
    module = importlib.import_module(imported)
    with monkeypatch.context() as patched, pytest.raises(VersionError, match=f"^{package} 0.1 is installed"):
        patched.setattr(importlib.metadata, "version", lambda name: "0.1" if name == package else "99")
        importlib.reload(module)


def test_the_floors_are_those_of_the_metadata():
    """What is refused is what pip would not have installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["train"]
    wanted = {r.name: str(r.specifier) for r in map(Requirement, [*project["dependencies"], *extra])}
    floors = hycam_kernels.FLOORS | hycam.FLOORS | hycam.data.FLOORS | hycam.training.FLOORS
    assert {name: f">={oldest}" for name, oldest in floors.items()} == {name: wanted[name] for name in floors}
    assert {Requirement(line).name for line in project["dependencies"]} <= set(floors)


def test_the_newest_that_is_tested_is_what_the_tests_run_with():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {name: pins[name] for name in NEWEST_TESTED} == NEWEST_TESTED


def test_the_trainer_has_the_attributes_that_are_read(tmp_path):
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = transformers.Trainer(tiny_model(), arguments)
    for name in (
        "accelerator",
        "callback_handler",
        "control",
        "is_deepspeed_enabled",
        "is_fsdp_enabled",
        "label_smoother",
    ):
        assert hasattr(trainer, name), name
    assert trainer.model_accepts_loss_kwargs is True
    assert "self.label_smoother" in inspect.getsource(transformers.Trainer.compute_loss)
