# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "tiktoken==0.14.0", "numpy", "requests", "pandas", "tqdm", "matplotlib",
#     "pytest", "scikit-learn"]
# ///
"""Offline tests: `python -m pytest -q test_gpt_spam.py`.

PyTorch's own modules judge the layers, bytes that TensorFlow wrote the reader, scikit-learn the metrics, counts and
plain arithmetic the rest. GPT_SPAM_ONLINE=1 adds the test that downloads OpenAI's weights and compares with the book.
"""

import ast
import contextlib
import hashlib
import http.server
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import gpt_spam as g

HERE = Path(__file__).resolve().parent
MICRO = HERE / "weights" / "micro"  # 2 layers, 16 wide, 320 tokens; written by TensorFlow 2.21
ENCODER, MERGES = (MICRO / "encoder.json").read_text(), (MICRO / "vocab.bpe").read_text()
TOKENIZER = g.build_tokenizer(ENCODER, MERGES)
BUNDLED = [HERE / "data" / "sample_sms.tsv", HERE / "data" / "hard_sms.tsv", HERE / "weights" / "messages.tsv"]
CFG = g.GPTConfig(vocab_size=50, context_length=12, emb_dim=8, n_heads=2, n_layers=3)
CPU = torch.device("cpu")
DEAD = "http://127.0.0.1:9"  # nobody listens there


def small_data(path):
    """Write 23 short bundled messages of each class in UCI's form: 32 to train on, 4 to validate, 10 to test."""
    df = g.read_messages(BUNDLED[0])
    df = df[df["Text"].str.len().between(10, 40)].groupby("Label").head(23)
    df.to_csv(path, sep="\t", header=False, index=False)
    return path


def train_arguments(folder, *args, data=None, model=MICRO):
    """Return the command line of a short training on a small checkpoint and small data, all its files in `folder`."""
    places = ["--weights-dir", folder / "w", "--data-dir", folder / "d", "--metrics", folder / "m.json"]
    folder.mkdir(exist_ok=True)
    data = data or small_data(folder / "d.tsv")
    return list(map(str, ["train", "--model", model, "--data", data, *places, "--device", "cpu", "--epochs", 2,
                          "--eval-freq", 3, "--lr", 1e-3, *args]))


def train(folder, *args, **kwargs):
    """Run it in this process; return the metrics."""
    assert g.main(train_arguments(folder, *args, **kwargs)) == 0
    return json.loads((folder / "m.json").read_text())


def losses(metrics):
    return metrics["train_loss"] + metrics["val_loss"]


@pytest.fixture
def run(capfd):
    """Run the command line in this process; return its status, and output and errors since the last time."""
    return lambda *args: (g.main(list(map(str, args))), *capfd.readouterr())


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    path = tmp_path_factory.mktemp("micro") / "micro.npz"
    g.convert_checkpoint(MICRO, path)
    return path


def test_balance_and_split_are_the_chapters_or_take_any_labels_and_a_test_file():
    df = pd.DataFrame({"Label": ["ham"] * 170 + ["spam"] * 60, "Text": [str(i) for i in range(230)]})
    chapter = pd.concat([df[df["Label"] == "ham"].sample(60, random_state=123), df[df["Label"] == "spam"]])
    pd.testing.assert_frame_equal(g.create_balanced_dataset(df), chapter)
    frames, labels, weights = g.prepare_splits(df)
    assert list(map(len, frames)) == [84, 12, 24] and labels == ["ham", "spam"] and weights is None
    shuffled = chapter.sample(frac=1, random_state=123, ignore_index=True)
    pd.testing.assert_frame_equal(pd.concat(frames), shuffled)
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
    ("glued.tsv", 'ham\t"hi, you\nspam\tthree"\nspam\tNA\n'),  # by default quoting, as in the chapter
    ("a.csv", 'id,Text,Label\n1,"hi, you\nspam\tthree",ham\n2,NA,spam\n'),
    ("a.jsonl", '{"text": "hi, you\\nspam\\tthree", "label": "ham"}\n{"label": "spam", "text": "NA"}\n'),
    ("bom.csv", '\ufeffText,Label\r\n"hi, you\nspam\tthree",ham\r\nNA,spam\r\n'),
])
def test_forms_of_labelled_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    expected = {"Label": ["ham", "spam"], "Text": ["hi, you\nspam\tthree", "NA"]}  # "NA" is a text
    assert g.read_messages(tmp_path / name).to_dict("list") == expected


@pytest.mark.parametrize("content, said", [
    ("label,text\nham,hi\n", "1 messages"),
    ("review,stars\nham,hi\n", "no column 'label'.*'review', 'stars'.*--label-column"),
    ("text,label\nok,x\nno\n", "message 2 .*has no label"), ("label,text\nx,a,b\n", "quote the texts"),
    ('{"text": "a"}\n', "no column 'label'"), ('{"text": \n', "not a table"), ("", "not a table"),
])
def test_wrong_data_is_one_clear_error(tmp_path, content, said):
    (tmp_path / "data.tsv").write_text(content)
    with pytest.raises(ValueError, match=said):
        g.prepare_splits(g.read_messages(tmp_path / "data.tsv"))


@pytest.mark.skipif(not (HERE / "data" / "SMSSpamCollection.tsv").exists(), reason="the collection is not here")
def test_counts_of_the_sms_spam_collection():
    df = g.read_messages(HERE / "data" / "SMSSpamCollection.tsv")
    assert df["Label"].value_counts().to_dict() == {"ham": 4825, "spam": 747}
    assert [len(s) for s in g.prepare_splits(df)[0]] == [1045, 149, 300]
    assert not any(g.read_messages(file)["Text"].isin(df["Text"]).any() for file in BUNDLED)


