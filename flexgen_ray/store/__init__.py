"""Tensor stores: weights, KV cache and hidden states on GPU, host memory and disk."""
