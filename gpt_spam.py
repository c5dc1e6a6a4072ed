# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "tiktoken==0.14.0", "numpy>=1.26", "requests>=2.31", "pandas>=2.1", "tqdm", "matplotlib"]
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
import hashlib
import json
import math
import os
import shutil
import struct
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from itertools import islice
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


def setting(default, help, choices=None):
    """A field of FinetuneConfig; the command line takes flag, type, default and help from it."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class FinetuneConfig:
    """Every choice of a finetuning run; the defaults are the chapter's."""

    epochs: int = setting(5, "passes over the training messages")
    batch_size: int = setting(8, "messages a step")
    lr: float = setting(5e-5, "AdamW's learning rate")
    weight_decay: float = setting(0.1, "AdamW's weight decay")
    eval_freq: int = setting(50, "steps between two logged losses")
    eval_iter: int = setting(5, "batches behind a logged loss or epoch accuracy")
    seed: int = setting(123, "seeds the new head and the shuffling (the split is always the chapter's)")
    warmup: float = setting(0.0, "share of the steps in which the learning rate rises to --lr")
    decay: bool = setting(False, "let the learning rate fall to 0 in a straight line after that")


# ---- 6.2 Dataset: download, parse, balance, split ----

DATA_URLS = (
    "https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
    "https://f001.backblazeb2.com/file/LLMs-from-scratch/sms%2Bspam%2Bcollection.zip",
)
DATA_SHA256 = "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d"
LABELS = ("ham", "spam")  # label 0 and label 1


def progress(total, text, unit="B"):
    """A progress bar on stderr when that is a terminal and tqdm is installed; else a stand-in."""
    try:
        from tqdm import tqdm
    except ImportError:
        return contextlib.nullcontext(argparse.Namespace(update=lambda n: None))
    return tqdm(total=total, desc=text, unit=unit, unit_scale=True, leave=False, disable=None)


@contextlib.contextmanager
def locked(folder):
    """Let one process at a time into the block; the system frees the lock however the process ends.

    It is the folder itself that is locked, so no lock file stays behind.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_write(path):
    """Give a temporary name next to `path`; rename it to `path` if the block ends well.

    A reader sees the old file or the whole new one, never half of it. What a killed process left
    has the same temporary name, so the next write replaces it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with locked(path.parent):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def fetch_part(url, path):
    """Download `url` to a part file next to `path` and return its name.

    Goes on behind the bytes that an earlier break left on disk. The part's name holds the address,
    length and version it belongs to, so a part of another file is never continued.
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
            raise ValueError(f"{path.name} needs {total - have:,} bytes, {path.parent} has {free:,} free")
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
                    raise ValueError(f"{url} answered with a web page (a network's log-in page?), not {path.name}")
                file.write(chunk)
                bar.update(len(chunk))
    if total and (size := part.stat().st_size) != total:
        if size > total:
            part.unlink()
        raise OSError(f"{size:,} of {total:,} bytes came")
    return part


def download(urls, path, sha256=None):
    """Fetch `path` from the first of `urls` that delivers it whole, trying each a few times.

    Raises OSError that names every address and what it answered; `path` is only ever the right
    file (announced length and, where given, SHA-256) or not there.
    """
    failures = []
    for url in urls:
        for pause in (0, 1, 3):
            time.sleep(pause)
            try:
                part = fetch_part(url, path)
                if sha256 and (found := file_sha256(part)) != sha256:
                    part.unlink()
                    raise OSError(f"SHA-256 is {found[:12]}..., expected {sha256[:12]}... (--no-verify to accept)")
                os.replace(part, path)
                for leftover in path.parent.glob(f"{path.name}.*.part"):
                    leftover.unlink()
                return
            except OSError as error:  # requests' errors are OSErrors, too
                reason = getattr(error.args[0] if error.args else error, "reason", error)  # urllib3's, if there is one
                failures.append(f"{url} ({type(reason).__name__ if reason is not error else error})")
                if isinstance(error, requests.ConnectionError) and not pause or (
                    isinstance(error, requests.HTTPError) and error.response.status_code < 500
                ):
                    break  # nobody there, or a plain no: waiting will not help
    tried = ", ".join(dict.fromkeys(failures))
    raise OSError(f"cannot download {path.name}; tried {tried}; fetch it by hand and save it as {path}")


def file_sha256(path):
    """The SHA-256 of a file, as hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def download_and_unzip_spam_data(urls, data_file_path, verify=True):
    """Bring the SMS Spam Collection to `data_file_path` (tab-separated), unless it is there.

    Source: Almeida, Gomez Hidalgo and Yamakami 2011; UCI Machine Learning Repository, id 228.
    """
    folder = data_file_path.parent / "download"
    with locked(folder):
        if not data_file_path.exists():
            archive = folder / "sms_spam_collection.zip"
            if not archive.exists():
                download(urls, archive)
            try:
                with zipfile.ZipFile(archive) as zipped:
                    if zipped.getinfo("SMSSpamCollection").file_size > 10_000_000:
                        raise ValueError("SMSSpamCollection unpacks to more than 10 MB; it has 477,907 bytes")
                    content = zipped.read("SMSSpamCollection")  # this member only, whatever else is in there
            except (zipfile.BadZipFile, KeyError) as error:
                raise ValueError(f"not the archive of the SMS Spam Collection: {error}") from None
            finally:
                archive.unlink()
            if verify and (found := hashlib.sha256(content).hexdigest()) != DATA_SHA256:
                raise ValueError(f"SMSSpamCollection has SHA-256 {found[:12]}..., expected {DATA_SHA256[:12]}...")
            with atomic_write(data_file_path) as temporary:
                temporary.write_bytes(content)
        shutil.rmtree(folder, ignore_errors=True)


