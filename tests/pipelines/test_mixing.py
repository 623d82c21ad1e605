"""Pictures of two: who is mixed with whom, how much of each, and what a batch says of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from kdcore.types import Batch
from pipelines.augment import AugmentConfig
from pipelines.build import build_step
from pipelines.config import RunConfig
from pipelines.data import Reader, partners, seen_as, view_of
from pipelines.datasets import DataConfig
from pipelines.digests import plain
from pipelines.sources import Pictures, split
from pipelines.strict import validated
from pipelines.views import mixed, mixture, normalised, view
from pipelines.views.draws import random_words

COUNT = 60
GENERATOR = np.random.default_rng(0)
PICTURES = Pictures(
    GENERATOR.integers(0, 256, (COUNT, 3, 8, 6), dtype=np.uint8), np.arange(COUNT) % 7, 7
)
SIZE = (8, 6)
SAMPLES = torch.arange(4000)


def data_of(**augment: Any) -> DataConfig:
    content = {"name": "digits", "validation": 0.2, "views": 3, "augment": augment}
    return validated(DataConfig, content, where="toy")


def run_of(**augment: Any) -> RunConfig:
    data = {"name": "digits", "validation": 0.2, "views": 3, "augment": augment}
    content = {"student": {"name": "convnet"}, "data": data, "epochs": 2, "losses": {"ce": {}}}
    return validated(RunConfig, {**content, "batch_size": 8}, where="toy")


def fetched(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return PICTURES.image[rows], PICTURES.label[rows]


def drawn(**augment: Any) -> Any:
    config = AugmentConfig.model_validate(augment)
    return mixture(SAMPLES, 1, size=SIZE, augment=config, seed=0)


# --- how much -----------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_s_share_has_the_beta_distribution(alpha: float) -> None:
    share = drawn(mixup={"alpha": alpha}).share.double().numpy()
    # shares are rounded to 1/256: between the distribution half a step before and after
    exact = stats.beta(alpha, alpha)
    for limit in np.linspace(0.05, 0.95, 19):
        below = (share <= limit).mean()
        assert abs(below - exact.cdf(limit)) < 1.63 / np.sqrt(len(share)) + 1 / 256


def test_a_share_is_what_the_pixels_have() -> None:
    black, white = torch.zeros(4000, 3, *SIZE).byte(), torch.full((4000, 3, *SIZE), 255).byte()
    for augment in ({"mixup": {}}, {"cutmix": {"probability": 1}}):
        how = drawn(**augment)
        shown = mixed(white, black, how)
        share = shown.double().mean(dim=(1, 2, 3)) / 255
        # mixup's levels are rounded to whole pixels, cutmix's boxes are not
        within = 0.5 / 255 + 1e-6 if "mixup" in augment else 1e-6
        torch.testing.assert_close(share, how.share.double(), rtol=0, atol=within)
        assert len(how.share.unique()) > 10


def test_mixup_blends_and_rounds_half_up() -> None:
    image, other = (torch.from_numpy(PICTURES.image[k : k + 20]) for k in (0, 20))
    how = mixture(
        torch.arange(20), 1, size=SIZE, augment=AugmentConfig.model_validate({"mixup": {}}), seed=0
    )
    level = how.level.numpy()[:, None, None, None]
    exact = (level * image.numpy().astype(int) + (256 - level) * other.numpy() + 128) // 256
    np.testing.assert_array_equal(mixed(image, other, how).numpy(), exact)


def test_cutmix_cuts_the_published_box() -> None:
    config = AugmentConfig.model_validate({"cutmix": {"probability": 1}})
    how = mixture(SAMPLES, 1, size=SIZE, augment=config, seed=0)
    words = random_words(SAMPLES, view=1, stream="cutmix", seed=0).double().numpy() / 2**32
    height, width = SIZE
    for row in range(200):
        kept = np.floor(words[row, 1] * 256 + 0.5) / 256  # Beta(1, 1) is uniform
        cut = np.sqrt(1 - kept)
        high, wide = int(height * cut), int(width * cut)
        down, right = int(words[row, 2] * height), int(words[row, 3] * width)
        ends = [np.clip(down - high // 2, 0, height), np.clip(down + high // 2, 0, height)]
        sides = [np.clip(right - wide // 2, 0, width), np.clip(right + wide // 2, 0, width)]
        box = [int(part[row]) for part in how.box]
        assert box == [ends[0], sides[0], ends[1] - ends[0], sides[1] - sides[0]]
        assert float(how.share[row]) == pytest.approx(1 - box[2] * box[3] / (height * width))


def test_probabilities_are_kept_and_cutmix_goes_first() -> None:
    how = drawn(mixup={"probability": 0.5, "alpha": 4.0}, cutmix={"probability": 0.5})
    cut, blended = how.box.height * how.box.width > 0, how.level < 256
    assert not bool((cut & blended).any())
    # a cut of less than two pixels cuts nothing: mixup's quarter is exact, cutmix's half less that
    assert abs(float(blended.float().mean()) - 0.25) < 0.03
    assert 0.35 < float(cut.float().mean()) < 0.53
    assert float((how.share == 1).float().mean()) > 0.2


def test_without_mixing_all_of_a_picture_is_kept() -> None:
    how = drawn(flip=True)
    assert set(how.share.tolist()) == {1.0}
    image = torch.from_numpy(PICTURES.image).repeat(67, 1, 1, 1)[:4000]
    torch.testing.assert_close(mixed(image, image.flip(0), how), image, rtol=0, atol=0)


# --- with whom ----------------------------------------------------------------------------------


def test_partners_are_a_permutation_of_the_training_split_alone() -> None:
    data = data_of(mixup={})
    train, validation = split(COUNT, data)
    partner = partners(data, 1, count=COUNT)
    assert sorted(partner[train].tolist()) == train.tolist()
    np.testing.assert_array_equal(partner[validation], validation)
    assert (partner[train] != train).sum() > len(train) / 2


def test_partners_differ_by_view_and_seed_and_not_by_anything_else() -> None:
    data = data_of(mixup={})
    first = partners(data, 1, count=COUNT)
    others = [
        partners(data, 2, count=COUNT),
        partners(data.model_copy(update={"view_seed": 1}), 1, count=COUNT),
    ]
    assert all((first != other).any() for other in others)
    np.testing.assert_array_equal(first, partners(data_of(cutmix={}, flip=True), 1, count=COUNT))


# --- what a batch says --------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [{"mixup": {}}, {"cutmix": {"probability": 1}}])
def test_a_view_mixes_the_views_of_two_pictures(augment: dict[str, Any]) -> None:
    run = run_of(**augment, flip=True, erase={})
    train, _ = split(COUNT, run.data)
    rows = train[:9]
    partner = partners(run.data, 2, count=COUNT)[rows]

    def alone(numbers: np.ndarray) -> torch.Tensor:
        image, sample = torch.from_numpy(PICTURES.image[numbers]), torch.from_numpy(numbers)
        return view(image, sample, 2, augment=run.data.augment, seed=0)

    how = mixture(torch.from_numpy(rows), 2, size=SIZE, augment=run.data.augment, seed=0)
    expected = mixed(alone(rows), alone(partner), how)
    torch.testing.assert_close(view_of(run, PICTURES, rows, 2), expected, rtol=0, atol=0)
    seen = seen_as(run.data, fetched, rows, 2, count=COUNT)
    torch.testing.assert_close(seen.image, expected, rtol=0, atol=0)
    assert seen.mix is not None
    assert seen.label.tolist() == PICTURES.label[rows].tolist()
    assert seen.mix.label.tolist() == PICTURES.label[partner].tolist()
    torch.testing.assert_close(seen.mix.share, how.share, rtol=0, atol=0)


def test_a_mixed_row_is_the_same_in_every_batch() -> None:
    data = data_of(mixup={}, cutmix={}, crop=1)
    train, _ = split(COUNT, data)
    together = seen_as(data, fetched, train, 3, count=COUNT)
    alone = [seen_as(data, fetched, train[k : k + 1], 3, count=COUNT) for k in range(len(train))]
    image = torch.cat([one.image for one in alone])
    torch.testing.assert_close(together.image, image, rtol=0, atol=0)
    assert together.mix is not None
    shares = torch.cat([one.mix.share for one in alone if one.mix is not None])
    torch.testing.assert_close(together.mix.share, shares, rtol=0, atol=0)


def test_the_reader_s_batches_carry_the_mix_and_validation_has_none() -> None:
    reader = Reader(run_of(mixup={"alpha": 0.2}, crop=1), PICTURES)
    for epoch in range(2):
        for batch in reader.train(epoch):
            seen = seen_as(reader.run.data, fetched, batch.index.numpy(), 1 + epoch, count=COUNT)
            image = normalised(seen.image, mean=(0.5,), std=(0.25,))
            torch.testing.assert_close(batch.image, image, rtol=0, atol=0)
            assert batch.mix is not None
            assert seen.mix is not None
            torch.testing.assert_close(batch.mix.label, seen.mix.label, rtol=0, atol=0)
            torch.testing.assert_close(batch.mix.share, seen.mix.share, rtol=0, atol=0)
            torch.testing.assert_close(batch.target(7).sum(dim=1), torch.ones(8), rtol=0, atol=1e-6)
    assert next(reader.validation()).mix is None
    assert next(Reader(run_of(flip=True), PICTURES).train(0)).mix is None


def test_a_step_is_trained_on_mixed_pictures() -> None:
    run = run_of(mixup={}, cutmix={}, randaugment={}, erase={})
    step = build_step(run, PICTURES)
    batch = next(Reader(run, PICTURES).train(0))
    logits = step.eval()(batch).logits
    own, other = (
        torch.nn.functional.cross_entropy(logits, label, reduction="none")
        for label in (batch.label, partner_labels(batch))
    )
    assert batch.mix is not None
    expected = (batch.mix.share * own + (1 - batch.mix.share) * other).mean()
    torch.testing.assert_close(step(batch).loss, expected)


def partner_labels(batch: Batch) -> torch.Tensor:
    rows = partners(data_of(mixup={}), 1, count=COUNT)[batch.index.numpy()]
    return torch.from_numpy(PICTURES.label[rows])


def test_a_loss_of_one_label_is_refused_before_anything_is_trained() -> None:
    teacher = {"name": "convnet", "weights": "none.safetensors"}
    losses = {"ce": {}, "target": {"loss": "dkd"}}
    content = plain(run_of(cutmix={})) | {"teacher": teacher, "losses": losses}
    with pytest.raises(ValueError, match=r"^losses\.target: this loss reads one label of each"):
        build_step(validated(RunConfig, content, where="toy"), PICTURES)
