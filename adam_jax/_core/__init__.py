"""What every stage is built from.

Leaves and their arithmetic, hyperparameters, transformations as values, the chain. Private.
"""
