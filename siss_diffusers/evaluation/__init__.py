"""Measures models beside each other, on the same seeds: for `siss evaluate`, the Python API, demos and benchmarks."""
