"""How is a run planned, loaded and driven? The engine behind `LLM`, and the backends it runs in."""
