# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "tiktoken==0.14.0", "numpy", "requests", "pandas", "tqdm", "matplotlib",
#     "pytest", "scikit-learn"]
# ///
"""Offline tests: PyTorch's own modules judge the layers, bytes that TensorFlow wrote the reader, plain loops
the training, scikit-learn the metrics. With GPT_SPAM_ONLINE=1 a test compares with the book's numbers.
"""

import ast
import contextlib
import gzip
import hashlib
import http.server
import inspect
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
import zipfile
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import requests
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import gpt_spam as g
from gpt_spam import *  # noqa: F403, what the book's own calls need

HERE = Path(__file__).resolve().parent
SOURCE, README = Path(g.__file__).read_text("utf-8"), (HERE / "README.md").read_text("utf-8")
PART_1, PART_2 = SOURCE.split("# ======== Part 2")
MICRO = HERE / "weights" / "micro"  # written by TensorFlow 2.21
BASE_CONFIG = {"vocab_size": 320, "context_length": 1024, "drop_rate": 0.0, "qkv_bias": True,
               "emb_dim": 16, "n_layers": 2, "n_heads": 2}  # of the micro checkpoint
ENCODER = (MICRO / "encoder.json").read_text()
TOKENIZER, END = g.build_tokenizer(ENCODER), 319  # the id of <|endoftext|>
MESSAGES = g.read_messages(HERE / "data" / "sample_sms.tsv")
DEAD = "http://127.0.0.1:9"  # nobody listens there
Evil = type("Evil", (), {"__reduce__": lambda self: (os.system, ("touch evil-was-here",))})  # runs, if loaded
torch.set_num_threads(1)  # the models are small: threads cost more than they give


# ---- What the tests share ----
def messages(ham=23, spam=23):
    """Return short bundled messages; of 23 and 23, 32 are trained on, 4 validate, 10 test."""
    df = MESSAGES[MESSAGES["Text"].str.len().between(10, 40)]
    return pd.concat([df[df["Label"] == "ham"][:ham], df[df["Label"] == "spam"][:spam]])


def as_uci(df):
    return df[["Label", "Text"]].to_csv(sep="\t", header=False, index=False).encode()


def zipped(content):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../evil", "never unpacked")
        file.writestr("SMSSpamCollection", content)
    return archive.getvalue()


def train_command(folder, *args):
    if not (folder / "d.tsv").exists():
        (folder / "d.tsv").write_bytes(as_uci(messages()))
    files = ["--model", MICRO, "--data", folder / "d.tsv", "--out", folder / "out"]
    short = ["--device", "cpu", "--epochs", 2, "--eval-freq", 3, "--lr", 1e-3]
    return list(map(str, ["train", *files, *short, *args]))


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def metrics_in(folder):
    return json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)  # such as NaN


def padded(text, length):
    return (TOKENIZER.encode_ordinary(text) + [END] * length)[:length]


def untrained_classifier():
    torch.manual_seed(0)
    model = GPTModel(BASE_CONFIG)
    g.add_classification_head(model, 2)
    return g.Classifier(model.eval(), TOKENIZER, ["ham", "spam"], 10)


WORKER = f"""
import functools, json, sys, gpt_spam
gpt_spam.MODEL_URLS, distributed = [{DEAD!r}], gpt_spam.torch.distributed
distributed.init_process_group = functools.cache(distributed.init_process_group)  # one group for all
end, distributed.destroy_process_group = distributed.destroy_process_group, lambda: None
*commands, last = json.loads(sys.argv[1])
assert [gpt_spam.main(command) for command in commands] == [0] * len(commands)
distributed.destroy_process_group = end
sys.exit(gpt_spam.main(last))
"""


def torchrun(folder, *commands):
    shutil.copy(g.__file__, folder)
    (folder / "worker.py").write_text(WORKER)
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "worker.py"]
    two.append(json.dumps([list(map(str, command)) for command in commands]))
    with subprocess.Popen(two, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, text=True) as job:
        alarm = threading.Timer(120, job.terminate)  # which ends its workers, too
        alarm.start()
        out, err = job.communicate(timeout=240)
        alarm.cancel()
    return job.returncode, out, err


@pytest.fixture
def run(capfd):
    return lambda *args: (g.main(list(map(str, args))), *capfd.readouterr())


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    path = tmp_path_factory.mktemp("micro") / "gpt2-124M.npz"
    g.convert_checkpoint(MICRO, path)
    about = {"about.json": np.frombuffer(b'{"finetune": {"lr": 0.002, "epochs": 1}}', np.uint8)}
    np.savez(path, **np.load(path), **about)
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with contextlib.redirect_stdout(io.StringIO()) as log:
        assert g.main(train_command(folder, "--plot")) == 0
    return SimpleNamespace(out=folder / "out", metrics=metrics_in(folder / "out"), log=log.getvalue())


