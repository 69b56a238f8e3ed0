"""`python -m flexgen_ray` is the `flexgen-ray` command."""

from flexgen_ray.cli import main

main()
