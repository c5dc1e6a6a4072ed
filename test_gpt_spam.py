# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "tiktoken==0.14.0", "numpy>=1.26", "requests>=2.31", "pandas>=2.1", "tqdm",
#     "matplotlib", "pytest", "hypothesis", "scikit-learn"]
# ///
"""Offline tests: `python -m pytest -q test_gpt_spam.py`.

PyTorch's own modules judge the layers, bytes that TensorFlow wrote the reader, scikit-learn the metrics, counts and plain
arithmetic the rest. GPT_SPAM_ONLINE=1 adds the test that downloads OpenAI's weights and compares with the book's numbers.
"""

import ast
import hashlib
import http.server
import importlib.util
import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings as hypothesis_settings, strategies as st
from torch import nn

import gpt_spam as g

HERE = Path(__file__).resolve().parent
MICRO = HERE / "weights" / "micro"  # 2 layers, 16 wide, 320 tokens; written by TensorFlow 2.21
BUNDLED = [HERE / "data" / "sample_sms.tsv", HERE / "weights" / "messages.tsv"]
CFG = g.GPTConfig(vocab_size=50, context_length=12, emb_dim=8, n_heads=2, n_layers=3)
SMALL = g.GPTConfig(vocab_size=320, context_length=64, emb_dim=16, n_heads=2, n_layers=3)
CPU = torch.device("cpu")
DEAD = "http://127.0.0.1:9"  # nobody listens


def run(*args, **kwargs):
    """Run the command line in a process of its own."""
    return subprocess.run([sys.executable, str(HERE / "gpt_spam.py"), *map(str, args)], capture_output=True,
                          **{"text": True, **kwargs})


def small_data(path, count=40):
    """Write the shortest bundled messages, as many of each class, in UCI's form."""
    df = g.read_messages(BUNDLED[0])
    df = df[df["Text"].str.len().between(10, 40)].groupby("Label").head(count)
    df.to_csv(path, sep="\t", header=False, index=False)
    return path


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    """The converted micro checkpoint."""
    path = tmp_path_factory.mktemp("micro") / "micro.npz"
    g.convert_checkpoint(MICRO, path)
    return path


@pytest.fixture(scope="session")
def tokenizer():
    return g.build_tokenizer((MICRO / "encoder.json").read_text(), (MICRO / "vocab.bpe").read_text())


# ---- 6.2 Data set ----

def test_default_quoting_glues_messages_as_in_the_chapter(tmp_path):
    file = tmp_path / "sms.tsv"
    file.write_text('ham\tone\nham\t"two\nspam\tthree"\nspam\tNA\n')
    assert g.read_messages(file)["Text"].tolist() == ["one", "two\nspam\tthree", "NA"]  # "NA" is a text


def test_balance_and_split_are_the_chapters():
    df = pd.DataFrame({"Label": ["ham"] * 170 + ["spam"] * 60, "Text": [str(i) for i in range(230)]})
    balanced = g.create_balanced_dataset(df)
    chapter = pd.concat([df[df["Label"] == "ham"].sample(60, random_state=123), df[df["Label"] == "spam"]])
    pd.testing.assert_frame_equal(balanced, chapter)
    frames, labels, weights = g.prepare_splits(df)
    assert [len(f) for f in frames] == [84, 12, 24] and labels == ["ham", "spam"] and weights is None
    shuffled = chapter.sample(frac=1, random_state=123)["Text"].tolist()
    assert pd.concat(frames)["Text"].tolist() == shuffled
    for frame in frames:  # labels stay with their texts
        assert frame["Label"].tolist() == ["spam" if int(text) >= 170 else "ham" for text in frame["Text"]]


def test_any_labels_a_test_file_and_repeated_texts():
    df = pd.DataFrame({"Label": ["b"] * 20 + ["a"] * 60 + ["c"] * 10, "Text": [str(i % 88) for i in range(90)]})
    frames, labels, weights = g.prepare_splits(df)
    assert labels == ["a", "b", "c"] and [len(f) for f in frames] == [62, 9, 19]
    counts = frames[0]["Label"].value_counts()
    assert weights.tolist() == pytest.approx([62 / 3 / counts[label] for label in labels])
    assert [len(f) for f in g.prepare_splits(df, "undersample")[0]] == [21, 3, 6]
    test = pd.DataFrame({"Label": ["c", "a"], "Text": ["x", "5"]})
    frames = g.prepare_splits(df, "none", test=test)[0]
    assert len(frames[0]) + len(frames[1]) == 90 and frames[2] is test
    unique = pd.concat(g.prepare_splits(df, "none", dedupe=True, test=test)[0])
    assert unique["Text"].is_unique and len(unique) == 89
    with pytest.raises(ValueError, match="'d'"):
        g.prepare_splits(df, test=test.assign(Label="d"))


@pytest.mark.parametrize("name, content", [
    ("a.csv", "id,Text,Label\n1,\"hi, you\",x\n2,NA,y\n"), ("a.tsv", "Label\tText\nx\thi, you\ny\tNA\n"),
    ("a.jsonl", '{"text": "hi, you", "label": "x"}\n{"label": "y", "text": "NA"}\n'),
    ("bom.csv", "\ufeffText,Label\r\n\"hi, you\",x\r\nNA,y\r\n"),
])
def test_forms_of_labelled_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert g.read_messages(tmp_path / name).to_dict("list") == {"Label": ["x", "y"], "Text": ["hi, you", "NA"]}


@pytest.mark.parametrize("content, said", [
    ("label,text\nham,hi\n", "1 messages"), ("review,stars\nham,hi\n", "no column 'label'.*review, stars.*--label-column"),
    ("text,label\nok,x\nno\n", "message 2 .*has no label"), ("label,text\nx,a,b\n", "quote the texts"),
    ('{"text": "a"}\n', "no column 'label'"), ('{"text": \n', "not a table"), ("", "not a table"),
])
def test_wrong_data_is_one_clear_error(tmp_path, content, said):
    (tmp_path / "data.tsv").write_text(content)
    with pytest.raises(ValueError, match=said):
        g.prepare_splits(g.read_messages(tmp_path / "data.tsv"))


@pytest.mark.skipif(not (HERE / "data" / "SMSSpamCollection.tsv").exists(), reason="the SMS Spam Collection is not here")
def test_counts_of_the_sms_spam_collection():
    df = g.read_messages(HERE / "data" / "SMSSpamCollection.tsv")
    assert df["Label"].value_counts().to_dict() == {"ham": 4825, "spam": 747}
    assert [len(s) for s in g.prepare_splits(df)[0]] == [1045, 149, 300]
    for file in BUNDLED:  # the bundled model has seen none of it
        assert not g.read_messages(file)["Text"].isin(df["Text"]).any()


