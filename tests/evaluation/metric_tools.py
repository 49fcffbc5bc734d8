"""Tools that papers measure BLEU-4 and ROUGE-L with, on the same answers as ours.

`docs/compare.md` has their differences: ``python -m tests.evaluation.metric_tools`` draws its table.
"""

import json
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sacrebleu
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu, sentence_bleu
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from benchmarks.harness.pages import fill, markdown
from hycam.evaluation.generation import evaluate_generation

PAGE = Path(__file__).parents[2] / "docs" / "compare.md"
# Written for this: answers, the wanted ones, and both as sacremoses 0.1.1 tokenises them (`escape=False`).
_ANSWERS = json.loads(Path(__file__).with_name("answers.json").read_text(encoding="utf-8"))
_MOSES = {text: tokens.split(" ") if tokens else [] for text, tokens in _ANSWERS["moses"].items()}
Pairs = list[tuple[str, str]]
LONG: Pairs = [(pair["answer"], pair["wanted"]) for pair in _ANSWERS["long"]]
SHORT: Pairs = [(pair["answer"], pair["wanted"]) for pair in _ANSWERS["short"]]
# Without those that have a run of four tokens.
SHORTEST: Pairs = [pair for pair in SHORT if max(len(text.split()) for text in pair) < 4]
# A fifth of the answers is missing.
EMPTY: Pairs = [("" if number % 5 == 4 else answer, wanted) for number, (answer, wanted) in enumerate(LONG)]
SETS = {"long answers": LONG, "short answers": SHORT, "under four tokens": SHORTEST, "a fifth empty": EMPTY}

Tokenizer = Callable[[str], list[str]]


def thirteen_a(text: str) -> list[str]:
    return Tokenizer13a()(text).split()


def moses(text: str) -> list[str]:
    return _MOSES[text]


def nmt_bleu(answers: Sequence[str], references: Sequence[Sequence[str]], tokenize: Tokenizer = thirteen_a) -> float:
    """BLEU-4 of TensorFlow's NMT tutorial, which `evaluate`'s module `bleu` computes; the shortest reference counts.

    It divides by the length of all answers together, so it fails where every one is empty.
    """
    matches, possible, length, wanted_length = Counter[int](), Counter[int](), 0, 0
    for answer, of_answer in zip(answers, references, strict=True):
        tokens, wanted = tokenize(answer), [tokenize(reference) for reference in of_answer]
        length, wanted_length = length + len(tokens), wanted_length + min(map(len, wanted))
        allowed = Counter[tuple[str, ...]]()
        for reference in wanted:
            allowed |= _ngrams(reference)
        for ngram, count in (_ngrams(tokens) & allowed).items():
            matches[len(ngram)] += count
        possible.update({order: max(len(tokens) - order + 1, 0) for order in range(1, 5)})
    if not all(matches[order] for order in range(1, 5)):
        return 0.0
    precision = math.exp(statistics.fmean(math.log(matches[order] / possible[order]) for order in range(1, 5)))
    return 100 * precision * min(1.0, math.exp(1 - wanted_length / length))


def nltk_bleu(answers: Sequence[str], references: Sequence[Sequence[str]], tokenize: Tokenizer) -> float:
    """The corpus's BLEU-4 of NLTK."""
    wanted = [[tokenize(reference) for reference in of_answer] for of_answer in references]
    with warnings.catch_warnings(action="ignore"):
        return 100 * corpus_bleu(wanted, [tokenize(answer) for answer in answers])


def nltk_mean_bleu(answers: Sequence[str], references: Sequence[Sequence[str]], tokenize: Tokenizer) -> float:
    """The mean of the answers' own BLEU-4, as fine-tuning frameworks report it, by NLTK's third smoothing."""
    smooth = SmoothingFunction().method3
    return 100 * statistics.fmean(
        sentence_bleu([tokenize(reference) for reference in of_answer], tokenize(answer), smoothing_function=smooth)
        for answer, of_answer in zip(answers, references, strict=True)
    )


def sacre_bleu(answers: Sequence[str], references: Sequence[Sequence[str]], **options: object) -> float:
    """The corpus's BLEU of sacrebleu, by its own defaults but for `options`; `evaluate`'s module calls it so too."""
    return sacrebleu.corpus_bleu(
        list(answers), [list(stream) for stream in zip(*references, strict=True)], **options
    ).score


