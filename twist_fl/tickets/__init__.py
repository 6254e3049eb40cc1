"""A subnet for a device: evaluated, exported, verified and measured there."""