@pytest.fixture
def server(monkeypatch):
    """A web server of `files`: `faults` befall its first answers, `starts` is where each request began."""
    state = SimpleNamespace(files={}, faults=[], starts=[])
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start, content = int(re.search(r"\d+", self.headers["Range"])[0]), state.files.get(self.path)
            state.starts.append(start)
            fault = state.faults.pop(0) if content is not None and state.faults else None
            status, body = (206, content[start:]) if start < len(content or b"") else (416, b"")
            if fault == "no ranges":
                status, body = 200, content
            elif content is None or fault == "broken":
                status, body = 404 if content is None else 500, b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write({"cut": body[:len(body) // 2], "reversed": body[::-1]}.get(fault, body))
        log_message = lambda *args: None
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(g.time, "sleep", lambda seconds: None)  # between attempts
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
        state.url = f"http://127.0.0.1:{web.server_port}"
        yield state
        web.shutdown()


# ---- The book's own calls, in its order ----
TABLE = as_uci(messages(ham=30))  # stands for UCI's


@pytest.fixture
def book(server, tmp_path, monkeypatch):
    """Sections 6.2 and 6.3 as the book writes them (with another SHA-256); returns the names they make."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(g, "DATA_SHA256", hashlib.sha256(TABLE).hexdigest())
    server.files["/backup.zip"] = zipped(TABLE)
    url, backup_url, zip_path = f"{DEAD}/sms.zip", server.url + "/backup.zip", "sms_spam_collection.zip"
    extracted_path = "sms_spam_collection"
    data_file_path = Path(extracted_path) / "SMSSpamCollection.tsv"
    try:
        download_and_unzip_spam_data(url, zip_path, extracted_path, data_file_path)
    except (requests.exceptions.RequestException, TimeoutError):
        download_and_unzip_spam_data(backup_url, zip_path, extracted_path, data_file_path)
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


def test_book_6_2_and_6_3_download_balance_split_and_load(book, server):
    assert book.data_file_path.read_bytes() == TABLE and not list(book.tmp_path.parent.rglob("evil"))
    assert [len(book.train_df), len(book.validation_df), len(book.test_df)] == [32, 4, 10]
    for input_batch, target_batch in book.train_loader:
        assert input_batch.shape == (8, book.max_length) and target_batch.shape == (8,)
    Path("hand.zip").write_bytes(zipped(TABLE))  # saved by hand, and kept
    download_and_unzip_spam_data(book.url, "hand.zip", "", "hand.tsv")
    assert Path("hand.tsv").read_bytes() == TABLE and Path("hand.zip").exists()
    for content, said in ((zipped(b"ham\tother"), "SHA-256"), (b"<html>", "is not the archive")):
        server.files["/other.zip"] = content
        with pytest.raises(requests.RequestException, match=said):
            download_and_unzip_spam_data(f"{server.url}/other.zip", "other.zip", "", "other.tsv")
        assert not list(book.tmp_path.glob("other*"))


def test_book_chapter_5_turns_texts_into_ids_and_back():
    for merge in (MICRO / "vocab.bpe").read_text().split("\n")[1:-1]:
        token = merge.replace(" ", "")
        assert TOKENIZER.encode_ordinary(token.replace("\u0120", " ")) == [json.loads(ENCODER)[token]]
    text = "".join(map(chr, range(0x24F))) + "😀\ufffd<|endoftext|>"  # in a message these are letters
    ids = TOKENIZER.encode_ordinary(text)
    assert TOKENIZER.decode(ids) == text and TOKENIZER.eot_token == END not in ids
    you, text = TOKENIZER.encode_ordinary("you"), "you<|endoftext|>you"
    ids = text_to_token_ids(text, TOKENIZER)
    assert ids.tolist() == [[*you, END, *you]]
    assert token_ids_to_text(ids, TOKENIZER) == token_ids_to_text(ids[0], TOKENIZER) == text
    assert token_ids_to_text(ids[0, :1], TOKENIZER) == TOKENIZER.decode(you[:1])


def test_book_6_4_appends_the_most_likely_token_and_training_leaves_params_alone(micro):
    model, idx = g.load_pretrained(micro)[0], text_to_token_ids("Every effort moves you", TOKENIZER)
    token_ids = generate_text_simple(model=model, idx=idx, max_new_tokens=4, context_size=10)
    assert token_ids_to_text(token_ids[:, :idx.shape[1]], TOKENIZER) == "Every effort moves you"
    for end in range(idx.shape[1], idx.shape[1] + 4):  # the context holds the last 10 tokens
        assert token_ids[0, end] == model(token_ids[:, end - 10:end])[0, -1].argmax()
    _, params = download_and_load_gpt2(model_size="124M", models_dir=str(micro.parent))
    model, again, ids = GPTModel(BASE_CONFIG), GPTModel(BASE_CONFIG), torch.tensor([[1, 2, 3]])
    load_weights_into_gpt(model, params)
    logits = model(ids)
    logits.sum().backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    assert not torch.equal(model(ids), logits)
    load_weights_into_gpt(again, params)
    assert torch.equal(again(ids), logits)


def test_book_6_6_loss_and_accuracy_are_those_of_the_last_token(book, spam_model):
    right, losses = [], []  # of batches of 8 and 2
    for input_batch, target_batch in book.test_loader:
        logits = spam_model(input_batch)[:, -1, :]
        right += (logits.argmax(dim=-1) == target_batch).tolist()
        losses.append(calc_loss_batch(input_batch, target_batch, spam_model, book.device))
        torch.testing.assert_close(losses[-1], F.cross_entropy(logits, target_batch))
    loader = book.test_loader, spam_model, book.device
    for num_batches, measured in ((1, 1), (5, 2), (None, 2)):
        assert calc_accuracy_loader(*loader, num_batches=num_batches) == np.mean(right[:8 * measured])
        loss = calc_loss_loader(*loader, num_batches=num_batches)
        assert loss == pytest.approx(sum(losses[:measured]).item() / measured)
    calc_loss_loader(book.test_loader, spam_model.train(), book.device)
    assert spam_model.training  # the loss leaves the mode alone
    with pytest.raises(ZeroDivisionError):
        calc_accuracy_loader([], spam_model, book.device)


def test_book_6_7_trains_and_plots(book, spam_model):
    before = {name: value.clone() for name, value in spam_model.state_dict().items()}
    optimizer = torch.optim.AdamW(spam_model.parameters(), lr=5e-5, weight_decay=0.1)
    num_epochs = 1
    train_losses, val_losses, train_accs, val_accs, examples_seen = train_classifier_simple(
        spam_model, book.train_loader, book.val_loader, optimizer, book.device,
        num_epochs=num_epochs, eval_freq=50, eval_iter=5)
    assert [*map(len, (train_losses, val_losses, train_accs, val_accs)), examples_seen] == [1, 1, 1, 1, 32]
    for name, param in spam_model.named_parameters():  # the keys' bias never matters: softmax ignores it
        assert torch.equal(param, before[name]) != param.requires_grad or name.endswith("W_key.bias"), name
    epochs_tensor = torch.linspace(0, num_epochs, len(train_accs))
    examples_seen_tensor = torch.linspace(0, examples_seen, len(train_accs))
    figure = plot_values(epochs_tensor, examples_seen_tensor, train_accs, val_accs, label="accuracy")
    assert figure.axes[0].get_ylabel() == "Accuracy" and figure.axes[1].get_xlabel() == "Examples seen"
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [train_accs, val_accs]


def test_book_6_8_classifies_and_reopens(book, spam_model):
    masks = {f"trf_blocks.{i}.att.mask": torch.ones(1024, 1024).triu(1) for i in range(2)}
    torch.save(spam_model.state_dict() | masks, "review_classifier.pth")  # as the book's code saves it
    model = GPTModel(BASE_CONFIG)
    model.out_head = torch.nn.Linear(in_features=BASE_CONFIG["emb_dim"], out_features=2)
    model_state_dict = torch.load("review_classifier.pth", map_location=book.device, weights_only=True)
    model.load_state_dict(model_state_dict)
    for text, max_length in zip(book.test_df["Text"], [book.max_length] * 7 + [1, 5, 500]):
        ham, spam = spam_model(torch.tensor([padded(text, max_length)]))[0, -1, :].tolist()
        answer = classify_review(text, model, book.tokenizer, book.device, max_length=max_length)
        assert answer == ("spam" if spam > ham else "not spam")
    for max_length in (None, 0, 1025):
        with pytest.raises(ValueError, match="max_length"):
            classify_review("hello", model, book.tokenizer, book.device, max_length)


def test_book_appendix_e_trains_two_matrices_beside_each_layer_and_merges_them(book, spam_model):
    ids = book.val_dataset[0][0].unsqueeze(0)
    before, names = spam_model(ids), spam_model.state_dict().keys()
    replace_linear_with_lora(spam_model.requires_grad_(False), rank=16, alpha=8)
    torch.testing.assert_close(spam_model(ids), before)
    attention, feed_forward, head = 4 * (16 + 16), 2 * (16 + 64), 16 + 2  # inputs and outputs of the layers
    lora = [param for param in spam_model.parameters() if param.requires_grad]
    assert sum(map(torch.numel, lora)) == 16 * (2 * (attention + feed_forward) + head)
    for param in lora:
        nn.init.normal_(param, std=0.1)
    x, layer = torch.randn(4, 16), spam_model.trf_blocks[0].ff.layers[0]
    expected = layer.linear(x) + 8 / 16 * (x @ layer.lora.A @ layer.lora.B)  # alpha / rank
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(x @ layer.weight.T + layer.linear.bias, expected)
    replace_linear_with_lora(spam_model, rank=4, alpha=4)  # LoRA beside LoRA
    for param in [param for param in spam_model.parameters() if param.requires_grad]:
        nn.init.normal_(param, std=0.1)
    changed = spam_model(ids)
    merge_lora(spam_model)
    torch.testing.assert_close(spam_model(ids), changed)
    assert spam_model.state_dict().keys() == names and not torch.allclose(changed, before)


def test_part_1_uses_four_names_of_part_2():
    defined = re.findall(r"^(?:def|class) (\w+)|^([A-Z]\w*)(?:, [A-Z]\w*)* = ", PART_2, re.MULTILINE)
    used = {node.id for node in ast.walk(ast.parse(PART_1)) if isinstance(node, ast.Name)}
    assert used & set(sum(defined, ())) == {"download", "atomic_write", "reading", "check_sha256"}
    assert not re.search(r"last_token_logits|padded_to|torch\.distributed| --[a-z]", PART_1)


def test_the_training_loop_lifts_out_with_four_functions_and_nothing_else():
    pieces = calc_loss_batch, calc_loss_loader, calc_accuracy_loader, evaluate_model, train_classifier_simple
    space, modes = {"torch": torch, "F": F, "islice": islice}, []
    exec("\n".join(map(inspect.getsource, pieces)), space)
    batch = torch.arange(12).reshape(2, 6), torch.tensor([0, 1])
    model = untrained_classifier().model
    model.drop_emb.register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    log = space["train_classifier_simple"](model, [batch, batch], [batch], optimizer, "cpu", 9, 1, 1)
    assert log[0][-1] < log[0][0] and log[2][-1] == log[3][-1] == 1 and log[4] == 36
    assert modes == 9 * ([True, False, False] * 2 + [False, False])  # dropout is off where it measures


# ---- Splits, data set, model and its checkpoint ----
THREE = pd.DataFrame({"Label": ["b"] * 20 + ["a"] * 60 + ["c"] * 10, "Text": [str(i) for i in range(90)]})


def test_balanced_data_and_splits_are_the_chapters():
    df = pd.DataFrame({"Label": ["ham"] * 170 + ["spam"] * 60, "Text": [str(i) for i in range(230)]})
    chapter = pd.concat([df[df["Label"] == "ham"].sample(60, random_state=123), df[df["Label"] == "spam"]])
    pd.testing.assert_frame_equal(create_balanced_dataset(df), chapter)
    frames, class_weights = g.prepare_splits(df)
    assert list(map(len, frames)) == [84, 12, 24] and class_weights is None
    shuffled = chapter.sample(frac=1, random_state=123, ignore_index=True)
    pd.testing.assert_frame_equal(pd.concat(frames), shuffled)
    assert list(map(len, g.prepare_splits(df, "none")[0])) == [161, 23, 46]
    assert create_balanced_dataset(df[110:])["Label"].tolist() == ["ham"] * 60 + ["spam"] * 60  # a tie


def test_other_labels_and_frames_are_prepared_or_refused():
    frames, class_weights = g.prepare_splits(THREE)
    counts = frames[0]["Label"].value_counts()
    assert [len(frame) for frame in frames] == [62, 9, 19]
    assert class_weights.tolist() == pytest.approx([62 / 3 / counts[label] for label in "abc"])
    frames, class_weights = g.prepare_splits(THREE, "undersample")
    assert [len(frame) for frame in frames] == [21, 3, 6] and class_weights is None
    frames, _ = g.prepare_splits(THREE, "none", pd.DataFrame({"Label": ["c", "a"], "Text": ["x", "5"]}))
    assert [len(frame) for frame in frames] == [78, 12, 2] and frames[2]["Text"].tolist() == ["x", "5"]
    assert sorted(pd.concat(frames[:2])["Text"]) == sorted(THREE["Text"])
    for dtype in ("Int64", "int8", pd.CategoricalDtype([0, 1, 2])):  # labels become strings
        df = pd.DataFrame({"Label": pd.Series([0, 1] * 20).astype(dtype), "Text": "hi"})
        splits, class_weights = g.prepare_splits(df, "weights")
        assert set(pd.concat(splits)["Label"]) == {"0", "1"} and len(class_weights) == 2
    with pytest.warns(UserWarning, match="only 0 .* '2'"):
        _, class_weights = g.prepare_splits(pd.concat([pd.DataFrame({"Label": [2], "Text": ["once"]}), df]))
    assert class_weights.isfinite().all()
    for df, balance, test, said in (
            (THREE.replace("b", None), "none", None, "no label"), (THREE[-19:], "none", None, "20"),
            (THREE.replace("89", None), "none", None, "no text"), (THREE[:20], "auto", None, "two labels"),
            (THREE, "half", None, "auto, .*'half'"), (THREE, "none", THREE.assign(Label="d"), "'d'")):
        with pytest.raises(ValueError, match=said):
            g.prepare_splits(df, balance, test)


def test_dataset_pads_to_the_longest_and_cuts(tmp_path):
    def ids_of(data, **options):
        return [ids.tolist() for ids, _ in SpamDataset(data, TOKENIZER, **options)]
    frame = pd.DataFrame({"Text": ["a", "abcabcabc", ""], "Label": [0, 1, 0]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    short, long = TOKENIZER.encode_ordinary("a"), TOKENIZER.encode_ordinary("abcabcabc")
    for same in (frame, tmp_path / "a.csv", frame.assign(Text=[short, long, []])):
        assert ids_of(same) == [short + [END] * (len(long) - 1), long, [END] * len(long)]
    assert ids_of(frame, max_length=3, pad_token_id=7) == [[*short, 7, 7], long[:3], [7, 7, 7]]
    assert ids_of(frame, padding=False) == [short, long, [END]]


@pytest.mark.parametrize("causal", [True, False])
def test_block_equals_pytorch(causal):
    torch.manual_seed(0)
    ours = g.TransformerBlock(BASE_CONFIG | {"causal": causal}).eval()
    theirs = nn.TransformerEncoderLayer(
        16, 2, 64, 0.0, lambda x: F.gelu(x, approximate="tanh"), batch_first=True, norm_first=True).eval()
    state = ours.state_dict()
    for kind in ("weight", "bias"):
        parts = [state.pop(f"att.W_{name}.{kind}") for name in ("query", "key", "value")]
        state[f"self_attn.in_proj_{kind}"] = torch.cat(parts)
    for our, their in {"scale": "weight", "shift": "bias", "ff.layers.0": "linear1", "ff.layers.2": "linear2",
                       "att.out_proj": "self_attn.out_proj"}.items():
        state = {name.replace(our, their): value for name, value in state.items()}
    theirs.load_state_dict(state)
    x, later = torch.randn(3, 12, 16), torch.ones(12, 12, dtype=torch.bool).triu(1)
    torch.testing.assert_close(ours(x), theirs(x, src_mask=later if causal else None))


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_every_tensor_is_what_tensorflow_wrote(micro, kind):
    def micro_values(name, *shape):  # what TensorFlow wrote: it depends on a variable's name and shape only
        digest = hashlib.sha256(f"0:model/{name}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest, "little"))
        array = rng.standard_normal(shape, np.float32)
        array *= 0.01 if name == "wpe" else 0.02
        return array + 1 if name.endswith("/g") else array * 5
    model, tokenizer, settings = g.load_pretrained(MICRO if kind == "folder" else micro)
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
    assert model.out_head.weight.data_ptr() != model.tok_emb.weight.data_ptr()  # two parameters
    assert sum(map(torch.numel, tensors.values())) == 112_384 / 4  # all that the file has
    assert model.cfg == BASE_CONFIG | {"causal": True} and not model.training and tokenizer.n_vocab == 320
    assert settings == ({} if kind == "folder" else {"lr": 2e-3, "epochs": 1})


def test_blocks_stand_in_a_checkpoint_in_the_order_of_their_names(tmp_path):
    sizes, block = {"n_vocab": 320, "n_ctx": 4, "n_embd": 2, "n_head": 1, "n_layer": 12}, (12 * 2 + 13) * 2
    (tmp_path / "hparams.json").write_text(json.dumps(sizes))
    (tmp_path / "encoder.json").write_text(ENCODER)
    np.arange(12 * block + (2 + 4 + 320) * 2, dtype="<f4").tofile(tmp_path / g.DATA_FILE)
    model, _, _ = g.load_pretrained(tmp_path)
    order = [made.att.W_query.bias[0].item() / block for made in model.trf_blocks]
    assert order == [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3]  # as 0, 1, 10, 11, 2, ... in the file


@pytest.mark.parametrize("file, change, said", [
    (g.DATA_FILE, lambda b: b[:-4], "112,380 bytes"), (g.DATA_FILE, lambda b: b + b"more", "112,388 bytes"),
    (g.DATA_FILE, lambda b: b[:4000] + b"\0\0\xc0\x7f" + b[4004:], "NaN or infinity"),
    ("hparams.json", lambda b: b.replace(b"320", b"321"), r"112,384 bytes.*112,448"),
    ("hparams.json", lambda b: b.replace(b'head": 2', b'head": 3'), "n_heads': 3"),
    ("hparams.json", lambda b: b"<html>", "is not a"), ("encoder.json", lambda b: b[:100], "is not a"),
    ("encoder.json", lambda b: b.replace(b": 319", b": 320"), "<.endoftext.>"),
    ("encoder.json", lambda b: b.replace(b": 300,", b": 299,"), "encoder.json"),  # one id twice, one never
    ("encoder.json", lambda b: b.replace(b'"a"', b'"qqqq"'), "encoder.json"),  # a byte without a token
    ("encoder.json", lambda b: b[:50] + b"\xff" + b[51:], "utf-8")], ids=str)
def test_a_damaged_checkpoint_is_refused(tmp_path, file, change, said):
    shutil.copytree(MICRO, tmp_path / "changed")
    (tmp_path / "changed" / file).write_bytes(change((MICRO / file).read_bytes()))
    with pytest.raises(ValueError, match=f"changed.*{said}"):
        g.load_pretrained(tmp_path / "changed")


# ---- Training against a plain loop ----
TRAINED = {"last_layer": "out_head", "last_block": r"out_head|trf_blocks\.1|final_norm", "all": "",
           "last_two_blocks": "out_head|trf_blocks|final_norm", "lora": "out_head"}
READERS = {"last": lambda logits: logits[-1], "first": lambda logits: logits[0],
           "mean": lambda logits: logits.mean(dim=0)}  # logits (tokens, classes) of one message
RESULTS = ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "final_accuracy", "steps")
TRAININGS = [{}, {"seed": 7}, {"weight_decay": 50.0}, {"epochs": 3, "eval_iter": 1}, {"dtype": "bfloat16"},
    {"trainable_layers": "last_layer"}, {"trainable_layers": "last_two_blocks"}, {"trainable_layers": "all"},
    {"trainable_layers": "lora", "lora_rank": 4, "lora_alpha": 6.0},
    {"schedule": "linear", "epochs": 20, "accumulation_steps": 2},
    {"token_pos": "first"}, {"token_pos": "mean"}, {"causal_mask": False}, {"context_length": 9},
    {"context_length": "model", "trainable_layers": "last_layer", "epochs": 1}, {"class_weights": [0.5, 2.0]},
    {"class_weights": [0.5, 2.0], "batch_size": 1}, {"padding": False}, {"init": "random", "seed": 7},
    {"class_weights": [0.5, 2.0], "batch_size": 1, "accumulation_steps": 5},
    {"batch_size": 10, "accumulation_steps": 2},  # three batches: the last is an update of its own
    {"padding": False, "trainable_layers": "all"}, {"padding": False, "batch_size": 1, "causal_mask": False},
    {"padding": False, "batch_size": 1, "token_pos": "mean"}]
SHORT = {"epochs": 2, "eval_freq": 3, "eval_iter": 2, "lr": 1e-3}
LONGEST = max(len(TOKENIZER.encode_ordinary(text)) for text in g.prepare_splits(messages())[0][0]["Text"])


def finetuned(settings, device="cpu"):
    """Return (classifier, results, splits) of a short training of the micro checkpoint."""
    settings, splits = SHORT | settings, g.prepare_splits(messages())[0]
    class_weights, (model, *_) = settings.pop("class_weights", None), g.load_pretrained(MICRO)
    class_weights = class_weights and torch.tensor(class_weights)
    return *g.finetune(model, TOKENIZER, splits, class_weights, device, **settings), splits


def plain_model(s):
    model, *_ = g.load_pretrained(MICRO)
    if s.init == "random":
        torch.manual_seed(s.seed)
        model = GPTModel(BASE_CONFIG)
    for block in model.trf_blocks:
        block.att.causal = s.causal_mask
    torch.manual_seed(s.seed)
    model.out_head = nn.Linear(16, 2)
    for name, param in model.named_parameters():
        param.requires_grad = bool(re.match(TRAINED[s.trainable_layers], name))
    if s.trainable_layers == "lora":
        replace_linear_with_lora(model, s.lora_rank, s.lora_alpha)
    return model


def plain_training(splits, s):
    """Train as the book does, one message after the other; return results and test probabilities."""
    length = {"longest": LONGEST, "model": 1024}.get(s.context_length, s.context_length)
    loaders = []
    for split in splits:
        texts = [torch.tensor(padded(text, length)) for text in split["Text"]]
        texts = texts if s.padding else [ids[ids != END] for ids in texts]
        rows, is_train = list(zip(texts, (split["Label"] == "spam").astype(int))), not loaders
        loaders.append(DataLoader(rows, s.batch_size, is_train, collate_fn=list, drop_last=is_train))
    model, class_weights = plain_model(s), torch.tensor(s.class_weights)
    def logits_and_labels(batch):
        logits = torch.stack([READERS[s.token_pos](model(ids[None])[0]) for ids, _ in batch])
        return logits, torch.tensor([label for _, label in batch])
    def loss_of(batch):
        logits, labels = logits_and_labels(batch)
        return (class_weights[labels] * F.cross_entropy(logits, labels, reduction="none")).sum() / len(batch)
    def accuracy_of(batches):
        logits, labels = logits_and_labels([row for batch in batches for row in batch])
        return (logits.argmax(dim=-1) == labels).double().mean().item()
    torch.manual_seed(s.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, weight_decay=s.weight_decay)
    results, step = {name: [] for name in RESULTS}, 0
    for _ in range(s.epochs):
        for number, batch in enumerate(loaders[0], 1):
            (loss_of(batch) / s.accumulation_steps).backward()
            if number % s.accumulation_steps == 0 or number == len(loaders[0]):
                if s.schedule == "linear":  # of 40 updates of 2 batches the fourth has the highest rate
                    optimizer.param_groups[0]["lr"] = s.lr * np.interp(step // 2, [0, 3, 39], [0.04, 1, 0])
                optimizer.step()
                optimizer.zero_grad()
            if step % s.eval_freq == 0:
                results["steps"].append(step)
                for name, loader in zip(("train_loss", "val_loss"), loaders):
                    results[name].append(np.mean([loss_of(b).item() for b in islice(loader, s.eval_iter)]))
            step += 1
        for name, loader in zip(("train_accuracy", "val_accuracy"), loaders):
            results[name].append(accuracy_of(islice(loader, s.eval_iter)))
    results["final_accuracy"] = [accuracy_of(loader) for loader in loaders]
    return results, logits_and_labels(loaders[2].dataset)[0].softmax(dim=-1).detach()


@pytest.mark.parametrize("settings", TRAININGS, ids=str)
def test_training_and_the_saved_classifier_equal_a_plain_loop(tmp_path, settings):
    classifier, ours, splits = finetuned(settings)
    s = SimpleNamespace(**g.finetune.__kwdefaults__ | {"class_weights": [1.0, 1.0]} | SHORT | settings)
    theirs, probabilities = plain_training(splits, s)
    tolerance = 1e-4 if s.dtype == "float32" else 0.02
    for name in RESULTS:
        assert ours[name] == pytest.approx(theirs[name], abs=tolerance), name
    assert ours["examples_seen"] == s.epochs * (32 // s.batch_size) * s.batch_size
    predicted = classifier.predict_proba(splits[2]["Text"])
    torch.testing.assert_close(predicted, probabilities, atol=tolerance, rtol=0)
    g.save_classifier(tmp_path / "c.pth", classifier)
    loaded = g.load_classifier(tmp_path / "c.pth")
    assert torch.equal(loaded.predict_proba(splits[2]["Text"]), predicted) and not loaded.model.training
    dtypes = [b.norm1.scale.dtype for b in loaded.model.trf_blocks if b.norm1.scale.requires_grad]
    assert dtypes == [getattr(torch, s.dtype), torch.float32]  # of both blocks: it can be trained further


@pytest.mark.parametrize("processes, missing", [(1, 0), (1, 1), (2, 0), (2, 1)])
def test_hidden_states_take_half_of_the_memory_at_most(tmp_path, monkeypatch, capsys, processes, missing):
    pages = 2 * processes * 46 * LONGEST * 16 * 4 - missing  # twice messages * tokens * emb * bytes
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": pages}.get)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    test_training_and_the_saved_classifier_equal_a_plain_loop(tmp_path, {})
    assert ("computed once" in capsys.readouterr().out) == (missing == 0)


def test_settings_out_of_their_range_are_refused_and_those_without_effect_warned_of(monkeypatch):
    splits, right = g.prepare_splits(messages())[0], g.finetune.__kwdefaults__
    g.check_settings(splits, {}, **right | {"seed": 0, "lr": 0, "context_length": 1, "batch_size": 32})
    wrong = {"batch_size": [0, 33], "seed": [-1, 2**64], "lr": [-1, np.nan], "weight_decay": [-1, np.inf],
             "lora_alpha": [-1], "context_length": [0, "short"], "epochs": [0], "accumulation_steps": [0],
             "eval_freq": [0], "eval_iter": [0], "lora_rank": [0, 1.5], "token_pos": ["middle"]}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name} .*{value}"):
                g.check_settings(splits, {}, **right | {name: value})
    for config, said in (({"vocab_size": 50}, "tokenizer"), ({"drop_rate": 0.1}, "got 0.1")):
        with pytest.raises(ValueError, match=said):
            g.finetune(GPTModel(BASE_CONFIG | config), TOKENIZER, splits)
    with pytest.warns(UserWarning, match="bfloat16"), pytest.warns(UserWarning, match="46 .* to 1 token"):
        finetuned({"dtype": "bfloat16", "trainable_layers": "all", "context_length": 1})
    for processes, fewest in ((3, 4), (4, 2)):
        monkeypatch.setattr(g, "get_rank_and_world_size", lambda: (0, processes))
        with pytest.raises(ValueError, match=f"{processes} processes .* 8 or {fewest} messages"):
            g.check_settings([*splits[:2], splits[2][:fewest]], {}, **right)


@pytest.mark.parametrize("at_chance, num_spam", [(0, 4), (1, 4), (2, 4), (1, 0)])
def test_a_run_is_at_chance_where_validation_is_not_better_than_one_label(at_chance, num_spam, capsys):
    class Echo(nn.Module):  # the label is the id
        forward = lambda self, batch: F.one_hot(batch.inputs, 2)
    labels = torch.tensor([0] * (10 - num_spam) + [1] * num_spam)
    items = [[(label[None] * (split != at_chance), label) for label in labels] for split in range(3)]
    loaders = [DataLoader(rows, 5, collate_fn=g.collate) for rows in items]
    texts = ["abcdefghij", "qrstuvwxyz", "bcdefghxyz"]  # training's, validation's, test's
    splits = [pd.DataFrame({"Label": labels, "Text": [*text]}) for text in texts]
    with warnings.catch_warnings(record=True) as caught:
        accuracies = g.calc_final_accuracies(Echo(), loaders, "cpu", splits)
    assert accuracies == [1 - num_spam / 10 if split == at_chance else 1 for split in range(3)]
    assert len(caught) == ((at_chance, num_spam) == (1, 4))  # validation alone is judged, with two labels
    assert "Of 10 test messages 7 also occur, word for word, in training;" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", TRAININGS, ids=str)
def test_every_setting_trains_saves_loads_and_classifies_on_a_gpu(tmp_path, settings):
    (made, results, splits), (_, expected, _) = finetuned(settings, "cuda"), finetuned(settings)
    assert results["val_loss"] == pytest.approx(expected["val_loss"], abs=0.02)
    g.save_classifier(tmp_path / "c.pth", made)
    loaded, texts = g.load_classifier(tmp_path / "c.pth", "cuda"), splits[2]["Text"]
    torch.testing.assert_close(loaded.predict_proba(texts), made.predict_proba(texts))
    assert all(param.is_cuda for some in (made, loaded) for param in some.model.parameters())
    assert not any(tensor.is_cuda for tensor in torch.load(tmp_path / "c.pth")["model"].values())


def test_predict_takes_texts_in_any_common_form_and_says_what_it_does_not_read():
    made, texts = untrained_classifier(), [text[:i % 9] for i, text in enumerate(MESSAGES["Text"][:400])]
    made.predict(" " * 1_000_000 + "a")  # at which tiktoken panics
    expected, ids = made.predict_proba(texts), [TOKENIZER.encode_ordinary(text) for text in texts]
    for same in (pd.Series(texts, index=range(9, 409)), np.array(texts), iter(texts), ids):
        assert torch.equal(made.predict_proba(same), expected)
    alone = torch.cat([made.predict_proba(text) for text in texts])  # as in batches
    torch.testing.assert_close(alone, expected)
    assert made.predict(texts) == [made.labels[i] for i in alone.argmax(dim=-1)] and made.predict([]) == []
    for wrong in (pd.DataFrame({"Text": texts}), pd.Series(["a", None]), b"bytes", {"Text": "a"}, [1.5]):
        with pytest.raises(TypeError, match="expected a string, or a list"):
            made.predict(wrong)
    with pytest.warns(UserWarning, match="cut to 10 tokens"):
        assert torch.equal(made.predict_proba([[*range(11)]]), made.predict_proba([[*range(10)]]))


def test_metrics_equal_scikit_learn():
    sk = pytest.importorskip("sklearn.metrics")
    rng, names = np.random.default_rng(0), np.array(["a", "b", "c", "d"])
    true, predicted = names[rng.integers(4, size=300)], names[rng.integers(3, size=300)]  # never "d"
    accuracy, table, confusion = g.calc_metrics(true, predicted, names)
    theirs = sk.classification_report(true, predicted, output_dict=True, zero_division=0)
    assert accuracy == pytest.approx(theirs["accuracy"])
    for name in names:
        assert table.rename(columns={"f1": "f1-score"}).loc[name].to_dict() == pytest.approx(theirs[name])
    assert confusion.to_numpy().tolist() == sk.confusion_matrix(true, predicted).tolist()


def test_two_processes_and_accumulated_batches_train_as_one_large_batch(tmp_path, trained):
    (tmp_path / "d.tsv").write_bytes(as_uci(messages(ham=30, spam=22)))  # 36 / 5 / 11 messages
    (tmp_path / "odd.tsv").write_bytes(as_uci(messages(ham=23, spam=22)))  # 31 of training: 16 and 15
    use, model = ("--classifier", trained.out, "--device", "cpu"), ("--model", MICRO, "--device", "cpu")
    training = lambda name, *args: train_command(tmp_path, "--epochs", 3, "--out", tmp_path / name, *args)
    recipes = {balance: ("--balance", balance, "--batch-size", 36) for balance in ("none", "weights")}
    status, out, err = torchrun(tmp_path, ["classify", *use, "hello"], ["evaluate", *use],
        *[training(f"two-{balance}", *args) for balance, args in recipes.items()],
        training("odd", "--data", tmp_path / "odd.tsv", "--balance", "none"),
        ["experiments", "--data", tmp_path / "d.tsv", *model, "--rows", 2, "--epochs", 1])
    assert status == 0 and "without an active exception" not in err, err
    assert out.count("\thello\n") == out.count("Confusion matrix") == out.count("\n| 2 |") == 1
    assert out.count("Training completed") == out.count("Ep 1 (Step 000000)") == 3  # the log of each, once
    assert metrics_in(tmp_path / "odd")["examples_seen"] == 3 * 3 * 8  # 3 epochs of 3 batches
    for balance, args in recipes.items():
        assert g.main(training(balance, *args)) == 0
        assert g.main(training(f"half-{balance}", *args, "--batch-size", 18, "--accumulation-steps", 2)) == 0
        one, *others = [tmp_path / (prefix + balance) for prefix in ("", "two-", "half-")]
        state = g.load_classifier(one / "classifier.pth").model.state_dict()
        for other in others:
            assert metrics_in(other)["final_accuracy"] == metrics_in(one)["final_accuracy"]
            for name, value in g.load_classifier(other / "classifier.pth").model.state_dict().items():
                tolerance = 1 if "W_key.bias" in name else 1e-5  # softmax ignores that bias
                torch.testing.assert_close(value, state[name], atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("option, value, said", [
    ("--lr", 1e18, "smaller lr"), ("--model", "124M", "cannot download")], ids=["in both", "in the first"])
def test_two_processes_that_fail_say_why_once(tmp_path, option, value, said):
    status, out, err = torchrun(tmp_path, train_command(tmp_path, option, value))
    assert status != 0 and "without an active exception" not in err
    assert err.count("gpt_spam: error: ") == err.count(said) == 1 and "[rank" not in err, err


# ---- Tables, lines, downloads, files ----
@pytest.mark.parametrize("content, found, said", [
    (b"label,text\n ham ,a\nHam,b\n\n \nham, \n", [["ham", "a"], ["Ham", "b"], ["ham", " "]], "empty .*: 1"),
    (b'LABEL,Text,n\nham,"a\nb",1\nspam,"say ""hi""",2\n', [["ham", "a\nb"], ["spam", 'say "hi"']], None),
    (b"ham\tHey, text; 5'11\" me\nspam\tlabel\n", [["ham", "Hey, text; 5'11\" me"], ["spam", "label"]], None),
    (b"label,text\r1,one\r2,two", [["1", "one"], ["2", "two"]], None),
    (b'[{"label": 1, "text": 10, "x": 1}, {"label": 1.0, "text": 0.5}]', [["1", "10"], ["1", "0.5"]], None),
    ('{"label": true, "text": "a\u2028b"}\r\n'.encode(), [["True", "a\u2028b"]], None),
    (b'{"label": 1, "text": "\\ud800\\u0000b"}\n\n{"label": 2, "text": 3}', [["1", "? b"], ["2", "3"]], None),
    ("\ufefflabel;text\r\ne\u0301;£5, ok\r\n\ufeffé;b\r\n".encode(), [["é", "£5, ok"], ["é", "b"]], None),
    ("label\ttext\nham\t£5; NA, ok\n".encode("utf-16"), [["ham", "£5; NA, ok"]], None),
    (b'[\n{"text": "a\\nb", "label": "NA"}]', [["NA", "a\nb"]], None),
    ("label,text\nham,£5 “now”\n".encode("cp1252"), [["ham", "£5 “now”"]], "Windows-1252"),
    (b'label\ttext\nham\t"a\nspam\tb"\n', [["ham", "a\nspam\tb"]], "row 1 .* quotation mark")], ids=str)
def test_a_table_is_read_as_it_was_meant_and_what_is_doubtful_is_said(tmp_path, content, found, said):
    (tmp_path / "a.csv").write_bytes(content)
    with warnings.catch_warnings(record=True) as caught:
        assert g.read_messages(tmp_path / "a.csv").values.tolist() == found
    assert [bool(re.search(said, str(warning.message))) for warning in caught] == [True] * (said is not None)


@pytest.mark.parametrize("content, said", [
    (b"label,text\nham,hello\nspam\nham,bye\n", r"row 2 .*\['spam'\]"),  # a short row
    (b"label,text\nham,hello\nthere\n", r"row 2 .*\['there'\]"),  # a text broken in two lines
    (b"label,text\nham,a\nTotal: 1 message\n", "row 2 .*Total"), (b"label,text\nham,a,b\n", "row 1 .*'b'"),
    (b"label,text\nham,a\nspam,b\nlabel,text\nham,c\n", "row 3 .*'label', text 'text'"),
    (b'text,label\n"a", "ham"\n', 'row 1 .*\'"ham"\''), (b'label,text\nham,a\n""\n', r"row 2 .*\[''\]"),
    (b"label,text,Text\nham,a,b\n", "'text', 'text'.* and 1 rows"), (b"label,text\n", "and 0 rows"),
    (b"review,stars\nfine,5\n", r"the names \['label', 'text'\].*'review', 'stars'"),
    (b"label,text\nham,a\n ,lost\n", "row 2 .*'lost'"), (b"label,text\nh\x1b[2Jam,a\n", r"row 1 .*\\x1b"),
    (b'label,text\nham,"hello\nspam,b\n', "quotation mark"), (b"label,text\nham,a\0\n", "binary"),
    (b"PK\3\4\0\0\0\0", "binary"), (b"", "is not a table"), (b'{"text": \n', "is not a table"),
    (b'{"label": 1, "text": "a"}\n{"label": null, "text": "b"}\n', "row 2 .*None"),
    (b'[{"label": 1, "text": 10}, {"label": 2}]', "row 2 "), (b'["a", "b"]', "data.tsv"),
    (b'{"label": "a", "text": ["b"]}', r"row 1 .*'b'")], ids=str)
def test_a_table_that_cannot_be_used_is_refused_in_one_line(tmp_path, content, said):
    (tmp_path / "data.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=f"^.*{said}.*$") as caught:
        g.read_messages(tmp_path / "data.tsv")
    assert "data.tsv" in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*not all UTF-8")
@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_each_line_has_one_answer_however_the_bytes_arrive(size):
    def lines_of(content):
        pieces = iter([content[i:i + size] for i in range(0, len(content), size)])
        stream = SimpleNamespace(read1=lambda limit: next(pieces, b""))
        return [line for lines in g.read_lines(stream, "a stream") for line in lines]
    content = ("\ufeffhello\n\n😀 ü\r\nlone\rreturn\r\r\n".encode() + "£5 “now”\n".encode("cp1252")
               + "£6 “now”\n".encode() + b"a\0b\x85c\n\xc3\xa9\x85\n \xe2\x80\xa8\n\xff\x81end")
    assert lines_of(content) == ["hello", "", "😀 ü", "lone", "return", "", "£5 “now”", "£6 “now”", "a\0b…c",
                                 "Ã©…", " \u2028", "ÿ\ufffdend"]
    assert lines_of(b"four\n\xff\xfea\0\n6\n")[::2] == ["four", "6"]
    for packed in (zipped(b"four"), gzip.compress(b"four"), "four".encode("utf-16")):
        with pytest.raises(ValueError, match="a stream is packed or UTF-16"):
            next(g.read_lines(io.BytesIO(packed), "a stream"))
    assert len(next(g.read_lines(io.BytesIO(b"line\n" * 100_000), "a file"))) < 1000  # the first come soon


CONTENT = np.random.default_rng(0).bytes(4 << 20)
RIGHT = partial(g.check_sha256, expected=hashlib.sha256(CONTENT).hexdigest())


@pytest.mark.parametrize("part, faults, starts", [
    (b"", [], [0]), (b"", ["broken"] * 3, [0, 0, 0, 0]), (b"", ["cut", "cut"], [0, 2 << 20, 3 << 20]),
    (b"", ["cut", "reversed"], [0, 2 << 20, 0]), (b"", ["cut", "no ranges"], [0, 2 << 20]),
    (b"", ["reversed"], [0, 0]), (CONTENT[:99], [], [99]), (b"wrong", [], [5, 0]),
    (CONTENT + b"more", [], [len(CONTENT) + 4, 0])], ids=lambda value: str(value)[:40])
def test_download_takes_the_backup_resumes_and_ends_right(server, tmp_path, part, faults, starts):
    server.files, server.faults = {"/good": CONTENT, "/backup": CONTENT}, faults.copy()
    (tmp_path / "f.part").write_bytes(part)
    urls = [f"{DEAD}/good", *[f"{server.url}/{name}" for name in ("missing", "good", "backup")]]
    g.download(urls, tmp_path / "f", RIGHT)
    assert (tmp_path / "f").read_bytes() == CONTENT and files_in(tmp_path) == {"f"}
    assert server.starts[1:] == starts  # the missing one was asked for once


def test_train_downloads_model_and_data_once(server, run, tmp_path, monkeypatch):
    for name in g.CHECKPOINT_FILES:
        server.files |= {f"/gpt-2/{size}/{name}": (MICRO / name).read_bytes() for size in ("124M", "355M")}
    server.files |= {"/sms.zip": zipped(TABLE),
                     f"/gpt-2/355M/{g.DATA_FILE}": (MICRO / g.DATA_FILE).read_bytes()[:-4]}
    for name, value in {"HERE": tmp_path, "MODEL_URLS": [DEAD, f"{server.url}/gpt-2"],
                        "MODEL_SHA256": {"encoder.json": hashlib.sha256(ENCODER.encode()).hexdigest()},
                        "DATA_URLS": [f"{server.url}/sms.zip"],
                        "DATA_SHA256": hashlib.sha256(TABLE).hexdigest()}.items():
        monkeypatch.setattr(g, name, value)
    command = train_command(tmp_path, "--model", "auto", "--data", "auto")
    status, out, err = run(*command)
    assert status == 0 and out.startswith("Model gpt2-124M.npz, data SMSSpamCollection.tsv, device"), err
    assert "112,380 bytes" in run(*command, "--model", "355M")[2]
    server.files["/gpt-2/355M/encoder.json"] = b"{}"
    assert "SHA-256" in run(*command, "--model", "355M")[2]  # what was damaged is thrown away
    assert files_in(tmp_path / "weights") == {"gpt2-124M.npz", "355M.download/hparams.json"}
    server.files["/gpt-2/355M/encoder.json"] = ENCODER.encode()
    monkeypatch.setitem(g.MODEL_SHA256, f"355M/{g.DATA_FILE}", "0" * 64)
    assert "data-00000-of-00001.part is" in run(*command, "--model", "355M")[2]  # as its own hash says
    server.files.clear()
    assert run(*command, "--model", "124M", "--data", "sms")[0] == 0
    (tmp_path / "weights" / "gpt2-124M.npz").unlink()
    assert re.search("ConnectionError, .*404", run(*command)[2])  # a server was reached: it is not offline


def test_without_a_network_auto_takes_the_bundled_files_and_only_auto(run, tmp_path, micro, monkeypatch):
    for name, value in {"MODEL_URLS": [DEAD], "DATA_URLS": [DEAD], "HERE": tmp_path, "TINY": micro,
                        "SAMPLE": tmp_path / "d.tsv"}.items():
        monkeypatch.setattr(g, name, value)
    command = train_command(tmp_path, "--model", "auto", "--data", "auto")
    del command[command.index("--lr"):command.index("--lr") + 2]  # the model has its own
    with pytest.warns(UserWarning, match="SMS data") as caught:
        status, out, err = run(*command)
    assert status == 0 and any("tiny.npz" in str(warning.message) for warning in caught), err
    assert f"Model {micro.name}, data d.tsv" in out and "epochs 2, lr 0.002," in out  # epochs was given
    assert all("cannot download" in run(*command, asked)[2] for asked in ("--model=124M", "--data=sms"))


def test_a_file_is_replaced_by_a_whole_one_and_a_pipe_by_none(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(FileNotFoundError, match="mine"), g.atomic_write(tmp_path / "f") as temporary:
        temporary.write_text("half")
        raise FileNotFoundError("mine")
    assert files_in(tmp_path) == {"f"} and (tmp_path / "f").read_text() == "old"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe is not a regular file"):
        g.save_classifier(tmp_path / "pipe", untrained_classifier())
    assert (tmp_path / "pipe").is_fifo() and files_in(tmp_path) == {"f"}
    model = untrained_classifier().model
    replace_linear_with_lora(model, rank=2, alpha=2)  # whose first logits are those of the model
    g.save_classifier(tmp_path / "f", g.Classifier(torch.compile(model), TOKENIZER, ["ham", "spam"], 10))
    assert g.load_classifier(tmp_path / "f").predict("a") == untrained_classifier().predict("a")


def test_a_classifier_that_cannot_be_used_says_why_and_runs_no_code(tmp_path, monkeypatch):
    def error_of(content):
        if isinstance(content, bytes):
            Path("bad.pth").write_bytes(content)
        else:
            torch.save(content, "bad.pth")
        with pytest.raises(ValueError, match="^.*bad.pth.*$") as caught:
            g.load_classifier("bad.pth")
        return str(caught.value)
    monkeypatch.chdir(tmp_path)
    g.save_classifier("bad.pth", untrained_classifier())
    good, content = torch.load("bad.pth", weights_only=True), bytearray(Path("bad.pth").read_bytes())
    content[len(content) // 2] ^= 1
    for other in (b"text", b"", zipped(b"another zip"), Evil(), good | {"labels": Evil()}, [1], torch.ones(2),
                  good | {"labels": ["a"]}, good["model"], good | {"unknown": 1},
                  good | {"config": BASE_CONFIG | {"n_heads": 0}}):
        assert "is not a classifier" in error_of(other)
    assert "is damaged" in error_of(bytes(content)) and "is damaged" in error_of(bytes(content[:5000]))
    del good["version"]  # as the first version had it
    assert "train again" in error_of(good) and "train again" in error_of(good | {"version": 1})
    with pytest.raises(FileNotFoundError, match="no missing.pth; train"):
        g.load_classifier("missing.pth")
    assert os.listdir() == ["bad.pth"]


# ---- The command line ----
FOLDER = {"classifier.pth", "metrics.json", "train.csv", "validation.csv", "test.csv"}


def test_a_training_is_one_folder_and_prints_the_chapters_log(trained):
    assert files_in(trained.out) == FOLDER | {"loss-plot.png", "accuracy-plot.png"}
    frames = [pd.read_csv(trained.out / f"{name}.csv") for name in ("train", "validation", "test")]
    assert [frame["Text"].tolist() for frame in frames] == [
        split["Text"].tolist() for split in g.prepare_splits(messages())[0]]
    metrics, log, label = trained.metrics, trained.log, frames[0]["Label"].mode()[0]
    assert set(metrics) == {*RESULTS, "examples_seen", *g.finetune.__kwdefaults__}
    assert [metrics[name] for name in ("epochs", "lr", "examples_seen", "steps")] == [2, 1e-3, 64, [0, 3, 6]]
    for values in zip((1, 1, 2), metrics["steps"], metrics["train_loss"], metrics["val_loss"]):
        assert "Ep {} (Step {:06d}): Train loss {:.3f}, Val loss {:.3f}\n".format(*values) in log
    assert len(re.findall(r"\nTraining accuracy: [\d.]+% \| Validation accuracy: [\d.]+%", log)) == 2
    assert "4 / 10 messages\nLabels of training: " in log and "epochs 2, lr 0.001, eval_freq 3\n" in log
    assert "test: {:.2%} / {:.2%} / {:.2%}\n".format(*metrics["final_accuracy"]) in log
    assert f"always '{label}' is right in {(frames[2]['Label'] == label).mean():.2%}\n" in log


def test_a_second_training_replaces_all_files_of_the_first_but_no_table_that_it_reads(trained, run, tmp_path):
    shutil.copytree(trained.out, tmp_path / "out")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files_in(tmp_path / "out")}
    (tmp_path / "linked.csv").symlink_to(tmp_path / "out" / "test.csv")
    for option, name in (("--data", "../linked.csv"), ("--test-data", "../out/train.csv")):
        status, out, err = run(*train_command(tmp_path, option, tmp_path / "out" / name))
        assert status == 2 and Path(name).name in err and out == ""
    assert before == {name: (tmp_path / "out" / name).read_bytes() for name in files_in(tmp_path / "out")}
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert run(*train_command(tmp_path, "--epochs", 1, "--seed", 5))[0] == 0
    assert files_in(tmp_path / "out") == FOLDER | {"mine.txt"} and metrics_in(tmp_path / "out")["seed"] == 5
    assert (tmp_path / "out" / "classifier.pth").read_bytes() != before["classifier.pth"]


@pytest.mark.parametrize("option", ["--eval-freq=50", "--batch-size=32", "--accumulation-steps=4"])
def test_a_classifier_of_nan_is_not_saved(run, tmp_path, option):  # the last two make one update
    status, _, err = run(*train_command(tmp_path, "--lr", 1e18, "--epochs", 1, option))
    assert status == 2 and "smaller lr" in err and files_in(tmp_path / "out") == set()


def test_plots_show_values_where_they_were_measured(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(g, "plot_values", lambda *args: figures.append(plot_values(*args)) or figures[-1])
    g.save_plots((tmp_path / "loss.tmp", tmp_path / "accuracy.tmp"), {  # 26 steps an epoch
        "epochs": 5, "batch_size": 8, "examples_seen": 5 * 26 * 8, "steps": [0, 50, 100],
        "train_loss": [3.0, 2.0, 1.0], "val_loss": [3.5, 2.5, 1.5],
        "train_accuracy": [0.5, 0.6, 0.7, 0.8, 0.9], "val_accuracy": [0.4, 0.5, 0.6, 0.7, 0.8]})
    (loss, loss_above), (accuracy, accuracy_above) = [figure.axes for figure in figures]
    assert list(loss.lines[1].get_xdata()) == pytest.approx([0, 50 / 26, 100 / 26])
    assert list(accuracy.lines[1].get_xdata()) == pytest.approx([1, 2, 3, 4, 5])
    assert list(loss_above.lines[0].get_xdata()) == pytest.approx([0, 400, 800])
    assert list(accuracy_above.lines[0].get_xdata()) == pytest.approx([208, 416, 624, 832, 1040])


def test_own_columns_three_labels_and_a_test_table_are_trained_on_and_evaluated(run, tmp_path):
    frame = messages().rename(columns={"Text": "review", "Label": "stars"}).replace({"ham": 5, "spam": 1})
    frame.loc[frame.index[::5], "stars"], data, test = 3, tmp_path / "r.jsonl", tmp_path / "t.jsonl"
    frame["review"] += "\rbye"  # a lone carriage return, as in cells of Excel
    frame.drop(frame.index[::4]).to_json(data, orient="records", lines=True)
    frame[::4].to_json(test, orient="records", lines=True)
    columns = ["--text-column", "review", "--label-column", "Stars"]
    status, _, err = run(*train_command(tmp_path, "--data", data, "--test-data", test, *columns))
    assert status == 0 and len(pd.read_csv(tmp_path / "out" / "train.csv")) == 29, err  # of 34, 7 to 1
    use = ["evaluate", "--classifier", tmp_path / "out", "--device", "cpu"]
    _, out, err = run(*use)
    assert f"12 messages, accuracy {metrics_in(tmp_path / 'out')['final_accuracy'][2]:.2%}" in out, err
    assert re.search(r"precision +recall +f1 +support\n1 .*\n3 .*\n5 ", out)
    assert run(*use, "--data", test, *columns)[1].split("messages")[1] == out.split("messages")[1]
    _, out, err = run("classify", *use[1:], "--input", test, "--text-column", "review")
    assert out.count("bye\n") == 12, err
    (tmp_path / "one.csv").write_text('text\na\n""\n\nb\n')  # a column of which one text is empty
    assert run("classify", *use[1:], "--input", tmp_path / "one.csv")[1].count("\n") == 3


def test_classify_prints_label_probability_and_text(trained, run, tmp_path, monkeypatch):
    classify = partial(run, "classify", "--classifier", trained.out, "--device", "cpu")
    made = g.load_classifier(trained.out / "classifier.pth")
    texts = ["\x1b[2Jwin\r\nnow\x9b1m\0", "", "\u202e😀"]
    answers = "".join(f"{made.labels[row.argmax()]}\t{row.max():.4f}\t{text}\n"
                      for row, text in zip(made.predict_proba(texts), [" [2Jwin  now 1m ", "", " 😀"]))
    assert classify(*texts) == (0, answers, "")
    content = "\ufeffa, text\n\n<|endoftext|>\r\nlabel,text\rend".encode()
    (tmp_path / "a.txt").write_bytes(content)
    _, out, err = classify("--input", tmp_path / "a.txt")
    texts = ["a, text", "", "<|endoftext|>", "label,text", "end"]
    assert [line.split("\t")[2] for line in out.splitlines()] == texts and err == ""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: True))
    status, again, err = classify()  # at a terminal it says how to end
    assert again == out and "Ctrl-D" in err
    out = classify("--by-token", "Win 😀\nnow", "")[1].splitlines()
    ids = TOKENIZER.encode_ordinary("Win 😀\nnow")
    tokens, numbers = zip(*(line.split(" spam ") for line in out[:len(ids)]))
    assert "".join(map(str.rstrip, tokens)) == "Win" + "\ufffd" * 4 + "\\nnow"
    probabilities = made.predict_proba([ids[:end + 1] for end in range(len(ids))]).tolist()
    assert [number.split()[0] for number in numbers] == [f"{spam:.4f}" for _, spam in probabilities]
    assert re.fullmatch(r"\w+\t[\d.]+\tWin 😀 now", out[-2]) and re.fullmatch(r"\w+\t[\d.]+\t", out[-1])


def test_lines_are_answered_as_they_come_until_the_pipe_is_closed(trained):
    command = [sys.executable, g.__file__, "classify", "--classifier", str(trained.out), "--device", "cpu"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes, bufsize=0) as process:
        alarm = threading.Timer(60, process.kill)  # which ends every read below
        alarm.start()
        for sent, text in ((b"one\n", "one"), (b"\xa35\n", "£5"), (b"\xa36\r\n", "£6"), (b"\n", "")):
            process.stdin.write(sent)
            assert process.stdout.readline().decode().split("\t")[2:] == [text + "\n"]
        process.stdout.close()
        process.stdin.write(b"four\n")
        process.stdin.close()
        err = process.stderr.read().decode()
        alarm.cancel()
        assert process.wait(timeout=60) == 141
    assert re.fullmatch("gpt_spam: warning: standard input .*Windows-1252\n", err)  # once


def test_a_classifier_is_the_first_file_to_go_and_the_last_to_come(run, tmp_path, monkeypatch):
    done, replace, unlink = [], os.replace, Path.unlink
    monkeypatch.setattr(os, "replace", lambda old, new: (replace(old, new), done.append(Path(new))))
    monkeypatch.setattr(Path, "unlink", lambda path, **options: (unlink(path, **options), done.append(path)))
    (tmp_path / "out").mkdir()
    for name in (".classifier.pth.1.tmp", "test.csv"):  # as another training leaves them when it is killed
        (tmp_path / "out" / name).write_text("of process 1")
    assert run(*train_command(tmp_path, "--epochs", 1))[0] == 0
    names = [path.name for path in done if path.parent == tmp_path / "out" and ".tmp" not in path.name]
    assert [name == "classifier.pth" for name in names] == [True] + [False] * (len(names) - 2) + [True]
    assert files_in(tmp_path / "out") == FOLDER | {".classifier.pth.1.tmp"}


def test_ctrl_c_ends_quietly_with_130_and_warnings_steer_no_terminal(run, monkeypatch):
    monkeypatch.setattr(g, "load_classifier", lambda *args: signal.raise_signal(signal.SIGINT))
    assert run("classify", "hi") == (130, "", "")
    assert warnings.formatwarning("\x1b[2J", UserWarning, "", 1) == "gpt_spam: warning:  [2J\n"


def test_experiments_print_the_books_accuracy_beside_ours(run, tmp_path, monkeypatch):
    (tmp_path / "d.tsv").write_bytes(TABLE)
    command = ["experiments", "--data", tmp_path / "d.tsv", "--model", MICRO, "--epochs", 1, "--device=cpu"]
    _, out, err = run(*command)
    rows = {int(line.split(" | ")[0][2:]): line.strip("| ").split(" | ")[1:] for line in out.splitlines()[2:]}
    published = {1: 95, 2: 75, 3: 72, 4: 98.33, 5: 96.67, 10: 93.67, 11: 96.67, 13: 78.33, 14: 98, 15: 98.33,
                 16: 98.33, 17: 95.33, 18: 95, 19: 96.33}  # the others are of larger models
    assert {row: float(cells[4].rstrip("%")) for row, cells in rows.items()} == published, err
    assert rows[1] == rows[18] and rows[19][0] == rows[1][0] + ", token_pos mean" and "epochs 1" in rows[1][0]
    assert "lora_rank 16" in rows[11][0] and "lora_alpha 256" in rows[11][0]
    assert run(*command, "--rows", 2, 16)[1].splitlines()[2:] == re.findall(r"^\| (?:2|16) .*", out, re.M)
    monkeypatch.setattr(g, "MODEL_URLS", [DEAD])
    assert "cannot download" in run(*command, "--rows", 6)[2]  # of GPT-2 355M


@pytest.mark.parametrize("command, said", [
    ("train --out .", "test.csv is not a file beside"), ("train --out full", "loss-plot.png is not a file"),
    ("train --out /proc", "/proc"), ("train --model .", "hparams.json"),
    ("train --data stars.csv", "the names ['label', 'text']"), ("train --data eggs.csv", "20 messages"),
    ("train --test-data eggs.csv", "['eggs'] are not among"), ("train --model gpt5", "no model 'gpt5'"),
    ("train --model pickled.npz", "is not a model"), ("train --model 124M", "cannot download hparams.json"),
    ("train --device warp", "no device 'warp'"), ("train --model 124M --batch-size 33", "33 is more than 32"),
    ("train --model 124M --lr nan", "lr must be"), ("train --model 124M --context-length x", "got 'x'"),
    ("train --label-column text", "the names ['text', 'text']"), ("train --context-length 9999", "9,999"),
    ("train --no-padding --token-pos mean", "size 1"), ("train --no-padding --no-causal-mask", "size 1"),
    ("train --model 124M --context-length 1025", "1,024"), ("train --model 124M --lora-rank 769", "768"),
    ("train --lora-rank 17", "lora_rank 17"), ("experiments --data stars.csv", "the names"),
    ("classify --input a.txt hi", "--input FILE"), ("classify --text-column a hi", "--input FILE"),
    ("classify --input \x1b[2J.csv", " [2J.csv is not a"), ("classify --input nowhere.txt", "nowhere.txt"),
    ("evaluate --classifier nowhere", "train a classifier first"), ("evaluate --data eggs.csv", "eggs")])
def test_bad_input_is_one_line_and_status_2(run, trained, tmp_path, monkeypatch, command, said):
    monkeypatch.chdir(tmp_path)
    for name, value in {"HERE": tmp_path, "MODEL_URLS": [DEAD], "OUT": trained.out}.items():
        monkeypatch.setattr(g, name, value)
    name, *args = command.split()
    files = {"stars.csv": "review,stars\nfine,5\n", "eggs.csv": "label,text\neggs,hi\n", "test.csv": "",
             "\x1b[2J.csv": "review\n", "a.txt": "hi\n", "d.tsv": TABLE.decode(), "my_classifier.pth": "",
             "full/classifier.pth": ""}
    Path("full/loss-plot.png").mkdir(parents=True)
    for file, content in files.items():
        Path(file).write_text(content)
    np.savez("pickled.npz", np.array([Evil()], dtype=object))
    before = files_in(tmp_path)
    status, out, err = run(*(train_command(tmp_path, *args) if name == "train" else [name, *args]))
    assert status == 2 and re.fullmatch("gpt_spam: error: .*\n", err) and said in err
    assert files_in(tmp_path) == before and (out == "" or "more than" in err)  # the model's limits come late


def test_each_section_is_a_cell_and_each_command_has_help(capsys):
    cells = re.split(r"^# %% ---- .* ----\n", SOURCE, flags=re.MULTILINE)
    assert len(cells) - 1 == SOURCE.count("\n# %%") > 10
    space = {"__name__": "notebook", "__file__": g.__file__}
    for cell in cells:
        exec(compile(cell, "cell", "exec", optimize=2), space)  # as python -OO does
    space["OUT"] = Path("50%s off")
    for command in ("train", "experiments", "evaluate", "classify"):
        with pytest.raises(SystemExit, match="0"):
            space["main"]([command, "--help"])
        out, err = capsys.readouterr()
        assert "--device" in out and f"gpt_spam.py {command}" in out and err == ""


def test_the_python_blocks_of_the_readme_run_in_order(micro, trained, tmp_path, monkeypatch):
    shutil.copytree(trained.out, tmp_path / "weights" / "spam_classifier")  # small, as all files here
    shutil.copy(micro, tmp_path / "weights" / "tiny.npz")
    (tmp_path / "data").mkdir()
    messages().to_csv(tmp_path / "data" / "sample_sms.tsv", sep="\t", index=False)
    monkeypatch.chdir(tmp_path)
    blocks, space = re.findall(r"```python\n(import gpt_spam\b.*?)```", README, re.DOTALL), {}
    assert blocks != []
    for block in blocks:
        exec(block, space)


@pytest.mark.skipif(not os.environ.get("GPT_SPAM_ONLINE"), reason="downloads: set GPT_SPAM_ONLINE=1")
def test_numbers_printed_in_the_chapter(run, tmp_path):
    _, out, err = run("train", "--model", "124M", "--data", "sms", "--device", "cpu", "--out", tmp_path)
    assert "forward.\\n\\nThe first step is to understand the importance of your work" in out, err
    assert "accuracy 46.25% / 45.00% / 48.75% (10 batches), loss 2.453 / 2.583 / 2.322" in out
    metrics = metrics_in(tmp_path)
    for name, first, last in (("train_loss", 2.153, 0.083), ("val_loss", 2.392, 0.074)):
        assert [metrics[name][0], metrics[name][12]] == pytest.approx([first, last], abs=6e-4)
    assert [round(100 * accuracy, 2) for accuracy in metrics["final_accuracy"]] == [97.21, 97.32, 95.67]


if __name__ == "__main__":
    sys.exit(pytest.main(["-q", *sys.argv]))
