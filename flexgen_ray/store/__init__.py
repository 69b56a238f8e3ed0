"""Where do tensors live? Weights, KV cache and hidden states on GPU, host memory and disk."""
