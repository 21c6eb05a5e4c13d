import pytest
import torch

from tokenformer import LMConfig, TokenFormerLM, generate


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TokenFormerLM(LMConfig(vocab_size=50, max_seq_len=8, depth=1, dim=16, num_heads=2)).eval()


def test_greedy_takes_the_likeliest_token(model):
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    ids = generate(model, prompt, 3, temperature=0)
    assert ids.shape == (2, 6)
    assert torch.equal(ids[:, :3], prompt)
    for length in range(3, 6):
        assert torch.equal(ids[:, length], model(ids[:, :length])[:, -1].argmax(-1))


def test_sampling_repeats_with_its_seed_and_goes_past_the_context(model):
    first, second, other = (
        generate(model, torch.tensor([[1]]), 20, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert first.shape == (1, 21)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_top_k_keeps_to_the_k_likeliest(model):
    prompt = torch.tensor([[1, 2]]).expand(200, 2)
    likeliest = model(prompt[:1])[0, -1].topk(3).indices
    chosen = generate(model, prompt, 1, temperature=5.0, top_k=3, generator=torch.Generator().manual_seed(0))[:, -1]
    assert set(chosen.tolist()) == set(likeliest.tolist())
