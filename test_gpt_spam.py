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
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import requests
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from urllib3 import HTTPResponse

import gpt_spam as g
from gpt_spam import (  # what the book's own calls need
    GPTModel, MultiHeadAttention, SpamDataset, calc_accuracy_loader, calc_loss_batch, classify_review,
    create_balanced_dataset, download_and_load_gpt2, download_and_unzip_spam_data, generate_text_simple,
    load_weights_into_gpt, plot_values, random_split, replace_linear_with_lora, text_to_token_ids,
    token_ids_to_text, train_classifier_simple)

HERE = Path(__file__).resolve().parent
SOURCE, README = Path(g.__file__).read_text("utf-8"), (HERE / "README.md").read_text("utf-8")
MICRO = HERE / "weights" / "micro"  # 2 layers, 16 wide, 320 tokens; written by TensorFlow 2.21
ENCODER, MERGES = (MICRO / "encoder.json").read_text(), (MICRO / "vocab.bpe").read_text()
TOKENIZER = g.build_tokenizer(ENCODER)
BUNDLED = [HERE / name for name in ("data/sample_sms.tsv", "data/hard_sms.tsv", "weights/messages.tsv")]
MESSAGES = g.read_messages(BUNDLED[0])
CFG = {"vocab_size": 50, "context_length": 12, "emb_dim": 8, "n_heads": 2, "n_layers": 3, "drop_rate": 0.0,
       "qkv_bias": True}
BASE_CONFIG = {"vocab_size": 320, "context_length": 1024, "drop_rate": 0.0, "qkv_bias": True,
               "emb_dim": 16, "n_layers": 2, "n_heads": 2}  # of the micro checkpoint
CPU = torch.device("cpu")
DEAD = "http://127.0.0.1:9"  # nobody listens there


# ---- What the tests share ----

def small_frame(ham=23):
    """Return short bundled messages: `ham` ham and 23 spam; of 23 each, 32 are trained on, 10 tested."""
    df = MESSAGES[MESSAGES["Text"].str.len().between(10, 40)]
    return pd.concat([df[df["Label"] == "ham"][:ham], df[df["Label"] == "spam"][:23]])


def as_uci(df):
    """Return a frame in the form of UCI's collection."""
    return df[["Label", "Text"]].to_csv(sep="\t", header=False, index=False).encode()


def train_arguments(folder, *args, data=None, model=MICRO):
    """Return the command line of a short training on a small checkpoint, all its files in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "d.tsv").write_bytes(as_uci(small_frame()))
    files = ["--data", data or folder / "d.tsv", "--metrics", folder / "m.json"]
    folders = ["--weights-dir", folder / "w", "--data-dir", folder / "d"]
    short = ["--device", "cpu", "--epochs", 2, "--eval-freq", 3, "--lr", 1e-3]
    return list(map(str, ["train", "--model", model, *files, *folders, *short, *args]))


def train(folder, *args, **kwargs):
    """Run it in this process; return the metrics."""
    assert g.main(train_arguments(folder, *args, **kwargs)) == 0
    return json.loads((folder / "m.json").read_text())


def torchrun(*args):
    """Run gpt_spam.py as two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    return subprocess.run([*command, g.__file__, *args], capture_output=True, text=True)


def losses(metrics):
    return metrics["train_loss"] + metrics["val_loss"]


def classifier_in(folder):
    return g.load_classifier(folder / "w" / "spam_classifier.pth")


def with_head(config=CFG, classes=2):
    """Return a model of random weights that classifies."""
    model = GPTModel(config)
    g.add_classification_head(model, classes)
    return model


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return g.Classifier(with_head(BASE_CONFIG).eval(), TOKENIZER, ["ham", "spam"], 10)


@pytest.fixture
def run(capfd):
    """Run the command line in this process; return its status, output and errors since the last time."""
    return lambda *args: (g.main(list(map(str, args))), *capfd.readouterr())


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    """The micro checkpoint, converted; its name is that of the 124M, which is thus not downloaded."""
    path = tmp_path_factory.mktemp("micro") / "gpt2-124M.npz"
    g.convert_checkpoint(MICRO, path)
    return path


CONTENT = np.random.default_rng(0).bytes(3_000_000)
RIGHT = g.partial(g.check_sha256, expected=hashlib.sha256(CONTENT).hexdigest())
TABLE = as_uci(small_frame(ham=30))  # stands for UCI's
ARCHIVE = "/static/public/228/sms+spam+collection.zip"


