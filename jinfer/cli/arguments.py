"""The commands and flags of `jinfer`, and their conversion to keywords."""

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NoReturn

from jinfer import __version__
from jinfer.arguments.config_file import read_config
from jinfer.cli.bench_arguments import add_bench
from jinfer.cli.flag_defaults import MAX_TOKENS, default_of
from jinfer.config import EngineConfig
from jinfer.request.params import SamplingParams
from jinfer.shipped import DEFAULT_MODEL

_GENERATE = """\
Completes each prompt. The text of a single prompt is streamed; results of several are printed in
the order of the prompts, each as soon as possible.

Prompts come from the command line, from --file, or from standard input ("-", or no prompt at
all): one per line. A line that begins with { is JSON: {"prompt": ...}, {"prompt_token_ids": [...]}
or {"messages": [...]}, with an "id" of yours, and parameters of sampling for this line, such as
{"prompt": "The king", "id": 7, "temperature": 0.5, "max_tokens": 20}. Messages are rendered with
the model's chat template; with --chat, so is each text, as one message.

Text goes to standard output, everything else to standard error. With --n above 1, [2] stands
before the second output, and [3.2] before that of the third prompt.
"""
_CHAT = """\
A conversation; the model needs a chat template.

Each line is a message. A line that ends in a backslash goes on in the next one; lines between two
\"\"\" are one message, and so are pasted lines, where the terminal marks a paste.

Ctrl-C stops an answer, not the program. /reset forgets the conversation, /last N all but its last
N turns; /help lists the commands, /quit or Ctrl-D ends.
"""
_INFO = "Describes a model folder without reading its weights."
_CONVERT = """\
Converts the weights of a model folder to an Orbax checkpoint, from which each host reads only its
own shards. The folder's other files are copied.
"""
_ENGINE = """\
`generate` with up to 8 outputs, `chat` and `bench latency` choose smaller --max-num-seqs and
--max-num-batched-tokens, which start sooner.
"""
_JSON = (
    "one line of JSON per prompt: id, prompt, text, token_ids, finish_reason, metrics, and "
    "logprobs if asked for; with --n above 1, a list of outputs; error, if it has no answer"
)


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing the usage, which is longer than a screen."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. See `{self.prog} --help`.")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command and its flags; flags that are not given are not in the namespace.

    Raises:
      ValueError: an argument is unknown or has a wrong value.
      SystemExit: after --help and --version, and after the help that stands for a missing command.
    """
    parser, commands = _parsers()
    args, unknown = _parse_known(parser, commands, sys.argv[1:] if argv is None else argv)
    words = (args.command, getattr(args, "benchmark", None))
    command = commands.get(" ".join(filter(None, words)), parser)
    if unknown:
        if not unknown[0].startswith("-"):
            raise ValueError(
                f"{command.prog} takes no such word; got {unknown[0]}. See `{command.prog} --help`."
            )
        near = difflib.get_close_matches(unknown[0].split("=")[0], command._option_string_actions)
        hint = f"Did you mean {near[0]}?" if near else f"See `{command.prog} --help`."
        raise ValueError(f"there is no such flag; got {unknown[0]}. {hint}")
    if args.command is None or words == ("bench", None):
        command.print_help()
        command.exit()
    if "config" in args:
        for name, value in read_config(args.config).items():
            place = "engine_seed" if name == "seed" else name
            if place not in args:  # the command line wins
                setattr(args, place, value)
    args.model = getattr(args, "model", DEFAULT_MODEL)
    return args


def _parse_known(
    parser: _Parser, commands: dict[str, _Parser], argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and those that are unknown; prompts may stand before, between and after flags.

    argparse allows that only in a parser without commands, and loses "--" at the start.
    """
    if not argv or argv[0] != "generate":
        return parser.parse_known_args(argv)
    end = argv.index("--") if "--" in argv else len(argv)
    args, unknown = commands["generate"].parse_known_intermixed_args(
        argv[1:end], argparse.Namespace(command="generate")
    )
    args.prompts = [*args.prompts, *argv[end + 1 :]]
    return args, unknown


def sampling_args(args: argparse.Namespace) -> dict[str, Any]:
    """The given sampling parameters, as keywords of SamplingParams."""
    given = {f.name: getattr(args, f.name) for f in fields(SamplingParams) if f.name in args}
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    return given


def engine_args(args: argparse.Namespace) -> dict[str, Any]:
    """The given engine arguments without `model`, as keywords of LLM."""
    names = {f.name for f in fields(EngineConfig)} - {"model", "seed"}
    given = {name: getattr(args, name) for name in names if name in args}
    if "engine_seed" in args:
        given["seed"] = args.engine_seed
    return {**given, "progress": not args.quiet}


