"""The quality of a model's answers: perplexity and cloze accuracy."""
