"""`make versions`: the tests that rest on other packages, in environments that cover what is promised of them.

Each environment's record goes to ``results/versions``; those committed are in ``benchmarks/results/versions``, where
``python -m benchmarks.tables`` draws their table from.
"""

import json
import shutil

import nox

nox.options.default_venv_backend = "venv"  # by pip, whose constraints a machine may have
nox.options.stop_on_first_error = False

# what a user may have before this package comes, and what its extras for users ask for
_PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "datasets", "numpy", "deepspeed", "bitsandbytes", "torchao",
    "liger-kernel", "gguf", "scikit-learn", "setuptools",
)  # fmt: skip
_EXTRAS = "train,analysis,deepspeed,gguf,liger,quantization"
_TOOLS = ("pytest", "pytest-timeout")
# What rests on the interfaces of other packages: adapters, their files, training, checkpoints, evaluation, generation.
_TESTS = (
    "tests/test_reliances.py::test_what_is_relied_on_is_there",
    "tests/test_reliances.py::test_every_overridden_name_is_named",
    "tests/test_reliances.py::test_the_trainer_has_the_attributes_that_are_read",
    "tests/adapter/test_discovery.py",
    "tests/adapter/test_peft.py",
    "tests/adapter/test_saved.py",
    "tests/adapter/test_trl.py",
    "tests/analysis/test_plots.py",
    "tests/analysis/test_value_states.py",
    "tests/data/test_cache.py",
    "tests/data/test_packing.py",
    "tests/distributed/test_one_process.py",
    "tests/evaluation/test_generation.py",
    "tests/kernels/test_modulation.py",
    "tests/methods/test_peft.py",
    "tests/study/test_statistics.py",
    "tests/training/test_gguf.py",
    "tests/training/test_liger.py",
    "tests/training/test_quantization.py",
    "tests/training/test_run.py",
)
# in a process of their own: triton reads at its import whether it interprets
_KERNEL_TESTS = ("tests/kernels/backends/triton/test_backend.py", "tests/kernels/backends/triton/test_training.py")
# name -> Python, and what is pinned in it; everything else is the newest that fits. TRL wants later datasets than the
# oldest promised.
ENVIRONMENTS = {
    "oldest": (
        "3.11",
        (
            "torch==2.9", "transformers==5.17", "peft==0.21", "accelerate==1.10", "datasets==4", "matplotlib==3.10",
            "pyyaml==6", "rich==13", "rouge-score==0.1.2", "sacrebleu==2.4", "scipy==1.13", "tensorboard==2.16.2",
            "scikit-learn==1.5", "deepspeed==0.19.2", "gguf==0.19", "liger-kernel==0.7", "bitsandbytes==0.49",
            "torchao==0.16", "setuptools==77.0.3", "numpy==2.0",
        ),
    ),
    "gpu-images": ("3.12", ("torch==2.11", "triton==3.6", "transformers==5.17", "numpy<2.4", "trl")),
    "transformers-5.23": ("3.11", ("torch==2.13", "transformers==5.23", "trl")),
    "newest": ("3.13", ("trl",)),
}  # fmt: skip


@nox.session
@nox.parametrize(("python", "pins"), [nox.param(*environment, id=name) for name, environment in ENVIRONMENTS.items()])
def versions(session: nox.Session, pins: tuple[str, ...]) -> None:
    """Build one environment, run the tests in it, write its record, and take the environment away."""
    name = session.name.partition("(")[2].rstrip(")")
    folder = "results/versions"
    reports = {f"{folder}/{name}.xml": _TESTS, f"{folder}/{name}-kernels.xml": _KERNEL_TESTS}
    try:
        session.install("--quiet", *_PACKAGES, *pins)
        before = _installed(session)
        session.install("--quiet", "--no-build-isolation", "--editable", f".[{_EXTRAS}]")
        after = _installed(session)
        if changed := [f"{package} {version}" for package, version in before.items() if after.get(package) != version]:
            session.error(f"installing this package changed {', '.join(changed)}")
        session.install("--quiet", *_TOOLS)
        environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        for report, tests in reports.items():
            session.run(
                "pytest", "-q", "-m", "not slow", "--timeout", "1800", "--junitxml", report, *tests,
                env=environment, success_codes=[0, 1],
            )  # fmt: skip
        session.run(
            "python", "-m", "benchmarks.outcomes", *reports, "--out", f"{folder}/{name}.json", env=environment
        )  # fmt: skip
    finally:
        shutil.rmtree(session.virtualenv.location)


def _installed(session: nox.Session) -> dict[str, str]:
    listed = session.run("python", "-m", "pip", "list", "--format", "json", silent=True)
    return {package["name"]: package["version"] for package in json.loads(listed)}