def processes_args(args: argparse.Namespace) -> dict[str, Any]:
    """The given arguments for several hosts, as keywords of `initialize`."""
    names = ("coordinator_address", "num_processes", "process_id")
    given = {name: getattr(args, name) for name in names if name in args}
    if given and "coordinator_address" not in given:
        raise ValueError(
            "several hosts need --coordinator-address; got none. Give the host and port of "
            "process 0, or auto on a TPU pod."
        )
    return given


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    formatter = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30)
    parser = _Parser(
        prog="jinfer",
        description="LLM inference in JAX for TPUs and GPUs.",
        epilog='Try:  jinfer generate "Once upon a time"',
        formatter_class=formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"jinfer {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    described = {
        "generate": ("complete prompts", "jinfer generate [flags] [PROMPT ...]", _GENERATE),
        "chat": ("talk with a model in the terminal", "jinfer chat [flags]", _CHAT),
        "info": ("describe a model folder", "jinfer info [--json] [MODEL]", _INFO),
        "convert": (
            "write a model as an Orbax checkpoint",
            "jinfer convert [flags] HF_FOLDER ORBAX_FOLDER",
            _CONVERT,
        ),
        "bench": ("measure speed against its limits", "jinfer bench BENCHMARK [flags]", ""),
    }
    commands = {
        name: subparsers.add_parser(
            name,
            usage=usage,
            help=short,
            description=long,
            formatter_class=formatter,
            allow_abbrev=False,
        )
        for name, (short, usage, long) in described.items()
    }
    _add_generate(commands["generate"])
    _add_chat(commands["chat"])
    _add_info(commands["info"])
    _add_convert(commands["convert"])
    commands |= add_bench(commands["bench"], formatter, _add_engine)
    return parser, commands


def _add_generate(parser: _Parser) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help='text; "-" = standard input')
    parser.add_argument("--file", metavar="FILE", help="read prompts from it; default: none")
    parser.add_argument("--json", action="store_true", help=_JSON)
    parser.add_argument(
        "--chat", action="store_true", help="each text is a message; applies the chat template"
    )
    _add_model(parser)
    report = partial(_add, parser.add_argument_group("output"))
    report("n", type=int, metavar="N", help="outputs per prompt")
    report("logprobs", type=int, metavar="N", help="top tokens to report per output token")
    report("prompt_logprobs", type=int, metavar="N", help="the same per prompt token")
    report("detokenize", off=True, help="token ids only")
    _add_common(parser, MAX_TOKENS["generate"])


def _add_chat(parser: _Parser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="the system message; default: none")
    _add_model(parser)
    _add_common(parser, MAX_TOKENS["chat"])


