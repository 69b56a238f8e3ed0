"""Quantized formats: the layout of packed values, and which tensors are packed."""
