"""What goes wrong without a sound in the published codes of data-free distillation."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcore.datafree.adversaries import disagreement, masked_disagreement
from kdcore.datafree.batches import SyntheticBatches
from kdcore.datafree.contrast import Contrast
from kdcore.datafree.images import Normalisation
from kdcore.datafree.learning import published_step
from kdcore.datafree.measurement import answers, picture_metrics
from kdcore.datafree.memory import Pool
from kdcore.datafree.observation import observe
from kdcore.datafree.plans import Alternation, Generators, Method, Offline, Weighted
from kdcore.datafree.predictions import class_imbalance, class_shares
from kdcore.datafree.presets import PRESETS
from kdcore.datafree.priors import PRIORS
from kdcore.datafree.requirements import without_batch_norm
from kdcore.datafree.selection import agreement
from kdcore.datafree.statistics import (
    AveragedDistance,
    Moments,
    statistics_distance,
    statistics_divergence,
)
from kdcore.datafree.synthesis import Synthesizer
from kdcore.datafree.transfer import TransferSet, transfer_set
from kdcore.taps import Tapped
from kdcore.teachers import freeze
from tests.kdcore.datafree_toys import (
    BATCH,
    LAYERS,
    NORMALISATION,
    NUM_CLASSES,
    SHAPE,
    new_student,
    patterns,
    real_records,
    toy,
    trained_teacher,
)

OFFLINE = [name for name, one in PRESETS.items() if isinstance(one.schedule, Offline)]


def synthesizer(method: Method, teacher: Tapped | None = None, seed: int = 0) -> Synthesizer:
    return Synthesizer(
        teacher or trained_teacher(),
        method,
        shape=SHAPE,
        normalisation=NORMALISATION,
        students=[new_student()],
        seed=seed,
    )


def made_offline(
    method: Method, *, count: int = BATCH + 8, seed: int = 0, shard: int = 0, first: int = 0
) -> TransferSet:
    teacher = trained_teacher()
    return transfer_set(
        teacher,
        method,
        shape=SHAPE,
        normalisation=NORMALISATION,
        count=count,
        seed=seed,
        shard=shard,
        first=first,
        records=real_records(teacher),
    )


def bits(image: Tensor) -> bytes:
    return image.numpy().tobytes()


def test_a_teacher_that_is_not_frozen_is_refused() -> None:
    for teacher in (trained_teacher().train(), trained_teacher().requires_grad_(True)):
        with pytest.raises(ValueError, match="not frozen"):
            synthesizer(toy("deepinversion"), teacher)


def test_statistics_are_those_of_the_pictures_and_leave_the_teacher_s_alone() -> None:
    teacher = trained_teacher()
    image, _ = patterns(64, seed=5)
    kept = [buffer.clone() for buffer in teacher.buffers()]
    seen = observe(teacher, image)
    first = teacher.net.get_submodule("block1.0")(image)
    mean, variance = seen.moments[0]
    torch.testing.assert_close(mean, first.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(variance, first.var(dim=(0, 2, 3), correction=0))
    torch.testing.assert_close(list(teacher.buffers()), kept, rtol=0, atol=0)


def test_few_real_pictures_are_further_from_their_own_statistics_than_many() -> None:
    # the variance is biased and its running mean is not: a floor that the batch size sets
    teacher = trained_teacher()
    image, _ = patterns(256, seed=5)

    def mean_distance(size: int) -> float:
        seen = [observe(teacher, rows) for rows in image.split(size)]
        values = [statistics_distance(one.moments, one.running) for one in seen]
        return float(torch.stack(values).mean())

    assert mean_distance(4) > mean_distance(16) > mean_distance(64)


def test_nothing_stays_tapped_and_a_module_that_runs_twice_is_seen_twice() -> None:
    norm = nn.BatchNorm2d(2)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), norm, nn.ReLU(), norm, nn.Flatten(), nn.Linear(72, NUM_CLASSES)
    )
    teacher = freeze(Tapped(net))
    seen = observe(teacher, torch.randn(3, *SHAPE))
    assert len(seen.inputs) == len(seen.running) == 2
    torch.testing.assert_close(seen.inputs[1], norm(seen.inputs[0]).relu())
    assert all(not module._forward_hooks for module in net.modules())
    assert all(not module._forward_pre_hooks for module in net.modules())


class _Normalised(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.classifier = nn.Conv2d(1, 4, 3), norm, nn.Linear(4, NUM_CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.norm(self.conv(image)).relu().mean(dim=(2, 3)))


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.LayerNorm([4, 6, 6])], ids=["gn", "ln"])
def test_a_teacher_without_batch_norm_is_told_what_works(norm: nn.Module) -> None:
    teacher = freeze(Tapped(_Normalised(norm)))
    works = without_batch_norm()
    assert works == ["lopes", "zskd", "soft_target", "dafl", "zskt", "noise"]
    for name in PRESETS:
        if name in works:
            made = Synthesizer(
                teacher,
                toy(name),
                shape=SHAPE,
                normalisation=NORMALISATION,
                students=[new_student()],
                records=real_records(teacher),
            ).round()
            assert made.image.shape == (BATCH, *SHAPE)
            continue
        offline = isinstance(PRESETS[name].schedule, Offline)
        others = "lopes, zskd, soft_target, noise" if offline else "dafl, zskt"
        with pytest.raises(ValueError, match=rf"_Normalised has no such layer; .*: {others}$"):
            synthesizer(toy(name), teacher)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_student_is_put_in_a_mode_and_put_back(mode: str) -> None:
    made = synthesizer(replace(toy("dfq"), student_mode=mode))  # type: ignore[arg-type]
    modes = []
    student = made.students[0].train()
    student.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    made.rounds = 1
    made.round()
    assert modes == [mode == "train"]
    assert student.training
    assert all(held.grad is None for held in student.parameters())


def test_the_student_is_put_back_when_the_synthesis_fails() -> None:
    made = synthesizer(toy("dfq"))
    made.rounds = 1
    student = made.students[0].train()
    with torch.no_grad():
        next(student.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"nan \(disagreement = nan"):
        made.round()
    assert student.training


def test_pictures_for_the_student_come_from_a_generator_in_training_unless_told() -> None:
    method = toy("dfq")
    pictures = {}
    for mode in ("train", "eval"):
        made = synthesizer(replace(method, images=replace(method.images, sample_in=mode)))
        made.round()
        pictures[mode] = made.sample()
    assert float((pictures["train"] - pictures["eval"]).abs().max()) > 0.01


@pytest.mark.parametrize("channels", [1, 3])
def test_clipped_pictures_are_pictures(channels: int) -> None:
    normalisation = Normalisation((0.1, 0.5, 0.9)[:channels], (0.2, 0.3, 0.4)[:channels])
    image = normalisation.clipped(5 * torch.randn(4, channels, 3, 3))
    pixels = normalisation.to_pixels(image)
    assert float(pixels.min()) > -1e-6
    assert float(pixels.max()) < 1 + 1e-6
    stored = normalisation.stored(image)
    again = normalisation.stored(normalisation.loaded(stored, torch.float32))
    torch.testing.assert_close(again, stored, rtol=0, atol=0)


def test_the_teacher_speaks_of_the_picture_that_is_stored() -> None:
    made, teacher = made_offline(toy("deepinversion")), trained_teacher()
    with torch.no_grad():
        said = teacher(NORMALISATION.loaded(made.image, torch.float32)).logits
    torch.testing.assert_close(made.logits, said, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["zskd", "soft_target"])
def test_a_picture_of_a_drawn_prediction_is_labelled_by_its_teacher(name: str) -> None:
    made = made_offline(toy(name))
    torch.testing.assert_close(made.label, made.logits.argmax(dim=1))
    in_turn = torch.arange(len(made.label)) % NUM_CLASSES
    assert bool((made.label != in_turn).any())


@pytest.mark.parametrize("name", ["lopes", "deepinversion"])
def test_a_picture_of_a_class_is_labelled_by_it(name: str) -> None:
    made = made_offline(toy(name))
    counts = torch.bincount(made.label, minlength=NUM_CLASSES)
    assert counts.tolist() == [len(made.label) // NUM_CLASSES] * NUM_CLASSES


def test_averages_begin_with_the_first_round_that_is_judged_by_them() -> None:
    method, name = toy("fast"), "averaged_statistics"
    late = replace(method.priors[name], after=2)
    made = synthesizer(replace(method, priors={**method.priors, name: late}))
    rounds = [made.round(steps) for steps in (1, 1, 1, 0, 1)]
    assert [name in one.parts for one in rounds] == [False, False, True, False, True]
    held = made.priors.remembering[name]
    assert isinstance(held, AveragedDistance)
    assert int(held.get_buffer("rounds")) == 2  # nothing was seen in the one without a step
    assert float(held.averages[0].variance.min()) > 0


def test_classes_go_on_from_round_to_round_whatever_is_drawn_between() -> None:
    method = toy("fast")
    small = replace(method, schedule=replace(method.schedule, batch_size=NUM_CLASSES - 1))
    made, labels = synthesizer(small), []
    for steps in range(1, 6):  # of the optimiser, each of which draws views
        labels.append(made.round(steps).label)
        made.draw()  # as from the pool
    torch.testing.assert_close(torch.cat(labels), torch.arange(15) % NUM_CLASSES)


def test_classes_go_on_from_shard_to_shard() -> None:
    counts = (6, 6, 5)
    labels = [
        made_offline(toy("deepinversion"), count=count, shard=shard, first=6 * shard).label
        for shard, count in enumerate(counts)
    ]
    torch.testing.assert_close(torch.cat(labels), torch.arange(17) % NUM_CLASSES)


def test_a_transfer_set_goes_through_the_teacher_a_batch_at_a_time() -> None:
    teacher, sizes = trained_teacher(), []
    teacher.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    transfer_set(
        teacher, toy("noise"), shape=SHAPE, normalisation=NORMALISATION, count=2 * BATCH + 8, seed=0
    )
    assert sizes == [BATCH, BATCH, 8]


def test_what_is_said_of_parts_is_what_is_said_of_the_whole() -> None:
    teacher, (image, _) = trained_teacher(), patterns(40, seed=5)
    whole, parts = observe(teacher, image), answers(teacher, image.split(16))
    torch.testing.assert_close(parts.logits, whole.outputs.logits)
    expected = [moment.double() for layer in whole.moments for moment in layer]
    found = [moment for layer in parts.moments for moment in layer]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    metrics = [picture_metrics(one) for one in (parts, answers(teacher, [image]))]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-6)
    assert metrics[0]["statistics"] == pytest.approx(
        float(statistics_distance(whole.moments, whole.running)), rel=1e-5
    )


def test_a_collapse_shows_in_the_shares_of_the_classes() -> None:
    even, one = torch.eye(4).repeat(2, 1) * 9, torch.eye(4)[:1].repeat(8, 1) * 9
    torch.testing.assert_close(class_shares(even), torch.full((4,), 0.25))
    torch.testing.assert_close(class_shares(one), torch.tensor([1.0, 0, 0, 0]))
    assert float(class_imbalance(one)) > float(class_imbalance(even))


def test_a_class_that_nobody_can_predict_leaves_the_balance_finite() -> None:
    teacher = torch.tensor([[300.0, 0.0, 0.0], [0.0, 300.0, 0.0]], requires_grad=True)
    value = class_imbalance(teacher)
    value.backward()
    torch.testing.assert_close(value.detach(), torch.tensor(-math.log(2.0)))
    assert bool(teacher.grad is not None and teacher.grad.isfinite().all())


def test_where_nobody_agrees_the_masked_divergence_has_no_gradient() -> None:
    student = torch.eye(3).roll(1, dims=1).requires_grad_()
    teacher = torch.eye(3).requires_grad_()
    value = masked_disagreement(student, teacher)
    value.backward()
    for found in (value.detach(), student.grad, teacher.grad):
        torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=0)


def test_statistics_that_match_have_value_and_gradient_zero() -> None:
    mean, variance = torch.randn(3), torch.rand(3)
    here = Moments(mean.clone().requires_grad_(), variance.clone().requires_grad_())
    for prior in (statistics_distance, statistics_divergence):
        value = prior([here], [Moments(mean, variance)])
        gradients = torch.autograd.grad(value, list(here))
        for found in (value.detach(), *gradients):
            torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-6)


def test_a_dead_channel_does_not_blow_up_the_divergence() -> None:
    here = Moments(torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True))
    value = statistics_divergence([here], [Moments(torch.zeros(2), torch.tensor([0.0, 1.0]))])
    gradients = torch.autograd.grad(value, list(here))
    assert all(bool(found.isfinite().all()) for found in (value, *gradients))


@pytest.mark.parametrize("size", [1, 3, 4, 8])
def test_a_bank_that_is_exactly_full_still_gives_negatives(size: int) -> None:
    prior = Contrast(torch.zeros(4, 6), bank=size, num_negatives=8)
    for added in range(1, 5):
        value = prior(torch.randn(4, 6), torch.randn(4, 6))
        assert bool(torch.isfinite(value))
        prior.keep()
        prior.remember()
        assert len(prior.bank) == len(prior.bank.draw(99)) == min(4 * added, size)


def test_a_bank_keeps_the_newest_rows() -> None:
    prior = Contrast(torch.zeros(4, 1), bank=6)
    for first in (0, 4, 8):
        prior.bank.add(torch.arange(first, first + 4.0).reshape(4, 1, 1).expand(4, 2, 1))
    assert sorted(prior.bank.draw(6)[:, 0, 0].tolist()) == [6, 7, 8, 9, 10, 11]


def test_the_best_pictures_are_those_whose_loss_was_least() -> None:
    method = replace(
        toy("deepinversion"),
        priors={"mean_length": Weighted()},
        images=replace(toy("deepinversion").images, lr=1.5),
        keep="best",
    )
    made = synthesizer(method).round(steps=5)
    assert made.losses[-1] > min(made.losses)  # so large a rate steps over the minimum
    length = made.image.flatten(1).norm(dim=1).mean()
    torch.testing.assert_close(float(length), min(made.losses), rtol=1e-5, atol=0)


def test_a_probability_that_underflows_leaves_the_gradient_finite() -> None:
    teacher = torch.tensor([[0.0, 300.0]], requires_grad=True)
    student = torch.tensor([[0.0, 1.0]], requires_grad=True)
    disagreement(student, teacher).backward()
    assert bool(teacher.grad is not None and teacher.grad.isfinite().all())


def test_a_divergence_by_entries_is_that_by_rows_by_the_classes() -> None:
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    torch.testing.assert_close(
        7 * disagreement(student, teacher, reduction="entries"), disagreement(student, teacher)
    )


def test_zskt_s_beta_goes_with_squared_maps_and_the_divergence_by_entries() -> None:
    step = published_step(
        PRESETS["zskt"], new_student(), trained_teacher(), shape=SHAPE, layers=LAYERS
    )
    assert step.weights == {"kd": 1 / NUM_CLASSES, "at": 250.0}
    with pytest.raises(ValueError, match=r"'at' compares maps: name pairs"):
        published_step(PRESETS["zskt"], new_student(), trained_teacher(), shape=SHAPE)


def test_a_random_student_does_not_yet_compete() -> None:
    made = synthesizer(toy("adaptive_deepinversion"))
    assert "competition" not in made.round().parts
    assert "competition" in made.round().parts


@pytest.mark.parametrize("name", OFFLINE)
def test_a_transfer_set_is_a_function_of_seed_and_shard_alone(name: str) -> None:
    method = toy(name)
    first = made_offline(method)
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    assert bits(made_offline(method).image) == bits(first.image)
    assert bits(made_offline(method).logits) == bits(first.logits)
    others = [made_offline(method, seed=1), made_offline(method, shard=1)]
    assert len({bits(one.image) for one in (first, *others)}) == 3


def test_a_synthesizer_leaves_torch_s_random_numbers_where_they_were() -> None:
    teacher, student = trained_teacher(), new_student()
    before = torch.get_rng_state()
    method = toy("cmi")  # draws a generator, a head, classes, latents, views and negatives
    made = Synthesizer(
        teacher, method, shape=SHAPE, normalisation=NORMALISATION, students=[student]
    )
    made.round(), made.round()
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)


def test_a_synthesizer_seeds_no_generator_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(7)
    assert seeded == [7]  # that is how a GPU's would be
    synthesizer(toy("cmi"), seed=8).round()
    assert seeded == [7]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_synthesizer_leaves_a_gpu_s_random_numbers_where_they_were() -> None:
    before = torch.cuda.get_rng_state()
    made = Synthesizer(
        trained_teacher().cuda(),
        toy("cmi"),
        shape=SHAPE,
        normalisation=NORMALISATION,
        students=[new_student().cuda()],
    )
    made.round(), made.round()
    torch.testing.assert_close(torch.cuda.get_rng_state(), before, rtol=0, atol=0)


def test_a_student_is_kept_by_how_much_it_agrees() -> None:
    batches = SyntheticBatches(synthesizer(toy("fast")))
    held_out = list(batches.epoch(0))
    teacher = trained_teacher()
    assert agreement(teacher, held_out) == 1.0
    with torch.no_grad():
        teacher.head.bias.copy_(torch.tensor([1e6, 0, 0, 0]))
    labels = torch.cat([batch.label for batch in held_out])
    assert agreement(teacher, held_out) == pytest.approx(float((labels == 0).double().mean()))


def test_the_pool_holds_bytes_and_lets_the_oldest_go() -> None:
    pool = Pool(SHAPE, limit=6, device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="the pool is empty"):
        pool.draw(synthesizer(toy("fast")).draw())
    for value in (1, 2, 3):
        pool.add(torch.full((3, *SHAPE), value, dtype=torch.uint8))
    assert pool.stored.dtype is torch.uint8
    assert pool.stored[:, 0, 0, 0].tolist() == [2, 2, 2, 3, 3, 3]


def test_what_needs_a_student_asks_for_one() -> None:
    with pytest.raises(ValueError, match="give it `students`"):
        Synthesizer(trained_teacher(), toy("zskt"), shape=SHAPE, normalisation=NORMALISATION)


@pytest.mark.parametrize(
    ("priors", "message"),
    [
        ({"clas": Weighted()}, "unknown prior 'clas'; did you mean 'class'?"),
        (
            {"balance": Weighted(params={"bas": 10.0})},
            "unknown parameter of prior balance 'bas'; did you mean 'base'?",
        ),
    ],
)
def test_a_prior_that_is_not_known_is_named(priors: dict[str, Weighted], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        synthesizer(replace(toy("deepinversion"), priors=priors))


def test_offline_and_online_methods_are_not_confused() -> None:
    with pytest.raises(ValueError, match=r"SyntheticBatches trains on them"):
        made_offline(toy("dafl"))
    with pytest.raises(ValueError, match=r"transfer_set\(\) writes it"):
        SyntheticBatches(synthesizer(toy("zskd")))


def test_every_prior_of_every_preset_is_in_the_table() -> None:
    for method in PRESETS.values():
        assert set(method.priors) <= set(PRIORS)


def test_replay_needs_a_limit() -> None:
    method = toy("dafl")
    schedule = replace(method.schedule, replay=True)
    with pytest.raises(ValueError, match="every checkpoint: give `pool_limit`"):
        replace(method, schedule=schedule)


def test_what_remembers_is_refused_to_an_ensemble() -> None:
    dfq, fast = toy("dfq"), toy("fast")
    assert isinstance(dfq.images, Generators)
    averaged = {"averaged_statistics": fast.priors["averaged_statistics"]}
    several = replace(dfq, images=replace(dfq.images, count=2), priors={**dfq.priors, **averaged})
    with pytest.raises(ValueError, match=r"'averaged_statistics'.* images\.count is 2; set it"):
        synthesizer(several)


def test_replay_is_of_every_second_batch_where_a_round_has_but_one() -> None:
    method = toy("dafl")
    assert isinstance(method.schedule, Alternation)
    schedule = replace(method.schedule, student_steps=1, replay=True, rounds=4)
    batches = SyntheticBatches(synthesizer(replace(method, schedule=schedule, pool_limit=BATCH)))
    fresh = []
    for batch in batches.epoch(0):
        assert batches.rounds.last is not None
        fresh.append(batch.image is batches.rounds.last.image)
    assert fresh == [True, False, True, False]


def test_older_pictures_are_replayed_every_second_step() -> None:
    method = toy("dafl")
    assert isinstance(method.schedule, Alternation)
    schedule = replace(method.schedule, student_steps=2, replay=True, rounds=3)
    replayed = replace(method, schedule=schedule, pool_limit=2 * BATCH)
    batches = SyntheticBatches(synthesizer(replayed), held_out=8)
    seen = list(batches.epoch(0))
    # its student is judged on fresh pictures: none is held out for that
    assert (len(batches.held), len(batches.pool)) == (0, 2 * BATCH)
    assert len(seen) == 6
    pixels = NORMALISATION.stored(seen[5].image)
    pool = batches.pool.stored
    torch.testing.assert_close(pixels, pool[seen[5].index], rtol=0, atol=0)
