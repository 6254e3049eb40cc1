"""Train a tiny model: in this process, or with the word flower in a Flower simulation, to the same weights.

Run it a second time: the run is finished and is used as it is. Stopped with Ctrl-C, it goes on where it was.
"""

import sys

from twist_fl import load_config, train

settings = ["name=example", "train.rounds=4", "train.interval=5"]
settings += ["data.vocab_size=300", "eval.tickets=3", "eval.max_windows=32"]
config = load_config("demo", settings)
run = train(config, flower="flower" in sys.argv)
print(f"{run.folder.path}: {run.state.round} rounds, perplexity of the full model {run.perplexity():.2f}")
