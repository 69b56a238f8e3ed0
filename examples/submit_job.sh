#!/usr/bin/env bash
# Submits a JSONL batch to a Ray cluster, follows it, and ends with its exit status.
#   bash examples/submit_job.sh MODEL_FOLDER INPUT.jsonl OUTPUT.jsonl [--pipeline-parallel-size auto ...]
# Run it in the project's folder, which is uploaded: INPUT lies in it. MODEL_FOLDER and OUTPUT are
# absolute paths on the cluster; the model's is the same on every node. Needs ray[default].
set -euo pipefail
model=$1 input=$2 output=$3
shift 3

# Both sides need the same token, in ~/.ray/auth_token or RAY_AUTH_TOKEN.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
# Where `ray dashboard cluster/aws.yaml` or `kubectl port-forward` brings the dashboard.
export RAY_API_SERVER_ADDRESS=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}

ray job submit --working-dir . --runtime-env-json '{"excludes": [".git"]}' -- \
    python -m flexgen_ray generate --model "$model" --input "$input" --output "$output" "$@"