def read_messages(path):
    """Return a file in UCI's form (label, tab, text) as a frame with columns Label and Text.

    Raises ValueError if it is not in that form.
    """
    # The chapter keeps pandas' default quoting, which glues messages with a stray quote together:
    # 5,572 rows (4,825 ham, 747 spam) where UCI lists 5,574. Other quoting would give another split.
    try:
        df = pd.read_csv(path, sep="\t", header=None, names=["Label", "Text"], keep_default_na=False)
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{path} is not a tab-separated UTF-8 file of label and text: {error}") from None
    wrong = df[~df["Label"].isin(LABELS)]
    if len(wrong):
        row = wrong.index[0]
        raise ValueError(f"{path}, message {row + 1}: label {str(df['Label'][row])[:40]!r} is not 'ham' or 'spam'; "
                         "each line must be a label, a tab and a text")
    return df


def create_balanced_dataset(df):
    """Return all spam and as many ham messages, drawn at random: 747 and 747 of UCI's.

    On the whole collection a classifier that always says ham would be 86.6% accurate and worthless.
    """
    spam, ham = df[df["Label"] == "spam"], df[df["Label"] == "ham"]
    if len(ham) < len(spam):
        raise ValueError(f"{len(ham)} ham and {len(spam)} spam messages: at least as much ham as spam is needed")
    return pd.concat([ham.sample(len(spam), random_state=123), spam])


def random_split(df, train_frac, validation_frac):
    """Shuffle (always the same way) and cut into training, validation and test frames."""
    df = df.sample(frac=1, random_state=123).reset_index(drop=True)
    train_end = int(len(df) * train_frac)
    validation_end = train_end + int(len(df) * validation_frac)
    return df[:train_end], df[train_end:validation_end], df[validation_end:]


def prepare_splits(path, csv_dir=None):
    """Return the chapter's three frames, Label 0 (ham) or 1 (spam): 1,045, 149 and 300 of UCI's.

    Writes them to train.csv, validation.csv and test.csv in `csv_dir`.
    """
    balanced = create_balanced_dataset(read_messages(path))
    balanced["Label"] = balanced["Label"].map({name: i for i, name in enumerate(LABELS)})
    splits = random_split(balanced, 0.7, 0.1)
    if len(splits[1]) < 1 or len(splits[2]) < 1:
        raise ValueError(f"{len(balanced) // 2} messages of each class in {path}: at least 5 are needed to split them")
    for name, frame in zip(("train", "validation", "test"), splits):
        if csv_dir:
            with atomic_write(Path(csv_dir) / f"{name}.csv") as temporary:
                frame.to_csv(temporary, index=None)
    return splits


# ---- 6.3 Data loaders: ids, padding, batches ----

# GPT-2's way of cutting text into words before merging bytes (OpenAI's encoder.py, 2019).
GPT2_SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
END_OF_TEXT = "<|endoftext|>"


def build_tokenizer(encoder_json, vocab_bpe):
    """Return a tiktoken.Encoding from the text of OpenAI's two tokenizer files.

    For GPT-2's files its ids equal those of tiktoken's own "gpt2". Raises ValueError where the two
    files disagree. Use `encode_ordinary`: a message that spells <|endoftext|> is text like any other.
    """
    # OpenAI writes each byte as one printable character: itself, or 256 and up in order.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {chr(b): b for b in printable}
    characters |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
    try:
        ids = json.loads(encoder_json)
        end = ids.pop(END_OF_TEXT)
        ranks = {bytes(characters[c] for c in token): i for token, i in ids.items()}
        merges = [line.replace(" ", "") for line in vocab_bpe.split("\n")[1:] if line]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not GPT-2's encoder.json: {error!r}") from None
    # The order of the merges is the order of the ids: 256 bytes, the merges, the end of text.
    if [ids.get(merge) for merge in merges] != list(range(256, end)) or sorted(ranks.values()) != list(range(end)):
        raise ValueError("encoder.json and vocab.bpe do not belong together: ids and merges differ")
    return tiktoken.Encoding("gpt2", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: end})


class SpamDataset(Dataset):
    """Messages as tensors: item i is (ids, at, label).

    ids: (tokens,) long, padded with `pad_token_id` to `max_length`, by default the longest message;
    longer ones are cut. at: (asked,) long, the position that the label is read from: the last one,
    which under the causal mask is the only one that has seen the whole message.
    `data` is a frame with Text and Label, or the name of a CSV file with these columns.
    """

    def __init__(self, data, tokenizer, max_length=None, pad_token_id=50256):
        if not isinstance(data, pd.DataFrame):
            data = pd.read_csv(data, keep_default_na=False)
        encoded = [tokenizer.encode_ordinary(text) for text in data["Text"]]
        self.max_length = max_length or max(map(len, encoded))
        padded = [ids[:self.max_length] + [pad_token_id] * (self.max_length - len(ids)) for ids in encoded]
        self.inputs = torch.tensor(padded)                                  # (messages, tokens)
        self.at = torch.full((len(padded), 1), self.max_length - 1)         # (messages, asked)
        self.labels = torch.tensor(data["Label"].to_numpy(dtype=np.int64))  # (messages,)

    def __getitem__(self, index):
        return self.inputs[index], self.at[index], self.labels[index]

    def __len__(self):
        return len(self.labels)


