"""The cache against the full forward pass; sampling against distributions computed by hand."""

import math

import pytest
import torch

from tokenformer import LMConfig, TokenFormerLM, generate, grow
from tokenformer.generation import Dialogue, Sampler, draw, stream

SIZES = {"vocab_size": 50, "max_seq_len": 32, "depth": 2, "dim": 32, "num_heads": 4, "init": "scaled"}
TOKENS = {"qkv_tokens": 24, "proj_tokens": 20, "ffn_tokens": 64}
VARIANTS = {
    "TokenFormer": {},
    "no positions": {"rotary_fraction": 0.0},
    "all channels rotated": {"rotary_fraction": 1.0},
    "Transformer": {"baseline": "width"},
    "differential attention": {"attention": "differential", "rotary_fraction": 0.5},
}


def build(**changes):
    torch.manual_seed(0)
    return TokenFormerLM(LMConfig(**SIZES | TOKENS | changes)).eval()


@pytest.fixture
def model():
    return build()


@pytest.fixture(params=[*VARIANTS, "grown", "grown anchored", "grown with norms of their own", "wider Transformer"])
def any_model(request):
    model = build(**VARIANTS.get(request.param, {"baseline": "width"} if "wider" in request.param else {}))
    if request.param == "grown":
        grow(model, qkv=40, proj=30, ffn=80, init="random")
    elif request.param == "grown anchored":
        grow(model, qkv=40, layers="query")
        grow(model, qkv=40, proj=30, ffn=80)
    elif request.param == "grown with norms of their own":
        grow(model, qkv=40, proj=30, ffn=80, init="segment_norm")
    elif request.param == "wider Transformer":
        from tokenformer.net2net import widen

        model = widen(model, 2)
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("sizes", [[1] * 24, [24], [5, 1, 9, 0, 2, 7], [1, 23]], ids=str)
@pytest.mark.parametrize("joins", [False, True])
def test_chunks_equal_the_full_forward(any_model, sizes, joins, dtype, tolerance):
    model = any_model.to(dtype)
    ids = torch.randint(50, (3, 24))
    cache = model.new_cache(batch_size=3, joins=joins)
    logits = torch.cat([model(chunk, cache) for chunk in ids.split(sizes, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(ids), rtol=0, atol=tolerance)
    assert cache.lengths == [24] * 3


def test_rows_stand_where_they_are(any_model):
    """Three texts of different lengths in one cache: padding is not seen, a row that leaves changes nothing."""
    model = any_model.double()
    ids, lengths = torch.randint(50, (3, 20)), [4, 11, 1]
    cache = model.new_cache(batch_size=3, joins=True)
    model(ids[:, :11], cache)  # what is behind a row's own length stands for padding
    cache.lengths = lengths
    following = torch.randint(50, (3, 6))
    logits = [model(following[:, :4], cache)]
    cache.keep([0, 2])
    logits.append(model(following[[0, 2], 4:], cache))
    for row, length in enumerate(lengths):
        alone = model(torch.cat((ids[row, :length], following[row]))[None])[0, length:]
        torch.testing.assert_close(logits[0][row], alone[:4], rtol=0, atol=1e-12)
        if row != 1:
            torch.testing.assert_close(logits[1][[0, None, 1][row]], alone[4:], rtol=0, atol=1e-12)


def test_the_cache_is_allocated_once(model):
    cache = model.new_cache(batch_size=2, max_len=10)
    model(torch.zeros(2, 3, dtype=torch.long), cache)
    places = [keys.data_ptr() for keys, _ in cache.layers.values()]
    assert [tuple(keys.shape) for keys, _ in cache.layers.values()] == [(2, 4, 10, 8)] * 2
    model(torch.zeros(2, 7, dtype=torch.long), cache)
    assert [keys.data_ptr() for keys, _ in cache.layers.values()] == places


def test_only_at_gives_the_logits_of_one_place(model):
    ids = torch.randint(50, (2, 6))
    at = torch.tensor([5, 2])
    torch.testing.assert_close(model(ids, only_at=at), model(ids)[[0, 1], at])


def test_past_the_context_is_an_error(model):
    with pytest.raises(ValueError, match="33 tokens are past the model's context, max_seq_len=32"):
        model.new_cache(max_len=33)
    cache = model.new_cache()
    model(torch.zeros(1, 30, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="3 tokens after 30 are 33, more than the 32"):
        model(torch.zeros(1, 3, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="a batch of 2 rows for a cache of 1"):
        model(torch.zeros(2, 1, dtype=torch.long), cache)


def test_greedy_takes_the_likeliest_token(any_model):
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    ids = generate(any_model, prompt, 20, temperature=0)
    assert ids.shape == (2, 23)
    assert torch.equal(ids[:, :3], prompt)
    for length in range(3, 23):
        assert torch.equal(ids[:, length], any_model(ids[:, :length])[:, -1].argmax(-1))


def test_a_row_does_not_depend_on_the_others(any_model):
    model = any_model.double()
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]

    def sampled(prompts, **settings):
        return generate(model, prompts, 12, generator=torch.Generator().manual_seed(3), **settings)

    together = sampled(prompts)
    assert [row[: len(prompt)] for row, prompt in zip(together, prompts, strict=True)] == prompts
    assert sampled([prompts[0], [9, 9, 9, 9], [8]])[0] == together[0]
    assert sampled([[7] * 20, prompts[1]])[1] == together[1]
    alone = [generate(model, [prompt], 12, temperature=0)[0] for prompt in prompts]
    assert generate(model, prompts, 12, temperature=0) == alone
    assert sampled([[1], [1]])[0] != sampled([[1], [1]])[1]


def test_sampling_repeats_with_its_seed(model):
    first, second, other = (
        generate(model, torch.tensor([[1]]), 20, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    torch.manual_seed(5)
    third = generate(model, [[1]], 20)
    torch.manual_seed(5)
    assert generate(model, [[1]], 20) == third


HALF = math.log(2)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1 / 8, 1 / 2, 1 / 4, 1 / 16, 1 / 16]),
        ({"temperature": 0.5}, [4 / 86, 64 / 86, 16 / 86, 1 / 86, 1 / 86]),  # squares
        ({"top_k": 2}, [0, 2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 9}, [1 / 8, 1 / 2, 1 / 4, 1 / 16, 1 / 16]),
        ({"top_p": 0.49}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.51}, [0, 2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.8}, [1 / 7, 4 / 7, 2 / 7, 0, 0]),
        ({"top_p": 1.0}, [1 / 8, 1 / 2, 1 / 4, 1 / 16, 1 / 16]),
        ({"top_k": 3, "top_p": 0.6}, [0, 2 / 3, 1 / 3, 0, 0]),  # of 4/7, 2/7, 1/7 the first has less than 0.6
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0, 0]),  # of 2/3, 1/3 the first has enough
        ({"temperature": 0.5, "top_p": 0.7}, [0, 1, 0, 0, 0]),  # of 64/86, ... too
        ({"temperature": 1e-30}, [0, 1, 0, 0, 0]),
    ],
    ids=str,
)
def test_the_distribution_is_the_one_computed_by_hand(settings, expected):
    logits = torch.tensor([[-3 * HALF, -HALF, -2 * HALF, -4 * HALF, -4 * HALF]])
    probabilities = Sampler(1, **settings).distribution(logits)
    torch.testing.assert_close(probabilities, torch.tensor([expected], dtype=torch.float32), rtol=0, atol=1e-6)


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    n = 1000
    uniform = (torch.arange(n, dtype=torch.float64)) / n  # evenly over [0, 1): ends included
    counts = draw(probabilities.expand(n, -1), uniform).bincount(minlength=6)
    assert counts.tolist() == pytest.approx([0, 200, 0, 500, 300, 0], abs=1)
    assert counts[[0, 2, 5]].sum() == 0