@pytest.fixture(scope="session")
def server():
    """Has CONTENT, TABLE in UCI's archive and the micro checkpoint; `faults` befall its first answers."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("../evil", "never unpacked")
        zipped.writestr("SMSSpamCollection", TABLE)
    files = {f"/gpt-2/models/{size}/{name}": (MICRO / name).read_bytes()
             for size in ("124M", "355M") for name in (*g.TEXT_FILES, g.DATA_FILE)}
    files |= {"/good": CONTENT, "/wrong": b"<html>log in</html>", ARCHIVE: archive.getvalue()}
    server = SimpleNamespace(files=files, faults=[], starts=[], url="http://server")

    def send(adapter, request, **options):
        if not request.url.startswith(server.url):
            raise requests.ConnectionError("no network")
        content, start = files.get(request.path_url), int(request.headers["Range"][len("bytes="):-1])
        fault = server.faults.pop(0) if content and server.faults else None
        server.starts.append(start)
        status = 404
        if content:
            status = 206 if start < len(content) else 416
        status = 500 if fault == 500 else status
        body = content[start:] if status == 206 else b""
        sent = {"cut": body[:len(body) // 2], "reversed": body[::-1]}.get(fault, body)
        answer = HTTPResponse(io.BytesIO(sent), {"Content-Length": str(len(body))}, status,
                              preload_content=False, enforce_content_length=True)
        return adapter.build_response(request, answer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(g.time, "sleep", lambda seconds: None)
        patch.setattr(requests.adapters.HTTPAdapter, "send", send)
        yield server


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
    settings, params = download_and_load_gpt2(model_size="124M", models_dir=str(micro.parent))
    assert settings == {"n_vocab": 320, "n_ctx": 1024, "n_embd": 16, "n_head": 2, "n_layer": 2}
    model = GPTModel(BASE_CONFIG)
    load_weights_into_gpt(model, params)
    for param in model.parameters():
        param.requires_grad = False
    torch.manual_seed(123)
    model.out_head = torch.nn.Linear(in_features=BASE_CONFIG["emb_dim"], out_features=2)
    for param in [*model.trf_blocks[-1].parameters(), *model.final_norm.parameters()]:
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
    batch, d_in, d_out, context_length = torch.rand(2, 6, 3), 3, 2, 6
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
    right = []  # of each message, 8 and 2 in a batch
    for input_batch, target_batch in book.test_loader:
        logits = spam_model(input_batch)[:, -1, :]
        right += (logits.argmax(dim=-1) == target_batch).tolist()
        loss = calc_loss_batch(input_batch, target_batch, spam_model, book.device)
        torch.testing.assert_close(loss, F.cross_entropy(logits, target_batch))
    for num_batches, counted in ((1, right[:8]), (10, right)):
        accuracy = calc_accuracy_loader(book.test_loader, spam_model, book.device, num_batches=num_batches)
        assert accuracy == sum(counted) / len(counted)


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


def test_each_section_is_a_cell_and_they_run_one_after_the_other_in_one_namespace(capsys):
    cells = re.split(r"^# %%\n", SOURCE, flags=re.MULTILINE)
    assert [cell.startswith("# ---- ") for cell in cells[1:]] == [True] * SOURCE.count("\n# ---- ")
    space = {"__name__": "notebook", "__file__": g.__file__}
    for cell in cells:
        exec(compile(cell, "cell", "exec"), space)
    assert space["main"]([]) == 0 and "classify" in capsys.readouterr().out


# ---- 6.2 Data set ----

THREE = pd.DataFrame({"Label": ["b"] * 20 + ["a"] * 60 + ["c"] * 10, "Text": [str(i) for i in range(90)]})


def test_balanced_data_and_splits_are_the_chapters():
    df = pd.DataFrame({"Label": ["ham"] * 170 + ["spam"] * 60, "Text": [str(i) for i in range(230)]})
    chapter = pd.concat([df[df["Label"] == "ham"].sample(60, random_state=123), df[df["Label"] == "spam"]])
    pd.testing.assert_frame_equal(create_balanced_dataset(df), chapter)
    frames, weights = g.prepare_splits(df)
    assert list(map(len, frames)) == [84, 12, 24] and weights is None
    shuffled = chapter.sample(frac=1, random_state=123, ignore_index=True)
    pd.testing.assert_frame_equal(pd.concat(frames), shuffled)


def test_other_labels_are_weighted_or_undersampled():
    frames, weights = g.prepare_splits(THREE)
    assert [len(frame) for frame in frames] == [62, 9, 19]
    counts = frames[0]["Label"].value_counts()
    assert weights.tolist() == pytest.approx([62 / 3 / counts[label] for label in "abc"])
    assert g.prepare_splits(THREE[THREE["Label"] != "c"])[1] is not None
    frames, weights = g.prepare_splits(THREE, "undersample")
    assert [len(frame) for frame in frames] == [21, 3, 6] and weights is None


def test_a_test_frame_of_ones_own_leaves_all_else_to_training_and_validation():
    test = pd.DataFrame({"Label": ["c", "a"], "Text": ["x", "5"]})
    frames, _ = g.prepare_splits(THREE, "none", test)
    assert sorted(pd.concat(frames[:2])["Text"]) == sorted(THREE["Text"])
    assert len(frames[0]) == 78 and frames[2] is test
    with pytest.raises(ValueError, match="'d'"):
        g.prepare_splits(THREE, test=test.assign(Label="d"))


def test_a_label_without_a_training_message_is_named(capsys):
    frames, _ = g.prepare_splits(pd.concat([THREE, pd.DataFrame({"Label": ["d"], "Text": ["once"]})]))
    assert "d" not in set(frames[0]["Label"]) and "has the labels ['d']" in capsys.readouterr().err


@pytest.mark.parametrize("frame", [
    THREE.rename(columns=str.lower), THREE.assign(Text=5), THREE.assign(Label=[None, *THREE["Label"][1:]])])
def test_a_frame_without_labels_and_texts_is_refused(frame):
    with pytest.raises(ValueError, match="Label and Text|needs a label"):
        g.prepare_splits(frame)


def test_a_mistyped_balance_is_an_error():
    with pytest.raises(ValueError, match="balance must be one of auto, .*'weight'"):
        g.prepare_splits(THREE, "weight")


@pytest.mark.skipif(not (HERE / "data" / "SMSSpamCollection.tsv").exists(), reason="it is not here")
def test_counts_of_the_sms_spam_collection():
    df = g.read_messages(HERE / "data" / "SMSSpamCollection.tsv")
    assert df["Label"].value_counts().to_dict() == {"ham": 4825, "spam": 747}
    assert [len(split) for split in g.prepare_splits(df)[0]] == [1045, 149, 300]
    assert not any(g.read_messages(file)["Text"].isin(df["Text"]).any() for file in BUNDLED)


def test_no_two_bundled_messages_share_over_half_of_their_words():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    frames = [g.read_messages(file) for file in BUNDLED]
    assert len(frames[0]) >= 1400 and len(frames[1]) >= 250
    assert frames[0]["Label"].value_counts().nunique() == 1
    words = text.CountVectorizer(binary=True, token_pattern=r"\w+").fit_transform(pd.concat(frames)["Text"])
    shared = (words @ words.T).toarray()  # words that two messages share, on the diagonal a message's own
    sizes = shared.diagonal()
    alike = np.triu(shared > 0.5 * (sizes[:, None] + sizes - shared), 1)
    assert np.argwhere(alike).tolist() == []


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


def test_dataset_pads_to_the_longest_and_cuts(tmp_path):
    frame = pd.DataFrame({"Text": ["a", "abcabcabc", ""], "Label": [0, 1, 0]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    short, long = TOKENIZER.encode_ordinary("a"), TOKENIZER.encode_ordinary("abcabcabc")

    def ids_of(data=frame, **options):
        return [ids.tolist() for ids, _ in SpamDataset(data, TOKENIZER, **options)]

    padded = [short + [319] * (len(long) - 1), long, [319] * len(long)]
    assert ids_of() == padded == ids_of(tmp_path / "a.csv")
    assert ids_of(max_length=3, pad_token_id=7) == [[*short, 7, 7], long[:3], [7, 7, 7]]
    assert ids_of(padding=False) == [short, long, [319]]
    dataset = SpamDataset(frame, TOKENIZER)
    assert [label.item() for _, label in dataset] == dataset.labels.tolist() == [0, 1, 0]
    assert dataset.max_length == len(long) > 4
    assert 319 not in ids_of(frame.assign(Text="<|endoftext|>"))[0]
    with pytest.raises(ValueError, match="'ham'"):
        SpamDataset(frame.assign(Label="ham"), TOKENIZER)


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


def test_every_tensor_is_what_tensorflow_wrote(micro):
    model, tokenizer, suited = g.load_pretrained(micro)
    tensors = {"wte": model.tok_emb.weight, "wpe": model.pos_emb.weight,
               "ln_f/g": model.final_norm.scale, "ln_f/b": model.final_norm.shift}
    for i, block in enumerate(model.trf_blocks):
        for name, norm in (("ln_1", block.norm1), ("ln_2", block.norm2)):
            tensors |= {f"h{i}/{name}/g": norm.scale, f"h{i}/{name}/b": norm.shift}
        att, (inner, _, outer) = block.att, block.ff.layers
        for name, layers in (("attn/c_attn", [att.W_query, att.W_key, att.W_value]),
                             ("attn/c_proj", [att.out_proj]), ("mlp/c_fc", [inner]), ("mlp/c_proj", [outer])):
            tensors[f"h{i}/{name}/w"] = torch.cat([layer.weight for layer in layers]).T[None]
            tensors[f"h{i}/{name}/b"] = torch.cat([layer.bias for layer in layers])
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.detach(), micro_values(name, *tensor.shape), err_msg=name)
    assert torch.equal(model.out_head.weight, model.tok_emb.weight)
    assert sum(map(torch.numel, tensors.values())) == 112_384 / 4  # all that the file has
    assert model.cfg == {**BASE_CONFIG, "causal": True} and not model.training
    assert tokenizer.n_vocab == 320 and suited == {}


@pytest.mark.parametrize("file, change, said", [
    (g.DATA_FILE, lambda b: b[:-4], r"112,380 bytes.*112,384"),
    (g.DATA_FILE, lambda b: b + b"more", "112,388 bytes"),
    (g.DATA_FILE, lambda b: b[:4000] + b"\0\0\xc0\x7f" + b[4004:], "NaN or infinity"),
    ("hparams.json", lambda b: b.replace(b"320", b"321"), r"112,384 bytes.*112,448"),
    ("hparams.json", lambda b: b"<html>", "Expecting value"),
    ("encoder.json", lambda b: b[:100], "not a checkpoint"),
    ("encoder.json", lambda b: b.replace(b": 319", b": 320"), "does not end with"),
    ("encoder.json", lambda b: b[:50] + b"\xff" + b[51:], "utf-8"),
], ids=str)
def test_a_damaged_checkpoint_is_refused(tmp_path, file, change, said):
    shutil.copytree(MICRO, tmp_path / "changed")
    (tmp_path / "changed" / file).write_bytes(change((MICRO / file).read_bytes()))
    with pytest.raises(ValueError, match=said):
        g.convert_checkpoint(tmp_path / "changed", tmp_path / "out.npz")
    assert os.listdir(tmp_path) == ["changed"]


@pytest.mark.parametrize("name, wrong", [
    ("tok_emb.weight", np.zeros((3, 3), np.float32)), ("pos_emb.weight", np.array([{}], dtype=object)),
    ("encoder.json", np.frombuffer(b"{}", np.uint8)),
    ("hparams.json", np.frombuffer((MICRO / "hparams.json").read_bytes().replace(b" 2", b" 9"), np.uint8)),
], ids=["shape", "object", "tokens", "layers"])
def test_an_npz_that_does_not_fit_its_hparams_is_refused(tmp_path, micro, name, wrong):
    np.savez(tmp_path / "bad.npz", **{**np.load(micro), name: wrong})
    with pytest.raises(ValueError, match="bad.npz is not a model") as caught:
        g.load_pretrained(tmp_path / "bad.npz")
    assert "\n" not in str(caught.value)


# ---- 6.5 to 6.8 Head, LoRA, loss and accuracy, use ----

@pytest.mark.parametrize("layers, names, count", [
    ("last_layer", ["out_head."], 1538), ("all", [""], 124_441_346),
    ("lora", ["out_head.", "trf_blocks."], 1_334_802),  # 8 * (inputs + outputs) of each layer, and the head
    ("last_block", ["out_head.", "final_norm.", "trf_blocks.11."], 7_090_946),
    ("last_two_blocks", ["out_head.", "final_norm.", "trf_blocks.10.", "trf_blocks.11."], 14_178_818)])
def test_head_and_what_trains_of_the_124m(layers, names, count):
    with torch.device("meta"):
        model = GPTModel({**BASE_CONFIG, "vocab_size": 50257, "emb_dim": 768, "n_heads": 12, "n_layers": 12})
    g.add_classification_head(model, 2, layers)
    trained = {name: param.numel() for name, param in model.named_parameters() if param.requires_grad}
    assert all(name.startswith(tuple(names)) for name in trained) and sum(trained.values()) == count
    torch.manual_seed(123)
    torch.testing.assert_close(model.out_head.weight, nn.Linear(768, 2).weight)


def test_lora_adds_alpha_times_a_times_b():
    model = with_head()
    g.add_classification_head(model, 2, "lora", 3, 5)
    query = model.trf_blocks[0].att.W_query
    lora, plain = query.parametrizations.weight[0], query.parametrizations.weight.original
    torch.manual_seed(123)
    nn.Linear(8, 2)  # the head comes first, then every A in the order of the modules
    torch.testing.assert_close(lora.A.data, nn.init.kaiming_uniform_(torch.empty(8, 3), a=math.sqrt(5)))
    nn.init.normal_(lora.B)
    x = torch.randn(4, 8)
    torch.testing.assert_close(query(x), F.linear(x, plain, query.bias) + 5 * (x @ lora.A @ lora.B))


def test_loss_is_the_mean_of_batches_and_measured_in_eval_mode_like_accuracy():
    torch.manual_seed(0)
    model, modes = with_head(), []
    batches = [(torch.randint(50, (n, 12)), torch.randint(2, (n,))) for n in (4, 4, 1)]
    means = [F.cross_entropy(model(ids)[:, -1], labels).item() for ids, labels in batches]
    model.register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    train_loss, val_loss = g.evaluate_model(model.train(), batches, batches[:2], CPU, 3)
    assert (train_loss, val_loss) == pytest.approx((sum(means) / 3, sum(means[:2]) / 2), rel=1e-5)
    assert model.training
    calc_accuracy_loader(batches, model, CPU)
    assert modes == [False] * 8


@pytest.mark.parametrize("classes, max_length, held_by", [
    (2, None, None), (2, 1025, None), (2, 0, None), (3, 10, None),
    (2, 10, {"padding": False}), (2, 10, {"token_pos": "first"}), (2, 11, {})])
def test_classify_review_refuses_what_would_be_another_answer(classes, max_length, held_by):
    model = with_head(BASE_CONFIG, classes)
    if held_by is not None:
        g.Classifier(model, TOKENIZER, ["ham", "spam"], 10, **held_by)
    with pytest.raises(ValueError, match="train_dataset.max_length|Classifier.classify"):
        classify_review("hello", model, TOKENIZER, CPU, max_length)


# ---- Part 2: one call for all of it ----

def test_the_python_lines_of_the_readme_train_and_classify(micro, monkeypatch, capsys, tmp_path):
    """As they stand, but on the small checkpoint instead of the bundled model."""
    training, use = re.findall(r"```python\n(import gpt_spam\n.*?)```", README, re.DOTALL)
    assert training.count("\n") == 5 and use.count("\n") == 3
    model, tokenizer, _ = g.load_pretrained(micro)
    monkeypatch.setattr(g, "load_pretrained", lambda path: (model, tokenizer, {"epochs": 1}))
    monkeypatch.chdir(HERE)
    made = {}
    exec(training, made)
    assert re.fullmatch(r"\[\('(ham|spam)', 0\.\d+\)\]", capsys.readouterr().out.splitlines()[-1])
    monkeypatch.chdir(tmp_path)
    g.save_classifier("weights/spam_classifier.pth", made["classifier"])
    exec(use, {})
    assert re.fullmatch(r"(.\('(ham|spam)', 0\.\d+\).){2}\n", capsys.readouterr().out)


@pytest.mark.parametrize("settings, error, said", [
    ({"epoch": 1}, TypeError, "'epoch'"), ({"token_pos": "middle"}, ValueError, "last, first, mean"),
    ({"epochs": 0}, ValueError, "at least 1"), ({"batch_size": 33}, ValueError, "33 is more than 32"),
    ({"context_length": 0}, ValueError, "got 0"), ({"context_length": -3}, ValueError, "got -3"),
    ({"model": "tiny.npz"}, TypeError, "expected a GPTModel"),
    ({"model": GPTModel(CFG)}, ValueError, "320 / 50 / 50 tokens"),
    ({"model": GPTModel({**BASE_CONFIG, "drop_rate": 0.1})}, ValueError, "drop_rate must be 0.0"),
    ({"model": with_head(BASE_CONFIG)}, ValueError, "320 / 320 / 2 tokens; load the model anew")], ids=str)
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


def test_only_a_whole_classifier_is_loaded_or_saved_and_runs_no_code(classifier, tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch evil-was-here",)

    monkeypatch.chdir(tmp_path)
    g.save_classifier("bad.pth", classifier)
    good, content = torch.load("bad.pth", weights_only=True), bytearray(Path("bad.pth").read_bytes())
    content[len(content) // 2] ^= 1
    Path("bad.pth").write_bytes(content)
    for bad in ("one bit", Evil(), {**good, "about": Evil()}, {**good, "labels": ["a"]}, [1], good["model"]):
        if bad != "one bit":
            torch.save(bad, "bad.pth")
        with pytest.raises(ValueError, match="bad.pth is not a classifier"):
            g.load_classifier("bad.pth")
    with pytest.raises(TypeError, match="expected a Classifier"):
        g.save_classifier("model.pth", classifier.model)
    assert os.listdir() == ["bad.pth"]


def test_a_classifier_with_labels_of_pandas_and_lora_reopens(tmp_path):
    numbers = small_frame()["Label"].map({"ham": 0, "spam": 1}).astype("Int64")
    splits, _ = g.prepare_splits(small_frame().assign(Label=numbers), "none")
    made, _ = g.finetune(GPTModel(BASE_CONFIG), TOKENIZER, splits, epochs=1)
    replace_linear_with_lora(made.model, rank=2, alpha=2)
    expected = made.predict("hello")
    g.save_classifier(os.devnull, made)
    g.save_classifier(tmp_path / "c.pth", made)
    reopened = g.load_classifier(tmp_path / "c.pth")
    assert reopened.labels == [0, 1] and torch.equal(reopened.predict("hello"), expected)


@pytest.mark.parametrize("about, disk, error", [
    ({}, RuntimeError("unexpected pos"), OSError),
    ({"path": Path("a")}, None, pickle.UnpicklingError)], ids=str)
def test_what_cannot_be_saved_or_reopened_is_an_error_at_once(
        classifier, tmp_path, monkeypatch, about, disk, error):
    def full_disk(content, file):
        raise disk

    if disk:
        monkeypatch.setattr(torch, "save", full_disk)
    classifier.about = about
    (tmp_path / "c.pth").write_text("the classifier before")
    with pytest.raises(error):
        g.save_classifier(tmp_path / "c.pth", classifier)
    assert (tmp_path / "c.pth").read_text() == "the classifier before" and os.listdir(tmp_path) == ["c.pth"]


def test_a_text_that_is_longer_than_in_training_is_cut_with_a_note(classifier, capsys):
    g.note.cache_clear()
    classifier.predict("short")
    assert capsys.readouterr().err == ""
    classifier.predict(["a message that is longer than ten tokens"] * 2)
    assert capsys.readouterr().err.count("are cut to 10 tokens") == 1


def test_a_state_dict_of_the_chapters_code_opens_with_its_model(classifier, micro, tmp_path):
    state = {**classifier.model.state_dict(), "trf_blocks.0.att.mask": torch.ones(3, 3)}
    torch.save(state, tmp_path / "review_classifier.pth")
    loaded = g.load_classifier(tmp_path / "review_classifier.pth", "cpu", micro)
    ids = (TOKENIZER.encode_ordinary("hello") + [319] * 120)[:120]
    plain = classifier.model(torch.tensor([ids]))[:, -1, :].softmax(dim=-1)
    torch.testing.assert_close(loaded.predict("hello"), plain)


# ---- Part 2: speed, against plain PyTorch ----

READERS = {"last": lambda logits: logits[-1], "first": lambda logits: logits[0],
           "mean": lambda logits: logits.mean(dim=0)}  # logits (tokens, classes) of one message
NO_CACHE = "--seed 123"  # the default


@pytest.mark.parametrize("options, position", [
    ("", "last"), ("--token-pos first", "first"), ("--token-pos mean", "mean"), (NO_CACHE, "last"),
    ("--trainable-layers last_layer", "last"), ("--trainable-layers last_two_blocks", "last"),
    ("--trainable-layers all", "last"), ("--trainable-layers lora", "last"),
    ("--no-padding", "last"), ("--no-padding --trainable-layers all", "last"),
    ("--no-padding --batch-size 1 --token-pos mean", "mean"),
    ("--no-padding --batch-size 1 --no-causal-mask", "last"), ("--no-causal-mask", "last"),
    ("--balance weights", "last"), ("--context-length 9", "last"), ("--weights random", "last")])
def test_training_and_the_saved_classifier_equal_a_plain_loop(tmp_path, run, monkeypatch, options, position):
    """The loop gives the model one message after the other."""
    if options == NO_CACHE:
        monkeypatch.setattr(g.os, "sysconf", lambda name: 1)  # as if the memory were too small
    _, out, err = run(*train_arguments(tmp_path, "--eval-iter", 2, *options.split()))
    assert ("blocks run in each epoch" in out) == (options == NO_CACHE), err
    ours = json.loads((tmp_path / "m.json").read_text())
    frames = [pd.read_csv(tmp_path / "d" / f"{name}.csv", keep_default_na=False)
              for name in ("train", "validation", "test")]
    length = 9 if "9" in options else max(len(TOKENIZER.encode_ordinary(text)) for text in frames[0]["Text"])
    loaders = []
    for frame in frames:
        texts = [TOKENIZER.encode_ordinary(text)[:length] for text in frame["Text"]]
        if "--no-padding" not in options:
            texts = [ids + [319] * (length - len(ids)) for ids in texts]
        rows = list(zip(map(torch.tensor, texts), (frame["Label"] == "spam").astype(int)))
        loaders.append(DataLoader(rows, 1 if "batch" in options else 8, not loaders, collate_fn=list))

    model, *_ = g.load_pretrained(tmp_path / "w" / "folder-micro.npz")
    if "random" in options:
        torch.manual_seed(123)
        model = GPTModel(BASE_CONFIG)
    for block in model.trf_blocks:
        block.att.causal = "--no-causal-mask" not in options
    g.add_classification_head(model, 2, options.split()[-1] if "layers" in options else "last_block")
    class_weights = g.prepare_splits(small_frame(), "weights")[1] if "balance" in options else None

    def logits_and_labels(batch):
        logits = torch.stack([READERS[position](model(ids[None])[0]) for ids, _ in batch])
        return logits, torch.tensor([label for _, label in batch])

    def loss_of(batch):
        return F.cross_entropy(*logits_and_labels(batch), class_weights)

    def accuracy_of(batches):
        logits, labels = logits_and_labels([row for batch in batches for row in batch])
        return (logits.argmax(dim=-1) == labels).double().mean().item()

    torch.manual_seed(123)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    step, logged, accuracies = 0, ([], []), ([], [])
    for _ in range(2):
        for batch in loaders[0]:
            optimizer.zero_grad()
            loss_of(batch).backward()
            optimizer.step()
            if step % 3 == 0:
                for loader, means in zip(loaders, logged):
                    means.append(np.mean([loss_of(batch).item() for batch in g.islice(loader, 2)]))
            step += 1
        for loader, measured in zip(loaders, accuracies):
            measured.append(accuracy_of(g.islice(loader, 2)))
    assert losses(ours) == pytest.approx(logged[0] + logged[1], abs=1e-4)
    assert ours["train_accuracy"] + ours["val_accuracy"] == pytest.approx(accuracies[0] + accuracies[1])
    assert ours["final_accuracy"] == pytest.approx([accuracy_of(loader) for loader in loaders])
    predicted = classifier_in(tmp_path).predict(frames[2]["Text"])
    logits, _ = logits_and_labels(loaders[2].dataset)
    torch.testing.assert_close(predicted, logits.softmax(dim=-1), atol=1e-4, rtol=0)


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


def test_bfloat16_stays_near_float32_and_reopens_bit_for_bit(tmp_path):
    full, half = (losses(train(tmp_path, "--dtype", dtype)) for dtype in ("float32", "bfloat16"))
    assert half == pytest.approx(full, abs=0.02) and half != full
    blocks = classifier_in(tmp_path).model.trf_blocks
    pretrained = g.load_pretrained(tmp_path / "w" / "folder-micro.npz")[0].trf_blocks[0].to(torch.bfloat16)
    torch.testing.assert_close(dict(blocks[0].state_dict()), dict(pretrained.state_dict()), rtol=0, atol=0)
    assert blocks[1].norm1.scale.dtype == torch.float32


def test_the_learning_rate_rises_and_falls_in_a_line():
    rates = []
    hook = register_optimizer_step_pre_hook(lambda adamw, *_: rates.append(adamw.param_groups[0]["lr"]))
    splits, settings = g.prepare_splits(small_frame())[0], {"schedule": "linear", "lr": 1, "batch_size": 10}
    g.finetune(GPTModel(BASE_CONFIG), TOKENIZER, splits, **settings)
    hook.remove()
    falling = [i / 13.5 for i in range(13, 0, -1)]
    assert rates == pytest.approx([1 / 1.5, 1, *falling])  # a tenth of 15 steps up: 3 batches of 10, 5 epochs


def test_two_processes_and_accumulated_batches_train_as_one_large_batch(tmp_path):
    one, two, accumulated = (tmp_path / name for name in ("one", "two", "accumulated"))
    options = ("--epochs", 4, "--eval-freq", 1, "--batch-size", 32)  # all training messages
    expected = train(one, *options)
    train(accumulated, *options, "--batch-size", 8, "--accumulation-steps", 4)
    done = torchrun(*train_arguments(two, *options))
    assert done.returncode == 0 and done.stdout.count("Training completed") == 1, done.stderr
    assert "without an active exception" not in done.stderr
    state = classifier_in(one).model.state_dict()
    for other in (classifier_in(folder).model.state_dict() for folder in (two, accumulated)):
        for name in [name for name in state if "W_key.bias" not in name]:  # softmax ignores the keys' biases
            torch.testing.assert_close(other[name], state[name], atol=1e-5, rtol=0)
    metrics = json.loads((two / "m.json").read_text())
    assert losses(metrics) == pytest.approx(losses(expected), abs=1e-5)
    for name in ("final_accuracy", "examples_seen"):
        assert metrics[name] == expected[name]


@pytest.mark.parametrize("model, option, value, said", [
    (MICRO, "--lr", 1e30, "the loss is"),  # in both
    ("124M", "--mirror", DEAD, "cannot download")])  # in the first
def test_two_processes_that_fail_say_why_once(tmp_path, model, option, value, said):
    done = torchrun(*train_arguments(tmp_path, option, value, model=model))
    assert done.returncode != 0 and "without an active exception" not in done.stderr
    assert done.stderr.count(f"gpt_spam: error: {said}") == 1 and "[rank" not in done.stderr


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

POUNDS = MESSAGES[MESSAGES["Text"].str.fullmatch("[ -~]*£[ -~]*")][:40]
AWKWARD = pd.DataFrame({"Text": ['hi, "you";\nspam\tthree', "NA"], "Label": ["ham", "spam"]})
ROWS = pd.concat([AWKWARD, POUNDS]).assign(Id=7)


@pytest.mark.parametrize("name, options", [
    ("utf8.csv", {}), ("utf8.csv.gz", {}), ("lines.jsonl", {"lines": True}), ("array.json", {}),
    ("bom.csv", {"encoding": "utf-8-sig"}), ("windows.csv", {"encoding": "cp1252"}),
    ("utf16.csv", {"sep": "\t", "encoding": "utf-16"}), ("crlf.csv", {"lineterminator": "\r\n"}),
    ("tab.txt", {"sep": "\t"}), ("semicolon.csv", {"sep": ";"}),
    ("uci", {"sep": "\t", "header": False, "columns": ["Label", "Text"]})])  # quoted, as in the chapter
def test_train_and_classify_read_every_row_and_pound_sign_from(use, tmp_path, name, options):
    path = tmp_path / name
    if "json" in name:
        ROWS.to_json(path, orient="records", force_ascii=False, **options)
    else:
        ROWS.to_csv(path, index=False, **options)
    assert g.read_messages(path).to_dict("list") == ROWS[["Label", "Text"]].to_dict("list")
    lines = use("classify", "--input", path)[1].splitlines()
    assert [line.split("\t")[2] for line in lines] == [" ".join(text.split()) for text in ROWS["Text"]]


@pytest.mark.parametrize("content, encoding, found, said", [
    ("label,text\nham,£5\n".encode("cp1252"), None, [["ham", "£5"]], "is read as Windows-1252"),
    ("label,text\nham,привет\n".encode("cp1251"), "cp1251", [["ham", "привет"]], ""),
    (b"label,text\nham ,a\nHam,b\n", None, [["ham", "a"], ["Ham", "b"]], "differ in case only: Ham, ham"),
    (b"label,TEXT,text,Text\nham,a,b,c\n", None, [["ham", "b"]], ""),  # the exact name wins
    (b"\xef\xbb\xbflabel,text\nham,hi\n", "utf-8", [["ham", "hi"]], ""),
    (b'label\ttext\nham\t"a\nspam\tb"\n', None, [["ham", "a\nspam\tb"]], "a quotation mark left open"),
    (b"label,text\nham, \n", None, [["ham", " "]], "1 of 1 texts in")], ids=str)
def test_what_may_be_wrong_with_a_table_is_said(tmp_path, capsys, content, encoding, found, said):
    (tmp_path / "a.csv").write_bytes(content)
    g.note.cache_clear()
    assert g.read_messages(tmp_path / "a.csv", encoding=encoding).values.tolist() == found
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("content, said", [
    (b"label,text\n" + b"ham,hi\n" * 20, "with labels .'ham'.;"), (b"label,text\nx,a,b\n", "quote the texts"),
    (b"label,text\nham,hi\nspam,ho\n", "2 messages .* 20 with two labels"),
    (b"review,stars\nham,hi\n", "no column 'label'.*'review', 'stars'.*--label-column"),
    (b"text,label\nok,x\nno\n", "1 of 2 messages .*no label, first 'no'"),
    (b"label,text\nham,a\n,lost\n ,b\n", "2 of 3 messages .* have no label, first 'lost'"),
    (b'{"text": "a", "label": null}\n', "1 of 1 messages .*no label"), (b"", "not a table"),
    (b"label,text\n", "has no rows"), (b"TEXT,Text,label\na,b,c\n", "several columns 'text'"),
    (b'{"label": "a", "text": ["b"]}\n', "has objects or lists, no texts"),
    (b'{"text": "a"}\n', "no column 'label'"), (b'{"text": \n', "not a table"),
    (b"PK\3\4\0\0\0\0", "a binary file, such as Excel, zip"), (b"\x1f\x8b\x08broken", "not a table"),
], ids=str)
def test_a_table_that_cannot_be_used_is_refused_in_one_line(tmp_path, content, said):
    (tmp_path / "data.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        g.prepare_splits(g.read_messages(tmp_path / "data.tsv"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("faults", [
    [], [500], ["cut"], ["cut", "cut"], ["reversed"], ["cut", "reversed"]], ids=str)
def test_download_takes_the_backup_and_ends_right(server, tmp_path, faults):
    server.starts, server.faults = [], list(faults)
    g.download([f"{server.url}/missing", f"{server.url}/good"], tmp_path / "f", RIGHT)
    assert (tmp_path / "f").read_bytes() == CONTENT and os.listdir(tmp_path) == ["f"]
    assert any(server.starts) == ("cut" in faults), "a partial download is resumed"


@pytest.mark.parametrize("urls, error, said", [
    (["{url}/wrong"], OSError, "SHA-256"),
    ([f"{DEAD}/x", "{url}/missing"], OSError, "127.0.0.1:9: ConnectionError, .*404"),
    ([f"{DEAD}/x"], ConnectionError, f"{DEAD}/x"),
])
def test_a_download_that_fails_says_why_and_leaves_no_file(server, tmp_path, urls, error, said):
    (tmp_path / "f.part").write_bytes(CONTENT)  # at least as long as what the server has
    with pytest.raises(error, match=said) as caught:
        g.download([url.format(url=server.url) for url in urls], tmp_path / "f", RIGHT)
    assert caught.type is error and not (tmp_path / "f").exists()
    assert (tmp_path / "f.part").exists() == (said != "SHA-256")


@pytest.mark.parametrize("path, said", [(ARCHIVE, "SHA-256"), ("/wrong", "not the archive of the SMS data")])
def test_another_table_than_ucis_is_refused(server, tmp_path, path, said):
    with pytest.raises(OSError, match=said):
        download_and_unzip_spam_data(server.url + path, tmp_path / "a.zip", tmp_path, tmp_path / "a.tsv")
    assert os.listdir(tmp_path) == []


def test_a_damaged_checkpoint_that_was_downloaded_is_thrown_away(server, run, tmp_path, monkeypatch):
    args = train_arguments(tmp_path, "--mirror", server.url, model="355M")
    assert "SHA-256" in run(*args)[2]  # encoder.json is not GPT-2's
    damaged = (MICRO / g.DATA_FILE).read_bytes()[:-4]
    monkeypatch.setitem(server.files, f"/gpt-2/models/355M/{g.DATA_FILE}", damaged)
    status, _, err = run(*args, "--no-verify")
    assert status == 2 and "112,380 bytes" in err and not list((tmp_path / "w").rglob("*.*"))


def test_a_download_outlives_a_disk_that_is_too_full_to_convert_it(server, tmp_path, monkeypatch):
    def full_disk(*args, **arrays):
        raise OSError("No space left on device")

    monkeypatch.setattr(g.np, "savez", full_disk)
    with pytest.raises(OSError, match="No space left"):
        g.download_gpt2("355M", tmp_path, server.url, verify=False)
    names = {g.DATA_FILE, *g.TEXT_FILES}
    assert {file.name for file in tmp_path.rglob("*.*") if file.is_file()} == names


def test_an_error_inside_an_atomic_write_gets_out_and_leaves_what_was(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(FileNotFoundError, match="mine"), g.atomic_write(tmp_path / "f") as temporary:
        temporary.write_text("half")
        raise FileNotFoundError("mine")
    assert os.listdir(tmp_path) == ["f"] and (tmp_path / "f").read_text() == "old"


# ---- Part 2: the command line ----

@pytest.fixture(scope="session")
def trained(server, tmp_path_factory):
    """`train` on a mirror that serves the micro checkpoint as 124M, and a small collection as UCI's."""
    folder = tmp_path_factory.mktemp("trained")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        metrics = train(folder, "--mirror", server.url, "--no-verify", "--plot", folder / "plots",
                        model="124M", data="auto")
    return folder, metrics, out.getvalue()