def create_loaders(splits, tokenizer, max_length=None, batch_size=8):
    """Return loaders for the training, validation and test frames; `max_length` as in SpamDataset.

    All are padded to the length of the training set's longest message: one preprocessing for all.
    """
    train = SpamDataset(splits[0], tokenizer, max_length, tokenizer.eot_token)
    others = [SpamDataset(frame, tokenizer, train.max_length, tokenizer.eot_token) for frame in splits[1:]]
    # The last 5 of 1,045 training messages are dropped, others each epoch: 130 batches of 8.
    return [DataLoader(train, batch_size, shuffle=True, drop_last=True), *(DataLoader(d, batch_size) for d in others)]


# ---- 6.4 The GPT model ----

def read_at(x, at):
    """Pick positions: x (batch, tokens, width) and at (batch, asked) give (batch, asked, width)."""
    return x.gather(1, at[:, :, None].expand(-1, -1, x.shape[-1]))


class MultiHeadAttention(nn.Module):
    """Causal self-attention (chapter 3; Vaswani et al. 2017).

    forward: x (batch, tokens, emb) gives (batch, tokens, emb), or with at (batch, asked) the rows
    at these positions alone, (batch, asked, emb): keys and values are needed everywhere, queries not.
    """

    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False):
        super().__init__()
        if d_out % num_heads:
            raise ValueError(f"emb_dim {d_out} is not a multiple of n_heads {num_heads}")
        self.num_heads, self.dropout = num_heads, dropout
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)

    def forward(self, x, at=None):
        batch, tokens, emb = x.shape

        def heads(projected):
            return projected.view(batch, -1, self.num_heads, emb // self.num_heads).transpose(1, 2)

        keys, values = heads(self.W_key(x)), heads(self.W_value(x))           # (batch, heads, tokens, head)
        queries = heads(self.W_query(x if at is None else read_at(x, at)))    # (batch, heads, asked, head)
        mask = None
        if at is not None:  # a position sees itself and what stands before it
            mask = torch.arange(tokens, device=x.device) <= at[:, None, :, None]  # (batch, 1, asked, tokens)
        context = F.scaled_dot_product_attention(
            queries, keys, values, mask, dropout_p=self.dropout * self.training, is_causal=mask is None)
        return self.out_proj(context.transpose(1, 2).reshape(batch, -1, emb))  # (batch, asked, emb)

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
            cfg.emb_dim, cfg.emb_dim, cfg.context_length, cfg.drop_rate, cfg.n_heads, cfg.qkv_bias)
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

    With at (batch, asked) the logits at these positions alone, (batch, asked, classes): the same
    numbers, but the last block computes little more than keys and values.
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
DATA_FILE, INDEX_FILE = "model.ckpt.data-00000-of-00001", "model.ckpt.index"
FILES_124M = {  # SHA-256; for the other sizes the checkpoint's own checksums are the judge
    "checkpoint": "dd1b025d2e155283f5e300ce95bf6d5b6bc0f7fe010db73daa6975eb896ab9cb",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "hparams.json": "d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318",
    DATA_FILE: "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118",
    INDEX_FILE: "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
    "model.ckpt.meta": "4668c448fa11531fd6700460487f73e82d3272960cea942252f8744bf225c77b",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def crc_steps(crc, bits):
    """Push `bits` zero bits through each of an array of CRC-32C registers (polynomial of RFC 3720)."""
    for _ in range(bits):
        crc = (crc >> np.uint32(1)) ^ np.where(crc & np.uint32(1), np.uint32(0x82F63B78), np.uint32(0))
    return crc


@lru_cache(maxsize=None)
def crc_table():
    """What 16 steps do to each 16-bit value: CRC-32C two bytes at a time."""
    return crc_steps(np.arange(65536, dtype=np.uint32), 16)


def crc_shift(crc, count):
    """Push `count` zero bytes through an array of registers, in log(count) steps.

    Steps are linear over GF(2), so any number of them is 32 columns, and twice as many its square.
    """
    def apply(columns, crc):
        out = np.zeros_like(crc)
        for bit in range(32):
            out ^= np.where(crc >> np.uint32(bit) & np.uint32(1), columns[bit], np.uint32(0))
        return out

    columns = crc_steps(np.uint32(1) << np.arange(32, dtype=np.uint32), 8)
    while count:
        if count & 1:
            crc = apply(columns, crc)
        columns, count = apply(columns, columns), count >> 1
    return crc


def crc32c(data, chunk=1 << 25):
    """The CRC-32C of bytes, by NumPy (RFC 3720, appendix B.4).

    A chunk is cut into lanes whose registers advance side by side; then neighbours are joined, the
    left one shifted by the length of the right one.
    """
    data = np.frombuffer(data, np.uint8)
    table, crc = crc_table(), np.full(1, 0xFFFFFFFF, np.uint32)
    for start in range(0, len(data), chunk):
        piece = data[start:start + chunk]
        lanes = 16384 if len(piece) > 1 << 20 else 16
        length = -(-len(piece) // (2 * lanes)) * 2  # bytes a lane
        padded = np.zeros(lanes * length, np.uint8)
        padded[len(padded) - len(piece):] = piece   # zeros in front do not move an empty register
        registers = np.zeros(lanes, np.uint32)
        for column in np.ascontiguousarray(padded.view("<u2").reshape(lanes, -1).T):
            registers = table[registers.astype(np.uint16) ^ column] ^ (registers >> np.uint32(16))
        while len(registers) > 1:
            registers, length = crc_shift(registers[::2], length) ^ registers[1::2], 2 * length
        crc = crc_shift(crc, len(piece)) ^ registers
    return int(crc[0]) ^ 0xFFFFFFFF


def check_crc(data, masked, what):
    """Raise ValueError unless `data` has this CRC-32C, stored the way LevelDB and TensorFlow mask it."""
    crc = crc32c(data)
    if ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF != masked:
        raise ValueError(f"{what} is damaged: its checksum does not match")


def read_varint(data, at):
    """Return the variable-length integer at `at` and the position behind it."""
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            if byte == 0 and shift > 7:
                break  # padded with zeros; no writer does that
            return value, at
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
    check_crc(block + trailer[:1], int.from_bytes(trailer[1:], "little"), f"the block at byte {offset:,} of {INDEX_FILE}")
    end = size - 4 - 4 * int.from_bytes(block[-4:], "little")  # restart points: only for searching
    at, key = 0, b""
    while at < end:
        shared, at = read_varint(block, at)
        fresh, at = read_varint(block, at)
        length, at = read_varint(block, at)
        if shared > len(key) or at + fresh + length > end:
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
    rows = [row for _, row in read_block(data, *blocks[1])]
    for row in rows:
        offset, at = read_varint(row, 0)
        size, at = read_varint(row, at)
        blocks.append((offset, size))
    ends = [0] + [offset + size + 5 for offset, size in sorted(blocks)]
    if ends != [offset for offset, _ in sorted(blocks)] + [len(data) - 48]:
        raise ValueError(f"not a checkpoint index: its blocks do not fill its {len(data):,} bytes")
    list(read_block(data, *blocks[0]))
    entries = {}
    for block in blocks[2:]:
        for key, value in read_block(data, *block):
            entries[key.decode("utf-8", "replace")] = read_message(value)
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
    if not all(type(n) is int and 0 < n < 1 << 20 for n in numbers.values()):
        raise ValueError(f"not GPT-2's hparams.json: {numbers}")
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


def convert_checkpoint(folder, path, about):
    """Write OpenAI's checkpoint in `folder` as one `path`.npz: the whole model in one file.

    Holds the tensors under GPTModel's names, hparams.json, encoder.json and vocab.bpe as bytes, and
    `about` (a dict: name, verified, ...) as JSON. Raises ValueError if any tensor is damaged,
    missing, of another shape, or left over.
    """
    folder = Path(folder)
    for name in FILES_124M:
        if not (folder / name).is_file() and name not in ("checkpoint", "model.ckpt.meta"):  # these two are not read
            raise ValueError(f"{folder} is not a checkpoint in OpenAI's layout: it has no {name}")
    try:
        cfg = config_from_hparams(json.loads((folder / "hparams.json").read_text("utf-8")))
        texts = {name: (folder / name).read_bytes() for name in ("hparams.json", "encoder.json", "vocab.bpe")}
        check_vocabulary(build_tokenizer(texts["encoder.json"].decode(), texts["vocab.bpe"].decode()), cfg)
        if (size := (folder / INDEX_FILE).stat().st_size) > 1 << 24:
            raise ValueError(f"{INDEX_FILE} has {size:,} bytes; OpenAI's largest has some 20,000")
        entries, arrays = read_index((folder / INDEX_FILE).read_bytes()), {}
        with open(folder / DATA_FILE, "rb") as file, progress(len(entries), "converting", "tensors") as bar:
            for name, shape, ours, transposed in checkpoint_tensors(cfg):
                if name not in entries:
                    raise ValueError(f"no tensor {name} in {INDEX_FILE}; hparams.json asks for {cfg.n_layers} layers")
                array = read_tensor(file, name, entries.pop(name), shape)
                for our, part in zip(ours, np.split(array, len(ours), axis=-1)):
                    arrays[our] = np.ascontiguousarray(part[0].T if transposed else part)
                bar.update(1)
            used = sum(array.nbytes for array in arrays.values())
            if entries or used != os.fstat(file.fileno()).st_size:
                raise ValueError(f"the checkpoint holds more than a GPT-2: {len(entries)} tensors unused, "
                                 f"{os.fstat(file.fileno()).st_size:,} bytes where {used:,} are known")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}: {error}") from None
    save_pretrained(path, arrays, texts, about)


def save_pretrained(path, arrays, texts, about):
    """Write tensors {our name: array}, tokenizer files and hparams {name: bytes} as one .npz."""
    texts = {**texts, "about.json": json.dumps(about).encode()}
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays, **{name: np.frombuffer(text, np.uint8) for name, text in texts.items()})


