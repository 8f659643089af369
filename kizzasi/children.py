"""Processes that end with the one that started them, from their first moment on.

Nothing here may import torch: that takes seconds, on a busy machine a minute, and a process whose
parent is killed meanwhile has to notice.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

EVERY_SECONDS = 0.2  # between looks at who the parent is, until its pipe is there


@dataclass(frozen=True)
class Child:
    """What a spawned process runs. It watches its parent before it reads anything else, so hand
    over by arguments what takes long to import.

    Args:
        target: "module:function", imported in the process alone.
        parent: id of the process that starts it.
    """

    target: str
    parent: int

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        threading.Thread(target=_leave_with, args=(self.parent,), daemon=True).start()

    def __call__(self, *arguments: Any) -> None:
        module, _, name = self.target.partition(":")
        getattr(importlib.import_module(module), name)(*arguments)


def _leave_with(parent: int) -> None:
    while (known := multiprocessing.parent_process()) is None:  # as long as arguments are read
        if os.name == "posix" and os.getppid() != parent:
            os._exit(1)
        time.sleep(EVERY_SECONDS)
    known.join()
    os._exit(1)
