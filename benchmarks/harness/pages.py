"""Tables on the documentation's pages, each between ``<!-- table: NAME -->`` and ``<!-- end -->``."""

import re
from collections.abc import Callable, Iterable, Sequence

NOT_MEASURED = "Not measured yet."
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, draw: Callable[[str], str | None]) -> str:
    """The page with its tables drawn anew, by their names; one that `draw` knows nothing of stays."""

    def drawn(block: re.Match[str]) -> str:
        table = draw(block["name"])
        return block[0] if table is None else f"{block[1]}{table}\n{block[3]}"

    return BLOCK.sub(drawn, page)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
