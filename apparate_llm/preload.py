"""What the process that others are forked from imports (prefork.py)."""

import ctypes
import gc
import signal

PR_SET_PDEATHSIG = 1

ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # not to outlive a server that stops while this imports
gc.disable()  # nothing of this is garbage

import vllm.v1.engine.core  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402, F401

import apparate_llm.engine.scheduler  # noqa: E402
import apparate_llm.engine.worker  # noqa: E402, F401
from apparate_llm.patches.ledger import apply_all  # noqa: E402

apply_all("serve")
gc.freeze()
gc.enable()
