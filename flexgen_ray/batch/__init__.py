"""A JSONL job from input file to output file: request lines, response lines, and the journal."""
