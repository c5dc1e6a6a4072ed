# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "tiktoken==0.14.0", "numpy", "requests", "pandas", "tqdm", "matplotlib",
#     "pytest", "scikit-learn"]
# ///
"""Offline tests: `python -m pytest -q test_gpt_spam.py`.

PyTorch's own modules judge the layers, bytes that TensorFlow wrote the reader, scikit-learn the metrics,
counts and plain arithmetic the rest. With GPT_SPAM_ONLINE=1 a test compares with the book's numbers.
"""

import contextlib
import gzip
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
import tempfile
import threading
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.data import DataLoader

import gpt_spam as g
from gpt_spam import (  # what the book's own calls need
    GPTModel, MultiHeadAttention, SpamDataset, calc_accuracy_loader, calc_loss_batch, classify_review,
    create_balanced_dataset, download_and_load_gpt2, download_and_unzip_spam_data, generate_text_simple,
    load_weights_into_gpt, plot_values, random_split, replace_linear_with_lora, text_to_token_ids,
    token_ids_to_text, train_classifier_simple)

HERE = Path(__file__).resolve().parent
SOURCE = Path(g.__file__).read_text("utf-8")
MICRO = HERE / "weights" / "micro"  # 2 layers, 16 wide, 320 tokens; written by TensorFlow 2.21
ENCODER, MERGES = (MICRO / "encoder.json").read_text(), (MICRO / "vocab.bpe").read_text()
TOKENIZER = g.build_tokenizer(ENCODER)
BUNDLED = [HERE / name for name in ("data/sample_sms.tsv", "data/hard_sms.tsv", "weights/messages.tsv")]
CFG = {"vocab_size": 50, "context_length": 12, "emb_dim": 8, "n_heads": 2, "n_layers": 3, "drop_rate": 0.0,
       "qkv_bias": True}
BASE_CONFIG = {"vocab_size": 320, "context_length": 1024, "drop_rate": 0.0, "qkv_bias": True,
               "emb_dim": 16, "n_layers": 2, "n_heads": 2}  # of the micro checkpoint
CPU = torch.device("cpu")
DEAD = "http://127.0.0.1:9"  # nobody listens there


# ---- What the tests share ----

def small_frame(ham=23):
    """Return short bundled messages: `ham` ham and 23 spam."""
    df = g.read_messages(BUNDLED[0])
    df = df[df["Text"].str.len().between(10, 40)]
    return pd.concat([df[df["Label"] == "ham"][:ham], df[df["Label"] == "spam"][:23]])


def small_data(path):
    """Write 46 messages in UCI's form: 32 to train on, 4 to validate, 10 to test."""
    small_frame().to_csv(path, sep="\t", header=False, index=False)
    return path


def train_arguments(folder, *args, data=None, model=MICRO):
    """Return the command line of a short training on a small checkpoint, all its files in `folder`."""
    places = ["--weights-dir", folder / "w", "--data-dir", folder / "d", "--metrics", folder / "m.json"]
    folder.mkdir(exist_ok=True)
    data = data or small_data(folder / "d.tsv")
    short = ["--device", "cpu", "--epochs", 2, "--eval-freq", 3, "--lr", 1e-3]
    return list(map(str, ["train", "--model", model, "--data", data, *places, *short, *args]))


def train(folder, *args, **kwargs):
    """Run it in this process; return the metrics."""
    assert g.main(train_arguments(folder, *args, **kwargs)) == 0
    return json.loads((folder / "m.json").read_text())


def losses(metrics):
    return metrics["train_loss"] + metrics["val_loss"]


def classifier_in(folder):
    return g.load_classifier(folder / "w" / "spam_classifier.pth")


@pytest.fixture
def run(capfd):
    """Run the command line in this process; return its status, output and errors since the last time."""
    return lambda *args: (g.main(list(map(str, args))), *capfd.readouterr())


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    path = tmp_path_factory.mktemp("micro") / "micro.npz"
    g.convert_checkpoint(MICRO, path)
    return path


class Files(http.server.BaseHTTPRequestHandler):
    """Serves a dict of files; `faults` is what happens to the first requests for one of them."""

    def do_GET(self):
        content = self.server.files.get(self.path)
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
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
TABLE = small_frame(ham=30).to_csv(sep="\t", header=False, index=False).encode()  # stands for UCI's
ARCHIVE = "/static/public/228/sms+spam+collection.zip"


@pytest.fixture(scope="session")
def server():
    """Serves CONTENT, TABLE as UCI's archive and the micro checkpoint as OpenAI's; nothing waits."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("../evil", "never unpacked")
        zipped.writestr("SMSSpamCollection", TABLE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server, \
            pytest.MonkeyPatch.context() as patch:
        patch.setattr(g.time, "sleep", lambda seconds: None)
        server.files = {f"/gpt-2/models/{size}/{name}": (MICRO / name).read_bytes()
                        for size in ("124M", "355M") for name in (*g.TEXT_FILES, g.DATA_FILE)}
        server.files |= {"/good": CONTENT, "/wrong": b"<html>log in</html>", ARCHIVE: archive.getvalue()}
        server.faults, server.starts, server.url = [], [], f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


# ---- The book's own calls, in its order ----

@pytest.fixture(scope="module")
def book(server, tmp_path_factory):
    """Sections 6.2 and 6.3 as the book writes them; returns the names that they make."""
    folder = tmp_path_factory.mktemp("book")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(download_and_unzip_spam_data, "__defaults__", (hashlib.sha256(TABLE).hexdigest(),))
        url, zip_path = server.url + ARCHIVE, "sms_spam_collection.zip"
        extracted_path = "sms_spam_collection"
        data_file_path = "sms_spam_collection/SMSSpamCollection.tsv"
        download_and_unzip_spam_data(url, zip_path, extracted_path, data_file_path)

        df = pd.read_csv(data_file_path, sep="\t", header=None, names=["Label", "Text"])
        balanced_df = create_balanced_dataset(df)
        balanced_df["Label"] = balanced_df["Label"].map({"ham": 0, "spam": 1})
        train_df, validation_df, test_df = random_split(balanced_df, 0.7, 0.1)
        train_df.to_csv("train.csv", index=None)
        validation_df.to_csv("validation.csv", index=None)
        test_df.to_csv("test.csv", index=None)

        tokenizer = TOKENIZER
        train_dataset = SpamDataset(csv_file="train.csv", max_length=None, tokenizer=tokenizer)
        max_length = train_dataset.max_length
        val_dataset = SpamDataset(csv_file="validation.csv", max_length=max_length, tokenizer=tokenizer)
        test_dataset = SpamDataset(csv_file="test.csv", max_length=max_length, tokenizer=tokenizer)
    train_loader = DataLoader(train_dataset, batch_size=8, shuffle=True, num_workers=0, drop_last=True)
    val_loader = DataLoader(val_dataset, batch_size=8, num_workers=0, drop_last=False)
    test_loader = DataLoader(test_dataset, batch_size=8, num_workers=0, drop_last=False)
    device = torch.device("cpu")
    return SimpleNamespace(**locals())


@pytest.fixture
def spam_model(micro):
    """Sections 6.4 and 6.5 by hand: OpenAI's weights; a new head, the last block and norm are trained."""
    shutil.copy(micro, micro.with_name("gpt2-124M.npz"))
    settings, params = download_and_load_gpt2(model_size="124M", models_dir=str(micro.parent))
    assert settings == {"n_vocab": 320, "n_ctx": 1024, "n_embd": 16, "n_head": 2, "n_layer": 2}
    model = GPTModel(BASE_CONFIG)
    load_weights_into_gpt(model, params)
    for param in model.parameters():
        param.requires_grad = False
    torch.manual_seed(123)
    model.out_head = torch.nn.Linear(in_features=BASE_CONFIG["emb_dim"], out_features=2)
    for param in model.trf_blocks[-1].parameters():
        param.requires_grad = True
    for param in model.final_norm.parameters():
        param.requires_grad = True
    return model


def test_book_6_2_downloads_balances_and_splits(book):
    assert (book.folder / book.data_file_path).read_bytes() == TABLE and not Path(book.zip_path).exists()
    assert book.df["Label"].value_counts().to_dict() == {"ham": 30, "spam": 23}
    assert book.balanced_df["Label"].value_counts().to_dict() == {0: 23, 1: 23}
    assert [len(book.train_df), len(book.validation_df), len(book.test_df)] == [32, 4, 10]


def test_book_6_3_loaders_give_pairs_of_inputs_and_targets(book):
    for input_batch, target_batch in book.train_loader:
        assert input_batch.shape == (8, book.max_length) and target_batch.shape == (8,)
    assert [len(book.train_loader), len(book.val_loader), len(book.test_loader)] == [4, 1, 2]
    for (ids, label), text, number in zip(book.train_dataset, book.train_df["Text"], book.train_df["Label"]):
        assert book.tokenizer.decode(ids.tolist()).replace("<|endoftext|>", "") == text and label == number


def test_book_chapter_3_attention_is_causal():
    torch.manual_seed(123)
    batch = torch.rand(2, 6, 3)
    batch_size, context_length, d_in = batch.shape
    d_out = 2
    mha = MultiHeadAttention(d_in, d_out, context_length, dropout=0.0, num_heads=2)
    context_vecs = mha(batch)
    assert context_vecs.shape == (2, 6, 2)
    torch.testing.assert_close(context_vecs[:, :4], mha(batch[:, :4]))