@pytest.fixture
def use(trained, run):
    """Run a command with the trained classifier; return status, output and errors."""
    return lambda command, *args: run(command, "--weights-dir", trained[0] / "w", "--device", "cpu", *args)


def test_train_from_a_mirror_writes_its_files_and_what_it_was_trained_on(trained):
    folder, metrics, _ = trained
    assert set(os.listdir(folder / "w")) == {"gpt2-124M.npz", "spam_classifier.pth"}
    splits = {"test.csv", "train.csv", "validation.csv"}
    assert set(os.listdir(folder / "d")) == {"SMSSpamCollection.tsv", *splits}
    assert metrics["sha256"] == hashlib.sha256(TABLE).hexdigest() and metrics["epochs"] == 2
    for name in ("loss", "accuracy"):
        assert (folder / "plots" / f"{name}-plot.png").read_bytes().startswith(b"\x89PNG")


def test_training_again_needs_no_network_and_names_what_it_replaces(trained, run):
    folder, metrics, _ = trained
    status, _, err = run(*train_arguments(folder, "--mirror", DEAD, model="124M", data="sms"))
    assert re.search(r"will replace \S*spam_classifier.pth, \S*train.csv, \S*validation.csv, \S*test", err)
    assert status == 0 and json.loads((folder / "m.json").read_text())["train_loss"] == metrics["train_loss"]


