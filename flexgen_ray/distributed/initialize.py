"""ray.init without its log lines, and with the caller's answer to SIGTERM left in place."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

import ray

from flexgen_ray.signals import Stopped


def initialize(**options: Any) -> str:
    """Calls ray.init with these options; returns the cluster's address.

    Raises Stopped if SIGTERM comes meanwhile.
    """
    answer = signal.getsignal(signal.SIGTERM)
    try:
        context: Any = ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except SystemExit as error:  # Ray's own answer to SIGTERM, which its start puts in place
        raise Stopped from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, answer)
    return context.address_info["address"]
