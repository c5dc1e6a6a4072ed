# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0", "tiktoken==0.14.0", "numpy>=1.26", "requests>=2.31", "pandas>=2.1", "tqdm", "matplotlib",
# ]
# ///
"""Finetune GPT-2 to spot spam SMS: data, model, weights, head, training, use (chapter 6.2 to 6.8).

    python gpt_spam.py train        then        python gpt_spam.py classify "You won a prize!"

One file, top to bottom in the order of chapter 6 of "Build a Large Language Model (From Scratch)"
(Sebastian Raschka, Manning 2024), with its names for functions and modules. The model is that of
"Language Models are Unsupervised Multitask Learners" (Radford et al., OpenAI 2019).

    text --tokenizer--> ids --padding--> (batch, tokens)
         --embeddings, frozen blocks--> (batch, tokens, emb)             the trunk
         --trained block, asked at one position--> (batch, asked, emb)   the top
         --final_norm, out_head--> (batch, asked, classes)
"""

import argparse
import contextlib
import csv
import errno
import hashlib
import importlib.util
import io
import json
import math
import os
import queue
import shutil
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache, partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import pandas as pd
import requests
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset

try:
    import fcntl  # file locks; not on Windows
except ImportError:
    fcntl = None

HERE = Path(__file__).resolve().parent

# Dimensions in the comments: batch, tokens, emb = heads * head, vocab, classes, and
# asked: the positions whose logits are wanted, one or (mean pooling) all.


# ---- Settings ----

@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2; the defaults are the 124M model's."""

    vocab_size: int = 50257     # byte-level BPE; the last id is <|endoftext|>
    context_length: int = 1024  # most tokens that the model can take in
    emb_dim: int = 768          # width of a token vector, a multiple of n_heads
    n_heads: int = 12           # attention heads a block
    n_layers: int = 12          # transformer blocks
    drop_rate: float = 0.0      # the chapter finetunes without dropout
    qkv_bias: bool = True       # OpenAI's checkpoints have one
    causal: bool = True         # a token sees itself and what stands before it

    def __post_init__(self):
        numbers = [self.vocab_size, self.context_length, self.emb_dim, self.n_heads, self.n_layers]
        if not all(type(n) is int and 0 < n < 1 << 20 for n in numbers) or self.emb_dim % self.n_heads:
            raise ValueError(f"no model has this shape (emb_dim must be a multiple of n_heads): {self}")


def setting(default, help, choices=()):
    """A field of FinetuneConfig; the command line takes flag, type, default and help from it."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class FinetuneConfig:
    """Every choice of a finetuning run; the defaults are the chapter's."""

    # what is trained
    trainable_layers: str = setting("last_block", "what is trained besides the new head",
                                    ("last_layer", "last_block", "last_two_blocks", "all", "lora"))
    lora_rank: int = setting(8, "columns of LoRA's A")
    lora_alpha: float = setting(8.0, "what LoRA's output is multiplied by")
    weights: str = setting("pretrained", "where the weights start", ("pretrained", "random"))
    # what the model is asked
    token_pos: str = setting("last", "the position that the label is read from; last_real: the last before the padding",
                             ("last", "first", "last_real"))
    pooling: str = setting("none", "mean: average the logits of all positions instead", ("none", "mean"))
    causal_mask: bool = setting(True, "a token sees only itself and what stands before it")
    padding: bool = setting(True, "bring all messages to one length")
    context_length: str = setting("longest", "that length: longest (training message), model (all it holds), N")
    # how it is trained
    epochs: int = setting(5, "passes over the training messages")
    batch_size: int = setting(8, "messages a step")
    accumulation_steps: int = setting(1, "batches whose gradients are added up before an update")
    lr: float = setting(5e-5, "AdamW's learning rate")
    weight_decay: float = setting(0.1, "AdamW's weight decay")
    warmup: float = setting(0.0, "share of the updates in which the learning rate rises to --lr")
    decay: bool = setting(False, "let the learning rate fall to 0 in a straight line after that")
    clip: float = setting(0.0, "largest norm of the gradient; 0: any")
    ignore_index: int = setting(-100, "label that the loss passes over")
    balance: str = setting("auto", "unequal classes: undersample (auto: ham and spam), weigh the loss (auto: others)",
                           ("auto", "undersample", "weights", "none"))
    dedupe: bool = setting(False, "drop repeated texts before the split, so that none stands on both sides")
    early_stop: int = setting(0, "stop after N epochs without a better validation loss, keep the best; 0: never")
    eval_freq: int = setting(50, "steps between two logged losses")
    eval_iter: int = setting(5, "batches behind a logged loss or epoch accuracy")
    seed: int = setting(123, "seeds new weights and the shuffling (the split is always the chapter's)")
    # how it is computed
    dtype: str = setting("float32", "of the frozen trunk; what trains stays float32", ("float32", "bfloat16"))
    cache: bool = setting(True, "run the frozen trunk once a message; off: everything each time, as in the chapter")

    def __post_init__(self):
        for names, least in (("batch_size accumulation_steps eval_freq eval_iter lora_rank", 1),
                             ("epochs lr weight_decay warmup clip early_stop", 0)):
            for name in names.split():
                if not least <= (value := getattr(self, name)) < math.inf:
                    raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
        for f in fields(self):
            choices, value = f.metadata["choices"], getattr(self, f.name)
            if choices and value not in choices:
                raise ValueError(f"{f.name} is {value!r}, not one of {', '.join(choices)}")


# ---- Files and processes ----

def rank():
    """This process's number under torchrun, or 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size():
    """How many processes torchrun started, or 1."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


@contextlib.contextmanager
def processes(device_name):
    """Join the processes that torchrun started, if it did; all but the first keep quiet on standard output."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        yield
        return
    cuda = torch.cuda.is_available() and device_name.startswith(("auto", "cuda"))
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The others wait while the first downloads, so the usual limit of minutes is too short.
    torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))
    try:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null if rank() else sys.stdout):
            yield
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def leader_first():
    """The first process alone runs the block, then the others, who find its work done."""
    if rank():
        torch.distributed.barrier()
    yield
    if world_size() > 1 and not rank():
        torch.distributed.barrier()


def progress(total, text, unit="B"):
    """A progress bar on stderr when that is a terminal and tqdm is installed; else a stand-in."""
    try:
        from tqdm import tqdm
    except ImportError:
        return contextlib.nullcontext(argparse.Namespace(update=lambda n: None))
    return tqdm(total=total, desc=text, unit=unit, unit_scale=True, leave=False, disable=True if rank() else None)


@contextlib.contextmanager
def locked(path):
    """Let one process at a time into the block; the system frees the lock however the process ends.

    `path` is a file made for it, which the block may rename or remove: then who waited makes a new one.
    """
    while True:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile by who had the lock
            file = open(path, "ab")
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
    with file:  # outside of the suppress: the block's own FileNotFoundError must get out
        yield


@contextlib.contextmanager
def atomic_write(path):
    """Give a temporary name next to `path`; rename it to `path` if the block ends well.

    A reader sees the old file or the whole new one, never half of it. What a killed process left
    has the same temporary name, so the next write replaces it. Devices and pipes are written as they are.
    """
    path = Path(path).resolve()
    if rank() or path.exists() and not path.is_file():  # one writer: what the other processes write goes nowhere
        yield Path(os.devnull) if rank() else path
        return
    temporary = path.with_name(f".{path.name}.tmp")
    with locked(temporary):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def reading(path, what):
    """Turn whatever goes wrong while reading a file from elsewhere into a ValueError of one line."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:300]
        raise ValueError(f"{path} is not {what}: {reason}") from None


def file_sha256(path):
    """The SHA-256 of a file, as hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# ---- 6.2 Dataset: download, parse, balance, split ----

DATA_URLS = (
    "https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
    "https://f001.backblazeb2.com/file/LLMs-from-scratch/sms%2Bspam%2Bcollection.zip",
)
DATA_SHA256 = "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d"


def fetch_part(url, path):
    """Download `url` to a part file next to `path`, behind the bytes that an earlier break left, and return its name.

    The name holds the address, length and version that it belongs to: a part of another file is never continued.
    """
    ask = partial(requests.get, url, stream=True, timeout=(5, 30))  # seconds to connect, to stall
    headers = {"Accept-Encoding": "identity"}  # else Content-Length would count compressed bytes
    with ask(headers=headers) as answer:
        answer.raise_for_status()
        total = int(answer.headers.get("Content-Length", 0))
        version = (url, total, answer.headers.get("ETag"), answer.headers.get("Last-Modified"))
        part = path.with_name(f"{path.name}.{hashlib.sha256(repr(version).encode()).hexdigest()[:8]}.part")
        have = part.stat().st_size if part.exists() and total else 0
        if have == total > 0:
            return part
        if (free := shutil.disk_usage(path.parent).free) < total - have:
            raise OSError(errno.ENOSPC, f"{path.name} needs {total - have:,} bytes, {path.parent} has {free:,} free")
        with contextlib.ExitStack() as stack:
            if have:
                answer = stack.enter_context(ask(headers={**headers, "Range": f"bytes={have}-"}))
                if answer.headers.get("Content-Range") != f"bytes {have}-{total - 1}/{total}":
                    answer.raise_for_status()
                    have = 0  # the whole file comes again
            file = stack.enter_context(part.open("ab" if have else "wb"))
            bar = stack.enter_context(progress(total or None, path.name))
            bar.update(have)
            for chunk in answer.iter_content(1 << 20):
                if not file.tell() and chunk[:512].lstrip()[:5].lower() in (b"<!doc", b"<html"):
                    raise OSError("a web page came instead of the file: a network's log-in page?")
                file.write(chunk)
                bar.update(len(chunk))
    if total and (size := part.stat().st_size) != total:
        if size > total:
            part.unlink()
        raise OSError(f"{size:,} of {total:,} bytes came")
    return part


def download(urls, path, check=None):
    """Fetch `path` from the first of `urls` that delivers it whole, trying each a few times.

    What comes has the announced length, and `check(part file)`, which may raise OSError, has looked at it.
    Raises OSError that names every address and what it answered.
    """
    failures = []
    for url in urls:
        for pause in (0, 1, 3):
            time.sleep(pause)
            try:
                part = fetch_part(url, path)
                if check:
                    try:
                        check(part)
                    except OSError:
                        part.unlink()
                        raise
                os.replace(part, path)
                for leftover in path.parent.glob(f"{path.name}.*.part"):
                    leftover.unlink()
                return
            except OSError as error:  # requests' errors are OSErrors, too
                if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC):
                    raise  # this machine's trouble, not the address's
                reason = getattr(error.args[0] if error.args else error, "reason", error)  # urllib3's, if there is one
                failures.append(f"{url} ({type(reason).__name__ if reason is not error else error})")
                begun = any(path.parent.glob(f"{path.name}.*.part"))
                if isinstance(error, requests.ConnectionError) and not begun or (
                        isinstance(error, requests.HTTPError) and error.response.status_code < 500):
                    break  # nobody there, or a plain no: waiting will not help
    tried = ", ".join(dict.fromkeys(failures))
    raise OSError(f"cannot download {path.name}; tried {tried}; fetch it by hand and save it as {path}")


def reachable(urls, seconds=6):
    """Whether any of the addresses answers anything at all; all are asked at once, as a name server may hang."""
    answers = queue.Queue()

    def ask(url):
        try:
            requests.head(url, timeout=seconds)
            answers.put(True)
        except requests.RequestException:
            answers.put(False)

    for url in urls:
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    end = time.monotonic() + seconds
    with contextlib.suppress(queue.Empty):
        return any(answers.get(timeout=max(0.0, end - time.monotonic())) for _ in urls)
    return False


def bundled_file(name, folder, download, urls):
    """What "auto" falls back to where no address answers: the file `name` of the clone, or its twin in `folder`.

    None where there is a network, or where a broken `download` lies in the folder: that is not given up silently.
    """
    found = next((file for file in (folder / Path(name).name, HERE / name) if file.exists()), None)
    begun = any((folder / download).glob("[!.]*"))
    return None if begun or not found or reachable(urls) else found


def check_sha256(path, expected):
    """Raise OSError unless the file has this SHA-256."""
    if (found := file_sha256(path)) != expected:
        raise OSError(f"SHA-256 is {found[:12]}..., expected {expected[:12]}... (--no-verify to accept)")


def unzip_spam_data(archive, path, verify=True):
    """Write the archive's member SMSSpamCollection to `path`; raises OSError if it is not the right one."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            if zipped.getinfo("SMSSpamCollection").file_size > 10_000_000:
                raise OSError("SMSSpamCollection unpacks to more than 10 MB; it has 477,907 bytes")
            content = zipped.read("SMSSpamCollection")  # this member only, whatever else is in there
    except (zipfile.BadZipFile, zlib.error, KeyError, NotImplementedError, RuntimeError) as error:
        raise OSError(f"not the archive of the SMS Spam Collection: {error}") from None
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
        if verify:
            check_sha256(temporary, DATA_SHA256)


