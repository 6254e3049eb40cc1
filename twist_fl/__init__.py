"""TwIST (arXiv 2511.03983) on Flower: blueprint -> slice -> train -> aggregate -> deploy.

These names are the public interface; `examples/` has a short file for each use. All else is private and may change.
Each is loaded when it is first asked for: `import twist_fl` loads neither torch nor Flower.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twist_fl.blueprint.architectures import Architecture as Architecture
    from twist_fl.blueprint.architectures import Blocks as Blocks
    from twist_fl.blueprint.architectures import Row as Row
    from twist_fl.blueprint.blocks import Layout as Layout
    from twist_fl.blueprint.blocks import make_layout as make_layout
    from twist_fl.blueprint.blueprint import Blueprint as Blueprint
    from twist_fl.blueprint.division import Division as Division
    from twist_fl.blueprint.drawing import draw_round as draw_round
    from twist_fl.blueprint.drawing import draw_ticket as draw_ticket
    from twist_fl.blueprint.drawing import full_blueprint as full_blueprint
    from twist_fl.blueprint.policies import Deal as Deal
    from twist_fl.blueprint.policies import Policy as Policy
    from twist_fl.cli.train import train as train
    from twist_fl.config.schema import Config as Config
    from twist_fl.config.schema import load_config as load_config
    from twist_fl.config.schema import presets as presets
    from twist_fl.data.formats import Part as Part
    from twist_fl.federation.client import client_app as client_app
    from twist_fl.federation.strategy import TwistStrategy as TwistStrategy
    from twist_fl.federation.wire import reply_fields as reply_fields
    from twist_fl.model.subnet import build_model as build_model
    from twist_fl.model.subnet import get_state as get_state
    from twist_fl.model.subnet import load_state as load_state
    from twist_fl.model.subnet import slice_state as slice_state
    from twist_fl.runs.checkpoint import RunFolder as RunFolder
    from twist_fl.runs.trained import TrainedRun as TrainedRun
    from twist_fl.system.errors import ConfigError as ConfigError
    from twist_fl.system.errors import LaunchError as LaunchError
    from twist_fl.tickets.export import Ticket as Ticket
    from twist_fl.tickets.export import export_ticket as export_ticket
    from twist_fl.tickets.export import make_ticket as make_ticket
    from twist_fl.training.aggregate import StreamingMean as StreamingMean
    from twist_fl.training.job import Job as Job
    from twist_fl.training.job import make_job as make_job
    from twist_fl.training.rules import per_block as per_block

__version__ = "0.1.0"

_HOMES = {
    "blueprint.architectures": ("Architecture", "Blocks", "Row"),
    "blueprint.blocks": ("Layout", "make_layout"),
    "blueprint.blueprint": ("Blueprint",),
    "blueprint.division": ("Division",),
    "blueprint.drawing": ("draw_round", "draw_ticket", "full_blueprint"),
    "blueprint.policies": ("Deal", "Policy"),
    "cli.train": ("train",),
    "config.schema": ("Config", "load_config", "presets"),
    "data.formats": ("Part",),
    "federation.client": ("client_app",),
    "federation.strategy": ("TwistStrategy",),
    "federation.wire": ("reply_fields",),
    "model.subnet": ("build_model", "get_state", "load_state", "slice_state"),
    "runs.checkpoint": ("RunFolder",),
    "runs.trained": ("TrainedRun",),
    "system.errors": ("ConfigError", "LaunchError"),
    "tickets.export": ("Ticket", "export_ticket", "make_ticket"),
    "training.aggregate": ("StreamingMean",),
    "training.job": ("Job", "make_job"),
    "training.rules": ("per_block",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            globals()[name] = found = getattr(import_module(f"twist_fl.{module}"), name)
            return found
    raise AttributeError(f"module 'twist_fl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(["__version__", *(name for names in _HOMES.values() for name in names)])
