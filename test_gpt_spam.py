"""Offline tests: `python -m pytest -q test_gpt_spam.py`. PyTorch's own modules judge the layers, bytes that
TensorFlow wrote judge the reader, counts and plain arithmetic the rest. GPT_SPAM_ONLINE=1 adds the tests that download
OpenAI's weights and compare with the numbers printed in the book.
"""

import contextlib
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
import zipfile
from dataclasses import replace
from pathlib import Path

import hypothesis
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

import gpt_spam as g

HERE = Path(__file__).resolve().parent
MICRO = HERE / "weights" / "micro"  # 2 layers, 16 wide, 320 tokens; written by TensorFlow 2.21
SAMPLE = HERE / "data" / "sample_sms.tsv"
CFG = g.GPTConfig(vocab_size=50, context_length=12, emb_dim=8, n_heads=2, n_layers=3)
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    """The converted micro checkpoint."""
    return g.find_model(str(MICRO), tmp_path_factory.mktemp("weights"))


@pytest.fixture()
def tokenizer():
    return g.build_tokenizer((MICRO / "encoder.json").read_text(), (MICRO / "vocab.bpe").read_text())


def small_data(path, count=40):
    """The shortest bundled messages, as many of each class."""
    df = g.read_messages(SAMPLE)
    df = df[df["Text"].str.len().between(10, 40)].groupby("Label").head(count)
    df.to_csv(path, sep="\t", header=False, index=False)
    return path


def run(*args, **kwargs):
    """Run the command line in a process of its own."""
    return subprocess.run([sys.executable, str(HERE / "gpt_spam.py"), *map(str, args)], capture_output=True, text=True, **kwargs)


def test_an_error_inside_a_locked_write_gets_out_and_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="mine"), g.atomic_write(tmp_path / "f"):
        raise FileNotFoundError("mine")
    assert not list(tmp_path.iterdir())


# ---- 6.2 Dataset ----

def test_default_quoting_glues_messages_as_in_the_chapter(tmp_path):
    file = tmp_path / "sms.tsv"
    file.write_text('ham\tone\nham\t"two\nspam\tthree"\nspam\tNA\n')
    df = g.read_messages(file)
    assert df["Text"].tolist() == ["one", "two\nspam\tthree", "NA"]  # a message "NA" is text, not a missing value


def test_balance_and_split():
    df = pd.DataFrame({"Label": ["ham"] * 170 + ["spam"] * 60, "Text": [str(i) for i in range(230)]})
    balanced = g.create_balanced_dataset(df)
    assert balanced["Label"].value_counts().to_dict() == {"ham": 60, "spam": 60}
    chapter = pd.concat([df[df["Label"] == "ham"].sample(60, random_state=123), df[df["Label"] == "spam"]])
    pd.testing.assert_frame_equal(balanced, chapter)
    frames, labels = g.prepare_splits(df)
    assert [len(f) for f in frames] == [84, 12, 24] and labels == ["ham", "spam"]
    assert sorted(pd.concat(frames)["Text"]) == sorted(balanced["Text"])
    for frame in frames:  # labels stay with their texts
        assert frame["Label"].tolist() == [int(int(text) >= 170) for text in frame["Text"]]


def test_any_labels_small_classes_and_a_given_test_file():
    df = pd.DataFrame({"Label": ["b"] * 20 + ["a"] * 60 + ["c"] * 10, "Text": [str(i % 88) for i in range(90)]})
    frames, labels = g.prepare_splits(df)
    assert labels == ["a", "b", "c"] and [f["Label"].value_counts().sort_index().to_list() for f in frames] == [[42, 14, 7], [6, 2, 1], [12, 4, 2]]
    assert [len(f) for f in g.prepare_splits(df, g.FinetuneConfig(balance="undersample"))[0]] == [21, 3, 6]
    test = pd.DataFrame({"Label": ["c", "a"], "Text": ["x", "y"]})
    frames, _ = g.prepare_splits(df, test=test)
    assert frames[2]["Label"].tolist() == [2, 0] and len(frames[0]) + len(frames[1]) == 90
    together = pd.concat(g.prepare_splits(df, g.FinetuneConfig(dedupe=True))[0])
    assert together["Text"].is_unique and len(together) == 88
    with pytest.raises(ValueError, match="'d'"):
        g.prepare_splits(df, test=test.assign(Label="d"))


@pytest.mark.parametrize("name, content", [
    ("a.csv", "id,Text,Label\n1,\"hi, you\",x\n2,NA,y\n"), ("a.tsv", "Label\tText\nx\thi, you\ny\tNA\n"),
    ("a.jsonl", '{"text": "hi, you", "label": "x"}\n\n{"label": "y", "text": "NA"}\n'),
    ("bom.csv", "\ufeffText,Label\r\n\"hi, you\",x\r\nNA,y\r\n"),
])
def test_forms_of_labelled_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    df = g.read_messages(tmp_path / name)
    assert df.to_dict("list") == {"Label": ["x", "y"], "Text": ["hi, you", "NA"]}


def test_columns_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("review,sentiment\ngood,1\nbad,0\n")
    assert g.read_messages(tmp_path / "a.csv", "review", "sentiment")["Label"].tolist() == ["1", "0"]
    with pytest.raises(ValueError, match="review, sentiment"):
        g.read_messages(tmp_path / "a.csv", "text", "sentiment")


@pytest.mark.skipif(not (HERE / "data" / "SMSSpamCollection.tsv").exists(), reason="the SMS Spam Collection is not here")
def test_counts_of_the_sms_spam_collection():
    df = g.read_messages(HERE / "data" / "SMSSpamCollection.tsv")
    assert df["Label"].value_counts().to_dict() == {"ham": 4825, "spam": 747}
    assert [len(s) for s in g.prepare_splits(df)[0]] == [1045, 149, 300]
    for file in (SAMPLE, HERE / "weights" / "messages.tsv"):  # the bundled model has seen none of it
        assert not g.read_messages(file)["Text"].isin(df["Text"]).any()


@pytest.mark.parametrize("content, said", [
    ("label,text\nham,hi\n", "at least two labels"), ("oops\nham,hi\n", "'ham' or 'spam'"), ("eggs\thi\nspam\tyo\n", "'ham' or 'spam'"),
    ("", "0 messages by label"), ("ham\tok\nspam\t\xff", "line 2: byte 0xff"), ("spam\ta\nspam\tb\nham\tc\n", "'ham': 1"),
    ('{"text": "a"}\n', "label"), ('{"text": \n', "line 1: Expecting"),
])
def test_wrong_data_is_one_clear_error(tmp_path, content, said):
    file = tmp_path / "data.tsv"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=said):
        g.prepare_splits(g.read_messages(file))


def test_no_two_bundled_messages_are_alike_and_the_split_leaks_none():
    df = g.read_messages(SAMPLE)
    assert len(df) >= 1000 and df["Label"].value_counts().nunique() == 1
    words = [frozenset(re.findall(r"\w+", text.lower())) for text in df["Text"]]
    holders = {}
    for i, own in enumerate(words):  # only messages that share a word can be alike
        near = {j for word in own for j in holders.get(word, ())}
        for j in near:
            assert len(own & words[j]) <= 0.6 * len(own | words[j]), (df["Text"][i], df["Text"][j])
        for word in own:
            holders.setdefault(word, []).append(i)
    frames, _ = g.prepare_splits(df)
    assert pd.concat(frames)["Text"].is_unique
    for_pretraining = g.read_messages(HERE / "weights" / "messages.tsv")["Text"]
    assert for_pretraining.is_unique and not for_pretraining.isin(df["Text"]).any()


