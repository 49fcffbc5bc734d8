"""`make versions`: the tests that rest on other packages, in environments that cover what is promised of them.

Each environment's record goes to ``results/versions``; those committed are in ``benchmarks/results/versions``, where
``python -m benchmarks.tables`` draws their table from.
"""

import shutil

import nox

nox.options.default_venv_backend = "venv"  # by pip, whose constraints a machine may have
nox.options.stop_on_first_error = False

_TOOLS = ("pytest>=8", "pytest-timeout>=2.3", "pyyaml", "scikit-learn>=1.5")
# What rests on the interfaces of other packages: adapters, their files, training, checkpoints, evaluation, generation.
_TESTS = (
    "tests/test_reliances.py",
    "tests/adapter/test_discovery.py",
    "tests/adapter/test_peft.py",
    "tests/adapter/test_saved.py",
    "tests/analysis/test_value_states.py",
    "tests/data/test_cache.py",
    "tests/data/test_packing.py",
    "tests/evaluation/test_generation.py",
    "tests/kernels/test_modulation.py",
    "tests/methods/test_peft.py",
    "tests/training/test_run.py",
)
# name -> Python, and what is pinned in it; everything else is the newest that fits. TRL wants later datasets than the
# oldest promised.
ENVIRONMENTS = {
    "oldest": (
        "3.11",
        ("torch==2.6.0", "transformers==5.17.0", "peft==0.21.0", "accelerate==1.10.0", "datasets==4.0.0", "numpy<2"),
    ),
    "gpu-images": ("3.12", ("torch==2.11.0", "transformers==5.17.0", "trl")),
    "oldest-libraries": (
        "3.11",
        ("torch==2.13.0", "transformers==5.17.0", "peft==0.21.0", "accelerate==1.10.0", "datasets==4.0.0"),
    ),
    "transformers-5.17": ("3.11", ("torch==2.13.0", "transformers==5.17.0", "trl")),
    "transformers-5.23": ("3.11", ("torch==2.13.0", "transformers==5.23.0", "trl")),
    "newest": ("3.13", ("torch", "transformers", "peft", "accelerate", "datasets", "trl")),
}


@nox.session
@nox.parametrize(("python", "pins"), [nox.param(*environment, id=name) for name, environment in ENVIRONMENTS.items()])
def versions(session: nox.Session, pins: tuple[str, ...]) -> None:
    """Build one environment, run the tests in it, write its record, and take the environment away."""
    name = session.name.partition("(")[2].rstrip(")")
    report, record = f"results/versions/{name}.xml", f"results/versions/{name}.json"
    try:
        session.install("--quiet", "--editable", ".[train]", *_TOOLS, *pins)
        environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        session.run(
            "pytest", "-q", "-m", "not slow", "--junitxml", report, *(session.posargs or _TESTS),
            env=environment, success_codes=[0, 1],
        )  # fmt: skip
        session.run("python", "-m", "benchmarks.outcomes", report, "--out", record, env=environment)
    finally:
        shutil.rmtree(session.virtualenv.location)
