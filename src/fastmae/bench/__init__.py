"""Benchmarks. Contenders run side by side in one process; every figure comes with its spread and its machine."""