# ---- 6.3 Tokenizer and loaders ----

def test_tokenizer_merges_as_byte_pair_encoding_does(tokenizer):
    """A few lines of plain BPE: always merge the neighbours that stand first in vocab.bpe."""
    encoder = json.loads((MICRO / "encoder.json").read_text())
    ranks = {tuple(line.split(" ")): i for i, line in enumerate((MICRO / "vocab.bpe").read_text().split("\n")[1:-1])}
    space = next(a for a, b in ranks if (a + b)[1:].isalpha() and not (a + b)[0].isascii())[0]  # how a space is written

    def encode(word):
        parts = list(word.replace(" ", space))
        while True:
            pairs = [(ranks[p], i) for i, p in enumerate(zip(parts, parts[1:])) if p in ranks]
            if not pairs:
                return [encoder[p] for p in parts]
            i = min(pairs)[1]
            parts[i:i + 2] = ["".join(parts[i:i + 2])]

    for word in ("the", " thing", "call", " you", " winner", "zzz"):
        assert tokenizer.encode_ordinary(word) == encode(word)
    for text in ("Free entry! £100 😀\n\x00 <|endoftext|>", "ünïcödé", " "):
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert tokenizer.eot_token == 319 not in tokenizer.encode_ordinary("<|endoftext|>")


def test_tokenizer_files_that_do_not_belong_together():
    encoder, merges = (MICRO / "encoder.json").read_text(), (MICRO / "vocab.bpe").read_text().split("\n")
    merges[5], merges[6] = merges[6], merges[5]
    with pytest.raises(ValueError, match="do not belong together"):
        g.build_tokenizer(encoder, "\n".join(merges))
    with pytest.raises(ValueError, match="encoder.json"):
        g.build_tokenizer("<html>", "")


def test_dataset_pads_and_cuts(tokenizer):
    frame = pd.DataFrame({"Text": ["a", "abcabcabc", ""], "Label": [0, 1, 0]})
    long = len(tokenizer.encode_ordinary("abcabcabc"))
    dataset = g.SpamDataset(frame, tokenizer, pad_token_id=319)
    assert dataset.max_length == long and {len(ids) for ids in dataset.inputs} == {long}
    assert dataset.inputs[0].tolist() == tokenizer.encode_ordinary("a") + [319] * (long - 1)
    assert dataset.inputs[2].tolist() == [319] * long
    cut = g.SpamDataset(frame, tokenizer, max_length=3, pad_token_id=319)
    assert cut.inputs[1].tolist() == tokenizer.encode_ordinary("abcabcabc")[:3]
    assert cut[1][1].tolist() == [2] and cut[1][2] == 1
    at = {how: [a.tolist() for a in g.SpamDataset(frame[:2], tokenizer, 4, 319, **options).at] for how, options in {
        "first": {"token_pos": "first"}, "real": {"token_pos": "last_real"}, "mean": {"pooling": "mean"}, "own": {"padding": "none"}}.items()}
    real = [[len(tokenizer.encode_ordinary(text)[:4]) - 1] for text in frame["Text"][:2]]
    assert at == {"first": [[0], [0]], "real": real, "mean": [[0, 1, 2, 3]] * 2, "own": real}
    with pytest.raises(ValueError, match="message 3 has no tokens"):
        g.SpamDataset(frame, tokenizer, token_pos="last_real")


def test_loaders_share_one_length_and_only_training_is_shuffled(tokenizer):
    frames = [pd.DataFrame({"Text": ["x" * (i % 5 + n) for i in range(10)], "Label": [i % 2 for i in range(10)]}) for n in (1, 3, 9)]
    loaders = g.create_loaders(g.create_datasets(frames, tokenizer, g.FinetuneConfig(), 64), 4)
    assert [len(loader) for loader in loaders] == [2, 3, 3]  # the training loader drops its last 2
    assert {ids.shape[1] for loader in loaders for ids, *_ in loader} == {loaders[0].dataset.max_length}
    assert torch.cat([label for *_, label in loaders[1]]).tolist() == frames[1]["Label"].tolist()
    with pytest.raises(ValueError, match="has 4 tokens, the model holds 3"):
        g.create_datasets([frames[0].assign(Text="zqzq")] * 3, tokenizer, g.FinetuneConfig(), 3)


# ---- 6.4 Model ----

def test_attention_equals_pytorch():
    torch.manual_seed(0)
    ours, theirs = g.MultiHeadAttention(8, 8, 12, 0.0, 2, qkv_bias=True), nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.W_query.weight, ours.W_key.weight, ours.W_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.W_query.bias, ours.W_key.bias, ours.W_value.bias]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x = torch.randn(3, 12, 8)
    later = torch.ones(12, 12, dtype=torch.bool).triu(1)
    torch.testing.assert_close(ours(x), theirs(x, x, x, attn_mask=later)[0])
    at = torch.tensor([[11], [3], [0]])  # the same for one position a row, gradients too
    some, all_rows = ours(x, at), ours(x)[torch.arange(3)[:, None], at]
    torch.testing.assert_close(some, all_rows)
    torch.testing.assert_close(*[torch.autograd.grad(out.square().sum(), list(ours.parameters())) for out in (some, all_rows)])


def test_block_equals_pytorch():
    torch.manual_seed(0)
    ours = g.TransformerBlock(CFG).eval()
    theirs = nn.TransformerEncoderLayer(8, 2, 32, 0.0, lambda x: F.gelu(x, approximate="tanh"), batch_first=True, norm_first=True).eval()
    names = {"norm1.scale": "norm1.weight", "norm1.shift": "norm1.bias", "norm2.scale": "norm2.weight", "norm2.shift": "norm2.bias"}
    state = {names.get(k, k.replace("ff.layers.0", "linear1").replace("ff.layers.2", "linear2").replace("att.out_proj", "self_attn.out_proj")): v
             for k, v in ours.state_dict().items() if "W_" not in k}
    for kind in ("weight", "bias"):
        state[f"self_attn.in_proj_{kind}"] = torch.cat([ours.state_dict()[f"att.W_{n}.{kind}"] for n in ("query", "key", "value")])
    theirs.load_state_dict(state)
    x = torch.randn(3, 12, 8)
    later = torch.ones(12, 12, dtype=torch.bool).triu(1)
    torch.testing.assert_close(ours(x), theirs(x, src_mask=later))


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_trunk_then_top_at_some_positions_equals_the_whole_model(cut):
    torch.manual_seed(0)
    model, ids = g.GPTModel(CFG).eval(), torch.randint(50, (4, 12))
    at = torch.tensor([[0, 11], [5, 5], [11, 0], [3, 7]])
    whole = model(ids)  # (4, 12, 50)
    torch.testing.assert_close(model.top(model.trunk(ids, cut), cut, at), whole[torch.arange(4)[:, None], at])
    torch.testing.assert_close(model.top(model.trunk(ids, cut), cut), whole)


def test_a_state_dict_of_the_chapter_loads_and_its_mask_is_ignored():
    torch.manual_seed(0)
    model = g.GPTModel(CFG)
    state = dict(model.state_dict())
    assert not [name for name in state if "mask" in name]
    chapter = {**state, **{f"trf_blocks.{i}.att.mask": torch.ones(12, 12).triu(1) for i in range(3)}}
    other = g.GPTModel(CFG)
    other.load_state_dict(chapter)
    torch.testing.assert_close(other.state_dict(), state)


