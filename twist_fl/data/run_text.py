"""A run's text: known by its hash, opened when it is first asked for. What needs no text never looks for it."""

from __future__ import annotations

from typing import ClassVar, Self

from twist_fl.config.schema import DataConfig
from twist_fl.data.corpus import Corpus, find_corpus, load_corpus
from twist_fl.system.errors import ConfigError, DamagedError


class RunText:
    """The corpus of hash `digest`, from this machine's cache or else from where `config` says the text lies; of the
    hash "", what lies there when it is first opened.

    `num_windows` are the training windows, and `num_test` the others, where they are known without it.
    """

    whose = "the run's text"
    place: ClassVar[str] = "data.path"
    """The setting that says where it is."""
    here: ClassVar[bool] = True
    """Whether it can be opened on this machine."""

    def __init__(
        self,
        config: DataConfig,
        num_workers: int,
        digest: str,
        num_windows: int | None = None,
        num_test: int | None = None,
    ) -> None:
        self.config, self.num_workers, self.digest = config, num_workers, digest
        self._num_windows, self._num_test = num_windows, num_test
        self._corpus: Corpus | None = None

    @classmethod
    def read(cls, config: DataConfig, num_workers: int) -> Self:
        """Of the text that `config` names, whatever its hash. Raises ConfigError."""
        return cls(config, num_workers, "").read_again()

    def read_again(self) -> Self:
        """This text as it is where it lies now, whatever its hash was. Raises ConfigError."""
        self._corpus = corpus = self._read()
        self.digest, self._num_windows, self._num_test = corpus.digest, len(corpus.train), len(corpus.test)
        return self

    def _read(self) -> Corpus:
        own, empty = self.config.private is not None, self.config.source == "empty"
        return load_corpus(self.config, 0 if own else self.num_workers, 0 if empty else 1)

    @property
    def num_windows(self) -> int:
        return len(self.open().train) if self._num_windows is None else self._num_windows

    @property
    def num_test(self) -> int:
        return len(self.open().test) if self._num_test is None else self._num_test

    def open(self) -> Corpus:
        """Raises ConfigError if the text is neither in the cache nor where the configuration says, or is another."""
        if not self.digest:
            self.read_again()
        if self._corpus is None:
            try:
                corpus = find_corpus(self.digest, self.config.window, self._read)
            except DamagedError:
                raise
            except ConfigError as error:
                raise ConfigError(
                    f"{self.whose} is not in this machine's cache, and {error} (say where it is now: {self.place}=...)"
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