def test_no_two_bundled_messages_are_alike():
    frames = [g.read_messages(file) for file in BUNDLED]
    assert len(frames[0]) >= 1000 and frames[0]["Label"].value_counts().nunique() == 1
    texts = pd.concat(frames)["Text"].tolist()
    words, holders = [frozenset(re.findall(r"\w+", text.lower())) for text in texts], {}
    for i, own in enumerate(words):  # only messages that share a word can be alike
        for j in {j for word in own for j in holders.get(word, ())}:
            assert len(own & words[j]) <= 0.6 * len(own | words[j]), (texts[i], texts[j])
        for word in own:
            holders.setdefault(word, []).append(i)


# ---- 6.3 Tokenizer and data set ----

def test_tokenizer_merges_as_byte_pair_encoding_does(tokenizer):
    """A few lines of plain BPE: always merge the neighbours that stand first in vocab.bpe."""
    encoder = json.loads((MICRO / "encoder.json").read_text())
    ranks = {tuple(line.split(" ")): i for i, line in enumerate((MICRO / "vocab.bpe").read_text().split("\n")[1:-1])}

    def encode(word):
        parts = list(word.replace(" ", "\u0120"))
        while pairs := [(ranks[p], i) for i, p in enumerate(zip(parts, parts[1:])) if p in ranks]:
            i = min(pairs)[1]
            parts[i:i + 2] = ["".join(parts[i:i + 2])]
        return [encoder[p] for p in parts]

    for word in ("the", " thing", "call", " you", " winner", "zzz"):
        assert tokenizer.encode_ordinary(word) == encode(word)
    assert tokenizer.eot_token == 319 not in tokenizer.encode_ordinary("<|endoftext|>")


@hypothesis_settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_survives_the_tokenizer(text):
    tokenizer = g.build_tokenizer((MICRO / "encoder.json").read_text(), (MICRO / "vocab.bpe").read_text())
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


def test_tokenizer_files_that_do_not_belong_together():
    encoder, merges = (MICRO / "encoder.json").read_text(), (MICRO / "vocab.bpe").read_text().split("\n")
    merges[5], merges[6] = merges[6], merges[5]
    with pytest.raises(ValueError, match="do not belong together"):
        g.build_tokenizer(encoder, "\n".join(merges))


def test_dataset_pads_cuts_and_knows_where_to_read(tokenizer, tmp_path):
    frame = pd.DataFrame({"Text": ["a", "abcabcabc", ""], "Label": [0, 1, 0]})
    long = len(tokenizer.encode_ordinary("abcabcabc"))
    dataset = g.SpamDataset(frame, tokenizer)
    assert dataset.max_length == long and {len(ids) for ids in dataset.inputs} == {long}
    assert dataset.inputs[0].tolist() == tokenizer.encode_ordinary("a") + [319] * (long - 1)
    assert dataset.inputs[2].tolist() == [319] * long  # no text at all
    assert g.SpamDataset(frame, tokenizer, pad_token_id=7).inputs[2].tolist() == [7] * long
    cut = g.SpamDataset(frame, tokenizer, max_length=3)
    assert cut.inputs[1].tolist() == tokenizer.encode_ordinary("abcabcabc")[:3] and [x.item() for x in cut[1][1:]] == [2, 1]
    read = {pos: [p.item() for p in g.SpamDataset(frame, tokenizer, 4, token_pos=pos).positions]
            for pos in ("first", "last", "last_real")}
    assert read == {"first": [0] * 3, "last": [3] * 3, "last_real": [0, min(long, 4) - 1, 0]}
    assert [len(ids) for ids in g.SpamDataset(frame, tokenizer, 4, padding=False).inputs] == [1, min(long, 4), 1]
    frame.to_csv(tmp_path / "a.csv", index=False)
    assert torch.equal(torch.stack(g.SpamDataset(tmp_path / "a.csv", tokenizer).inputs), torch.stack(dataset.inputs))
    with pytest.raises(ValueError, match="'ham'"):
        g.SpamDataset(frame.assign(Label="ham"), tokenizer)


# ---- 6.4 Model ----

LATER = torch.ones(12, 12, dtype=torch.bool).triu(1)


def test_attention_equals_pytorch():
    torch.manual_seed(0)
    ours, theirs = g.MultiHeadAttention(8, 8, 12, 0.0, 2, qkv_bias=True), nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.W_query.weight, ours.W_key.weight, ours.W_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.W_query.bias, ours.W_key.bias, ours.W_value.bias]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x = torch.randn(3, 12, 8)
    torch.testing.assert_close(ours(x), theirs(x, x, x, attn_mask=LATER)[0])


def test_block_equals_pytorch():
    torch.manual_seed(0)
    ours = g.TransformerBlock(CFG).eval()
    theirs = nn.TransformerEncoderLayer(
        8, 2, 32, 0.0, lambda x: F.gelu(x, approximate="tanh"), batch_first=True, norm_first=True).eval()
    names = {"scale": "weight", "shift": "bias", "ff.layers.0": "linear1", "ff.layers.2": "linear2",
             "att.out_proj": "self_attn.out_proj"}
    state = {}
    for name, value in ours.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        if "W_" not in name:
            state[name] = value
    for kind in ("weight", "bias"):
        parts = [ours.state_dict()[f"att.W_{n}.{kind}"] for n in ("query", "key", "value")]
        state[f"self_attn.in_proj_{kind}"] = torch.cat(parts)
    theirs.load_state_dict(state)
    x = torch.randn(3, 12, 8)
    torch.testing.assert_close(ours(x), theirs(x, src_mask=LATER))


def test_generate_appends_the_most_likely_token():
    torch.manual_seed(0)
    model, idx = g.GPTModel(CFG).eval(), torch.randint(50, (1, 10))
    out = g.generate_text_simple(model, idx, 4, CFG.context_length)
    for end in range(10, 14):  # also where the window slides: the context holds 12
        assert out[0, end] == model(out[:, max(0, end - 12):end])[0, -1].argmax()


def test_without_the_causal_mask_every_token_sees_every_other():
    torch.manual_seed(0)
    ids = torch.randint(49, (1, 12))
    other = ids.clone()
    other[0, -1] = 49
    for causal in (True, False):
        model = g.GPTModel(g.replace(CFG, causal=causal)).eval()
        assert torch.allclose(model(ids)[:, 0], model(other)[:, 0]) == causal