def test_train_prints_the_chapters_log_and_keeps_its_numbers(trained):
    folder, metrics, out = trained
    assert re.search(r"Ep 1 \(Step 000000\): Train loss \d\.\d{3}, Val loss \d\.\d{3}", out)
    assert re.search(r"\nTraining accuracy: [\d.]+% \| Validation accuracy: [\d.]+%\n", out)
    assert re.search(r"You are a winner .*\(true label: spam\)\n", out)
    assert re.search(r"32 / 4 / 10 messages, of these labels: (ham|spam) 23, (ham|spam) 23\n", out)
    counts = [len(metrics["train_loss"]), len(metrics["val_accuracy"]), metrics["examples_seen"]]
    assert counts == [3, 2, 64]
    accuracies = "{:.2%} / {:.2%} / {:.2%}".format(*metrics["final_accuracy"])
    label = pd.read_csv(folder / "d" / "train.csv")["Label"].mode()[0]
    share = (pd.read_csv(folder / "d" / "test.csv")["Label"] == label).mean()
    baseline = f"(always '{label}': {share:.2%} of test)"
    assert f"Final accuracy, training / validation / test: {accuracies} {baseline}" in out


def test_own_labels_columns_and_test_table_are_found_again_from_any_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    df = small_frame()
    frame = pd.DataFrame({"stars": df["Label"].map({"ham": 5, "spam": 1}), "review": df["Text"]})
    frame["review"] += "\rbye"  # a lone carriage return, as in cells of Excel
    frame.drop(frame.index[::4]).to_json("r.jsonl", orient="records", lines=True)
    frame[::4].to_json("t.jsonl", orient="records", lines=True)
    options = ["--text-column", "review", "--label-column", "stars", "--test-data", "t.jsonl"]
    train(tmp_path, *options, data="r.jsonl")
    assert pd.read_csv("d/test.csv")["Label"].tolist() == frame["stars"][::4].tolist()  # as they were
    monkeypatch.chdir(HERE)
    status, out, err = run("evaluate", "--weights-dir", tmp_path / "w")
    assert re.search(r"(?s)test split: 12 messages.*\n5 ", out), err
    (tmp_path / "t.jsonl").write_text('{"stars": 5, "review": "another"}\n')
    assert "SHA-256" in run("evaluate", "--weights-dir", tmp_path / "w")[2]


