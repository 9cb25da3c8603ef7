"""Metrics of forgetting and of what is kept: pure functions of tensors, one file each."""