def check_vocabulary(tokenizer, cfg):
    """Raise ValueError unless the tokenizer's ids are those of the model's embedding."""
    if tokenizer.n_vocab != cfg.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.n_vocab:,} ids, the model {cfg.vocab_size:,}")


class SkipInit(TorchFunctionMode):
    """Leaves new modules' weights as they are: no time for random values that are replaced at once.

    torch.device("meta") does that too, but its normal_ imports sympy, which takes a second.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


def load_pretrained(path):
    """Return (model, texts, about) of a .npz that `convert_checkpoint` wrote.

    model: a GPTModel in eval mode whose out_head is a copy of tok_emb. texts: the tokenizer's two
    files, as strings. Raises ValueError if the file is not one, or does not fit its own hparams.
    """
    try:
        with np.load(path, allow_pickle=False) as npz:
            texts = {name: npz[name].tobytes().decode() for name in ("hparams.json", "encoder.json", "vocab.bpe")}
            about = json.loads(npz["about.json"].tobytes())
            cfg = config_from_hparams(json.loads(texts.pop("hparams.json")))
            if f"trf_blocks.{cfg.n_layers - 1}.norm1.scale" not in npz:
                raise ValueError(f"hparams.json asks for {cfg.n_layers} layers, the tensors are fewer")
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
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, EOFError, MemoryError, AttributeError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is not a model converted by this file: {error}") from None
    check_vocabulary(build_tokenizer(**{n.replace(".", "_"): t for n, t in texts.items()}), cfg)
    with SkipInit():
        model = GPTModel(cfg)
    load_weights_into_gpt(model, params)
    return model.eval(), texts, about


def load_weights_into_gpt(gpt, params):
    """Put params {GPTModel's name: tensor} into the model, not copied; out_head becomes a copy of tok_emb."""
    gpt.load_state_dict({**params, "out_head.weight": params["tok_emb.weight"].clone()}, assign=True)
    if not all(p.sum().isfinite() for p in gpt.parameters()):  # NaN and infinity survive a sum
        raise ValueError("the weights hold NaN or infinity; convert the checkpoint again")


def find_model(name, weights_dir, url=None, verify=True, keep=False):
    """Return the .npz of a model: a size (downloaded at need), a folder in OpenAI's layout, or an .npz.

    Converts once into `weights_dir`; `url` is a mirror's base address; `keep` keeps the raw files.
    """
    weights_dir = Path(weights_dir)
    if str(name).endswith(".npz"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"no file {name}")
        return Path(name)
    if name in SIZES:
        path, folder = weights_dir / f"gpt2-{name}.npz", weights_dir / name
        if path.exists():
            return path
        with locked(folder):
            if not path.exists():  # another process may have made it while this one waited
                checked = FILES_124M if name == "124M" and verify else {}
                print(f"downloading {name} " + ("and checking its SHA-256s" if checked else "without SHA-256s"
                      + (" (--no-verify)" if not verify else "; the checkpoint's own checksums are the judge")))
                for file in FILES_124M:
                    if not (folder / file).exists():
                        bases = [f"{url}/gpt-2/models"] if url else [MODELS_URL, MODELS_BACKUP_URL]
                        download([f"{base}/{name}/{file}" for base in bases], folder / file, checked.get(file))
                try:
                    convert_checkpoint(folder, path, {"name": name, "verified": bool(checked)})
                except ValueError as error:
                    shutil.rmtree(folder)
                    raise ValueError(f"{error}; the download was removed, run again for a fresh one") from None
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
        return path
    if not Path(name).is_dir():
        raise ValueError(f"unknown model {name!r}: give {', '.join(SIZES)}, a folder in OpenAI's layout, or an .npz file")
    folder = Path(name).resolve()
    index = (folder / INDEX_FILE).read_bytes() if (folder / INDEX_FILE).is_file() else b""
    path = weights_dir / f"gpt2-{folder.name}-{hashlib.sha256(index).hexdigest()[:8]}.npz"  # the index has all checksums
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

def add_classification_head(model, num_classes, seed=123):
    """Freeze the model, replace its head by a new one of `num_classes`, and unfreeze the end.

    Trains the last block, the final norm and the head: 7,090,946 of the 124M's 124,441,346 parameters.
    """
    for param in model.parameters():
        param.requires_grad = False
    torch.manual_seed(seed)
    model.out_head = nn.Linear(model.cfg.emb_dim, num_classes)  # 50,257 next tokens become a few classes
    for module in (model.trf_blocks[-1], model.final_norm):
        for param in module.parameters():
            param.requires_grad = True


def count_parameters(model):
    """Return (trainable, all) parameters."""
    return (sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters()))