def test_three_labels_are_trained_counted_and_evaluated(run, tmp_path):
    df = small_frame()
    df.loc[df.index[::3], "Label"] = "other"
    df.to_csv(tmp_path / "three.csv", index=False)
    out = run(*train_arguments(tmp_path, data=tmp_path / "three.csv"))[1]
    assert "(true label: spam)" not in out  # the chapter's two messages are for its two labels
    table = run("evaluate", "--weights-dir", tmp_path / "w")[1]
    assert re.search(r"(?s)precision +recall +f1 +support\nham .*\nother .*\nspam ", table)
    assert "of these labels: " + ", ".join(f"{k} {v}" for k, v in df["Label"].value_counts().items()) in out


def test_evaluate_measures_on_the_test_split_or_on_any_table(trained, use):
    accuracy = trained[1]["final_accuracy"][2]
    assert f"test split: 10 messages, accuracy {accuracy:.2%}" in use("evaluate")[1]
    assert "all: 32 messages" in use("evaluate", "--data", trained[0] / "d" / "train.csv")[1]
    source = trained[0] / "d" / "SMSSpamCollection.tsv"
    assert "all, those of training too: 53 messages" in use("evaluate", "--data", source)[1]


def test_many_labels_are_shown_whole_and_errors_instead_of_a_matrix(use, tmp_path):
    labels = [f"label{i:02}" for i in range(30)]
    g.save_classifier(tmp_path / "c.pth", g.Classifier(with_head(BASE_CONFIG, 30), TOKENIZER, labels, 10))
    pd.DataFrame({"Label": labels * 3, "Text": MESSAGES["Text"][:90]}).to_csv(tmp_path / "many.csv")
    out = use("evaluate", "--classifier", tmp_path / "c.pth", "--data", tmp_path / "many.csv")[1]
    assert all(f"\n{label} " in out for label in labels) and "..." not in out
    assert "Most frequent errors" in out


