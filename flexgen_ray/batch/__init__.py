"""How does a JSONL job run from file to file? Requests in, answers out, and its journal."""