def test_what_is_sampled_follows_the_models_distribution(model):
    """Chi-square of 4,000 first tokens against the softmax of the logits."""
    logits = model(torch.tensor([[1, 2]]))[:, -1]
    expected = 4000 * (logits / 0.5).softmax(-1)[0]
    settings = {"temperature": 0.5, "generator": torch.Generator().manual_seed(0)}
    counts = generate(model, torch.tensor([[1, 2]]).expand(4000, 2), 1, **settings)[:, -1].bincount(minlength=50)
    assert ((counts - expected) ** 2 / expected).sum() < 49 + 5 * math.sqrt(2 * 49)


def test_top_k_keeps_to_the_k_likeliest(model):
    prompt = torch.tensor([[1, 2]]).expand(200, 2)
    likeliest = model(prompt[:1])[0, -1].topk(3).indices
    chosen = generate(model, prompt, 1, temperature=5.0, top_k=3, generator=torch.Generator().manual_seed(0))[:, -1]
    assert set(chosen.tolist()) == set(likeliest.tolist())


def test_a_row_ends_with_what_stops_it(model):
    prompts = [[1, 2], [3], [4, 5, 6]]
    free = [ids[len(p) :] for ids, p in zip(generate(model, prompts, 15, temperature=0), prompts, strict=True)]
    stop = [free[1][2:4]]  # two ids that the second row writes
    ended = generate(model, prompts, 15, temperature=0, stop=stop)
    for ids, prompt, whole in zip(ended, prompts, free, strict=True):
        places = [i + 2 for i in range(14) if whole[i : i + 2] == stop[0]]
        assert ids == prompt + whole[: min(places, default=15)]
    assert len(ended[1]) < 1 + 15


