"What several test files need."
from contextlib import contextmanager

import torch


@contextmanager
def never_waits(device):
    "An error where Python waits for the GPU meanwhile; on a CPU, in a rehearsal, nothing is asked."
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try: yield
    finally: torch.cuda.set_sync_debug_mode("default")
