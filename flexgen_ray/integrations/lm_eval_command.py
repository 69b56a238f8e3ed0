"""`flexgen-ray-lm-eval`: lm-eval's own command line, which also knows the model `flexgen_ray`."""

from __future__ import annotations

import sys


def main() -> None:
    """Exit status and options are lm-eval's."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(f"flexgen-ray-lm-eval: error: {error}; pip install 'flexgen-ray[lm-eval]'")
    import flexgen_ray.integrations.lm_eval  # noqa: F401

    cli_evaluate()
