"""Tables on the documentation's pages, each between ``<!-- table: NAME -->`` and ``<!-- end -->``."""

import re
from collections.abc import Callable, Iterable, Sequence

NOT_MEASURED = "Not measured yet."
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, draw: Callable[[str], str]) -> str:
    """The page with every table drawn anew, by its name."""
    return BLOCK.sub(lambda block: f"{block[1]}{draw(block['name'])}\n{block[3]}", page)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
