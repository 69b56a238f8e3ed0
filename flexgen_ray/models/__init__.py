"""Which models are there, and how are their checkpoints read? One short file a family."""
