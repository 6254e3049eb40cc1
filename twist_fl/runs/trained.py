"""A model, trained here or not, and what one asks of it: tickets of any size, perplexity, a folder for a device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twist_fl.runs.start import Start, find_start
from twist_fl.system.errors import ConfigError

if TYPE_CHECKING:
    from twist_fl.blueprint.blueprint import Blueprint
    from twist_fl.config.shares import Size
    from twist_fl.config.sizes import TicketSize
    from twist_fl.data.corpus import Windows
    from twist_fl.model.subnet import ModelCache
    from twist_fl.rounds import RunState
    from twist_fl.runs.checkpoint import RunFolder
    from twist_fl.tickets.evaluate import Tickets
    from twist_fl.tickets.exporting import Exported
    from twist_fl.training.job import Job


class TrainedRun:
    """The newest checkpoint of the run in the folder `start`; or the model `start` as it is: a Hugging Face folder, a
    name on the hub, or a GGUF file.

    `words` (key=value) are settings: of a run, where its text is now, if it has moved; of a model, what is not its
    default, for example data.path=FOLDER and blueprint.ffn_blocks=12. Raises ConfigError if there is no run and no
    model, or no checkpoint yet. Text is read only by what needs it.
    """

    def __init__(self, start: Path | str | Start, words: Sequence[str] = ()) -> None:
        self.start = start if isinstance(start, Start) else find_start(start, words)
        self.job: Job
        self.state: RunState
        """`state.params`: the full model, float32; `state.round`: rounds trained, 0 of a model as it is."""
        self.job, self.state = self.start.load()

    @property
    def folder(self) -> RunFolder:
        """Where results go: the run's; of a model, runs/NAME."""
        return self.start.results()

    @property
    def title(self) -> str:
        return f"{self.start.name}, round {self.state.round}" if self.start.run else self.start.name

    @cached_property
    def models(self) -> ModelCache:
        """Whose models are lent to evaluations, and keep no weights."""
        return self.job.models()

    @cached_property
    def _opened(self) -> ModelCache:
        """Whose models are the caller's."""
        return self.job.models()

    @property
    def test(self) -> Windows:
        """Windows of the test split that results are made on, (number, tokens)."""
        return self.job.corpus.test[: self.job.config.eval.max_windows]

    def blueprint(self, size: Size | None = None, draw: int = 0, seed: int | None = None) -> Blueprint:
        """A random ticket of `size` (6 blocks of a layer, 1/2, or 3+6 of attention and the FFN), the `draw`-th of
        `seed` (the run's); None: all blocks.

        Raises ConfigError for an impossible size.
        """
        from twist_fl.blueprint.drawing import draw_ticket, full_blueprint
        from twist_fl.config.sizes import ticket_size

        layout, division, seed = self.job.layout, self.job.division, self.job.config.seed if seed is None else seed
        if size is None:
            return full_blueprint(layout)
        return draw_ticket(layout, division, ticket_size(layout, division, size).num_sub, seed, draw)

    def model(self, blueprint: Blueprint | None = None) -> Any:
        """The PreTrainedModel of `blueprint` (None: the full one) with its weights, for `forward` and `generate`.

        Blueprints of one shape share one model: the next call of the same shape changes its weights.
        """
        return self._opened.load_sliced(blueprint or self.blueprint(), self.state.params)

    def tokenizer(self) -> Any:
        """The checkpoint's own: where the text is does not matter."""
        from twist_fl.data.tokenizer import load_tokenizer

        return load_tokenizer(str(self._tokenizer_folder))

    @cached_property
    def _tokenizer_folder(self) -> Path:
        from twist_fl.data.tokenizer import saved_tokenizer

        if self.start.run:
            return self.start.run.checkpoints()[-1]
        return saved_tokenizer(str(self.job.config.data.tokenizer))

    def perplexity(self, blueprint: Blueprint | None = None, windows: Windows | None = None) -> float:
        """Of one ticket, or of the full model, on `test` or other windows."""
        from twist_fl.tickets.evaluate import subnet_perplexity

        found, chosen = self.test if windows is None else windows, [blueprint or self.blueprint()]
        return subnet_perplexity(self.models, self.state.params, chosen, found, self.job.config.eval.batch_size)

    def tickets(self, size: Size, draws: int | None = None, windows: Windows | None = None) -> Tickets:
        """Perplexities of `draws` random tickets of one size (eval.tickets); the same ones for every run of one seed.

        Raises ConfigError for an impossible size.
        """
        from twist_fl.config.sizes import ticket_size
        from twist_fl.tickets.evaluate import ticket_distribution

        num_sub, config = ticket_size(self.job.layout, self.job.division, size).num_sub, self.job.config
        whole = num_sub == self.job.layout.num_blocks
        return ticket_distribution(
            self.models,
            self.state.params,
            self.job.division,
            num_sub,
            self.test if windows is None else windows,
            tickets=1 if whole else draws or config.eval.tickets,
            seed=config.seed,
            batch_size=config.eval.batch_size,
        )

    def export(
        self,
        blueprint: Blueprint,
        folder: Path | str,
        format: str = "compact",
        dtype: str = "float32",
        windows: Windows | None = None,
    ) -> Exported:
        """Write the ticket as a dense model with its tokenizer and a model card, which has its perplexity on `windows`.

        compact: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) opens it without this package.
        hf, gguf and onnx: see docs/exports.md. Another `format` is module:name, or what an installed package calls its
        own: see docs/extending.md. Raises ConfigError where the format cannot hold the ticket.
        """
        from twist_fl.tickets.card import Source, known_perplexity, licence_of
        from twist_fl.tickets.export import make_ticket
        from twist_fl.tickets.exporting import export

        config = self.job.config
        ticket = make_ticket(
            self.job.layout, self.state.params, self.job.model_config.to_dict(), blueprint, config.blueprint.scale
        )
        base = config.model.pretrained
        source = Source(
            Path(self.start.name).resolve().name,
            self.state.round if self.start.run else None,
            base and (Path(base).name if Path(base).is_absolute() else base),
            licence_of(Path(base).expanduser() if base else None),
            None if windows is None else known_perplexity(self.perplexity(blueprint, windows), windows.size),
        )
        return export(ticket, folder, format, dtype, self._tokenizer_folder, source)


def chosen_sizes(job: Job, given: Sequence[Size] | None) -> list[TicketSize]:
    """The ticket sizes given, else the run's, each once. Raises ConfigError if one is impossible, or there is none."""
    from twist_fl.config.sizes import ticket_size

    if not (sizes := given or job.config.eval.sizes):
        raise ConfigError("the run has eval.sizes=[]: give sizes, for example --sizes 8,6,4")
    return list(dict.fromkeys(ticket_size(job.layout, job.division, size, "--sizes") for size in sizes))
