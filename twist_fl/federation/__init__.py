"""TwIST on Flower. Only here is Flower imported."""
