"""A teacher's run that was kept says what it said live."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.distributions import Laplace, Poisson

from kdcore.dgm.columns import SiteLayout, from_columns, layout_of, to_columns
from kdcore.dgm.distiller import DGMDistiller, Mode
from kdcore.dgm.models.helmholtz import helmholtz_generator
from kdcore.dgm.models.ladder import Ladder, LadderGenerator
from kdcore.dgm.models.vrnn import VRNNGenerator
from kdcore.dgm.objective import Objective
from kdcore.dgm.trace import Trace

MODELS = {
    "ladder": lambda: LadderGenerator(Ladder(4, 8, (4, 2, 1), image_channels=1)).eval(),
    "vrnn": lambda: VRNNGenerator(length=3, hidden=4, state=5, latent=2),
    "helmholtz": lambda: helmholtz_generator(4),
}


def inputs(name: str) -> dict[str, torch.Tensor]:
    return {"length": torch.tensor([3, 1, 2, 3])} if name == "vrnn" else {}


@pytest.mark.parametrize("mode", ["surrogate", "local"])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_from_columns_is_that_from_the_live_teacher(name: str, mode: Mode) -> None:
    distiller = DGMDistiller(MODELS[name](), MODELS[name](), Objective(), mode=mode).eval()
    trace = distiller.run_teacher(4, inputs=inputs(name))
    written = json.loads(json.dumps(layout_of(trace)))
    kept = from_columns(to_columns(trace), [SiteLayout(*row) for row in written])
    live, again = (distiller(4, teacher_trace=run).loss for run in (trace, kept))
    torch.testing.assert_close(again, live, rtol=0, atol=0)
    first = from_columns(
        {key: held[:1] for key, held in to_columns(trace).items()}, layout_of(trace)
    )
    assert first.num_rows == 1
    assert bool(distiller(1, teacher_trace=first).loss.isfinite())


def test_the_names_of_the_columns_say_what_they_hold() -> None:
    run = Trace(2, inputs={"x": torch.zeros(2, 3)})
    run.latent("z", Laplace(torch.zeros(2), torch.ones(2)), mask=torch.ones(2))
    run.feature("f", torch.ones(2, 4))
    run.target("y", Poisson(torch.ones(2)))
    columns = to_columns(run)
    assert set(columns) == {
        "in/x",
        "eps/z",
        "mask/z",
        "par/z/loc",
        "par/z/scale",
        "val/f",
        "par/f/value",
        "val/y",
        "par/y/rate",
    }
    again = from_columns(columns, layout_of(run))
    for name, site in run.sites.items():
        torch.testing.assert_close(again.sites[name].value, site.value, rtol=0, atol=0)
        assert type(again.sites[name].distribution) is type(site.distribution)


def test_a_distribution_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="no distribution 'Normul' is known"):
        from_columns({"par/y/loc": torch.zeros(2)}, [SiteLayout("y", "target", "Normul")])


def test_columns_have_no_graph() -> None:
    model = nn.Linear(2, 2)
    run = Trace(2)
    run.feature("f", model(torch.ones(2, 2)))
    assert not any(column.requires_grad for column in to_columns(run).values())
