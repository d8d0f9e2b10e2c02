"""What stands around a whole optimizer: groups of parameters, and steps that are skipped."""

from adam_jax.wrappers.groups import by_path
from adam_jax.wrappers.skip import skip_nonfinite, skip_spikes
from adam_jax.wrappers.skipping import expect_progress

__all__ = ["by_path", "expect_progress", "skip_nonfinite", "skip_spikes"]
