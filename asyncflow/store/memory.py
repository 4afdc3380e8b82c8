"""A limit for what Arrow takes, so that no message can fill the memory of who reads it.

A compressed Arrow message of 66 kB can unpack to 2 GiB, and Flight unpacks before anybody can look at it. But what it
unpacks to comes from Arrow's pool, and this pool can be a reserve of fixed size: then Arrow says that there is no room,
and the call is refused. Nothing else in the process is concerned, as it would be by a limit of the system (RLIMIT_AS,
RLIMIT_DATA), under which gRPC ends the process, and which counts the mapped segments as well. ADR 0006 has the rest.
"""

from __future__ import annotations

import os
import sys
from typing import Final

from asyncflow.errors import StoreError

DEFAULT: Final = 1 << 30
"""Bytes of address space; memory is taken as it is used."""


def limit_arrow_memory(size: int = DEFAULT) -> None:
    """Let Arrow take at most about so many bytes in this process. Raises StoreError when Arrow is loaded already.

    Arrow allocates with mimalloc (https://arrow.apache.org/docs/cpp/env_vars.html), which reads its options
    (https://microsoft.github.io/mimalloc/environment.html) when it is loaded.
    """
    if "pyarrow" in sys.modules:
        raise StoreError("Arrow's memory can only be limited before Arrow is loaded: do it first")
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "mimalloc"
    os.environ["MIMALLOC_RESERVE_OS_MEMORY"] = f"{size >> 10}KiB"
    os.environ["MIMALLOC_DISALLOW_OS_ALLOC"] = "1"
