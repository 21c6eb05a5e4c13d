"""Orders of pixels, and the model that is told which comes next."""

import pytest
import torch

from studies import order, pretraining
from studies.order import PIXELS, PixelModel, digits, orders, run


def test_orders_are_raster_or_drawn():
    generator = torch.Generator().manual_seed(0)
    raster = torch.arange(PIXELS)
    assert (orders(5, 0.0, generator) == raster).all()
    drawn = orders(200, 0.5, generator)
    assert (drawn.sort(1).values == raster).all()
    assert 60 < (drawn == raster).all(1).sum() < 140


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(pretraining, "SIZES", {"0.3M": (1, 16, 2)})
    monkeypatch.setattr(order, "BATCH_SIZE", 8)


def test_a_pixel_is_predicted_from_those_before_it_in_the_order(tiny):
    """Its grey changes the loss of itself and of later ones, and the place that comes next is known."""
    torch.manual_seed(0)
    model = PixelModel(**pretraining.shape_of("0.3M"))
    image, places = digits()[1][:1], orders(1, 1.0, torch.Generator().manual_seed(1))

    def hidden(image, places):
        kept = []
        hook = model.lm.backbone.register_forward_hook(lambda module, args, out: kept.append(out[0]))
        model.loss(image, places)
        hook.remove()
        return kept[0]

    before = hidden(image, places)
    changed = image.clone()
    changed[0, places[0, 20]] = (changed[0, places[0, 20]] + 5) % 17
    moved = (hidden(changed, places) - before).abs().amax(1)
    assert (moved[:21] == 0).all()
    assert (moved[21:] > 0).all()
    swapped = places.clone()
    swapped[0, [30, 40]] = places[0, [40, 30]]
    moved = (hidden(image, swapped) - before).abs().amax(1)
    assert (moved[:30] == 0).all()
    assert moved[30] > 0  # before it has seen another grey


def test_an_annealed_order_begins_at_random_and_ends_as_raster(tiny, monkeypatch):
    shares = []

    def drawing(num, at_random, generator):
        shares.append(at_random)
        return orders(num, at_random, generator)

    monkeypatch.setattr(order, "orders", drawing)
    rows = {name: run(name, "tokenformer", 40, 4e-3, 0) for name in ("raster", "random", "annealed")}
    assert len({row["loss"] for row in rows.values()}) == 3
    annealed = shares[-41:-1]
    assert annealed[:11] == [1.0] * 11
    assert annealed[30:] == [0.0] * 10
    assert sorted(annealed, reverse=True) == annealed
    twin = run("raster", "transformer", 21, 4e-3, 0)
    assert twin["params"] == pytest.approx(rows["raster"]["params"], rel=0.01)