def test_book_6_4_appends_the_most_likely_token(micro):
    model, idx = g.load_pretrained(micro)[0], text_to_token_ids("Every effort moves you", TOKENIZER)
    token_ids = generate_text_simple(model=model, idx=idx, max_new_tokens=4, context_size=10)
    assert token_ids_to_text(token_ids, TOKENIZER).startswith("Every effort moves you")
    for end in range(idx.shape[1], idx.shape[1] + 4):  # the context holds the last 10 tokens
        assert token_ids[0, end] == model(token_ids[:, end - 10:end])[0, -1].argmax()


def test_book_6_6_loss_and_accuracy_are_those_of_the_last_token(book, spam_model):
    right = 0
    for input_batch, target_batch in book.test_loader:
        logits = spam_model(input_batch)[:, -1, :]
        right += (logits.argmax(dim=-1) == target_batch).sum().item()
        loss = calc_loss_batch(input_batch, target_batch, spam_model, book.device)
        torch.testing.assert_close(loss, F.cross_entropy(logits, target_batch))
    assert calc_accuracy_loader(book.test_loader, spam_model, book.device, num_batches=10) == right / 10


def test_book_6_7_trains_and_plots(book, spam_model):
    before = {name: value.clone() for name, value in spam_model.state_dict().items()}
    optimizer = torch.optim.AdamW(spam_model.parameters(), lr=5e-5, weight_decay=0.1)
    num_epochs = 1
    train_losses, val_losses, train_accs, val_accs, examples_seen = train_classifier_simple(
        spam_model, book.train_loader, book.val_loader, optimizer, book.device,
        num_epochs=num_epochs, eval_freq=50, eval_iter=5)
    assert [*map(len, (train_losses, val_losses, train_accs, val_accs)), examples_seen] == [1, 1, 1, 1, 32]
    moved = {name for name, value in spam_model.state_dict().items() if not torch.equal(value, before[name])}
    trained = {name for name, param in spam_model.named_parameters() if param.requires_grad}
    assert moved <= trained and {"out_head.weight", "trf_blocks.1.ff.layers.0.weight"} <= moved

    epochs_tensor = torch.linspace(0, num_epochs, len(train_accs))
    examples_seen_tensor = torch.linspace(0, examples_seen, len(train_accs))
    figure = plot_values(epochs_tensor, examples_seen_tensor, train_accs, val_accs, label="accuracy")
    assert figure.axes[0].get_ylabel() == "Accuracy" and figure.axes[1].get_xlabel() == "Examples seen"
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [train_accs, val_accs]


def test_book_6_8_classifies_and_reopens(book, spam_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(spam_model.state_dict(), "review_classifier.pth")
    model = GPTModel(BASE_CONFIG)
    model.out_head = torch.nn.Linear(in_features=BASE_CONFIG["emb_dim"], out_features=2)
    model_state_dict = torch.load("review_classifier.pth", map_location=book.device, weights_only=True)
    model.load_state_dict(model_state_dict)
    for text in book.test_df["Text"]:
        ids = (TOKENIZER.encode_ordinary(text) + [319] * book.max_length)[:book.max_length]
        ham, spam = spam_model(torch.tensor([ids]))[0, -1, :].tolist()
        answer = classify_review(text, model, book.tokenizer, book.device, max_length=book.max_length)
        assert answer == ("spam" if spam > ham else "not spam")


def test_book_appendix_e_trains_loras_two_matrices_of_each_layer(book, spam_model):
    for param in spam_model.parameters():
        param.requires_grad = False
    ids = book.val_dataset[0][0].unsqueeze(0)
    before = spam_model(ids)
    replace_linear_with_lora(spam_model, rank=16, alpha=16)
    torch.testing.assert_close(spam_model(ids), before)
    attention, feed_forward, head = 4 * (16 + 16), 2 * (16 + 64), 16 + 2  # inputs and outputs of the layers
    total_params = sum(param.numel() for param in spam_model.parameters() if param.requires_grad)
    assert total_params == 16 * (2 * (attention + feed_forward) + head)


def test_part_1_trains_and_classifies_without_part_2():
    part_1, part_2 = SOURCE.split("# ======== Part 2")
    space = {"__name__": "part_1"}
    exec(compile(part_1, "part_1", "exec"), space)
    assert "class Classifier" in part_2 and "Classifier" not in space
    frame = pd.DataFrame({"Text": ["aaaa", "bbbb"] * 8, "Label": [0, 1] * 8})
    dataset = space["SpamDataset"](frame, TOKENIZER)
    torch.manual_seed(0)
    model = space["GPTModel"](BASE_CONFIG)
    space["add_classification_head"](model, 2)
    optimizer, loader = torch.optim.AdamW(model.parameters(), lr=1e-2), DataLoader(dataset, 4, shuffle=True)
    log = space["train_classifier_simple"](model, loader, loader, optimizer, "cpu", 9, 5, 4)
    assert log[0][-1] < log[0][0] and log[3][-1] == 1
    answers = [space["classify_review"](text, model, TOKENIZER, "cpu", dataset.max_length)
               for text in ("aaaa", "bbbb")]
    assert answers == ["not spam", "spam"]


def test_sections_run_one_after_the_other_in_one_namespace(capsys):
    space = {"__name__": "notebook", "__file__": g.__file__}
    for section in re.split(r"^# %%\n", SOURCE, flags=re.MULTILINE):
        exec(compile(section, "section", "exec"), space)
    assert space["main"]([]) == 0 and "classify" in capsys.readouterr().out


def test_every_section_banner_follows_a_cell_marker():
    lines = SOURCE.split("\n")
    banners = [number for number, line in enumerate(lines) if line.startswith("# ---- ")]
    assert len(banners) > 10 and all(lines[number - 1] == "# %%" for number in banners)


# ---- 6.2 Data set ----

def test_balanced_data_and_splits_are_the_chapters():
    df = pd.DataFrame({"Label": ["ham"] * 170 + ["spam"] * 60, "Text": [str(i) for i in range(230)]})
    chapter = pd.concat([df[df["Label"] == "ham"].sample(60, random_state=123), df[df["Label"] == "spam"]])
    pd.testing.assert_frame_equal(create_balanced_dataset(df), chapter)
    frames, weights = g.prepare_splits(df)
    assert list(map(len, frames)) == [84, 12, 24] and weights is None
    shuffled = chapter.sample(frac=1, random_state=123, ignore_index=True)
    pd.testing.assert_frame_equal(pd.concat(frames), shuffled)


THREE = pd.DataFrame({"Label": ["b"] * 20 + ["a"] * 60 + ["c"] * 10, "Text": [str(i) for i in range(90)]})


def test_other_labels_are_weighted_or_undersampled():
    frames, weights = g.prepare_splits(THREE)
    assert [len(frame) for frame in frames] == [62, 9, 19]
    counts = frames[0]["Label"].value_counts()
    assert weights.tolist() == pytest.approx([62 / 3 / counts[label] for label in "abc"])
    frames, weights = g.prepare_splits(THREE, "undersample")
    assert [len(frame) for frame in frames] == [21, 3, 6] and weights is None


def test_a_test_frame_of_ones_own_leaves_all_else_to_training_and_validation():
    test = pd.DataFrame({"Label": ["c", "a"], "Text": ["x", "5"]})
    frames, _ = g.prepare_splits(THREE, "none", test)
    assert sorted(pd.concat(frames[:2])["Text"]) == sorted(THREE["Text"])
    assert len(frames[0]) == 78 and frames[2] is test
    with pytest.raises(ValueError, match="'d'"):
        g.prepare_splits(THREE, test=test.assign(Label="d"))


def test_a_mistyped_balance_is_an_error():
    with pytest.raises(ValueError, match="balance must be one of auto, .*'weight'"):
        g.prepare_splits(THREE, "weight")


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
    ("text,label\nok,x\nno\n", "1 of 2 messages .*no label, first 'no'"),
    ("label,text\nx,a,b\n", "quote the texts"),
    ('{"text": "a"}\n', "no column 'label'"), ('{"text": \n', "not a table"), ("", "not a table"),
])
def test_wrong_data_is_one_clear_error(tmp_path, content, said):
    (tmp_path / "data.tsv").write_text(content)
    with pytest.raises(ValueError, match=said):
        g.prepare_splits(g.read_messages(tmp_path / "data.tsv"))


@pytest.mark.skipif(not (HERE / "data" / "SMSSpamCollection.tsv").exists(), reason="it is not here")
def test_counts_of_the_sms_spam_collection():
    df = g.read_messages(HERE / "data" / "SMSSpamCollection.tsv")
    assert df["Label"].value_counts().to_dict() == {"ham": 4825, "spam": 747}
    assert [len(split) for split in g.prepare_splits(df)[0]] == [1045, 149, 300]
    assert not any(g.read_messages(file)["Text"].isin(df["Text"]).any() for file in BUNDLED)


def test_no_two_bundled_messages_are_alike():
    frames = [g.read_messages(file) for file in BUNDLED]
    assert len(frames[0]) >= 1400 and len(frames[1]) >= 250
    assert frames[0]["Label"].value_counts().nunique() == 1
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