# ---- 6.6 Loss and accuracy: accuracy is reported, cross-entropy is optimised ----

def calc_logits(input_batch, at, model, device):
    """Logits of a batch, (batch, classes); where several positions are asked, their mean."""
    return model(input_batch.to(device), at.to(device)).mean(dim=1)


def calc_loss_batch(input_batch, at, target_batch, model, device, loss_fn=F.cross_entropy):
    """Cross-entropy of a batch: accuracy itself has no gradient to follow."""
    return loss_fn(calc_logits(input_batch, at, model, device), target_batch.to(device))


@contextlib.contextmanager
def evaluating(model):
    """No gradients, and eval() inside; then the mode that the model was in."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        yield
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


# ---- 6.7 Finetuning ----

def evaluate_model(model, train_loader, val_loader, device, eval_iter, loss_fn=F.cross_entropy):
    """Return training and validation loss over `eval_iter` batches."""
    return [calc_loss_loader(loader, model, device, eval_iter, loss_fn) for loader in (train_loader, val_loader)]


def train_classifier_simple(model, train_loader, val_loader, optimizer, device, num_epochs, eval_freq, eval_iter,
                            loss_fn=F.cross_entropy, scheduler=None):
    """Train, print the chapter's log lines, and return (history, epochs), rows for `plot_values` and JSON.

    history: step, epoch, examples_seen, train_loss, val_loss every `eval_freq` steps; epochs: epoch,
    train_accuracy, val_accuracy over `eval_iter` batches. Raises ValueError when the loss is no number.
    """
    history, epochs, examples_seen, global_step = [], [], 0, -1
    for epoch in range(1, num_epochs + 1):
        model.train()
        for input_batch, at, target_batch in train_loader:
            optimizer.zero_grad()
            loss = calc_loss_batch(input_batch, at, target_batch, model, device, loss_fn)
            global_step += 1
            if not torch.isfinite(loss):
                raise ValueError(f"the loss is {loss.item()} at step {global_step}: try a smaller --lr")
            loss.backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
            examples_seen += len(target_batch)
            if global_step % eval_freq == 0:
                train_loss, val_loss = evaluate_model(model, train_loader, val_loader, device, eval_iter, loss_fn)
                history.append({"step": global_step, "epoch": epoch, "examples_seen": examples_seen,
                                "train_loss": train_loss, "val_loss": val_loss})
                print(f"Ep {epoch} (Step {global_step:06d}): Train loss {train_loss:.3f}, Val loss {val_loss:.3f}")
        train_accuracy = calc_accuracy_loader(train_loader, model, device, eval_iter)
        val_accuracy = calc_accuracy_loader(val_loader, model, device, eval_iter)
        print(f"Training accuracy: {train_accuracy * 100:.2f}% | Validation accuracy: {val_accuracy * 100:.2f}%")
        epochs.append({"epoch": epoch, "train_accuracy": train_accuracy, "val_accuracy": val_accuracy})
    return history, epochs


def learning_rate_factor(step, steps, warmup, decay):
    """What `--lr` is multiplied by at update `step` of `steps`: up in a line, then level or down to 0."""
    rise = (step + 1) / max(1, warmup * steps)
    return min(1.0, rise, (steps - step) / max(1, steps - warmup * steps) if decay else 1.0)


def finetune(model, loaders, settings, device):
    """Train the unfrozen part as the settings say and return history, epochs, final and seconds.

    final: accuracies over the three whole loaders, the test split last and once.
    """
    started = time.perf_counter()
    torch.manual_seed(settings.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay,
                                  fused=device.type in ("cpu", "cuda"))
    steps = settings.epochs * len(loaders[0])
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps, settings.warmup, settings.decay))
    history, epochs = train_classifier_simple(model, *loaders[:2], optimizer, device, settings.epochs,
                                              settings.eval_freq, settings.eval_iter, scheduler=scheduler)
    seconds = {"training": time.perf_counter() - started}
    print(f"Training completed in {seconds['training'] / 60:.2f} minutes.")
    started, final = time.perf_counter(), {}
    for name, text, loader in zip(("train", "val", "test"), ("Training", "Validation", "Test"), loaders):
        final[f"{name}_accuracy"] = calc_accuracy_loader(loader, model, device)
        print(f"{text} accuracy: {final[f'{name}_accuracy'] * 100:.2f}%")
    return {"history": history, "epochs": epochs, "final": final,
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


def plot_history(result, examples_an_epoch, folder):
    """Write loss-plot.png and accuracy-plot.png of a `finetune` result."""
    history, epochs = result["history"], result["epochs"]
    seen = [row["examples_seen"] for row in history]
    plot_values([n / examples_an_epoch for n in seen], seen, [row["train_loss"] for row in history],
                [row["val_loss"] for row in history], "loss", folder / "loss-plot.png")
    plot_values([row["epoch"] for row in epochs], [row["epoch"] * examples_an_epoch for row in epochs],
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
    settings: FinetuneConfig
    about: dict        # where model and data come from

    def __post_init__(self):
        self.tokenizer = build_tokenizer(self.texts["encoder.json"], self.texts["vocab.bpe"])


def predict(classifier, texts, device, batch_size=32):
    """Return the probability of each class, (messages, classes), for a list of texts."""
    frame = pd.DataFrame({"Text": texts, "Label": 0})
    dataset = SpamDataset(frame, classifier.tokenizer, classifier.max_length, classifier.tokenizer.eot_token)
    model = classifier.model.to(device)
    with evaluating(model):
        logits = [calc_logits(ids, at, model, device) for ids, at, _ in DataLoader(dataset, batch_size)]
    return torch.cat(logits).softmax(dim=-1).cpu()


def classify_review(text, classifier, device):
    """Return (label, probability) of one message, prepared as the training messages were."""
    probabilities = predict(classifier, [text], device)[0]
    best = int(probabilities.argmax())
    return classifier.labels[best], float(probabilities[best])


def save_classifier(path, classifier):
    """Write one self-describing file: plain dicts, lists, strings and tensors."""
    content = {
        "format": "gpt_spam classifier 1", "config": asdict(classifier.model.cfg), "settings": asdict(classifier.settings),
        "labels": list(classifier.labels), "max_length": classifier.max_length,
        "pad_token_id": classifier.tokenizer.eot_token, "tokenizer": dict(classifier.texts), "about": classifier.about,
        "model": classifier.model.state_dict(),
    }
    with atomic_write(path) as temporary:
        torch.save(content, temporary)


def load_classifier(path):
    """Return the Classifier that `save_classifier` wrote: the same logits, bit for bit.

    Raises ValueError if the file is not one; nothing in it is executed.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no classifier at {path}: make one with `python gpt_spam.py train`, or name it with --classifier")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        cfg = GPTConfig(**content["config"])
        settings = FinetuneConfig(**content["settings"])
        with SkipInit():
            model = GPTModel(cfg)
            model.out_head = nn.Linear(cfg.emb_dim, len(content["labels"]))
        model.load_state_dict(content["model"], assign=True)
        return Classifier(model.eval(), content["tokenizer"], content["labels"], content["max_length"], settings,
                          content["about"])
    except Exception as error:  # torch.load raises nearly anything for a file of another kind
        raise ValueError(f"{path} is not a classifier saved by `train`: {str(error).splitlines()[0]}") from None


