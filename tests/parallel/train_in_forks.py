"""Runs the train command in real processes that share one import: forked from this one before JAX starts.

Standard input: a JSON list of cases, each a list of the arguments of its processes. Standard output: for each case the
exit codes and the output.
"""

import json
import os
import sys
import tempfile
import time

from lcm_jax import cli, train

AT_A_TIME = 2  # cases


def start(argv):
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (read when the process has ended)
    if pid := os.fork():
        return pid, output
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    code = 70
    try:
        code = cli.run(train.main, argv)
    finally:
        sys.stdout.flush()
        os._exit(code)


def end(processes):
    codes, outputs = [], []
    for pid, output in processes:
        deadline = time.monotonic() + 200
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(pid, 9)
            time.sleep(0.02)
        codes.append(os.waitstatus_to_exitcode(ended[1]))
        output.seek(0)
        outputs.append(output.read())
    return codes, outputs


def main():
    cases = json.load(sys.stdin)
    results, running = [], []
    for case in cases:
        if len(running) == AT_A_TIME:
            results.append(end(running.pop(0)))
        running.append([start(argv) for argv in case])
    results += map(end, running)
    json.dump(results, sys.stdout)


main()
