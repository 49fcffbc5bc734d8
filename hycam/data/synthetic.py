"""Small task families in the spirit of the paper's five domains, and general text, both generated from a seed.

The families and the general text share one small world: people and things, ailments, towns, causes, functions. The
general text tells of it in prose, sums, code and disjointed talk, so that a language model trained on it knows the
words, the facts and the sentences. Which sentences answer a question, and in what order, only the tasks show.
"""

from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

from datasets import Dataset

from hycam.errors import InputError

# So many repeats in a row mean that a family has no further rows: 200 misses at a share s of unseen rows have the
# probability (1 - s)^200.
_REPEATS_ALLOWED = 200


class Row(NamedTuple):
    instruction: str
    input: str
    output: str


class Ailment(NamedTuple):
    name: str
    signs: tuple[str, str, str]
    remedy: str
    worry: str


class Operation(NamedTuple):
    words: str
    code: str


_PEOPLE = ("Mia", "Leo", "Nora", "Omar", "Ivy", "Hugo", "Zoe", "Finn", "Ada", "Theo", "Lena", "Max", "Ruth", "Sam")
_SPEAKERS = (*_PEOPLE, "User", "Assistant")
_THINGS = ("apples", "books", "coins", "pens", "cards", "shells", "stamps", "eggs", "plums", "marbles", "cups", "nuts")
_ROOMS = ("kitchen", "garden", "school", "market", "library", "office", "park", "barn")
_TOWNS = (
    "Norvale",
    "Eastmere",
    "Brookton",
    "Highford",
    "Stonebay",
    "Millrow",
    "Ashwick",
    "Fernley",
    "Oakport",
    "Redhill",
)
_REGIONS = ("north", "south", "east", "west")
_GOODS = ("wool", "salt", "honey", "cheese", "timber", "glass", "silk", "wheat", "fish", "tea")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_AILMENTS = (
    Ailment("a cold", ("a runny nose", "a sore throat", "a mild cough"), "warm drinks and rest", "a high fever"),
    Ailment(
        "the flu", ("a high fever", "sore muscles", "a dry cough"), "rest and plenty of water", "trouble breathing"
    ),
    Ailment("a migraine", ("a throbbing headache", "nausea", "pain from light"), "sleep in a dark room", "weak arms"),
    Ailment("hay fever", ("itchy eyes", "frequent sneezing", "a runny nose"), "an antihistamine", "swollen lips"),
    Ailment("a stomach bug", ("nausea", "loose stools", "stomach cramps"), "small sips of water", "blood in the stool"),
    Ailment("a sprained ankle", ("a swollen ankle", "pain when walking", "a bruise"), "ice and rest", "a numb foot"),
    Ailment("an ear infection", ("ear pain", "poor hearing", "a mild fever"), "a pain reliever", "fluid from the ear"),
    Ailment("anemia", ("tiredness", "pale skin", "shortness of breath"), "food rich in iron", "pain in the chest"),
)
_CAUSES = (
    "the rain came late in spring",
    "frost damaged the young plants",
    "many workers moved away",
    "the main road was closed for weeks",
    "the price of fuel rose",
    "a new bridge opened near the river",
    "the soil lost its minerals",
    "insects spread across the fields",
    "the old machines broke down",
    "storms destroyed two warehouses",
)
_CHANGES = ("fall", "rise", "change slowly", "become uncertain")
_OPERATIONS = (
    Operation("adds {k} to", "{x} + {k}"),
    Operation("subtracts {k} from", "{x} - {k}"),
    Operation("multiplies by {k}", "{x} * {k}"),
    Operation("divides by {k}", "{x} // {k}"),
)
_FUNCTIONS = ("convert", "adjust", "scale", "update", "score", "price", "total", "shift")
_ARGUMENTS = ("x", "n", "value", "count")


def _steps(rng: Random, start: int) -> Iterator[tuple[str, str, int, int]]:
    """Two or three (verb, sign, amount, result), amounts from 2 to 9, that keep the count from 1 to 20."""
    for _ in range(rng.choice((2, 3))):
        gains = start < 4 or (start < 17 and rng.random() < 0.5)
        amount = rng.randint(2, min(9, 20 - start) if gains else min(9, start - 1))
        verb = rng.choice(("buys", "finds", "gets")) if gains else rng.choice(("loses", "sells", "gives away"))
        start = start + amount if gains else start - amount
        yield verb, "+" if gains else "-", amount, start


def _reasoning(rng: Random) -> Row:
    person, thing, count = rng.choice(_PEOPLE), rng.choice(_THINGS), rng.randint(2, 12)
    told, solved = [], []
    before = count
    for verb, sign, amount, after in _steps(rng, count):
        told.append(f"{person} {verb} {amount} {thing}.")
        solved.append(f"{person} {verb} {amount}, so {before} {sign} {amount} = {after}.")
        before = after
    question = f"How many {thing} does {person} have in the end?"
    return Row(
        f"{person} has {count} {thing}. {' '.join(told)} {question}",
        "",
        f"Let's think step by step. {person} starts with {count} {thing}. {' '.join(solved)} The answer is {before}.",
    )


