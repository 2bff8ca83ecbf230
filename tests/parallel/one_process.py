"""One process of a run over several: `python one_process.py ASKED`, a JSON object.

Asked are `address`, `num_processes` and `process_id`; `model` and the arguments of `engine`;
`jobs`, a list of prompts with their sampling parameters, whose tokens process 0 prints as JSON;
`num_engines`, as many of which do so one after the other; and `forever`, to generate until
something ends it. Used by `test_distributed.py`.
"""

import json
import sys
from typing import Any

from jinfer import LLM, SamplingParams
from jinfer.parallel.distributed import initialize


def main(asked: dict[str, Any]) -> None:
    initialize(asked["address"], asked["num_processes"], asked["process_id"])
    for _ in range(asked["num_engines"]):
        generate(asked)


def generate(asked: dict[str, Any]) -> None:
    usual = {"skip_tokenizer_init": True, "late_compile": "error", "progress": False}
    prompts = [{"prompt_token_ids": prompt_ids} for prompt_ids, _ in asked["jobs"]]
    params = [SamplingParams(**chosen) for _, chosen in asked["jobs"]]
    with LLM(asked["model"], **usual, **asked["engine"]) as llm:
        while True:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            print(json.dumps([output.outputs[0].token_ids for output in outputs]), flush=True)
            if not asked["forever"]:
                break


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