def micro_values(name, shape):
    """What the checkpoint was written from: a variable's values depend on its name and shape only."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"0:{name}".encode()).digest(), "little"))
    array = rng.standard_normal(shape, np.float32)
    array *= 0.01 if name == "model/wpe" else 0.02
    return array + 1 if name.endswith("/g") else array * 5


def test_every_tensor_is_what_tensorflow_wrote(micro):
    model, texts = g.load_pretrained(micro)
    state, names = model.state_dict(), {"norm1": "ln_1", "norm2": "ln_2"}
    expected = {"tok_emb.weight": micro_values("model/wte", [320, 16]), "pos_emb.weight": micro_values("model/wpe", [1024, 16])}
    expected["out_head.weight"] = expected["tok_emb.weight"]
    for ours, theirs in [("final_norm", "model/ln_f"), *((f"trf_blocks.{i}.{our}", f"model/h{i}/{their}")
                                                        for i in (0, 1) for our, their in names.items())]:
        expected |= {f"{ours}.scale": micro_values(f"{theirs}/g", [16]), f"{ours}.shift": micro_values(f"{theirs}/b", [16])}
    for i in (0, 1):
        for their, inside, outside, layers in (
                ("attn/c_attn", 16, 48, ("att.W_query", "att.W_key", "att.W_value")), ("attn/c_proj", 16, 16, ("att.out_proj",)),
                ("mlp/c_fc", 16, 64, ("ff.layers.0",)), ("mlp/c_proj", 64, 16, ("ff.layers.2",))):
            weights = np.split(micro_values(f"model/h{i}/{their}/w", [1, inside, outside])[0], len(layers), axis=1)
            biases = np.split(micro_values(f"model/h{i}/{their}/b", [outside]), len(layers))
            for layer, weight, bias in zip(layers, weights, biases):
                expected |= {f"trf_blocks.{i}.{layer}.weight": weight.T, f"trf_blocks.{i}.{layer}.bias": bias}
    assert set(expected) == set(state) and model.cfg.n_heads == 2
    for name, array in expected.items():
        np.testing.assert_array_equal(state[name].numpy(), array, err_msg=name)
    assert texts["vocab.bpe"] == (MICRO / "vocab.bpe").read_text()


@pytest.mark.parametrize("file, change, said", [
    (g.DATA_FILE, lambda b: b[:-4], r"112,380 bytes.*112,384"),
    (g.DATA_FILE, lambda b: b + bytes(4), r"112,388 bytes.*112,384"),
    (g.DATA_FILE, lambda b: b[:4000] + b"\0\0\xc0\x7f" + b[4004:], "NaN or infinity"),
    ("hparams.json", lambda b: b.replace(b'"n_layer": 2', b'"n_layer": 3'), r"112,384 bytes.*125,"),
    ("hparams.json", lambda b: b.replace(b'"n_vocab": 320', b'"n_vocab": 321'), "320 tokens, the model 321"),
    ("hparams.json", lambda b: b.replace(b'"n_head": 2', b'"n_head": 3'), "multiple of num_heads"),
    ("hparams.json", lambda b: b"<html>", "Expecting value"),
    ("vocab.bpe", lambda b: b[:50] + b"\xff" + b[51:], "utf-8"),
    ("encoder.json", lambda b: b[:100], "not a checkpoint"),
])
def test_a_damaged_checkpoint_is_refused(tmp_path, file, change, said):
    shutil.copytree(MICRO, tmp_path / "changed")
    (tmp_path / "changed" / file).write_bytes(change((MICRO / file).read_bytes()))
    with pytest.raises(ValueError, match=said):
        g.convert_checkpoint(tmp_path / "changed", tmp_path / "out.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["changed"]


def test_an_npz_that_does_not_fit_its_hparams(tmp_path, micro):
    with np.load(micro) as npz:
        arrays = dict(npz)
    hparams = arrays["hparams.json"].tobytes().replace(b'"n_layer": 2', b'"n_layer": 9')
    for name, wrong in (("tok_emb.weight", np.zeros((3, 3), np.float32)), ("pos_emb.weight", np.array([{}], dtype=object)),
                        ("hparams.json", np.frombuffer(hparams, np.uint8))):
        np.savez(tmp_path / "bad.npz", **{**arrays, name: wrong})
        with pytest.raises(ValueError, match="bad.npz is not a model"):
            g.load_pretrained(tmp_path / "bad.npz")


# ---- 6.5 to 6.7 ----

def test_head_and_what_trains():
    torch.manual_seed(0)
    model = g.GPTModel(CFG)
    g.add_classification_head(model, 2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"trf_blocks", "final_norm", "out_head"}
    assert all(name.startswith("trf_blocks.2.") for name in trained if "trf" in name) and len(trained) == 16 + 2 + 2
    torch.manual_seed(123)
    torch.testing.assert_close(model.out_head.weight, nn.Linear(8, 2).weight)


def test_counts_of_the_124m():
    with torch.device("meta"):
        model = g.GPTModel(g.GPTConfig())
        g.add_classification_head(model, 2)
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (False, True)]
    assert counts == [7_090_946, 124_441_346]


def test_loss_and_accuracy_against_plain_arithmetic():
    torch.manual_seed(0)
    model = g.GPTModel(CFG).train()
    g.add_classification_head(model, 2)
    batches = [(torch.randint(50, (n, 12)), torch.full((n,), 11), torch.randint(2, (n,))) for n in (4, 4, 1)]
    losses, right = [], []
    for ids, _, labels in batches:
        p = model(ids)[:, -1].softmax(-1)
        losses.append(-p[torch.arange(len(ids)), labels].log().mean().item())
        right += (p[:, 1] > p[:, 0]).long().eq(labels).tolist()
    logits = g.LabelLogits(model)
    assert g.calc_loss_loader(batches, logits, CPU) == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert g.calc_loss_loader(batches, logits, CPU, 2) == pytest.approx(sum(losses[:2]) / 2, rel=1e-5)
    assert g.calc_accuracy_loader(batches, logits, CPU) == sum(right) / 9
    g.evaluate_model(logits, batches, batches, CPU, 1)
    assert model.training


def test_last_block_at_one_position_equals_the_block_in_values_and_gradients():
    torch.manual_seed(0)
    for causal in (True, False):
        block, x = g.TransformerBlock(g.replace(CFG, causal=causal)), torch.randn(4, 12, 8, requires_grad=True)
        positions = torch.tensor([0, 5, 11, 3])
        outs = [g.last_block_at(block, x, positions), block(x)[torch.arange(4), positions]]
        torch.testing.assert_close(*outs)
        weights = [x, *(p for name, p in block.named_parameters() if "W_key.bias" not in name)]  # that one changes nothing
        torch.testing.assert_close(*[torch.autograd.grad(out.square().sum(), weights) for out in outs])


def train(tmp_path, *args, data=None, model=MICRO):
    """Run `train` in this process on a small checkpoint and small data; return the metrics."""
    data = data or small_data(tmp_path / "d.tsv")
    assert g.main(["train", "--model", str(model), "--data", str(data), "--weights-dir", str(tmp_path / "w"), "--data-dir",
                   str(tmp_path / "d"), "--device", "cpu", "--epochs", "2", "--eval-freq", "3", "--lr", "1e-3", "--metrics",
                   str(tmp_path / "m.json"), *map(str, args)]) == 0
    return json.loads((tmp_path / "m.json").read_text())


def losses(metrics):
    return metrics["train_loss"] + metrics["val_loss"]


def test_training_equals_a_plain_loop(tokenizer, micro, tmp_path):
    ours = train(tmp_path, model=micro)
    frames = [pd.read_csv(tmp_path / "d" / f"{name}.csv", keep_default_na=False) for name in g.SPLITS]
    encoded = [[tokenizer.encode_ordinary(text) for text in frame["Text"]] for frame in frames]
    length = max(map(len, encoded[0]))
    sets = [[(torch.tensor((ids + [319] * length)[:length]), int(label == "spam")) for ids, label in zip(part, frame["Label"])]
            for part, frame in zip(encoded, frames)]
    loaders = [torch.utils.data.DataLoader(s, 8, shuffle=i == 0, drop_last=i == 0) for i, s in enumerate(sets)]
    model, _ = g.load_pretrained(micro)
    g.add_classification_head(model, 2)

    def loss_of(ids, labels):
        return F.cross_entropy(model(ids)[:, -1], labels)

    torch.manual_seed(123)
    optimizer, step, logged = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1), 0, []
    for _ in range(2):
        for ids, labels in loaders[0]:
            optimizer.zero_grad()
            loss_of(ids, labels).backward()
            optimizer.step()
            if step % 3 == 0:
                logged.append([np.mean([loss_of(*b).item() for _, b in zip(range(5), loader)]) for loader in loaders[:2]])
            step += 1
        for loader in loaders[:2]:  # the chapter's accuracies draw from the same random numbers
            list(zip(range(5), loader))
    assert np.array(logged).T.ravel().tolist() == pytest.approx(losses(ours), abs=1e-4)
    predicted = [(model(torch.stack([ids for ids, _ in s]))[:, -1].argmax(-1) == torch.tensor([y for _, y in s])) for s in sets]
    assert [p.float().mean().item() for p in predicted[1:]] == pytest.approx(ours["final_accuracy"][1:])


def test_a_loss_that_is_not_finite_stops_the_training():
    model = nn.Linear(4, 2)
    model.bias.data[0] = float("nan")
    loader = [(torch.randn(4, 4), torch.randint(2, (4,)))]
    with pytest.raises(ValueError, match="step 0.*--lr"):
        g.train_classifier_simple(model, loader, loader, torch.optim.AdamW(model.parameters()), CPU, 1, 50, 5)


def test_the_learning_rate_rises_and_falls_in_a_line(tmp_path, monkeypatch):
    seen, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (seen.append(self.param_groups[0]["lr"]), step(self, *a, **k)))
    train(tmp_path, "--schedule", "linear", "--epochs", 3, "--lr", 1)
    steps = len(seen)
    assert seen == pytest.approx([min(1, (i + 1) / (0.1 * steps), (steps - i) / (0.9 * steps)) for i in range(steps)])
    assert max(seen) > 0.9 and seen[0] < max(seen) and seen[-1] < 0.1


# ---- Speed, and the settings of the book's experiments ----

@pytest.mark.parametrize("changes", [
    "", "--trainable-layers last_layer", "--trainable-layers last_two_blocks", "--token-pos first", "--token-pos last_real",
    "--pooling mean", "--no-causal-mask", "--no-padding --batch-size 4", "--context-length model", "--trainable-layers lora",
    "--no-padding --batch-size 1 --pooling mean", "--weights random --trainable-layers all", "--ignore-index 319",
])
def test_the_cache_and_the_fast_last_block_change_no_loss_and_no_accuracy(tmp_path, changes):
    fast, plain = (train(tmp_path, *changes.split(), cache) for cache in ("--cache", "--no-cache"))
    assert losses(fast) == pytest.approx(losses(plain), abs=2e-5)
    for name in ("train_accuracy", "val_accuracy", "final_accuracy"):
        assert fast[name] == plain[name]


@pytest.mark.parametrize("options, read", [
    ([], lambda out, real: out[:, -1]), (["--token-pos", "first"], lambda out, real: out[:, 0]),
    (["--token-pos", "last_real"], lambda out, real: out[torch.arange(len(out)), real - 1]),
    (["--pooling", "mean"], lambda out, real: out.mean(1)),
], ids=str)
def test_a_saved_classifier_reads_the_position_that_was_asked_for(tmp_path, options, read):
    train(tmp_path, *options)
    model, tokenizer, labels, options, _ = g.load_classifier(tmp_path / "w" / "spam_classifier.pth")
    texts = g.read_messages(BUNDLED[0])["Text"].tolist()[:30]
    encoded = [tokenizer.encode_ordinary(text)[:options["max_length"]] for text in texts]
    ids = torch.tensor([i + [319] * (options["max_length"] - len(i)) for i in encoded])
    plain = read(model(ids), torch.tensor([len(i) for i in encoded])).softmax(-1)
    torch.testing.assert_close(g.predict(texts, model, tokenizer, CPU, **options), plain, atol=1e-5, rtol=1e-4)
    alone = [g.classify_review(text, model, tokenizer, CPU, labels=labels, **options) for text in texts[:5]]
    assert [p for _, p in alone] == pytest.approx(plain[:5].max(dim=1).values.tolist(), abs=1e-5)


def test_bfloat16_stays_near_float32_and_reopens_bit_for_bit(tmp_path):
    half, full = (train(tmp_path, "--dtype", dtype) for dtype in ("float32", "bfloat16"))
    assert losses(half) == pytest.approx(losses(full), abs=0.02) and losses(half) != losses(full)
    path = tmp_path / "w" / "spam_classifier.pth"
    model, tokenizer, labels, options, about = g.load_classifier(path)
    assert model.trf_blocks[0].ff.layers[0].weight.dtype == torch.bfloat16
    assert model.trf_blocks[-1].ff.layers[0].weight.dtype == torch.float32
    files = torch.load(path, weights_only=True)["tokenizer_files"]
    g.save_classifier(tmp_path / "again.pth", model, tokenizer_files=files, labels=labels, options=options, about=about)
    again, *_ = g.load_classifier(tmp_path / "again.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    texts = ["hello", "win a prize"]
    assert torch.equal(g.predict(texts, model, tokenizer, CPU, **options), g.predict(texts, again, tokenizer, CPU, **options))


def test_accumulated_gradients_equal_a_larger_batch(tmp_path):
    """Eight steps of one message are one step of eight, as the loss is a mean."""
    weights = []
    for options in ("--batch-size 1 --accumulation-steps 8", "--batch-size 8"):
        train(tmp_path, *options.split(), "--epochs", 1, "--eval-freq", 1000)
        weights.append(torch.load(tmp_path / "w" / "spam_classifier.pth", weights_only=True)["model"])
    for name, value in weights[0].items():
        if "W_key.bias" not in name:  # softmax ignores it
            torch.testing.assert_close(value, weights[1][name], atol=2e-4, rtol=1e-3)


def test_lora_starts_unchanged_trains_every_linear_and_merges():
    torch.manual_seed(0)
    model, ids = g.GPTModel(CFG).eval(), torch.randint(50, (2, 12))
    g.add_classification_head(model, 2)
    before = model(ids)
    g.add_classification_head(model, 2, "lora", 3, 5)
    torch.testing.assert_close(model(ids), before)
    torch.manual_seed(123)
    nn.Linear(8, 2)  # the head comes first, then every A in the order of the modules
    query = model.trf_blocks[0].att.W_query
    lora = query.parametrizations.weight[0]
    torch.testing.assert_close(lora.A.data, nn.init.kaiming_uniform_(torch.empty(8, 3), a=math.sqrt(5)))
    assert sum(name.endswith(".A") for name, p in model.named_parameters() if p.requires_grad) == 3 * 6 + 1
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
        x, plain = torch.randn(4, 8), query.parametrizations.weight.original
        torch.testing.assert_close(query(x), F.linear(x, plain, query.bias) + 5 * (x @ lora.A @ lora.B))
        trained = model(ids)
        g.merge_lora(model)
        torch.testing.assert_close(model(ids), trained)
    assert set(model.state_dict()) == {*g.GPTModel(CFG).state_dict(), "out_head.bias"}


def test_experiments(tmp_path):
    data = small_data(tmp_path / "d.tsv")
    done = run("experiments", "--model", MICRO, "--data", data, "--weights-dir", tmp_path / "w", "--data-dir", tmp_path / "d",
               "--epochs", 1, "--device", "cpu", "--rows", "1,16,18,19")
    table = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()]
    assert [row[0] for row in table[2:]] == ["1", "16", "18", "19"] and table[3][1] == "--token-pos last_real", done.stderr
    assert [row[5] for row in table[2:]] == ["95.00%", "98.33%", "95.00%", "96.33%"] and table[2][2:5] == table[4][2:5]
    assert not (tmp_path / "d" / "test.csv").exists()  # the chapter's splits are not these


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_equal_scikit_learn(classes):
    sk = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(classes)
    labels, predicted = rng.integers(classes, size=300), rng.integers(classes - 1, size=300)  # one is never predicted
    names = [f"c{i}" for i in range(classes)]
    accuracy, table, confusion = g.calc_metrics(labels, predicted, names)
    theirs = sk.classification_report(labels, predicted, target_names=names, output_dict=True, zero_division=0)
    for name in names:
        assert table.loc[name].to_dict() == pytest.approx({k.replace("f1-score", "f1"): v for k, v in theirs[name].items()})
    assert accuracy == pytest.approx(theirs["accuracy"])
    assert confusion.to_numpy().tolist() == sk.confusion_matrix(labels, predicted).tolist()


def test_two_processes_train_as_one(tmp_path):
    data = small_data(tmp_path / "d.tsv")
    args = ["train", "--model", MICRO, "--data", data, "--data-dir", tmp_path / "d", "--device", "cpu", "--lr", "1e-3",
            "--epochs", 4, "--eval-freq", 1, "--batch-size", 56]  # one batch holds all 56 training messages
    one = run(*args, "--weights-dir", tmp_path / "one", "--metrics", tmp_path / "one.json")
    assert one.returncode == 0, one.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", HERE / "gpt_spam.py"]
    two = subprocess.run(list(map(str, [*torchrun, *args, "--weights-dir", tmp_path / "two", "--metrics", tmp_path / "two.json"])),
                         capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert two.returncode == 0 and two.stdout.count("Training completed") == 1, two.stderr
    a, b = (torch.load(tmp_path / n / "spam_classifier.pth", weights_only=True)["model"] for n in ("one", "two"))
    for name in a:
        if "W_key.bias" not in name:
            torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0)
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    assert losses(two) == pytest.approx(losses(one), abs=1e-5) and one["final_accuracy"] == two["final_accuracy"]


# ---- Each piece lifts out ----

@pytest.mark.parametrize("names, use", [
    ("GPTConfig MultiHeadAttention LayerNorm FeedForward TransformerBlock GPTModel",
     "assert GPTModel(GPTConfig(50, 12, 8, 2, 3))(torch.zeros(2, 12, dtype=int)).shape == (2, 12, 50)"),
    ("SpamDataset collate", "dataset = SpamDataset(pd.DataFrame({'Text': ['a', 'bb'], 'Label': [0, 1]}), tokenizer, padding=False)\n"
     "ids, positions, labels = next(iter(DataLoader(dataset, 2, collate_fn=collate)))\nassert labels.tolist() == [0, 1]"),
    ("GPT2_SPLIT END_OF_TEXT build_tokenizer", "build_tokenizer(encoder, merges).encode_ordinary('hello')"),
    ("RANK mean_over_processes calc_loss_batch calc_loss_loader calc_accuracy_loader evaluate_model train_classifier_simple",
     "pairs, model = [(torch.eye(4), torch.tensor([0, 1, 0, 1]))] * 3, nn.Linear(4, 2)\n"
     "log = train_classifier_simple(model, pairs, pairs, torch.optim.AdamW(model.parameters(), lr=.1), CPU, 9, 5, 2)\n"
     "assert log[0][-1] < log[0][0] and len(log[2]) == 9 and log[3][-1] == 1 and log[4] == 9 * 12"),
    ("LoRALayer replace_linear_with_lora merge_lora",
     "model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))\nbefore = model(torch.eye(4))\nreplace_linear_with_lora(model, 2, 1)\n"
     "merge_lora(model)\ntorch.testing.assert_close(model(torch.eye(4)), before)"),
    ("plot_values", "assert len(plot_values([0, 1], [0, 8], [2., 1.], [2., 1.], 'loss').axes) == 2"),
    ("add_classification_head", "model = nn.Module()\nmodel.cfg, model.final_norm = CFG, nn.LayerNorm(8)\n"
     "model.trf_blocks = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))\nadd_classification_head(model, 3)\n"
     "assert [p.requires_grad for p in model.trf_blocks.parameters()] == [False, False, True, True]"),
], ids=lambda value: value.split()[0])
def test_a_piece_lifts_out(names, use, tokenizer):
    """The source of some definitions runs in an empty namespace with the file's imports."""
    tree, space = ast.parse((HERE / "gpt_spam.py").read_text()), {}
    wanted = names.split()
    for node in tree.body:
        targets = [getattr(node, "name", None)] + [n.id for t in getattr(node, "targets", []) for n in ast.walk(t) if isinstance(n, ast.Name)]
        if isinstance(node, (ast.Import, ast.ImportFrom)) or set(targets) & set(wanted):
            exec(compile(ast.Module([node], []), "piece", "exec"), space)
    assert set(wanted) <= set(space)
    space |= {"tokenizer": tokenizer, "CPU": CPU, "CFG": CFG, "encoder": (MICRO / "encoder.json").read_text(),
              "merges": (MICRO / "vocab.bpe").read_text()}
    exec(use, space)


