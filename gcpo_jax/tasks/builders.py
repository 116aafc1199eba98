"""The data sets as TFDS builders, written as array_record: neither writing nor reading needs TensorFlow.

load.py imports this when it opens a data set, and only then: tensorflow_datasets takes most of a second.
"""

import contextlib
import io
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds

from gcpo_jax.tasks.jsonl import Row

tfds.disable_progress_bar()


class _Info(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Nothing: these data sets are in no bucket, and asking leaves a temporary directory behind."""


class _Problems(tfds.core.GeneratorBasedBuilder):
    """A record is one row as JSON text, so that any field of it reaches the reward."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, splits: dict[str, list[Row]], **kwargs):
        self._rows = splits
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        # The order is kept: shuffling is the training loop's.
        features = tfds.features.FeaturesDict({"row": tfds.features.Text()})
        return _Info(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager
        return {split: self._generate_examples(rows) for split, rows in self._rows.items()}

    def _generate_examples(self, rows: Iterable[Row]) -> Iterator[tuple[int, dict[str, str]]]:
        for k, row in enumerate(rows):
            yield k, {"row": json.dumps(row)}


class JsonlProblems(_Problems):
    """Problem and answer rows of a user's JSONL file."""


class Benchmark(_Problems):
    """One of benchmarks.py, or a user's file in the form of one: problems to be evaluated on."""


class Arithmetic(_Problems):
    """The generated task of arithmetic.py."""


BUILDERS = {"jsonl": JsonlProblems, "arithmetic": Arithmetic, "benchmark": Benchmark}


def write(task: str, splits: dict[str, list[Row]], directory: pathlib.Path) -> pathlib.Path:
    """Prepare a data set below `directory`; returns the directory that holds its files."""
    builder = BUILDERS[task](splits, data_dir=directory, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # it announces a download, which there is none of
        builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


def read(directory: pathlib.Path, split: str) -> list[Row]:
    """All rows of a split of a prepared data set, in the order they were written."""
    builder: Any = tfds.builder_from_directory(directory)
    source = builder.as_data_source(split=split)
    # One bulk read: asked for one at a time, records cost four times as much.
    return [json.loads(record["row"]) for record in source.__getitems__(range(len(source)))]