def _medical(rng: Random) -> Row:
    ailment = rng.choice(_AILMENTS)
    first, second = rng.sample(ailment.signs, 2)
    days, age = rng.randint(2, 9), rng.randint(18, 79)
    return Row(
        f"I am {age} years old. For {days} days I have had {first} and {second}. What should I do?",
        "",
        f"Hello, and thank you for your question. With {first} and {second} for {days} days, you may have "
        f"{ailment.name}. I suggest {ailment.remedy}. Please see a doctor at once if you notice {ailment.worry}. "
        "I wish you good health.",
    )


def _town(rng: Random) -> tuple[str, str, int, str, str, str]:
    """Name, region, people, what its market sells, the market's day, and the text that says so."""
    town, region, people = rng.choice(_TOWNS), rng.choice(_REGIONS), rng.randint(2, 99) * 100
    goods, day = rng.choice(_GOODS), rng.choice(_DAYS)
    text = f"{town} is a town in the {region}. It has {people} people. Its market sells {goods} on {day}."
    return town, region, people, goods, day, text


def _context(rng: Random) -> Row:
    town, region, people, goods, day, text = _town(rng)
    asked, answer = rng.choice(
        (
            (f"How many people live in {town}?", f"According to the text, {people} people live in {town}."),
            (
                f"What can one buy at the market of {town}?",
                f"According to the text, the market of {town} sells {goods}.",
            ),
            (f"When is the market of {town} held?", f"According to the text, the market of {town} is held on {day}."),
            (f"Where is {town}?", f"According to the text, {town} is in the {region}."),
            (
                "Summarize the text as a list.",
                f"- Town: {town}\n- Region: {region}\n- People: {people}\n- Goods: {goods}",
            ),
        )
    )
    return Row(asked, text, answer)


def _code(rng: Random) -> Row:
    name, argument = rng.choice(_FUNCTIONS), rng.choice(_ARGUMENTS)
    words: list[str] = []
    lines: list[str] = []
    for operation in rng.sample(_OPERATIONS, 2):
        k = rng.randint(2, 9)
        words.append(_said(operation, k, "it" if words else argument))
        lines.append(f"    {argument} = {operation.code.format(x=argument, k=k)}\n")
    does = " and ".join(words)
    return Row(
        f"Write a Python function {name} that {does}.",
        "",
        f'def {name}({argument}):\n    """Return the number that {name} makes of {argument}."""\n'
        f"{''.join(lines)}    return {argument}",
    )


def _said(operation: Operation, k: int, what: str) -> str:
    """`adds 3 to x`, `multiplies x by 3`."""
    words = operation.words.format(k=k)
    verb, _, rest = words.partition(" ")
    return f"{verb} {what} {rest}" if rest.startswith("by") else f"{words} {what}"


def _longform(rng: Random) -> Row:
    town, goods, change = rng.choice(_TOWNS), rng.choice(_GOODS), rng.choice(_CHANGES)
    first, second = rng.sample(_CAUSES, 2)
    year = rng.randint(1950, 2020)
    return Row(
        f"Why did the trade in {goods} of {town} {change} in {year}?",
        f"[1] In {year}, {first}. [2] In {town}, {second}.",
        f"There are two main reasons why the trade in {goods} of {town} began to {change} in {year}. "
        f"First, {first} [1]. Second, {second} [2]. "
        f"Taken together, both reasons explain what happened to {goods} in {town}.",
    )


_FAMILIES: dict[str, Callable[[Random], Row]] = {
    "synthetic_reasoning": _reasoning,  # Auto-CoT: reasoning step by step
    "synthetic_medical": _medical,  # iCliniq: a patient's question, a doctor's letter
    "synthetic_context": _context,  # Dolly: instructions about a given text
    "synthetic_code": _code,  # CodeAlpaca: a function from its description
    "synthetic_longform": _longform,  # WebGPT: a long answer with its evidence
}
SYNTHETIC_TASKS = tuple(_FAMILIES)


def synthetic_task(name: str, num_rows: int, seed: int) -> Dataset:
    """`num_rows` different rows of a family, with the columns instruction, input and output.

    The rows depend on `name` and `seed` alone, and fewer rows are the first of more.

    Raises:
        InputError: an unknown name, `num_rows` below 1, or more rows than the family has.
    """
    if name not in _FAMILIES:
        raise InputError(f"name: {name!r} given, one of {', '.join(SYNTHETIC_TASKS)} is wanted")
    if num_rows < 1:
        raise InputError(f"num_rows: {num_rows} given, at least 1 is wanted")
    rng = Random(f"{name} {seed}")
    rows: dict[Row, None] = {}
    repeats = 0
    while len(rows) < num_rows:
        row = _FAMILIES[name](rng)
        repeats = repeats + 1 if row in rows else 0
        if repeats > _REPEATS_ALLOWED:
            raise InputError(f"num_rows: {num_rows} given, {name} has only about {len(rows)} different rows")
        rows[row] = None
    return Dataset.from_list([row._asdict() for row in rows])


