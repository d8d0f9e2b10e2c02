"""What stands around a whole optimizer: groups of parameters, skipped steps, manual mesh axes."""

from adam_jax.wrappers.groups import by_path
from adam_jax.wrappers.manual import manual_axes
from adam_jax.wrappers.skip import skip_nonfinite, skip_spikes
from adam_jax.wrappers.skipping import expect_progress

__all__ = ["by_path", "expect_progress", "manual_axes", "skip_nonfinite", "skip_spikes"]