def test_generate_appends_the_most_likely_token():
    torch.manual_seed(0)
    model, idx = g.GPTModel(CFG).eval(), torch.randint(50, (1, 10))
    out = g.generate_text_simple(model, idx, 4, CFG.context_length)
    for end in range(10, 14):  # also where the window slides: the context holds 12
        assert out[0, end] == model(out[:, max(0, end - 12):end])[0, -1].argmax()


# ---- 6.4 Checkpoint ----

def micro_values(name, shape):
    """What the checkpoint was written from: a variable's values depend on its name and shape only."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"0:{name}".encode()).digest(), "little"))
    array = rng.standard_normal(shape, np.float32)
    array *= 0.01 if name == "model/wpe" else 0.02
    return array + 1 if name.endswith("/g") else array * 5


def test_reader_gives_what_tensorflow_wrote(micro):
    model, _, texts = g.load_pretrained(micro)
    state, block = model.state_dict(), "model/h1/"
    expected = {
        "tok_emb.weight": micro_values("model/wte", [320, 16]), "pos_emb.weight": micro_values("model/wpe", [1024, 16]),
        "final_norm.scale": micro_values("model/ln_f/g", [16]), "trf_blocks.1.norm2.shift": micro_values(block + "ln_2/b", [16]),
        "trf_blocks.1.att.W_key.weight": micro_values(block + "attn/c_attn/w", [1, 16, 48])[0, :, 16:32].T,
        "trf_blocks.1.att.W_value.bias": micro_values(block + "attn/c_attn/b", [48])[32:],
        "trf_blocks.1.att.out_proj.weight": micro_values(block + "attn/c_proj/w", [1, 16, 16])[0].T,
        "trf_blocks.1.ff.layers.0.weight": micro_values(block + "mlp/c_fc/w", [1, 16, 64])[0].T,
        "trf_blocks.1.ff.layers.2.weight": micro_values(block + "mlp/c_proj/w", [1, 64, 16])[0].T,
        "out_head.weight": micro_values("model/wte", [320, 16]),
    }
    for name, array in expected.items():
        assert np.array_equal(state[name].numpy(), array), name
    assert len(state) == 2 + 2 * 16 + 2 + 1 and model.cfg.n_heads == 2
    assert texts["vocab.bpe"] == (MICRO / "vocab.bpe").read_text()


@pytest.mark.parametrize("size", [4, 9, 31, 32, 33, 1000, (1 << 20) + 3])
def test_crc32c_equals_the_shift_register(size):
    data = np.random.default_rng(size).bytes(size)
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    assert g.crc32c(data) == crc ^ 0xFFFFFFFF
    assert g.crc32c(b"123456789") == 0xE3069283  # the check value of the CRC catalogue


def changed_micro(tmp_path, file, change):
    """A copy of the micro checkpoint with one file changed."""
    folder = tmp_path / "changed"
    shutil.copytree(MICRO, folder)
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    return folder


@pytest.mark.parametrize("file, change, said", [
    (g.DATA_FILE, lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:], "damaged"),
    (g.DATA_FILE, lambda b: b[:-4], "ends at byte|more than"),
    (g.DATA_FILE, lambda b: b + bytes(4), "more than a GPT-2"),
    (g.INDEX_FILE, lambda b: b[:100] + bytes([b[100] ^ 128]) + b[101:], "damaged|not a checkpoint index"),
    (g.INDEX_FILE, lambda b: b[:-1], "magic"),
    (g.INDEX_FILE, lambda b: b"", "magic"),
    ("hparams.json", lambda b: b.replace(b'"n_layer": 2', b'"n_layer": 1'), "more than a GPT-2"),
    ("hparams.json", lambda b: b.replace(b'"n_layer": 2', b'"n_layer": 3'), "no tensor model/h2"),
    ("hparams.json", lambda b: b.replace(b'"n_ctx": 1024', b'"n_ctx": 1023'), "not a float32 of shape"),
    ("hparams.json", lambda b: b"<html>", "hparams.json is not.*Expecting value"),
    ("vocab.bpe", lambda b: b[:50] + b"\xff" + b[51:], "vocab.bpe is not UTF-8"),
    ("encoder.json", lambda b: b[:100], "encoder.json"),
])
def test_a_damaged_checkpoint_is_noticed(tmp_path, file, change, said):
    with pytest.raises(ValueError, match=said):
        g.convert_checkpoint(changed_micro(tmp_path, file, change), tmp_path / "out.npz", {})
    assert not (tmp_path / "out.npz").exists()


def test_any_flipped_byte_of_a_checkpoint_is_noticed(tmp_path):
    index, folder = (MICRO / g.INDEX_FILE).read_bytes(), tmp_path / "flipped"
    assert len(g.read_index(index)) == 28
    for i in range(len(index)):  # no byte of the index carries nothing
        for flip in (1, 128, 255):
            with pytest.raises(ValueError):
                g.read_index(index[:i] + bytes([index[i] ^ flip]) + index[i + 1:])
    shutil.copytree(MICRO, folder)
    data = bytearray((MICRO / g.DATA_FILE).read_bytes())
    for i in np.random.default_rng(0).integers(len(data), size=25):
        data[i] ^= 1
        (folder / g.DATA_FILE).write_bytes(data)
        with pytest.raises(ValueError, match="damaged"):
            g.convert_checkpoint(folder, tmp_path / "out.npz", {})
        data[i] ^= 1


@hypothesis.settings(max_examples=int(os.environ.get("GPT_SPAM_FUZZ", 300)), deadline=None)
@hypothesis.given(st.data())
def test_a_mutated_index_with_right_checksums_is_read_or_refused(data):
    """Bytes are changed in the block of entries and its checksum is made right again, so that the parsers are reached."""
    index = (MICRO / g.INDEX_FILE).read_bytes()
    footer, at, handle = index[-48:-8], 0, []
    for _ in range(4):
        number, at = g.read_varint(footer, at)
        handle.append(number)
    (_, first), = g.read_block(index, handle[2], handle[3])
    offset, at = g.read_varint(first, 0)
    size, _ = g.read_varint(first, at)
    block = bytearray(index[offset:offset + size])
    for i in data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=6)):
        block[i] = data.draw(st.integers(0, 255))
    crc = g.crc32c(bytes(block) + b"\0")
    crc = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    changed = index[:offset] + bytes(block) + b"\0" + crc.to_bytes(4, "little") + index[offset + size + 5:]
    with contextlib.suppress(ValueError), g.reading("index", "a checkpoint"), open(MICRO / g.DATA_FILE, "rb") as file:
        entries = g.read_index(changed)
        for name, shape, *_ in g.checkpoint_tensors(g.config_from_hparams(json.loads((MICRO / "hparams.json").read_text()))):
            if name in entries:
                g.read_tensor(file, name, entries[name], shape)


def test_an_npz_that_does_not_fit_its_hparams(tmp_path, micro):
    with np.load(micro) as npz:
        arrays = dict(npz)
    for name, wrong in (("tok_emb.weight", np.zeros((3, 3), np.float32)), ("final_norm.scale", np.full(16, np.nan, np.float32)),
                        ("pos_emb.weight", np.array([{}], dtype=object))):
        np.savez(tmp_path / "bad.npz", **{**arrays, name: wrong})
        with pytest.raises(ValueError):
            g.load_pretrained(tmp_path / "bad.npz")
    hparams = arrays["hparams.json"].tobytes().replace(b'"n_layer": 2', b'"n_layer": 99')
    np.savez(tmp_path / "bad.npz", **{**arrays, "hparams.json": np.frombuffer(hparams, np.uint8)})
    for random_seed in (None, 1):  # random weights, too, are made only as large as the tensors say
        with pytest.raises(ValueError, match="trf_blocks.2"):
            g.load_pretrained(tmp_path / "bad.npz", random_seed=random_seed)


# ---- 6.5 to 6.8 ----

def test_head_and_what_trains():
    torch.manual_seed(0)
    model = g.GPTModel(CFG)
    g.add_classification_head(model, 2)
    block = 4 * (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8) + 4 * 8
    assert g.count_parameters(model) == (block + 2 * 8 + (2 * 8 + 2), 50 * 8 + 12 * 8 + 3 * block + 2 * 8 + 2 * 8 + 2)
    torch.manual_seed(123)
    torch.testing.assert_close(model.out_head.weight, nn.Linear(8, 2).weight)


def test_counts_of_the_124m():
    with torch.device("meta"):
        model = g.GPTModel(g.GPTConfig())
        g.add_classification_head(model, 2)
    assert g.count_parameters(model) == (7_090_946, 124_441_346)


def test_loss_and_accuracy_against_plain_arithmetic():
    torch.manual_seed(0)
    model = g.GPTModel(CFG).train()
    g.add_classification_head(model, 2)
    batches = [(torch.randint(50, (n, 12)), torch.full((n, 1), 11), torch.randint(2, (n,))) for n in (4, 4, 1)]
    losses, right = [], []
    for ids, _, labels in batches:
        p = model(ids)[:, -1].softmax(-1)
        losses.append(-p[torch.arange(len(ids)), labels].log().mean().item())
        right += (p[:, 1] > p[:, 0]).long().eq(labels).tolist()
    assert g.calc_loss_loader(batches, model, CPU) == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert g.calc_loss_loader(batches, model, CPU, 2) == pytest.approx(sum(losses[:2]) / 2, rel=1e-5)
    assert g.calc_accuracy_loader(batches, model, CPU) == sum(right) / 9
    assert model.training  # the mode is left as it was


def test_training_equals_a_plain_loop(tokenizer, tmp_path):
    frames, _ = g.prepare_splits(g.read_messages(small_data(tmp_path / "d.tsv")))

    def fresh():
        torch.manual_seed(1)
        model = g.GPTModel(g.GPTConfig(vocab_size=320, context_length=64, emb_dim=16, n_heads=2, n_layers=2))
        g.add_classification_head(model, 2)
        return model, g.create_loaders(g.create_datasets(frames, tokenizer, g.FinetuneConfig(), 64), 8)

    model, loaders = fresh()
    result = g.finetune(model, loaders, g.FinetuneConfig(epochs=2, eval_freq=3, lr=1e-3), CPU)
    other, loaders = fresh()
    torch.manual_seed(123)
    optimizer, step = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.1), 0
    for _ in range(2):
        for ids, _, labels in loaders[0]:
            optimizer.zero_grad()
            F.cross_entropy(other(ids)[:, -1], labels).backward()
            optimizer.step()
            if step % 3 == 0:  # the chapter's evaluations draw from the same random numbers
                list(zip(range(1), loaders[0])), list(zip(range(1), loaders[1]))
            step += 1
        list(zip(range(1), loaders[0])), list(zip(range(1), loaders[1]))
    for name, value in other.state_dict().items():
        if "W_key.bias" not in name:  # softmax ignores it: its gradient is rounding, which AdamW makes large
            torch.testing.assert_close(model.state_dict()[name], value, atol=1e-4, rtol=1e-3)
    assert [row["step"] for row in result["history"]] == list(range(0, step, 3))
    assert [row["examples_seen"] for row in result["history"]] == [8 * (s + 1) for s in range(0, step, 3)]


def test_learning_rate_rises_and_falls():
    factors = [g.learning_rate_factor(step, 10, 0.2, True) for step in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert [g.learning_rate_factor(step, 10, 0.0, False) for step in range(10)] == [1.0] * 10


def test_a_loss_that_is_no_number_stops_the_training():
    model = g.GPTModel(CFG)
    g.add_classification_head(model, 2)
    model.out_head.bias.data[0] = float("nan")
    loader = [(torch.randint(50, (4, 12)), torch.full((4, 1), 11), torch.randint(2, (4,)))]
    with pytest.raises(ValueError, match="step 0.*--lr"):
        g.finetune(model, [loader] * 3, g.FinetuneConfig(epochs=1), CPU)


# ---- The frozen trunk, and the settings of the book's experiments ----

SMALL = g.GPTConfig(vocab_size=320, context_length=64, emb_dim=16, n_heads=2, n_layers=3)


def small_run(tokenizer, folder, **changes):
    """Finetune a small random model with these settings; return the result, the model and the datasets."""
    settings = g.FinetuneConfig(**{"epochs": 2, "eval_freq": 3, "lr": 1e-3, **changes})
    frames, labels = g.prepare_splits(g.read_messages(small_data(folder / "d.tsv")), settings)
    torch.manual_seed(1)
    model = g.GPTModel(replace(SMALL, causal=settings.causal_mask)).eval()
    datasets = g.create_datasets(frames, tokenizer, settings, SMALL.context_length)
    g.add_classification_head(model, len(labels), settings)
    result = g.finetune(*g.connect(model, datasets, settings, CPU), settings, CPU)
    return result, model, datasets


def losses(result):
    return [row[name] for row in result["history"] for name in ("train_loss", "val_loss")]


@pytest.mark.parametrize("changes", [
    {}, {"trainable_layers": "last_layer"}, {"trainable_layers": "last_two_blocks"}, {"token_pos": "first"}, {"token_pos": "last_real"},
    {"pooling": "mean"}, {"causal_mask": False}, {"padding": False, "batch_size": 4}, {"context_length": "model"},
    {"trainable_layers": "lora"},
], ids=str)
def test_the_cached_trunk_changes_no_loss_and_no_accuracy(tokenizer, tmp_path, changes):
    cached, uncached = (small_run(tokenizer, tmp_path, cache=cache, **changes)[0] for cache in (True, False))
    assert losses(cached) == pytest.approx(losses(uncached), abs=2e-5)
    assert cached["final"] == uncached["final"] and cached["epochs"] == uncached["epochs"]


def test_what_stands_behind_the_last_real_token_does_not_matter(tokenizer, tmp_path, monkeypatch):
    own = small_run(tokenizer, tmp_path, token_pos="last_real")
    monkeypatch.setattr(g, "padding_mode", lambda settings: "all")
    padded = small_run(tokenizer, tmp_path, token_pos="last_real")
    assert len(set(map(len, own[2][0].inputs))) > 1 == len(set(map(len, padded[2][0].inputs)))
    assert losses(own[0]) == pytest.approx(losses(padded[0]), abs=1e-5)


def test_bfloat16_trunk_stays_near_float32(tokenizer, tmp_path):
    half, full = (small_run(tokenizer, tmp_path, dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert losses(half[0]) == pytest.approx(losses(full[0]), abs=0.02) and losses(half[0]) != losses(full[0])
    assert all(p.dtype == torch.float32 for p in half[1].parameters())


def test_a_cache_that_does_not_fit_goes_to_disk(tokenizer, tmp_path, monkeypatch, capsys):
    in_memory = small_run(tokenizer, tmp_path)[0]
    monkeypatch.setattr(g, "free_memory", lambda: 1000)
    on_disk = small_run(tokenizer, tmp_path)[0]
    assert "on disk" in capsys.readouterr().out and losses(on_disk) == losses(in_memory)


@pytest.mark.parametrize("changes, read", [
    ({"token_pos": "first"}, lambda out, real: out[:, 0]), ({}, lambda out, real: out[:, -1]),
    ({"token_pos": "last_real"}, lambda out, real: out[torch.arange(len(out)), real - 1]),
    ({"pooling": "mean"}, lambda out, real: out.mean(1)),
], ids=str)
def test_positions_against_plain_indexing(tokenizer, tmp_path, changes, read):
    _, model, datasets = small_run(tokenizer, tmp_path, epochs=0, **changes)
    texts = g.prepare_splits(g.read_messages(tmp_path / "d.tsv"))[0][1]["Text"]
    encoded = [tokenizer.encode_ordinary(text)[:datasets[0].max_length] for text in texts]
    ids = torch.tensor([i + [319] * (datasets[0].max_length - len(i)) for i in encoded])
    plain = F.cross_entropy(read(model(ids), torch.tensor([len(i) for i in encoded])), datasets[1].labels)
    loader = g.create_loaders(datasets, len(ids))[1]
    assert g.calc_loss_loader(loader, model, CPU) == pytest.approx(plain.item(), abs=1e-5)


def test_without_the_causal_mask_every_token_sees_every_other():
    torch.manual_seed(0)
    model = g.GPTModel(replace(CFG, causal=False)).eval()
    ids = torch.randint(49, (1, 12))
    other = ids.clone()
    other[0, -1] = 49
    assert not torch.allclose(model(ids)[:, 0], model(other)[:, 0])
    causal = g.GPTModel(CFG).eval()
    torch.testing.assert_close(causal(ids)[:, :-1], causal(other)[:, :-1])
    at = torch.tensor([[3]])
    torch.testing.assert_close(model(ids, at), model(ids)[:, 3:4])


def test_lora_starts_unchanged_trains_every_linear_and_merges(tokenizer, tmp_path):
    torch.manual_seed(0)
    model, ids = g.GPTModel(CFG).eval(), torch.randint(50, (2, 12))
    g.add_classification_head(model, 2)
    before = model(ids)
    g.add_classification_head(model, 2, g.FinetuneConfig(trainable_layers="lora", lora_rank=3, lora_alpha=5))
    torch.testing.assert_close(model(ids), before)
    torch.manual_seed(123)
    nn.Linear(8, 2)  # the head comes first, then every A in the order of the children
    expected = nn.init.kaiming_uniform_(torch.empty(8, 3), a=math.sqrt(5))
    layer = model.trf_blocks[0].att.W_query
    torch.testing.assert_close(layer.lora.A.data, expected)
    assert {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad} == {"A", "B", "weight", "bias"} - (
        {"weight", "bias"} if not model.out_head.linear.weight.requires_grad else set())
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
        x = torch.randn(4, 8)
        torch.testing.assert_close(layer(x), F.linear(x, layer.linear.weight + 5 * (layer.lora.A @ layer.lora.B).T, layer.linear.bias))
        trained = model(ids)
        g.merge_lora(model)
        torch.testing.assert_close(model(ids), trained)
    g.GPTModel(CFG).load_state_dict({k: v for k, v in model.state_dict().items() if "out_head" not in k}, strict=False)
    assert not any("lora" in name for name in model.state_dict())


def test_accumulated_gradients_equal_a_larger_batch(tokenizer, tmp_path):
    """Eight steps of one message are one step of eight, as the loss is a mean."""
    one = small_run(tokenizer, tmp_path, batch_size=1, accumulation_steps=8, epochs=1, eval_freq=1000)[1]
    eight = small_run(tokenizer, tmp_path, batch_size=8, epochs=1, eval_freq=1000)[1]
    for (name, a), b in zip(one.state_dict().items(), eight.state_dict().values()):
        if "W_key.bias" not in name:
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_ignore_index_of_another_label_changes_nothing(tokenizer, tmp_path):
    assert losses(small_run(tokenizer, tmp_path, ignore_index=319)[0]) == losses(small_run(tokenizer, tmp_path)[0])


def test_random_weights_are_pytorchs_in_the_order_of_the_modules(micro):
    model, *_ = g.load_pretrained(micro, random_seed=123)
    torch.manual_seed(123)
    torch.testing.assert_close(model.tok_emb.weight, nn.Embedding(320, 16).weight)
    assert model.pos_emb.weight.shape == (1024, 16)


def test_experiments_resume_and_go_on_after_a_failure(tmp_path):
    data = small_data(tmp_path / "d.tsv")
    args = ["experiments", "--model", MICRO, "--data", data, "--weights-dir", tmp_path / "w", "--data-dir", tmp_path / "d", "--epochs", 1,
            "--out", tmp_path / "table.csv", "--device", "cpu", "--weights-url", "http://127.0.0.1:9"]
    first = run(*args, "--rows", "1,6,16,18")  # row 6 needs 355M, which cannot be had
    assert first.returncode == 2 and "row 6 failed" in first.stderr and "1 of 4 rows failed" in first.stderr
    table = pd.read_csv(tmp_path / "table.csv")
    assert table["row"].tolist() == [1, 16, 18] and {"train_accuracy", "val_accuracy", "test_accuracy", "train_loss", "val_loss", "seconds"} <= set(table)
    assert table["train_loss"][0] == table["train_loss"][2]
    again = run(*args, "--rows", "1,16,19")
    assert again.returncode == 0 and "row 19" in again.stderr and "row 16" not in again.stderr and again.stdout.count("| 98.33% |") == 1
    assert run(*args, "--rows", "1,20").returncode == 2


# ---- Metrics, choosing, resuming, several processes ----

@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_equal_scikit_learn(classes):
    sk = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(classes)
    labels = np.concatenate([rng.integers(classes, size=300), np.arange(classes)])
    scores = rng.random((len(labels), classes)).round(1) + 0.01  # many ties
    scores /= scores.sum(1, keepdims=True)
    names = [f"c{i}" for i in range(classes)]
    ours, predicted = g.calc_metrics(labels, torch.tensor(scores), names), scores.argmax(1)
    theirs = sk.classification_report(labels, predicted, target_names=names, output_dict=True, zero_division=0)
    for name in names:
        assert ours["classes"][name] == pytest.approx({k.replace("f1-score", "f1"): v for k, v in theirs[name].items()})
    for mean in ("macro", "weighted"):
        assert ours[mean] == pytest.approx({k.replace("f1-score", "f1"): v for k, v in theirs[f"{mean} avg"].items() if k != "support"})
    assert ours["accuracy"] == pytest.approx(theirs["accuracy"]) and ours["confusion"] == sk.confusion_matrix(labels, predicted).tolist()
    if classes == 2:
        assert ours["roc_auc"] == pytest.approx(sk.roc_auc_score(labels, scores[:, 1]))
        assert ours["average_precision"] == pytest.approx(sk.average_precision_score(labels, scores[:, 1]))


def test_early_stop_keeps_the_best_epoch(tokenizer, tmp_path, capsys):
    result, model, datasets = small_run(tokenizer, tmp_path, early_stop=1, epochs=12, lr=0.05)
    assert len(result["epochs"]) < 12
    kept = int(re.search(r"keeping epoch (\d+)", capsys.readouterr().out)[1])
    _, same, _ = small_run(tokenizer, tmp_path, epochs=kept, lr=0.05)
    torch.testing.assert_close(model.state_dict(), same.state_dict())


def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(tmp_path):
    data, folder = small_data(tmp_path / "d.tsv"), tmp_path / "w"
    args = ["train", "--model", MICRO, "--data", data, "--weights-dir", folder, "--data-dir", tmp_path / "d", "--device", "cpu",
            "--lr", "1e-3", "--warmup", "0.2", "--decay", "--epochs", 4, "--resume"]
    whole = run(*args, "--out", tmp_path / "whole.pth")
    assert whole.returncode == 0 and not (tmp_path / "whole.pth.resume").exists()
    code = f"""