def download_and_unzip_spam_data(urls, data_file_path, verify=True):
    """Bring the SMS Spam Collection to `data_file_path` (tab-separated), unless it is there.

    Source: Almeida, Gomez Hidalgo and Yamakami 2011; UCI Machine Learning Repository, id 228.
    """
    folder = data_file_path.parent / "download"
    with locked(folder / ".lock"):
        if not data_file_path.exists():
            archive = folder / "sms_spam_collection.zip"
            if archive.exists():  # fetched by hand
                unzip_spam_data(archive, data_file_path, verify)
            else:
                download(urls, archive, lambda part: unzip_spam_data(part, data_file_path, verify))
        shutil.rmtree(folder, ignore_errors=True)


def read_json_row(line, number):
    """Return the object on a line of JSON lines as a dict; raises ValueError that names the line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is {line[:40]!r}, not an object with named values")
    return row


def read_messages(path, text_column=None, label_column=None):
    """Return labelled texts as a frame with columns Label and Text, both strings.

    Reads UCI's form (ham or spam, a tab, the text; no header), and CSV, TSV or JSON lines whose columns are
    named here or called Label and Text in any case. Raises ValueError that names the line where it can.
    """
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")  # a byte order mark is dropped
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        raise ValueError(f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8; convert the file first") from None
    wanted = [(label_column or "label").lower(), (text_column or "text").lower()]
    start = text.split("\n", 1)[0].lower().strip()
    separator = "\t" if "\t" in start else ","
    with reading(path, "a table of labelled texts"):
        if start.startswith("{"):
            df = pd.DataFrame([read_json_row(line, i) for i, line in enumerate(text.split("\n"), 1) if line.strip()])
        elif label_column or text_column or set(wanted) <= set(start.replace('"', "").split(separator)):
            df = pd.read_csv(io.StringIO(text), sep=separator, keep_default_na=False, dtype=str)
        else:
            # The chapter keeps pandas' default quoting, which glues messages with a stray quote together:
            # 5,572 rows (4,825 ham, 747 spam) where UCI lists 5,574. Other quoting would give another split.
            df = pd.read_csv(io.StringIO(text), sep="\t", header=None, names=wanted, keep_default_na=False)
            for i in df.index[~df[wanted[0]].isin(["ham", "spam"])][:1]:
                raise ValueError(f"message {i + 1} is labelled {str(df[wanted[0]][i])[:40]!r}, not 'ham' or 'spam'; "
                                 "without a header of label and text each line must be one of them, a tab and the text")
        if not isinstance(df.index, pd.RangeIndex):
            raise ValueError("its rows have more fields than its header has columns: quote the texts")
    columns = {str(name).lower(): name for name in df.columns}
    if not all(name in columns for name in wanted):
        raise ValueError(f"{path} has the columns {', '.join(map(str, df.columns))}, not {' and '.join(wanted)}: "
                         "give --label-column and --text-column")
    df = df[[columns[name] for name in wanted]].set_axis(["Label", "Text"], axis=1)
    for i in df.index[df.isna().any(axis=1) | (df["Label"].astype(str).str.strip() == "")][:1]:
        raise ValueError(f"{path}, message {i + 1} has no label or no text")
    return df.astype(str)


def create_balanced_dataset(df):
    """Return as many of each label as the rarest has, drawn at random: 747 ham and 747 spam of UCI's.

    On the whole collection a classifier that always says ham would be 86.6% accurate and worthless.
    """
    counts = df["Label"].value_counts()
    rarest = max(counts[counts == counts.min()].index)
    others = [df[df["Label"] == label] for label in sorted(set(counts.index) - {rarest})]
    return pd.concat([*(o.sample(counts.min(), random_state=123) for o in others), df[df["Label"] == rarest]])


def random_split(df, train_frac, validation_frac):
    """Shuffle (always the same way) and cut into training, validation and test frames."""
    df = df.sample(frac=1, random_state=123).reset_index(drop=True)
    train_end = int(len(df) * train_frac)
    validation_end = train_end + max(1, int(len(df) * validation_frac))
    return df[:train_end], df[train_end:validation_end], df[validation_end:]


def balance_of(settings, labels):
    """What "auto" means: the chapter's undersampling for ham and spam, weights in the loss for other labels."""
    auto = "undersample" if labels == ["ham", "spam"] else "weights"
    return auto if settings.balance == "auto" else settings.balance


def prepare_splits(df, settings=FinetuneConfig(), test=None, shuffle_first=False):
    """Return (frames, labels): training, validation and test frames whose Label is an index into labels.

    By default the chapter's: 1,045, 149 and 300 of UCI's messages. `test`: a given test frame;
    `shuffle_first`: the book's experiments script shuffles once more before the split. Classes with
    fewer than 50 messages are split one by one, so that each part has some of each.
    """
    labels, counts = sorted(df["Label"].unique()), df["Label"].value_counts()
    if len(counts) < 2 or counts.min() < 5:
        raise ValueError(f"{len(df)} messages by label: {counts[-5:].to_dict()}; "
                         "at least two labels with 5 messages each are needed")
    if test is not None and (unknown := set(test["Label"]) - set(labels)):
        raise ValueError(f"the test file has labels {sorted(unknown)[:5]}, the training file {labels[:5]}")
    if settings.dedupe:
        df = df.drop_duplicates("Text")
        df = df if test is None else df[~df["Text"].isin(test["Text"])]
    if balance_of(settings, labels) == "undersample":
        df = create_balanced_dataset(df)
    if shuffle_first:
        df = df.sample(frac=1, random_state=123).reset_index(drop=True)
    counts = df["Label"].value_counts()
    cut = (0.875, 0.125) if test is not None else (0.7, 0.1)  # training to validation as in the chapter, 7 to 1
    if counts.min() < 50:
        parts = [random_split(df[df["Label"] == label], *cut) for label in labels]
        frames = [pd.concat(part).sample(frac=1, random_state=123).reset_index(drop=True) for part in zip(*parts)]
    else:
        frames = list(random_split(df, *cut))
    if test is not None:
        frames = [*frames[:1], pd.concat(frames[1:]), test]
    if not all(map(len, frames)):
        raise ValueError(f"{len(df)} messages leave an empty part: {[len(frame) for frame in frames]}")
    return [frame.assign(Label=frame["Label"].map(labels.index)) for frame in frames], labels


# ---- 6.3 Data loaders: ids, padding, batches ----

# GPT-2's way of cutting text into words before merging bytes (OpenAI's encoder.py, 2019).
GPT2_SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
END_OF_TEXT = "<|endoftext|>"


@lru_cache(2)
def build_tokenizer(encoder_json, vocab_bpe):
    """Return a tiktoken.Encoding from the text of OpenAI's two tokenizer files.

    For GPT-2's files its ids equal those of tiktoken's own "gpt2". Raises ValueError where the two
    files disagree. Use `encode_ordinary`: a message that spells <|endoftext|> is text like any other.
    """
    # OpenAI writes each byte as one printable character: itself, or 256 and up in order.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {chr(b): b for b in printable}
    characters |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
    with reading("encoder.json", "GPT-2's"):
        ids = json.loads(encoder_json)
        end = ids.pop(END_OF_TEXT)
        ranks = {bytes(characters[c] for c in token): i for token, i in ids.items()}
        merges = [line.replace(" ", "") for line in vocab_bpe.split("\n")[1:] if line]
    # The order of the merges is the order of the ids: 256 bytes, the merges, the end of text.
    if [ids.get(merge) for merge in merges] != list(range(256, end)) or sorted(ranks.values()) != list(range(end)):
        raise ValueError("encoder.json and vocab.bpe do not belong together: ids and merges differ")
    return tiktoken.Encoding("gpt2", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: end})


class SpamDataset(Dataset):
    """Messages as tensors: item i is (ids, at, label).

    ids: (tokens,) long, cut to `max_length` (default: the longest message) and padded to it with
    `pad_token_id`. at: (asked,) long, the positions that the label is read from: by default the last, which
    under the causal mask is the only one that has seen the whole message. `padding` "none" pads nothing, and
    "batch" leaves it to the loader, which pads to the batch's longest. `data` is a frame with Text and Label,
    or the name of a CSV file with these columns. Raises ValueError if there is no last real token to read.
    """

    def __init__(self, data, tokenizer, max_length=None, pad_token_id=50256, token_pos="last", pooling="none",
                 padding="all"):
        if not isinstance(data, pd.DataFrame):
            data = pd.read_csv(data, keep_default_na=False)
        # No token of GPT-2's has more than 128 bytes, so text behind this many characters is cut anyway.
        longest = (max_length or 8192) * 128
        encoded = [tokenizer.encode_ordinary(text[:longest])[:max_length] for text in data["Text"]]
        self.max_length = max_length or max(map(len, encoded))
        self.inputs, self.at = [], []
        for row, ids in enumerate(encoded):
            real = len(ids)
            if not real and (token_pos == "last_real" or padding != "all"):
                raise ValueError(f"message {row + 1} has no tokens, so there is none to read the label from")
            if padding == "all":
                ids = ids + [pad_token_id] * (self.max_length - real)
            one = {"first": 0, "last": len(ids) - 1, "last_real": real - 1}[token_pos]
            at = range(len(ids)) if pooling == "mean" else [one]
            self.inputs.append(torch.tensor(ids))                           # (tokens,)
            self.at.append(torch.tensor(at))                                # (asked,)
        self.labels = torch.tensor(data["Label"].to_numpy(dtype=np.int64))  # (messages,)

    def __getitem__(self, index):
        return self.inputs[index], self.at[index], self.labels[index]

    def __len__(self):
        return len(self.labels)


def sees_padding(settings):
    """Whether a position that is read sees what stands behind the message, besides being the padding itself."""
    return settings.pooling == "mean" or not settings.causal_mask


def padding_mode(settings):
    """Where padding is needed: "all" messages to one length, "none" at all, or a "batch" to its own longest.

    What stands behind the position that is read cannot matter under the causal mask, so there is no need to
    compute it: half of the messages have at most 32 of the chapter's 120 tokens.
    """
    if settings.padding:
        return "all" if sees_padding(settings) or settings.token_pos == "last" else "batch"
    if sees_padding(settings) and settings.batch_size > 1:
        raise ValueError(f"without padding, a mean or a missing mask takes --batch-size 1, not {settings.batch_size}")
    return "none"


def create_datasets(frames, tokenizer, settings, context_length):
    """Return a SpamDataset for each frame, all prepared alike: cut to what the first, the training set, needs.

    Raises ValueError if the messages do not fit into the model's `context_length`.
    """
    options = {"pad_token_id": tokenizer.eot_token, "token_pos": settings.token_pos, "pooling": settings.pooling,
               "padding": padding_mode(settings)}
    asked = {"longest": "", "model": str(context_length)}.get(settings.context_length, settings.context_length)
    if asked and not (asked.isdecimal() and 0 < int(asked) <= context_length):
        raise ValueError(f"--context-length {asked}: give longest, model, or 1 to {context_length} (the model's)")
    first = SpamDataset(frames[0], tokenizer, int(asked) if asked else None, **options)
    if first.max_length > context_length:
        raise ValueError(f"the longest training message has {first.max_length} tokens, "
                         f"the model holds {context_length}: cut them with --context-length {context_length}")
    # The book's script cuts no message that it does not pad.
    length = first.max_length if settings.padding else context_length
    return [first] + [SpamDataset(frame, tokenizer, length, **options) for frame in frames[1:]]


def collate(items):
    """Make a batch of items: inputs (batch, tokens) or (batch, tokens, emb), at (batch, asked), labels (batch,)."""
    inputs, at, labels = zip(*items)
    # Zeros fill up to the longest, but only where nobody looks (see `padding_mode`).
    return nn.utils.rnn.pad_sequence(inputs, batch_first=True), torch.stack(at), torch.stack(labels)


def create_loaders(datasets, batch_size):
    """Return loaders for training, validation and test: of UCI's, 130, 19 and 38 batches of 8."""
    # Only training is shuffled; it drops the last 5 of its 1,045 messages, others each epoch.
    return [DataLoader(dataset, batch_size, shuffle=i == 0, drop_last=i == 0, collate_fn=collate)
            for i, dataset in enumerate(datasets)]


# ---- 6.4 The GPT model ----

def read_at(x, at):
    """Pick positions: x (batch, tokens, width) and at (batch, asked) give (batch, asked, width)."""
    return x.gather(1, at[:, :, None].expand(-1, -1, x.shape[-1]))


