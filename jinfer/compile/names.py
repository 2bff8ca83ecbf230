"""Names of an engine's programs, shared by start-up, the runner and the loop."""

WRITE_SLOTS = "write_slots"
RESTORE_COUNTS = "restore_counts"
COPY_PAGES = "copy_pages"
GATHER_PAGES = "gather_pages"
SCATTER_PAGES = "scatter_pages"


def step_name(num_tokens: int) -> str:
    """The name of the program for one step of `num_tokens` packed tokens, padding included."""
    return f"step of {num_tokens} tokens"


def decode_name(num_rows: int) -> str:
    """The name of the program for decode steps of `num_rows` rows, padding included."""
    return f"decode of {num_rows} rows"
