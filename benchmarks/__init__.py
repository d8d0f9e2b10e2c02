"""Side by side with Optax and PyTorch.

`python -m benchmarks.accuracy` and `python -m benchmarks.step`.
"""
