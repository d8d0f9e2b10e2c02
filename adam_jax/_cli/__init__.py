"""The command line, `python -m adam_jax`. Private."""
