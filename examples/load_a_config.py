"""Settings: a preset and what differs from it. Bad ones are refused with the value, the limit and what is near."""

from dataclasses import asdict

from twist_fl import ConfigError, load_config, presets

config = load_config("demo", ["train.lr=5e-4", "blueprint.num_sub=6"])
print("presets:", *presets())
print("learning rate", config.train.lr, "| blocks a worker holds", config.blueprint.num_sub)

config.name = "mine"  # a dataclass: set what you like; it is checked again before anything starts
print(len(asdict(config)), "sections and settings at the top")

try:
    load_config("demo", ["train.learning_rate=1e-3"])
except ConfigError as error:
    print("refused:", error)
