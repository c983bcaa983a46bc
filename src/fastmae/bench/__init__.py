"""Benchmarks: what is compared runs side by side in one process, and every figure comes with its spread and its machine."""
