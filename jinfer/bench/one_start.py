"""One start, in its own process: `python -m jinfer.bench.one_start MODEL ENGINE_ARGUMENTS`.

Prints the seconds of each part as one line of JSON. ENGINE_ARGUMENTS are keywords of LLM, as JSON.
"""

import json
import sys
import time
from dataclasses import asdict

BEGUN_S = time.perf_counter()

from jinfer.bench.compile_log import CompileLog  # noqa: E402 - the time of importing counts
from jinfer.bench.machine import devices  # noqa: E402
from jinfer.bench.models import model_arguments  # noqa: E402
from jinfer.engine.replicas import Replicas  # noqa: E402
from jinfer.llm import LLM  # noqa: E402
from jinfer.request.params import SamplingParams  # noqa: E402

IMPORTED_S = time.perf_counter()


def main() -> None:
    model, engine_args = sys.argv[1], json.loads(sys.argv[2])
    log = CompileLog()
    with model_arguments(model) as keywords:
        start_s = time.perf_counter()
        with LLM(**{**keywords, **engine_args}) as llm:
            ready_s = time.perf_counter()
            params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
            llm.generate([[3, 4, 5, 6]], params, use_tqdm=False)
            answered_s = time.perf_counter()
            engines = llm.engine.engines if isinstance(llm.engine, Replicas) else [llm.engine]
            reports = [engine.start_report for engine in engines]
            told = {**devices(), "plan": asdict(engines[0].plan)}
    loads = [report.weights for report in reports]
    programs = [report.programs for report in reports]
    names = programs[0].program_s
    figures = {
        **told,
        "import_s": IMPORTED_S - BEGUN_S,
        "engine_s": ready_s - start_s,
        "first_token_s": answered_s - ready_s,
        "weights_s": sum(report.weights_s for report in reports),
        "weights_bytes": sum(load.file_bytes for load in loads if load is not None),
        "programs_s": sum(each.elapsed_s for each in programs),
        "program_s": {name: sum(each.program_s[name] for each in programs) for name in names},
        **log.figures(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
