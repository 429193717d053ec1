"""Settings: a dataclass becomes command-line flags, and mistakes become sentences.

    settings = read_settings(Settings, __doc__)       the first line of each main()
    run_script(main)                                  the last line of each script

Each field of the dataclass is a flag, and the comment behind it is the flag's help. So
the name, the type, the default and the explanation stand on one line.
"""

import argparse
import contextlib
import errno
import inspect
import math
import os
import re
import sys
import typing
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path

from minissl import UserError
from minissl.training import distributed
from minissl.training.errors import is_compiler_error, is_out_of_memory
from minissl.training.files import checkpoint_errors, load_checkpoint


# ---------------------------------------------------------------- flags from a dataclass

def read_settings(cls, description, argv=None):
    """An instance of the dataclass `cls`, filled from the command line.

    A bool is a switch, a Literal is a choice, and a list takes several values. A field
    without a default is not a flag but the first argument.

    With --resume, the settings of the run replace the defaults: only what the user gives
    now can differ, see `resume_settings`.

    Raises UserError for an unknown flag and for a value that does not fit: not a number,
    a number that is infinite or needs more than 64 bits, an empty text.
    """
    parser = make_parser(cls, description)
    given = vars(parser.parse_args(argv))
    if given.get("resume"):
        return resume_settings(cls, given)
    return cls(**given)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """argparse would print the usage and exit. Here a mistake is one sentence."""
        message = message.removeprefix("argument ")
        required = re.search("arguments are required: (.*)", message)
        if required:
            message = f"{required[1]} is missing: give it before all flags"
        switch = re.match("(.*): ignored explicit argument", message)
        if switch:
            message = f"{switch[1]} takes no value"
        stray = re.match("unrecognized arguments: (.*)", message)
        if stray and os.path.exists(stray[1]) and "--data " in self.format_usage():
            message += f"; did you mean --data {stray[1]}?"
        raise UserError(f"{message} (see --help)")


def make_parser(cls, description):
    """A parser with a flag for each field. It returns only what the user has given."""
    parser = Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    comments = field_comments(cls)
    types = typing.get_type_hints(cls)
    for field in fields(cls):
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        about = comments.get(field.name, "").replace("%", "%%")
        says_nothing = default is False or default in ("", [], MISSING)
        if not says_nothing:
            about += f" (default {default})"
        name = field.name if default is MISSING else flag_name(field.name)
        options = flag_options(types[field.name], field.name.upper())
        parser.add_argument(name, help=about, **options)
    return parser


def flag_name(field_name):
    """
    >>> flag_name("batch_size")
    '--batch-size'
    """
    return "--" + field_name.replace("_", "-")