# ---- Files: download and atomic write ----

class Files(http.server.BaseHTTPRequestHandler):
    """Serves a dict of files; `faults` is what happens to the first requests."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        content, fault = self.server.files.get(self.path), self.server.faults.pop(0) if self.server.faults else None
        self.server.asked.append((self.path, self.headers["Range"]))
        if content is None or fault in (404, 500):
            self.send_error(fault or 404)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        if start >= len(content):
            self.send_error(416)
            return
        body = content[start:]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "cut":
            body, self.close_connection = body[:len(body) // 2], True
        if fault == "flip":
            body = bytes([body[0] ^ 255]) + body[1:]
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def httpd():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        yield httpd
        httpd.shutdown()


@pytest.fixture()
def server(httpd, monkeypatch):
    monkeypatch.setattr(g.time, "sleep", lambda seconds: None)
    httpd.files, httpd.faults, httpd.asked, httpd.url = {}, [], [], f"http://127.0.0.1:{httpd.server_port}"
    return httpd


CONTENT = np.random.default_rng(0).bytes(3_000_000)


def right(file):
    g.check_sha256(file, hashlib.sha256(CONTENT).hexdigest())


@pytest.mark.parametrize("faults", [[], [500], ["cut"], ["cut", "cut"], ["flip"], ["cut", "flip"]], ids=str)
def test_download_ends_right(server, tmp_path, faults):
    server.files["/f"], server.faults = CONTENT, list(faults)
    g.download([f"{server.url}/f"], tmp_path / "f", right)
    assert (tmp_path / "f").read_bytes() == CONTENT and [p.name for p in tmp_path.iterdir()] == ["f"]
    assert any(asked != "bytes=0-" for _, asked in server.asked) == ("cut" in faults), "a partial download is resumed"


def test_download_takes_the_backup_and_says_what_failed(server, tmp_path):
    server.files["/good"] = CONTENT
    g.download([f"{server.url}/missing", f"{server.url}/good"], tmp_path / "f", right)
    assert (tmp_path / "f").read_bytes() == CONTENT
    with socket.socket() as nobody:  # bound, not listening
        nobody.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{nobody.getsockname()[1]}/x"
        with pytest.raises(OSError, match=f"{dead}.*404") as caught:
            g.download([dead, f"{server.url}/missing"], tmp_path / "new", right)
        assert not isinstance(caught.value, ConnectionError) and not (tmp_path / "new").exists()
        with pytest.raises(ConnectionError):
            g.download([dead], tmp_path / "new", right)


def test_wrong_content_never_gets_in_place(server, tmp_path):
    server.files["/f"] = b"<html>log in</html>"
    (tmp_path / "f.part").write_bytes(CONTENT)  # longer than what the server has
    with pytest.raises(OSError, match="SHA-256"):
        g.download([f"{server.url}/f"], tmp_path / "f", right)
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_an_atomic_write_gets_out_and_leaves_what_was(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(FileNotFoundError, match="mine"), g.atomic_write(tmp_path / "f") as temporary:
        temporary.write_text("half")
        raise FileNotFoundError("mine")
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "old"


# ---- The whole thing ----

@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """`train` on a mirror that serves the micro checkpoint as 124M, and a small collection as UCI's."""
    folder, archive = tmp_path_factory.mktemp("trained"), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("../evil", "never unpacked")
        zipped.writestr("SMSSpamCollection", small_data(folder / "raw.tsv").read_bytes())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as httpd:
        httpd.files = {f"/gpt-2/models/124M/{name}": (MICRO / name).read_bytes() for name in (*g.TEXT_FILES, g.DATA_FILE)}
        httpd.files["/static/public/228/sms+spam+collection.zip"], httpd.faults, httpd.asked = archive.getvalue(), [], []
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_port}"
        places = ["--model", "124M", "--weights-dir", folder / "w", "--data-dir", folder / "d", "--device", "cpu", "--no-verify"]
        done = run("train", *places, "--weights-url", url, "--data-url", url, "--epochs", 2, "--eval-freq", 4,
                   "--metrics", folder / "m.json", "--plot", folder / "plots")
        httpd.shutdown()
    assert done.returncode == 0, done.stderr
    return folder, places, done.stdout


