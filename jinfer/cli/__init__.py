"""The command line: `jinfer generate`, `jinfer chat`, `jinfer info`, `jinfer convert`,
`jinfer bench`."""

import gc
import os
import signal
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence

from jinfer.cli.interrupt import INTERRUPTED, ends_at_once

PIPE_CLOSED = 141  # 128 + SIGPIPE, which not every platform has


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, or 2 for an error of the user.

    Args:
      argv: the arguments after `jinfer`; None = this process's arguments.

    Raises:
      SystemExit: after --help and --version; and, on several hosts, in processes other than 0
        when process 0 has ended.
    """
    try:
        with ends_at_once():
            args, command = _chosen(argv)
        with warnings.catch_warnings():
            warnings.showwarning = _tell_warning
            _join_hosts(args)
            status = command(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        if argv is None:  # the process ends now; a second Ctrl-C would only add a traceback
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            gc.freeze()  # or Python takes seconds to search what the system frees anyway
        print("\njinfer: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _let_go_of_pipes()
        return PIPE_CLOSED
    except (ValueError, NotImplementedError) as error:  # errors of the user, each with a message
        return _refused(error)
    except RuntimeError as error:
        if "Unable to initialize backend" in str(error):  # JAX_PLATFORMS names an absent backend
            return _refused(error)
        raise


def _chosen(argv: Sequence[str] | None) -> tuple[Namespace, Callable[[Namespace], int]]:
    from jinfer.cli.arguments import parse  # late: inside the block that Ctrl-C ends

    args = parse(argv)
    return args, _command(args.command)


def _join_hosts(args: Namespace) -> None:
    """Connects to the other hosts, if flags ask for it; returns in process 0 only."""
    from jinfer.cli.arguments import processes_args

    given = processes_args(args)
    if not given:
        return
    from jinfer.engine.multi_host import follow
    from jinfer.hosts.distributed import initialize, processes
    from jinfer.hosts.processes import Follower

    if given["coordinator_address"] == "auto":
        del given["coordinator_address"]
    initialize(**given)
    here = processes()
    if isinstance(here, Follower):
        follow(here)


def _command(name: str):
    # Import late: `--help` must not wait for JAX.
    if name == "generate":
        from jinfer.cli.generate import generate

        return generate
    if name == "chat":
        from jinfer.cli.chat import chat

        return chat
    if name == "bench":
        from jinfer.cli.bench import bench

        return bench
    if name == "convert":
        from jinfer.cli.convert import convert

        return convert
    from jinfer.cli.info import info

    return info


def _refused(error: Exception) -> int:
    print(f"jinfer: error: {error}", file=sys.stderr)
    return 2


def _tell_warning(message: Warning | str, *_: object) -> None:
    """Prints a warning as one line, without its place in the source."""
    print(f"jinfer: warning: {message}", file=sys.stderr)


def _let_go_of_pipes() -> None:
    """The reader closed the pipe; flushing buffered output must not fail at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