class MultiHeadAttention(nn.Module):
    """Causal self-attention (chapter 3; Vaswani et al. 2017).

    forward: x (batch, tokens, emb) gives as much, or with at (batch, asked) these rows alone, (batch, asked, emb).
    """

    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False, causal=True):
        super().__init__()
        self.num_heads, self.dropout, self.causal = num_heads, dropout, causal
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)

    def forward(self, x, at=None):
        batch, _, emb = x.shape

        def heads(projected):
            return projected.view(batch, -1, self.num_heads, emb // self.num_heads).transpose(1, 2)

        few = at is not None and at.shape[1] * self.num_heads < emb
        if few:
            context = self.ask(x, at, heads(self.W_query(read_at(x, at))))  # (batch, heads, asked, head)
        else:
            queries, keys, values = heads(self.W_query(x)), heads(self.W_key(x)), heads(self.W_value(x))
            context = F.scaled_dot_product_attention(                       # (batch, heads, tokens, head)
                queries, keys, values, dropout_p=self.dropout * self.training, is_causal=self.causal)
        context = context.transpose(1, 2).reshape(batch, -1, emb)
        return self.out_proj(context if few or at is None else read_at(context, at))  # (batch, asked, emb)

    def ask(self, x, at, queries):
        """The same for few queries, (batch, heads, asked, head), with no key or value ever made.

        q . (W_key x) = (W_key^T q) . x: the query goes to the tokens, instead of a key made of each token; and the
        mean of values is the value of the mean token. One position of 120 in a 124M: 3.4 million products, not 142.
        """
        tokens, emb = x.shape[1:]
        key, value = (w.weight.view(self.num_heads, -1, emb) for w in (self.W_key, self.W_value))  # (heads, head, emb)
        turned = torch.einsum("bhad,hde->bhae", queries, key)                 # (batch, heads, asked, emb)
        scores = torch.einsum("bhae,bte->bhat", turned, x)                    # (batch, heads, asked, tokens)
        if self.W_key.bias is not None:
            scores = scores + queries @ self.W_key.bias.view(self.num_heads, -1, 1)
        if self.causal:  # a position sees itself and what stands before it
            behind = torch.arange(tokens, device=x.device) > at[:, None, :, None]
            scores = scores.masked_fill(behind, -torch.inf)
        shares = F.dropout((scores / queries.shape[-1] ** 0.5).softmax(dim=-1), self.dropout, self.training)
        means = torch.einsum("bhat,bte->bhae", shares, x)                     # (batch, heads, asked, emb)
        context = torch.einsum("bhae,hde->bhad", means, value)                # (batch, heads, asked, head)
        if self.W_value.bias is not None:
            context = context + shares.sum(-1, keepdim=True) * self.W_value.bias.view(self.num_heads, 1, -1)
        return context

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "mask", None)  # the chapter saves its causal mask, 48 MiB of it for 124M
        super()._load_from_state_dict(state_dict, prefix, *args)


class LayerNorm(nn.Module):
    """Layer normalisation over emb, with GPT-2's epsilon and the chapter's parameter names."""

    def __init__(self, emb_dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x):
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, eps=1e-5)


class GELU(nn.Module):
    """The tanh approximation, which GPT-2 was trained with (Hendrycks and Gimpel 2016)."""

    def forward(self, x):
        return F.gelu(x, approximate="tanh")


class FeedForward(nn.Module):
    """Two linear layers, four times as wide in between; each position by itself."""

    def __init__(self, cfg):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(cfg.emb_dim, 4 * cfg.emb_dim), GELU(), nn.Linear(4 * cfg.emb_dim, cfg.emb_dim))

    def forward(self, x):
        return self.layers(x)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each normalised first and added to a shortcut. `at`: see attention."""

    def __init__(self, cfg):
        super().__init__()
        self.att = MultiHeadAttention(
            cfg.emb_dim, cfg.emb_dim, cfg.context_length, cfg.drop_rate, cfg.n_heads, cfg.qkv_bias, cfg.causal)
        self.ff = FeedForward(cfg)
        self.norm1 = LayerNorm(cfg.emb_dim)
        self.norm2 = LayerNorm(cfg.emb_dim)
        self.drop_shortcut = nn.Dropout(cfg.drop_rate)

    def forward(self, x, at=None):
        shortcut = x if at is None else read_at(x, at)
        x = shortcut + self.drop_shortcut(self.att(self.norm1(x), at))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """GPT-2 (chapter 4): ids (batch, tokens) give logits (batch, tokens, vocab or classes).

    With at (batch, asked) the same logits at these positions alone, (batch, asked, classes), for less work.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.emb_dim)
        self.pos_emb = nn.Embedding(cfg.context_length, cfg.emb_dim)
        self.drop_emb = nn.Dropout(cfg.drop_rate)
        self.trf_blocks = nn.Sequential(*[TransformerBlock(cfg) for _ in range(cfg.n_layers)])
        self.final_norm = LayerNorm(cfg.emb_dim)
        self.out_head = nn.Linear(cfg.emb_dim, cfg.vocab_size, bias=False)

    def forward(self, in_idx, at=None):
        return self.top(self.trunk(in_idx, 0), 0, at)

    def trunk(self, in_idx, cut):
        """Embeddings and the first `cut` blocks: (batch, tokens) gives (batch, tokens, emb)."""
        tokens = in_idx.shape[1]
        if tokens > self.cfg.context_length:
            raise ValueError(f"{tokens} tokens, but the model holds {self.cfg.context_length}")
        x = self.tok_emb(in_idx) + self.pos_emb(torch.arange(tokens, device=in_idx.device))
        return self.trf_blocks[:cut](self.drop_emb(x))

    def top(self, x, cut, at=None):
        """The blocks from `cut` on, norm and head: (batch, tokens, emb) gives (batch, asked, classes)."""
        blocks = self.trf_blocks[cut:]
        x = blocks[:-1](x)
        if len(blocks):
            x = blocks[-1](x, at)
        elif at is not None:
            x = read_at(x, at)
        return self.out_head(self.final_norm(x))


# ---- 6.4 OpenAI's weights, without TensorFlow ----

MODELS_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
MODELS_BACKUP_URL = "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2"
SIZES = ("124M", "355M", "774M", "1558M")
SMALL = 1 << 24  # bytes; no file but the tensors themselves has as many
TEXTS = ("hparams.json", "encoder.json", "vocab.bpe")
DATA_FILE, INDEX_FILE = "model.ckpt.data-00000-of-00001", "model.ckpt.index"
FILES_124M = {  # SHA-256; for the other sizes the checkpoint's own checksums are the judge
    "checkpoint": "dd1b025d2e155283f5e300ce95bf6d5b6bc0f7fe010db73daa6975eb896ab9cb",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "hparams.json": "d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318",
    INDEX_FILE: "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
    "model.ckpt.meta": "4668c448fa11531fd6700460487f73e82d3272960cea942252f8744bf225c77b",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    DATA_FILE: "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118",  # the large one last
}


@lru_cache(1)
def crc_table():
    """What 16 zero bits do to each 16-bit value in a CRC-32C register (polynomial: RFC 3720)."""
    table = np.arange(65536, dtype=np.uint32)
    for _ in range(16):
        table = (table >> np.uint32(1)) ^ np.where(table & np.uint32(1), np.uint32(0x82F63B78), np.uint32(0))
    return table