def test_train_from_a_mirror(trained):
    folder, places, out = trained
    assert sorted(p.name for p in (folder / "w").iterdir()) == ["gpt2-124M.npz", "spam_classifier.pth"]
    assert sorted(p.name for p in (folder / "d").iterdir()) == ["SMSSpamCollection.tsv", "test.csv", "train.csv", "validation.csv"]
    assert re.search(r"Ep 1 \(Step 000000\): Train loss \d\.\d{3}, Val loss \d\.\d{3}", out)
    assert re.search(r"\nTraining accuracy: [\d.]+% \| Validation accuracy: [\d.]+%\n", out)
    metrics = json.loads((folder / "m.json").read_text())
    assert len(metrics["train_loss"]) == 4 and len(metrics["val_accuracy"]) == 2 and metrics["examples_seen"] == 112
    assert "Final: accuracy {:.2%} / {:.2%} / {:.2%} (whole splits)".format(*metrics["final_accuracy"]) in out
    for plot in ("loss", "accuracy"):
        assert (folder / "plots" / f"{plot}-plot.png").read_bytes().startswith(b"\x89PNG")
    again = run("train", *places, "--epochs", 0)  # the second start needs no network
    assert again.returncode == 0, again.stderr


def test_use(trained, tmp_path):
    folder, places, out = trained
    where = ["--weights-dir", folder / "w", "--data-dir", folder / "d", "--device", "cpu"]
    said = run("classify", *where, "hello there", "").stdout.splitlines()
    assert len(said) == 2 and all(re.fullmatch(r"(ham|spam)\t[01]\.\d{4}\t.*", line) for line in said)
    own = run("evaluate", *where)
    assert re.search(r"test: 16 messages, accuracy [\d.]+%", own.stdout), own.stderr
    other = run("evaluate", *where, "--data", folder / "d" / "train.csv")
    assert "all: 56 messages" in other.stdout
    (tmp_path / "o.csv").write_text("label,text\neggs,hi\n")
    assert "['eggs']" in run("evaluate", *where, "--data", tmp_path / "o.csv").stderr


