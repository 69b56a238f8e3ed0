"""How are attention, packing and sampling computed fast? Kernels for host and device."""
