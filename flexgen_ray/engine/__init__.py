"""The engine behind `LLM`: plans, loads and runs a model's requests, and has the backends."""