def test_own_labels_columns_and_test_file(tmp_path):
    df = g.read_messages(small_data(tmp_path / "d.tsv"))
    frame = pd.DataFrame({"stars": df["Label"].map({"ham": 5, "spam": 1}), "review": df["Text"]})
    frame[:60].to_csv(tmp_path / "r.csv", index=False)
    frame[60:].to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    train(tmp_path, "--text-column", "review", "--label-column", "stars", "--test-data", tmp_path / "t.jsonl", data=tmp_path / "r.csv")
    assert set(pd.read_csv(tmp_path / "d" / "test.csv")["Label"]) == {1, 5}  # the labels as they were
    done = run("evaluate", "--weights-dir", tmp_path / "w", "--device", "cpu")
    assert "t.jsonl, all: 20 messages" in done.stdout and "\n5" in done.stdout, done.stderr


def test_streams(trained, tmp_path):
    use = ["classify", "--weights-dir", trained[0] / "w", "--device", "cpu"]
    texts = ["hello", "emoji 😀 ünï", "<|endoftext|>", "x" * 100_000, "last"]
    lines = "\n\n".join(texts).encode() + b"\n\xff broken\r\nwin"
    done = run(*use, "--input", "-", "--format", "jsonl", input=lines, text=False)
    rows = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert [row["text"] for row in rows] == [*texts, "\ufffd broken", "win"], done.stderr
    (tmp_path / "a.csv").write_text('Id,Text\n1,"two\nlines"\n2,"b, c"\n')
    done = run(*use, "--input", tmp_path / "a.csv", "--output", tmp_path / "out.csv", "--format", "csv")
    assert done.returncode == 0 and pd.read_csv(tmp_path / "out.csv")["text"].tolist() == ["two\nlines", "b, c"]
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "\\ud800 surrogate"}\n')
    assert len(run(*use, "--input", tmp_path / "a.jsonl").stdout.splitlines()) == 2
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnonsense\n')
    bad = run(*use, "--input", tmp_path / "bad.jsonl", "--output", tmp_path / "no")
    assert bad.returncode == 2 and "not a jsonl file" in bad.stderr and not (tmp_path / "no").exists()
    always, never = (run(*use, "--threshold", t, "hello").stdout.split()[0] for t in (0, 1))
    assert (always, never) == ("spam", "ham")