@pytest.mark.parametrize("threshold, answer", [(0, "spam"), (1, "ham")])
def test_classify_answers_spam_from_the_threshold_on(use, threshold, answer):
    line = use("classify", "--threshold", threshold, "hello")[1]
    assert re.fullmatch(answer + r"\t[01]\.\d{4}\thello\n", line)


@pytest.mark.parametrize("name, content, texts", [
    ("a.txt", "\ufeffhello\n\n😀 ünï\n<|endoftext|>\n".encode() + b"x" * 100_000 + b"\nbroken\r\nwin",
     ["hello", "😀 ünï", "<|endoftext|>", "x" * 100_000, "broken", "win"]),
    ("no-header.txt", b"Hey, text, me\nok, fine, then\n", ["Hey, text, me", "ok, fine, then"]),
    ("a.tsv", b"text\tid\nhello\t1\nthere\t2\n", ["hello", "there"]),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800b"}\n', ["a", "b"]),  # pandas drops half a character
])
def test_classify_reads_lines_and_tables_without_labels(use, tmp_path, name, content, texts):
    (tmp_path / name).write_bytes(content)
    status, out, err = use("classify", "--input", tmp_path / name)
    assert [line.split("\t")[2] for line in out.splitlines()] == texts, err


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


def test_standard_input_is_a_table_where_a_column_is_named_else_lines_with_a_note(use, monkeypatch):
    for option, said, answers in (("--text-column=text", "as a table", 1), ("--by-token", "as lines", 2)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"label,text\nham,hello\n")))
        _, out, err = use("classify", option)
        assert said in err and len(re.findall(r"^(?:ham|spam)\t", out, re.MULTILINE)) == answers