def test_no_two_bundled_messages_are_alike():
    frames = [g.read_messages(file) for file in BUNDLED]
    assert len(frames[0]) >= 1400 and frames[0]["Label"].value_counts().nunique() == 1 and len(frames[1]) >= 250
    texts = pd.concat(frames)["Text"].tolist()
    words = [frozenset(re.findall(r"\w+", text.lower())) for text in texts]
    counts, holders = Counter(word for own in words for word in own), {}
    for i, own in enumerate(words):
        # Two that share over half of their words share one of the half and one that are the rarest.
        rarest = sorted(own, key=lambda word: (counts[word], word))[:len(own) // 2 + 1]
        for j in {j for word in rarest for j in holders.get(word, ())}:
            assert len(own & words[j]) <= 0.5 * len(own | words[j]), (texts[i], texts[j])
        for word in rarest:
            holders.setdefault(word, []).append(i)


def test_tokenizer_merges_as_byte_pair_encoding_does():
    """A few lines of plain BPE: always merge the neighbours that stand first in vocab.bpe."""
    encoder, merges = json.loads(ENCODER), MERGES.split("\n")
    ranks = {tuple(line.split(" ")): i for i, line in enumerate(merges[1:-1])}
    for word in ("the", " thing", "call", " you", " winner", "zzz"):
        parts = list(word.replace(" ", "\u0120"))
        while pairs := [(ranks[p], i) for i, p in enumerate(zip(parts, parts[1:])) if p in ranks]:
            i = min(pairs)[1]
            parts[i:i + 2] = ["".join(parts[i:i + 2])]
        assert TOKENIZER.encode_ordinary(word) == [encoder[p] for p in parts]
    text = "".join(map(chr, range(0x24F))) + "😀\ufffd"
    assert TOKENIZER.decode(TOKENIZER.encode_ordinary(text)) == text
    assert TOKENIZER.eot_token == 319 not in TOKENIZER.encode_ordinary("<|endoftext|>")
    merges[5], merges[6] = merges[6], merges[5]
    with pytest.raises(ValueError, match="do not belong together"):
        g.build_tokenizer(ENCODER, "\n".join(merges))


def test_dataset_pads_cuts_and_knows_where_to_read(tmp_path):
    frame = pd.DataFrame({"Text": ["a", "abcabcabc", ""], "Label": [0, 1, 0]})
    short, long = TOKENIZER.encode_ordinary("a"), TOKENIZER.encode_ordinary("abcabcabc")
    dataset = g.SpamDataset(frame, TOKENIZER)
    padded = [short + [319] * (len(long) - 1), long, [319] * len(long)]
    assert dataset.max_length == len(long) > 4 and [ids.tolist() for ids in dataset.inputs] == padded
    assert g.SpamDataset(frame, TOKENIZER, pad_token_id=7).inputs[2].tolist() == [7] * len(long)
    cut = g.SpamDataset(frame, TOKENIZER, max_length=3)
    assert cut.inputs[1].tolist() == long[:3] and [x.item() for x in cut[1][1:]] == [2, 1]
    read = {pos: [p.item() for p in g.SpamDataset(frame, TOKENIZER, 4, token_pos=pos).positions]
            for pos in ("first", "last", "last_real")}
    assert read == {"first": [0] * 3, "last": [3] * 3, "last_real": [0, 3, 0]}
    assert [len(ids) for ids in g.SpamDataset(frame, TOKENIZER, 4, padding=False).inputs] == [1, 4, 1]
    frame.to_csv(tmp_path / "a.csv", index=False)
    assert [ids.tolist() for ids in g.SpamDataset(tmp_path / "a.csv", TOKENIZER).inputs] == padded
    with pytest.raises(ValueError, match="'ham'"):
        g.SpamDataset(frame.assign(Label="ham"), TOKENIZER)


@pytest.mark.parametrize("causal", [True, False])
def test_block_equals_pytorch(causal):
    torch.manual_seed(0)
    ours = g.TransformerBlock(g.replace(CFG, causal=causal)).eval()
    theirs = nn.TransformerEncoderLayer(
        8, 2, 32, 0.0, lambda x: F.gelu(x, approximate="tanh"), batch_first=True, norm_first=True).eval()
    state = ours.state_dict()
    for kind in ("weight", "bias"):
        parts = [state.pop(f"att.W_{name}.{kind}") for name in ("query", "key", "value")]
        state[f"self_attn.in_proj_{kind}"] = torch.cat(parts)
    for our, their in {"scale": "weight", "shift": "bias", "ff.layers.0": "linear1", "ff.layers.2": "linear2",
                       "att.out_proj": "self_attn.out_proj"}.items():
        state = {name.replace(our, their): value for name, value in state.items()}
    theirs.load_state_dict(state)
    x, later = torch.randn(3, 12, 8), torch.ones(12, 12, dtype=torch.bool).triu(1)
    torch.testing.assert_close(ours(x), theirs(x, src_mask=later if causal else None))


def test_generate_appends_the_most_likely_token():
    torch.manual_seed(0)
    model, idx = g.GPTModel(CFG).eval(), torch.randint(50, (1, 10))
    out = g.generate_text_simple(model, idx, 4, CFG.context_length)
    for end in range(10, 14):  # also where the window slides: the context holds 12
        assert out[0, end] == model(out[:, max(0, end - 12):end])[0, -1].argmax()


def micro_values(name, *shape):
    """What the checkpoint was written from: a variable's values depend on its name and shape only."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"0:model/{name}".encode()).digest(), "little"))
    array = rng.standard_normal(shape, np.float32)
    array *= 0.01 if name == "wpe" else 0.02
    return array + 1 if name.endswith("/g") else array * 5


def test_every_tensor_is_what_tensorflow_wrote(micro):
    model, texts = g.load_pretrained(micro)
    expected = {"tok_emb.weight": micro_values("wte", 320, 16), "pos_emb.weight": micro_values("wpe", 1024, 16)}
    expected["out_head.weight"] = expected["tok_emb.weight"]
    norms = {f"trf_blocks.{i}.norm{n}": f"h{i}/ln_{n}" for i in (0, 1) for n in (1, 2)}
    for our, their in {"final_norm": "ln_f", **norms}.items():
        expected |= {f"{our}.scale": micro_values(f"{their}/g", 16), f"{our}.shift": micro_values(f"{their}/b", 16)}
    linears = {"attn/c_attn": (16, 48, "att.W_query att.W_key att.W_value"), "attn/c_proj": (16, 16, "att.out_proj"),
               "mlp/c_fc": (16, 64, "ff.layers.0"), "mlp/c_proj": (64, 16, "ff.layers.2")}
    for their, (inside, outside, ours) in linears.items():
        for i in (0, 1):
            both = np.vstack([micro_values(f"h{i}/{their}/w", 1, inside, outside)[0],
                              micro_values(f"h{i}/{their}/b", outside)])  # the bias is the last row
            for our, part in zip(ours.split(), np.split(both, len(ours.split()), axis=1)):
                expected |= {f"trf_blocks.{i}.{our}.weight": part[:-1].T, f"trf_blocks.{i}.{our}.bias": part[-1]}
    assert set(expected) == set(model.state_dict()) and model.cfg.n_heads == 2 and texts["vocab.bpe"] == MERGES
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.parametrize("file, change, said", [
    (g.DATA_FILE, lambda b: b[:-4], r"112,380 bytes.*112,384"), (g.DATA_FILE, lambda b: b + b"more", "112,388 bytes"),
    (g.DATA_FILE, lambda b: b[:4000] + b"\0\0\xc0\x7f" + b[4004:], "NaN or infinity"),
    ("hparams.json", lambda b: b.replace(b'"n_layer": 2', b'"n_layer": 3'), r"112,384 bytes.*125,"),
    ("hparams.json", lambda b: b.replace(b'"n_vocab": 320', b'"n_vocab": 321'), "320 tokens, the model 321"),
    ("hparams.json", lambda b: b"<html>", "Expecting value"), ("encoder.json", lambda b: b[:100], "not a checkpoint"),
    ("vocab.bpe", lambda b: b[:50] + b"\xff" + b[51:], "utf-8"),
])
def test_a_damaged_checkpoint_is_refused(tmp_path, file, change, said):
    shutil.copytree(MICRO, tmp_path / "changed")
    (tmp_path / "changed" / file).write_bytes(change((MICRO / file).read_bytes()))
    with pytest.raises(ValueError, match=said):
        g.convert_checkpoint(tmp_path / "changed", tmp_path / "out.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["changed"]


def test_an_npz_that_does_not_fit_its_hparams(tmp_path, micro):
    arrays = dict(np.load(micro))
    hparams = arrays["hparams.json"].tobytes().replace(b'"n_layer": 2', b'"n_layer": 9')
    for wrong in ({"tok_emb.weight": np.zeros((3, 3), np.float32)}, {"pos_emb.weight": np.array([{}], dtype=object)},
                  {"hparams.json": np.frombuffer(hparams, np.uint8)}):
        np.savez(tmp_path / "bad.npz", **{**arrays, **wrong})
        with pytest.raises(ValueError, match="bad.npz is not a model"):
            g.load_pretrained(tmp_path / "bad.npz")


def test_head_and_what_trains_of_the_124m():
    with torch.device("meta"):
        model = g.GPTModel(g.GPTConfig())
    g.add_classification_head(model, 2)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith(("trf_blocks.11.", "final_norm.", "out_head.")) for name in trained)
    assert (sum(trained.values()), sum(p.numel() for p in model.parameters())) == (7_090_946, 124_441_346)
    torch.manual_seed(123)
    torch.testing.assert_close(model.out_head.weight, nn.Linear(768, 2).weight)


def test_loss_and_accuracy_against_plain_arithmetic():
    torch.manual_seed(0)
    model = g.GPTModel(CFG).train()
    g.add_classification_head(model, 2)
    batches = [(torch.randint(50, (n, 12)), torch.full((n,), 11), torch.randint(2, (n,))) for n in (4, 4, 1)]
    means, right = [], []
    for ids, _, labels in batches:
        p = model(ids)[:, -1].softmax(-1)
        means.append(-p[torch.arange(len(ids)), labels].log().mean().item())
        right += (p[:, 1] > p[:, 0]).long().eq(labels).tolist()
    logits = g.LabelLogits(model)
    assert g.calc_loss_loader(batches, logits, CPU) == pytest.approx(sum(means) / 3, rel=1e-5)
    assert g.calc_loss_loader(batches, logits, CPU, 2) == pytest.approx(sum(means[:2]) / 2, rel=1e-5)
    assert g.calc_accuracy_loader(batches, logits, CPU) == sum(right) / 9 and not model.training
    g.evaluate_model(logits, batches, batches, CPU, 1)
    assert model.training
    plain = nn.Linear(12, 2)  # the chapter's way: a batch of inputs and its labels
    loss = F.cross_entropy(plain(ids.float()), labels)
    assert torch.equal(g.calc_loss_batch(ids.float(), labels, plain, CPU), loss)


@pytest.mark.parametrize("causal", [True, False])
def test_last_block_at_one_position_equals_the_block_in_values_and_gradients(causal):
    torch.manual_seed(0)
    block, x = g.TransformerBlock(g.replace(CFG, causal=causal)), torch.randn(4, 12, 8, requires_grad=True)
    positions = torch.tensor([0, 5, 11, 3])
    outs = [g.last_block_at(block, x, positions), block(x)[torch.arange(4), positions]]
    torch.testing.assert_close(*outs)
    weights = [x, *(p for name, p in block.named_parameters() if "W_key.bias" not in name)]  # that changes nothing
    torch.testing.assert_close(*[torch.autograd.grad(out.square().sum(), weights) for out in outs])


def test_training_equals_a_plain_loop(tmp_path):
    ours, loaders, length = train(tmp_path, "--eval-iter", 2), [], None
    for name in ("train", "validation", "test"):
        frame = pd.read_csv(tmp_path / "d" / f"{name}.csv", keep_default_na=False).replace({"ham": 0, "spam": 1})
        encoded = [TOKENIZER.encode_ordinary(text) for text in frame["Text"]]
        length = length or max(map(len, encoded))
        rows = [(torch.tensor((ids + [319] * length)[:length]), y) for ids, y in zip(encoded, frame["Label"])]
        loaders.append(torch.utils.data.DataLoader(rows, 8, shuffle=name == "train", drop_last=name == "train"))
    model, _ = g.load_pretrained(tmp_path / "w" / "folder-micro.npz")
    g.add_classification_head(model, 2)
    torch.manual_seed(123)
    optimizer, step, logged = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1), 0, []
    for _ in range(2):
        for ids, labels in loaders[0]:
            optimizer.zero_grad()
            F.cross_entropy(model(ids)[:, -1], labels).backward()
            optimizer.step()
            if step % 3 == 0:
                logged.append([np.mean([F.cross_entropy(model(ids)[:, -1], y).item() for ids, y in g.islice(loader, 2)])
                               for loader in loaders[:2]])
            step += 1
        for loader in loaders[:2]:  # the chapter's accuracies draw from the same random numbers
            list(loader)
    assert np.array(logged).T.ravel().tolist() == pytest.approx(losses(ours), abs=1e-4)
    right = [torch.cat([model(ids)[:, -1].argmax(-1) == y for ids, y in loader]) for loader in loaders[1:]]
    assert [r.float().mean().item() for r in right] == pytest.approx(ours["final_accuracy"][1:])


def test_the_learning_rate_rises_and_falls_in_a_line(tmp_path):
    seen = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    train(tmp_path, "--schedule", "linear", "--epochs", 5, "--lr", 1)
    hook.remove()
    assert seen == pytest.approx([1 / 2, 1, *(i / 18 for i in range(18, 0, -1))])  # a tenth of the 20 steps up


@pytest.mark.parametrize("changes", [
    "", "--trainable-layers last_layer", "--trainable-layers last_two_blocks", "--token-pos first", "--pooling mean",
    "--token-pos last_real", "--no-causal-mask", "--no-padding --batch-size 4", "--context-length model",
    "--trainable-layers lora", "--no-padding --batch-size 1 --pooling mean", "--weights random --trainable-layers all",
    "--ignore-index 319", "--no-padding --batch-size 1 --no-causal-mask", "--no-padding --context-length 9",
])
def test_the_cache_and_the_fast_last_block_change_no_loss_and_no_accuracy(tmp_path, monkeypatch, changes):
    fast, plain = (train(tmp_path, *changes.split(), cache) for cache in ("--cache", "--no-cache"))
    monkeypatch.setattr(g.os, "sysconf", lambda name: 1)  # as if the memory were too small for a cache
    for other in (plain, train(tmp_path, *changes.split())):
        assert losses(fast) == pytest.approx(losses(other), abs=2e-5)
        assert all(fast[name] == other[name] for name in ("train_accuracy", "val_accuracy", "final_accuracy"))
    assert "length 9" not in changes or g.load_classifier(tmp_path / "w" / "spam_classifier.pth")[3]["max_length"] == 9


@pytest.mark.parametrize("options, read", [
    ("", lambda out, real: out[:, -1]), ("--token-pos first", lambda out, real: out[:, 0]),
    ("--token-pos last_real", lambda out, real: out[torch.arange(len(out)), real - 1]),
    ("--pooling mean", lambda out, real: out.mean(1)),
], ids=str)
def test_a_saved_classifier_reads_the_position_that_was_asked_for(tmp_path, options, read):
    train(tmp_path, *options.split())
    model, tokenizer, labels, options, _ = g.load_classifier(tmp_path / "w" / "spam_classifier.pth")
    texts = g.read_messages(BUNDLED[0])["Text"].tolist()[:30]
    encoded = [tokenizer.encode_ordinary(text)[:options["max_length"]] for text in texts]
    ids = torch.tensor([i + [319] * (options["max_length"] - len(i)) for i in encoded])
    plain = read(model(ids), torch.tensor([len(i) for i in encoded])).softmax(-1)
    torch.testing.assert_close(g.predict(texts, model, tokenizer, CPU, **options), plain, atol=1e-5, rtol=1e-4)
    alone = [g.classify_review(text, model, tokenizer, CPU, labels=labels, **options)[1] for text in texts[:5]]
    assert alone == pytest.approx(plain[:5].amax(dim=1).tolist(), abs=1e-5)


def test_bfloat16_stays_near_float32_and_reopens_bit_for_bit(tmp_path):
    full, half = (losses(train(tmp_path, "--dtype", dtype)) for dtype in ("float32", "bfloat16"))
    assert half == pytest.approx(full, abs=0.02) and half != full
    blocks = g.load_classifier(tmp_path / "w" / "spam_classifier.pth")[0].trf_blocks
    pretrained = g.load_pretrained(tmp_path / "w" / "folder-micro.npz")[0].trf_blocks[0].to(torch.bfloat16)
    torch.testing.assert_close(dict(blocks[0].state_dict()), dict(pretrained.state_dict()), rtol=0, atol=0)
    assert blocks[1].norm1.scale.dtype == torch.float32


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
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum(name.endswith(".A") for name in trained) == 3 * 6 + 1
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).add_(torch.randn(()) * 0.1)
        x, plain = torch.randn(4, 8), query.parametrizations.weight.original
        torch.testing.assert_close(query(x), F.linear(x, plain, query.bias) + 5 * (x @ lora.A @ lora.B))
        logits = model(ids)
        g.merge_lora(model)
        torch.testing.assert_close(model(ids), logits)
    assert set(model.state_dict()) == {*g.GPTModel(CFG).state_dict(), "out_head.bias"}


def test_experiments(run, tmp_path):
    places = ["--weights-dir", tmp_path / "w", "--data-dir", tmp_path / "d", "--device", "cpu"]
    _, out, err = run("experiments", "--model", MICRO, "--data", small_data(tmp_path / "d.tsv"), *places, "--epochs", 1,
                      "--rows", 1, 16, 18, 19)
    table = [line.strip("| ").split(" | ") for line in out.splitlines()[2:]]
    assert [row[0] for row in table] == ["1", "16", "18", "19"] and table[1][1] == "--token-pos last_real", err
    assert [row[5] for row in table] == ["95.00%", "98.33%", "95.00%", "96.33%"] and table[0][2:5] == table[2][2:5]
    assert not (tmp_path / "d").exists()  # the chapter's splits are not these


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_equal_scikit_learn(classes):
    sk = pytest.importorskip("sklearn.metrics")
    rng, names = np.random.default_rng(classes), [f"c{i}" for i in range(classes)]
    labels, predicted = rng.integers(classes, size=300), rng.integers(classes - 1, size=300)  # one is never predicted
    accuracy, table, confusion = g.calc_metrics(labels, predicted, names)
    theirs = sk.classification_report(labels, predicted, target_names=names, output_dict=True, zero_division=0)
    assert accuracy == pytest.approx(theirs["accuracy"])
    for name in names:
        assert table.rename(columns={"f1": "f1-score"}).loc[name].to_dict() == pytest.approx(theirs[name])
    assert confusion.to_numpy().tolist() == sk.confusion_matrix(labels, predicted).tolist()


def test_two_processes_and_accumulated_batches_train_as_one_large_batch(tmp_path):
    folders = [tmp_path / name for name in ("one", "accumulated", "two")]
    options = ("--epochs", 4, "--eval-freq", 1, "--batch-size", 32)  # all training messages
    one, _ = train(folders[0], *options), train(folders[1], *options[:-1], 8, "--accumulation-steps", 4)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", g.__file__]
    done = subprocess.run([*torchrun, *train_arguments(folders[2], *options)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("Training completed") == 1, done.stderr
    states = [g.load_classifier(folder / "w" / "spam_classifier.pth")[0].state_dict() for folder in folders]
    for name in [name for name in states[0] if "W_key.bias" not in name]:  # softmax ignores the keys' biases
        for other in states[1:]:
            torch.testing.assert_close(other[name], states[0][name], atol=1e-5, rtol=0)
    two = json.loads((folders[2] / "m.json").read_text())
    assert losses(two) == pytest.approx(losses(one), abs=1e-5) and one["final_accuracy"] == two["final_accuracy"]


@pytest.mark.parametrize("names, use", [
    ("GPTConfig MultiHeadAttention LayerNorm FeedForward TransformerBlock GPTModel add_classification_head", """
model = GPTModel(GPTConfig(50, 12, 8, 2, 3))
add_classification_head(model, 4)
assert model(torch.zeros(2, 12, dtype=int)).shape == (2, 12, 4)"""),
    ("SpamDataset collate", """
dataset = SpamDataset(pd.DataFrame({"Text": ["a", "bb"], "Label": [0, 1]}), tokenizer, padding=False)
ids, positions, labels = next(iter(DataLoader(dataset, 2, collate_fn=collate)))
assert labels.tolist() == [0, 1]"""),
    ("END_OF_TEXT build_tokenizer", "build_tokenizer(ENCODER, MERGES).encode_ordinary('hello')"),
    ("mean_over_processes calc_loss_batch calc_loss_loader calc_accuracy_loader evaluate_model "
     "train_classifier_simple", """
pairs, model = [(torch.eye(4), torch.tensor([0, 1, 0, 1]))] * 3, nn.Linear(4, 2)
log = train_classifier_simple(model, pairs, pairs, torch.optim.AdamW(model.parameters(), lr=0.1), "cpu", 9, 5, 2)
assert log[0][-1] < log[0][0] and len(log[2]) == 9 and log[3][-1] == 1 and log[4] == 9 * 12"""),
    ("LoRALayer replace_linear_with_lora merge_lora", """
model = nn.Sequential(nn.Linear(4, 2))
replace_linear_with_lora(model, 2, 1)
merge_lora(model)
assert set(model.state_dict()) == {"0.weight", "0.bias"}"""),
    ("plot_values", "assert len(plot_values([0, 1], [0, 8], [2., 1.], [2., 1.], 'loss').axes) == 2"),
], ids=lambda value: value.split()[0])
def test_a_piece_lifts_out(names, use):
    """The source of some definitions runs in an empty namespace with the file's imports."""
    tree, space, wanted = ast.parse(Path(g.__file__).read_text()), {}, set(names.split())
    for node in tree.body:
        targets = [n.id for target in getattr(node, "targets", []) for n in ast.walk(target) if isinstance(n, ast.Name)]
        if isinstance(node, (ast.Import, ast.ImportFrom)) or wanted & {*targets, getattr(node, "name", None)}:
            exec(compile(ast.Module([node], []), "piece", "exec"), space)
    assert wanted <= set(space)
    exec(use, {**space, "tokenizer": TOKENIZER, "ENCODER": ENCODER, "MERGES": MERGES})


class Files(http.server.BaseHTTPRequestHandler):
    """Serves a dict of files; `faults` is what happens to the first requests for one of them."""

    def do_GET(self):
        content, start = self.server.files.get(self.path), int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        fault = self.server.faults.pop(0) if content and self.server.faults else None
        self.server.starts.append(start)
        if content is None or fault == 500 or start >= len(content):
            self.send_error(404 if content is None else fault or 416)
            return
        body = content[start:]
        self.send_response(206)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "flip":
            body = bytes([body[0] ^ 255]) + body[1:]
        self.wfile.write(body[:len(body) // 2] if fault == "cut" else body)


CONTENT = np.random.default_rng(0).bytes(3_000_000)
RIGHT = g.partial(g.check_sha256, expected=hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture(scope="session")
def server():
    """Serves CONTENT, and the micro checkpoint as two of OpenAI's; a download does not pause."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(g.time, "sleep", lambda seconds: None)
        server.files = {f"/gpt-2/models/{size}/{name}": (MICRO / name).read_bytes()
                        for size in ("124M", "355M") for name in (*g.TEXT_FILES, g.DATA_FILE)}
        server.files |= {"/good": CONTENT, "/wrong": b"<html>log in</html>"}
        server.faults, server.starts, server.url = [], [], f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("faults", [[], [500], ["cut"], ["cut", "cut"], ["flip"], ["cut", "flip"]], ids=str)
def test_download_takes_the_backup_and_ends_right(server, tmp_path, faults):
    server.starts, server.faults = [], list(faults)
    g.download([f"{server.url}/missing", f"{server.url}/good"], tmp_path / "f", RIGHT)
    assert (tmp_path / "f").read_bytes() == CONTENT and os.listdir(tmp_path) == ["f"]
    assert any(server.starts) == ("cut" in faults), "a partial download is resumed"


@pytest.mark.parametrize("urls, error, said", [
    (["{url}/wrong"], OSError, "SHA-256"), ([f"{DEAD}/x", "{url}/missing"], OSError, f"{DEAD}/x.*404"),
    ([f"{DEAD}/x"], ConnectionError, f"{DEAD}/x"),
])
def test_a_download_that_fails_says_why_and_leaves_no_file(server, tmp_path, urls, error, said):
    (tmp_path / "f.part").write_bytes(CONTENT)  # longer than what the server has
    with pytest.raises(error, match=said) as caught:
        g.download([url.format(url=server.url) for url in urls], tmp_path / "f", RIGHT)
    assert caught.type is error and not (tmp_path / "f").exists()
    assert (tmp_path / "f.part").exists() == (said != "SHA-256")


def test_an_error_inside_an_atomic_write_gets_out_and_leaves_what_was(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(FileNotFoundError, match="mine"), g.atomic_write(tmp_path / "f") as temporary:
        temporary.write_text("half")
        raise FileNotFoundError("mine")
    assert os.listdir(tmp_path) == ["f"] and (tmp_path / "f").read_text() == "old"


def test_a_damaged_checkpoint_that_was_downloaded_is_thrown_away(server, run, tmp_path, monkeypatch):
    args = train_arguments(tmp_path, "--mirror", server.url, model="355M")
    assert "SHA-256" in run(*args)[2]  # encoder.json and vocab.bpe are not GPT-2's
    monkeypatch.setitem(server.files, f"/gpt-2/models/355M/{g.DATA_FILE}", (MICRO / g.DATA_FILE).read_bytes()[:-4])
    status, _, err = run(*args, "--no-verify")
    assert status == 2 and "112,380 bytes" in err and not list((tmp_path / "w").rglob("*.*"))


@pytest.fixture(scope="session")
def trained(server, tmp_path_factory):
    """`train` on a mirror that serves the micro checkpoint as 124M, and a small collection as UCI's."""
    folder, archive = tmp_path_factory.mktemp("trained"), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("../evil", "never unpacked")
        zipped.writestr("SMSSpamCollection", small_data(folder / "raw.tsv").read_bytes())
    server.files["/static/public/228/sms+spam+collection.zip"] = archive.getvalue()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        metrics = train(folder, "--mirror", server.url, "--no-verify", "--plot",
                        folder / "plots", model="124M", data="auto")
    return folder, metrics, out.getvalue()


def test_train_from_a_mirror(trained):
    folder, metrics, out = trained
    assert set(os.listdir(folder / "w")) == {"gpt2-124M.npz", "spam_classifier.pth"}
    assert set(os.listdir(folder / "d")) == {"SMSSpamCollection.tsv", "test.csv", "train.csv", "validation.csv"}
    assert re.search(r"Ep 1 \(Step 000000\): Train loss \d\.\d{3}, Val loss \d\.\d{3}", out)
    assert re.search(r"\nTraining accuracy: [\d.]+% \| Validation accuracy: [\d.]+%\n", out)
    assert len(metrics["train_loss"]) == 3 and len(metrics["val_accuracy"]) == 2 and metrics["examples_seen"] == 64
    assert "Final: accuracy {:.2%} / {:.2%} / {:.2%} (all batches)".format(*metrics["final_accuracy"]) in out
    assert all((folder / "plots" / f"{y}-plot.png").read_bytes().startswith(b"\x89PNG") for y in ("loss", "accuracy"))
    train(folder, "--mirror", DEAD, model="124M", data="sms")  # now without network


def test_own_labels_columns_and_test_file(run, tmp_path):
    df = g.read_messages(small_data(tmp_path / "d.tsv"))
    frame = pd.DataFrame({"stars": df["Label"].map({"ham": 5, "spam": 1}), "review": df["Text"]})
    frame.drop(frame.index[::4]).to_csv(tmp_path / "r.csv", index=False)
    frame[::4].to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    train(tmp_path, "--text-column", "review", "--label-column", "stars", "--test-data", tmp_path / "t.jsonl",
          data=tmp_path / "r.csv")
    assert set(pd.read_csv(tmp_path / "d" / "test.csv")["Label"]) == {1, 5}  # the labels as they were
    assert "would overwrite" in run(*train_arguments(tmp_path, data=tmp_path / "d" / "train.csv"))[2]
    assert re.search(r"(?s)t\.jsonl, all: 12 messages.*\n5 ", run("evaluate", "--weights-dir", tmp_path / "w")[1])


def test_use(trained, run, tmp_path):
    where = ["--weights-dir", trained[0] / "w", "--data-dir", trained[0] / "d", "--device", "cpu"]
    assert re.search(r"test split: 10 messages, accuracy [\d.]+%", run("evaluate", *where)[1])
    assert "all: 32 messages" in run("evaluate", *where, "--data", "x", "--test-data", f"{trained[0]}/d/train.csv")[1]
    (tmp_path / "o.csv").write_text("label,text\neggs,hi\n")
    assert "['eggs']" in run("evaluate", *where, "--data", tmp_path / "o.csv")[2]
    assert re.fullmatch(r"((ham|spam)\t[01]\.\d{4}\t.*\n){2}", run("classify", *where, "hello there", "")[1])

    def classify(name, content, *options):
        (tmp_path / name).write_bytes(content)
        return run("classify", *where, "--input", tmp_path / name, *options)

    texts = ["hello", "emoji 😀 ünï", "<|endoftext|>", "x" * 100_000, "last"]
    lines = "\n\n".join(texts).encode() + b"\n\xff broken\r\nwin"
    rows = map(json.loads, classify("a.txt", lines, "--format", "jsonl")[1].splitlines())
    assert [row["text"] for row in rows] == [*texts, "\ufffd broken", "win"]
    rows = classify("a.csv", b'Id,Text\n1,"two\nlines"\n2,"b, c"\n')[1].splitlines()
    assert [row.split("\t")[2] for row in rows] == ["two lines", "b, c"]
    surrogate = b'{"text": "a"}\n{"text": "\\ud800 surrogate"}\n'
    assert len(classify("a.jsonl", surrogate)[1].splitlines()) == 2
    status, out, err = classify("bad.jsonl", b'{"text": "a"}\nnonsense\n')
    assert status == 2 and "bad.jsonl is not a table of texts" in err and not out
    assert [run("classify", *where, "--threshold", t, "hello")[1].split()[0] for t in (0, 1)] == ["spam", "ham"]


def test_by_token_reads_each_beginning_as_classify_does(trained, run):
    path, text = trained[0] / "w" / "spam_classifier.pth", "Win 😀\nnow"
    out = run("classify", "--classifier", path, "--device", "cpu", "--by-token", text, "")[1].splitlines()
    model, tokenizer, labels, options, _ = g.load_classifier(path)
    ids = tokenizer.encode_ordinary(text)
    tokens, numbers = zip(*(line.split(" spam ") for line in out[:len(ids)]))
    assert "".join(map(str.rstrip, tokens)) == "Win\\xf0\\x9f\\x98\\x80\\nnow"
    for end, number in enumerate(numbers, 1):
        padded = torch.tensor([ids[:end] + [tokenizer.eot_token] * (options["max_length"] - end)])
        assert number.split()[0] == f"{model(padded)[0, -1].softmax(dim=0)[1]:.4f}"
    assert re.fullmatch(r"(ham|spam)\t[01]\.\d{4}\tWin 😀 now", out[len(ids)]) and "<|endoftext|>" in out[-2]


def test_standard_input_and_a_closed_pipe_that_ends_quietly(trained):
    classify = f"{sys.executable} {g.__file__} classify --weights-dir {trained[0] / 'w'} --input -"
    command = f"yes hello | head -20000 | {classify} | head -1; echo ${{PIPESTATUS[2]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert re.fullmatch(r"(ham|spam)\t[01]\.\d{4}\thello\n141\n", done.stdout) and done.stderr == ""


def test_only_a_classifier_or_state_dict_is_loaded_and_runs_no_code(trained, micro, tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch evil-was-here",)

    monkeypatch.chdir(tmp_path)
    path, bad = trained[0] / "w" / "spam_classifier.pth", Path("bad.pth")
    good = torch.load(path, weights_only=True)
    for content, said in ((Evil(), ""), ({**good, "about": Evil()}, ""), ({**good, "labels": ["a"]}, "state_dict"),
                          ([1], ""), (good["model"], "--model")):
        torch.save(content, bad)
        with pytest.raises(ValueError, match=f"bad.pth is not a classifier.*{said}"):
            g.load_classifier(bad)
    assert os.listdir() == ["bad.pth"]
    torch.save({**good["model"], "trf_blocks.0.att.mask": torch.ones(3, 3)}, bad)  # as the chapter's code saves it
    (model, *_, labels, options, _), (own, *_) = g.load_classifier(bad, micro), g.load_classifier(path)
    assert labels == ["ham", "spam"] and options == {"max_length": 120}
    ours, theirs = (g.predict(["a", "bb"], m, TOKENIZER, CPU, **options) for m in (model, own))
    assert torch.equal(ours, theirs)


def test_without_any_network_the_bundled_model_and_messages_are_used_and_named(run, tmp_path):
    places = ["train", "--weights-dir", tmp_path / "w", "--data-dir", tmp_path / "d", "--mirror", DEAD]
    status, out, err = run(*places, "--epochs", 1, "--token-pos", "last_real")  # without padding, thus fast
    assert status == 0 and out.count("bundled model, not GPT-2") == 2, err  # at the start and the final accuracies
    assert "Changed from the chapter: epochs 1, lr 0.001, schedule linear" in out  # the model's own settings
    assert "cannot download" in run(*places, "--model", "124M")[2]
    (tmp_path / "w" / "124M.download" / "vocab.bpe.part").write_bytes(b"half")
    assert "cannot download" in run(*places)[2]  # a broken download is not given up silently


def test_the_bundled_model_is_a_small_gpt_in_the_form_of_a_converted_checkpoint():
    assert g.TINY.stat().st_size <= 8_000_000
    model, texts = g.load_pretrained(g.TINY)
    tokenizer = g.build_tokenizer(texts["encoder.json"], texts["vocab.bpe"])
    assert model.cfg.context_length >= 256 and tokenizer.n_vocab == model.cfg.vocab_size
    ids = torch.tensor([tokenizer.encode_ordinary("It was a dark night, and the rain fell on the roof of the house.")])
    loss = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).item()
    assert loss < 0.7 * math.log(model.cfg.vocab_size)  # it has learned something: knowing nothing costs 8.3 nats
    card = (HERE / "weights" / "README.md").read_text()
    assert hashlib.sha256(g.TINY.read_bytes()).hexdigest() in card and f"{g.TINY.stat().st_size:,} bytes" in card


def test_two_steps_of_pretraining_run_through(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(HERE / "weights")
    import pretrain_tiny
    monkeypatch.setattr(pretrain_tiny, "CONFIG", g.GPTConfig(300, 32, 16, 2, 1, 0.1))
    monkeypatch.setattr(pretrain_tiny, "SEGMENT", 1)
    sample, path = small_data(tmp_path / "d.tsv"), tmp_path / "out.npz"
    options = ["--sample", sample, "--messages", sample, "--steps", 2, "--batch-size", 4, "--out", path]
    monkeypatch.setattr(sys, "argv", list(map(str, ["", HERE / "README.md", *options])))
    pretrain_tiny.main()
    model, texts = g.load_pretrained(path)
    assert model.cfg.n_layers == 1 and g.build_tokenizer(texts["encoder.json"], texts["vocab.bpe"]).n_vocab == 300


@pytest.mark.parametrize("args, said", [
    (["train", "--model", "gpt5"], "gpt5 is not a checkpoint"), (["train", "--device", "warp"], "no device 'warp'"),
    (["train", "--model", HERE / "data"], "not a checkpoint in OpenAI's layout"),
    (["train", "--model", "124M", "--mirror", DEAD], f"{DEAD}/gpt-2/models/124M/"),
    (["train", "--data", "nowhere.tsv"], "nowhere.tsv"), (["train", "--out", HERE], "cannot write"),
    (["train", "--data", MICRO / "vocab.bpe"], "no column 'label'"), (["train", "--lr", 1e30], "try a smaller --lr"),
    (["train", "--batch-size", 0], "at least 1, got 0"), (["train", "--batch-size", 33], "33 is more than 32 training"),
    (["train", "--no-padding", "--pooling", "mean"], "requires --batch-size 1"),
    (["train", "--context-length", 9999], "9999 tokens, the model has 1 to 1024"),
    (["train", "--context-length", 0], "0 tokens, the model has 1 to 1024; set --context-length"),
    (["classify"], "give either texts or --input"), (["train", "--lora-rnak", 4], "did you mean --lora-rank?"),
    (["classify", "--classifier", "none.pth", "hi"], "none.pth is not a classifier; make one with"),
    (["classify", "--classifier", BUNDLED[0], "hi"], "is not a classifier"),
])
def test_bad_input_is_one_error_and_status_2(run, tmp_path, args, said):
    status, _, err = run(*(train_arguments(tmp_path, *args[1:]) if args[0] == "train" else args))
    assert status == 2 and said in err


def test_readme_and_script_headers_name_the_same_packages():
    headers = [re.search(r"# dependencies = \[(.*?)\]", (HERE / name).read_text(), re.DOTALL)[1]
               for name in ("gpt_spam.py", "test_gpt_spam.py")]
    installs = re.findall(r"pip install (torch.*?)(?: &&|\n)", (HERE / "README.md").read_text())
    assert [set(re.findall(r'"([a-z-]+[=>0-9.]*)"', header)) for header in headers] == [
        set(install.replace('"', "").split()) for install in installs[:2]]


def test_the_file_alone_runs(tmp_path):
    shutil.copy(g.__file__, tmp_path)
    done = subprocess.run([sys.executable, "gpt_spam.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "classify" in done.stdout and os.listdir(tmp_path) == ["gpt_spam.py"]


@pytest.mark.skipif(not os.environ.get("GPT_SPAM_ONLINE"), reason="downloads OpenAI's 124M: set GPT_SPAM_ONLINE=1")
def test_numbers_printed_in_the_chapter(run, tmp_path):
    _, out, err = run("train", "--model", "124M", "--data", "sms", "--device", "cpu", "--metrics", tmp_path / "m.json")
    assert "forward.\\n\\nThe first step is to understand the importance of your work" in out, err
    assert "accuracy 46.25% / 45.00% / 48.75% (10 batches), loss 2.453 / 2.583 / 2.322" in out
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert (metrics["train_loss"][0], metrics["val_loss"][0]) == pytest.approx((2.153, 2.392), abs=6e-4)
    assert (metrics["train_loss"][12], metrics["val_loss"][12]) == pytest.approx((0.083, 0.074), abs=6e-4)
    assert [round(100 * accuracy, 2) for accuracy in metrics["final_accuracy"]] == [97.21, 97.32, 95.67]


if __name__ == "__main__":
    sys.exit(pytest.main(["-q", *sys.argv]))