def test_a_closed_pipe_is_no_error(trained):
    code = f"yes hello | head -20000 | {sys.executable} {HERE / 'gpt_spam.py'} classify --weights-dir {trained[0] / 'w'} --input - | head -1"
    done = subprocess.run(["bash", "-c", f"{code}; echo ${{PIPESTATUS[2]}}"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0" and done.stderr == ""


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


def test_a_damaged_hostile_or_wrong_classifier_is_refused_and_runs_no_code(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, bad = trained[0] / "w" / "spam_classifier.pth", Path("bad.pth")
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    tensor = torch.load(path, weights_only=True)["model"]["pos_emb.weight"].numpy().tobytes()
    data[data.index(tensor) + 100] ^= 1
    bad.write_bytes(data)
    with pytest.raises(ValueError, match="bad.pth is not a classifier.*damaged"):
        g.load_classifier(bad)
    good = torch.load(path, weights_only=True)
    for content in (Evil(), {**good, "about": Evil()}, {**good, "labels": ["a"]}, {**good, "config": {**good["config"], "n_layers": 3}}, [1]):
        torch.save(content, bad)
        with pytest.raises(ValueError, match="bad.pth is not a classifier"):
            g.load_classifier(bad)
    assert os.listdir() == ["bad.pth"] and member.file_size > 100


def test_a_state_dict_of_the_chapter(trained, micro, tmp_path):
    model, tokenizer, _, options, _ = g.load_classifier(trained[0] / "w" / "spam_classifier.pth")
    torch.save({**model.state_dict(), "trf_blocks.0.att.mask": torch.ones(3, 3)}, tmp_path / "review_classifier.pth")
    with pytest.raises(ValueError, match="--model"):
        g.load_classifier(tmp_path / "review_classifier.pth")
    again, other, labels, chapter, _ = g.load_classifier(tmp_path / "review_classifier.pth", micro)
    assert labels == ["ham", "spam"] and chapter == {"max_length": 120}
    assert torch.equal(g.predict(["a", "bb"], again, other, CPU, **chapter), g.predict(["a", "bb"], model, tokenizer, CPU, **chapter))


def test_without_any_network_the_bundled_model_and_messages_are_used_and_named(tmp_path):
    places = ["--weights-dir", tmp_path / "w", "--data-dir", tmp_path / "d", "--weights-url", DEAD, "--data-url", DEAD, "--device", "cpu"]
    done = run("train", *places, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bundled model or messages") == 2  # at the start, and beside the final accuracies
    assert "Changed from the chapter: epochs 1, lr 0.001, schedule linear" in done.stdout  # the model's own settings
    named = run("train", *places, "--model", "124M")
    assert named.returncode == 2 and "cannot download" in named.stderr
    (tmp_path / "w" / "124M").mkdir(exist_ok=True)
    (tmp_path / "w" / "124M" / "vocab.bpe.part").write_bytes(b"half")
    begun = run("train", *places)
    assert begun.returncode == 2 and "cannot download" in begun.stderr  # a broken download is not given up silently


def test_the_bundled_model_is_a_small_gpt_in_the_form_of_a_converted_checkpoint():
    assert g.TINY.stat().st_size <= 8_000_000
    model, texts = g.load_pretrained(g.TINY)
    tokenizer = g.build_tokenizer(texts["encoder.json"], texts["vocab.bpe"])
    assert model.cfg.context_length >= 256 and tokenizer.n_vocab == model.cfg.vocab_size
    ids = torch.tensor([tokenizer.encode_ordinary("It was a dark night, and the rain fell on the roof of the old house.")])
    loss = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).item()
    assert loss < 0.7 * math.log(model.cfg.vocab_size)  # it has learned something: knowing nothing costs 8.3 nats
    card = (HERE / "weights" / "README.md").read_text()
    assert hashlib.sha256(g.TINY.read_bytes()).hexdigest() in card and f"{g.TINY.stat().st_size:,} bytes" in card


def test_pretraining_that_was_broken_off_ends_with_the_same_model(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("pretrain_tiny", HERE / "weights" / "pretrain_tiny.py")
    pretrain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pretrain)
    monkeypatch.setattr(pretrain, "CONFIG", g.GPTConfig(300, 32, 16, 2, 1, 0.1))
    monkeypatch.setattr(pretrain, "SEGMENT", 1)
    args = ["", str(HERE / "README.md"), "--sample", str(small_data(tmp_path / "d.tsv")), "--steps", "2", "--batch-size", "4"]
    validate, calls = pretrain.validate, []

    def breaks_at_the_second(*args):
        calls.append(1)
        if len(calls) > 2:  # two streams a time
            raise KeyboardInterrupt
        return validate(*args)

    for name in ("whole", "broken"):
        monkeypatch.setattr(sys, "argv", [*args, "--out", str(tmp_path / f"{name}.npz")])
        if name == "broken":
            monkeypatch.setattr(pretrain, "validate", breaks_at_the_second)
            with pytest.raises(KeyboardInterrupt):
                pretrain.main()
            monkeypatch.setattr(pretrain, "validate", validate)
        pretrain.main()
    assert (tmp_path / "whole.npz").read_bytes() == (tmp_path / "broken.npz").read_bytes()
    assert g.load_pretrained(tmp_path / "whole.npz")[0].cfg.n_layers == 1


def test_a_damaged_download_is_thrown_away(server, tmp_path):
    for name in (*g.TEXT_FILES, g.DATA_FILE):
        server.files[f"/gpt-2/models/355M/{name}"] = (MICRO / name).read_bytes()
    args = ["train", "--model", "355M", "--weights-url", server.url, "--weights-dir", str(tmp_path / "w"), "--data", str(BUNDLED[0])]
    assert g.main(args) == 2  # encoder.json and vocab.bpe are not GPT-2's
    server.files[f"/gpt-2/models/355M/{g.DATA_FILE}"] = (MICRO / g.DATA_FILE).read_bytes()[:-4]
    assert g.main([*args, "--no-verify"]) == 2 and not list((tmp_path / "w").rglob("*.*"))


@pytest.mark.parametrize("args, said", [
    (["train", "--model", "gpt5"], "gpt5 is not a checkpoint"),
    (["train", "--model", HERE / "data"], "not a checkpoint in OpenAI's layout"),
    (["train", "--model", MICRO, "--data", "nowhere.tsv"], "nowhere.tsv"),
    (["train", "--model", MICRO, "--data", MICRO / "vocab.bpe"], "no column 'label'"),
    (["train", "--model", MICRO, "--data", BUNDLED[0], "--out", HERE], "cannot write"),
    (["train", "--model", MICRO, "--data", BUNDLED[0], "--batch-size", "0"], "batch_size must be at least 1, got 0"),
    (["train", "--model", MICRO, "--data", BUNDLED[0], "--no-padding", "--pooling", "mean"], "requires --batch-size 1"),
    (["train", "--model", MICRO, "--data", BUNDLED[0], "--context-length", "9999"], "--context-length"),
    (["train", "--learning-rate", "1"], "--learning-rate"),
    (["classify", "--classifier", "none.pth", "hi"], "none.pth is not a classifier; make one with"),
    (["classify", "--classifier", BUNDLED[0], "hi"], "is not a classifier"),
    (["classify"], "give texts, or --input"),
    (["train", "--device", "warp", "--model", MICRO, "--data", BUNDLED[0]], "no device 'warp'"),
    (["train", "--weights-url", DEAD, "--model", "124M", "--data", BUNDLED[0]], f"{DEAD}/gpt-2/models/124M/"),
])
def test_bad_input_is_one_error_and_status_2(tmp_path, capsys, args, said):
    if args[0] == "train":
        args = [*args, "--weights-dir", tmp_path / "w", "--data-dir", tmp_path / "d"]
    try:
        status = g.main(list(map(str, args)))
    except SystemExit as error:  # argparse
        status = error.code
    assert status == 2 and said in capsys.readouterr().err


def test_readme_and_script_headers_name_the_same_packages():
    def packages(text):
        return set(re.findall(r'"([a-z-]+[=>0-9.]*)"', text))

    headers = [re.search(r"# dependencies = \[(.*?)\]", (HERE / name).read_text(), re.DOTALL)[1]
               for name in ("gpt_spam.py", "test_gpt_spam.py")]
    installs = re.findall(r"pip install (torch.*?)(?: &&|\n)", (HERE / "README.md").read_text())
    assert [packages(h) for h in headers] == [set(i.replace('"', "").split()) for i in installs[:2]]


def test_the_file_alone_runs(tmp_path):
    shutil.copy(HERE / "gpt_spam.py", tmp_path)
    start = time.time()
    done = subprocess.run([sys.executable, "gpt_spam.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "classify" in done.stdout and os.listdir(tmp_path) == ["gpt_spam.py"] and start


@pytest.mark.skipif(not os.environ.get("GPT_SPAM_ONLINE"), reason="downloads OpenAI's 124M: set GPT_SPAM_ONLINE=1")
def test_numbers_printed_in_the_chapter(tmp_path):
    done = run("train", "--model", "124M", "--data", "sms", "--metrics", tmp_path / "m.json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "forward.\\n\\nThe first step is to understand the importance of your work" in done.stdout
    assert "accuracy 46.25% / 45.00% / 48.75% (10 batches), loss 2.453 / 2.583 / 2.322" in done.stdout
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert (metrics["train_loss"][0], metrics["val_loss"][0]) == pytest.approx((2.153, 2.392), abs=6e-4)
    assert (metrics["train_loss"][12], metrics["val_loss"][12]) == pytest.approx((0.083, 0.074), abs=6e-4)
    assert [round(100 * accuracy, 2) for accuracy in metrics["final_accuracy"]] == [97.21, 97.32, 95.67]


if __name__ == "__main__":
    sys.exit(pytest.main(["-q", __file__]))
