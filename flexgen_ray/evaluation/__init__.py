"""How good are the answers? Perplexity and cloze accuracy of an offloaded model."""
