"""A script in a process of its own, forked from one that has torch imported already: five seconds less for each."""

import multiprocessing
import os
import runpy
import sys

CONTEXT = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo"])


def start(log, script, *arguments, before=None, **environment):
    """-> the running multiprocessing.Process, which prints into the file `log`. before: is called there first."""
    process = CONTEXT.Process(target=run, args=(str(log), [str(script), *map(str, arguments)], before, environment),
                              daemon=True)              # one that hangs fails its test, and ends with the tests
    process.start()
    return process


def run(log, command, before, environment):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    sys.argv = command
    if before:
        before()
    runpy.run_path(command[0], run_name="__main__")