def crc32c(data):
    """The CRC-32C of at least 4 bytes, by NumPy (RFC 3720, appendix B.4): 0.3 s for 154 MB.

    The bytes are cut into lanes whose registers advance side by side, two bytes a step; then neighbours are
    joined, the left one moved on by the length of the right one. To move on is linear over GF(2): 32 more lanes,
    one bit each and only zeros to read, tell what it does to each bit.
    """
    def move_on(columns, registers):
        bits = (np.where(registers >> np.uint32(bit) & np.uint32(1), columns[bit], np.uint32(0)) for bit in range(32))
        return np.bitwise_xor.reduce(list(bits))

    data, table = np.frombuffer(data, np.uint8), crc_table()
    lanes = 16384 if len(data) > 1 << 20 else 16
    length = -(-len(data) // (2 * lanes)) * 2         # bytes a lane
    padded = np.zeros((lanes + 32) * length, np.uint8)
    start = lanes * length - len(data)                # zeros in front do not move an empty register
    padded[start:lanes * length] = data
    padded[start:start + 4] ^= 0xFF                   # as if the register had been full at the start
    registers = np.zeros(lanes + 32, np.uint32)
    registers[lanes:] = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for column in np.ascontiguousarray(padded.view("<u2").reshape(lanes + 32, -1).T):
        registers = table[registers.astype(np.uint16) ^ column] ^ (registers >> np.uint32(16))
    registers, columns = registers[:lanes], registers[lanes:]
    while len(registers) > 1:
        registers, columns = move_on(columns, registers[::2]) ^ registers[1::2], move_on(columns, columns)
    return int(registers[0]) ^ 0xFFFFFFFF


def check_crc(data, masked, what):
    """Raise ValueError unless `data` has this CRC-32C, stored the way LevelDB and TensorFlow mask it."""
    crc = crc32c(data)
    if ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF != masked:
        raise ValueError(f"{what} is damaged: its checksum does not match")


def read_varint(data, at):
    """Return the variable-length integer at `at` and the position behind it."""
    value = 0
    for i, byte in enumerate(data[at:at + 10]):
        value |= (byte & 127) << 7 * i
        if byte == 0 and i:
            break  # padded with zeros; no writer does that
        if byte < 128:
            return value, at + i + 1
    raise ValueError("not a checkpoint index: bad number")


def read_message(data):
    """Return the fields of a Protocol Buffers message as {number: [integers or bytes]}."""
    found, at = {}, 0
    while at < len(data):
        key, at = read_varint(data, at)
        if key & 7 == 0:
            value, at = read_varint(data, at)
        elif key & 7 in (1, 2, 5):
            size, at = read_varint(data, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = data[at:at + size], at + size
            if at > len(data):
                raise ValueError("not a checkpoint index: a field ends behind its message")
            value = value if key & 7 == 2 else int.from_bytes(value, "little")
        else:
            raise ValueError(f"not a checkpoint index: wire type {key & 7}")
        found.setdefault(key >> 3, []).append(value)
    return found


def read_block(data, offset, size):
    """Yield the (key, value) pairs of one block of a LevelDB table; each shares a prefix with the last."""
    block, trailer = data[offset:offset + size], data[offset + size:offset + size + 5]
    if len(trailer) != 5 or trailer[0] != 0 or size < 4:
        raise ValueError(f"not a checkpoint index: no plain block of {size:,} bytes at {offset:,}")
    checksum = int.from_bytes(trailer[1:], "little")
    check_crc(block + trailer[:1], checksum, f"the block at byte {offset:,} of {INDEX_FILE}")
    end = size - 4 - 4 * int.from_bytes(block[-4:], "little")  # restart points: only for searching
    at, key = 0, b""
    while at < end:
        shared, at = read_varint(block, at)
        fresh, at = read_varint(block, at)
        length, at = read_varint(block, at)
        if shared > len(key) or at + fresh + length > end or shared + fresh > 200:  # GPT-2's longest name has 25 bytes
            raise ValueError("not a checkpoint index: an entry ends behind its block")
        key = key[:shared] + block[at:at + fresh]
        yield key, block[at + fresh:at + fresh + length]
        at += fresh + length


def read_index(data):
    """Return {name: BundleEntryProto fields} of the bytes of a model.ckpt.index.

    Every byte counts: blocks must follow each other without gaps and match their checksums.
    Raises ValueError. Source: LevelDB's table_format.md, TensorFlow's tensor_bundle.proto.
    """
    if len(data) < 48 or data[-8:] != bytes.fromhex("57fb808b247547db"):
        raise ValueError("not a checkpoint index: no LevelDB table magic at the end")
    footer, at, handles = data[-48:-8], 0, []
    for _ in range(4):  # offset and size of the metaindex, offset and size of the index
        number, at = read_varint(footer, at)
        handles.append(number)
    if any(footer[at:]):
        raise ValueError("not a checkpoint index: its footer is not padded with zeros")
    blocks = [tuple(handles[:2]), tuple(handles[2:])]
    for _, row in read_block(data, *blocks[1]):
        offset, at = read_varint(row, 0)
        size, at = read_varint(row, at)
        blocks.append((offset, size))
    ends = [0] + [offset + size + 5 for offset, size in sorted(blocks)]
    if ends != [offset for offset, _ in sorted(blocks)] + [len(data) - 48]:
        raise ValueError(f"not a checkpoint index: its blocks do not fill its {len(data):,} bytes")
    list(read_block(data, *blocks[0]))
    entries = {key.decode("utf-8", "replace"): read_message(value)
               for block in blocks[2:] for key, value in read_block(data, *block)}
    header = entries.pop("", {})
    if header.get(1) != [1] or header.get(2, [0]) != [0]:
        raise ValueError("not a checkpoint index: one little-endian data file expected")
    return entries


def read_tensor(file, name, entry, shape):
    """Return tensor `name` of the open data file as float32, checked against shape and checksum."""
    get = {number: values[-1] for number, values in entry.items()}
    dims = tuple(read_message(dim).get(1, [0])[-1] for dim in read_message(get.get(2, b"")).get(2, []))
    size, offset, length = 4 * math.prod(shape), get.get(4, 0), os.fstat(file.fileno()).st_size
    if get.get(1) != 1 or dims != shape or get.get(5) != size or get.get(3, 0) or 7 in get:
        raise ValueError(f"{name} is not a float32 of shape {list(shape)}: type {get.get(1)}, shape {list(dims)}, "
                         f"{get.get(5, 0):,} bytes")
    if offset + size > length:
        raise ValueError(f"{name} ends at byte {offset + size:,}, but {DATA_FILE} has {length:,}")
    file.seek(offset)
    array = np.fromfile(file, "<f4", math.prod(shape))
    check_crc(array, get.get(6), name)
    return array.reshape(shape)


def config_from_hparams(hparams):
    """Return the GPTConfig that OpenAI's hparams.json describes; raises ValueError."""
    names = {"n_vocab": "vocab_size", "n_ctx": "context_length", "n_embd": "emb_dim", "n_head": "n_heads",
             "n_layer": "n_layers"}
    try:
        numbers = {ours: hparams[theirs] for theirs, ours in names.items()}
    except (KeyError, TypeError):
        raise ValueError(f"not GPT-2's hparams.json: {', '.join(names)} are needed") from None
    return GPTConfig(**numbers)


def checkpoint_tensors(cfg):
    """Yield (checkpoint name, its shape, our names, transposed?) of every tensor of a GPT-2.

    OpenAI multiplies x @ w where PyTorch has x @ weight.T, and keeps query, key and value in one.
    """
    emb, qkv = cfg.emb_dim, ("W_query", "W_key", "W_value")
    yield "model/wte", (cfg.vocab_size, emb), ["tok_emb.weight"], False
    yield "model/wpe", (cfg.context_length, emb), ["pos_emb.weight"], False
    for i in range(cfg.n_layers):
        theirs, ours = f"model/h{i}/", f"trf_blocks.{i}."
        for norm in "12":
            yield theirs + f"ln_{norm}/g", (emb,), [ours + f"norm{norm}.scale"], False
            yield theirs + f"ln_{norm}/b", (emb,), [ours + f"norm{norm}.shift"], False
        for name, inside, outside, names in (
            ("attn/c_attn", emb, 3 * emb, [f"att.{w}" for w in qkv]), ("attn/c_proj", emb, emb, ["att.out_proj"]),
            ("mlp/c_fc", emb, 4 * emb, ["ff.layers.0"]), ("mlp/c_proj", 4 * emb, emb, ["ff.layers.2"]),
        ):
            yield theirs + f"{name}/w", (1, inside, outside), [f"{ours}{n}.weight" for n in names], True
            yield theirs + f"{name}/b", (outside,), [f"{ours}{n}.bias" for n in names], False
    yield "model/ln_f/g", (emb,), ["final_norm.scale"], False
    yield "model/ln_f/b", (emb,), ["final_norm.shift"], False


def save_pretrained(path, arrays, texts, about, savez=np.savez):
    """Write tensors {our name: array}, tokenizer files and hparams {name: bytes} as one .npz."""
    texts = {**texts, "about.json": json.dumps(about).encode()}
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        savez(file, **arrays, **{name: np.frombuffer(text, np.uint8) for name, text in texts.items()})


def check_vocabulary(tokenizer, cfg):
    """Raise ValueError unless the tokenizer's ids are those of the model's embedding."""
    if tokenizer.n_vocab != cfg.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.n_vocab:,} ids, the model {cfg.vocab_size:,}")


def convert_checkpoint(folder, path, about):
    """Write OpenAI's checkpoint in `folder` as one .npz, the whole model; `about`: a dict of name, verified, ...

    Raises ValueError if any tensor is damaged, missing, of another shape, or left over.
    """
    folder = Path(folder)
    with reading(folder, "a checkpoint in OpenAI's layout"):
        for name in (*TEXTS, INDEX_FILE, DATA_FILE):
            if not (folder / name).is_file():
                raise ValueError(f"it has no {name}")
            if name != DATA_FILE and (size := (folder / name).stat().st_size) > SMALL:
                raise ValueError(f"{name} has {size:,} bytes; OpenAI's largest has some 1,000,000")
        texts = {name: (folder / name).read_bytes() for name in TEXTS}
        for name, text in texts.items():
            with reading(folder / name, "UTF-8 text"):
                text.decode()
        with reading(folder / "hparams.json", "GPT-2's hyperparameters"):
            cfg = config_from_hparams(json.loads(texts["hparams.json"]))
        check_vocabulary(build_tokenizer(texts["encoder.json"].decode(), texts["vocab.bpe"].decode()), cfg)
        entries, arrays = read_index((folder / INDEX_FILE).read_bytes()), {}
        with open(folder / DATA_FILE, "rb") as file, progress(len(entries), "converting", " tensors") as bar:
            for name, shape, ours, transposed in checkpoint_tensors(cfg):
                if name not in entries:
                    raise ValueError(f"no tensor {name} in {INDEX_FILE}; hparams.json asks for {cfg.n_layers} layers")
                array = read_tensor(file, name, entries.pop(name), shape)
                for our, part in zip(ours, np.split(array, len(ours), axis=-1)):
                    arrays[our] = np.ascontiguousarray(part[0].T if transposed else part)
                bar.update(1)
            used, size = sum(array.nbytes for array in arrays.values()), (folder / DATA_FILE).stat().st_size
            if entries or used != size:
                raise ValueError(f"it holds more than a GPT-2: {len(entries)} tensors unused, {size:,} bytes, "
                                 f"of which {used:,} are known")
    save_pretrained(path, arrays, texts, about)


def load_texts(path):
    """Return (texts, about) of a converted model: {file name: its text}, and what it says of itself, a dict.

    about: name, verified; of models that bring them also note and finetune, their own finetuning settings.
    """
    with reading(path, "a model converted by this file"), np.load(path, allow_pickle=False) as npz:
        for name in (*TEXTS, "about.json"):
            if npz.zip.getinfo(f"{name}.npy").file_size > SMALL:
                raise ValueError(f"{name} is larger than {SMALL:,} bytes")
        texts = {name: npz[name].tobytes().decode() for name in (*TEXTS, "about.json")}
        about = json.loads(texts.pop("about.json"))
        return texts, {**about, "name": str(about.get("name", "unnamed")), "finetune": dict(about.get("finetune", {}))}


class SkipInit(TorchFunctionMode):
    """Leaves new modules' weights as they are: no time for random values that are replaced at once.

    torch.device("meta") does that too, but its normal_ imports sympy, which takes a second.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


def load_weights_into_gpt(gpt, params):
    """Put params {GPTModel's name: tensor} into the model, not copied; out_head becomes a copy of tok_emb."""
    gpt.load_state_dict({**params, "out_head.weight": params["tok_emb.weight"].clone()}, assign=True)
    if not all(p.sum().isfinite() for p in gpt.parameters()):  # NaN and infinity survive a sum
        raise ValueError("the weights hold NaN or infinity; convert the checkpoint again")


def load_pretrained(path, causal=True, random_seed=None):
    """Return (model, tokenizer, texts) of a .npz that `convert_checkpoint` wrote.

    model: a GPTModel in eval mode whose out_head is a copy of tok_emb; with `random_seed` its shape alone
    is taken, and the weights are PyTorch's random ones. texts: the tokenizer's two files, as strings.
    Raises ValueError if the file is not one, or does not fit its own hparams.
    """
    texts, _ = load_texts(path)
    with reading(path, "a model converted by this file"), np.load(path, allow_pickle=False) as npz:
        cfg = replace(config_from_hparams(json.loads(texts.pop("hparams.json"))), causal=causal)
        check_vocabulary(tokenizer := build_tokenizer(*texts.values()), cfg)
        params = {}
        for _, shape, names, transposed in checkpoint_tensors(cfg):
            *_, width = shape
            shape = (width // len(names), shape[1]) if transposed else (*shape[:-1], width // len(names))
            for name in names:
                if npz.zip.getinfo(f"{name}.npy").file_size > 4 * math.prod(shape) + 1024:
                    raise ValueError(f"{name} is larger than {list(shape)}")
                array = npz[name]
                if array.shape != shape or array.dtype not in (np.float32, np.float16):
                    raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, expected float {list(shape)}")
                params[name] = torch.from_numpy(array).float()  # float32 is not copied
    if random_seed is not None:  # only now: the tensors have shown that the sizes in hparams.json are true
        torch.manual_seed(random_seed)
        return GPTModel(cfg).eval(), tokenizer, texts
    with SkipInit():
        model = GPTModel(cfg)
    load_weights_into_gpt(model, params)
    return model.eval(), tokenizer, texts


def model_urls(size, file, url=None):
    """Addresses of a file of OpenAI's release; `url` is a mirror's base address."""
    bases = [f"{url.rstrip('/')}/gpt-2/models"] if url else [MODELS_URL, MODELS_BACKUP_URL]
    return [f"{base}/{size}/{file}" for base in bases]


def find_model(name, weights_dir, url=None, verify=True, keep=False):
    """Return the .npz of a model: a size (downloaded at need), a folder in OpenAI's layout, or an .npz.

    "auto" is what `weights_dir` holds, else 124M, else, when no address answers, the bundled tiny model.
    Converts once into `weights_dir`; `keep` keeps the raw files.
    """
    weights_dir = Path(weights_dir)
    if name == "auto":
        here = [size for size in SIZES if (weights_dir / f"gpt2-{size}.npz").exists()]
        urls = model_urls("124M", "hparams.json", url)
        if not here and (bundled := bundled_file("weights/tiny.npz", weights_dir, "124M.download", urls)):
            return bundled
        name = here[0] if here else "124M"
    if str(name).endswith(".npz"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"no file {name}")
        return Path(name)
    if name in SIZES:
        path, folder = weights_dir / f"gpt2-{name}.npz", weights_dir / f"{name}.download"
        if path.exists() and not folder.exists():
            return path
        with locked(folder / ".lock"):
            if not path.exists():  # another process may have made it while this one waited
                checked = FILES_124M if name == "124M" and verify else {}
                print(f"downloading {name}, " + (
                    "each file checked by its SHA-256" if checked else "SHA-256 not checked (--no-verify)" if not verify
                    else "whose SHA-256s are not known here: the checkpoint's own checksums are the judge"))
                for file in FILES_124M:
                    check = partial(check_sha256, expected=checked[file]) if checked else None
                    if (folder / file).exists() and check:
                        check(folder / file)
                    elif not (folder / file).exists():
                        download(model_urls(name, file, url), folder / file, check)
                try:
                    convert_checkpoint(folder, path, {"name": name, "verified": bool(checked)})
                except ValueError as error:
                    shutil.rmtree(folder)
                    raise ValueError(f"{error}; the download was removed, run again for a fresh one") from None
            if keep and (folder / INDEX_FILE).exists():
                shutil.rmtree(weights_dir / name, ignore_errors=True)
                os.replace(folder, weights_dir / name)
            shutil.rmtree(folder, ignore_errors=True)
        return path
    if not Path(name).is_dir():
        raise ValueError(f"unknown model {name!r}: give auto, {', '.join(SIZES)}, "
                         "a folder in OpenAI's layout, or an .npz file")
    folder = Path(name).resolve()
    digest = hashlib.sha256()  # what was converted once is known again by its small files and the data's size and time
    for name in (*TEXTS, INDEX_FILE, DATA_FILE):
        if (file := folder / name).is_file():
            size, changed = file.stat().st_size, file.stat().st_mtime_ns
            digest.update(file.read_bytes() if size < SMALL else repr((size, changed)).encode())
    path = weights_dir / f"gpt2-{folder.name}-{digest.hexdigest()[:8]}.npz"
    if not path.exists():
        convert_checkpoint(folder, path, {"name": folder.name, "verified": False})
    return path


def generate_text_simple(model, idx, max_new_tokens, context_size):
    """Append the most likely next token `max_new_tokens` times: (batch, tokens) ids in and out."""
    for _ in range(max_new_tokens):
        window = idx[:, -context_size:]
        at = torch.full((len(idx), 1), window.shape[1] - 1, device=idx.device)  # only the last position's logits
        with torch.no_grad():
            logits = model(window, at)                                          # (batch, 1, vocab)
        idx = torch.cat((idx, logits.argmax(dim=-1)), dim=1)
    return idx


def generate_text(model, tokenizer, prompt, max_new_tokens):
    """Continue `prompt` greedily and return all of the text."""
    device = model.tok_emb.weight.device
    idx = torch.tensor([tokenizer.encode_ordinary(prompt)], device=device)
    idx = generate_text_simple(model, idx, max_new_tokens, model.cfg.context_length)
    return tokenizer.decode(idx[0].tolist())


# ---- 6.5 Classification head: freeze GPT-2, train the end of it ----

class LoRALayer(nn.Module):
    """A low-rank change, alpha * x @ A @ B (appendix E; Hu et al. 2021, without their division by the rank)."""

    def __init__(self, in_dim, out_dim, rank, alpha):
        super().__init__()
        self.A = nn.Parameter(torch.empty(in_dim, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(rank, out_dim))  # zero: the first logits are unchanged
        self.alpha = alpha

    def forward(self, x):
        return self.alpha * (x @ self.A @ self.B)


class LinearWithLoRA(nn.Module):
    """A linear layer plus its LoRA; weight and bias are those of the one layer that does the same."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear = linear
        self.lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha)

    @property
    def weight(self):
        return self.linear.weight + self.lora.alpha * (self.lora.A @ self.lora.B).T

    @property
    def bias(self):
        return self.linear.bias

    def forward(self, x):
        return self.linear(x) + self.lora(x)


def replace_linear_with_lora(model, rank, alpha):
    """Give every linear layer below `model` a LoRA."""
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            setattr(model, name, LinearWithLoRA(module, rank, alpha))
        else:
            replace_linear_with_lora(module, rank, alpha)


def merge_lora(model):
    """Add each LoRA to the weights it changes and make the layers plain again: equal logits."""
    for name, module in model.named_children():
        if isinstance(module, LinearWithLoRA):
            with torch.no_grad():
                module.linear.weight.copy_(module.weight)
            setattr(model, name, module.linear)
        else:
            merge_lora(module)


def frozen_blocks(settings, cfg):
    """How many blocks, from the first, never change in finetuning: those before the first that trains.

    Their output for a message never changes either, so it is computed once. 0 where embeddings, every
    block's LoRA, or dropout are in the way.
    """
    trained = {"last_layer": 0, "last_block": 1, "last_two_blocks": 2}.get(settings.trainable_layers, cfg.n_layers)
    return 0 if cfg.drop_rate else max(0, cfg.n_layers - trained)


def add_classification_head(model, num_classes, settings=FinetuneConfig()):
    """Freeze the model, replace its head by a new one of `num_classes`, and unfreeze what the settings name.

    By default the last block, the final norm and the head: 7,090,946 of the 124M's 124,441,346 parameters.
    """
    layers = settings.trainable_layers
    model.requires_grad_(layers == "all")
    torch.manual_seed(settings.seed)
    model.out_head = nn.Linear(model.cfg.emb_dim, num_classes)  # 50,257 next tokens become a few classes
    if layers == "lora":
        replace_linear_with_lora(model, settings.lora_rank, settings.lora_alpha)
    elif layers in ("last_block", "last_two_blocks"):
        for module in (*model.trf_blocks[-1 if layers == "last_block" else -2:], model.final_norm):
            module.requires_grad_(True)


def count_parameters(model):
    """Return (trainable, all) parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())


# ---- 6.5 The frozen trunk: computed once a message ----

def trunk_output(model, inputs, cut, dtype="float32"):
    """`model.trunk` without gradients, its matrix products in `dtype` ("float32" or "bfloat16")."""
    with torch.no_grad(), torch.autocast(inputs.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        return model.trunk(inputs, cut)


class Top(nn.Module):
    """The part of a model above block `cut`, asked at `at`: what the training loop sees.

    Inputs are the cached output of `trunk_output`, or ids, (batch, tokens), where nothing was cached. With
    `everywhere` all positions are computed to the end and then one is read, as the chapter does it.
    """

    def __init__(self, model, cut, dtype="float32", everywhere=False):
        super().__init__()
        self.model, self.cut, self.dtype, self.everywhere = model, cut, dtype, everywhere

    def forward(self, inputs, at):
        if not inputs.is_floating_point():
            inputs = trunk_output(self.model, inputs, self.cut, self.dtype) if self.cut else self.model.trunk(inputs, 0)
        if self.everywhere:
            return read_at(self.model.top(inputs.float(), self.cut), at)
        return self.model.top(inputs.float(), self.cut, at)  # (batch, asked, classes)


def free_memory():
    """Bytes of memory that can be had now, as Linux estimates it; elsewhere a quarter of all."""
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        return max(0, limit - used)  # a container's own limit
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(AttributeError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return 1 << 32


def length_batches(lengths, tokens):
    """Cut positions sorted by length into batches of at most so many tokens: little padding, full cores."""
    order, batches = sorted(range(len(lengths)), key=lambda i: lengths[i]), [[]]
    for i in order:
        if batches[-1] and (len(batches[-1]) + 1) * lengths[i] > tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def batch_tokens(device):
    """Tokens that make a fast batch: on a CPU few, which stay in its cache (124M: 2,048 beat 1,024 and 4,096)."""
    return 2048 if device.type == "cpu" else 16384


def cache_trunk(model, inputs, cut, device, dtype="float32"):
    """Turn lists of ids, (tokens,) each, into lists of hidden states, (tokens, emb): the frozen blocks run once.

    Kept in memory, or in a nameless file on disk where it would take more than half of the free memory.
    """
    ids = [ids for part in inputs for ids in part]
    lengths = list(map(len, ids))
    kept = torch.float32 if dtype == "float32" else torch.bfloat16
    shape = (sum(lengths), model.cfg.emb_dim)
    size, free = math.prod(shape) * kept.itemsize, free_memory()
    on_disk = size * world_size() > free // 2
    print(f"running {len(lengths):,} messages once through {cut} frozen blocks in {dtype}; their output takes "
          f"{size / 1e6:,.0f} MB {'on disk' if on_disk else 'of memory'} ({free / 1e6:,.0f} MB are free)")
    if on_disk:
        file = tempfile.TemporaryFile(dir="/var/tmp" if os.path.isdir("/var/tmp") else None)  # /tmp may be memory
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error now, not a crash later
        store = torch.from_numpy(np.memmap(file, np.uint8, "w+", shape=size)).view(kept).view(shape)
    else:
        store = torch.empty(shape, dtype=kept)
    views = store.split(lengths)  # one (tokens, emb) for each message
    with progress(len(ids), "frozen blocks", " messages") as bar:
        for turn, batch in enumerate(length_batches(lengths, batch_tokens(device))):
            if turn % world_size() == rank():
                padded = nn.utils.rnn.pad_sequence([ids[i] for i in batch], batch_first=True).to(device)
                hidden = trunk_output(model, padded, cut, dtype).to(kept)
            else:
                hidden = torch.empty(len(batch), lengths[batch[-1]], shape[1], dtype=kept, device=device)
            if world_size() > 1:  # each batch is computed by one process and given to all
                torch.distributed.broadcast(hidden, turn % world_size())
            for i, states in zip(batch, hidden.cpu()):
                views[i].copy_(states[:lengths[i]])
            bar.update(len(batch))
    views = iter(views)
    return [list(islice(views, len(part))) for part in inputs]


# ---- 6.6 Loss and accuracy: accuracy is reported, cross-entropy is optimised ----

def calc_logits(input_batch, at, model, device):
    """Logits of a batch, (batch, classes); where several positions are asked, their mean.

    Under torchrun each process computes its share of the rows and gets the others' logits, so that every
    process sees the logits of the whole batch, and the loss and accuracy above them need not know.
    """
    if world_size() == 1:
        return model(input_batch.to(device), at.to(device)).mean(dim=1)
    count, share = len(at), -(-len(at) // world_size())
    own = torch.arange(rank() * share, (rank() + 1) * share) % count  # the last share goes round to the start
    logits = model(input_batch[own].to(device), at[own].to(device)).mean(dim=1)
    parts = [torch.empty_like(logits) for _ in range(world_size())]
    torch.distributed.all_gather(parts, logits.detach())
    parts[rank()] = logits  # gradients flow to this process's rows; training adds up those of all
    return torch.cat(parts)[:count]


def calc_loss_batch(input_batch, at, target_batch, model, device, loss_fn=F.cross_entropy):
    """Cross-entropy of a batch: accuracy itself has no gradient to follow."""
    return loss_fn(calc_logits(input_batch, at, model, device), target_batch.to(device))


@contextlib.contextmanager
def evaluating(model):
    """No gradients, and eval() inside; then the mode that the model was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def calc_loss_loader(data_loader, model, device, num_batches=None, loss_fn=F.cross_entropy):
    """Mean of the batches' losses, over the first `num_batches` or all; a short last batch counts as one."""
    with evaluating(model):
        losses = [calc_loss_batch(*batch, model, device, loss_fn).item() for batch in islice(data_loader, num_batches)]
    return sum(losses) / len(losses) if losses else float("nan")


def calc_accuracy_loader(data_loader, model, device, num_batches=None):
    """Share of right labels, over the first `num_batches` or all."""
    correct = examples = 0
    with evaluating(model):
        for input_batch, at, target_batch in islice(data_loader, num_batches):
            predicted = calc_logits(input_batch, at, model, device).argmax(dim=-1)
            correct += (predicted == target_batch.to(device)).sum().item()
            examples += len(target_batch)
    return correct / examples if examples else float("nan")


def calc_metrics(labels, probabilities, names):
    """Return what imbalance cannot hide, as a dict: accuracy, per class and mean precision, recall and F1, confusion.

    labels: (messages,) ints; probabilities: (messages, classes). With two classes also average precision and
    ROC AUC of the second. Undefined ratios are 0. Definitions: scikit-learn's classification_report.
    """
    labels, scores = np.asarray(labels), np.asarray(probabilities)
    predicted = scores.argmax(axis=1)
    confusion = np.zeros((len(names), len(names)), int)
    np.add.at(confusion, (labels, predicted), 1)  # rows: true, columns: predicted
    right, support, guesses = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    table = pd.DataFrame({"precision": right / np.maximum(1, guesses), "recall": right / np.maximum(1, support),
                          "f1": 2 * right / np.maximum(1, guesses + support)}, index=names)
    metrics = {"accuracy": right.sum() / len(labels), "confusion": confusion.tolist(),
               "classes": table.assign(support=support).to_dict("index"), "macro": table.mean().to_dict(),
               "weighted": table.mul(support / len(labels), axis=0).sum().to_dict()}
    if len(names) == 2 and 0 < support[1] < len(labels):
        _, group, counts = np.unique(-scores[:, 1], return_inverse=True, return_counts=True)  # best first, ties as one
        hits = np.bincount(group, weights=labels)
        found, taken = np.cumsum(hits), np.cumsum(counts)
        misses = counts - hits
        metrics["average_precision"] = float((hits * found / taken).sum() / support[1])
        metrics["roc_auc"] = float((misses * (found - hits / 2)).sum() / (support[0] * support[1]))
    return metrics


# ---- 6.7 Finetuning ----

SPLIT_NAMES = ("Training", "Validation", "Test")


def evaluate_model(model, train_loader, val_loader, device, eval_iter, loss_fn=F.cross_entropy):
    """Return training and validation loss over `eval_iter` batches."""
    return [calc_loss_loader(loader, model, device, eval_iter, loss_fn) for loader in (train_loader, val_loader)]


def train_classifier_simple(model, train_loader, val_loader, optimizer, device, num_epochs, eval_freq, eval_iter,
                            loss_fn=F.cross_entropy, scheduler=None, accumulation_steps=1, clip=0.0, log=None,
                            after_epoch=None):
    """Train, print the chapter's log lines, and return the log: {"history": rows, "epochs": rows}.

    history: step, epoch, examples_seen, train_loss, val_loss every `eval_freq` steps; epochs: epoch,
    train_accuracy, val_accuracy over `eval_iter` batches. A `log` that is given is continued;
    `after_epoch(log)` may return True to stop. Raises ValueError when the loss is no number.
    """
    log = log or {"history": [], "epochs": [], "step": -1, "examples_seen": 0}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for epoch in range(len(log["epochs"]) + 1, num_epochs + 1):
        model.train()
        for batch_idx, (input_batch, at, target_batch) in enumerate(train_loader, 1):
            loss = calc_loss_batch(input_batch, at, target_batch, model, device, loss_fn)
            log["step"] += 1
            if not torch.isfinite(loss):
                raise ValueError(f"the loss is {loss.item()} at step {log['step']}: "
                                 f"try a smaller --lr than {optimizer.defaults['lr']}")
            (loss / accumulation_steps).backward()
            if batch_idx % accumulation_steps == 0 or batch_idx == len(train_loader):  # the last group may be short
                if world_size() > 1:
                    for param in parameters:
                        torch.distributed.all_reduce(param.grad)
                if clip:
                    nn.utils.clip_grad_norm_(parameters, clip)
                optimizer.step()
                optimizer.zero_grad()
                if scheduler:
                    scheduler.step()
            log["examples_seen"] += len(target_batch)
            if log["step"] % eval_freq == 0:
                train_loss, val_loss = evaluate_model(model, train_loader, val_loader, device, eval_iter, loss_fn)
                log["history"].append({"step": log["step"], "epoch": epoch, "examples_seen": log["examples_seen"],
                                       "train_loss": train_loss, "val_loss": val_loss})
                print(f"Ep {epoch} (Step {log['step']:06d}): Train loss {train_loss:.3f}, Val loss {val_loss:.3f}",
                      flush=True)
        train_accuracy = calc_accuracy_loader(train_loader, model, device, eval_iter)
        val_accuracy = calc_accuracy_loader(val_loader, model, device, eval_iter)
        print(f"Training accuracy: {train_accuracy * 100:.2f}% | Validation accuracy: {val_accuracy * 100:.2f}%",
              flush=True)
        log["epochs"].append({"epoch": epoch, "train_accuracy": train_accuracy, "val_accuracy": val_accuracy})
        if after_epoch and after_epoch(log):
            break
    return log


def learning_rate_factor(step, steps, warmup, decay):
    """What `--lr` is multiplied by at update `step` of `steps`: up in a line, then level or down to 0."""
    rise = (step + 1) / max(1, warmup * steps)
    return min(1.0, rise, (steps - step) / max(1, steps - warmup * steps) if decay else 1.0)


def finetune(model, loaders, settings, device, class_weights=None, state_file=None, fingerprint=None):
    """Train what is unfrozen as the settings say and return history, epochs, final and seconds.

    final: accuracies over the three whole loaders, the test split last and once. class_weights: (classes,)
    for the loss. state_file: written after each epoch and, if there, continued, given the same fingerprint.
    """
    started = time.perf_counter()
    torch.manual_seed(settings.seed)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=settings.lr, weight_decay=settings.weight_decay,
                                  fused=device.type in ("cpu", "cuda"))
    steps = settings.epochs * -(-len(loaders[0]) // settings.accumulation_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps, settings.warmup, settings.decay))
    loss_fn = partial(F.cross_entropy, ignore_index=settings.ignore_index,
                      weight=None if class_weights is None else class_weights.to(device))
    log, best = {}, {"loss": math.inf, "epoch": 0, "weights": {}}

    def put_back(weights):
        for name, value in weights.items():
            trained[name].data.copy_(value)

    if state_file and state_file.exists():
        with reading(state_file, "the state of a run with these settings (remove it, or leave out --resume)"):
            state = torch.load(state_file, map_location=device, weights_only=True)
            if state["fingerprint"] != fingerprint:
                raise ValueError("other settings, model or data")
            log, best = state["log"], state["best"]
            put_back(state["weights"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            torch.set_rng_state(state["random"].cpu())
        print(f"resuming after epoch {len(log['epochs'])}")

    def after_epoch(log):
        if settings.early_stop:
            random = torch.get_rng_state()  # looking at the loss must not move the shuffles
            loss = calc_loss_loader(loaders[1], model, device, loss_fn=loss_fn)
            torch.set_rng_state(random)
            if loss < best["loss"]:
                weights = {name: p.detach().clone() for name, p in trained.items()}
                best.update(loss=loss, epoch=len(log["epochs"]), weights=weights)
        if state_file:
            weights = {name: p.detach() for name, p in trained.items()}
            with atomic_write(state_file) as temporary, open(temporary, "wb") as file:
                torch.save({"fingerprint": fingerprint, "log": log, "best": best, "weights": weights,
                            "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
                            "random": torch.get_rng_state()}, file)
        return settings.early_stop and len(log["epochs"]) - best["epoch"] >= settings.early_stop

    if not (log and after_epoch(log)):
        log = train_classifier_simple(
            model, *loaders[:2], optimizer, device, settings.epochs, settings.eval_freq, settings.eval_iter,
            loss_fn, scheduler, settings.accumulation_steps, settings.clip, log, after_epoch)
    if not all(p.isfinite().all() for p in trained.values()):
        raise ValueError(f"the weights are no numbers after step {log['step']}: try a smaller --lr than {settings.lr}")
    if best["weights"]:
        print(f"keeping epoch {best['epoch']}, whose validation loss is {best['loss']:.3f}")
        put_back(best["weights"])
    seconds = {"training": time.perf_counter() - started}
    print(f"Training completed in {seconds['training'] / 60:.2f} minutes.")
    started, final = time.perf_counter(), {}
    for name, text, loader in zip(("train", "val", "test"), SPLIT_NAMES, loaders):
        final[f"{name}_accuracy"] = calc_accuracy_loader(loader, model, device)
        print(f"{text} accuracy: {final[f'{name}_accuracy'] * 100:.2f}%")
    return {"history": log["history"], "epochs": log["epochs"], "final": final,
            "seconds": {**seconds, "final accuracies": time.perf_counter() - started}}


def plot_values(epochs_seen, examples_seen, train_values, val_values, label, path):
    """Draw training and validation values over epochs, examples seen on a second x axis, to a PNG."""
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state
    fig = Figure(figsize=(5, 3), dpi=150)
    ax1 = fig.add_subplot()
    ax1.plot(epochs_seen, train_values, label=f"Training {label}")
    ax1.plot(epochs_seen, val_values, linestyle="-.", label=f"Validation {label}")
    ax1.set_xlabel("Epochs")
    ax1.set_ylabel(label.capitalize())
    ax1.legend()
    ax2 = ax1.twiny()
    ax2.plot(examples_seen, train_values, alpha=0)  # unseen; lines the ticks up
    ax2.set_xlabel("Examples seen")
    fig.tight_layout()
    with atomic_write(path) as temporary:
        fig.savefig(temporary, format="png")


def plot_history(result, an_epoch, folder):
    """Write loss-plot.png and accuracy-plot.png of a `finetune` result; `an_epoch`: examples seen in one."""
    history, epochs = result["history"], result["epochs"]
    seen = [row["examples_seen"] for row in history]
    plot_values([n / an_epoch for n in seen], seen, [row["train_loss"] for row in history],
                [row["val_loss"] for row in history], "loss", folder / "loss-plot.png")
    plot_values([row["epoch"] for row in epochs], [row["epoch"] * an_epoch for row in epochs],
                [row["train_accuracy"] for row in epochs], [row["val_accuracy"] for row in epochs],
                "accuracy", folder / "accuracy-plot.png")


# ---- 6.8 Use: classify, save, load ----

@dataclass
class Classifier:
    """A finetuned model with all that it takes to use it."""

    model: GPTModel
    texts: dict        # encoder.json and vocab.bpe, as strings
    labels: list       # names of the classes, by id
    max_length: int    # tokens that a message is padded or cut to, as in training
    settings: FinetuneConfig = FinetuneConfig()
    about: dict = field(default_factory=dict)  # where model and data come from

    def __post_init__(self):
        self.tokenizer = build_tokenizer(self.texts["encoder.json"], self.texts["vocab.bpe"])


def predict(classifier, texts, device):
    """Return the probability of each class, (messages, classes), for a list of texts, prepared as in training.

    An empty text, which has no token to read the label from, is taken as a space. Raises ValueError if a
    probability is no number.
    """
    settings, model = classifier.settings, classifier.model
    dataset = SpamDataset(pd.DataFrame({"Text": [text or " " for text in texts], "Label": 0}), classifier.tokenizer,
                          classifier.max_length, classifier.tokenizer.eot_token, settings.token_pos, settings.pooling,
                          padding_mode(replace(settings, batch_size=1)))
    top = Top(model.to(device), frozen_blocks(settings, model.cfg), settings.dtype)
    logits = torch.empty(len(dataset), len(classifier.labels))
    alone = sees_padding(settings) and not settings.padding  # then one by one, as in training
    with evaluating(top):
        for batch in length_batches(list(map(len, dataset.inputs)), 0 if alone else batch_tokens(device)):
            inputs, at, _ = collate([dataset[i] for i in batch])
            logits[batch] = calc_logits(inputs, at, top, device).float().cpu()
    if not logits.isfinite().all():
        raise ValueError("the classifier gives NaN or infinity: its weights are damaged")
    return logits.softmax(dim=-1)


def decide(classifier, probabilities, threshold=None):
    """Return (label, its probability); with a threshold the second of two labels from that probability on."""
    best = int(probabilities.argmax()) if threshold is None else int(probabilities[1] >= threshold)
    return classifier.labels[best], float(probabilities[best])


def classify_review(text, classifier, device):
    """Return (label, probability) of one message."""
    return decide(classifier, predict(classifier, [text], device)[0])


def read_texts(file, kind="lines", text_column=None):
    """Yield (row number, text, None) or (row number, None, what is wrong) for each row of a binary file, one at a time.

    kind: "lines", each a text, or "csv", "tsv" or "jsonl", whose column `text_column` (default: text, in any case) is.
    """
    lines = (line.decode("utf-8-sig" if i == 0 else "utf-8", "surrogateescape") for i, line in enumerate(file))
    wanted = (text_column or "text").lower()

    def pick(row):
        return {str(key).lower(): value for key, value in row.items()}[wanted]

    if kind in ("csv", "tsv"):
        csv.field_size_limit(SMALL)
        with reading(file.name, f"a {kind} file with a column {wanted!r} (--text-column)"):
            rows = csv.DictReader(lines, delimiter="," if kind == "csv" else "\t")
            if wanted not in [str(name).lower() for name in rows.fieldnames or []]:
                raise ValueError(f"its columns are {rows.fieldnames}")
        parse = pick
    elif kind == "jsonl":
        rows, parse = (line for line in lines if line.strip()), lambda line: pick(json.loads(line.encode("utf-8")))
    else:
        rows, parse = lines, lambda line: line.rstrip("\r\n")
    rows = iter(rows)
    for number in count(1):
        try:
            text = parse(next(rows))
            if not isinstance(text, str):
                raise ValueError(f"its text is {text!r}")
            if kind != "jsonl":  # where a lone surrogate may be written as \ud800
                text.encode("utf-8")
        except StopIteration:
            return
        except UnicodeEncodeError:
            yield number, None, "it is not UTF-8"
        except (ValueError, KeyError, RecursionError, AttributeError, csv.Error) as error:
            yield number, None, f"{type(error).__name__}: {error}"
        else:
            yield number, text, None


def save_classifier(path, classifier):
    """Write one self-describing file: plain dicts, lists, strings and tensors."""
    content = {
        "format": "gpt_spam classifier 1", "config": asdict(classifier.model.cfg),
        "settings": asdict(classifier.settings), "labels": list(classifier.labels), "max_length": classifier.max_length,
        "pad_token_id": classifier.tokenizer.eot_token, "tokenizer": dict(classifier.texts), "about": classifier.about,
        "model": {name: tensor.cpu() for name, tensor in classifier.model.state_dict().items()},
    }
    with atomic_write(path) as temporary, open(temporary, "wb") as file:  # by name, torch hides a full disk's OSError
        torch.save(content, file)


def describe_chapter_state(state, weights_dir):
    """Add what a state_dict saved by the chapter's code does not say, and say so."""
    vocab, emb = state["tok_emb.weight"].shape
    layers = sum(name.endswith("norm1.scale") for name in state)
    for file in sorted(Path(weights_dir or HERE / "weights").glob("*.npz")):
        with contextlib.suppress(ValueError):
            texts, _ = load_texts(file)
            if len(json.loads(texts["encoder.json"])) == vocab:
                break
    else:
        raise ValueError("a bare state_dict brings no tokenizer, and no .npz in the weights folder has "
                         f"{vocab:,} tokens: run `convert --model 124M` first")
    heads, classes = max(1, emb // 64), len(state["out_head.weight"])
    labels = ["ham", "spam"] if classes == 2 else [str(i) for i in range(classes)]
    print(f"a bare state_dict: taking it for the chapter's, {heads} heads, labels {', '.join(labels)}, max_length 120, "
          f"last position, tokenizer of {file.name}", file=sys.stderr)
    cfg = GPTConfig(vocab, len(state["pos_emb.weight"]), emb, heads, layers)
    return {"config": asdict(cfg), "settings": {}, "labels": labels, "max_length": min(120, cfg.context_length),
            "tokenizer": texts, "about": {"model": "chapter's state_dict"}, "model": state}


def load_classifier(path, weights_dir=None):
    """Return the Classifier that `save_classifier` wrote: the same logits, bit for bit.

    Also takes a bare state_dict saved by the chapter's code; then the tokenizer comes from a converted
    model in `weights_dir`. Raises ValueError if the file is neither; nothing in it is executed.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no classifier at {path}: make one with `python gpt_spam.py train`, "
                                "or name it with --classifier")
    with reading(path, "a classifier saved by `train`"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        if "tok_emb.weight" in content:
            content = describe_chapter_state(content, weights_dir)
        cfg, state, labels = GPTConfig(**content["config"]), dict(content["model"]), list(content["labels"])
        layers = sum(name.endswith("norm1.scale") for name in state)
        if layers != cfg.n_layers or state["tok_emb.weight"].shape[1] != cfg.emb_dim:
            raise ValueError("its config does not fit its tensors")
        if 4 * sum(tensor.numel() for tensor in state.values()) > Path(path).stat().st_size:
            raise ValueError("its tensors are larger than the file")
        with SkipInit(), torch.device("meta"):  # no memory before the shapes are known to be right
            model = GPTModel(cfg)
            model.out_head = nn.Linear(cfg.emb_dim, len(labels))
        model.load_state_dict(state, assign=True)
        if not all(p.dtype == torch.float32 and p.sum().isfinite() for p in model.parameters()):
            raise ValueError("its weights are not finite float32 numbers")
        classifier = Classifier(model.eval(), dict(content["tokenizer"]), labels, content["max_length"],
                                FinetuneConfig(**content["settings"]), dict(content["about"]))
        check_vocabulary(classifier.tokenizer, cfg)
        if type(classifier.max_length) is not int or not 0 < classifier.max_length <= cfg.context_length:
            raise ValueError(f"its max_length is {classifier.max_length}, its context {cfg.context_length}")
        return classifier


# ---- The book's experiments: its table's nineteen rows, each a change of settings ----

EXPERIMENTS = {  # row: (model, or None for --model; changes; published test accuracy in percent)
    1: (None, {}, 95.00),
    2: (None, {"token_pos": "first"}, 75.00),
    3: (None, {"trainable_layers": "last_layer"}, 72.00),
    4: (None, {"trainable_layers": "last_two_blocks"}, 98.33),
    5: (None, {"trainable_layers": "all"}, 96.67),
    6: ("355M", {}, 84.67),
    7: ("774M", {}, 96.67),
    8: ("1558M", {}, 98.33),
    9: ("1558M", {"trainable_layers": "all"}, 98.67),
    10: (None, {"weights": "random", "trainable_layers": "all"}, 93.67),
    11: (None, {"trainable_layers": "lora", "lora_rank": 16, "lora_alpha": 16}, 96.67),
    12: ("1558M", {"trainable_layers": "lora", "lora_rank": 16, "lora_alpha": 8}, 98.33),
    13: (None, {"context_length": "model"}, 78.33),
    14: (None, {"padding": False, "batch_size": 1}, 98.00),
    15: (None, {"padding": False, "batch_size": 1, "accumulation_steps": 8}, 98.33),
    16: (None, {"token_pos": "last_real"}, 98.33),
    17: (None, {"causal_mask": False}, 95.33),
    18: (None, {"ignore_index": 50256}, 95.00),  # never passed on by the script; no change to labels 0 and 1 here
    19: (None, {"pooling": "mean"}, 96.33),
}


def connect(model, datasets, settings, device, trunks=None):
    """Return (top, loaders): the part of the model that `finetune` trains, and loaders of what it takes.

    The frozen trunk is run here, once a message, unless nothing is frozen or the settings say no. `trunks`,
    a dict, keeps its output for later calls that need the same (of the same model, frames and tokenizer).
    """
    cut = frozen_blocks(settings, model.cfg)
    if cut and settings.cache:
        lengths = tuple(len(ids) for dataset in datasets for ids in dataset.inputs)
        key = (cut, settings.dtype, settings.causal_mask, settings.weights, lengths)
        trunks = {} if trunks is None else trunks
        if key not in trunks:
            trunks[key] = cache_trunk(model, [dataset.inputs for dataset in datasets], cut, device, settings.dtype)
        datasets = [list(zip(states, dataset.at, dataset.labels)) for dataset, states in zip(datasets, trunks[key])]
    elif settings.cache:
        print(f"no cache: with {settings.trainable_layers} no block stays as it is" + (
            "; everything is computed in float32" if settings.dtype != "float32" else ""))
    return Top(model, cut, settings.dtype, everywhere=not settings.cache), create_loaders(datasets, settings.batch_size)


def run_experiment(row, model_file, frames, labels, settings, device, trunks):
    """Train one row of the table and return it as a dict, accuracies as fractions, losses the last logged."""
    random_seed = settings.seed if settings.weights == "random" else None
    model, tokenizer, _ = load_pretrained(model_file, settings.causal_mask, random_seed)
    datasets = create_datasets(frames, tokenizer, settings, model.cfg.context_length)
    add_classification_head(model, len(labels), settings)
    result = finetune(*connect(model.to(device), datasets, settings, device, trunks), settings, device)
    last = (result["history"] or [{"train_loss": math.nan, "val_loss": math.nan}])[-1]
    return {"row": row, "weights": settings.weights, "layers": settings.trainable_layers,
            "token_position": "mean" if settings.pooling == "mean" else settings.token_pos,
            "context": datasets[0].max_length if settings.padding else "no padding",
            **result["final"], "train_loss": last["train_loss"], "val_loss": last["val_loss"],
            "seconds": sum(result["seconds"].values()), "device": str(device)}


def markdown_table(rows):
    """The rows as a Markdown table in the published form, the published accuracies beside ours."""
    lines = ["| | Model | Weights | Token position | Trainable layers | Context length | Training acc | Validation acc "
             "| Test acc | Published test acc | Training time | Device |", "|---" * 12 + "|"]
    for row in rows:
        changes = [f"{name} {value}" for name, value in EXPERIMENTS[row["row"]][1].items()
                   if name in ("causal_mask", "ignore_index", "batch_size", "accumulation_steps")]
        accuracies = [f"{100 * row[f'{part}_accuracy']:.2f}%" for part in ("train", "val", "test")]
        lines.append("| " + " | ".join(map(str, (
            row["row"], row["model"], row["weights"], row["token_position"], row["layers"],
            ", ".join([str(row["context"]), *changes]), *accuracies, f"{EXPERIMENTS[row['row']][2]:.2f}%",
            f"{row['seconds'] / 60:.2f} min", row["device"]))) + " |")
    return "\n".join(lines)


# ---- Command line ----

SPAM_MESSAGE = "You are a winner you have been specially selected to receive $1000 cash or a $2000 award."
HAM_MESSAGE = "Hey, just wanted to check if we're still on for dinner tonight? Let me know!"
SAMPLE_NOTE = "bundled sample messages: figures say nothing about real SMS"


def pick_device(name="auto"):
    """cuda where there is one, else mps (from torch 2.9 on), else cpu; or the device of that name."""
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"no device {name!r} here: {str(error).splitlines()[0]}") from None
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    version = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])
    return torch.device("mps" if torch.backends.mps.is_available() and version >= (2, 9) else "cpu")


def check_writable(path):
    """Raise OSError now, rather than after the training, if `path` cannot be written."""
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    if not path.exists() or path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def find_data(name, data_dir, url=None, verify=True):
    """Return the file of messages: one that is named, or UCI's ("sms"), downloaded at need.

    "auto" is UCI's, or, when no address answers, the bundled sample.
    """
    if name not in ("auto", "sms"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"no file {name}")
        return Path(name)
    path = Path(data_dir) / "SMSSpamCollection.tsv"
    if not path.exists():
        urls = [f"{url.rstrip('/')}/static/public/228/sms+spam+collection.zip"] if url else DATA_URLS
        if name == "auto" and (bundled := bundled_file("data/sample_sms.tsv", path.parent, "download", urls)):
            return bundled
        download_and_unzip_spam_data(urls, path, verify)
    return path


def find_inputs(args):
    """Return (model file, data file) of the command line, downloading at need; under torchrun one process does it."""
    with leader_first():
        keep = getattr(args, "keep_checkpoint", False)
        return (find_model(args.model, args.weights_dir, args.weights_url, args.verify, keep),
                find_data(args.data, args.data_dir, args.data_url, args.verify))


def choose_settings(args, about):
    """The settings that the command line named, else those that the model brings along, else the chapter's."""
    brought, named, known = about["finetune"], vars(args), fields(FinetuneConfig)
    settings = {f.name: type(f.default)(brought[f.name]) for f in known if f.name in brought}
    settings |= {f.name: named[f.name] for f in known if f.name in named}
    return FinetuneConfig(**settings)


def describe_inputs(about, model_file, data):
    """One line on the model and data that are used, with a warning where figures mislead."""
    notes = [about.get("note"), SAMPLE_NOTE if data.name == "sample_sms.tsv" else None,
             None if about.get("verified", True) else "weights not checked by SHA-256: figures may not be GPT-2's"]
    return f"model {about['name']} ({model_file}), data {data}" + "".join(f"; {note}" for note in notes if note)


def cmd_train(args):
    """Chapter 6 from top to bottom: data, model, new head, finetuning, accuracies, two messages classified."""
    out = args.out or args.weights_dir / "spam_classifier.pth"
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    for path in (out, args.metrics, args.plot and args.plot / "loss-plot.png"):
        if path:
            check_writable(path)
    clock, seconds, device = time.perf_counter(), {}, pick_device(args.device)

    def lap(phase):
        nonlocal clock
        seconds[phase], clock = time.perf_counter() - clock, time.perf_counter()

    # 6.2 dataset
    model_file, data = find_inputs(args)
    df = read_messages(data, args.text_column, args.label_column)
    test = args.test_data and read_messages(args.test_data, args.text_column, args.label_column)
    lap("download")

    # 6.4 model and weights
    about = load_texts(model_file)[1]
    settings = choose_settings(args, about)
    random_seed = settings.seed if settings.weights == "random" else None
    model, tokenizer, texts = load_pretrained(model_file, settings.causal_mask, random_seed)
    about = {**about, "inputs": describe_inputs(about, model_file, data), "test_data": str(args.test_data or "")}
    print(about["inputs"])
    print(f"device {device}" + (f", {world_size()} processes" if world_size() > 1 else "")
          + (f", TF32 {'on' if torch.backends.cuda.matmul.allow_tf32 else 'off'}" if device.type == "cuda" else ""))
    print("settings: " + ", ".join(f"{name} {value}" for name, value in asdict(settings).items()))
    lap("loading")

    # 6.3 data loaders
    frames, labels = prepare_splits(df, settings, test)
    for name, frame in zip(("train", "validation", "test"), frames):
        with atomic_write(args.data_dir / f"{name}.csv") as temporary:
            frame.to_csv(temporary, index=None, errors="replace")
    datasets = create_datasets(frames, tokenizer, settings, model.cfg.context_length)
    if len(frames[0]) < settings.batch_size:
        raise ValueError(f"{len(frames[0])} training messages make no batch of --batch-size {settings.batch_size}")
    print("{} / {} / {} training, validation and test messages".format(*map(len, frames))
          + f", labels {', '.join(labels)}, longest {datasets[0].max_length} tokens")
    lap("tokenizing")

    # 6.4 sanity check (text that goes on, and no answer when asked about spam), 6.5 head and frozen trunk
    print("Output text:", generate_text(model.to(device), tokenizer, "Every effort moves you", 15))
    prompt = f"Is the following text 'spam'? Answer with 'yes' or 'no': '{SPAM_MESSAGE}'"
    answer = generate_text(model, tokenizer, prompt, 23)[len(prompt):]
    print(f"Asked whether a message is spam, it goes on: {answer!r}")
    lap("sanity check")
    add_classification_head(model, len(labels), settings)
    print("training {:,} of {:,} parameters".format(*count_parameters(model)))
    top, loaders = connect(model.to(device), datasets, settings, device)
    lap("frozen trunk")

    # 6.6 before training
    ids = torch.tensor([tokenizer.encode_ordinary("Do you have time")], device=device)
    with evaluating(model):
        print("Head output for 'Do you have time':", [round(x, 4) for x in model(ids)[0, -1].tolist()])
    torch.manual_seed(settings.seed)
    for name, loader in zip(SPLIT_NAMES, loaders):
        print(f"{name} accuracy: {calc_accuracy_loader(loader, top, device, 10) * 100:.2f}%")
    for name, loader in zip(SPLIT_NAMES, loaders):
        print(f"{name} loss: {calc_loss_loader(loader, top, device, 5):.3f}")
    lap("untrained evaluation")

    # 6.7 finetuning
    class_weights = None
    if balance_of(settings, labels) == "weights":
        shares = frames[0]["Label"].value_counts(normalize=True).sort_index()
        class_weights = torch.tensor(1 / shares.to_numpy(np.float32)) / len(labels)
    state_file = out.with_name(out.name + ".resume")
    if not args.resume and not rank():
        state_file.unlink(missing_ok=True)
    run = {**asdict(settings), "model": str(model_file), "data": str(data), "messages": len(df),
           "processes": world_size()}
    result = finetune(top, loaders, settings, device, class_weights, state_file, run)
    seconds |= result["seconds"]
    clock = time.perf_counter()
    print(f"({about['inputs']})")

    # 6.8 use
    if settings.trainable_layers == "lora":
        merge_lora(model)
    classifier = Classifier(model.eval(), texts, labels, datasets[1].max_length, settings, about)
    for text in (SPAM_MESSAGE, HAM_MESSAGE):
        print("{}  {:.4f}  {}".format(*classify_review(text, classifier, device), text))
    save_classifier(out, classifier)
    lap("use and saving")
    print(f"saved {out}; now try: python {Path(sys.argv[0]).name} classify \"You won a prize!\"")
    if args.plot:
        plot_history(result, len(loaders[0]) * settings.batch_size, args.plot)
    if args.metrics:
        with atomic_write(args.metrics) as temporary:
            temporary.write_text(json.dumps({**result, "seconds": seconds, "note": about["inputs"],
                                             "settings": {**run, "device": str(device)}}, indent=2) + "\n")
    if not rank():
        state_file.unlink(missing_ok=True)  # only now: the classifier is safe


def cmd_experiments(args):
    """The nineteen rows of the book's table of experiments, as Markdown; finished rows are kept in --out."""
    device, out = pick_device(args.device), args.out or args.weights_dir / "experiments.csv"
    names = args.rows.split(",") if args.rows else [str(row) for row in EXPERIMENTS]
    if unknown := [name for name in names if name.strip() not in map(str, EXPERIMENTS)]:
        raise ValueError(f"--rows {args.rows}: {unknown[0]!r} is not one of 1 to 19")
    wanted = [int(name) for name in names]
    check_writable(out)
    model_file, data = find_inputs(args)
    about = load_texts(model_file)[1]
    base = choose_settings(args, about)
    run = json.dumps({"model": str(model_file), "data": str(data), **asdict(base)})
    kept = pd.read_csv(out).to_dict("records") if out.is_file() else []
    done = {row["row"]: row for row in kept if row.get("run") == run}
    frames, labels = prepare_splits(read_messages(data, args.text_column, args.label_column), base, shuffle_first=True)
    trunks, failed = {}, 0
    for row in wanted:
        size, changes, _ = EXPERIMENTS[row]
        if row in done or size and not args.rows and not (args.weights_dir / f"gpt2-{size}.npz").exists():
            continue
        print(f"row {row}: {size or about['name']}, {changes or 'the reference'}", file=sys.stderr)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                file = find_model(size, args.weights_dir, args.weights_url, args.verify) if size else model_file
                done[row] = {"run": run, "model": size or about["name"], **run_experiment(
                    row, file, frames, labels, replace(base, **changes), device, trunks if not size else None)}
        except Exception as error:  # whatever it is, the other rows still run
            print(f"gpt_spam: row {row} failed: {type(error).__name__}: {error}", file=sys.stderr)
            failed += 1
            continue
        with atomic_write(out) as temporary:
            others = [row for row in kept if row.get("run") != run]
            pd.DataFrame(others + [done[n] for n in sorted(done)]).to_csv(temporary, index=False)
    print(describe_inputs(about, model_file, data) + "\n")
    print(markdown_table([done[row] for row in wanted if row in done]))
    if failed:
        raise ValueError(f"{failed} of {len(wanted)} rows failed; run the same command again for them")


def cmd_evaluate(args):
    """Accuracy, precision, recall, F1, confusion, average precision and ROC AUC of a saved classifier."""
    device = pick_device(args.device)
    classifier = load_classifier(args.classifier or args.weights_dir / "spam_classifier.pth", args.weights_dir)
    with leader_first():
        path = find_data(args.data, args.data_dir, args.data_url, args.verify)
    df, labels = read_messages(path, args.text_column, args.label_column), classifier.labels
    if args.split == "all":
        if unknown := sorted(set(df["Label"]) - set(labels)):
            raise ValueError(f"{path} has labels {unknown[:5]}, the classifier knows {labels}")
        frame = df.assign(Label=df["Label"].map(labels.index))
    else:
        if classifier.about.get("test_data"):
            raise ValueError(f"trained with --test-data {classifier.about['test_data']}: give that and --split all")
        frames, names = prepare_splits(df, classifier.settings)
        if names != labels:
            raise ValueError(f"{path} has labels {names}, the classifier {labels}")
        frame = dict(zip(("train", "validation", "test"), frames))[args.split]
    metrics = calc_metrics(frame["Label"], predict(classifier, frame["Text"].tolist(), device), labels)
    if args.format == "json":
        print(json.dumps({"data": str(path), "split": args.split, **metrics}, indent=2))
        return
    print(f"{path}, {args.split}: {len(frame):,} messages, accuracy {metrics['accuracy'] * 100:.2f}%\n")
    means = {f"{mean} mean": {**metrics[mean], "support": len(frame)} for mean in ("macro", "weighted")}
    rows = {**metrics["classes"], **means}
    print(pd.DataFrame(rows).T.astype({"support": int}).round(4).to_string())
    print("\nconfusion (row: true, column: predicted)")
    print(pd.DataFrame(metrics["confusion"], labels, labels).to_string())
    if "roc_auc" in metrics:
        print(f"\n{labels[1]}: average precision {metrics['average_precision']:.4f}, ROC AUC {metrics['roc_auc']:.4f}")


def cmd_classify(args):
    """A label and its probability for each text, in order."""
    if bool(args.texts) == bool(args.input):
        raise ValueError("give texts, or --input FILE (or -)")
    if args.input and str(args.input) == "-" and world_size() > 1:
        raise ValueError("several processes cannot share standard input: give --input a file")
    device = pick_device(args.device)
    classifier = load_classifier(args.classifier or args.weights_dir / "spam_classifier.pth", args.weights_dir)
    if args.threshold is not None and (len(classifier.labels) != 2 or not 0 <= args.threshold <= 1):
        raise ValueError(f"--threshold takes 0 to 1 and two labels, not {args.threshold} and {len(classifier.labels)}")
    with contextlib.ExitStack() as stack:
        if args.texts:
            rows = ((i, text, None) for i, text in enumerate(args.texts, 1))
        else:
            source = sys.stdin.buffer if str(args.input) == "-" else stack.enter_context(open(args.input, "rb"))
            kind = args.input_format or args.input.suffix.lower()[1:]
            rows = read_texts(source, kind if kind in ("csv", "tsv", "jsonl") else "lines", args.text_column)
        output = sys.stdout
        if args.output and str(args.output) != "-":
            temporary = stack.enter_context(atomic_write(args.output))
            output = stack.enter_context(open(temporary, "w", encoding="utf-8", newline=""))
        bar = stack.enter_context(progress(None, "classifying", " messages"))
        table = csv.writer(output, lineterminator="\n")
        if args.format == "csv":
            table.writerow(["label", "probability", "text"])
        while chunk := list(islice(rows, 4096)):
            for number, _, problem in chunk:
                if problem:
                    message = f"row {number} is passed over: {problem}"
                    if args.strict:
                        raise ValueError(message)
                    print(f"gpt_spam: {message}", file=sys.stderr)
            texts = [text for _, text, problem in chunk if not problem]
            for text, probabilities in zip(texts, predict(classifier, texts, device) if texts else ()):
                label, probability = decide(classifier, probabilities, args.threshold)
                text = text.encode("utf-8", "replace").decode()  # lone surrogates cannot be written
                if args.format == "csv":
                    table.writerow([label, f"{probability:.4f}", text])
                elif args.format == "jsonl":
                    row = {"label": label, "probability": round(probability, 6), "text": text}
                    output.write(json.dumps(row, ensure_ascii=False) + "\n")
                else:
                    output.write(f"{label}\t{probability:.4f}\t{' '.join(text.split())}\n")
            output.flush()
            bar.update(len(chunk))


def cmd_generate(args):
    """Continue a prompt with the pretrained model."""
    model, tokenizer, _ = load_pretrained(find_model(args.model, args.weights_dir, args.weights_url, args.verify))
    if not tokenizer.encode_ordinary(args.prompt):
        raise ValueError("an empty prompt has nothing to go on from: give a text")
    print(generate_text(model.to(pick_device(args.device)), tokenizer, args.prompt, args.tokens))


def cmd_convert(args):
    """Download and convert a checkpoint, and no more."""
    path = find_model(args.model, args.weights_dir, args.weights_url, args.verify, args.keep_checkpoint)
    print(f"{path}: {path.stat().st_size:,} bytes")


def add_settings(parser):
    """Give the parser one flag for each field of FinetuneConfig; only those given are in `args`."""
    group = parser.add_argument_group("finetuning settings (defaults: the chapter's, unless the model brings its own)")
    for f in fields(FinetuneConfig):
        choices = f.metadata["choices"] or None
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else {
            "type": type(f.default), "choices": choices, "metavar": None if choices else "N"}
        group.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                           help=f"{f.metadata['help']} (default: {f.default})", **kind)


def build_parser():
    """The command line: a few commands on top of the functions above."""
    parser = argparse.ArgumentParser(
        description="Finetune GPT-2 to spot spam SMS: chapter 6 of 'Build a Large Language Model (From Scratch)'.",
        epilog="First: python gpt_spam.py train   Then: python gpt_spam.py classify 'You won a prize!'")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run, help, model=False, data=False, classifier=False):
        sub = commands.add_parser(run.__name__[4:], help=help, description=run.__doc__)
        sub.set_defaults(run=run)
        add = sub.add_argument
        add("--weights-dir", type=Path, default=HERE / "weights",
            help="for models and classifiers (default: %(default)s)")
        add("--no-verify", dest="verify", action="store_false", help="take downloads whatever their SHA-256 is")
        add("--device", default="auto", help="cpu, cuda, cuda:1, mps ... (default: the best there is)")
        if model:
            add("--model", default="auto", help=f"{', '.join(SIZES)}, a folder in OpenAI's layout, an .npz, "
                "or auto: what is there, else 124M, else (no network) the bundled (default: auto)")
            add("--weights-url", metavar="URL", help="a mirror's address, before /gpt-2/models/...")
        if data:
            add("--data", default="auto", help="sms (UCI's collection), a file in its form, a CSV, TSV or "
                "JSON lines file with columns, or auto: sms, else (no network) bundled (default: auto)")
            add("--data-url", metavar="URL", help="a mirror's address, before /static/public/228/...")
            add("--data-dir", type=Path, default=HERE / "data", help="for the messages (default: %(default)s)")
            add("--label-column", metavar="NAME", help="default: label, in any case")
        if data or run is cmd_classify:
            add("--text-column", metavar="NAME", help="default: text, in any case")
        if classifier:
            add("--classifier", **file, help="default: spam_classifier.pth in the weights folder")
        if model and data:  # what finetunes
            add_settings(sub)
        return add

    file = {"type": Path, "metavar": "FILE"}
    add = command(cmd_train, "finetune and save a classifier", model=True, data=True)
    add("--test-data", **file, help="messages for the test, not a fifth of --data")
    add("--out", **file, help="the classifier (default: spam_classifier.pth in the weights folder)")
    add("--metrics", **file, help="write losses, accuracies, seconds, settings as JSON")
    add("--plot", type=Path, metavar="DIR", help="write loss-plot.png and accuracy-plot.png")
    add("--resume", action="store_true", help="go on after the last finished epoch of an interrupted run")
    add("--keep-checkpoint", action="store_true", help="keep the raw checkpoint after its conversion")
    add = command(cmd_evaluate, "measure a classifier", data=True, classifier=True)
    add("--split", choices=("train", "validation", "test", "all"), default="test", help="default: %(default)s")
    add("--format", choices=("text", "json"), default="text", help="default: %(default)s")
    add = command(cmd_classify, "label texts", classifier=True)
    add("texts", nargs="*", metavar="TEXT")
    add("--input", **file, help="a text a line, or .csv, .tsv, .jsonl with a text column; -: standard input")
    add("--input-format", choices=("lines", "csv", "tsv", "jsonl"), help="default: by the name of --input, else lines")
    add("--output", **file, help="default: -, standard output")
    add("--format", choices=("text", "csv", "jsonl"), default="text", help="default: %(default)s")
    add("--threshold", type=float, metavar="P", help="call it the second label (spam) from this probability on")
    add("--strict", action="store_true", help="stop at a broken row instead of passing it over")
    add = command(cmd_generate, "continue a text with the pretrained model", model=True)
    add("prompt", nargs="?", default="Every effort moves you", help="default: %(default)s")
    add("--tokens", type=int, default=15, help="how many to add (default: %(default)s)")
    add = command(cmd_convert, "download and convert a checkpoint", model=True)
    add("--keep-checkpoint", action="store_true", help="keep the raw checkpoint after its conversion")
    add = command(cmd_experiments, "the book's nineteen experiments as a table", model=True, data=True)
    add("--rows", metavar="1,2,16", help="default: all whose model is there")
    add("--out", **file, help="keep the rows as CSV (default: experiments.csv in the weights folder)")
    return parser


def main(argv=None):
    """Run a command; return its exit status: 0, or 2 after one line about what was wrong."""
    args = build_parser().parse_args(argv)
    try:
        with processes(args.device):
            args.run(args)
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("gpt_spam: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        forbidden = getattr(error, "errno", 0) in (errno.EACCES, errno.EPERM, errno.EROFS)
        hint = " (choose other places with --weights-dir, --data-dir and --out)" if forbidden else ""
        print(f"gpt_spam: error: {error}{hint}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
