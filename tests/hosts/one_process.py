"""One process of a run over several: `python one_process.py ASKED`, a JSON object.

Asked are `address`, `num_processes` and `process_id`; `model` and the arguments of `engine`;
`jobs`, a list of prompts with their sampling parameters, whose tokens process 0 prints as JSON;
`num_rounds`, how often they do; and `num_engines`, as many of which do so one after the other.
Pages that host memory keeps are fetched from the first on, and process 0 prints how many it asked
for. Used by `test_distributed.py`.
"""

import json
import sys
from typing import Any

from jinfer import LLM, SamplingParams
from jinfer.hosts.distributed import initialize
from jinfer.startup import load as startup


def main(asked: dict[str, Any]) -> None:
    initialize(asked["address"], asked["num_processes"], asked["process_id"])
    measured = startup.break_even_pages
    # It is measured as ever, but what comes out does not hang on this machine's bandwidth today.
    startup.break_even_pages = lambda plan, runner: min(1, measured(plan, runner) or 1)
    for _ in range(asked["num_engines"]):
        generate(asked)


def generate(asked: dict[str, Any]) -> None:
    usual = {"skip_tokenizer_init": True, "late_compile": "error", "progress": False}
    prompts = [{"prompt_token_ids": prompt_ids} for prompt_ids, _ in asked["jobs"]]
    params = [SamplingParams(**chosen) for _, chosen in asked["jobs"]]
    with LLM(asked["model"], **usual, **asked["engine"]) as llm:
        restored = note_restored(llm.engine.runner)
        for _ in range(asked["num_rounds"]):
            outputs = llm.generate(prompts, params, use_tqdm=False)
            print(json.dumps([output.outputs[0].token_ids for output in outputs]), flush=True)
        print("fetched", len(restored))


def note_restored(runner: Any) -> list[Any]:
    """What the runner is asked to restore from here on."""
    restored: list[Any] = []
    move_pages = runner.move_pages

    def move_and_note(saves: Any, restores: Any, *others: Any) -> None:
        restored.extend(restores)
        move_pages(saves, restores, *others)

    runner.move_pages = move_and_note
    return restored


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
