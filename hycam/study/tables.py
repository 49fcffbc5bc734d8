"""A study's tables, from its record alone."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hycam.adapter.config import HyCAMConfig
from hycam.evaluation.generation import note_on_bleu
from hycam.study.recipe import Study, parse_study
from hycam.study.render import Number, Row, Table
from hycam.study.statistics import METRICS, OVERALL, Comparison, against_best_baseline, finished, scores, summarise

_ABLATIONS = ("shared_only", "full_spec", "spec_only", "inverse_peft")
_MARKS = {"better": "*", "worse": "†"}
_BACKBONE_ALONE = "backbone alone"

_RULES = [
    "Mean ± sample standard deviation over folds x seeds. Overall perplexity is exp(total negative log-likelihood / "
    "number of response tokens) over all tasks' tokens, never a mean of the tasks' perplexities; overall BLEU-4 is "
    "that of all tasks' rows as one corpus, overall ROUGE-L the mean over all rows.",
]
_ROW_AVERAGE = (
    "Row average: the mean of the tasks' perplexities weighted by their test rows, which is nearer to an average over "
    "tasks; over tokens, a task with long responses counts more."
)


def study_tables(record: Mapping[str, Any]) -> list[Table]:
    """The tables that a record has cells for: methods, backbone sizes, per task, ablations, N_s sweep, significance."""
    study = _Tables(record)
    tables = [study.methods()]
    tables += [study.sizes(title, names) for title, names in study.study.families.items()]
    tables.append(study.per_task())
    if any(study.is_ablation(name) for name in study.study.methods):
        tables.append(study.ablations())
    if any(study.is_sweep(name) for name in study.study.methods):
        tables.append(study.sweep())
    tables.append(study.significance())
    return [table for table in tables if table.rows]


class _Tables:
    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self.study: Study = parse_study(dict(record["study"]), "study.json")
        self.backbones = list(self.study.backbones)
        self.tasks = list(dict.fromkeys(task for cell in _done(record) for task in cell["test"]["tasks"]))
        self.metrics = [m for m in METRICS if any(m in cell["test"]["overall"] for cell in _done(record))]
        # a row average is of several tasks, and says nothing of one
        reports = [report for cell in _done(record) for report in cell["test"]["tasks"].values()]
        self.task_metrics = [m for m in self.metrics if any(m in report for report in reports)]

    def is_ablation(self, method: str) -> bool:
        section = self.study.methods[method].section
        return section.get("name", "hycam") == "hycam" and section.get("preset") in _ABLATIONS

    def is_sweep(self, method: str) -> bool:
        """Whether the method is the reference with another number of experts."""
        own, reference = (self.study.methods[name].section for name in (method, self.study.reference))
        return method != self.study.reference and _without_experts(own) == _without_experts(reference)

    def main_methods(self) -> list[str]:
        """Those of the paper's Table 2: ablations but CAM alone, and the sweep, have tables of their own."""
        return [
            name
            for name, method in self.study.methods.items()
            if method.section.get("preset") == "shared_only" or not (self.is_ablation(name) or self.is_sweep(name))
        ]

    def methods(self) -> Table:
        # a run made by an earlier version has no size of what it saved
        saved = ["saved, MiB"] if any("saved_bytes" in cell for cell in _done(self.record)) else []
        costs = ["learning rate", "trained parameters", "share, %", *saved, "steps", "s a step", "peak memory, GiB"]
        rows = []
        for backbone in self.backbones:
            rows.append(self._base_row(backbone, [(metric, OVERALL) for metric in self.metrics], blanks=len(costs)))
            for method in self.main_methods():
                numbers = [*self._overall(backbone, method), *self._costs(backbone, method, costs)]
                rows.append(Row(backbone, [method, *numbers]))
        notes = [
            *self._rules(),
            "Seconds: of a training step, without validation and checkpoints. Peak memory: what a run's process had at "
            "most while it trained, allocated on its accelerator or, without one, resident (the packages' own "
            "included). Saved: the adapter's weights, or a whole model's. Learning rate: the one of the grid with the "
            "lowest validation loss of the first fold and seed.",
            *self._mark_notes(),
            *self._fold_notes(),
            *self._incomplete(),
        ]
        return Table("table2", "Methods and backbones", ["method", *self._labels(), *costs], rows, notes)

    def sizes(self, title: str, backbones: list[str]) -> Table:
        columns = ["method", *(f"{backbone}: {label}" for backbone in backbones for label in self._labels())]
        alone = [
            cell for name in backbones for cell in self._base(name, [(metric, OVERALL) for metric in self.metrics])
        ]
        rows = [Row("", [_BACKBONE_ALONE, *alone])]
        for method in self.main_methods():
            rows.append(Row("", [method, *(cell for name in backbones for cell in self._overall(name, method))]))
        return Table("table3-4", f"Backbone sizes: {title}", columns, rows, [*self._rules(), *self._mark_notes()])

    def per_task(self) -> Table:
        rows = []
        scopes = [*self.tasks, OVERALL]
        for backbone in self.backbones:
            for metric in self.task_metrics:
                section = f"{backbone}, {METRICS[metric][0]}"
                rows.append(self._base_row(backbone, [(metric, scope) for scope in scopes], section=section))
                for method in self.study.methods:
                    numbers = [self._number(backbone, method, metric, scope) for scope in scopes]
                    rows.append(Row(section, [method, *numbers]))
        return Table("table5", "Per task", ["method", *scopes], rows, [*self._rules(), *self._mark_notes()])

    def ablations(self) -> Table:
        chosen = [self.study.reference, *(name for name in self.study.methods if self.is_ablation(name))]
        rows = [
            Row(backbone, [method, *self._overall(backbone, method, marked=False), self._trained(backbone, method)])
            for backbone in self.backbones
            for method in chosen
        ]
        return Table("table6", "Ablations", ["method", *self._labels(), "trained parameters"], rows, self._rules())

    def sweep(self) -> Table:
        names = [self.study.reference, *(name for name in self.study.methods if self.is_sweep(name))]
        experts = {name: self.study.methods[name].section.get("num_experts", HyCAMConfig.num_experts) for name in names}
        rows = [
            Row(backbone, [str(experts[method]), *self._overall(backbone, method, marked=False)])
            for backbone in self.backbones
            for method in sorted(names, key=lambda name: experts[name])
        ]
        return Table("figure3", "Number of experts N_s", ["N_s", *self._labels()], rows, self._rules())

    def significance(self) -> Table:
        columns = ["scope", "metric", "best baseline", "its mean", self.study.reference, "pairs", "t", "p", "result"]
        rows = []
        for backbone in self.backbones:
            for scope in [OVERALL, *self.tasks]:
                for metric in self.metrics:
                    compared = self._compared(backbone, metric, scope)
                    if compared is not None:
                        rows.append(Row(backbone, _significance_cells(scope, metric, compared)))
        if rows and len(self.study.folds) * len(self.study.seeds) < 2:
            # the same for every scope and metric: one pair is no test
            rows = [Row("", ["all", "all", *[None] * 3, Number(1, None, 0), None, None, "no test: one fold and seed"])]
        notes = [
            f"Paired two-sided t-test over folds x seeds of {self.study.reference} against the baseline with the best "
            f"mean, of {', '.join(self.study.candidates()) or 'none'}; not corrected for the number of rows. With "
            "fewer than two pairs, or equal differences, no test is made.",
            *self._not_finite(),
        ]
        return Table("significance", "Significance", columns, rows, notes)

    def _labels(self) -> list[str]:
        return [METRICS[metric][0] for metric in self.metrics]

    def _compared(self, backbone: str, metric: str, scope: str) -> Comparison | None:
        return against_best_baseline(self.record, backbone, metric, self.study.candidates(), scope)

    def _number(self, backbone: str, method: str, metric: str, scope: str, *, marked: bool = True) -> Number | None:
        mark = ""
        if marked and method == self.study.reference:
            compared = self._compared(backbone, metric, scope)
            mark = "" if compared is None else _MARKS.get(compared.verdict, "")
        values = scores(self.record, backbone, method, metric, scope).values()
        return Number.of(summarise(values), METRICS[metric][1], mark)

    def _overall(self, backbone: str, method: str, *, marked: bool = True) -> list[Number | None]:
        return [self._number(backbone, method, metric, OVERALL, marked=marked) for metric in self.metrics]

    def _base(self, backbone: str, columns: Iterable[tuple[str, str]]) -> list[Number | None]:
        """The backbone alone: one value per fold, which no seed reaches."""
        bases = self._bases(backbone).values()
        numbers = []
        for metric, scope in columns:
            reports = [base["overall"] if scope == OVERALL else base["tasks"][scope] for base in bases]
            values = [report[metric] for report in reports if report.get(metric) is not None]
            numbers.append(Number.of(summarise(values), METRICS[metric][1]))
        return numbers

    def _bases(self, backbone: str) -> dict[int, Mapping[str, Any]]:
        """Fold -> what the backbone alone measured on it, as the study has it where any method does."""
        measured = [cell for cell in _done(self.record) if cell["backbone"] == backbone]
        changed = [name for name in self.study.methods if self.study.changes_backbone(name)]
        measured.sort(key=lambda cell: cell["method"] not in changed)  # the last of a fold stays
        return {cell["fold"]: cell["base"] for cell in measured}

    def _base_row(
        self, backbone: str, columns: list[tuple[str, str]], *, section: str | None = None, blanks: int = 0
    ) -> Row:
        return Row(section or backbone, [_BACKBONE_ALONE, *self._base(backbone, columns), *[None] * blanks])

    def _costs(self, backbone: str, method: str, columns: Iterable[str]) -> list[Any]:
        done = finished(self.record, backbone, method)

        def mean(value: Callable[[Mapping[str, Any]], float], digits: int) -> Number | None:
            return Number.of(summarise(map(value, done)), digits)

        def one(values: list[float], digits: int) -> Number | None:
            """Of what is the same in every cell of a method."""
            return Number(values[0], None, digits) if values else None

        rates = sorted({cell["learning_rate"] for cell in done})
        costs = {
            "learning rate": ", ".join(f"{rate:g}" for rate in rates) or None,
            "trained parameters": self._trained(backbone, method),
            "share, %": one([100 * cell["parameters"]["trainable"] / cell["parameters"]["total"] for cell in done], 2),
            "saved, MiB": one([cell["saved_bytes"] / 2**20 for cell in done if "saved_bytes" in cell], 1),
            "steps": mean(lambda cell: cell["steps"], 0),
            "s a step": mean(lambda cell: cell["train_seconds"] / max(cell["steps"], 1), 2),
            "peak memory, GiB": mean(lambda cell: cell["peak_bytes"] / 2**30, 2),
        }
        return [costs[column] for column in columns]

    def _trained(self, backbone: str, method: str) -> Number | None:
        counts = (cell["parameters"]["trainable"] for cell in finished(self.record, backbone, method))
        return Number.of(summarise(counts), 0)

    def _rules(self) -> list[str]:
        average = [_ROW_AVERAGE] if "row_average" in self.metrics else []
        bases = [base for backbone in self.backbones for base in self._bases(backbone).values()]
        bleu = note_on_bleu([*bases, *(cell["test"] for cell in _done(self.record))])
        return [*_RULES, *average, *([] if bleu is None else [bleu]), *self._not_finite()]

    def _not_finite(self) -> list[str]:
        """What no mean and no test has: metrics that a finished cell has as null."""
        measured = [
            (f"{_BACKBONE_ALONE} on {backbone}, fold {fold}", base)
            for backbone in self.backbones
            for fold, base in self._bases(backbone).items()
        ]
        for cell in _done(self.record):
            place = f"on {cell['backbone']}, fold {cell['fold']}, seed {cell['seed']}"
            measured.append((f"{cell['method']} {place}", cell["test"]))
        notes = []
        for name, report in measured:
            for metric in self.metrics:
                scopes = {OVERALL: report["overall"], **report["tasks"]}
                lacking = [scope for scope, values in scopes.items() if values.get(metric, 0.0) is None]
                if lacking:
                    label = METRICS[metric][0]
                    notes.append(f"{name}: {label} is not finite ({', '.join(lacking)}), and in no mean or test.")
        return notes

    def _mark_notes(self) -> list[str]:
        reference = self.study.reference
        return [
            f"* {reference} is better than the best baseline of that column, † worse: p < 0.05 in a paired two-sided "
            "t-test, see the table Significance; no mark: no significant difference, or no test."
        ]

    def _fold_notes(self) -> list[str]:
        folds = len(self.study.folds)
        if folds == 1:
            return []
        return [
            f"The {folds} folds test {folds} of the ten bins of the rows, each once; what they test differs in rows."
        ]

    def _incomplete(self) -> list[str]:
        """What the rows lack: cells that failed or are not done."""
        notes = []
        planned = len(self.study.folds) * len(self.study.seeds)
        for backbone in self.backbones:
            for method in self.study.methods:
                done = len(finished(self.record, backbone, method))
                failed = [
                    f"fold {cell['fold']}, seed {cell['seed']}: {cell['error']}"
                    for cell in self.record["cells"]
                    if (cell["backbone"], cell["method"], cell["status"]) == (backbone, method, "failed")
                ]
                if done < planned:
                    reasons = f"; failed: {'; '.join(failed)}" if failed else ""
                    notes.append(f"{method} on {backbone}: {done} of {planned} cells{reasons}.")
        return notes


def _significance_cells(scope: str, metric: str, compared: Comparison) -> list[Any]:
    label, digits, _ = METRICS[metric]
    return [
        scope,
        label,
        compared.baseline,
        Number(compared.baseline_mean, None, digits),
        Number(compared.reference_mean, None, digits),
        Number(compared.pairs, None, 0),
        None if compared.t is None else Number(compared.t, None, 2),
        None if compared.p is None else Number(compared.p, None, 4),
        compared.verdict,
    ]


def _without_experts(section: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {"name": "hycam", "preset": "paper"} if section.get("name", "hycam") == "hycam" else {}
    return {key: value for key, value in (defaults | dict(section)).items() if key != "num_experts"}


def _done(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [cell for cell in record["cells"] if cell["status"] == "done"]
