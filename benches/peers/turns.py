"""Two or more programs in turns on the same CPUs: each runs for a moment while the others are stopped, until all have ended. On a
machine that others use too, what is measured one after the other tells the machine's moments apart; in turns all meet the same ones.

    python turns.py [--seconds 0.25] "python cpu_products.py --size 1024x576x1536 --seconds 40" \\
        "target/release/examples/products 1024x576x1536 bfloat16 40"

The programs should print medians of short pieces of work: a piece that was going on when its program was stopped counts the others'
time too.
"""

import argparse
import os
import signal
import subprocess
import time

options = argparse.ArgumentParser()
options.add_argument("--seconds", type=float, default=0.25, help="of a turn")
options.add_argument("programs", nargs="+")
options = options.parse_args()
running = [
    subprocess.Popen(program, shell=True, start_new_session=True, stdout=subprocess.PIPE, text=True)
    for program in options.programs
]


def tell(process, what):
    if process.poll() is None:
        os.killpg(process.pid, what)


try:
    for process in running:
        tell(process, signal.SIGSTOP)
    while any(process.poll() is None for process in running):
        for process in running:
            tell(process, signal.SIGCONT)
            # The last ones do not wait for those that have ended.
            if process.poll() is None:
                time.sleep(options.seconds)
            tell(process, signal.SIGSTOP)
finally:
    for process in running:
        tell(process, signal.SIGKILL)
for program, process in zip(options.programs, running):
    print(f"{program}\n{process.stdout.read()}", flush=True)
