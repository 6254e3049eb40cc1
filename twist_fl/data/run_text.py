"""A run's text: known by its hash, opened when it is first asked for. What needs no text never looks for it."""

from __future__ import annotations

from twist_fl.config.schema import DataConfig
from twist_fl.data.corpus import Corpus, find_corpus, load_corpus
from twist_fl.system.errors import ConfigError, DamagedError


class RunText:
    """The corpus of hash `digest`, from this machine's cache or else from where `config` says the text lies.

    `num_windows` are the training windows, where they are known without it.
    """

    def __init__(self, config: DataConfig, num_workers: int, digest: str, num_windows: int | None = None) -> None:
        self.config, self.num_workers, self.digest = config, num_workers, digest
        self._num_windows = num_windows
        self._corpus: Corpus | None = None

    @classmethod
    def read(cls, config: DataConfig, num_workers: int) -> RunText:
        """Of the text that `config` names, whatever its hash. Raises ConfigError."""
        corpus = load_corpus(config, num_workers)
        text = cls(config, num_workers, corpus.digest, len(corpus.train))
        text._corpus = corpus
        return text

    @property
    def num_windows(self) -> int:
        return len(self.open().train) if self._num_windows is None else self._num_windows

    def open(self) -> Corpus:
        """Raises ConfigError if the text is neither in the cache nor where the configuration says, or is another."""
        if self._corpus is None:
            try:
                corpus = find_corpus(self.digest, self.config, self.num_workers)
            except DamagedError:
                raise
            except ConfigError as error:
                raise ConfigError(
                    f"the run's text is not in this machine's cache, and {error} (say where it is now: data.path=...)"
                ) from error
            self.check(corpus.digest)
            self._corpus = corpus
        return self._corpus

    def check(self, digest: str) -> None:
        """Raises ConfigError unless `digest` is this text's."""
        if digest != self.digest:
            raise ConfigError(
                f"the text or the tokenizer here is not the run's (hash {digest}, expected {self.digest}): give every "
                "node the same data, and a run that goes on the text it began with (data.path=..., data.tokenizer=...)"
            )
