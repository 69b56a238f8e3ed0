"""Kernels that compute attention, quantization and sampling fast, on host and device."""
