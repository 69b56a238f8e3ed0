"""Run `flexgen-ray generate` on the Ray cluster that this machine belongs to.

ray submit cluster/aws.yaml cluster/generate.py -- --model FOLDER --input IN --output OUT ...
"""

import sys

from flexgen_ray.cli.main import main

if __name__ == "__main__":
    sys.argv[1:] = ["generate", "--address", "auto", *sys.argv[1:]]
    main()