def _add_info(parser: _Parser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help=f"a folder, a hub name org/name, or a shipped model (default: {DEFAULT_MODEL})",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _add_convert(parser: _Parser) -> None:
    parser.add_argument(
        "model", metavar="HF_FOLDER", help="a folder, a hub name org/name, or a shipped model"
    )
    parser.add_argument("target", metavar="ORBAX_FOLDER", help="a new or empty folder")
    parser.add_argument(
        "--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: as stored)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="only errors")


def _add_model(parser: _Parser) -> None:
    parser.add_argument(
        "--model",
        default=argparse.SUPPRESS,
        metavar="MODEL",
        help=f"a folder, a hub name org/name, or a shipped model (default: {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--profile", metavar="FOLDER", help="write a trace for jax.profiler; default: none"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="only text and errors")


def _add_common(parser: _Parser, max_tokens: int) -> None:
    _add_sampling(parser)
    _add_stopping(parser, max_tokens)
    _add_engine(parser)


def _add_sampling(parser: _Parser) -> None:
    add = partial(
        _add,
        parser.add_argument_group(
            "sampling",
            "Applied in this order. A default in the model's generation_config.json comes first.",
        ),
    )
    number, count = {"type": float, "metavar": "X"}, {"type": int, "metavar": "N"}
    add("repetition_penalty", **number, help="divides logits of prompt and output tokens; 1 = off")
    add("presence_penalty", **number, help="subtracted once from logits of output tokens; 0 = off")
    add("frequency_penalty", **number, help="subtracted for each occurrence in the output; 0 = off")
    add(
        "logit_bias",
        type=_bias,
        metavar="ID=X",
        action="append",
        help="adds X to a token's logit (repeatable)",
    )
    add("bad_words", metavar="TEXT", action="append", help="never generate this (repeatable)")
    add("allowed_token_ids", **_IDS, help="generate only these tokens")
    add("temperature", **number, help="0 = always the likeliest token")
    add("top_k", **count, help="keep the N likeliest tokens; 0 = all")
    add("top_p", **number, help="keep the likeliest tokens of this total probability; 1 = all")
    add("min_p", **number, help="drop tokens below this fraction of the top probability; 0 = none")
    add("seed", **count, help="for every prompt; the same seed gives the same text")


def _add_stopping(parser: _Parser, max_tokens: int) -> None:
    add = partial(_add, parser.add_argument_group("stopping"))
    said = (
        f"most output tokens, up to the end of the context; default: the model's, or {max_tokens}"
    )
    add("max_tokens", type=int, metavar="N", help=said)
    add("min_tokens", type=int, metavar="N", help="fewest output tokens")
    add("stop", metavar="TEXT", action="append", help="end at this text (repeatable)")
    add("stop_token_ids", **_IDS, help="end at these tokens")
    add("ignore_eos", action="store_true", help="do not stop at the model's end tokens")
    add("include_stop_str_in_output", action="store_true", help="show the stop text too")
    add("skip_special_tokens", off=True, help="show special tokens too")


def _add_engine(parser: _Parser) -> None:
    add = partial(_add, parser.add_argument_group("engine", _ENGINE))
    count = {"type": int, "metavar": "N"}
    add("config", metavar="FILE", help="YAML file of arguments; the command line wins")
    add("tensor_parallel_size", **count, help="chips that share one model")
    add("data_parallel_size", **count, help="replicas of the model, each on chips of its own")
    add("max_model_len", **count, help="tokens of prompt and output together")
    add("max_num_seqs", **count, help="sequences that run at the same time")
    add("max_num_batched_tokens", **count, help="most tokens of one step")
    add("max_decode_steps", **count, help="most decode steps of one dispatch")
    add("long_prefill_token_threshold", **count, help="most tokens of one prompt in one step")
    target = {"type": float, "metavar": "MS"}
    add("ttft_target_ms", **target, help="goal: time to first token")
    add("tpot_target_ms", **target, help="goal: time per further token")
    add("enable_prefix_caching", off=True, help="compute every prompt in full")
    add(
        "kv_offloading_size",
        type=float,
        metavar="GIB",
        help="host memory for evicted pages of the KV cache",
    )
    add("page_size", **count, help="tokens per page of the KV cache")
    add("num_pages", **count, help="pages of the KV cache")
    add("gpu_memory_utilization", type=float, metavar="X", help="fraction of free memory to use")
    add("kv_cache_memory_bytes", **count, help="size of the KV cache on each chip")
    add("dtype", metavar="NAME", help="auto, float32, bfloat16 or float16")
    add("kv_cache_dtype", metavar="NAME", help="auto, int8 or fp8")
    add("load_format", metavar="NAME", help="auto, safetensors or dummy (random weights)")
    rope = partial(_json, example='{"rope_theta": 1000000.0}')
    add("hf_overrides", type=rope, metavar="JSON", help="keys that win over config.json")
    add("revision", metavar="NAME", help="branch, tag or commit of the model on the hub")
    add("tokenizer", metavar="MODEL", help="the tokenizer's folder, if not the model's")
    add("tokenizer_revision", metavar="NAME", help="the same for the tokenizer")
    add("chat_template", metavar="FILE", help="a chat template, or the name of one of the model's")
    add("download_dir", metavar="FOLDER", help="where to store downloads from the hub")
    add("hf_token", metavar="TOKEN", help="access token for the hub; better: `hf auth login`")
    add("skip_tokenizer_init", action="store_true", help="token ids in, token ids out")
    defaults = partial(_json, example='{"temperature": 0.7}')
    add("generation_config", metavar="NAME", help="defaults: auto = the model's; vllm = none")
    add(
        "override_generation_config",
        type=defaults,
        metavar="JSON",
        help="defaults that win over it",
    )
    add("engine_seed", **count, help="for prompts without --seed, and for dummy weights")
    add("max_logprobs", **count, help="limit on --logprobs and --prompt-logprobs")
    add("layer_loop", metavar="NAME", help="scan or unrolled")
    add("attention", metavar="NAME", help="implementation of paged attention")
    add("compilation_cache", metavar="FOLDER", help="where to store compiled programs")
    add("late_compile", metavar="NAME", help="compiling after start-up: warn or error")
    add(
        "enforce_eager",
        action=argparse.BooleanOptionalAction,
        help="start sooner, with slower steps; by default for small models on a CPU",
    )
    add("disable_log_stats", action="store_true", help="no line about the load every 10 s")
    add = partial(
        _add,
        parser.add_argument_group("several hosts", "Run the command on each; process 0 prints."),
    )
    add(
        "coordinator_address",
        metavar="HOST:PORT",
        help="of process 0; auto on a TPU pod and under Slurm or Open MPI, without the next two",
    )
    add("num_processes", **count, help="number of processes on all hosts")
    add("process_id", **count, help="index of this process, from 0")


def _add(group: Any, name: str, *, off: bool = False, **settings: Any) -> None:
    """Adds a flag named like its field; without it the namespace lacks the field.

    With `off` the flag is "--no-..." and sets the field to False. The help of a flag with a value
    ends with its default.
    """
    flag = f"--{'no-' if off else ''}{name.replace('_', '-')}"
    if off:
        settings["action"] = "store_false"
    elif settings.get("action") != "store_true" and "default: " not in settings["help"]:
        settings["help"] += f"; default: {default_of(name)}"
    group.add_argument(flag, dest=name, default=argparse.SUPPRESS, **settings)


def _ids(text: str) -> list[int]:
    try:
        return [int(one) for one in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"token ids are integers separated by commas; got {text!r}. Write them as 5,17"
        ) from None


def _json(text: str, *, example: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"this must be JSON; got {text!r}. Write such as '{example}'"
        ) from None


def _bias(text: str) -> tuple[int, float]:
    token_id, _, value = text.partition("=")
    try:
        return int(token_id), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a bias is a token id and a number; got {text!r}. Write it as 17=-2.5"
        ) from None


_IDS = {"type": _ids, "metavar": "ID,ID", "action": "extend"}
