"""Which blocks there are, who holds which, and what that costs. No torch."""
