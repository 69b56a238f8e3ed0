#!/usr/bin/env bash
# A JSONL batch from a shell, as sent to OpenAI's Batch API.
#   bash examples/batch_jsonl.sh MODEL_FOLDER [OUTPUT.jsonl]
set -euo pipefail
model=$1
output=${2:-out.jsonl}
input=$(mktemp)
trap 'rm -f "$input"' EXIT

cat > "$input" <<'JSONL'
{"custom_id": "france", "method": "POST", "url": "/v1/completions", "body": {"model": "any", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}}
{"custom_id": "story", "method": "POST", "url": "/v1/completions", "body": {"model": "any", "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0.8, "seed": 7, "stop": ["."]}}
{"prompt": "Plain lines work too.", "max_tokens": 12}
JSONL

# With a GPU: --gpu-memory 16GiB --cpu-memory 64GiB --offload-dir /fast/disk
flexgen-ray generate --model "$model" --input "$input" --output "$output" --overwrite
cat "$output"
