"""A script in a process of its own, forked from one that has torch imported already.

This saves five seconds for each process.
"""

import multiprocessing
import os
import runpy
import sys


METHOD = "forkserver" if sys.platform != "win32" else "spawn"
CONTEXT = multiprocessing.get_context(METHOD)
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo"])


def start(log, script, *arguments, before=None, **environment):
    """Start a script and return its multiprocessing.Process.

    Arguments: log, the file that it prints into; before, a function that is called in the
    new process first; environment, the variables that are set there.
    """
    command = [str(script), *map(str, arguments)]
    process = CONTEXT.Process(
        target=run,
        args=(str(log), command, before, environment),
        daemon=True,          # one that hangs fails its test, and ends with the tests
    )
    process.start()
    return process


def run(log, command, before, environment):
    """Run the command in this process, printing into `log`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    sys.argv = command
    if before:
        before()
    runpy.run_path(command[0], run_name="__main__")