def field_comments(cls):
    """{field: the comment behind it in the source}, or {} where there is no source."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):            # a class that was typed into a notebook
        return {}
    return dict(re.findall(r"^    (\w+): .*?#\s*(.+)$", source, re.MULTILINE))


def flag_options(kind, metavar):
    """What argparse has to know about a flag whose values are of this type."""
    origin = typing.get_origin(kind) or kind
    if origin is bool:
        return dict(action="store_true")
    if origin is typing.Literal:
        choices = typing.get_args(kind)
        return dict(type=partial(read_choice, choices), choices=choices)
    if origin is list:
        item, = typing.get_args(kind)
        return dict(type=READERS[item], nargs="+", metavar=metavar)
    return dict(type=READERS[kind], metavar=metavar)


def read_text(text):
    """The text. A ~ at its beginning is the user's home, as in a shell.

    A shell itself leaves it as it is in --run=~/runs/x.
    """
    if not text.strip():                    # such as "$UNSET" in a shell
        raise argparse.ArgumentTypeError("the value is empty")
    return os.path.expanduser(text)


def read_whole_number(text):
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not -2**63 <= number <= 2**63 - 1:
        raise argparse.ArgumentTypeError(f"{text} must be from -2**63 to 2**63 - 1")
    return number


def read_number(text):
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} must be a finite number")
    return number


def read_choice(choices, text):
    if text not in choices:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(choices)}")
    return text


READERS = {str: read_text, int: read_whole_number, float: read_number}


def resume_settings(cls, given):
    """The settings that the run was started with, updated by those that are given now.

    The stored settings fitted together once, so if they do not fit any more, the cause
    is one of the given flags, and the sentence names these and not another one.
    """
    folder = given.get("run", cls.run)
    checkpoint = load_checkpoint(folder)
    with checkpoint_errors(folder):
        done = int(checkpoint["step"])
        names = {field.name for field in fields(cls)} & set(checkpoint["settings"])
        stored = {name: checkpoint["settings"][name] for name in names}
    if given.get("steps", done) < done:
        raise UserError(
            f"--steps {given['steps']}: {folder} has already made {done} steps; "
            f"give at least {done}"
        )
    try:
        return cls(**{**stored, **given, "run": folder})
    except UserError as error:
        changed = [name for name in given if name not in ("run", "resume")]
        flags = tuple(flag_name(name) for name in changed)
        if not flags or str(error).startswith(flags):
            raise
        values = " ".join(f"{flag_name(name)} {given[name]}" for name in changed)
        raise UserError(
            f"{values}: does not fit the run in {folder}, whose other settings are kept "
            f"({error})"
        ) from None


def require_at_least(settings, minimum, *names):
    """Raise UserError unless each of the named settings is at least `minimum`."""
    for name in names:
        value = getattr(settings, name)
        if not value >= minimum:                      # written so that NaN fails as well
            raise UserError(f"{flag_name(name)} {value}: must be at least {minimum}")


def require_above(settings, minimum, *names):
    """Raise UserError unless each of the named settings is above `minimum`."""
    for name in names:
        value = getattr(settings, name)
        if not value > minimum:
            raise UserError(f"{flag_name(name)} {value}: must be above {minimum}")


def require_at_most(settings, maximum, *names):
    """Raise UserError unless each of the named settings is at most `maximum`."""
    for name in names:
        value = getattr(settings, name)
        if not value <= maximum:
            raise UserError(f"{flag_name(name)} {value}: must be at most {maximum}")


# ---------------------------------------------------------------- from main() to an exit code

def run_script(main):
    """Run main(). What the user can mend becomes one sentence and an exit code:

        0    done
        1    the machine failed: memory, disk, a folder that is gone, another process
        2    a mistake in the flags, in the data or in the run's folder
        130  stopped by Ctrl-C, or by SIGTERM while it trains
        141  nobody reads the output any more, as in `| head`: ends without a sentence,
             with the code that a shell gives to a command that SIGPIPE has ended

    Any other exception is a mistake of ours and shows its traceback.
    """
    open_streams()
    try:
        main()
        sys.stdout.flush()                  # so that a pipe without a reader shows here
        distributed.end_successfully()
    except UserError as error:
        end_script(2, str(error), once=True)
    except BrokenPipeError:
        end_script(141)
    except OSError as error:
        end_script(1, describe_os_error(error) + how_to_go_on(error, main))
    except KeyboardInterrupt as stop:
        end_script(130, str(stop) or "interrupted", once=True)
    except Exception as error:
        if is_out_of_memory(error):
            end_script(1, f"not enough memory: try {how_to_save_memory(main)}")
        if distributed.is_connection_error(error):
            end_script(1, connection_sentence(main))
        if is_compiler_error(error):
            reason = str(error).strip().splitlines()[0]
            end_script(1, f"--compile: torch cannot compile this model ({reason}); leave it out")
        raise
    finally:
        distributed.leave()
        discard_unwritten_output()


def open_streams():
    """Let the scripts print anywhere: in a notebook, without a terminal, in any encoding."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            # A character that the terminal cannot show is no reason to stop.
            stream.reconfigure(errors="replace")


def name_of_script():
    """The name of the script that runs, such as "train_ae.py"."""
    return Path(sys.argv[0]).name


def end_script(code, sentence="", once=False):
    """Exit with this code. once: of several processes on a machine, only the first speaks."""
    if sentence and not (once and distributed.is_silent()):
        with contextlib.suppress(OSError):            # nobody may read this any more
            print(f"{name_of_script()}: {sentence}", file=sys.stderr)
    sys.exit(code)


def discard_unwritten_output():
    """Forget what can no longer be printed. Python would warn about it when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())


def describe_os_error(error):
    """The system's own words, such as "runs/x/checkpoint.pt: No space left on device"."""
    if error.strerror is None:
        return str(error) or type(error).__name__
    if error.filename is None:
        return error.strerror
    return f"{error.filename}: {error.strerror}"


def how_to_go_on(error, main):
    """What to do after an error of the system, or "" if its own words have to do."""
    if error.errno != errno.ENOSPC:
        return ""
    then = "continue with --resume" if has_flag(main, "resume") else "start again"
    return f"; the disk is full: free some space, then {then}"


def has_flag(main, field_name):
    """Whether the script that main() belongs to has this setting."""
    settings = getattr(inspect.getmodule(main), "Settings", None)
    return settings is not None and any(f.name == field_name for f in fields(settings))


def how_to_save_memory(main):
    advice = []
    if has_flag(main, "batch_size"):
        advice.append("a lower --batch-size")
    if has_flag(main, "width"):
        advice.append("a smaller model (--width)")
    if has_flag(main, "limit"):
        advice.append("fewer examples (--limit, or a smaller file)")
    return " or ".join(advice) or "less data"


def connection_sentence(main):
    sentence = "another process has ended, so this one ends as well"
    if has_flag(main, "resume"):
        sentence += "; --resume continues from the last checkpoint, if there is one"
    return sentence
