"""Which pictures a run learns from, as its configuration says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipelines.augment import AugmentConfig
from pipelines.strict import Strict
from pipelines.transfer_sets import invented

# fields that came later, whose default is what there was before
LATER = ("classes", "classes_seed", "on_bad_image")
# what a run must share with its teacher's, which else meets pictures that it was not made for, or
# was trained on those that the student is validated on
SHARED = ("name", "root", "size", *LATER, "limit", "validation", "split_seed", "mean", "std")


class OtherData(Strict):
    """Whose test part a student is tested on, where its training data have none of their own."""

    name: str
    root: Path | None = None


class DataConfig(Strict):
    """Where pictures come from, how they are split, seen and normalised."""

    # digits | parquet | folder | huggingface | webdataset | a torchvision dataset such as CIFAR100
    name: str
    root: Path | None = None
    download: bool = False
    size: PositiveInt | None = None  # resize to size x size; needed where pictures differ
    classes: PositiveInt | None = None  # so many of the classes only, drawn with their seed
    classes_seed: NonNegativeInt = 0
    on_bad_image: Literal["fail", "skip"] = "fail"  # of a picture that does not decode
    limit: PositiveInt | None = None  # the first rows of the training file only
    validation: float = Field(default=0.1, gt=0, lt=1)  # share of the training file
    split_seed: NonNegativeInt = 0
    views: NonNegativeInt = 0  # augmented views; 0 trains on the pictures as they are
    view_seed: NonNegativeInt = 0
    augment: AugmentConfig = AugmentConfig()
    mean: tuple[float, ...] = (0.5,)
    std: tuple[PositiveFloat, ...] = (0.25,)
    test: OtherData | None = None  # another dataset's test part: a transfer set has none
    spool: Path | None = None  # where rows are unpacked that are more than the memory holds

    @model_validator(mode="after")
    def _augments_views(self) -> DataConfig:
        if self.augment != AugmentConfig() and self.views == 0:
            raise ValueError("augment changes views, and there are none: give data.views")
        return self


def compared(data: DataConfig, teacher: DataConfig) -> Iterator[tuple[str, Any, Any]]:
    """What a run's data must have in common with those of its teacher's run: key, own, teacher's.

    The pictures of a transfer set are nobody's validation pictures: they only have to be as large,
    and normalised as, what the teacher has seen. Of a folder that is not there yet nothing is
    known; whoever reads it says so.
    """
    made = invented(data.root) if data.name == "parquet" else None
    if made is not None:
        yield "size", data.size or made.size, teacher.size or made.size
        yield from ((key, getattr(data, key), getattr(teacher, key)) for key in ("mean", "std"))
    elif not _may_be_invented(data, teacher):
        yield from ((key, getattr(data, key), getattr(teacher, key)) for key in SHARED)


def _may_be_invented(data: DataConfig, teacher: DataConfig) -> bool:
    """Whether it may become the folder of a transfer set: another than the teacher's, not there."""
    there = data.root is not None and data.root.is_dir()
    another = (data.name, data.root) != (teacher.name, teacher.root)
    return data.name == "parquet" and another and not there
