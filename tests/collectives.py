"""What a compiled program exchanges between chips, read off its text."""

import re

_KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
_COLLECTIVE = re.compile(rf" = (\S.*?) ({_KINDS})(?:-start)?\(")


def collectives_in(text: str) -> list[tuple[str, str, int]]:
    """Kind, dtype and number of each array that a collective gives a chip, in order.

    A start's result may list what goes in: as a tuple of its own, then it is left out, or as one
    more array (gathers in XLA's older text), then it is listed as well.
    """
    found = []
    for line in text.splitlines():
        match = _COLLECTIVE.search(re.sub(r"/\*.*?\*/", "", line))
        if match is None:
            continue
        result, kind = match.groups()
        if result.startswith("(("):
            result = result[_end_of_group(result, 1) :]
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", result):
            number = 1
            for length in filter(None, dims.split(",")):
                number *= int(length)
            found.append((kind, dtype, number))
    return found


def _end_of_group(text: str, start: int) -> int:
    """Past the parenthesis that closes the one at `start`; layouts have some of their own."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    raise ValueError(f"no parenthesis closes the one at {start}: {text}")