def _story(rng: Random) -> str:
    person, other = rng.sample(_PEOPLE, 2)
    thing, room, count = rng.choice(_THINGS), rng.choice(_ROOMS), rng.randint(2, 12)
    told = [f"{person} is in the {room} with {other}. {person} has {count} {thing}."]
    for verb, _, amount, after in _steps(rng, count):
        told.append(f"{person} {verb} {amount} {thing} and has {after}.")
    return " ".join([*told, f"In the end {other} leaves the {room}."])


def _sums(rng: Random) -> str:
    sums = []
    for _ in range(rng.randint(4, 8)):
        a, b = rng.randint(1, 20), rng.randint(1, 9)
        sums.append(f"{a} + {b} = {a + b}." if rng.random() < 0.5 else f"{a + b} - {b} = {a}.")
    return " ".join(sums)


def _health(rng: Random) -> str:
    ailment, person = rng.choice(_AILMENTS), rng.choice(_PEOPLE)
    signs = rng.sample(ailment.signs, 3)
    return (
        f"People with {ailment.name} have {signs[0]}, {signs[1]} or {signs[2]}. The usual remedy is {ailment.remedy}. "
        f"In bad cases there is {ailment.worry}. At {rng.randint(18, 79)} years, {person} had {ailment.name} for "
        f"{rng.randint(2, 9)} days, with {signs[0]} and {signs[1]}."
    )


def _travel(rng: Random) -> str:
    town, _, people, goods, day, text = _town(rng)
    person = rng.choice(_PEOPLE)
    return f"{text} On {day} {person} buys {goods} in {town}, where {people} people live."


def _history(rng: Random) -> str:
    town, goods, year = rng.choice(_TOWNS), rng.choice(_GOODS), rng.randint(1950, 2020)
    causes = rng.sample(_CAUSES, 2)
    return (
        f"In {year}, {causes[0]}, and {causes[1]}. So the trade in {goods} of {town} did {rng.choice(_CHANGES)}. "
        f"Old people in {town} still talk about {year} and the {goods}."
    )


def _snippet(rng: Random) -> str:
    lines = []
    for name in rng.sample(_FUNCTIONS, 2):
        argument, operation, k = rng.choice(_ARGUMENTS), rng.choice(_OPERATIONS), rng.randint(2, 9)
        body = operation.code.format(x=argument, k=k)
        lines.append(f"# {_said(operation, k, argument)}\n{name} = lambda {argument}: {body}\n")
    return "".join(lines)


def _remark(rng: Random) -> str:
    """One sentence (or function) of the kind that the tasks ask and answer with, about anything."""
    person, thing, town, goods = (rng.choice(words) for words in (_PEOPLE, _THINGS, _TOWNS, _GOODS))
    ailment, year, number = rng.choice(_AILMENTS), rng.randint(1950, 2020), rng.randint(1, 20)
    name, argument = rng.choice(_FUNCTIONS), rng.choice(_ARGUMENTS)
    return rng.choice(
        (
            f"How many {thing} does {person} have in the end?",
            f"Let's think step by step about {goods}.",
            f"{person} starts with {number} {thing}.",
            f"The answer is {number}.",
            f"I am {rng.randint(18, 79)} years old.",
            f"For {rng.randint(2, 9)} days I have had {rng.choice(ailment.signs)}. What should I do?",
            f"Hello, and thank you for your question about {goods}.",
            f"With {rng.choice(ailment.signs)} you may have {ailment.name}.",
            f"I suggest {ailment.remedy}.",
            f"Please see a doctor at once if you notice {ailment.worry}.",
            "I wish you good health.",
            f"When is the market of {town} held?",
            f"According to the text, {person} lives in the {rng.choice(_REGIONS)}.",
            f"- Town: {town}\n- People: {number * 100}",
            f"- Goods: {goods}\n- Region: {rng.choice(_REGIONS)}",
            f"Why did the trade in {goods} {rng.choice(_CHANGES)} in {year}?",
            f"There are two main reasons why {person} left {town} in {year}.",
            f"First, {rng.choice(_CAUSES)} [1].",
            f"Second, {rng.choice(_CAUSES)} [2].",
            f"Taken together, both reasons explain what happened to {person}.",
            f"Write a Python function {name} that returns a number.",
            f'def {name}({argument}):\n    """Return what {person} makes of {argument}."""\n    return {argument}\n',
        )
    )


def _talk(rng: Random) -> str:
    """What several people say, none of it in answer to another."""
    return "".join(f"{rng.choice(_SPEAKERS)}: {_remark(rng)} {_remark(rng)}\n" for _ in range(rng.randint(2, 3)))


_PROSE = (_story, _sums, _health, _travel, _history, _snippet, _talk, _talk)


def general_text(num_documents: int, seed: int) -> list[str]:
    """Short documents about the tasks' world, in which no question is answered.

    Raises:
        InputError: `num_documents` below 1.
    """
    if num_documents < 1:
        raise InputError(f"num_documents: {num_documents} given, at least 1 is wanted")
    rng = Random(f"general text {seed}")
    return [rng.choice(_PROSE)(rng) for _ in range(num_documents)]