# ---- Command line ----

HERE = Path(__file__).resolve().parent
SPAM_MESSAGE = "You are a winner you have been specially selected to receive $1000 cash or a $2000 award."
HAM_MESSAGE = "Hey, just wanted to check if we're still on for dinner tonight? Let me know!"


def pick_device(name="auto"):
    """cuda where there is one, else mps (from torch 2.9 on), else cpu; or the device of that name."""
    if name != "auto":
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"no device {name!r} here: {str(error).splitlines()[0]}") from None
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    version = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])
    return torch.device("mps" if torch.backends.mps.is_available() and version >= (2, 9) else "cpu")


def check_writable(path):
    """Raise OSError now, rather than after the training, if `path` cannot be written."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    with atomic_write(path.with_name(path.name + ".try")) as temporary:
        temporary.touch()
    path.with_name(path.name + ".try").unlink()


def find_data(name, data_dir, url=None, verify=True):
    """Return the file of messages: one that is named, or UCI's, downloaded at need."""
    if name != "sms":
        if not Path(name).is_file():
            raise FileNotFoundError(f"no file {name}")
        return Path(name)
    path = Path(data_dir) / "SMSSpamCollection.tsv"
    if not path.exists():
        urls = [f"{url}/static/public/228/sms+spam+collection.zip"] if url else DATA_URLS
        download_and_unzip_spam_data(urls, path, verify)
    return path


