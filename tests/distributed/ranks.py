"""Two processes on this machine that do the same jobs, in one process group over gloo, for the tests of this folder.

`python -m tests.distributed.ranks FOLDER` reads `FOLDER/jobs.json`, a list of jobs. A process is forked per rank, so
that the packages are imported once. What a rank says goes into `FOLDER/rank0.log` and `rank1.log`.
"""

import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
WORLD_SIZE = 2
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
_STUCK_AFTER = 60  # seconds, then the log tells where a rank is


def run_jobs(folder: Path, jobs: list[dict[str, Any]], *, timeout: float = 280) -> list[int]:
    """Run the jobs; returns the exit status of each rank."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.ranks", str(folder)],
        env=environment(),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks too
        raise AssertionError("\n".join(log_of(folder, rank)[-3000:] for rank in range(WORLD_SIZE))) from None
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def log_of(folder: Path, rank: int) -> str:
    return (folder / f"rank{rank}.log").read_text(encoding="utf-8", errors="replace")


def environment() -> dict[str, str]:
    """This checkout importable, and the tools of this environment first: each version of ninja compiles anew."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PATH": path}


def launch(command: list[str], folder: Path, *, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """A launcher's command in `folder`, with this checkout importable and the tools of this environment on the path."""
    return subprocess.run(
        command,
        env=environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _run_rank(rank: int, port: int, folder: Path) -> int:
    log = os.open(folder / f"rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.dump_traceback_later(_STUCK_AFTER, repeat=True)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD_SIZE),
        "LOCAL_WORLD_SIZE": str(WORLD_SIZE),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from tests.distributed.jobs import JOBS

    for job in json.loads((folder / "jobs.json").read_text(encoding="utf-8")):
        print("job", job, flush=True)
        try:
            status = JOBS[job.pop("job")](folder, **job)
        except BaseException:
            traceback.print_exc()
            status = 99
        if status:
            return status
        # accelerate and transformers remember an earlier job's engine
        for engine in ("DEEPSPEED", "FSDP"):
            os.environ.pop(f"ACCELERATE_USE_{engine}", None)
        unset_hf_deepspeed_config()
    return 0


def _main(folder: Path) -> None:
    import tests.distributed.jobs  # noqa: F401  (imported before the fork)

    port = free_port()
    children = []
    for rank in range(WORLD_SIZE):
        child = os.fork()
        if child == 0:
            status = 98
            try:
                status = _run_rank(rank, port, folder)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(statuses))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
