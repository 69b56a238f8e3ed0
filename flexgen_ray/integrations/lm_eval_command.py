"""`flexgen-ray-lm-eval`: lm-evaluation-harness's command line with the model `flexgen_ray`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run lm-eval's command line; options and exit status are its own."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(f"flexgen-ray-lm-eval: error: {error}; pip install 'flexgen-ray[lm-eval]'")
    import flexgen_ray.integrations.lm_eval  # noqa: F401

    cli_evaluate()