def show_untrained(model, tokenizer):
    """Print what the chapter shows before finetuning: sensible text, and no answer when asked about spam."""
    print("Output text:", generate_text(model, tokenizer, "Every effort moves you", 15))
    prompt = f"Is the following text 'spam'? Answer with 'yes' or 'no': '{SPAM_MESSAGE}'"
    answer = generate_text(model, tokenizer, prompt, 23)[len(prompt):]
    print(f"Asked whether a message is spam, it goes on: {answer!r}")


def cmd_train(args):
    """Chapter 6 from top to bottom."""
    out = args.out or args.weights_dir / "spam_classifier.pth"
    for path in (out, args.metrics, args.plot and args.plot / "loss-plot.png"):
        if path:
            check_writable(path)
    if args.plot:
        require("matplotlib", "--plot")
    clock, seconds, device = time.perf_counter(), {}, pick_device(args.device)

    def lap(phase):
        nonlocal clock
        seconds[phase], clock = time.perf_counter() - clock, time.perf_counter()

    # 6.2 dataset, 6.4 model: fetched and prepared once
    model_file = find_model(args.model, args.weights_dir, args.weights_url, args.verify, args.keep_checkpoint)
    data = find_data(args.data, args.data_dir, args.data_url, args.verify)
    splits = prepare_splits(data, args.data_dir)
    lap("data and weights")
    model, texts, about = load_pretrained(model_file)
    settings = replace(FinetuneConfig(**about.get("finetune", {})), **chosen_settings(args))
    about = {**about, "model": str(model_file), "data": str(data)}
    note = f"{about['name']}{'' if about.get('verified', True) else ' (values not verified)'} on {data.name}"
    print(f"model and data: {note}; device: {device}")
    print("settings: " + ", ".join(f"{name} {value}" for name, value in asdict(settings).items()))
    lap("loading")

    # 6.3 data loaders
    tokenizer = build_tokenizer(texts["encoder.json"], texts["vocab.bpe"])
    loaders = create_loaders(splits, tokenizer, batch_size=settings.batch_size)
    max_length = loaders[0].dataset.max_length
    if max_length > model.cfg.context_length:
        raise ValueError(f"the longest training message has {max_length} tokens, the model holds {model.cfg.context_length}")
    if len(splits[0]) < settings.batch_size:
        raise ValueError(f"{len(splits[0])} training messages make no batch of {settings.batch_size}: lower --batch-size")
    print(f"{' / '.join(str(len(frame)) for frame in splits)} training, validation and test messages of {max_length} tokens; "
          f"{' / '.join(str(len(loader)) for loader in loaders)} batches of {settings.batch_size}")
    lap("tokenizing")

    # 6.4 sanity check, 6.5 head
    model.to(device)
    show_untrained(model, tokenizer)
    lap("sanity check")
    add_classification_head(model, len(LABELS), settings.seed)
    print("training {:,} of {:,} parameters".format(*count_parameters(model)))
    model.to(device)

    # 6.6 before training
    idx = torch.tensor([tokenizer.encode_ordinary("Do you have time")], device=device)
    with evaluating(model):
        print("Head output for 'Do you have time':", [round(x, 4) for x in model(idx)[0, -1].tolist()])
    torch.manual_seed(settings.seed)
    names = ("Training", "Validation", "Test")
    for name, loader in zip(names, loaders):
        print(f"{name} accuracy: {calc_accuracy_loader(loader, model, device, 10) * 100:.2f}%")
    for name, loader in zip(names, loaders):
        print(f"{name} loss: {calc_loss_loader(loader, model, device, 5):.3f}")
    lap("untrained evaluation")

    # 6.7 finetuning
    result = finetune(model, loaders, settings, device)
    seconds |= result["seconds"]
    clock = time.perf_counter()
    print(f"({note})")

    # 6.8 use
    classifier = Classifier(model.eval(), texts, list(LABELS), max_length, settings, about)
    for text in (SPAM_MESSAGE, HAM_MESSAGE):
        print("{}  {:.4f}  {}".format(*classify_review(text, classifier, device), text))
    save_classifier(out, classifier)
    lap("use and saving")
    print(f"saved {out}; now try: python gpt_spam.py classify \"You won a prize!\"")
    if args.plot:
        plot_history(result, len(loaders[0]) * settings.batch_size, args.plot)
    if args.metrics:
        with atomic_write(args.metrics) as temporary:
            temporary.write_text(json.dumps({**result, "seconds": seconds, "settings": {
                **asdict(settings), "model": str(model_file), "data": str(data), "device": str(device)}}, indent=2) + "\n")


