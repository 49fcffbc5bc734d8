"""How far the run of a unit is, read from what it logs: its process writes its terminal's lines to a file."""

from hycam.errors import InputError
from hycam.study.recipe import Study
from hycam.study.units import Unit, run_folder
from hycam.training.callbacks import read_metrics
from hycam.training.folder import METRICS_FILE


class UnitProgress:
    """The progress of a unit's run since this was made.

    Attributes:
        began_at: the share of the run that was done by then; a run may go on from a checkpoint.
    """

    def __init__(self, study: Study, unit: Unit) -> None:
        self._path = run_folder(study, unit) / METRICS_FILE
        trainer = study.trainer
        self._steps, self._epochs = trainer.get("max_steps", -1), trainer.get("num_train_epochs", 3)
        self.began_at = self.read()[0] or 0.0

    def read(self) -> tuple[float | None, str]:
        """The share of its steps that the run has logged, None of none, and that in a few words."""
        try:
            lines = [line for line in read_metrics(self._path) if "loss" in line]
        except InputError:  # read while it is written: the next time it is whole
            lines = []
        if not lines:
            return None, "before its first log"
        last = lines[-1]
        step, loss = last["step"], last["loss"]
        share = step / self._steps if self._steps > 0 else last["epoch"] / self._epochs
        reached = f"step {step}" + (f"/{self._steps}" if self._steps > 0 else f", {share:.0%}")
        if share >= 1:
            return 1.0, f"{reached}, measuring"
        return share, reached + ("" if loss is None else f", loss {loss:.4g}")

    def seconds_for(self, part: float, share: float, seconds: float) -> float | None:
        """How long a part of the run's steps takes, by the `share` that it got to in the `seconds` since this was made.

        None where it hasn't gone on yet.
        """
        done = share - self.began_at
        return seconds * part / done if done > 0 else None