def test_a_stream_asks_whether_a_row_ends_when_the_next_step_is_wanted(model):
    ended = set()
    steps = stream(model, [[1], [2], [3]], 10, temperature=0, stop=lambda row, ids: row in ended)
    assert list(next(steps)) == [0, 1, 2]
    ended.add(1)
    assert list(next(steps)) == [0, 2]
    ended |= {0, 2}
    assert list(steps) == []


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1] * 30], {}, "30 tokens and max_new_tokens=5 make 35, past the model's context, max_seq_len=32: .*most 2"),
        ([[1] * 40], {}, "max_seq_len=32: give less of a prompt"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([], {}, "there is none"),
        ([[50]], {}, "ids from 50 to 50, vocab_size=50"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], {"temperature": math.nan}, "temperature=nan"),
        ([[1]], {"top_k": 0}, "top_k=0"),
        ([[1]], {"top_p": 0.0}, "top_p=0.0"),
        ([[1]], {"top_p": 1.1}, "top_p=1.1"),
        (torch.tensor([[1]]), {"stop": [[1]]}, "give the prompts as lists"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_any_work(model, monkeypatch, prompts, settings, message):
    monkeypatch.setattr(TokenFormerLM, "forward", None)
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, 5, **settings)
    if not isinstance(prompts, torch.Tensor):
        with pytest.raises(ValueError, match=message):
            stream(model, prompts, 5, **settings)  # at once, and not with its first step


def test_it_leaves_gradients_and_training_as_they_were(model):
    model.train()
    ids = torch.randint(50, (2, 8))
    before = model(ids)
    generate(model, ids, 4)
    assert model.training
    assert torch.is_grad_enabled()
    after = model(ids)
    assert torch.equal(before, after)
    assert after.requires_grad


def test_a_compiled_model_generates_the_same(model):
    expected = generate(model, [[1, 2, 3], [4]], 6, temperature=0)
    for block in model.backbone.blocks:
        block.compile(backend="eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert generate(model, [[1, 2, 3], [4]], 6, temperature=0) == expected
    assert not torch._dynamo.utils.counters["frames"]  # no step is compiled for


def test_a_dialogue_goes_on_from_what_it_has_read(model):
    """In turns, with ids cut off and past the context, each id is what the model makes of the text; nothing is read
    twice but after a drop, which leaves half a context or what was added, as much of it as fits."""
    read = []
    model.embedding.register_forward_hook(lambda _, ids, __: read.append(ids[0].shape[1]))
    dialogue = Dialogue(model, [1, 2, 3], Sampler(1, temperature=0))

    def write(expected_read, expected_dropped):
        read.clear()
        dropped = dialogue.num_dropped
        new_id = dialogue.write()
        assert (read, dialogue.num_dropped - dropped) == ([expected_read], expected_dropped)
        assert new_id == dialogue.ids[-1] == int(model(torch.tensor([dialogue.ids[:-1]]))[0, -1].argmax())

    write(3, 0)
    for _ in range(4):
        write(1, 0)
    dialogue.ids += [4, 5, 6]
    write(4, 0)  # with the one that was written last
    del dialogue.ids[-3:]
    write(1, 0)  # the last one that is left
    dialogue.ids += range(10, 42 - len(dialogue.ids))
    write(32 - 9, 0)
    write(16, 17)
    dialogue.ids += [8, 9] * 12
    write(25, 16)
    dialogue.ids += range(40)
    write(32, 34)
