"""What a compiled program exchanges between chips, read off its text."""

import re

_KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def collectives_in(text: str) -> list[tuple[str, str, int]]:
    """Kind, dtype and number of each array that a collective gives a chip, in order.

    Of those that start and end apart, the start's tuple lists what goes in as well.
    """
    found = []
    for result, kind in re.findall(rf"= (\(?\w+\[[^=]*?) ({_KINDS})(?:-start)?\(", text):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", result):
            number = 1
            for length in filter(None, dims.split(",")):
                number *= int(length)
            found.append((kind, dtype, number))
    return found