# ---- 6.3 Tokenizer and data loaders ----

def test_tokenizer_merges_as_byte_pair_encoding_does():
    """A few lines of plain BPE: always merge the neighbours that stand first in vocab.bpe."""
    encoder = json.loads(ENCODER)
    ranks = {tuple(line.split(" ")): i for i, line in enumerate(MERGES.split("\n")[1:-1])}
    for word in ("the", " thing", "call", " you", " winner", "zzz"):
        parts = list(word.replace(" ", "\u0120"))
        while pairs := [(ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in ranks]:
            i = min(pairs)[1]
            parts[i:i + 2] = ["".join(parts[i:i + 2])]
        assert TOKENIZER.encode_ordinary(word) == [encoder[part] for part in parts]


def test_tokenizer_gives_back_any_text_and_ends_it_only_when_told():
    text = "".join(map(chr, range(0x24F))) + "😀\ufffd"
    assert TOKENIZER.decode(TOKENIZER.encode_ordinary(text)) == text
    assert TOKENIZER.eot_token == 319 not in TOKENIZER.encode_ordinary("<|endoftext|>")
    with pytest.raises(ValueError, match="does not end with"):
        g.build_tokenizer(ENCODER.replace('"<|endoftext|>": 319', '"<|endoftext|>": 320'))


SHORT, LONG = TOKENIZER.encode_ordinary("a"), TOKENIZER.encode_ordinary("abcabcabc")
TEXTS = pd.DataFrame({"Text": ["a", "abcabcabc", ""], "Label": [0, 1, 0]})


def test_dataset_pads_to_the_longest_and_cuts(tmp_path):
    def ids_of(*args, **options):
        return [ids.tolist() for ids, _ in SpamDataset(*args, **options)]

    dataset = SpamDataset(TEXTS, TOKENIZER)
    padded = [SHORT + [319] * (len(LONG) - 1), LONG, [319] * len(LONG)]
    assert dataset.max_length == len(LONG) > 4 and ids_of(TEXTS, TOKENIZER) == padded
    assert [label.item() for _, label in dataset] == dataset.labels.tolist() == [0, 1, 0]
    assert ids_of(TEXTS, TOKENIZER, pad_token_id=7)[2] == [7] * len(LONG)
    assert ids_of(TEXTS, TOKENIZER, max_length=3)[1] == LONG[:3]
    TEXTS.to_csv(tmp_path / "a.csv", index=False)
    assert ids_of(tmp_path / "a.csv", TOKENIZER) == padded
    with pytest.raises(ValueError, match="'ham'"):
        SpamDataset(TEXTS.assign(Label="ham"), TOKENIZER)


def test_collate_knows_where_texts_without_padding_end():
    dataset = SpamDataset(TEXTS, TOKENIZER, 4, padding=False)
    assert [len(ids) for ids in dataset.encoded_texts] == [1, 4, 1]
    (inputs, positions), labels = g.collate(list(dataset))
    assert inputs.tolist() == [[*SHORT, 0, 0, 0], LONG[:4], [319, 0, 0, 0]]
    assert positions.tolist() == [0, 3, 0] and labels.tolist() == [0, 1, 0]


# ---- 6.4 Pretrained model ----

@pytest.mark.parametrize("causal", [True, False])
def test_block_equals_pytorch(causal):
    torch.manual_seed(0)
    ours = g.TransformerBlock({**CFG, "causal": causal}).eval()
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


def micro_values(name, *shape):
    """What the checkpoint was written from: a variable's values depend on its name and shape only."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"0:model/{name}".encode()).digest(), "little"))
    array = rng.standard_normal(shape, np.float32)
    array *= 0.01 if name == "wpe" else 0.02
    return array + 1 if name.endswith("/g") else array * 5


def micro_state():
    """The checkpoint's tensors by the chapter's names."""
    wte = micro_values("wte", 320, 16)
    state = {"tok_emb.weight": wte, "out_head.weight": wte, "pos_emb.weight": micro_values("wpe", 1024, 16)}
    norms = {f"trf_blocks.{i}.norm{n}": f"h{i}/ln_{n}" for i in (0, 1) for n in (1, 2)}
    for our, their in {"final_norm": "ln_f", **norms}.items():
        state[f"{our}.scale"] = micro_values(f"{their}/g", 16)
        state[f"{our}.shift"] = micro_values(f"{their}/b", 16)
    linears = {"attn/c_attn": (16, 48, ["att.W_query", "att.W_key", "att.W_value"]),
               "attn/c_proj": (16, 16, ["att.out_proj"]),
               "mlp/c_fc": (16, 64, ["ff.layers.0"]), "mlp/c_proj": (64, 16, ["ff.layers.2"])}
    for i in (0, 1):
        for their, (inside, outside, ours) in linears.items():
            weights = np.split(micro_values(f"h{i}/{their}/w", 1, inside, outside)[0], len(ours), axis=1)
            biases = np.split(micro_values(f"h{i}/{their}/b", outside), len(ours))
            for our, weight, bias in zip(ours, weights, biases):
                state[f"trf_blocks.{i}.{our}.weight"] = weight.T
                state[f"trf_blocks.{i}.{our}.bias"] = bias
    return state


def test_every_tensor_is_what_tensorflow_wrote(micro):
    model, tokenizer, suited = g.load_pretrained(micro)
    expected, found = micro_state(), model.state_dict()
    assert set(expected) == set(found) and model.cfg == {**BASE_CONFIG, "causal": True}
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert tokenizer.n_vocab == 320 and suited == {} and not model.training


@pytest.mark.parametrize("file, change, said", [
    (g.DATA_FILE, lambda b: b[:-4], r"112,380 bytes.*112,384"),
    (g.DATA_FILE, lambda b: b + b"more", "112,388 bytes"),
    (g.DATA_FILE, lambda b: b[:4000] + b"\0\0\xc0\x7f" + b[4004:], "NaN or infinity"),
    ("hparams.json", lambda b: b.replace(b'"n_layer": 2', b'"n_layer": 3'), r"112,384 bytes.*125,"),
    ("hparams.json", lambda b: b.replace(b'"n_vocab": 320', b'"n_vocab": 321'), r"112,384 bytes.*112,448"),
    ("hparams.json", lambda b: b"<html>", "Expecting value"),
    ("encoder.json", lambda b: b[:100], "not a checkpoint"),
    ("encoder.json", lambda b: b[:50] + b"\xff" + b[51:], "utf-8"),
], ids=str)
def test_a_damaged_checkpoint_is_refused(tmp_path, file, change, said):
    shutil.copytree(MICRO, tmp_path / "changed")
    (tmp_path / "changed" / file).write_bytes(change((MICRO / file).read_bytes()))
    with pytest.raises(ValueError, match=said):
        g.convert_checkpoint(tmp_path / "changed", tmp_path / "out.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["changed"]


@pytest.mark.parametrize("name, wrong", [
    ("tok_emb.weight", np.zeros((3, 3), np.float32)), ("pos_emb.weight", np.array([{}], dtype=object)),
    ("encoder.json", np.frombuffer(b"{}", np.uint8)),
    ("hparams.json", np.frombuffer((MICRO / "hparams.json").read_bytes().replace(b" 2", b" 9"), np.uint8)),
], ids=["shape", "object", "tokens", "layers"])
def test_an_npz_that_does_not_fit_its_hparams_is_refused(tmp_path, micro, name, wrong):
    np.savez(tmp_path / "bad.npz", **{**np.load(micro), name: wrong})
    with pytest.raises(ValueError, match="bad.npz is not a model"):
        g.load_pretrained(tmp_path / "bad.npz")


# ---- 6.5 to 6.8 Head, LoRA, loss and accuracy, use ----

def test_head_and_what_trains_of_the_124m():
    with torch.device("meta"):
        model = GPTModel({"vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "n_heads": 12,
                          "n_layers": 12, "drop_rate": 0.0, "qkv_bias": True})
    g.add_classification_head(model, 2)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith(("trf_blocks.11.", "final_norm.", "out_head.")) for name in trained)
    assert sum(trained.values()) == 7_090_946
    assert sum(p.numel() for p in model.parameters()) == 124_441_346
    torch.manual_seed(123)
    torch.testing.assert_close(model.out_head.weight, nn.Linear(768, 2).weight)


@pytest.mark.parametrize("layers, names", [
    ("last_layer", ["out_head."]), ("all", [""]),
    ("last_two_blocks", ["out_head.", "final_norm.", "trf_blocks.1.", "trf_blocks.2."])])
def test_what_each_choice_of_layers_trains(layers, names):
    model = GPTModel(CFG)
    g.add_classification_head(model, 2, layers)
    assert all(p.requires_grad == name.startswith(tuple(names)) for name, p in model.named_parameters())


def test_lora_starts_unchanged_trains_every_linear_and_merges():
    torch.manual_seed(0)
    model, ids = GPTModel(CFG).eval(), torch.randint(50, (2, 12))
    g.add_classification_head(model, 2)
    before = model(ids)
    g.add_classification_head(model, 2, "lora", 3, 5)
    torch.testing.assert_close(model(ids), before)
    torch.manual_seed(123)
    nn.Linear(8, 2)  # the head comes first, then every A in the order of the modules
    query = model.trf_blocks[0].att.W_query
    lora = query.parametrizations.weight[0]
    torch.testing.assert_close(lora.A.data, nn.init.kaiming_uniform_(torch.empty(8, 3), a=math.sqrt(5)))
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    assert sum(name.endswith((".A", ".B")) for name in trained) == 2 * (3 * 6 + 1)
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).add_(torch.randn(()) * 0.1)
        x, plain = torch.randn(4, 8), query.parametrizations.weight.original
        torch.testing.assert_close(query(x), F.linear(x, plain, query.bias) + 5 * (x @ lora.A @ lora.B))
        logits = model(ids)
        g.merge_lora(model)
        torch.testing.assert_close(model(ids), logits)
    assert set(model.state_dict()) == {*GPTModel(CFG).state_dict(), "out_head.bias"}


def test_accuracy_of_a_plain_gpt_counts_messages_not_tokens():
    model = GPTModel(CFG)
    g.add_classification_head(model, 2)
    with torch.no_grad():
        model.out_head.weight.zero_()
        model.out_head.bias.copy_(torch.tensor([0.0, 1.0]))  # it always answers 1
    ids = torch.randint(50, (4, 12))
    loader = [(ids, torch.tensor([1, 0, 1, 1])), (ids[:1], torch.tensor([1]))]
    assert calc_accuracy_loader(loader, model, CPU) == 4 / 5
    assert calc_accuracy_loader(loader, model, CPU, num_batches=1) == 3 / 4


def test_loss_is_the_mean_of_batches_measured_in_eval_mode():
    torch.manual_seed(0)
    model, modes = GPTModel(CFG), []
    g.add_classification_head(model, 2)
    batches = [(torch.randint(50, (n, 12)), torch.randint(2, (n,))) for n in (4, 4, 1)]
    means = []
    for ids, labels in batches:
        probabilities = model(ids)[:, -1].softmax(dim=-1)
        means.append(-probabilities[torch.arange(len(ids)), labels].log().mean().item())
    model.register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    train_loss, val_loss = g.evaluate_model(model.train(), batches, batches[:2], CPU, 3)
    assert (train_loss, val_loss) == pytest.approx((sum(means) / 3, sum(means[:2]) / 2), rel=1e-5)
    assert modes == [False] * 5 and model.training


@pytest.mark.parametrize("classes, max_length, held_by", [
    (2, None, None), (2, 1025, None), (2, 0, None), (3, 10, None),
    (2, 10, {"padding": False}), (2, 10, {"token_pos": "first"}), (2, 11, {})])
def test_classify_review_refuses_what_would_be_another_answer(classes, max_length, held_by):
    model = GPTModel(BASE_CONFIG)
    g.add_classification_head(model, classes)
    if held_by is not None:
        g.Classifier(model, TOKENIZER, ["ham", "spam"], 10, **held_by)
    with pytest.raises(ValueError, match="train_dataset.max_length|Classifier.classify"):
        classify_review("hello", model, TOKENIZER, CPU, max_length)


# ---- Part 2: one call for all of it ----

def test_the_python_lines_of_the_readme_train_and_classify(micro, monkeypatch, capsys):
    """As they stand, but on the small checkpoint instead of the bundled model."""
    lines = re.search(r"```python\n(import gpt_spam\n.*?)```", (HERE / "README.md").read_text(), re.DOTALL)[1]
    assert lines.count("\n") == 5
    monkeypatch.chdir(HERE)
    load_pretrained = g.load_pretrained
    monkeypatch.setattr(g, "load_pretrained", lambda path: (*load_pretrained(micro)[:2], {"epochs": 1}))
    exec(lines, {})
    assert re.fullmatch(r"\[\('(ham|spam)', 0\.\d+\)\]", capsys.readouterr().out.splitlines()[-1])


def test_finetune_returns_a_classifier_and_its_accuracies():
    splits, _ = g.prepare_splits(small_frame())
    classifier, results = g.finetune(GPTModel(BASE_CONFIG), TOKENIZER, splits, epochs=1)
    assert results["examples_seen"] == 32
    for split, accuracy in zip(splits, results["final_accuracy"]):
        answers = [label for label, _ in classifier.classify(split["Text"])]
        assert accuracy == (split["Label"] == answers).mean()


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    model = GPTModel(BASE_CONFIG)
    g.add_classification_head(model, 2)
    return g.Classifier(model.eval(), TOKENIZER, ["ham", "spam"], 10)


@pytest.mark.parametrize("settings, error, said", [
    ({"epoch": 1}, TypeError, "'epoch'"), ({"token_pos": "middle"}, ValueError, "last, first, mean"),
    ({"epochs": 0}, ValueError, "at least 1"), ({"batch_size": 33}, ValueError, "33 is more than 32"),
    ({"context_length": 0}, ValueError, "got 0"), ({"context_length": -3}, ValueError, "got -3"),
    ({"model": "tiny.npz"}, TypeError, "expected a GPTModel"),
    ({"model": GPTModel(CFG)}, ValueError, "320 / 50 / 50 tokens")], ids=str)
def test_finetune_refuses_a_wrong_argument(settings, error, said):
    splits, _ = g.prepare_splits(small_frame())
    with pytest.raises(error, match=said):
        g.finetune(**{"model": GPTModel(BASE_CONFIG), "tokenizer": TOKENIZER, "splits": splits, **settings})


@pytest.mark.parametrize("texts", [5, None, pd.DataFrame({"Text": ["a"]}), [1], ["a", None], b"a"], ids=repr)
def test_predict_takes_nothing_but_texts(classifier, texts):
    with pytest.raises(TypeError, match="expected a string"):
        classifier.predict(texts)


def test_predict_takes_texts_in_any_common_form_and_classify_gives_the_likelier_label(classifier):
    texts = ["hello", "a message that is longer than ten tokens"]
    expected = classifier.predict(texts)
    for same in (tuple(texts), pd.Series(texts, index=[7, 3]), np.array(texts)):
        assert torch.equal(classifier.predict(same), expected)
    torch.testing.assert_close(classifier.predict(texts[0]), expected[:1])
    assert classifier.classify(texts) == [
        ("ham", ham) if ham > spam else ("spam", spam) for ham, spam in expected.tolist()]


def test_a_saved_classifier_answers_as_before_whatever_the_device_is_called(classifier, tmp_path):
    g.save_classifier(tmp_path / "c.pth", classifier)
    for device in ("cpu", CPU):
        loaded = g.load_classifier(tmp_path / "c.pth", device)
        assert torch.equal(loaded.predict(["hello", "x"]), classifier.predict(["hello", "x"]))
    with pytest.raises(TypeError, match="expected a Classifier"):
        g.save_classifier(tmp_path / "model.pth", classifier.model)
    assert os.listdir(tmp_path) == ["c.pth"]


# ---- Part 2: speed, against plain PyTorch ----

def last(logits, lengths):
    return logits[:, -1, :]


READERS = {"": last, "--token-pos first": lambda logits, lengths: logits[:, 0, :],
           "--token-pos mean": lambda logits, lengths: logits.mean(dim=1),
           "--no-padding": lambda logits, lengths: logits[torch.arange(len(logits)), lengths - 1, :]}


def plain_rows(frame, length):
    """Return (padded ids, how many are not padding, label) of each message, in plain Python."""
    rows = []
    for text, label in zip(frame["Text"], frame["Label"]):
        ids = TOKENIZER.encode_ordinary(text)[:length]
        rows.append((torch.tensor(ids + [319] * (length - len(ids))), len(ids), int(label == "spam")))
    return rows


@pytest.mark.parametrize("options, read", [*READERS.items(), *dict.fromkeys([
    "--no-causal-mask", "--balance weights", "--trainable-layers last_two_blocks", "--trainable-layers all",
    "--context-length 9"], last).items()])
def test_training_and_the_saved_classifier_equal_a_plain_loop(tmp_path, options, read):
    ours = train(tmp_path, "--eval-iter", 2, *options.split())
    frames = [pd.read_csv(tmp_path / "d" / f"{name}.csv", keep_default_na=False)
              for name in ("train", "validation", "test")]
    length = 9 if "9" in options else max(len(TOKENIZER.encode_ordinary(text)) for text in frames[0]["Text"])
    train_loader, val_loader, test_loader = [
        DataLoader(plain_rows(frame, length), 8, shuffle=frame is frames[0]) for frame in frames]
    model, *_ = g.load_pretrained(tmp_path / "w" / "folder-micro.npz")
    for block in model.trf_blocks:
        block.att.causal = options != "--no-causal-mask"
    g.add_classification_head(model, 2, options.split()[1] if "layers" in options else "last_block")
    spam = (frames[0]["Label"] == "spam").mean()
    weights = torch.tensor([0.5 / (1 - spam), 0.5 / spam], dtype=torch.float32)
    loss_of = nn.CrossEntropyLoss(weights if "weights" in options else None)

    def loss_and_right(ids, lengths, labels):
        logits = read(model(ids), lengths)
        return loss_of(logits, labels), logits.argmax(dim=-1) == labels

    torch.manual_seed(123)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    step, train_losses, val_losses = 0, [], []
    for _ in range(2):
        for batch in train_loader:
            optimizer.zero_grad()
            loss_and_right(*batch)[0].backward()
            optimizer.step()
            if step % 3 == 0:
                for loader, logged in ((train_loader, train_losses), (val_loader, val_losses)):
                    means = [loss_and_right(*batch)[0].item() for batch in g.islice(loader, 2)]
                    logged.append(sum(means) / len(means))
            step += 1
        list(train_loader), list(val_loader)  # the chapter's accuracies draw from the same random numbers
    assert losses(ours) == pytest.approx(train_losses + val_losses, abs=1e-4)
    for loader, accuracy in zip((val_loader, test_loader), ours["final_accuracy"][1:]):
        right = torch.cat([loss_and_right(*batch)[1] for batch in loader])
        assert accuracy == pytest.approx(right.float().mean().item())
    ids, lengths, _ = next(iter(test_loader))
    torch.testing.assert_close(classifier_in(tmp_path).predict(frames[2]["Text"][:8].tolist()),
                               read(model(ids), lengths).softmax(dim=-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_last_block_at_one_position_equals_the_block_in_values_and_gradients(causal, qkv_bias):
    torch.manual_seed(0)
    block = g.TransformerBlock({**CFG, "causal": causal, "qkv_bias": qkv_bias})
    x, positions = torch.randn(4, 12, 8, requires_grad=True), torch.tensor([0, 5, 11, 3])
    outs = [g.last_block_at(block, x, positions), block(x)[torch.arange(4), positions]]
    torch.testing.assert_close(*outs)
    weights = [p for name, p in block.named_parameters() if "W_key.bias" not in name]  # that changes nothing
    torch.testing.assert_close(*[torch.autograd.grad(out.square().sum(), [x, *weights]) for out in outs])


@pytest.mark.parametrize("changes", [
    "", "--trainable-layers last_layer", "--trainable-layers lora", "--token-pos mean", "--no-causal-mask",
    "--no-padding --batch-size 4", "--no-padding --batch-size 1 --token-pos mean",
    "--no-padding --batch-size 1 --no-causal-mask", "--weights random --trainable-layers all"])
def test_the_cache_changes_no_loss_and_no_accuracy(tmp_path, monkeypatch, changes):
    cached = train(tmp_path, *changes.split())
    monkeypatch.setattr(g.os, "sysconf", lambda name: 1)  # as if the memory were too small for a cache
    plain = train(tmp_path, *changes.split())
    assert losses(cached) == pytest.approx(losses(plain), abs=2e-5)
    for name in ("train_accuracy", "val_accuracy", "final_accuracy"):
        assert cached[name] == plain[name]


def test_bfloat16_stays_near_float32_and_reopens_bit_for_bit(tmp_path):
    full, half = (losses(train(tmp_path, "--dtype", dtype)) for dtype in ("float32", "bfloat16"))
    assert half == pytest.approx(full, abs=0.02) and half != full
    blocks = classifier_in(tmp_path).model.trf_blocks
    pretrained = g.load_pretrained(tmp_path / "w" / "folder-micro.npz")[0].trf_blocks[0].to(torch.bfloat16)
    torch.testing.assert_close(dict(blocks[0].state_dict()), dict(pretrained.state_dict()), rtol=0, atol=0)
    assert blocks[1].norm1.scale.dtype == torch.float32


@torch.no_grad()
def test_a_plain_gpt_runs_with_frozen_blocks_in_bfloat16(micro):
    model, ids = g.load_pretrained(micro)[0], torch.randint(320, (2, 12))
    full = model(ids)
    model.trf_blocks[:1].to(torch.bfloat16)
    torch.testing.assert_close(model(ids), full, atol=0.05, rtol=0)
    assert not torch.equal(model(ids), full)


def test_the_learning_rate_rises_and_falls_in_a_line(micro):
    model, tokenizer, _ = g.load_pretrained(micro)
    rates = []
    hook = register_optimizer_step_pre_hook(lambda adamw, *_: rates.append(adamw.param_groups[0]["lr"]))
    g.finetune(model, tokenizer, *g.prepare_splits(small_frame()), schedule="linear", lr=1)
    hook.remove()
    falling = [i / 18 for i in range(18, 0, -1)]
    assert rates == pytest.approx([1 / 2, 1, *falling])  # a tenth of the 20 steps up


def test_two_processes_and_accumulated_batches_train_as_one_large_batch(tmp_path):
    folders = [tmp_path / name for name in ("one", "accumulated", "two")]
    options = ("--epochs", 4, "--eval-freq", 1, "--batch-size", 32)  # all training messages
    one = train(folders[0], *options)
    train(folders[1], *options[:-1], 8, "--accumulation-steps", 4)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*torchrun, g.__file__, *train_arguments(folders[2], *options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.count("Training completed") == 1, done.stderr
    states = [classifier_in(folder).model.state_dict() for folder in folders]
    for name in [name for name in states[0] if "W_key.bias" not in name]:  # softmax ignores the keys' biases
        for other in states[1:]:
            torch.testing.assert_close(other[name], states[0][name], atol=1e-5, rtol=0)
    two = json.loads((folders[2] / "m.json").read_text())
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert one["final_accuracy"] == two["final_accuracy"]


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_equal_scikit_learn(classes):
    sk = pytest.importorskip("sklearn.metrics")
    rng, names = np.random.default_rng(classes), np.array([f"c{i}" for i in range(classes)])
    true = names[rng.integers(classes, size=300)]
    predicted = names[rng.integers(classes - 1, size=300)]  # one is never predicted
    accuracy, table, confusion = g.calc_metrics(true, predicted, names)
    theirs = sk.classification_report(true, predicted, output_dict=True, zero_division=0)
    assert accuracy == pytest.approx(theirs["accuracy"])
    for name in names:
        assert table.rename(columns={"f1": "f1-score"}).loc[name].to_dict() == pytest.approx(theirs[name])
    assert confusion.to_numpy().tolist() == sk.confusion_matrix(true, predicted).tolist()


# ---- Part 2: files ----

@pytest.mark.parametrize("faults", [[], [500], ["cut"], ["cut", "cut"], ["flip"], ["cut", "flip"]], ids=str)
def test_download_takes_the_backup_and_ends_right(server, tmp_path, faults):
    server.starts, server.faults = [], list(faults)
    g.download([f"{server.url}/missing", f"{server.url}/good"], tmp_path / "f", RIGHT)
    assert (tmp_path / "f").read_bytes() == CONTENT and os.listdir(tmp_path) == ["f"]
    assert any(server.starts) == ("cut" in faults), "a partial download is resumed"


@pytest.mark.parametrize("urls, error, said", [
    (["{url}/wrong"], OSError, "SHA-256"), ([f"{DEAD}/x", "{url}/missing"], OSError, "127.0.0.1:9: ConnectionError, .*404"),
    ([f"{DEAD}/x"], ConnectionError, f"{DEAD}/x"),
])
def test_a_download_that_fails_says_why_and_leaves_no_file(server, tmp_path, urls, error, said):
    (tmp_path / "f.part").write_bytes(CONTENT)  # longer than what the server has
    with pytest.raises(error, match=said) as caught:
        g.download([url.format(url=server.url) for url in urls], tmp_path / "f", RIGHT)
    assert caught.type is error and not (tmp_path / "f").exists()
    assert (tmp_path / "f.part").exists() == (said != "SHA-256")


@pytest.mark.parametrize("path, said", [(ARCHIVE, "SHA-256"), ("/wrong", "not the archive of the SMS data")])
def test_another_table_than_ucis_is_refused(server, tmp_path, path, said):
    with pytest.raises(OSError, match=said):
        download_and_unzip_spam_data(server.url + path, tmp_path / "a.zip", tmp_path, tmp_path / "a.tsv")
    assert os.listdir(tmp_path) == []


def test_an_error_inside_an_atomic_write_gets_out_and_leaves_what_was(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(FileNotFoundError, match="mine"), g.atomic_write(tmp_path / "f") as temporary:
        temporary.write_text("half")
        raise FileNotFoundError("mine")
    assert os.listdir(tmp_path) == ["f"] and (tmp_path / "f").read_text() == "old"


def test_a_damaged_checkpoint_that_was_downloaded_is_thrown_away(server, run, tmp_path, monkeypatch):
    args = train_arguments(tmp_path, "--mirror", server.url, model="355M")
    assert "SHA-256" in run(*args)[2]  # encoder.json is not GPT-2's
    damaged = (MICRO / g.DATA_FILE).read_bytes()[:-4]
    monkeypatch.setitem(server.files, f"/gpt-2/models/355M/{g.DATA_FILE}", damaged)
    status, _, err = run(*args, "--no-verify")
    assert status == 2 and "112,380 bytes" in err and not list((tmp_path / "w").rglob("*.*"))


def test_only_a_classifier_is_loaded_and_runs_no_code(classifier, tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch evil-was-here",)

    monkeypatch.chdir(tmp_path)
    g.save_classifier("bad.pth", classifier)
    good = torch.load("bad.pth", weights_only=True)
    for content in (Evil(), {**good, "about": Evil()}, {**good, "labels": ["a"]}, [1], good["model"]):
        torch.save(content, "bad.pth")
        with pytest.raises(ValueError, match="bad.pth is not a classifier"):
            g.load_classifier("bad.pth")
    assert os.listdir() == ["bad.pth"]


def test_a_state_dict_of_the_chapters_code_opens_with_its_model(classifier, micro, tmp_path):
    state = {**classifier.model.state_dict(), "trf_blocks.0.att.mask": torch.ones(3, 3)}
    torch.save(state, tmp_path / "review_classifier.pth")
    loaded = g.load_classifier(tmp_path / "review_classifier.pth", "cpu", micro)
    ids = (TOKENIZER.encode_ordinary("hello") + [319] * 120)[:120]
    plain = classifier.model(torch.tensor([ids]))[:, -1, :].softmax(dim=-1)
    torch.testing.assert_close(loaded.predict("hello"), plain)


# ---- Part 2: the command line ----

@pytest.fixture(scope="session")
def trained(server, tmp_path_factory):
    """`train` on a mirror that serves the micro checkpoint as 124M, and a small collection as UCI's."""
    folder = tmp_path_factory.mktemp("trained")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        metrics = train(folder, "--mirror", server.url, "--no-verify", "--plot", folder / "plots",
                        model="124M", data="auto")
    return folder, metrics, out.getvalue()


def test_train_from_a_mirror_writes_its_files_and_needs_no_network_again(trained):
    folder, metrics, _ = trained
    assert set(os.listdir(folder / "w")) == {"gpt2-124M.npz", "spam_classifier.pth"}
    splits = {"test.csv", "train.csv", "validation.csv"}
    assert set(os.listdir(folder / "d")) == {"SMSSpamCollection.tsv", *splits}
    for name in ("loss", "accuracy"):
        assert (folder / "plots" / f"{name}-plot.png").read_bytes().startswith(b"\x89PNG")
    assert train(folder, "--mirror", DEAD, model="124M", data="sms")["train_loss"] == metrics["train_loss"]


def test_train_prints_the_chapters_log_and_keeps_its_numbers(trained):
    _, metrics, out = trained
    assert re.search(r"Ep 1 \(Step 000000\): Train loss \d\.\d{3}, Val loss \d\.\d{3}", out)
    assert re.search(r"\nTraining accuracy: [\d.]+% \| Validation accuracy: [\d.]+%\n", out)
    accuracies = "{:.2%} / {:.2%} / {:.2%}".format(*metrics["final_accuracy"])
    assert f"Final accuracy, training / validation / test: {accuracies} (" in out
    counts = [len(metrics["train_loss"]), len(metrics["val_accuracy"]), metrics["examples_seen"]]
    assert counts == [3, 2, 64]


def test_own_labels_columns_and_test_table_are_found_again_from_any_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    df = small_frame()
    frame = pd.DataFrame({"stars": df["Label"].map({"ham": 5, "spam": 1}), "review": df["Text"]})
    frame.drop(frame.index[::4]).to_csv("r.csv", index=False)
    frame[::4].to_json("t.jsonl", orient="records", lines=True)
    options = ["--text-column", "review", "--label-column", "stars", "--test-data", "t.jsonl"]
    train(tmp_path, *options, data="r.csv")
    assert set(pd.read_csv("d/test.csv")["Label"]) == {1, 5}  # the labels as they were
    monkeypatch.chdir(HERE)
    status, out, err = run("evaluate", "--weights-dir", tmp_path / "w")
    assert re.search(r"(?s)test split: 12 messages.*\n5 ", out), err


def test_a_split_never_overwrites_the_data(trained, run, tmp_path):
    shutil.copytree(trained[0] / "d", tmp_path / "d")
    before = (tmp_path / "d" / "train.csv").read_bytes()
    assert "would be overwritten" in run(*train_arguments(tmp_path, data=tmp_path / "d" / "train.csv"))[2]
    assert (tmp_path / "d" / "train.csv").read_bytes() == before


@pytest.fixture
def use(trained, run):
    """Run a command with the trained classifier; return status, output and errors."""
    return lambda command, *args: run(command, "--weights-dir", trained[0] / "w", "--device", "cpu", *args)


def test_evaluate_measures_on_the_test_split_or_on_any_table(trained, use, tmp_path):
    accuracy = trained[1]["final_accuracy"][2]
    assert f"test split: 10 messages, accuracy {accuracy:.2%}" in use("evaluate")[1]
    assert "all: 32 messages" in use("evaluate", "--data", trained[0] / "d" / "train.csv")[1]
    (tmp_path / "o.csv").write_text("label,text\neggs,hi\n")
    assert "['eggs']" in use("evaluate", "--data", tmp_path / "o.csv")[2]


def test_lines_that_look_like_a_header_stay_lines(use, tmp_path):
    (tmp_path / "l.txt").write_text("Hey, text, me\nok, fine, then\n")
    lines = use("classify", "--input", tmp_path / "l.txt")[1].splitlines()
    assert [line.split("\t")[2] for line in lines] == ["Hey, text, me", "ok, fine, then"]


def test_a_column_of_standard_input_is_read(trained):
    command = f"printf 'id,body\n1,hello\n' | {sys.executable} {g.__file__} classify --text-column body"
    command += f" --weights-dir {trained[0] / 'w'} --device cpu"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.endswith("\thello\n"), done.stderr


def test_evaluate_refuses_data_that_changed_since_training(run, tmp_path):
    train(tmp_path)
    with open(tmp_path / "d.tsv", "a") as file:
        file.write("ham\tone more\n")
    status, _, err = run("evaluate", "--weights-dir", tmp_path / "w", "--device", "cpu")
    assert status == 2 and "SHA-256" in err


def test_finetuning_twice_asks_for_the_model_anew(micro):
    model, tokenizer, _ = g.load_pretrained(micro)
    g.finetune(model, tokenizer, g.prepare_splits(small_frame())[0], epochs=1)
    with pytest.raises(ValueError, match="320 / 320 / 2 tokens; load the model anew"):
        g.finetune(model, tokenizer, g.prepare_splits(small_frame())[0], epochs=1)


def test_evaluate_asks_for_data_where_training_left_no_trace(classifier, run, tmp_path):
    g.save_classifier(tmp_path / "c.pth", classifier)
    status, _, err = run("evaluate", "--classifier", tmp_path / "c.pth", "--device", "cpu")
    assert status == 2 and "set --data" in err


def test_classify_prints_label_probability_and_text(use):
    assert re.fullmatch(r"((ham|spam)\t[01]\.\d{4}\t.*\n){2}", use("classify", "hello there", "")[1])
    answers = [use("classify", "--threshold", threshold, "hello")[1].split()[0] for threshold in (0, 1)]
    assert answers == ["spam", "ham"]


@pytest.mark.parametrize("name, content, texts", [
    ("a.txt", "hello\n\n😀 ünï\n<|endoftext|>\n".encode() + b"x" * 100_000 + b"\nbroken\r\nwin",
     ["hello", "😀 ünï", "<|endoftext|>", "x" * 100_000, "broken", "win"]),
    ("a.csv", b'Id,Text\n1,"two\nlines"\n2,"b, c"\n', ["two lines", "b, c"]),
    ("a.tsv", b"text\tid\nhello\t1\nthere\t2\n", ["hello", "there"]),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800b"}\n', ["a", "b"]),  # pandas drops half a character
])
def test_classify_reads_files(use, tmp_path, name, content, texts):
    (tmp_path / name).write_bytes(content)
    status, out, err = use("classify", "--input", tmp_path / name)
    assert [line.split("\t")[2] for line in out.splitlines()] == texts, err


def test_a_broken_table_is_refused_before_any_answer(use, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnonsense\n')
    status, out, err = use("classify", "--input", tmp_path / "bad.jsonl")
    assert status == 2 and "bad.jsonl is not a table of texts" in err and not out


def test_by_token_reads_each_beginning_as_classify_does(trained, use):
    out = use("classify", "--by-token", "Win 😀\nnow", "")[1].splitlines()
    classifier = classifier_in(trained[0])
    ids = TOKENIZER.encode_ordinary("Win 😀\nnow")
    tokens, numbers = zip(*(line.split(" spam ") for line in out[:len(ids)]))
    assert "".join(map(str.rstrip, tokens)) == "Win" + "\ufffd" * 4 + "\\nnow"
    for end, number in enumerate(numbers, 1):
        padded = torch.tensor([ids[:end] + [319] * (classifier.max_length - end)])
        assert number.split()[0] == f"{classifier.model(padded)[0, -1].softmax(dim=0)[1]:.4f}"
    assert re.fullmatch(r"(ham|spam)\t[01]\.\d{4}\tWin 😀 now", out[len(ids)])
    assert re.fullmatch(r"(ham|spam)\t[01]\.\d{4}\t", out[-1])  # an empty text has no tokens


def test_standard_input_and_a_closed_pipe_that_ends_quietly(trained):
    classify = f"{sys.executable} {g.__file__} classify --weights-dir {trained[0] / 'w'} --input -"
    command = f"yes hello | head -20000 | {classify} | head -1; echo ${{PIPESTATUS[2]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert re.fullmatch(r"(ham|spam)\t[01]\.\d{4}\thello\n141\n", done.stdout) and done.stderr == ""


def test_experiments_print_the_books_accuracy_beside_ours(run, tmp_path):
    data = small_data(tmp_path / "d.tsv")
    places = ["--weights-dir", tmp_path / "w", "--data-dir", tmp_path / "d", "--device", "cpu"]
    rows = ["--epochs", 1, "--rows", 1, 16, 18, 19]
    _, out, err = run("experiments", "--model", MICRO, "--data", data, *places, *rows)
    assert "Row 16, 2 of 4: about 0 minutes left\n" in err
    table = [line.strip("| ").split(" | ") for line in out.splitlines()[2:]]
    assert [row[0] for row in table] == ["1", "16", "18", "19"], err
    assert [row[1] for row in table] == ["", "--no-padding", "", "--token-pos mean"]
    assert [row[5] for row in table] == ["95.00%", "98.33%", "95.00%", "96.33%"]
    assert table[0][2:5] == table[2][2:5]
    assert not (tmp_path / "d").exists()  # the chapter's splits are not these


def test_without_any_network_the_bundled_model_and_messages_are_used_and_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(g, "MODEL_URLS", [DEAD])
    monkeypatch.setattr(g, "DATA_URLS", [DEAD])
    places = ["train", "--weights-dir", tmp_path / "w", "--data-dir", tmp_path / "d"]
    status, out, err = run(*places, "--epochs", 1, "--no-padding")  # without padding, thus fast
    assert status == 0 and out.count("bundled model, not GPT-2") == 2, err  # at the start and the end
    assert "Changed from the chapter: epochs 1, padding False\n" in out
    assert "Settings of the bundled model: lr 0.001, schedule linear\n" in out
    assert err.count("(127.0.0.1:9: ConnectionError); ") == 2
    assert "tiny.npz is used instead\n" in err and "sample_sms.tsv is used instead\n" in err
    assert set(os.listdir(tmp_path / "w")) == {"spam_classifier.pth"}
    for asked in ("--model=124M", f"--mirror={DEAD}"):
        status, _, err = run(*places, asked)
        assert status == 2 and "cannot download" in err


def test_the_bundled_model_is_a_small_gpt_that_has_learned_english():
    model, tokenizer, suited = g.load_pretrained(g.TINY)
    assert g.TINY.stat().st_size <= 8_000_000 and model.cfg["context_length"] >= 256
    assert tokenizer.n_vocab == model.cfg["vocab_size"] and set(suited) <= set(g.finetune.__kwdefaults__)
    ids = text_to_token_ids("It was a dark night, and the rain fell on the roof of the house.", tokenizer)
    loss = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).item()
    assert loss < 0.7 * math.log(tokenizer.n_vocab)  # knowing nothing costs 8.3 nats
    card = (HERE / "weights" / "README.md").read_text()
    assert hashlib.sha256(g.TINY.read_bytes()).hexdigest() in card
    assert f"{g.TINY.stat().st_size:,} bytes" in card


def test_two_steps_of_pretraining_run_through(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(HERE / "weights")
    import pretrain_tiny
    config = {"vocab_size": 300, "context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 1,
              "drop_rate": 0.1, "qkv_bias": True}
    monkeypatch.setattr(pretrain_tiny, "CONFIG", config)
    monkeypatch.setattr(pretrain_tiny, "SEGMENT", 1)
    sample, path = small_data(tmp_path / "d.tsv"), tmp_path / "out.npz"
    options = ["--sample", sample, "--messages", sample, "--steps", 2, "--batch-size", 4, "--out", path]
    monkeypatch.setattr(sys, "argv", list(map(str, ["", HERE / "README.md", *options])))
    pretrain_tiny.main()
    model, tokenizer, _ = g.load_pretrained(path)
    assert model.cfg["n_layers"] == 1 and tokenizer.n_vocab == 300


@pytest.mark.parametrize("args, said", [
    (["train", "--model", "gpt5"], "no model 'gpt5': 124M, 355M"),
    (["train", "--device", "warp"], "no device 'warp'"),
    (["train", "--model", HERE / "data"], "not a checkpoint in OpenAI's layout"),
    (["train", "--model", "124M", "--mirror", DEAD], f"{DEAD}/gpt-2/models/124M/"),
    (["train", "--data", "nowhere.tsv"], "nowhere.tsv"), (["train", "--out", HERE], "cannot write"),
    (["train", "--data", MICRO / "vocab.bpe"], "no column 'label'"),
    (["train", "--lr", 1e30], "try a smaller --lr"), (["train", "--batch-size", 0], "at least 1, got 0"),
    (["train", "--no-padding", "--token-pos", "mean"], "requires --batch-size 1"),
    (["train", "--no-padding", "--no-causal-mask"], "requires --batch-size 1"),
    (["train", "--context-length", 9999], "9999 tokens, the longest training message or --context-length"),
    (["train", "--context-length", 0], "a number from 1, got"),
    (["classify", "--input", "a.txt", "hi"], "give texts or --input FILE, not both"),
    (["classify", "--classifier", "none.pth", "hi"], "none.pth is not a classifier"),
    (["classify", "--classifier", BUNDLED[0], "hi"], "is not a classifier"),
])
def test_bad_input_is_one_error_and_status_2(run, tmp_path, args, said):
    status, _, err = run(*(train_arguments(tmp_path, *args[1:]) if args[0] == "train" else args))
    assert status == 2 and said in err and err.count("\n") == 1


def test_an_unknown_option_is_an_error_with_status_2(capfd):
    with pytest.raises(SystemExit, match="2"):
        g.main(["train", "--lora-rnak", "4"])
    assert "--lora-rnak" in capfd.readouterr().err


# ---- Other people's files ----

WESTERN = g.read_messages(BUNDLED[0])
WESTERN = WESTERN[WESTERN["Text"].map(lambda text: text == text.encode("cp1252", "ignore").decode("cp1252"))]
POUNDS = WESTERN[WESTERN["Text"].str.contains("£")].head(40)
FORMS = {
    "utf8.csv": lambda df: df.to_csv(index=False).encode(),
    "bom.csv": lambda df: df.to_csv(index=False).encode("utf-8-sig"),
    "semicolon.csv": lambda df: df.to_csv(index=False, sep=";").encode(),
    "tab.txt": lambda df: df.to_csv(index=False, sep="\t").encode(),
    "crlf.csv": lambda df: df.to_csv(index=False, lineterminator="\r\n").encode(),
    "utf16.csv": lambda df: df.to_csv(index=False, sep="\t").encode("utf-16"),
    "windows.csv": lambda df: df.to_csv(index=False).encode("cp1252"),
    "lines.jsonl": lambda df: df.to_json(orient="records", lines=True, force_ascii=False).encode(),
    "array.json": lambda df: df.to_json(orient="records", force_ascii=False).encode(),
    "uci": lambda df: df[["Label", "Text"]].to_csv(index=False, header=False, sep="\t").encode(),
    "utf8.csv.gz": lambda df: gzip.compress(df.to_csv(index=False).encode()),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_row_and_pound_sign_arrives_from(tmp_path, name):
    (tmp_path / name).write_bytes(FORMS[name](POUNDS))
    assert g.read_messages(tmp_path / name).to_dict("list") == POUNDS.to_dict("list")


@pytest.mark.parametrize("name", FORMS)
def test_classify_reads_the_same_texts_from(trained, run, tmp_path, name):
    (tmp_path / name).write_bytes(FORMS[name](POUNDS))
    where = ["--weights-dir", trained[0] / "w", "--device", "cpu"]
    rows = run("classify", *where, "--input", tmp_path / name)[1].splitlines()
    assert [row.split("\t")[2] for row in rows] == [" ".join(text.split()) for text in POUNDS["Text"]]


def test_windows_1252_is_said_and_another_encoding_is_read_by_name(tmp_path, capsys):
    (tmp_path / "w.csv").write_bytes("label,text\nham,£5\n".encode("cp1252"))
    (tmp_path / "r.csv").write_bytes("label,text\nham,привет\n".encode("cp1251"))
    assert g.read_messages(tmp_path / "w.csv")["Text"].tolist() == ["£5"]
    assert "is read as Windows-1252" in capsys.readouterr().err
    assert g.read_messages(tmp_path / "r.csv", encoding="cp1251")["Text"].tolist() == ["привет"]


@pytest.mark.parametrize("content, said", [
    (b"PK\3\4\0\0\0\0", "a binary file, such as Excel, zip or Parquet"),
    (b"PAR1\0\0", "a binary file"), (b"\x1f\x8b\x08broken", "not a table of texts"),
])
def test_what_is_no_text_is_refused_in_one_line(tmp_path, content, said):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        g.read_messages(tmp_path / "a.csv")
    assert "\n" not in str(caught.value)


def test_labels_are_stripped_and_those_that_differ_in_case_are_named(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("label,text\nham ,a\n ham,b\nHam,c\n")
    assert g.read_messages(tmp_path / "a.csv")["Label"].tolist() == ["ham", "ham", "Ham"]
    assert "differ in case only: Ham, ham" in capsys.readouterr().err


def test_rows_without_a_label_are_counted_and_the_first_is_shown(tmp_path):
    (tmp_path / "a.csv").write_text("label,text\nham,a\n,lost\n ,b\n")
    with pytest.raises(ValueError, match="2 of 3 messages .* have no label, first 'lost'"):
        g.read_messages(tmp_path / "a.csv")


def test_a_csv_without_the_text_column_is_an_error_and_not_lines_of_text(trained, run, tmp_path):
    (tmp_path / "a.csv").write_text("review,stars\nfine,5\n")
    where = ["classify", "--weights-dir", trained[0] / "w", "--device", "cpu", "--input", tmp_path / "a.csv"]
    status, out, err = run(*where)
    assert status == 2 and not out and "no column 'text'" in err and "'review', 'stars'" in err
    assert run(*where, "--text-column", "review")[1].endswith("\tfine\n")


def test_lines_of_standard_input_are_answered_before_the_next_comes(trained):
    command = [sys.executable, g.__file__, "classify", "--weights-dir", trained[0] / "w", "--device", "cpu"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(list(map(str, command)), **pipes) as process:
        for text in ("one", "two", "three"):
            process.stdin.write(text + "\n")
            assert process.stdout.readline().endswith(f"\t{text}\n")
        process.stdin.close()
        assert process.stdout.read() == ""


# ---- Nothing silent, nothing lost ----

def test_a_classifier_with_a_flipped_bit_is_refused(trained, tmp_path):
    content = bytearray((trained[0] / "w" / "spam_classifier.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(ValueError, match="bad.pth is not a classifier"):
        g.load_classifier(tmp_path / "bad.pth")


@pytest.mark.parametrize("epochs", [0, -1])
def test_no_epoch_at_all_is_refused_and_the_classifier_kept(run, tmp_path, epochs):
    args = train_arguments(tmp_path)
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "spam_classifier.pth").write_text("kept")
    status, _, err = run(*args, "--epochs", epochs)
    assert status == 2 and "epochs must be at least 1" in err
    assert (tmp_path / "w" / "spam_classifier.pth").read_text() == "kept"


def test_what_is_replaced_is_named(run, tmp_path):
    args = train_arguments(tmp_path)
    assert "this replaces" not in run(*args)[2]
    _, _, err = run(*args)
    assert re.search(r"this replaces \S*spam_classifier.pth, \S*train.csv, \S*validation.csv, \S*test", err)


@pytest.mark.parametrize("option", ["--metrics", "--plot", "--out"])
def test_a_place_that_cannot_be_written_is_said_before_anything_is_read(run, tmp_path, option):
    (tmp_path / "file").write_text("in the way")
    args = train_arguments(tmp_path, data=tmp_path / "missing.csv")
    status, out, err = run(*args, option, tmp_path / "file" / "x")
    assert status == 2 and not out and "file" in err and "missing" not in err


def test_a_mistyped_column_is_said_before_the_model_is_fetched(run, tmp_path):
    args = train_arguments(tmp_path, "--mirror", DEAD, "--text-column", "txet", model="124M")
    assert "no column 'txet'" in run(*args)[2]


def test_the_final_accuracy_stands_beside_that_of_the_commonest_label(trained):
    test = pd.read_csv(trained[0] / "d" / "test.csv")["Label"]
    train_label = pd.read_csv(trained[0] / "d" / "train.csv")["Label"].mode()[0]
    assert f"(always '{train_label}': {(test == train_label).mean():.2%} of test)" in trained[2]


def test_more_than_two_labels_end_with_a_table_of_each(tmp_path, capsys):
    df = g.read_messages(small_data(tmp_path / "d.tsv"))
    df.loc[df.index[::3], "Label"] = "other"
    df.to_csv(tmp_path / "three.csv", index=False)
    train(tmp_path, data=tmp_path / "three.csv")
    out = capsys.readouterr().out
    assert re.search(r"(?s)precision +recall +f1 +support\nham .*\nother .*\nspam ", out)
    assert "of these labels: " + ", ".join(f"{k} {v}" for k, v in df["Label"].value_counts().items()) in out


def test_many_labels_are_shown_whole_and_errors_instead_of_a_matrix(trained, run, tmp_path):
    classifier = g.load_classifier(trained[0] / "w" / "spam_classifier.pth")
    classifier.labels = [f"label{i:02}" for i in range(30)]
    classifier.model.out_head = nn.Linear(16, 30)
    g.save_classifier(tmp_path / "many.pth", classifier)
    texts = g.read_messages(BUNDLED[0])["Text"][:90]
    pd.DataFrame({"Label": classifier.labels * 3, "Text": texts}).to_csv(tmp_path / "many.csv", index=False)
    files = ["--classifier", tmp_path / "many.pth", "--data", tmp_path / "many.csv"]
    _, out, _ = run("evaluate", *files, "--device", "cpu")
    assert all(f"\n{label} " in out for label in classifier.labels) and "Most frequent errors" in out
    assert "..." not in out


@pytest.mark.parametrize("args", [["--lr", 1e30], []])
def test_several_runs_of_two_processes_end_as_they_should(tmp_path, args):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run([*torchrun, g.__file__, *train_arguments(tmp_path, *args)], capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode != 0) == bool(args) and "without an active exception" not in done.stderr
    assert done.stderr.count("gpt_spam: error: the loss is") == bool(args)


# ---- A device that is not the CPU ----

class Elsewhere(torch.Tensor):
    """A tensor on another device: it wraps one on the CPU and, as on a GPU, mixes with none."""

    @staticmethod
    def __new__(cls, raw):
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), dtype=raw.dtype, device="elsewhere:0")

    def __init__(self, raw):
        self.raw = raw

    def tolist(self):
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        raw_args, raw_kwargs = pytree.tree_map_only(cls, lambda tensor: tensor.raw, (args, kwargs))
        target = raw_kwargs.pop("device", torch.device("elsewhere"))
        if function is torch.ops.aten._to_copy.default:
            moved = function(*raw_args, **raw_kwargs)
            return cls(moved) if target.type == "elsewhere" else moved
        if function is torch.ops.aten.copy_.default:
            raw_args[0].copy_(raw_args[1])
            return args[0]
        if any(not isinstance(tensor, cls) and tensor.dim() > 0 for tensor in tensors):
            raise RuntimeError("Expected all tensors to be on the same device")
        known = {id(tensor.raw): tensor for tensor in tensors if isinstance(tensor, cls)}
        return pytree.tree_map_only(
            torch.Tensor, lambda raw: known[id(raw)] if id(raw) in known else cls(raw),
            function(*raw_args, **raw_kwargs))


def train_elsewhere():
    """Train, save, load and classify on the CPU and on that device; both must give the same."""
    _setup_privateuseone_for_python_backend("elsewhere")
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a wrapper's content cannot be swapped
    library = torch.library.Library("aten", "IMPL")
    for make in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default):
        library.impl(make, lambda *args, make=make, **kwargs: Elsewhere(
            make(*args, **{**kwargs, "device": CPU, "pin_memory": False})), "PrivateUse1")
    with tempfile.TemporaryDirectory() as folder:
        npz, pth = Path(folder, "micro.npz"), Path(folder, "c.pth")
        g.convert_checkpoint(MICRO, npz)
        layers = [{"trainable_layers": name} for name in g.CHOICES["trainable_layers"]]
        positions = [{"token_pos": name} for name in g.CHOICES["token_pos"]]
        others = [{"dtype": "bfloat16"}, {"padding": False}, {"causal_mask": False},
                  {"weights": "random", "trainable_layers": "all"}]
        for settings in layers + positions + others:
            found = []
            for device in ("cpu", "elsewhere"):
                model, tokenizer, _ = g.load_pretrained(npz)
                splits, class_weights = g.prepare_splits(small_frame(), "weights")
                classifier, results = g.finetune(
                    model, tokenizer, splits, class_weights, device, epochs=1, eval_freq=3, **settings)
                g.save_classifier(pth, classifier)
                again = g.load_classifier(pth, device)
                for tensor in [*classifier.model.parameters(), *again.model.parameters()]:
                    assert tensor.device.type == device
                probabilities = again.predict(["hello", "win a prize"])[:, 0].tolist()
                found.append(results["train_loss"] + probabilities)
            tolerance = 1e-2 if "dtype" in settings else 1e-5
            np.testing.assert_allclose(*found, rtol=0, atol=tolerance, err_msg=str(settings))


def test_every_setting_works_on_a_device_that_is_not_the_cpu():
    code = "import test_gpt_spam; test_gpt_spam.train_elsewhere()"  # that process keeps the device
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- The rest ----

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


@pytest.mark.skipif(not os.environ.get("GPT_SPAM_ONLINE"), reason="downloads: set GPT_SPAM_ONLINE=1")
def test_numbers_printed_in_the_chapter(run, tmp_path):
    path = tmp_path / "m.json"
    _, out, err = run("train", "--model", "124M", "--data", "sms", "--device", "cpu", "--metrics", path)
    assert "forward.\\n\\nThe first step is to understand the importance of your work" in out, err
    assert "accuracy 46.25% / 45.00% / 48.75% (10 batches), loss 2.453 / 2.583 / 2.322" in out
    metrics = json.loads(path.read_text())
    assert (metrics["train_loss"][0], metrics["val_loss"][0]) == pytest.approx((2.153, 2.392), abs=6e-4)
    assert (metrics["train_loss"][12], metrics["val_loss"][12]) == pytest.approx((0.083, 0.074), abs=6e-4)
    assert [round(100 * accuracy, 2) for accuracy in metrics["final_accuracy"]] == [97.21, 97.32, 95.67]


if __name__ == "__main__":
    sys.exit(pytest.main(["-q", *sys.argv]))
