"""Every setting, what it must satisfy, and what a person typed for it."""