import sys; sys.path.insert(0, {str(HERE)!r}); import gpt_spam as g
train = g.train_classifier_simple
def stopped(*args):
    *rest, after_epoch = args
    def after(log):
        after_epoch(log)
        if len(log["epochs"]) == 2:
            import os; os._exit(9)
    return train(*rest, after)
g.train_classifier_simple = stopped
g.main({list(map(str, args)) + ["--out", str(tmp_path / "resumed.pth")]!r})
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 9
    resumed = run(*args, "--out", tmp_path / "resumed.pth")
    assert "resuming after epoch 2" in resumed.stdout, resumed.stderr
    a, b = (torch.load(tmp_path / f"{name}.pth", weights_only=True)["model"] for name in ("whole", "resumed"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_two_processes_train_as_one(tmp_path):
    data = small_data(tmp_path / "d.tsv")
    args = ["train", "--model", MICRO, "--data", data, "--weights-dir", tmp_path / "w", "--data-dir", tmp_path / "d", "--device", "cpu",
            "--epochs", 2, "--eval-freq", 2, "--batch-size", 7, "--lr", "1e-3"]
    assert run(*args, "--metrics", tmp_path / "one.json").returncode == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(HERE / "gpt_spam.py")]
    done = subprocess.run([*torchrun, *map(str, args), "--metrics", str(tmp_path / "two.json")], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("Training completed") == 1, done.stderr
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    assert losses(two) == pytest.approx(losses(one), abs=1e-5) and one["final"] == two["final"]
    (tmp_path / "t.txt").write_text("hello\nwin a prize\nok\n")
    use = ["classify", "--weights-dir", str(tmp_path / "w"), "--input", str(tmp_path / "t.txt"), "--device", "cpu"]
    both = subprocess.run([*torchrun, *use], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert both.stdout == run(*use).stdout and len(both.stdout.splitlines()) == 3
    bad = subprocess.run([*torchrun, *use[:-4], "--input", str(tmp_path / "none.txt")], capture_output=True, text=True)
    assert bad.returncode != 0


# ---- Use: streams and files from others ----

def test_streams(trained, tmp_path):
    use = ["classify", "--weights-dir", trained[0] / "w", "--device", "cpu"]
    texts = ["hello", "", "emoji 😀 ünï", "nul \x00 byte", "<|endoftext|>", "x" * 100_000, "last"]
    lines = "\n".join(texts).encode() + b"\n\xff broken\r\nwin"
    done = subprocess.run([sys.executable, str(HERE / "gpt_spam.py"), *map(str, use), "--input", "-", "--format", "jsonl"], input=lines, capture_output=True)
    rows = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert [row["text"] for row in rows] == [*texts, "win"] and b"row 8 is passed over: it is not UTF-8" in done.stderr
    (tmp_path / "a.csv").write_text('Id,Text\n1,"two\nlines"\n2,"b, c"\n')
    done = run(*use, "--input", tmp_path / "a.csv", "--output", tmp_path / "out.csv", "--format", "csv")
    assert done.returncode == 0 and pd.read_csv(tmp_path / "out.csv")["text"].tolist() == ["two\nlines", "b, c"]
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\nnonsense\n{"text": 3}\n{"text": "\\ud800 surrogate"}\n')
    done = run(*use, "--input", tmp_path / "a.jsonl")
    assert len(done.stdout.splitlines()) == 2 and [f"row {n} " in done.stderr for n in range(1, 6)] == [False, True, True, True, False]
    assert run(*use, "--input", tmp_path / "a.jsonl", "--strict", "--output", tmp_path / "no").returncode == 2 and not (tmp_path / "no").exists()
    always, never = (run(*use, "--threshold", t, "hello").stdout.split()[0] for t in (0, 1))
    assert (always, never) == ("spam", "ham")


def test_a_closed_pipe_is_no_error(trained):
    code = f"yes hello | head -20000 | {sys.executable} {HERE / 'gpt_spam.py'} classify --weights-dir {trained[0] / 'w'} --input - | head -1"
    done = subprocess.run(["bash", "-c", f"{code}; echo ${{PIPESTATUS[2]}}"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0" and done.stderr == ""


def test_predictions_do_not_depend_on_their_company(trained):
    classifier = g.load_classifier(trained[0] / "w" / "spam_classifier.pth")
    for settings in (classifier.settings, replace(classifier.settings, token_pos="last_real"), replace(classifier.settings, pooling="mean", padding=False)):
        classifier.settings = settings
        texts = g.read_messages(SAMPLE)["Text"].tolist()[:50]
        alone = torch.cat([g.predict(classifier, [text], CPU) for text in texts])
        torch.testing.assert_close(g.predict(classifier, texts, CPU), alone, atol=1e-5, rtol=1e-4)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


def test_a_hostile_or_wrong_classifier_runs_no_code(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = torch.load(trained[0] / "w" / "spam_classifier.pth", weights_only=True)
    nan = {**good["model"], "final_norm.scale": torch.full((16,), math.nan)}
    for content in (Evil(), {**good, "about": Evil()}, {**good, "config": {**good["config"], "n_layers": 10 ** 9}}, {**good, "model": nan},
                    {**good, "config": {**good["config"], "emb_dim": 10 ** 9}}, {**good, "max_length": 10 ** 6}, {**good, "labels": ["a"]}, [1]):
        torch.save(content, "bad.pth")
        with pytest.raises(ValueError, match="bad.pth is not a classifier"):
            g.load_classifier(Path("bad.pth"))
    assert os.listdir() == ["bad.pth"]


def test_a_bare_state_dict_of_the_chapter(trained, tmp_path, capsys):
    classifier = g.load_classifier(trained[0] / "w" / "spam_classifier.pth")
    model = classifier.model
    model.cfg = replace(model.cfg, n_heads=1)  # guessed: 64 dimensions a head, at least one head
    for block in model.trf_blocks:
        block.att.num_heads = 1
    torch.save({**model.state_dict(), "trf_blocks.0.att.mask": torch.ones(3, 3)}, tmp_path / "review_classifier.pth")
    again = g.load_classifier(tmp_path / "review_classifier.pth", trained[0] / "w")
    assert again.labels == ["ham", "spam"] and again.max_length == 120 and "max_length 120" in capsys.readouterr().err
    classifier.max_length = 120
    assert torch.equal(g.predict(again, ["a", "bb"], CPU), g.predict(classifier, ["a", "bb"], CPU))


# ---- Download ----

class Files(http.server.BaseHTTPRequestHandler):
    """Serves a dict of files; `faults` is what happens to the first requests."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        content, fault = self.server.files.get(self.path), self.server.faults.pop(0) if self.server.faults else None
        self.server.asked.append((self.path, self.headers["Range"]))
        if content is None or fault in (404, 500):
            self.send_error(fault or 404)
            return
        start = 0
        if self.headers["Range"]:
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = content[start:]
        if fault == "html":
            body = b"<!DOCTYPE html><title>Please log in</title>"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "cut":
            body, self.close_connection = body[:len(body) // 2], True
        if fault == "flip":
            body = bytes([body[0] ^ 255]) + body[1:]
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture()
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as httpd:
        httpd.files, httpd.faults, httpd.asked, httpd.url = {}, [], [], f"http://127.0.0.1:{httpd.server_port}"
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        yield httpd
        httpd.shutdown()


@pytest.fixture()
def no_pauses(monkeypatch):
    monkeypatch.setattr(g.time, "sleep", lambda seconds: None)


CONTENT = np.random.default_rng(0).bytes(3_000_000)


def right(part):
    g.check_sha256(part, hashlib.sha256(CONTENT).hexdigest())


@pytest.mark.parametrize("faults", [[], [500], ["cut"], ["cut", None, "cut"], ["flip"]])
def test_download_ends_right(server, tmp_path, no_pauses, faults):
    server.files["/f"], server.faults = CONTENT, list(faults)
    g.download([f"{server.url}/f"], tmp_path / "f", right)
    assert (tmp_path / "f").read_bytes() == CONTENT and [p.name for p in tmp_path.iterdir()] == ["f"]
    if faults[:1] == ["cut"]:
        assert any(asked for _, asked in server.asked), "it should go on, not start again"


def test_download_takes_the_backup_and_says_what_failed(server, tmp_path, no_pauses):
    server.files["/good"] = CONTENT
    g.download([f"{server.url}/missing", f"{server.url}/good"], tmp_path / "f", right)
    assert (tmp_path / "f").read_bytes() == CONTENT
    with socket.socket() as nobody:  # bound, not listening
        nobody.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{nobody.getsockname()[1]}/x"
        with pytest.raises(OSError) as caught:
            g.download([dead, f"{server.url}/missing"], tmp_path / "new", None)
    assert dead in str(caught.value) and "404" in str(caught.value) and "by hand" in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_part_of_another_file_is_not_continued(server, tmp_path, no_pauses):
    server.files |= {"/a": CONTENT, "/b": CONTENT[::-1]}
    server.faults = ["cut", 404]
    with pytest.raises(OSError):
        g.download([f"{server.url}/a"], tmp_path / "f")
    assert len(list(tmp_path.glob("*.part"))) == 1
    g.download([f"{server.url}/b"], tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT[::-1] and len(list(tmp_path.iterdir())) == 1


def test_a_log_in_page_or_wrong_file_never_gets_in_place(server, tmp_path, no_pauses):
    server.files["/f"], server.faults = CONTENT, ["html"]
    with pytest.raises(OSError, match="web page"):
        server.faults = ["html"] * 9
        g.download([f"{server.url}/f"], tmp_path / "f")
    server.faults = []
    with pytest.raises(OSError, match="SHA-256"):
        g.download([f"{server.url}/f"], tmp_path / "f", lambda part: g.check_sha256(part, "0" * 64))
    assert not (tmp_path / "f").exists()


# ---- The whole thing ----

@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """`train` on a mirror that serves the micro checkpoint as 124M, and a small collection as UCI's."""
    folder = tmp_path_factory.mktemp("trained")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("../evil", "never unpacked")
        zipped.writestr("SMSSpamCollection", small_data(folder / "raw.tsv").read_bytes())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as httpd:
        httpd.files, httpd.faults, httpd.asked = {}, [], []
        for name in g.FILES_124M:
            file = MICRO / name
            httpd.files[f"/gpt-2/models/124M/{name}"] = file.read_bytes() if file.exists() else b"graph"
        httpd.files["/static/public/228/sms+spam+collection.zip"] = archive.getvalue()
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
    metrics = json.loads((folder / "m.json").read_text())
    assert [row["step"] for row in metrics["history"]] == [0, 4, 8, 12] and len(metrics["epochs"]) == 2
    assert set(metrics["final"]) == {"train_accuracy", "val_accuracy", "test_accuracy"}
    assert f"Test accuracy: {metrics['final']['test_accuracy'] * 100:.2f}%" in out
    for plot in ("loss", "accuracy"):
        assert (folder / "plots" / f"{plot}-plot.png").read_bytes().startswith(b"\x89PNG")
    again = run("train", *places, "--epochs", 0)  # the second start needs no network
    assert again.returncode == 0, again.stderr


def test_classifier_reopens_alone_with_the_same_logits(trained, tmp_path):
    classifier = g.load_classifier(trained[0] / "w" / "spam_classifier.pth")
    g.save_classifier(tmp_path / "again.pth", classifier)
    again = g.load_classifier(tmp_path / "again.pth")
    texts = g.read_messages(SAMPLE)["Text"].tolist()[:20]
    assert torch.equal(g.predict(classifier, texts, CPU), g.predict(again, texts, CPU))
    ids = classifier.tokenizer.encode_ordinary(texts[0])[:classifier.max_length]
    ids = torch.tensor([ids + [319] * (classifier.max_length - len(ids))])
    torch.testing.assert_close(g.predict(classifier, texts[:1], CPU), classifier.model(ids)[:, -1].softmax(-1))


def test_use(trained):
    folder, places, out = trained
    where = ["--weights-dir", folder / "w", "--device", "cpu"]
    said = run("classify", *where, "hello there", "").stdout.splitlines()
    assert len(said) == 2 and all(re.fullmatch(r"(ham|spam)\t[01]\.\d{4}\t.*", line) for line in said)
    accuracy = re.search(r"16 messages, accuracy ([\d.]+)%", run("evaluate", *where, "--data-dir", folder / "d").stdout)[1]
    assert out.count(f"Test accuracy: {accuracy}%") >= 1
    assert run("generate", "--model", "124M", *where, "--tokens", 3).stdout.startswith("Every effort moves you")


DEAD = "http://127.0.0.1:9"  # nobody listens


def test_without_any_network_the_bundled_model_and_messages_are_used_and_named(tmp_path):
    places = ["--weights-dir", tmp_path / "w", "--data-dir", tmp_path / "d", "--weights-url", DEAD, "--data-url", DEAD, "--device", "cpu"]
    done = run("train", *places, "--epochs", 1, "--metrics", tmp_path / "m.json")
    assert done.returncode == 0, done.stderr
    for note in ("bundled tiny model: figures are not GPT-2's", "bundled sample messages: figures say nothing about real SMS"):
        assert done.stdout.count(note) == 2  # at the start, and beside the final figures
        assert note in json.loads((tmp_path / "m.json").read_text())["note"]
        assert note in torch.load(tmp_path / "w" / "spam_classifier.pth", weights_only=True)["about"]["inputs"]
    assert "lr 0.001" in done.stdout and "warmup 0.1" in done.stdout  # the model's own defaults
    named = run("train", *places, "--model", "124M")
    assert named.returncode == 2 and "cannot download" in named.stderr
    (tmp_path / "w" / "124M.download").mkdir(exist_ok=True)
    (tmp_path / "w" / "124M.download" / "vocab.bpe.12345678.part").write_bytes(b"half")
    begun = run("train", *places)
    assert begun.returncode == 2 and "cannot download" in begun.stderr  # a broken download is not given up silently


def test_the_bundled_model_is_a_small_gpt_in_the_form_of_a_converted_checkpoint():
    file = HERE / "weights" / "tiny.npz"
    assert file.stat().st_size <= 8_000_000
    model, tokenizer, _ = g.load_pretrained(file)
    assert model.cfg.context_length >= 256 and tokenizer.n_vocab == model.cfg.vocab_size
    ids = torch.tensor([tokenizer.encode_ordinary("It was a dark night, and the rain fell on the roof of the old house.")])
    loss = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).item()
    assert loss < 0.7 * math.log(model.cfg.vocab_size)  # it has learned something: knowing nothing costs 8.3 nats
    card = (HERE / "weights" / "README.md").read_text()
    assert g.file_sha256(file) in card and f"{file.stat().st_size:,} bytes" in card


def test_pretraining_that_was_broken_off_ends_with_the_same_model(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("pretrain_tiny", HERE / "weights" / "pretrain_tiny.py")
    pretrain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pretrain)
    monkeypatch.setattr(pretrain, "CONFIG", g.GPTConfig(vocab_size=300, context_length=32, emb_dim=16, n_heads=2, n_layers=1, drop_rate=0.1))
    monkeypatch.setattr(pretrain, "SEGMENT", 2)
    monkeypatch.setattr(sys, "argv", ["", str(HERE / "README.md"), "--sample", str(small_data(tmp_path / "d.tsv")), "--steps", "4", "--batch-size", "4"])
    validate, calls = pretrain.validate, []

    def breaks_at_the_second(*args):
        calls.append(1)
        if len(calls) > 2:  # two streams a time
            raise KeyboardInterrupt
        return validate(*args)

    for name in ("whole", "broken"):
        monkeypatch.setattr(sys, "argv", [*sys.argv, "--out", str(tmp_path / f"{name}.npz")])
        if name == "broken":
            monkeypatch.setattr(pretrain, "validate", breaks_at_the_second)
            with pytest.raises(KeyboardInterrupt):
                pretrain.main()
            monkeypatch.setattr(pretrain, "validate", validate)
        pretrain.main()
    assert g.file_sha256(tmp_path / "whole.npz") == g.file_sha256(tmp_path / "broken.npz")


def test_two_processes_at_once_on_a_fresh_folder(server, tmp_path):
    for name in g.FILES_124M:
        server.files[f"/gpt-2/models/124M/{name}"] = (MICRO / name).read_bytes() if (MICRO / name).exists() else b"graph"
    args = [sys.executable, HERE / "gpt_spam.py", "train", "--model", "124M", "--weights-url", server.url, "--no-verify", "--data",
            small_data(tmp_path / "d.tsv"), "--weights-dir", tmp_path / "w", "--data-dir", tmp_path / "d", "--epochs", "1", "--device", "cpu"]
    both = [subprocess.Popen(list(map(str, args)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        out, err = process.communicate()
        assert process.returncode == 0 and "Test accuracy" in out, err
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == ["gpt2-124M.npz", "spam_classifier.pth"]


def test_a_damaged_download_is_thrown_away_and_a_good_one_kept(server, tmp_path, no_pauses):
    for name in g.FILES_124M:
        server.files[f"/gpt-2/models/355M/{name}"] = (MICRO / name).read_bytes() if (MICRO / name).exists() else b"graph"
    data = server.files[f"/gpt-2/models/355M/{g.DATA_FILE}"]
    server.files[f"/gpt-2/models/355M/{g.DATA_FILE}"] = data[:99] + bytes([data[99] ^ 1]) + data[100:]
    with pytest.raises(ValueError, match="damaged.*run again"):
        g.find_model("355M", tmp_path, server.url)
    assert not list(tmp_path.iterdir())
    server.files[f"/gpt-2/models/355M/{g.DATA_FILE}"] = data
    path = g.find_model("355M", tmp_path, server.url, keep=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["355M", path.name] and len(list((tmp_path / "355M").glob("[!.]*"))) == 7


@pytest.mark.parametrize("args, said", [
    (["train", "--model", "gpt5"], "unknown model 'gpt5'"),
    (["train", "--model", HERE / "data"], "not a checkpoint in OpenAI's layout"),
    (["train", "--model", MICRO, "--data", "nowhere.tsv"], "no file nowhere.tsv"),
    (["train", "--model", MICRO, "--data", MICRO / "vocab.bpe"], "'ham' or 'spam'"),
    (["train", "--model", MICRO, "--data", SAMPLE, "--out", HERE], "it is a folder"),
    (["classify", "--classifier", "none.pth", "hi"], "no classifier at none.pth"),
    (["classify", "--classifier", SAMPLE, "hi"], "not a classifier"),
    (["train", "--device", "warp", "--model", MICRO, "--data", SAMPLE], "no device 'warp'"),
    (["train", "--weights-url", "http://127.0.0.1:9", "--model", "124M", "--data", SAMPLE], "http://127.0.0.1:9/gpt-2/models/124M/"),
])
def test_bad_input_is_one_error_and_status_2(tmp_path, args, said):
    if args[0] == "train":
        args = [*args, "--weights-dir", tmp_path / "w", "--data-dir", tmp_path / "d"]
    done = run(*args)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_readme_and_script_header_name_the_same_packages():
    header = re.search(r"# dependencies = \[(.*?)# \]", (HERE / "gpt_spam.py").read_text(), re.DOTALL)[1]
    install = re.search(r"pip install (.*)", (HERE / "README.md").read_text())[1]
    assert set(re.findall('"(.+?)"', header)) == set(install.replace('"', "").split())


def test_the_file_alone_runs(tmp_path):
    shutil.copy(HERE / "gpt_spam.py", tmp_path)
    done = subprocess.run([sys.executable, "gpt_spam.py", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "classify" in done.stdout and os.listdir(tmp_path) == ["gpt_spam.py"]


@pytest.mark.skipif(not os.environ.get("GPT_SPAM_ONLINE"), reason="downloads OpenAI's 124M: set GPT_SPAM_ONLINE=1")
def test_numbers_printed_in_the_chapter(tmp_path):
    done = run("train", "--model", "124M", "--data", "sms", "--metrics", tmp_path / "m.json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "Every effort moves you forward.\n\nThe first step is to understand the importance of your work" in done.stdout
    for line in ("[-3.5983, 3.9902]", "Training accuracy: 46.25%", "Validation accuracy: 45.00%", "Test accuracy: 48.75%",
                 "Training loss: 2.453", "Validation loss: 2.583", "Test loss: 2.322"):
        assert line in done.stdout
    metrics = json.loads((tmp_path / "m.json").read_text())
    logged = {row["step"]: (row["train_loss"], row["val_loss"]) for row in metrics["history"]}
    assert logged[0] == pytest.approx((2.153, 2.392), abs=6e-4) and logged[600] == pytest.approx((0.083, 0.074), abs=6e-4)
    assert [round(100 * metrics["final"][f"{s}_accuracy"], 2) for s in ("train", "val", "test")] == [97.21, 97.32, 95.67]
