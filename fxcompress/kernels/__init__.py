"""Kernels, one file a device; each gives the same bits as the reference in its codec."""
