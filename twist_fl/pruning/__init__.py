"""Post-training baselines: what TwIST's tickets are compared with (spec, section 9). Read `methods.py` first."""
