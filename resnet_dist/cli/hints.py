"""A parser of arguments whose errors are one line with the form that was probably meant."""

import argparse
import difflib
import re
import shlex
from collections.abc import Sequence
from typing import Any, NoReturn

from resnet_dist.config_file import known_as, nearest_key
from resnet_dist.errors import NO_HINT, UserError, nearest_name

# What other programs call an option, without dashes -> what to do in `train`, or our option.
INSTEAD = {
    **dict.fromkeys(
        ("resume", "resume_from", "auto_resume", "continue", "load", "restart", "checkpoint"),
        "the same command resumes by itself; leave it out",
    ),
    **dict.fromkeys(
        ("config", "cfg", "c", "f", "file"), "the config is the first argument; write it alone"
    ),
}
OPTIONS = {
    **dict.fromkeys(
        ("gpus", "num_gpus", "ngpus", "nproc", "nproc_per_node", "devices", "procs"), "--ranks"
    ),
    **dict.fromkeys(("finetune", "pretrained", "weights", "initial_checkpoint"), "--init-from"),
}


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations: `--resume` is not `--resume-anyway`. Raises UserError."""

    def __init__(self, **kwargs: Any):
        self._hidden: set[str] = set()  # options; those that `--help` does not show are here too
        super().__init__(**kwargs | {"allow_abbrev": False})
        self._verbs: Any = None  # argparse's object, which has a public `choices`

    def add_argument(self, *names: Any, **kwargs: Any) -> Any:
        self._hidden.update(name for name in names if name.startswith("-"))
        return super().add_argument(*names, **kwargs)

    def add_verbs(self, metavar: str) -> Any:
        """Returns an object whose `add_parser` adds a verb."""
        self._verbs = self.add_subparsers(required=True, metavar=metavar)
        return self._verbs

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Also refuses what argparse would pass over or complain about without a hint."""
        given = list(args or ())
        if self._verbs is None:
            options = self._hidden | set(re.findall(r"--\w[\w-]*", self.format_help()))
            for number, word in enumerate(given):
                if re.match(r"--?\w", word) and word.partition("=")[0] not in options:
                    raise self._unknown(word, given[number + 1 :], options)
        else:
            words = [word for word in given if not word.startswith("-")]
            if words and words[0] not in self._verbs.choices:
                raise self._no_verb(words[0])
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; see {self.prog} --help")

    def _no_verb(self, word: str) -> UserError:
        verbs = self._verbs.choices
        if word.endswith((".yaml", ".yml")) and "train" in verbs:
            hint = f"did you mean {self.prog} train {shlex.quote(word)}?"
        else:
            near = nearest_name(word, verbs)
            hint = f"did you mean {near}?" if near is not NO_HINT else f"one of {', '.join(verbs)}"
        return UserError(f"command line: {word}: not a verb of {self.prog}; {hint}")

    def _unknown(self, word: str, after: Sequence[str], options: set[str]) -> UserError:
        option, _, value = word.partition("=")
        if not value and after and not after[0].startswith("-") and "=" not in after[0]:
            value = after[0]  # `--lr 0.2`
        name = option.lstrip("-").replace("-", "_")
        line = f"command line: {option}: not an option of {self.prog}; "
        if name in INSTEAD and "--resume-anyway" in options:
            return UserError(line + INSTEAD[name])
        if OPTIONS.get(name) in options:
            return UserError(f"{line}write {OPTIONS[name]} {value or 'VALUE'}")
        takes_settings = "key.sub=value" in self.format_help()
        key = (known_as(name) or nearest_key(name)) if takes_settings else None
        near = difflib.get_close_matches(option, options - {"--help"}, n=1, cutoff=0.75)
        if key is not None and (known_as(name) or not near):
            return UserError(f"{line}write {key}={value or 'VALUE'}")
        hint = f"did you mean {near[0]}?" if near else f"see {self.prog} --help"
        return UserError(line + hint)
