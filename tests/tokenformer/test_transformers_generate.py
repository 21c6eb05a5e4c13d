"""The transformers wrapper's `generate`: what the native model says, with each kind of cache."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

pytest.importorskip("transformers", reason="needs transformers: pip install 'tokenformer[hf]'")

from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache, TorchAoConfig, pipeline

import tokenformer.hf  # registers
from tests.tokenformer.tiny_lm import IDS
from tokenformer.int8 import quantize_blocks


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_goes_on_as_the_native_model(folder, model, use_cache):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = ["A token", "grows", "x"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.generate(**batch, max_new_tokens=9, do_sample=False, use_cache=use_cache)
    assert out.shape == (3, 7 + 9)
    for prompt, row in zip(prompts, out, strict=True):
        expected = greedy(model.native, list(prompt.encode()), 9)
        assert row[7:].tolist() == expected
    beams = model.generate(**batch, max_new_tokens=5, do_sample=False, num_beams=3, use_cache=use_cache)
    plain = model.generate(**batch, max_new_tokens=5, do_sample=False, num_beams=3, use_cache=not use_cache)
    assert torch.equal(beams, plain)


def test_weights_in_int8_are_torchaos(folder, model):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install 'tokenformer[int8]'")
    tokens = {r"re:.*\.segments\.\d+\.(keys|values)": quantization.Int8WeightOnlyConfig()}
    config = TorchAoConfig(quantization.FqnToConfig(tokens))
    rounded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    expected = tokenformer.from_pretrained(folder)
    quantize_blocks(expected)
    with torch.no_grad():
        assert torch.equal(rounded(IDS).logits, expected(IDS))
        assert not torch.equal(rounded(IDS).logits, model(IDS).logits)
    assert rounded.generate(IDS, max_new_tokens=3, do_sample=False).shape == (len(IDS), IDS.shape[1] + 3)


def greedy(native, ids, count):
    start = len(ids)
    with torch.no_grad():
        for _ in range(count):
            ids = [*ids, int(native(torch.tensor([ids]))[0, -1].argmax())]
    return ids[start:]


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("start", [0, 7])
def test_cached_logits_are_those_of_the_whole_text(model, static, start):
    """Of the second row, which has padding where it starts later."""
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :start] = 0
    cache = StaticCache(model.config, max_cache_len=20) if static else None
    out = model(IDS, attention_mask=mask if start else None, past_key_values=cache, use_cache=True)
    for _ in range(3):
        new = out.logits[:, -1:].argmax(-1)
        mask = torch.cat((mask, torch.ones_like(new)), dim=1)
        seen = mask if start else None
        out = model(new, attention_mask=seen, past_key_values=out.past_key_values, logits_to_keep=1)
    for row, text in enumerate((IDS[0], IDS[1, start:])):
        whole = torch.cat((text, torch.tensor(greedy(model.native, text.tolist(), 3))))
        torch.testing.assert_close(out.logits[row, -1], model.native(whole[None])[0, -1])


def test_a_gradient_goes_through_a_cache(model):
    whole, *_ = torch.autograd.grad(model(IDS).logits[:, -1].square().sum(), model.native.embedding.weight)
    cache = model(IDS[:, :5], use_cache=True).past_key_values
    last = model(IDS[:, 5:], past_key_values=cache).logits[:, -1]
    parts, *_ = torch.autograd.grad(last.square().sum(), model.native.embedding.weight)
    torch.testing.assert_close(parts, whole)


def test_with_a_cache_only_new_tokens_are_read(model):
    read = []
    hook = model.native.embedding.register_forward_hook(lambda _, given, __: read.append(given[0].shape[1]))
    model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    hook.remove()
    assert read == [12, 1, 1, 1]


def test_generate_in_all_its_ways(folder, model):
    greedily = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(IDS, **greedily)
    ways = {
        "static cache": {"cache_implementation": "static"},
        "no cache": {"use_cache": False},
        "an assistant": {"assistant_model": AutoModelForCausalLM.from_pretrained(folder)},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
    }
    for name, way in ways.items():
        for row, wanted in zip(IDS, expected, strict=True):  # assistants take one row
            assert torch.equal(model.generate(row[None], **greedily, **way)[0], wanted), name
    embeddings = model.get_input_embeddings()(IDS)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **greedily), expected[:, 12:])

    first = model.generate(IDS, **greedily | {"max_new_tokens": 3}, return_dict_in_generate=True)
    on = model.generate(first.sequences, past_key_values=first.past_key_values, **greedily | {"max_new_tokens": 5})
    assert torch.equal(on, expected)


def test_a_step_with_a_static_cache_is_compiled_once(model, monkeypatch):
    """One graph of the prompt and one of all steps after it, each whole."""
    greedily = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "cache_implementation": "static"}
    expected, counter = model.generate(IDS, **greedily), CompileCounter()
    torch.compiler.reset()
    monkeypatch.setattr(model, "forward", torch.compile(model.forward, backend=counter, fullgraph=True))
    assert torch.equal(model.generate(IDS, **greedily), expected)
    assert counter.frame_count == 2


def test_a_text_may_grow_past_the_context(folder, model):
    generator = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
    for prompt in ("a" * 60, "a" * 100):  # the context is 64
        ids = list(prompt.encode())
        expected = bytes(greedy(model.native, ids, 10)).decode(errors="replace")
        (said,) = generator(prompt, max_new_tokens=10, do_sample=False, return_full_text=False)
        assert said["generated_text"] == expected


def test_generate_ends_with_the_text(model):
    assert model.generation_config.eos_token_id == 256
    first = greedy(model.native, IDS[0].tolist(), 1)[0]
    out = model.generate(IDS[:1], max_new_tokens=5, do_sample=False, eos_token_id=first)
    assert out.shape == (1, 13)