def rouge_l(answers: Sequence[str], references: Sequence[str], kind: str = "rougeL", *, stem: bool = False) -> float:
    """The mean F1 of rouge-score; `evaluate` gives the median of 1,000 means of rows drawn with replacement."""
    scorer = RougeScorer([kind], use_stemmer=stem)
    pairs = zip(references, answers, strict=True)
    return 100 * statistics.fmean(scorer.score(*pair)[kind].fmeasure for pair in pairs)


def _ngrams(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(tokens[start : start + order]) for order in range(1, 5) for start in range(len(tokens) - order + 1)
    )


@dataclass(frozen=True)
class Tool:
    """A way in which papers measure: `ours` is the key of what it is set beside, `verdict` what the docs say of it."""

    name: str
    ours: str
    measure: Callable[[Sequence[str], Sequence[str]], float]
    verdict: str

    def differences(self) -> dict[str, float]:
        """The tool's score less ours, from 0 to 100, on each of the sets."""
        found = {}
        for name, pairs in SETS.items():
            answers, wanted = (list(texts) for texts in zip(*pairs, strict=True))
            found[name] = self.measure(answers, wanted) - evaluate_generation(answers, wanted)[self.ours]
        return found


def _one(
    bleu: Callable[..., float], *args: object, **options: object
) -> Callable[[Sequence[str], Sequence[str]], float]:
    return lambda answers, wanted: bleu(answers, [[text] for text in wanted], *args, **options)


TOOLS = [
    Tool('sacrebleu\'s `corpus_bleu`, `smooth_method="none"`', "bleu4", _one(sacre_bleu, smooth_method="none"), "yes"),
    Tool("`evaluate`, `bleu` (times 100)", "bleu4", _one(nmt_bleu), "yes"),
    Tool("sacrebleu's `corpus_bleu`; `evaluate`, `sacrebleu`", "bleu4", _one(sacre_bleu), "where ours isn't near 0"),
    Tool("NLTK's `corpus_bleu` of 13a tokens", "bleu4", _one(nltk_bleu, thirteen_a), "of long answers"),
    Tool("NLTK's `corpus_bleu` of Moses tokens", "bleu4", _one(nltk_bleu, moses), "no"),
    Tool("NLTK's `corpus_bleu` of words between blanks", "bleu4", _one(nltk_bleu, str.split), "no"),
    Tool("sacrebleu, `lowercase=True`", "bleu4", _one(sacre_bleu, lowercase=True), "no"),
    Tool("mean of NLTK's `sentence_bleu`, `method3`, 13a tokens", "bleu4", _one(nltk_mean_bleu, thirteen_a), "no"),
    Tool("the same of characters", "bleu4", _one(nltk_mean_bleu, list), "no"),
    Tool("rouge-score's `rougeL`, mean F1; `evaluate`, `rouge`", "rougeL", rouge_l, "yes"),
    Tool("`rougeLsum`", "rougeL", lambda *pairs: rouge_l(*pairs, "rougeLsum"), "of answers of one line"),
    Tool("`rougeL`, `use_stemmer=True`", "rougeL", lambda *pairs: rouge_l(*pairs, stem=True), "no"),
]


def table(name: str) -> str | None:
    if name != "metric-tools":
        return None
    header = ["tool", "beside our", *SETS, "to be set beside ours"]
    labels = {"bleu4": "BLEU-4", "rougeL": "ROUGE-L"}
    rows = [[tool.name, labels[tool.ours], *map(_shown, tool.differences().values()), tool.verdict] for tool in TOOLS]
    return markdown(header, [["ours", "", *_ours(), ""], *rows])


def _ours() -> Iterator[str]:
    for pairs in SETS.values():
        answers, wanted = (list(texts) for texts in zip(*pairs, strict=True))
        scores = evaluate_generation(answers, wanted)
        yield f"{scores['bleu4']:.2f}, {scores['rougeL']:.2f}"


def _shown(difference: float) -> str:
    return "0" if abs(difference) < 0.005 else f"{difference:+.2f}"


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), table), encoding="utf-8")
