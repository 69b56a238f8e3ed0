"""Text to tokens and tokens to text: tokenizer, chat template, detokenizer, stop strings."""
