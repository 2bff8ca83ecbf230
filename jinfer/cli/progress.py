"""Progress of many prompts, on standard error."""

import os
import stat
import sys
import time

from tqdm import tqdm

from jinfer.cli.screen import counted, note
from jinfer.request.output import RequestOutput

LINE_EVERY_S = 10.0


class Progress:
    """A bar on a terminal, which is cleared at the end; elsewhere a line, at most every 10 s.

    Output through a pipe may reach the same terminal, into the bar: it gets lines too.

    Args:
      num_prompts: of all.
      shown: False shows nothing but notes.
    """

    def __init__(self, num_prompts: int, *, shown: bool) -> None:
        self._num_prompts, self._num_done, self._num_tokens = num_prompts, 0, 0
        self._begun_s = self._told_s = time.monotonic()
        has_bar = shown and sys.stderr.isatty() and _writes_file()
        self._tells_lines = shown and not has_bar
        self._bar = tqdm(
            total=num_prompts,
            desc="prompts",
            leave=False,
            dynamic_ncols=True,
            disable=not has_bar,
            bar_format="{l_bar}{bar}| {n_fmt} of {total_fmt}, {elapsed} (+ {remaining}){postfix}",
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()

    def count(self, output: RequestOutput) -> None:
        """Counts a prompt that is done."""
        self._num_done += 1
        self._num_tokens += output.metrics.num_output_tokens
        now_s = time.monotonic()
        rate = self._num_tokens / max(now_s - self._begun_s, 1e-9)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update()
        if self._tells_lines and now_s - self._told_s >= LINE_EVERY_S:
            self._told_s = now_s
            note(
                f"{self._num_done:,} of {counted(self._num_prompts, 'prompt')} done, "
                f"{counted(self._num_tokens, 'token')}, {rate:,.0f} tokens/s"
            )

    def note(self, text: str) -> None:
        """Writes a line beside the bar, not into it."""
        if self._bar.disable:
            note(text)
            return
        with self._bar.external_write_mode(file=sys.stderr):
            note(text)


def _writes_file() -> bool:
    """Whether standard output is a file on disk."""
    try:
        return stat.S_ISREG(os.fstat(sys.stdout.fileno()).st_mode)
    except OSError:  # no file at all
        return False
