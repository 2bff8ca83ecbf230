"""Shows how far compiling is: a bar on a terminal, a line from time to time elsewhere."""

import threading
import time

from tqdm import tqdm

from jinfer.log import LOGGER, in_notebook, screen

FIRST_S = 1.0  # a start from the cache is over by then, and shows nothing
REFRESH_S = 1.0  # between updates of the bar
LINE_S = 10.0  # between lines, where there is no terminal


class CompileProgress:
    """Counts finished programs; a thread shows the count. The bar is removed at the end.

    Lines go to the logger, so a user whose logging hides INFO sees none.
    """

    def __init__(
        self, num_programs: int, *, shown: bool, first_s: float = FIRST_S, line_s: float = LINE_S
    ) -> None:
        """Starts to show the count, unless `shown` is False.

        Args:
          num_programs: how many there are to compile.
          shown: False = count only.
          first_s: seconds until anything is shown.
          line_s: seconds between lines.
        """
        self._num_programs, self._num_done = num_programs, 0
        self._first_s, self._line_s = first_s, line_s
        self._start_s = time.monotonic()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        if shown:
            has_bar = screen().isatty() and not in_notebook()
            show = self._show_bar if has_bar else self._show_lines
            self._thread = threading.Thread(target=show, name="jinfer-progress", daemon=True)
            self._thread.start()

    def done(self, name: str) -> None:
        """Counts a program; any thread may call it, also after `close`."""
        with self._lock:
            self._num_done += 1

    def close(self) -> None:
        """Removes the bar, before other lines follow. Idempotent."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> "CompileProgress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _show_bar(self) -> None:
        if self._over.wait(self._first_s):
            return
        with tqdm(
            total=self._num_programs,
            file=screen(),
            leave=False,
            dynamic_ncols=True,
            bar_format="jinfer: compiling, {n} of {total} programs |{bar:30}| {desc}",
        ) as bar:
            while True:
                bar.n = self._num_done
                bar.set_description_str(_clock(self._elapsed_s))
                if self._over.wait(REFRESH_S):
                    return

    def _show_lines(self) -> None:
        if self._over.wait(self._first_s):
            return
        LOGGER.info(
            "getting %d programs ready; each is compiled once for a model and its sizes",
            self._num_programs,
        )
        while not self._over.wait(self._line_s):
            LOGGER.info(
                "%d of %d programs are ready, %s",
                self._num_done,
                self._num_programs,
                _clock(self._elapsed_s),
            )

    @property
    def _elapsed_s(self) -> float:
        return time.monotonic() - self._start_s


def _clock(elapsed_s: float) -> str:
    """ "12 s", "2 min 5 s" """
    minutes, seconds = divmod(int(elapsed_s), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
