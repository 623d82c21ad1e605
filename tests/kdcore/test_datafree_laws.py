"""Laws of the parts of data-free distillation: priors, targets, draws, views, generators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from kdcore.datafree.augmentation import Augmentation, cropped, flipped, resized_crop, rolled
from kdcore.datafree.dirichlet import dirichlet
from kdcore.datafree.draws import Draw, Stream
from kdcore.datafree.generated import AdaptedPictures, reptile_gradient
from kdcore.datafree.generators import GeneratorNetwork, redraw
from kdcore.datafree.images import Normalisation
from kdcore.datafree.observation import observe
from kdcore.datafree.parametrisations import memory_format_of, parametrisation
from kdcore.datafree.plans import Adapted, Generators, Pixels
from kdcore.datafree.priors import PRIORS
from kdcore.datafree.seen import Seen
from kdcore.datafree.statistics import AveragedDistance, Moments, statistics_distance
from kdcore.datafree.targets import (
    Classes,
    DirichletPredictions,
    GaussianPredictions,
    RecordedActivations,
    Records,
    class_similarity,
    classes_in_turn,
    correlations,
    drawn_targets,
    measure_records,
)
from kdcore.types import Batch
from tests.kdcore.datafree_toys import NUM_CLASSES, patterns, trained_teacher

FUNCTIONS = {
    name: prior.function for name, prior in PRIORS.items() if not isinstance(prior.function, type)
}
NORMALISATION = Normalisation((0.4,), (0.2,))
NET = nn.Linear(1, 1)  # whose device, type and layout pictures have


def draw(count: int, occasion: int = 1, seed: int = 0) -> Draw:
    return Draw(torch.arange(count), occasion, seed)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def inputs(name: str, rows: int = 5) -> dict[str, object]:
    """For each parameter that a prior may have, something of its kind."""
    target: dict[str, Tensor] = {
        "class": torch.randint(4, (rows,)),
        "record": double(rows, 4),
    }
    return {
        "teacher": double(rows, 4),
        "student": double(rows, 4),
        "feature": double(rows, 4),
        "image": double(rows, 1, 3, 3),
        "target": target.get(name, double(rows, 4).softmax(dim=1)),
        "moments": [Moments(double(3), double(3).exp())],
        "running": [Moments(double(3), double(3).exp())],
    }


def asked(held: object) -> list[Tensor]:
    tensors = [held] if isinstance(held, Tensor) else [t for layer in held for t in layer]  # type: ignore[attr-defined]
    return [t.requires_grad_() for t in tensors if t.is_floating_point()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_prior_is_a_finite_scalar_with_a_gradient(name: str) -> None:
    values = [inputs(name)[key] for key in PRIORS[name].inputs]
    tensors = [tensor for value in values for tensor in asked(value)]

    def prior(*_: Tensor) -> Tensor:
        return FUNCTIONS[name](*values)

    value = prior()
    assert value.shape == ()
    assert bool(torch.isfinite(value))
    for tensor in tensors:
        tensor.grad = None
    value.backward()
    gradients = [tensor.grad.clone() for tensor in tensors if tensor.grad is not None]
    assert any(bool((gradient != 0).any()) for gradient in gradients)
    for tensor in tensors:  # one central difference each: gradcheck would differentiate argmax
        if tensor.grad is not None:
            way = torch.randn_like(tensor)
            with torch.no_grad():
                tensor += 1e-6 * way
                above = prior()
                tensor -= 2e-6 * way
                below = prior()
                tensor += 1e-6 * way
            torch.testing.assert_close(
                (above - below) / 2e-6, (tensor.grad * way).sum(), rtol=1e-5, atol=1e-7
            )


def test_averaged_statistics_are_of_this_batch_first_and_of_all_rounds_later() -> None:
    running = [Moments(double(3), double(3).exp())]
    rounds = [[Moments(double(3), double(3).exp())] for _ in range(3)]
    prior = AveragedDistance(rounds[0], momentum=0.75)
    torch.testing.assert_close(prior(rounds[0], running), statistics_distance(rounds[0], running))
    prior.remember()
    prior(rounds[1], running)
    prior.remember()
    kept = [0.75 * a + 0.25 * b for a, b in zip(rounds[0][0], rounds[1][0], strict=True)]
    now = [Moments(*(0.75 * a + 0.25 * b for a, b in zip(kept, rounds[2][0], strict=True)))]
    torch.testing.assert_close(prior(rounds[2], running), statistics_distance(now, running))


@pytest.mark.parametrize("alpha", [(1.0, 2.0, 5.0), (0.1, 0.3, 0.6), (0.01, 0.02, 1.0)])
def test_predictions_have_their_dirichlet_distribution(alpha: tuple[float, ...]) -> None:
    concentration = torch.tensor(alpha, dtype=torch.float64)
    drawn = dirichlet(draw(4000), concentration.expand(4000, 3))
    torch.testing.assert_close(drawn.sum(dim=1), torch.ones(4000, dtype=torch.float64))
    total = sum(alpha)
    law = stats.beta(alpha[0], total - alpha[0])
    assert stats.kstest(drawn[:, 0], law.cdf).pvalue > 0.01
    mean = concentration / total
    torch.testing.assert_close(drawn.mean(dim=0), mean, rtol=0, atol=0.02)


def test_a_concentration_of_which_all_gamma_variables_underflow_still_gives_a_prediction() -> None:
    drawn = dirichlet(draw(2000), torch.full((2000, 4), 1e-4))
    assert bool(drawn.isfinite().all())
    torch.testing.assert_close(drawn.mean(dim=0), torch.full((4,), 0.25), rtol=0, atol=0.04)


def test_similarities_are_stretched_row_by_row() -> None:
    similarity = class_similarity(double(5, 3))
    torch.testing.assert_close(similarity.amin(dim=1), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(similarity.diagonal(), torch.ones(5, dtype=torch.float64))


def test_predictions_are_drawn_for_each_class_surer_and_less_sure_in_turn() -> None:
    teacher, rows = trained_teacher(), 400
    targets = DirichletPredictions(concentrations=(1.0, 0.1))
    batches = enumerate(torch.arange(rows).split(NUM_CLASSES - 1))  # none has every class
    drawn = torch.cat(
        [
            drawn_targets(targets, draw(len(numbers), occasion), numbers, teacher, None)
            for occasion, numbers in batches
        ]
    )
    label = classes_in_turn(torch.arange(rows), NUM_CLASSES)
    turn = (torch.arange(rows) // NUM_CLASSES) % 2
    sure = drawn.amax(dim=1)
    assert float(sure[turn == 1].mean()) > float(sure[turn == 0].mean()) + 0.1
    own = drawn.gather(1, label[:, None]).mean()
    assert float(own) > 1.2 / NUM_CLASSES


@pytest.mark.parametrize("layer", ["logits", "embedding"])
def test_activations_have_the_correlations_of_the_weights(layer: str) -> None:
    teacher, rows = trained_teacher(), 6000
    numbers = torch.zeros(rows, dtype=torch.int64)
    targets = GaussianPredictions(layer=layer, deviation=2.0, positive=False)  # type: ignore[arg-type]
    drawn = drawn_targets(targets, draw(rows), numbers, teacher, None).log()
    weight = teacher.head.weight
    if layer == "logits":
        covariance, centre = 4 * correlations(weight), torch.zeros(NUM_CLASSES)
    else:
        producing = teacher.net.get_submodule("block3.0").weight
        covariance = 4 * weight @ correlations(producing) @ weight.mT
        centre = teacher.head.bias
    # a softmax forgets what is added to all classes: compare what it keeps
    keep = torch.eye(NUM_CLASSES) - 1 / NUM_CLASSES
    found = torch.cov((drawn @ keep).mT)
    expected = keep @ covariance @ keep
    torch.testing.assert_close(
        found, expected, rtol=0, atol=0.06 * float(expected.diagonal().max())
    )
    torch.testing.assert_close((drawn @ keep).mean(dim=0), centre @ keep, rtol=0, atol=0.15)


def test_records_are_those_of_the_data_and_samples_have_them() -> None:
    teacher = trained_teacher()
    image, label = patterns(200, seed=1)
    batches = [Batch(image[:90], label[:90], label[:90]), Batch(image[90:], label[90:], label[90:])]
    records = measure_records(teacher, batches, NUM_CLASSES)
    with torch.no_grad():
        of_two = teacher(image).logits[label == 2]
    torch.testing.assert_close(records.mean[2], of_two.mean(dim=0))
    torch.testing.assert_close(records.covariance[2], torch.cov(of_two.mT, correction=0))
    numbers = torch.full((6000,), 2)  # of class 2
    for published in (False, True):
        targets = RecordedActivations(published=published)
        drawn = drawn_targets(targets, draw(6000), numbers, teacher, records)
        covariance = records.covariance[2]
        expected = covariance @ covariance if published else covariance
        atol = 0.06 * float(expected.diagonal().max())
        torch.testing.assert_close(torch.cov(drawn.mT), expected, rtol=0, atol=atol)


def test_records_need_every_class() -> None:
    image, label = patterns(8, seed=1)
    batch = Batch(image[:2], label[:2], label[:2])
    with pytest.raises(ValueError, match=r"none of \[2, 3\]"):
        measure_records(trained_teacher(), [batch], NUM_CLASSES)
    with pytest.raises(ValueError, match="measure_records"):
        drawn_targets(RecordedActivations(), draw(2), label[:2], trained_teacher(), None)
    held = Records(torch.zeros(4, 4), torch.zeros(4, 4, 4))
    same = drawn_targets(Classes(), draw(2), label[:2], trained_teacher(), held)
    torch.testing.assert_close(same, label[:2])


def test_a_row_s_numbers_depend_on_no_other_row() -> None:
    whole, part = draw(8), replace(draw(8), row=torch.tensor([5, 2]))
    for values in (lambda d: d.uniform((3,), Stream.START), lambda d: d.normal((3,), Stream.START)):
        torch.testing.assert_close(values(part), values(whole)[[5, 2]], rtol=0, atol=0)
    one, other = (draw(8, seed=seed).uniform((3,), Stream.START) for seed in (0, 1 << 32))
    assert float((one - other).abs().min()) > 0


VIEWS: dict[str, Callable[[Tensor, Draw], Tensor]] = {
    "roll": lambda image, d: rolled(image, 2, d),
    "crop": lambda image, d: cropped(image, 2, d, black=NORMALISATION.black(image)),
    "flip": flipped,
    "local": resized_crop,
    "local, mirrored": Augmentation(flip=True).local,
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_has_a_gradient_and_another_occasion_another_view(name: str) -> None:
    image, view = double(6, 2, 5, 5), VIEWS[name]
    seen = [view(image, draw(6, occasion)) for occasion in range(1, 5)]
    assert any(float((one - seen[0]).abs().max()) > 0 for one in seen[1:])
    image.requires_grad_()
    seen[0] = view(image, draw(6, 1))
    gradient = torch.autograd.grad(seen[0].square().sum(), image)[0]
    assert bool(gradient.isfinite().all())
    assert bool((gradient != 0).any())


def test_a_crop_is_cut_from_the_picture_with_black_around_it() -> None:
    normalisation = Normalisation((0.1, 0.5, 0.9), (0.2, 0.3, 0.4))
    pixels, here = torch.rand(4, 3, 5, 5), draw(4)
    top, left = here.integers((2,), 5, Stream.CROP).unbind(dim=1)
    padded = normalisation.to_network(nn.functional.pad(pixels, (2, 2, 2, 2)))
    view = Augmentation(crop=2)(normalisation.to_network(pixels), here, normalisation)
    for row, seen in enumerate(view):
        expected = padded[row, :, top[row] : top[row] + 5, left[row] : left[row] + 5]
        torch.testing.assert_close(seen, expected, rtol=0, atol=0)


def test_a_whole_local_view_is_the_picture() -> None:
    image = double(3, 1, 6, 6)
    torch.testing.assert_close(resized_crop(image, draw(3), smallest=1.0), image)


def test_a_local_view_is_mirrored_where_views_are_by_numbers_of_its_own() -> None:
    image, here = double(40, 1, 6, 6), draw(40)
    part, local = resized_crop(image, here), Augmentation(flip=True).local(image, here)
    mirrored = (local == part.flip(3)).flatten(1).all(dim=1)
    plain = (local == part).flatten(1).all(dim=1)
    assert bool((mirrored ^ plain).all())
    whole = (flipped(image, here) == image.flip(3)).flatten(1).all(dim=1)
    assert 0 < int((mirrored & whole).sum()) < min(int(mirrored.sum()), int(whole.sum()))
    torch.testing.assert_close(Augmentation().local(image, here), part, rtol=0, atol=0)


def test_pictures_are_contrasted_with_the_local_view_of_their_augmentation() -> None:
    image, here, teacher = torch.rand(6, 1, 8, 8), draw(6), trained_teacher()
    for view in (Augmentation(), Augmentation(flip=True)):
        seen = Seen(
            image, image, here, augmentation=view, normalisation=NORMALISATION, teacher=teacher
        )
        expected = observe(teacher, view.local(image, here)).instance
        torch.testing.assert_close(seen.local_instance, expected)


def test_an_augmentation_of_nothing_is_the_picture() -> None:
    image = torch.randn(2, 1, 4, 4)
    assert Augmentation()(image, draw(2), NORMALISATION) is image


@pytest.mark.parametrize("ending", ["sigmoid", "tanh_batch_norm", "batch_norm"])
def test_a_generator_makes_pictures_in_the_space_that_it_says(ending: str) -> None:
    net = GeneratorNetwork(latent=6, width=4, ending=ending).build(3, 8)  # type: ignore[arg-type]
    image = net(torch.randn(16, 6)).detach()
    assert image.shape == (16, 3, 8, 8)
    assert net.makes_pixels == (ending == "sigmoid")
    if net.makes_pixels:
        assert 0 < float(image.min()) < float(image.max()) < 1
    else:
        mean = image.mean(dim=(0, 2, 3))
        torch.testing.assert_close(mean, torch.zeros(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_generator_has_the_layout_of_its_teacher(layout: torch.memory_format) -> None:
    teacher = trained_teacher().to(memory_format=layout)
    made = parametrisation(adapted("fomaml"), (1, 8, 8), NORMALISATION, teacher)
    made.begin(draw(4))
    assert isinstance(made, AdaptedPictures)
    assert memory_format_of(made.net) == memory_format_of(teacher) == layout


def test_kernels_of_one_channel_or_pixel_have_no_layout() -> None:
    grey, grouped, mixing = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 6, 1)
    separable, whole = nn.Sequential(grey, grouped, mixing), nn.Conv2d(6, 6, 3)
    assert memory_format_of(separable) == torch.contiguous_format
    assert memory_format_of(nn.Sequential(separable, whole)) == torch.contiguous_format
    last = whole.to(memory_format=torch.channels_last)
    assert memory_format_of(nn.Sequential(separable, last)) == torch.channels_last


def test_a_generator_of_an_odd_size_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4, got 10"):
        GeneratorNetwork().build(1, 10)
    plan = Generators(network=GeneratorNetwork(), lr=0.1)
    with pytest.raises(ValueError, match="square pictures, got 8 x 12"):
        parametrisation(plan, (1, 8, 12), NORMALISATION, NET)


def test_redrawn_weights_are_small_and_of_the_generator() -> None:
    net = GeneratorNetwork(latent=40, width=8).build(1, 8)
    net(torch.randn(8, 40))
    states = []
    for seed in (0, 0, 1):
        redraw(net, torch.Generator().manual_seed(seed))
        states.append(net.linear.weight.detach().clone())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert float((states[0] - states[2]).abs().max()) > 0
    torch.testing.assert_close(states[0].std(), torch.tensor(0.02), rtol=0.1, atol=0)
    torch.testing.assert_close(net.body[0].running_mean, torch.zeros(16))


def redrawn(net: nn.Module) -> torch.Generator:
    generator = torch.Generator().manual_seed(0)
    redraw(net, generator)
    return generator


def test_redrawn_weights_are_the_same_in_every_layout() -> None:
    plan = GeneratorNetwork(latent=4, width=2)
    here, last = plan.build(1, 8), plan.build(1, 8).to(memory_format=torch.channels_last)
    redrawn(here), redrawn(last)
    torch.testing.assert_close(last.state_dict(), here.state_dict(), rtol=0, atol=0)


def test_weights_elsewhere_are_redrawn_by_the_same_numbers_of_the_cpu() -> None:
    here = GeneratorNetwork(latent=4, width=2).build(1, 8)
    elsewhere = GeneratorNetwork(latent=4, width=2).build(1, 8).to("meta")  # which keeps no numbers
    states = [redrawn(net).get_state() for net in (elsewhere, here)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert all(held.is_meta for held in elsewhere.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_redrawn_weights_are_the_same_on_a_gpu() -> None:
    plan = GeneratorNetwork(latent=4, width=2)
    here, there = plan.build(1, 8), plan.build(1, 8).cuda()
    redrawn(here), redrawn(there)
    torch.testing.assert_close(there.cpu().state_dict(), here.state_dict(), rtol=0, atol=0)


def test_pixels_are_stretched_to_the_whole_range() -> None:
    plan = Pixels(lr=0.3, start="uniform", bounds="stretch")
    made = parametrisation(plan, (1, 4, 4), NORMALISATION, NET)
    made.begin(draw(3))
    leaf = made.changed()[0]
    made.step([torch.randn(3, 1, 4, 4)])
    pixels = NORMALISATION.to_pixels(made.pictures()[0].detach())
    torch.testing.assert_close(pixels.min(), torch.tensor(0.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(pixels.max(), torch.tensor(1.0), rtol=0, atol=1e-6)
    assert made.changed()[0] is leaf  # its optimiser goes on with it


def adapted(kind: str) -> Adapted:
    network = GeneratorNetwork(latent=4, width=2)
    return Adapted(network=network, lr=0.01, latent_lr=0.1, kind=kind, meta_lr=0.05)  # type: ignore[arg-type]


def weights(made: object) -> list[Tensor]:
    return [held.detach().clone() for held in made.meta.parameters()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["fomaml", "reptile"])
def test_meta_weights_move_by_the_first_step_of_adam_on_their_gradient(kind: str) -> None:
    made = parametrisation(adapted(kind), (1, 8, 8), NORMALISATION, NET)
    before = weights(made)
    made.begin(draw(6))
    total = [torch.zeros_like(held) for held in before]
    for _ in range(3):
        changed = made.changed()
        gradients = torch.autograd.grad(made.pictures()[0].square().mean(), changed)
        total = [past + now for past, now in zip(total, gradients[:-1], strict=True)]
        made.step(gradients)
    inner = [held.detach().clone() for held in made.changed()[:-1]]
    torch.testing.assert_close(weights(made), before, rtol=0, atol=0)
    made.end()
    if kind == "reptile":
        pairs = zip(before, inner, strict=True)
        total = [reptile_gradient(meta, held) for meta, held in pairs]
    for past, now, gradient in zip(before, weights(made), total, strict=True):
        expected = past - 0.05 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(now, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("kind", "goes_on"), [("sequential", True), ("redrawn", False)])
def test_a_generator_goes_on_from_the_last_round_or_begins_anew(kind: str, goes_on: bool) -> None:
    made = parametrisation(adapted(kind), (1, 8, 8), NORMALISATION, NET)
    made.begin(draw(6))
    made.step(torch.autograd.grad(made.pictures()[0].square().mean(), made.changed()))
    made.end()
    before = weights(made)
    made.begin(draw(6, occasion=2))
    differs = max(float((a - b).abs().max()) for a, b in zip(before, weights(made), strict=True))
    assert (differs == 0) == goes_on


def test_a_generator_s_gradient_is_clipped() -> None:
    network = GeneratorNetwork(latent=4, width=2)
    plan = Generators(network=network, lr=0.1, clip_norm=0.5)
    made = parametrisation(plan, (1, 8, 8), NORMALISATION, NET)
    made.begin(draw(4))
    made.step([torch.full_like(held, 3.0) for held in made.changed()])
    norm = torch.stack([held.grad.norm() for held in made.changed()]).norm()  # type: ignore[union-attr]
    torch.testing.assert_close(norm, torch.tensor(0.5), rtol=1e-4, atol=0)


def test_a_generator_s_rate_falls_to_nothing_over_the_rounds_that_it_is_annealed_over() -> None:
    network = GeneratorNetwork(latent=4, width=2)
    plan = Generators(network=network, lr=0.1, annealed_over=4)
    made = parametrisation(plan, (1, 8, 8), NORMALISATION, NET)
    moved = []
    for occasion in range(6):
        before = [held.detach().clone() for held in made.changed()]
        made.begin(draw(4, occasion))
        made.step([torch.ones_like(held) for held in made.changed()])
        made.end()
        # Adam's steps on one gradient again and again are of the rate itself
        moved.append(float((before[0] - made.changed()[0].detach()).mean()))
    half = 0.5**0.5
    expected = [0.05 * (1 + cosine) for cosine in (1, half, 0, -half, -1, -1)]
    assert moved == pytest.approx(expected, abs=1e-6)


def test_an_ensemble_shares_the_rows_of_a_batch() -> None:
    plan = Generators(network=GeneratorNetwork(latent=4, width=2), lr=0.1, count=2)
    made = parametrisation(plan, (1, 8, 8), NORMALISATION, NET)
    here = draw(6)
    made.begin(here)
    assert [len(part) for part in made.pictures()] == [3, 3]
    expected = here.normal((4,), Stream.LATENT).float()
    torch.testing.assert_close(made.latents[0], expected[0::2])  # type: ignore[attr-defined]
    torch.testing.assert_close(made.latents[1], expected[1::2])  # type: ignore[attr-defined]


def test_pixels_alone_make_no_further_pictures() -> None:
    made = parametrisation(Pixels(lr=0.1), (1, 8, 8), NORMALISATION, NET)
    with pytest.raises(RuntimeError, match="keep those of each round in a pool"):
        made.sample(draw(2))
