"""Triton's autotuner compiles its candidates one after another: minutes for a backward of the recurrence. This compiles them
side by side before they are timed; what is chosen, and how, stays Triton's."""

import os
from concurrent.futures import ThreadPoolExecutor

from triton.runtime._async_compile import AsyncCompileMode
from triton.runtime.autotuner import Autotuner

prune_configs = Autotuner.prune_configs


def compile_side_by_side(self, kwargs):
    configs = prune_configs(self, kwargs)
    launch = {name: value for name, value in kwargs.items() if name != "warmup"}
    try:
        with ThreadPoolExecutor(os.cpu_count()) as threads, AsyncCompileMode(threads, ignore_errors=True):
            for config in configs:
                self.fn.warmup(*self.nargs.values(), **launch, **config.all_kwargs())
    except Exception as e:  # Then Triton compiles them itself.
        print(f"compiling one after another: {e}", flush=True)
    return configs


def install():
    Autotuner.prune_configs = compile_side_by_side