def test_a_header_with_the_columns_of_training_is_known():
    assert g.looks_like_table("Stars;Review\n", "review", "stars")
    assert not g.looks_like_table("Stars;Review\n", "text", "label")


def test_lines_of_standard_input_are_answered_as_they_come_until_the_pipe_is_closed(trained):
    command = [sys.executable, g.__file__, "classify", "--weights-dir", trained[0] / "w", "--device", "cpu"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(list(map(str, command)), **pipes, text=True, bufsize=1) as process:
        for text in ("one", "two", "three"):
            process.stdin.write(text + "\n")
            assert re.fullmatch(rf"(ham|spam)\t[01]\.\d{{4}}\t{text}\n", process.stdout.readline())
        process.stdout.close()
        process.stdin.write("four\n")
        process.stdin.close()
        assert process.wait() == 141 and process.stderr.read() == ""


def test_experiments_print_the_books_accuracy_beside_ours(run, tmp_path):
    rows = ["--epochs", 1, "--device", "cpu", "--weights-dir", tmp_path / "w", "--data-dir", tmp_path / "d"]
    rows += ["--rows", 1, 16, 18, 19]
    (tmp_path / "d.tsv").write_bytes(as_uci(small_frame()))
    _, out, err = run("experiments", "--model", MICRO, "--data", tmp_path / "d.tsv", *rows)
    table = [line.strip("| ").split(" | ") for line in out.splitlines()[2:]]
    assert [row[0] for row in table] == ["1", "16", "18", "19"] and "Row 16 done, 2 of 4; about" in err, err
    assert [row[1] for row in table] == ["", "--no-padding", "", "--token-pos mean"]
    assert [row[5] for row in table] == ["95.00%", "98.33%", "95.00%", "96.33%"]
    assert table[0][2:5] == table[2][2:5]
    assert not (tmp_path / "d").exists()  # the chapter's splits are not these


def test_without_any_network_the_bundled_model_and_messages_are_used_and_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(g, "MODEL_URLS", [DEAD])
    monkeypatch.setattr(g, "DATA_URLS", [DEAD])
    places = ["train", "--weights-dir", tmp_path / "w", "--data-dir", tmp_path / "d"]
    status, out, err = run(*places, "--epochs", 1, "--no-padding")  # without padding, thus fast
    assert status == 0, err
    assert out.count("(bundled model, not GPT-2) (trained on invented SMS)\n") == 2  # first and last
    assert "Changed from the chapter: epochs 1, padding False\n" in out
    assert "Settings of the bundled model: lr 0.001, schedule linear\n" in out
    assert err.count("(127.0.0.1:9: ConnectionError); ") == 2
    assert "tiny.npz is used instead\n" in err and "sample_sms.tsv is used instead\n" in err
    assert set(os.listdir(tmp_path / "w")) == {"spam_classifier.pth"}
    for asked in ("--model=124M", f"--mirror={DEAD}"):
        status, _, err = run(*places, asked)
        assert status == 2 and "cannot download" in err


@pytest.mark.parametrize("command, said", [
    ("train --model gpt5", "no model 'gpt5': 124M, 355M"), ("train --device warp", "no device 'warp'"),
    ("train --model .", "not a checkpoint in OpenAI's layout"),
    (f"train --model 124M --mirror {DEAD}", f"{DEAD}/gpt-2/models/124M/"),
    (f"train --model 124M --mirror {DEAD} --text-column txet", "no column 'txet'"),
    (f"train --model 124M --mirror {DEAD} --data eggs.csv", "20 with two labels are needed"),
    ("train --data nowhere.tsv", "nowhere.tsv"), ("train --data nowhere.tsv --out .", "cannot write"),
    *[(f"train --data nowhere.tsv --{option} d.tsv/file", "d.tsv") for option in ("out", "plot", "metrics")],
    ("train --data nowhere.tsv --out same --metrics same", "same would be overwritten"),
    ("train --data stars.csv --test-data ./stars.csv", "is --data itself"),
    ("experiments --data sample --model tiny --no-padding --rows 1 19", "requires --batch-size 1"),
    ("train --data test.csv --data-dir .", "test.csv would be overwritten"),
    ("train --data stars.csv", "no column 'label'"), ("train --lr 1e30", "try a smaller --lr"),
    ("train --batch-size 0", "at least 1, got 0"), ("train --epochs -1", "epochs must be at least 1, got -1"),
    ("train --no-padding --token-pos mean", "requires --batch-size 1"),
    ("train --no-padding --no-causal-mask", "requires --batch-size 1"),
    ("train --context-length 9999", "9999 tokens, the longest training message or --context-length"),
    ("train --context-length 0", "a number from 1, got"),
    ("classify --input a.txt hi", "give texts or --input FILE, not both"),
    ("classify --classifier none.pth hi", "none.pth is not a classifier"),
    ("classify --classifier stars.csv hi", "stars.csv is not a classifier"),
    ("classify --classifier c.pth --threshold 2 hi", "--threshold needs 0 to 1"),
    ("classify --classifier c.pth --input nonsense.jsonl", "nonsense.jsonl is not a table of texts"),
    ("classify --classifier c.pth --input stars.csv", "no column 'text'"),
    ("evaluate --classifier changed.pth --text-column a", "need --data"),
    ("evaluate --classifier c.pth", "set --data"), ("evaluate --classifier changed.pth", "SHA-256"),
    ("evaluate --classifier c.pth --data eggs.csv", "['eggs']"),
])
def test_bad_input_is_one_error_and_status_2(run, classifier, tmp_path, monkeypatch, command, said):
    monkeypatch.chdir(tmp_path)
    g.save_classifier("c.pth", classifier)
    classifier.about = {"data": str(BUNDLED[0]), "sha256": "0" * 64}
    g.save_classifier("changed.pth", classifier)
    Path("nonsense.jsonl").write_text('{"text": "a"}\nnonsense\n')
    Path("stars.csv").write_text("review,stars\nfine,5\n")
    Path("eggs.csv").write_text("label,text\neggs,hi\n")
    name, *args = command.split()
    status, out, err = run(*(train_arguments(tmp_path, *args) if name == "train" else [name, *args]))
    *notes, error = err.splitlines()
    assert status == 2 and error.startswith("gpt_spam: error: ") and said in error
    assert all(line.startswith("gpt_spam: note: ") and "replace" not in line for line in notes)
    assert not (out and name == "classify") and not Path("w", "spam_classifier.pth").exists()


def test_an_unknown_option_is_an_error_with_status_2(capfd):
    with pytest.raises(SystemExit, match="2"):
        g.main(["train", "--lora-rnak", "4"])
    assert "--lora-rnak" in capfd.readouterr().err


# ---- A device that is not the CPU ----

class OneDevice(TorchDispatchMode):
    """Refuses what mixes devices, as a GPU does; each value of a tensor on the device "meta" is 1."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if function is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == CPU:
            return torch.ones(args[0].shape, dtype=args[0].dtype)
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1
        moves = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if len({tensor.device for tensor in tensors if tensor.dim() > 0}) > 1 and not moves:
            raise RuntimeError(f"{function}: expected all tensors to be on the same device")
        return function(*args, **kwargs)


@pytest.mark.parametrize("settings", [
    {"dtype": "bfloat16"}, {"padding": False}, {"trainable_layers": "last_layer", "token_pos": "first"},
    {"trainable_layers": "last_two_blocks", "token_pos": "mean"},
    {"trainable_layers": "lora", "causal_mask": False},
    {"trainable_layers": "all", "weights": "random"}], ids=str)
def test_every_setting_works_on_a_device_that_is_not_the_cpu(tmp_path, monkeypatch, settings):
    adamw, tolist = torch.optim.AdamW, torch.Tensor.tolist
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, **options: adamw(*args, **options))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: tolist(tensor.cpu()))
    splits, class_weights = g.prepare_splits(small_frame(), "weights")
    with OneDevice():
        model = GPTModel(BASE_CONFIG)
        classifier, _ = g.finetune(
            model, TOKENIZER, splits, class_weights, "meta", epochs=1, batch_size=32, **settings)
        g.save_classifier(tmp_path / "c.pth", classifier)
        loaded = g.load_classifier(tmp_path / "c.pth", "meta")
        assert loaded.predict(["hello", "win a prize"]).shape == (2, 2)
    saved = torch.load(tmp_path / "c.pth", weights_only=True)["model"]
    assert all(tensor.device == CPU for tensor in saved.values())
    assert all(param.is_meta for made in (classifier, loaded) for param in made.model.parameters())


# ---- The rest ----

def test_the_bundled_model_is_a_small_gpt_that_has_learned_english():
    model, tokenizer, suited = g.load_pretrained(g.TINY)
    assert g.TINY.stat().st_size <= 8_000_000 and model.cfg["context_length"] >= 256
    assert tokenizer.n_vocab == model.cfg["vocab_size"] and set(suited) <= set(g.finetune.__kwdefaults__)
    ids = text_to_token_ids("It was a dark night, and the rain fell on the roof of the house.", tokenizer)
    loss = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).item()
    assert loss < 0.7 * math.log(tokenizer.n_vocab)  # knowing nothing costs 8.3 nats
    card = (HERE / "weights" / "README.md").read_text()
    assert g.sha256_of(g.TINY) in card and f"{g.TINY.stat().st_size:,} bytes" in card


def test_two_steps_of_pretraining_run_through(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(HERE / "weights")
    import pretrain_tiny
    config = {**BASE_CONFIG, "vocab_size": 300, "context_length": 32, "n_layers": 1, "drop_rate": 0.1}
    monkeypatch.setattr(pretrain_tiny, "CONFIG", config)
    monkeypatch.setattr(pretrain_tiny, "SEGMENT", 1)
    options = ["--sample", BUNDLED[1], "--messages", BUNDLED[1], "--steps", 2, "--batch-size", 4]
    arguments = ["", HERE / "README.md", *options, "--out", tmp_path / "out.npz"]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    pretrain_tiny.main()
    model, tokenizer, _ = g.load_pretrained(tmp_path / "out.npz")
    assert model.cfg["n_layers"] == 1 and tokenizer.n_vocab == 300


def test_readme_and_script_headers_name_the_same_packages():
    headers = [re.search(r"# dependencies = \[(.*?)\]", text, re.DOTALL)[1]
               for text in (SOURCE, Path(__file__).read_text("utf-8"))]
    installs = re.findall(r"pip install (torch.*?)(?: &&|\n)", README)
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
