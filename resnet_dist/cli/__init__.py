"""The command line: one verb per subcommand.

Exit codes: 0 done; 2 bad input, with one line that says what and where; 1 any other failure (some
images could not be read by `predict`, or cannot be trained on according to `verify`). `train` exits
with 75 when it was stopped on request and the same command resumes it. Under a launcher, which
takes every code but 0 for a crash, a rank that was stopped exits with 0; ask `status` instead.
Ctrl-C ends every other verb as SIGINT does, which shells report as 130.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from resnet_dist.cli.parser import make_parser
from resnet_dist.errors import UserError, not_installed, shortened
from resnet_dist.process import LAUNCHER, set_up_process
from resnet_dist.run.stderr_filter import filter_stderr

OTHER_RANKS_LINGER_SECONDS = 5.0


def main(argv: list[str] | None = None) -> None:
    set_up_process()
    if argv is None:
        filter_stderr()
    ctrl_c = CtrlC()
    try:
        with ctrl_c:
            _run(sys.argv[1:] if argv is None else argv, is_program=argv is None)
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except ModuleNotFoundError as error:
        # The package may be missing on one node only, so the first rank of each node reports it.
        _refuse(not_installed(error), speaks=os.environ.get("LOCAL_RANK", "0") == "0")
    except UserError as error:
        # The error is the same on every rank, so rank 0 reports it.
        _refuse(error, speaks=os.environ.get("RANK", "0") == "0")
    except KeyboardInterrupt:
        end_by_ctrl_c()
    except Exception:
        if not ctrl_c.was_pressed:
            raise
        end_by_ctrl_c()  # a library has made another exception of it


def _run(argv: list[str], is_program: bool) -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(f"the current folder: {error.strerror}; cd to another one") from None
    # argparse does not recognize overrides after an option (`train x.yaml --dry-run seed=1`).
    arguments, rest = make_parser().parse_known_args(argv)
    if rest and not hasattr(arguments, "overrides"):
        raise UserError(f"command line: {' '.join(rest)}: one argument too many")
    if rest:
        arguments.overrides += rest
    arguments.is_program = is_program  # and not a call from Python, whose streams are not ours
    arguments.verb(arguments)


def _refuse(error: UserError, speaks: bool) -> NoReturn:
    # The other ranks exit later: torchrun kills all ranks when the first one exits.
    if speaks:
        with contextlib.suppress(OSError):
            print(shortened(f"resnet-dist: {error}"), file=sys.stderr, flush=True)
    else:
        time.sleep(OTHER_RANKS_LINGER_SECONDS)
    sys.exit(error.exit_code)


class CtrlC:
    """Remembers that Ctrl-C was pressed, used as a context. The verb ends with KeyboardInterrupt.

    What other threads then say about their end is of no use to anybody.
    """

    def __init__(self) -> None:
        self.was_pressed = False
        self._before: Any = None

    def __enter__(self) -> None:
        self._hook = threading.excepthook
        threading.excepthook = self._on_error
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._on_signal)

    def __exit__(self, *_: object) -> None:
        threading.excepthook = self._hook
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.was_pressed = True
        raise KeyboardInterrupt

    def _on_error(self, error: Any) -> None:
        if not self.was_pressed:
            self._hook(error)


def end_by_ctrl_c() -> NoReturn:
    """Ends this process as SIGINT does, without a traceback. A shell then ends its loop, too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if "multiprocessing" in sys.modules:
        for process in sys.modules["multiprocessing"].active_children():
            process.kill()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    # For ranks that `train --ranks` has started, that process speaks.
    speaks = os.environ.get(LAUNCHER, str(os.getpid())) == str(os.getpid())
    if os.environ.get("RANK", "0") == "0" and speaks:
        with contextlib.suppress(OSError):
            print("resnet-dist: ended by Ctrl-C", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    sys.exit(128 + signal.SIGINT)  # where the signal is blocked
