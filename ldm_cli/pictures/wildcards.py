"""Random words from files: `a __color__ circle` takes one of the lines of `color.txt`."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from ldm_cli import philox
from ldm_cli.data.bad_samples import BadSampleError
from ldm_cli.data.captions import decode_text
from ldm_cli.errors import DataError, InputNotFoundError
from ldm_cli.inputs import read_input
from ldm_cli.pictures.job import Item, Job, errors_at

# No separators and no dots: a prompt cannot name a file elsewhere.
_WILDCARD = re.compile(r"__([A-Za-z0-9](?:[A-Za-z0-9-]|_(?!_))*)__")


class Wildcards:
    """A folder of word lists."""

    def __init__(self, folder: Path) -> None:
        """The lists `NAME.txt` in a folder.

        Raises:
            InputNotFoundError: there is no such folder.
        """
        self._folder = folder
        if not self._folder.is_dir():
            raise InputNotFoundError(f"wildcards '{folder}' not found", "no such folder", "check --wildcards")
        self._words = cache(self._read)

    def filled_in(self, job: Job) -> Job:
        """The job with every wildcard of its prompts replaced; the seed of a picture chooses the words."""
        return replace(job, items=tuple(self._with_words(item) for item in job.items))

    def fill_in(self, text: str, seed: int) -> str:
        """The text with its wildcards replaced. Choices depend on the seed, and are independent of one another.

        Raises:
            InputNotFoundError: a list is missing or empty.
        """
        places = iter(range(len(text)))

        def word(found: re.Match[str]) -> str:
            words, zero = self._words(found[1]), torch.zeros(1, dtype=torch.int64)
            key = philox.key(seed, f"sampling: wildcard {next(places)}")
            return words[int(philox.integers(key, zero, zero, 1, len(words)))]

        return _WILDCARD.sub(word, text)

    def _with_words(self, item: Item) -> Item:
        request = item.request
        with errors_at(item.place):
            if request.blend is not None:
                other = self.fill_in(request.blend.prompt, request.blend.seed)
                request = replace(request, blend=request.blend.model_copy(update={"prompt": other}))
            return replace(item, request=replace(request, prompt=self.fill_in(request.prompt, request.seed)))

    def _read(self, name: str) -> list[str]:
        file = self._folder / f"{name}.txt"
        remedy = f"it has the words for '__{name}__': write a file there"
        try:
            # A link could lead to any file, and its lines into a prompt that others see.
            lines = decode_text(read_input(file, remedy=remedy, follow=False)).text.splitlines()
        except BadSampleError as error:
            raise DataError(f"cannot read '{file}'", error.detail) from error
        words = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not words:
            raise InputNotFoundError(f"no words for '__{name}__'", f"'{file}' is empty", "write a word per line")
        return words