def cmd_evaluate(args):
    """Accuracy of a saved classifier on a split of the data, or on all of it."""
    classifier, device = load_classifier(args.classifier or args.weights_dir / "spam_classifier.pth"), pick_device(args.device)
    path = find_data(args.data, args.data_dir, args.data_url, args.verify)
    if args.split == "all":
        frame = read_messages(path)
        frame["Label"] = frame["Label"].map({name: i for i, name in enumerate(classifier.labels)})
    else:
        frame = dict(zip(("train", "validation", "test"), prepare_splits(path)))[args.split]
    predicted = predict(classifier, frame["Text"].tolist(), device).argmax(dim=-1).numpy()
    print(f"{args.split}: {(predicted == frame['Label'].to_numpy()).mean() * 100:.2f}% of {len(frame):,} messages right")


def cmd_classify(args):
    """A label and its probability for each text."""
    classifier, device = load_classifier(args.classifier or args.weights_dir / "spam_classifier.pth"), pick_device(args.device)
    for text in args.texts:
        print("{}\t{:.4f}\t{}".format(*classify_review(text, classifier, device), text))


def cmd_generate(args):
    """Continue a prompt with the pretrained model."""
    model, texts, _ = load_pretrained(find_model(args.model, args.weights_dir, args.weights_url, args.verify))
    tokenizer = build_tokenizer(texts["encoder.json"], texts["vocab.bpe"])
    print(generate_text(model.to(pick_device(args.device)), tokenizer, args.prompt, args.tokens))


def cmd_convert(args):
    """Download and convert a checkpoint, and no more."""
    path = find_model(args.model, args.weights_dir, args.weights_url, args.verify, args.keep_checkpoint)
    print(f"{path}: {path.stat().st_size:,} bytes")


def require(module, flag):
    """Raise ValueError if an optional package is missing."""
    try:
        __import__(module)
    except ImportError:
        raise ValueError(f"{flag} needs {module}: pip install {module}") from None


def add_settings(parser):
    """Give the parser one flag for each field of FinetuneConfig; only those given are in `args`."""
    group = parser.add_argument_group("finetuning settings (defaults: the chapter's, unless the model brings its own)")
    for f in fields(FinetuneConfig):
        kind = {"action": argparse.BooleanOptionalAction} if f.type in (bool, "bool") else {
            "type": type(f.default), "choices": f.metadata["choices"], "metavar": None if f.metadata["choices"] else "N"}
        group.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                           help=f"{f.metadata['help']} (default: {f.default})", **kind)


def chosen_settings(args):
    """The settings that the command line named."""
    return {f.name: getattr(args, f.name) for f in fields(FinetuneConfig) if hasattr(args, f.name)}


def build_parser():
    """The command line: five commands on top of the functions above."""
    parser = argparse.ArgumentParser(description="Finetune GPT-2 to spot spam SMS, as in chapter 6 of "
                                     "'Build a Large Language Model (From Scratch)'.",
                                     epilog="First: python gpt_spam.py train   Then: python gpt_spam.py classify 'You won!'")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run, name, help, model=False, data=False, classifier=False):
        sub = commands.add_parser(name, help=help, description=run.__doc__)
        sub.set_defaults(run=run)
        sub.add_argument("--weights-dir", type=Path, default=HERE / "weights", help="for models and classifiers (default: %(default)s)")
        sub.add_argument("--no-verify", dest="verify", action="store_false", help="take downloads whatever their SHA-256 is")
        if model:
            sub.add_argument("--model", default="124M", help=f"{', '.join(SIZES)}, a folder in OpenAI's layout, or an .npz (default: %(default)s)")
            sub.add_argument("--weights-url", metavar="URL", help="a mirror's address, before /gpt-2/models/...")
        if data:
            sub.add_argument("--data", default="sms", help="'sms' (UCI's collection) or a file in its format (default: %(default)s)")
            sub.add_argument("--data-url", metavar="URL", help="a mirror's address, before /static/public/228/...")
            sub.add_argument("--data-dir", type=Path, default=HERE / "data", help="for the messages (default: %(default)s)")
        if classifier:
            sub.add_argument("--classifier", type=Path, metavar="FILE", help="default: spam_classifier.pth in the weights folder")
        if name != "convert":
            sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps ... (default: the best there is)")
        return sub

    sub = command(cmd_train, "train", "finetune and save a classifier", model=True, data=True)
    sub.add_argument("--out", type=Path, metavar="FILE", help="the classifier (default: spam_classifier.pth in the weights folder)")
    sub.add_argument("--metrics", type=Path, metavar="FILE", help="write losses, accuracies, seconds and settings as JSON")
    sub.add_argument("--plot", type=Path, metavar="DIR", help="write loss-plot.png and accuracy-plot.png")
    sub.add_argument("--keep-checkpoint", action="store_true", help="keep the raw checkpoint after its conversion")
    add_settings(sub)
    sub = command(cmd_evaluate, "evaluate", "measure a classifier", data=True, classifier=True)
    sub.add_argument("--split", choices=("train", "validation", "test", "all"), default="test", help="default: %(default)s")
    sub = command(cmd_classify, "classify", "label texts", classifier=True)
    sub.add_argument("texts", nargs="+", metavar="TEXT")
    sub = command(cmd_generate, "generate", "continue a text with the pretrained model", model=True)
    sub.add_argument("prompt", nargs="?", default="Every effort moves you", help="default: %(default)s")
    sub.add_argument("--tokens", type=int, default=15, help="how many to add (default: %(default)s)")
    sub = command(cmd_convert, "convert", "download and convert a checkpoint", model=True)
    sub.add_argument("--keep-checkpoint", action="store_true", help="keep the raw checkpoint after its conversion")
    return parser


def main(argv=None):
    """Run a command; return its exit status: 0, or 2 after one line about what was wrong."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"gpt_spam: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
