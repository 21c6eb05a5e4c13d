"""The transformers wrapper in training: accumulation, gradient checkpointing, new tokens, padding."""

import json

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'tokenformer[hf]'")

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, DynamicCache

import tokenformer.hf as hf
from lit_modules.commands.tokenizers import write_tokenizer_files
from tests.tokenformer.tiny_lm import IDS, SIZES, padded
from tokenformer import from_pretrained


def test_accumulated_batches_count_by_their_tokens(folder, tmp_path):
    """Two texts of different lengths: one step of both at once is two accumulated steps of one."""
    from transformers import Trainer, TrainingArguments  # takes a second to import

    rows = [{"input_ids": IDS[i, :n], "labels": IDS[i, :n]} for i, n in enumerate((12, 3))]

    def collate(some):
        ids, mask = padded([row["input_ids"] for row in some], "right", 0)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    updates = []
    for batch in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(folder)
        before = model.native.embedding.weight.detach().clone()
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=2 // batch,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
        )
        Trainer(model, arguments, data_collator=collate, train_dataset=rows).train()
        updates.append(model.native.embedding.weight.detach() - before)
    torch.testing.assert_close(*updates, rtol=1e-4, atol=1e-6)
    assert updates[0].norm() > 0.01


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_gradient_checkpointing(folder):
    def gradients(enable):
        model = AutoModelForCausalLM.from_pretrained(folder)
        calls = []
        model.native.backbone.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
        if enable:
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS, use_cache=True).loss.backward()
        return [p.grad for p in model.parameters()], len(calls), model

    plain, once, _ = gradients(False)
    recomputed, twice, model = gradients(True)
    assert (once, twice) == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert model.is_gradient_checkpointing
    with pytest.raises(ValueError, match="past_key_values with gradient checkpointing"):
        model(IDS, past_key_values=DynamicCache())
    model.gradient_checkpointing_disable()
    assert not model.native.backbone.checkpoint_activations


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_is_resized(tmp_path, tied):
    config = hf.TokenFormerConfig(vocab_size=257, vocab_multiple=8, tie_word_embeddings=tied, **SIZES)
    assert config.tie_embeddings == config.tie_word_embeddings == tied
    model = hf.TokenFormerForCausalLM(config)
    before = model(IDS).logits
    with torch.no_grad():
        model.native.embedding.weight[257:] = 100  # rows of padding, which nobody has trained
    assert len(model.resize_token_embeddings().weight) == 264
    model.resize_token_embeddings(260, mean_resizing=False)
    assert torch.equal(model(IDS).logits[..., :257], before)
    assert model(IDS).logits.shape[-1] == 260
    matrices = {model.native.embedding.weight, model.native.output_weight if tied else model.native.lm_head.weight}
    for matrix in matrices:
        assert matrix[257:].std().item() == pytest.approx(0.02, rel=0.3)
    model.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(IDS), model(IDS).logits)
    new = torch.nn.Embedding(300, SIZES["dim"])
    model.set_input_embeddings(new)
    assert model.native.embedding is model.get_input_embeddings() is new


def test_padding_is_a_token_of_its_own_where_there_is_one(folder, tmp_path):
    """So the collator that everyone uses keeps the end of a text among the labels."""
    given = json.loads((folder / "tokenizer.json").read_text())
    given["added_tokens"].append(given["added_tokens"][0] | {"id": 257, "content": "<|padding|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(given))
    write_tokenizer_files(tmp_path, 256, 64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (257, 256)
    assert json.loads((tmp_path / "generation_config.json").read_text())["pad_token_id"] == 257
    texts = [tokenizer("A token<|endoftext|>"), tokenizer("x<|endoftext|>")]
    labels = DataCollatorForLanguageModeling(tokenizer, mlm=False)(texts)["labels"]
    assert labels[:, -1].tolist() == [256, 256]
    assert labels[1].tolist() == [-100] * 6 + [ord("x"), 256]
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == 256  # bytes have no other
