# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "tiktoken==0.14.0", "numpy", "requests", "pandas", "tqdm", "matplotlib"]
# ///
"""Finetune GPT-2 to classify spam: chapter 6 of "Build a Large Language Model (From Scratch)" in one file.

    python gpt_spam.py train        then        python gpt_spam.py classify "You won a prize!"

Part 1 is the chapter (Sebastian Raschka, Manning 2024), 6.2 to 6.8. Part 2 is what it leaves open: speed, metrics,
several processes, files, command line. Shapes: batch, tokens, emb = heads * head size, vocab, classes.
"""

import argparse
import contextlib
import difflib
import gc
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from itertools import islice, product
from pathlib import Path

import numpy as np
import pandas as pd
import tiktoken
import torch
import torch.nn.functional as F
from tiktoken_ext.openai_public import r50k_pat_str  # GPT-2's pre-tokenization
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm


def setting(default, help, *choices):
    """A field of FinetuneConfig, also a command-line option."""
    return field(default=default, metadata=dict(help=help, choices=choices or None, metavar="|".join(choices) or "N"))


@dataclass(frozen=True)
class FinetuneConfig:
    """Hyperparameters of a finetuning run; the defaults are the chapter's."""

    epochs: int = setting(5, "passes over the training split")
    batch_size: int = setting(8, "messages per batch")
    lr: float = setting(5e-5, "AdamW's learning rate; tiny: 1e-3")
    weight_decay: float = setting(0.1, "AdamW's weight decay")
    eval_freq: int = setting(50, "batches between logged losses")
    eval_iter: int = setting(5, "batches averaged for a log line")
    seed: int = setting(123, "seed of new weights and batch order")
    schedule: str = setting("constant", "linear (tiny's): 10%% warm-up, then decay to 0", "constant", "linear")
    accumulation_steps: int = setting(1, "batches per update")
    trainable_layers: str = setting(
        "last_block", "to train; last_layer: head only", "last_layer", "last_block", "last_two_blocks", "all", "lora")
    lora_rank: int = setting(8, "rank of LoRA's matrices")
    lora_alpha: float = setting(8.0, "factor of LoRA's output")
    weights: str = setting("pretrained", "initial weights", "pretrained", "random")
    token_pos: str = setting("last", "position used; last_real: last before padding", "last", "first", "last_real")
    pooling: str = setting("none", "mean: average the logits of all positions", "none", "mean")
    causal_mask: bool = setting(True, "no attention to later tokens")
    padding: bool = setting(True, "pad messages to --context-length")
    context_length: str = setting("longest", "tokens: longest (in training), model (its limit) or N")
    balance: str = setting(
        "auto", "auto: undersample ham and spam, else weight the loss", "auto", "undersample", "weights", "none")
    dedupe: bool = setting(False, "drop duplicate texts")
    ignore_index: int = setting(-100, "label ignored by the loss")
    dtype: str = setting("float32", "frozen blocks' dtype", "float32", "bfloat16")
    cache: bool = setting(True, "compute frozen blocks once per message")

    def __post_init__(self):
        for name in ("batch_size", "accumulation_steps", "eval_freq", "eval_iter", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.padding and self.batch_size > 1 and (self.pooling == "mean" or not self.causal_mask):
            raise ValueError("--no-padding with --pooling mean or --no-causal-mask requires --batch-size 1")


# ======== Part 1: the chapter ========

# ---- 6.2 Data set: download, read, balance, split ----

DATA_URLS = (
    "https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
    "https://f001.backblazeb2.com/file/LLMs-from-scratch/sms%2Bspam%2Bcollection.zip",
)
DATA_SHA256 = "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d"


def download_and_unzip_spam_data(urls, zip_path, data_file_path, sha256=DATA_SHA256):
    """Fetch the SMS Spam Collection (UCI, id 228) unless it is there."""
    def unzip(path):
        with reading(path, "the archive of the SMS Spam Collection"), zipfile.ZipFile(path) as archive:
            content = archive.open("SMSSpamCollection").read(10_000_000)
        with atomic_write(data_file_path) as temporary:
            temporary.write_bytes(content)
            check_sha256(temporary, sha256)

    if not data_file_path.exists():
        download(urls, zip_path, check=unzip)
        zip_path.unlink()


def read_table(path):
    """Read UCI's form (ham or spam, a tab, the text), CSV, TSV or JSON lines."""
    with reading(path, "a table of texts"):
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            start = file.readline()
        if start.startswith("{"):
            return pd.read_json(path, lines=True, dtype=False, encoding="utf-8-sig", encoding_errors="replace")
        # Default quoting, as in the chapter, merges some of UCI's messages: 5,572 rows, not 5,574.
        names = ["label", "text"] if start.startswith(("ham\t", "spam\t")) else None
        df = pd.read_csv(path, sep="\t" if "\t" in start else ",", names=names, dtype=str, keep_default_na=False,
                         encoding_errors="replace")
        if not isinstance(df.index, pd.RangeIndex):
            raise ValueError("its rows have more fields than its header; quote the texts")
        return df


def read_messages(path, text_column=None, label_column=None):
    """Return a table's labelled texts as a frame of strings: Label, Text."""
    table = read_table(path)
    df = pd.DataFrame({"Label": pick_column(table, "label", label_column, path),
                       "Text": pick_column(table, "text", text_column, path)})
    if (df["Label"] == "").any():
        raise ValueError(f"message {(df['Label'] == '').argmax() + 1} of {path} has no label")
    return df


def pick_column(df, kind, name, path):
    """Return column `name` (default: `kind`; case is ignored) of a frame read from `path`, as strings."""
    name, columns = name or kind, {str(column).lower(): column for column in df.columns}
    if name.lower() not in columns:
        raise ValueError(f"no column {name!r} in {path} (columns: {str([*df.columns])[:200]}); set --{kind}-column")
    return df[columns[name.lower()]].fillna("").astype(str)


def create_balanced_dataset(df):
    """Return as many messages of each label as the rarest has: 747 ham and 747 spam of UCI's 4,825 and 747."""
    # Imbalance makes accuracy lie: on the whole collection, always answering ham is 86.6% accurate.
    counts = df["Label"].value_counts()
    rarest = max(counts[counts == counts.min()].index)
    others = [df[df["Label"] == label] for label in sorted(set(counts.index) - {rarest})]
    return pd.concat([*(o.sample(counts.min(), random_state=123) for o in others), df[df["Label"] == rarest]])


def random_split(df, train_frac, validation_frac):
    """Shuffle (seed 123) and cut into training, validation and test frames."""
    df = df.sample(frac=1, random_state=123).reset_index(drop=True)
    train_end = int(len(df) * train_frac)
    validation_end = train_end + int(len(df) * validation_frac)
    return df[:train_end], df[train_end:validation_end], df[validation_end:]


def prepare_splits(df, balance="auto", dedupe=False, test=None):
    """Return ([train, validation, test] frames, labels, class weights or None); `test`: a given test frame."""
    labels = sorted(df["Label"].unique())
    if len(labels) < 2 or len(df) < 20:
        raise ValueError(f"{len(df)} messages with labels {labels[:5]}; 20 with two labels are needed")
    if test is not None and (unknown := sorted(set(test["Label"]) - set(labels))):
        raise ValueError(f"test labels {unknown[:5]} are not among {labels}")
    if dedupe:
        df = df.drop_duplicates("Text")
        df = df if test is None else df[~df["Text"].isin(test["Text"])]
    if balance == "auto":
        balance = "undersample" if labels == ["ham", "spam"] else "weights"
    if balance == "undersample":
        df = create_balanced_dataset(df)
    train, *rest = random_split(df, *((0.7, 0.1) if test is None else (0.875, 0.125)))  # UCI's: 1,045 / 149 / 300
    class_weights = None
    if balance == "weights":
        counts = train["Label"].value_counts().reindex(labels, fill_value=1)
        class_weights = torch.tensor(len(train) / len(labels) / counts.to_numpy(np.float32))
    return [train, *rest] if test is None else [train, pd.concat(rest), test], labels, class_weights


# ---- 6.3 Data loaders: token ids, padding, batches ----

END_OF_TEXT = "<|endoftext|>"


def build_tokenizer(encoder_json, vocab_bpe):
    """Return a tiktoken.Encoding from the text of OpenAI's two tokenizer files; use its `encode_ordinary`."""
    # OpenAI writes each byte as one printable character: itself, or 256 and up.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    # In order of ids: bytes, merges, end of text.
    tokens = [*byte_of, *(line.replace(" ", "") for line in vocab_bpe.split("\n")[1:] if line)]
    if json.loads(encoder_json) != {token: i for i, token in enumerate([*tokens, END_OF_TEXT])}:
        raise ValueError("encoder.json and vocab.bpe do not belong together")
    ranks = {bytes(byte_of[character] for character in token): i for i, token in enumerate(tokens)}
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(tokens)})


class SpamDataset(Dataset):
    """A frame or CSV file (Text: string or ids; Label: 0, 1, ...) as tensors (ids (tokens,), position (), label ()).

    They are cut to `max_length` (default: the longest) and padded with `pad_token_id` (default: end of text, 50256).
    The logits are read at the position: by default the last, which attends to the whole message.
    """

    def __init__(self, data, tokenizer, max_length=None, pad_token_id=None, token_pos="last", padding=True):
        data = data if isinstance(data, pd.DataFrame) else pd.read_csv(data, keep_default_na=False)
        pad_token_id = tokenizer.eot_token if pad_token_id is None else pad_token_id
        texts = [tokenizer.encode_ordinary(text) if isinstance(text, str) else text for text in data["Text"]]
        encoded = [ids[:max_length] or [pad_token_id] for ids in texts]  # no empty message
        self.max_length = max_length or max(map(len, encoded))
        self.inputs, self.positions = [], []
        for ids in encoded:
            padded = ids + [pad_token_id] * (self.max_length - len(ids)) if padding else ids
            position = {"first": 0, "last": len(padded) - 1, "last_real": len(ids) - 1}[token_pos]
            self.inputs.append(torch.tensor(padded))  # (tokens,)
            self.positions.append(torch.tensor(position))
        self.labels = torch.tensor(data["Label"].to_numpy(dtype=np.int64))  # (messages,)

    def __getitem__(self, index):
        return self.inputs[index], self.positions[index], self.labels[index]

    def __len__(self):
        return len(self.labels)


def collate(items):
    """Stack items: ids (batch, tokens) or hidden states (batch, tokens, emb), positions, labels (batch,)."""
    inputs, positions, labels = zip(*items)
    # Causal attention never reads the zeros; without it, lengths must be equal.
    return nn.utils.rnn.pad_sequence(inputs, batch_first=True), torch.stack(positions), torch.stack(labels)


# ---- 6.4 Pretrained model: the GPT architecture ----

@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2, by default the 124M."""

    vocab_size: int = 50257  # the last id is <|endoftext|>
    context_length: int = 1024
    emb_dim: int = 768
    n_heads: int = 12
    n_layers: int = 12
    drop_rate: float = 0.0
    qkv_bias: bool = True
    causal: bool = True


class MultiHeadAttention(nn.Module):
    """Causal self-attention (chapter 3) by PyTorch, which needs no mask of `context_length`."""

    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False, causal=True):
        super().__init__()
        assert d_out % num_heads == 0, "d_out must be a multiple of num_heads"
        self.num_heads, self.dropout, self.causal = num_heads, dropout, causal
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)

    def forward(self, x):
        batch, tokens, _ = x.shape
        queries, keys, values = (
            projection(x).view(batch, tokens, self.num_heads, -1).transpose(1, 2)  # (batch, heads, tokens, head)
            for projection in (self.W_query, self.W_key, self.W_value))
        context = F.scaled_dot_product_attention(
            queries, keys, values, dropout_p=self.dropout * self.training, is_causal=self.causal)
        return self.out_proj(context.transpose(1, 2).reshape(batch, tokens, -1))  # (batch, tokens, emb)


class LayerNorm(nn.Module):
    """Layer normalisation over emb, with the chapter's parameter names."""

    def __init__(self, emb_dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x):
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, eps=1e-5)


class FeedForward(nn.Module):
    """Two linear layers, the same at each position."""

    def __init__(self, cfg):
        super().__init__()
        self.layers = nn.Sequential(  # GPT-2 was trained with the tanh approximation
            nn.Linear(cfg.emb_dim, 4 * cfg.emb_dim), nn.GELU("tanh"), nn.Linear(4 * cfg.emb_dim, cfg.emb_dim))

    def forward(self, x):
        return self.layers(x)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each with pre-norm and a shortcut."""

    def __init__(self, cfg):
        super().__init__()
        self.att = MultiHeadAttention(
            cfg.emb_dim, cfg.emb_dim, cfg.context_length, cfg.drop_rate, cfg.n_heads, cfg.qkv_bias, cfg.causal)
        self.ff = FeedForward(cfg)
        self.norm1 = LayerNorm(cfg.emb_dim)
        self.norm2 = LayerNorm(cfg.emb_dim)
        self.drop_shortcut = nn.Dropout(cfg.drop_rate)

    def forward(self, x):
        x = x + self.drop_shortcut(self.att(self.norm1(x)))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """GPT-2 (Radford et al. 2019): ids (batch, tokens) give logits (batch, tokens, vocab or classes)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.emb_dim)
        self.pos_emb = nn.Embedding(cfg.context_length, cfg.emb_dim)
        self.drop_emb = nn.Dropout(cfg.drop_rate)
        self.trf_blocks = nn.Sequential(*[TransformerBlock(cfg) for _ in range(cfg.n_layers)])
        self.final_norm = LayerNorm(cfg.emb_dim)
        self.out_head = nn.Linear(cfg.emb_dim, cfg.vocab_size, bias=False)

    def embed(self, in_idx):
        positions = torch.arange(in_idx.shape[1], device=in_idx.device)
        return self.drop_emb(self.tok_emb(in_idx) + self.pos_emb(positions))  # (batch, tokens, emb)

    def forward(self, in_idx):
        return self.out_head(self.final_norm(self.trf_blocks(self.embed(in_idx))))


# ---- 6.4 Pretrained model: OpenAI's weights, without TensorFlow ----

DATA_FILE = "model.ckpt.data-00000-of-00001"
TEXT_FILES = ("hparams.json", "encoder.json", "vocab.bpe")
OPENAI_NAMES = {  # c_attn is query, key and value side by side
    "tok_emb.weight": "wte", "pos_emb.weight": "wpe", "final_norm": "ln_f", "trf_blocks.": "h", ".norm1": "/ln_1",
    ".norm2": "/ln_2", ".att.W_query": "/attn/c_attn", ".att.W_key": "/attn/c_attn", ".att.W_value": "/attn/c_attn",
    ".att.out_proj": "/attn/c_proj", ".ff.layers.0": "/mlp/c_fc", ".ff.layers.2": "/mlp/c_proj",
    ".scale": "/g", ".shift": "/b", ".weight": "/w", ".bias": "/b",
}


def read_config(hparams_json):
    """Return the GPTConfig that OpenAI's hparams.json describes."""
    hparams = json.loads(hparams_json)
    return GPTConfig(hparams["n_vocab"], hparams["n_ctx"], hparams["n_embd"], hparams["n_head"], hparams["n_layer"])


def convert_checkpoint(folder, path):
    """Write OpenAI's checkpoint as one .npz: tensors by chapter name, and text files."""
    with reading(folder, "a checkpoint in OpenAI's layout"):
        texts = {name: (folder / name).read_text("utf-8") for name in TEXT_FILES}
        cfg, arrays, tensors = read_config(texts["hparams.json"]), {}, {}
        tokenizer = build_tokenizer(texts["encoder.json"], texts["vocab.bpe"])
        if tokenizer.n_vocab != cfg.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.n_vocab:,} tokens, the model {cfg.vocab_size:,}")
        with torch.device("meta"):  # names and shapes only
            state = GPTModel(cfg).state_dict()
        del state["out_head.weight"]  # the token embedding
        for our in state:
            name = our
            for part, theirs in OPENAI_NAMES.items():
                name = name.replace(part, theirs)
            tensors.setdefault(name, []).append(our)
        expected, size = 4 * sum(p.numel() for p in state.values()), (folder / DATA_FILE).stat().st_size
        if size != expected:
            raise ValueError(f"{DATA_FILE} has {size:,} bytes, the model of hparams.json {expected:,}")
        with open(folder / DATA_FILE, "rb") as file:  # TensorFlow's Saver writes tensors sorted by name, without gaps
            for name, ours in sorted(tensors.items()):
                array = np.fromfile(file, "<f4", sum(state[our].numel() for our in ours))
                if not np.isfinite(array).all():
                    raise ValueError(f"{name} contains NaN or infinity")
                if name.endswith("/w"):  # x @ w there, x @ weight.T here
                    array = array.reshape(state[ours[0]].shape[1], -1).T
                for our, part in zip(ours, np.split(array, len(ours))):
                    arrays[our] = np.ascontiguousarray(part).reshape(state[our].shape)
    texts["about.json"] = "{}"
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays, **{name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()})


def load_weights_into_gpt(gpt, params):
    """Put `params` {name: tensor} into the model; its head is the token embedding."""
    gpt.load_state_dict({**params, "out_head.weight": params["tok_emb.weight"]}, assign=True)


def load_pretrained(path):
    """Return (GPTModel in eval mode, {file name: text}) of an .npz."""
    with reading(path, "a model converted by gpt_spam.py"), np.load(path, allow_pickle=False) as npz:
        texts = {name: npz[name].tobytes().decode() for name in (*TEXT_FILES, "about.json")}
        params = {name: torch.from_numpy(npz[name]).float() for name in npz.files if name not in texts}
        with torch.device("meta"):  # no initial values
            model = GPTModel(read_config(texts["hparams.json"]))
        load_weights_into_gpt(model, params)
    return model.eval(), texts


def generate_text_simple(model, idx, max_new_tokens, context_size):
    """Append the most likely next token `max_new_tokens` times: (batch, tokens) ids in and out."""
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(idx[:, -context_size:])[:, -1]  # (batch, vocab)
        idx = torch.cat((idx, logits.argmax(dim=-1, keepdim=True)), dim=1)
    return idx


# ---- 6.5 Classification head: freeze GPT-2, train the end of it ----

def add_classification_head(model, num_classes, trainable_layers="last_block", lora_rank=8, lora_alpha=8, seed=123):
    """Freeze the model, replace its 50,257-way head by a `num_classes`-way one, and unfreeze `trainable_layers`."""
    # By default last block, final norm and head: 7,090,946 of the 124M's 124,441,346 parameters.
    model.requires_grad_(trainable_layers == "all")
    torch.manual_seed(seed)
    model.out_head = nn.Linear(model.cfg.emb_dim, num_classes)
    if trainable_layers == "lora":
        replace_linear_with_lora(model, lora_rank, lora_alpha)
    elif trainable_layers in ("last_block", "last_two_blocks"):
        model.trf_blocks[-1 if trainable_layers == "last_block" else -2:].requires_grad_(True)
        model.final_norm.requires_grad_(True)


class LoRALayer(nn.Module):
    """LoRA (appendix E; Hu et al. 2021) as a parametrization: a weight becomes weight + alpha * (A @ B).T."""

    def __init__(self, in_dim, out_dim, rank, alpha):
        super().__init__()
        self.A = nn.Parameter(torch.empty(in_dim, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(rank, out_dim))  # zero: the first logits are unchanged
        self.alpha = alpha

    def forward(self, weight):
        return weight + self.alpha * (self.A @ self.B).T


def replace_linear_with_lora(model, rank, alpha):
    """Add LoRA to every linear layer."""
    for linear in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        parametrize.register_parametrization(
            linear, "weight", LoRALayer(linear.in_features, linear.out_features, rank, alpha))


def merge_lora(model):
    """Merge LoRA into the linear layers' weights."""
    for module in [module for module in model.modules() if parametrize.is_parametrized(module, "weight")]:
        parametrize.remove_parametrizations(module, "weight")


# ---- 6.6 Loss and accuracy: accuracy is reported, cross-entropy is optimised ----

# A batch is (*inputs, labels); model(*inputs) gives logits (batch, classes).

def calc_loss_batch(input_batch, target_batch, model, device, loss_fn=F.cross_entropy):
    """Cross-entropy of a batch (inputs: a tensor or list); accuracy is not differentiable."""
    inputs = [input_batch] if torch.is_tensor(input_batch) else input_batch
    return loss_fn(model(*(tensor.to(device) for tensor in inputs)), target_batch.to(device))


@torch.no_grad()
def calc_loss_loader(data_loader, model, device, num_batches=None, loss_fn=F.cross_entropy):
    """Mean loss of `num_batches` batches, or all, in eval() mode."""
    model.eval()
    losses = [calc_loss_batch(input_batch, target_batch, model, device, loss_fn).item()
              for *input_batch, target_batch in islice(data_loader, num_batches)]
    return mean_over_processes(sum(losses), len(losses))


@torch.no_grad()
def calc_accuracy_loader(data_loader, model, device, num_batches=None):
    """Accuracy over `num_batches` batches, or all, in eval() mode."""
    model.eval()
    correct = examples = 0
    for *input_batch, target_batch in islice(data_loader, num_batches):
        predicted = model(*(tensor.to(device) for tensor in input_batch)).argmax(dim=-1)
        correct += (predicted == target_batch.to(device)).sum().item()
        examples += len(target_batch)
    return mean_over_processes(correct, examples)


# ---- 6.7 Finetuning ----

def evaluate_model(model, train_loader, val_loader, device, eval_iter, loss_fn=F.cross_entropy):
    """Return training and validation loss, and go back to train() mode."""
    losses = [calc_loss_loader(loader, model, device, eval_iter, loss_fn) for loader in (train_loader, val_loader)]
    model.train()
    return losses


def train_classifier_simple(model, train_loader, val_loader, optimizer, device, num_epochs, eval_freq, eval_iter,
                            loss_fn=F.cross_entropy, scheduler=None, accumulation_steps=1):
    """Train, print the chapter's log and return it: train_losses, val_losses, train_accs, val_accs, examples_seen."""
    train_losses, val_losses, train_accs, val_accs = [], [], [], []
    examples_seen, global_step = 0, -1
    for epoch in range(num_epochs):
        model.train()
        for batch_number, (*input_batch, target_batch) in enumerate(train_loader, 1):
            loss = calc_loss_batch(input_batch, target_batch, model, device, loss_fn)
            global_step += 1
            if not torch.isfinite(loss):
                raise ValueError(f"the loss is {loss.item()} at step {global_step}; try a smaller --lr")
            (loss / accumulation_steps).backward()
            if batch_number % accumulation_steps == 0 or batch_number == len(train_loader):
                optimizer.step()
                optimizer.zero_grad()
                if scheduler:
                    scheduler.step()
            examples_seen += len(target_batch)
            if global_step % eval_freq == 0:
                train_loss, val_loss = evaluate_model(model, train_loader, val_loader, device, eval_iter, loss_fn)
                train_losses.append(train_loss)
                val_losses.append(val_loss)
                print(f"Ep {epoch + 1} (Step {global_step:06d}): Train loss {train_loss:.3f}, Val loss {val_loss:.3f}")
        train_accs.append(calc_accuracy_loader(train_loader, model, device, eval_iter))
        val_accs.append(calc_accuracy_loader(val_loader, model, device, eval_iter))
        print(f"Training accuracy: {train_accs[-1]:.2%} | Validation accuracy: {val_accs[-1]:.2%}")
    return train_losses, val_losses, train_accs, val_accs, examples_seen


def plot_values(epochs_seen, examples_seen, train_values, val_values, label="loss"):
    """Return a figure of values over epochs and, above, examples seen."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(5, 3), dpi=150)
    ax1 = fig.add_subplot()
    ax1.plot(epochs_seen, train_values, label=f"Training {label}")
    ax1.plot(epochs_seen, val_values, linestyle="-.", label=f"Validation {label}")
    ax1.set(xlabel="Epochs", ylabel=label.capitalize())
    ax1.legend()
    ax2 = ax1.twiny()
    ax2.plot(examples_seen, train_values, alpha=0)  # aligns the ticks
    ax2.set_xlabel("Examples seen")
    fig.tight_layout()
    return fig


# ---- 6.8 Use: classify, save, load ----

@torch.no_grad()
def predict(texts, model, tokenizer, device, pooling="none", **preparation):
    """Return probabilities (messages, classes); `preparation`: SpamDataset's options, as in training."""
    dataset = SpamDataset(pd.DataFrame({"Text": texts, "Label": 0}), tokenizer, **preparation)
    label_logits = LabelLogits(model.to(device).eval(), pooling)
    logits = torch.empty(len(texts), model.out_head.out_features)
    for rows in length_batches(list(map(len, dataset.inputs)), device, pooling == "none" and model.cfg.causal):
        ids, positions, _ = collate([dataset[row] for row in rows])
        logits[rows] = label_logits(ids.to(device), positions.to(device)).cpu()
    return logits.softmax(dim=-1)


def classify_review(text, model, tokenizer, device, max_length=None, labels=("ham", "spam"), **options):
    """Return (label, probability) of one message; `options`: `predict`'s."""
    probabilities = predict([text], model, tokenizer, device, max_length=max_length, **options)[0]
    best = int(probabilities.argmax())
    return labels[best], float(probabilities[best])


def review_by_token(text, model, tokenizer, device, max_length=None, labels=("ham", "spam"), **options):
    """Yield a line per token: the second of two labels, or the likeliest, and its probability up to this token."""
    ids = tokenizer.encode_ordinary(text)[:max_length] or [tokenizer.eot_token]
    prefixes = [ids[:end] for end in range(1, len(ids) + 1)]
    probabilities = predict(prefixes, model, tokenizer, device, max_length=max_length, **options)
    for token, row in zip(map(tokenizer.decode_single_token_bytes, ids), probabilities):
        shown = repr(token.decode("utf-8", "backslashreplace"))[1:-1].replace("\\\\", "\\")  # may split a character
        label = 1 if len(labels) == 2 else int(row.argmax())
        yield f"{shown:<15} {labels[label]} {row[label]:.4f} {'█' * round(20 * row[label].item())}".rstrip()


def save_classifier(path, model, **parts):
    """Write one self-describing file; `parts`: tokenizer_files, labels, options (`predict`'s), about."""
    content = {"config": asdict(model.cfg), "model": {name: p.cpu() for name, p in model.state_dict().items()}, **parts}
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def load_classifier(path, pretrained=None):
    """Return (model, tokenizer, labels, options, about); a state_dict of the chapter needs `pretrained`, an .npz."""
    with reading(path, "a classifier; make one with `python gpt_spam.py train`"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        if "tok_emb.weight" in content:
            if not pretrained:
                raise ValueError("a plain state_dict contains no tokenizer; set --model")
            base, texts = load_pretrained(pretrained)
            content = {"config": asdict(base.cfg), "tokenizer_files": texts, "labels": ["ham", "spam"], "about": {},
                       "model": {name: p for name, p in content.items() if not name.endswith("att.mask")},
                       "options": {"max_length": 120}}
        model = GPTModel(GPTConfig(**content["config"]))
        model.out_head = nn.Linear(model.cfg.emb_dim, len(content["labels"]))
        model.load_state_dict(content["model"], assign=True)
        files = content["tokenizer_files"]
        tokenizer = build_tokenizer(files["encoder.json"], files["vocab.bpe"])
        return model.eval(), tokenizer, content["labels"], content["options"], content["about"]


# ======== Part 2: what it leaves open ========

# ---- Speed: frozen blocks once per message, the last block at one position ----

def last_block_at(block, x, positions):
    """Return `block(x)` at positions (batch,): x (batch, tokens, emb) gives (batch, emb)."""
    # As q.(W_k x) = (W_k^T q).x, keys and values are not computed: 3.4 million products, not 142 (124M, 120 tokens).
    att, (batch, tokens, emb) = block.att, x.shape
    shortcut, x = read_at(x, positions), block.norm1(x)
    key, value = (layer.weight.view(att.num_heads, -1, emb) for layer in (att.W_key, att.W_value))
    query = att.W_query(read_at(x, positions)).view(batch, att.num_heads, -1)  # (batch, heads, head)
    projected_query = torch.einsum("bhd,hde->bhe", query, key)  # (batch, heads, emb)
    # The key's bias shifts all scores of a query alike, which softmax ignores.
    scores = torch.einsum("bhe,bte->bht", projected_query, x) / math.sqrt(query.shape[-1])
    if att.causal:
        later = torch.arange(tokens, device=x.device) > positions[:, None]  # (batch, tokens)
        scores = scores.masked_fill(later[:, None], -torch.inf)
    weighted_x = torch.einsum("bht,bte->bhe", scores.softmax(dim=-1), x)  # (batch, heads, emb)
    context = torch.einsum("bhe,hde->bhd", weighted_x, value).reshape(batch, emb)
    x = shortcut + att.out_proj(context if att.W_value.bias is None else context + att.W_value.bias)
    return x + block.ff(block.norm2(x))


def read_at(x, positions):
    """Return x (batch, tokens, width) at positions (batch,): (batch, width)."""
    return x[torch.arange(len(x), device=x.device), positions]


class LabelLogits(nn.Module):
    """A GPT's logits at positions (batch,), or their mean over all (`pooling` "mean"): (batch, classes).

    Inputs are ids (batch, tokens), or hidden states (batch, tokens, emb) after `num_frozen` blocks. `fast=False`
    computes all positions to the end, as the chapter does.
    """

    def __init__(self, model, pooling="none", num_frozen=0, fast=True):
        super().__init__()
        self.model, self.pooling, self.num_frozen, self.fast = model, pooling, num_frozen, fast

    def forward(self, inputs, positions):
        cached = inputs.is_floating_point()
        x = inputs if cached else self.model.embed(inputs)
        blocks = list(self.model.trf_blocks[self.num_frozen if cached else 0:])
        last = blocks.pop() if blocks and self.fast and self.pooling == "none" else None
        for block in blocks:
            x = block(x.to(block.norm1.scale.dtype))  # some may be bfloat16
        if last:
            x = last_block_at(last, x.to(last.norm1.scale.dtype), positions)
        logits = self.model.out_head(self.model.final_norm(x.float()))
        if self.pooling == "mean":
            return logits.mean(dim=1)
        return logits if last else read_at(logits, positions)


def length_batches(lengths, device, padding=True):
    """Return batches of row numbers, of similar length or, without padding, equal length."""
    batches, max_tokens = [], 2048 if device.type == "cpu" else 16384  # small: fits a CPU's cache
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        full = not batches or (len(batches[-1]) + 1) * lengths[row] > max_tokens
        if full or not padding and lengths[row] > lengths[batches[-1][-1]]:
            batches.append([])
        batches[-1].append(row)
    return batches


@torch.no_grad()
def cache_hidden_states(model, datasets, num_frozen, device):
    """Return `datasets` as lists of (hidden states (tokens, emb), position, label)."""
    items, frozen = [item for dataset in datasets for item in dataset], model.eval().trf_blocks[:num_frozen]
    lengths = [len(ids) for ids, *_ in items]
    size = sum(lengths) * model.cfg.emb_dim * frozen[0].norm1.scale.itemsize
    if hasattr(os, "sysconf") and size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2:
        print(f"Not cached: {size / 1e6:,.0f} MB, over half of the memory")
        return datasets
    batches = length_batches(lengths, device, model.cfg.causal)
    for done, rows in enumerate(tqdm(batches, "caching", leave=False, disable=RANK > 0 or None)):
        if done % (len(batches) // 4 + 1) == 0:
            tqdm.write(f"Frozen blocks' output: {done / len(batches):.0%} of {size / 1e6:,.0f} MB")
        ids, *_ = collate([items[row] for row in rows])
        hidden = frozen(model.embed(ids.to(device)).to(frozen[0].norm1.scale.dtype)).cpu()
        for row, states in zip(rows, hidden):
            items[row] = (states[:lengths[row]].clone(), *items[row][1:])
    items = iter(items)
    return [list(islice(items, len(dataset))) for dataset in datasets]


# ---- Metrics: what accuracy hides when classes are unequal ----

def calc_metrics(labels, predicted, names):
    """Return accuracy, precision, recall, F1 and support by class, and the confusion matrix."""
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (labels, predicted), 1)
    confusion, right = pd.DataFrame(counts, names, names), pd.Series(counts.diagonal(), names)
    support, guesses = confusion.sum(axis=1), confusion.sum()
    table = pd.DataFrame({"precision": right / guesses, "recall": right / support,
                          "f1": 2 * right / (guesses + support), "support": support})
    return right.sum() / len(labels), table.fillna(0), confusion


# ---- Several processes: torchrun and DistributedDataParallel ----

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def mean_over_processes(total, count):
    """Total / count, each summed over all processes."""
    sums = torch.tensor([total, count], dtype=torch.float64)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return float(sums[0] / sums[1])


# ---- Files: download, atomic write, reading ----

def download(urls, path, check):
    """Fetch `path` from the first of `urls` that `check(file)` accepts; resumes a partial download."""
    import requests  # 0.1 s, for downloads only
    if path.exists():  # fetched by hand
        return check(path)
    part, failures, answered = path.with_name(path.name + ".part"), {}, False
    path.parent.mkdir(parents=True, exist_ok=True)
    for url, pause in product(urls, (0, 1, 3)):
        time.sleep(pause * answered)
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={part.stat().st_size if part.exists() else 0}-"}
        try:
            with requests.get(url, headers=headers, stream=True, timeout=(5, 30)) as response:
                answered = True
                if response.status_code == 416:  # part has all bytes
                    part.unlink(missing_ok=True)
                response.raise_for_status()
                with part.open("ab" if response.status_code == 206 else "wb") as file:
                    for chunk in tqdm(response.iter_content(1 << 20), path.name, unit="MB", leave=False, disable=None):
                        file.write(chunk)
            check(part)
            return os.replace(part, path)
        except requests.RequestException as error:
            failures[url] = getattr(error.response, "status_code", type(error).__name__)
        except ValueError as error:
            part.unlink()
            failures[url] = str(error)
    error = OSError if answered else ConnectionError
    raise error(f"cannot download {path.name}: {failures}; save it as {path} by hand")


def check_sha256(path, expected):
    """Raise ValueError unless the file has this SHA-256 (None: any)."""
    if expected and (found := hashlib.sha256(path.read_bytes()).hexdigest()) != expected:
        raise ValueError(f"SHA-256 of {path} is {found[:9]}, not {expected[:9]}; --no-verify accepts it")


@contextlib.contextmanager
def atomic_write(path):
    """Give a temporary name that becomes `path` if the block succeeds."""
    path = Path(path).resolve()
    if RANK or path.exists() and not path.is_file():  # one process writes
        yield Path(os.devnull) if RANK else path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def reading(path, what):
    """Turn any error inside into a one-line ValueError about the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} is not {what} ({(str(error) or repr(error)).splitlines()[0][:200]})") from None


# ---- Command line: models and messages, downloaded once or bundled ----

HERE = Path(__file__).resolve().parent
TINY, SAMPLE = HERE / "weights" / "tiny.npz", HERE / "data" / "sample_sms.tsv"
MODEL_URLS = (
    "https://openaipublic.blob.core.windows.net/gpt-2/models",
    "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2",
)
MODEL_SHA256 = {  # larger data files have no published hash
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    f"124M/{DATA_FILE}": "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118",
}


def find_model(args):
    """Return the .npz of --model; a size is downloaded and converted once."""
    name = args.model or "auto"
    if name == "tiny" or name.endswith(".npz"):
        return TINY if name == "tiny" else Path(name)
    size = "124M" if name == "auto" else name
    path, folder = args.weights_dir / f"gpt2-{size}.npz", args.weights_dir / f"{size}.download"
    if size not in ("124M", "355M", "774M", "1558M"):
        path = args.weights_dir / f"folder-{Path(name).name}.npz"
        convert_checkpoint(Path(name), path)
    elif not path.exists():
        bases = [f"{args.mirror}/gpt-2/models"] if args.mirror else MODEL_URLS
        try:
            for file in (*TEXT_FILES, DATA_FILE):
                sha256 = MODEL_SHA256.get(file, MODEL_SHA256.get(f"{size}/{file}")) if args.verify else None
                download([f"{base}/{size}/{file}" for base in bases], folder / file,
                         partial(check_sha256, expected=sha256))
        except ConnectionError:
            if name != "auto" or any(folder.iterdir()):
                raise
            return TINY
        try:
            convert_checkpoint(folder, path)
        finally:
            shutil.rmtree(folder)
    return path


def find_data(args):
    """Return the file of --data; UCI's collection is downloaded once."""
    if args.data not in (None, "auto", "sms"):
        return SAMPLE if args.data == "sample" else Path(args.data)
    path, archive = args.data_dir / "SMSSpamCollection.tsv", args.data_dir / "sms+spam+collection.zip"
    urls = [f"{args.mirror}/static/public/228/{archive.name}"] if args.mirror else DATA_URLS
    try:
        download_and_unzip_spam_data(urls, archive, path, DATA_SHA256 if args.verify else None)
    except ConnectionError:
        if args.data == "sms" or any(args.data_dir.glob("*.part")):
            raise
        return SAMPLE
    return path


def pick_device(name):
    """Return the device; "auto": cuda or mps, else cpu."""
    best = torch.accelerator.current_accelerator(True) or torch.device("cpu")
    if name.split(":")[0] not in ("auto", "cpu", best.type):
        raise ValueError(f"no device {name!r} here; use cpu or auto")
    return best if name == "auto" else torch.device(name)


# ---- Command line: the whole chapter, and the book's experiments ----

SPAM_MESSAGE = "You are a winner you have been specially selected to receive $1000 cash or a $2000 award."
HAM_MESSAGE = "Hey, just wanted to check if we're still on for dinner tonight? Let me know!"
# The book's table, row by row: published test accuracy, options.
EXPERIMENTS = """95.00
75.00 --token-pos first
72.00 --trainable-layers last_layer
98.33 --trainable-layers last_two_blocks
96.67 --trainable-layers all
84.67 --model 355M
96.67 --model 774M
98.33 --model 1558M
98.67 --model 1558M --trainable-layers all
93.67 --weights random --trainable-layers all
96.67 --trainable-layers lora --lora-rank 16 --lora-alpha 16
98.33 --model 1558M --trainable-layers lora --lora-rank 16 --lora-alpha 8
78.33 --context-length model
98.00 --no-padding --batch-size 1
98.33 --no-padding --batch-size 1 --accumulation-steps 8
98.33 --token-pos last_real
95.33 --no-causal-mask
95.00 --ignore-index 50256
96.33 --pooling mean""".splitlines()


def cmd_train(args, in_experiments=False):
    """Finetune GPT-2 on labelled messages and save the classifier."""
    device, out = args.device, getattr(args, "out", None) or args.weights_dir / "spam_classifier.pth"
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise OSError(f"cannot write {out}")
    for turn in range(WORLD_SIZE):  # the first downloads
        if turn == RANK:
            model_file, data_file = find_model(args), find_data(args)
        if WORLD_SIZE > 1:
            torch.distributed.barrier()
    model, texts = load_pretrained(model_file)
    own, chapter = json.loads(texts["about.json"]).get("finetune", {}), asdict(FinetuneConfig())  # tiny's own
    settings = FinetuneConfig(**own | {name: value for name, value in vars(args).items() if name in chapter})
    changed = [f"{name} {value}" for name, value in asdict(settings).items() if value != chapter[name]]
    bundled = " (bundled model, not GPT-2)" * (model_file.resolve() == TINY)
    bundled += " (trained on invented SMS)" * (data_file.resolve() == SAMPLE)
    print(f"Model {os.path.relpath(model_file)}, data {os.path.relpath(data_file)}, device {device}{bundled}")
    print("Changed from the chapter:", ", ".join(changed) or "nothing")

    # 6.2 data set
    columns = {"text_column": args.text_column, "label_column": args.label_column}
    df, test = (path and read_messages(path, **columns) for path in (data_file, args.test_data))
    if in_experiments and set(df["Label"]) == {"ham", "spam"}:  # the book's script shuffles once more
        df = create_balanced_dataset(df).sample(frac=1, random_state=123).reset_index(drop=True)
        settings = replace(settings, balance="none")
    frames, labels, class_weights = prepare_splits(df, settings.balance, settings.dedupe, test)
    if len(frames[0]) < settings.batch_size:
        raise ValueError(f"--batch-size {settings.batch_size} is more than {len(frames[0])} training messages")
    for name, frame in zip(() if in_experiments else ("train", "validation", "test"), frames):
        path = args.data_dir / f"{name}.csv"
        if path.resolve() in (data_file.resolve(), Path(args.test_data or "").resolve()):
            raise ValueError(f"a split would overwrite {path}; set --data-dir")
        with atomic_write(path) as temporary:
            frame.to_csv(temporary, index=False)
    print("Training / validation / test: {:,} / {:,} / {:,} messages,".format(*map(len, frames)), "labels", *labels)

    # 6.3 data loaders
    tokenizer, limit = build_tokenizer(texts["encoder.json"], texts["vocab.bpe"]), model.cfg.context_length
    length = settings.context_length  # unpadded and "longest": uncut, as the book's script
    length = {"longest": None if settings.padding else limit, "model": limit}.get(length, length)
    # Padding is left out where it cannot affect the logits.
    unaffected = settings.causal_mask and settings.pooling == "none" and settings.token_pos != "last"
    options, datasets = {"max_length": length and int(length), "token_pos": settings.token_pos,
                         "padding": settings.padding and not unaffected}, []
    for frame in frames:
        datasets.append(SpamDataset(frame.assign(Label=frame["Label"].map(labels.index)), tokenizer, **options))
        options["max_length"] = datasets[0].max_length
    if not 0 < int(length or options["max_length"]) <= limit:
        raise ValueError(f"{length or options['max_length']} tokens, the model has 1 to {limit}; set --context-length")
    datasets = [list(dataset)[RANK::WORLD_SIZE] for dataset in datasets]  # each process its rows,
    datasets[0] = datasets[0][:len(frames[0]) // WORLD_SIZE]  # equally many for training

    # 6.4 pretrained model
    model.cfg = replace(model.cfg, causal=settings.causal_mask)
    for block in model.trf_blocks:
        block.att.causal = settings.causal_mask
    if settings.weights == "random":
        torch.manual_seed(settings.seed)
        model = GPTModel(model.cfg)
    model.to(device).eval()
    spam_prompt = f"Is the following text 'spam'? Answer with 'yes' or 'no': '{SPAM_MESSAGE}'"
    for prompt in ("Every effort moves you", spam_prompt):
        idx = torch.tensor([tokenizer.encode_ordinary(prompt)], device=device)
        text = tokenizer.decode(generate_text_simple(model, idx, 15, limit)[0].tolist())
        print(f"Continuation of {prompt!r}: {text[len(prompt):]!r}")

    # 6.5 classification head
    add_classification_head(
        model, len(labels), settings.trainable_layers, settings.lora_rank, settings.lora_alpha, settings.seed)
    trained = [p for p in model.to(device).parameters() if p.requires_grad]
    print(f"Training {sum(p.numel() for p in trained):,} of {sum(p.numel() for p in model.parameters()):,} parameters")
    num_frozen = sum(not any(p.requires_grad for p in block.parameters()) for block in model.trf_blocks)
    if settings.dtype == "bfloat16":
        model.trf_blocks[:num_frozen].to(torch.bfloat16)
    if settings.cache and num_frozen:
        datasets = cache_hidden_states(model, datasets, num_frozen, device)
    label_logits = LabelLogits(model, settings.pooling, num_frozen, settings.cache)
    if WORLD_SIZE > 1:
        label_logits = nn.parallel.DistributedDataParallel(label_logits, find_unused_parameters=True)
    loaders = [DataLoader(dataset, max(1, settings.batch_size // WORLD_SIZE), shuffle=i == 0, drop_last=i == 0,
                          collate_fn=collate) for i, dataset in enumerate(datasets)]

    # 6.6 loss and accuracy
    weight = None if class_weights is None else class_weights.to(device)
    loss_fn = partial(F.cross_entropy, weight=weight, ignore_index=settings.ignore_index)
    torch.manual_seed(settings.seed)
    accuracies = [calc_accuracy_loader(loader, label_logits, device, 10) for loader in loaders]
    losses = [calc_loss_loader(loader, label_logits, device, 5, loss_fn) for loader in loaders]
    print("Before training: accuracy {:.2%} / {:.2%} / {:.2%} (10 batches),".format(*accuracies),
          "loss {:.3f} / {:.3f} / {:.3f} (5 batches)".format(*losses))

    # 6.7 finetuning
    torch.manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    steps = max(1, settings.epochs) * math.ceil(len(loaders[0]) / settings.accumulation_steps)
    scheduler = settings.schedule == "linear" and torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps)))
    start = time.perf_counter()
    log = train_classifier_simple(
        label_logits, *loaders[:2], optimizer, device, settings.epochs, settings.eval_freq, settings.eval_iter,
        loss_fn, scheduler, settings.accumulation_steps)
    minutes = (time.perf_counter() - start) / 60
    print(f"Training completed in {minutes:.2f} minutes.")
    final = [calc_accuracy_loader(loader, label_logits, device) for loader in loaders]  # the test split last
    print("Final: accuracy {:.2%} / {:.2%} / {:.2%} (all batches)".format(*final) + bundled)
    merge_lora(model)
    names = ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "examples_seen", "final_accuracy", "minutes")
    results = dict(zip(names, (*log, final, minutes)))
    if in_experiments or RANK:
        return results

    # 6.8 use
    about = {"model": str(model_file), "data": os.path.abspath(data_file), "test_data": args.test_data, **columns,
             **asdict(settings), "note": bundled}
    options["pooling"] = settings.pooling
    save_classifier(out, model.eval(), tokenizer_files=texts, labels=labels, options=options, about=about)
    chapters = [("spam", SPAM_MESSAGE), ("ham", HAM_MESSAGE)]
    for true_label, text in chapters if labels == ["ham", "spam"] else frames[2][:2].to_numpy():
        label, probability = classify_review(text, model, tokenizer, device, labels=labels, **options)
        print(f"{label}  {probability:.4f}  {text}  (true label: {true_label})")
    print(f"Saved; try: python gpt_spam.py classify --classifier {os.path.relpath(out)} TEXT")
    if args.metrics:
        with atomic_write(args.metrics) as temporary:
            temporary.write_text(json.dumps({**results, **about}, indent=2) + "\n")
    for name in ("loss", "accuracy") if args.plot else ():
        train_values, val_values = results[f"train_{name}"], results[f"val_{name}"]
        epochs_seen = np.linspace(name == "accuracy", settings.epochs, len(train_values))
        examples_seen = epochs_seen * results["examples_seen"] / settings.epochs
        with atomic_write(args.plot / f"{name}-plot.png") as temporary:
            plot_values(epochs_seen, examples_seen, train_values, val_values, name).savefig(temporary, format="png")


def cmd_experiments(args):
    """Run the book's experiments; print the published accuracy beside ours."""
    print("| Row | Options | Training | Validation | Test | Published test |", "|---" * 6 + "|", sep="\n")
    for row in args.rows or range(1, 20):
        published, *options = EXPERIMENTS[row - 1].split()
        row_args = build_parser().parse_args([*args.argv, *options])
        row_args.device = args.device
        if args.rows or row_args.model == args.model:  # others if named
            with contextlib.redirect_stdout(sys.stderr):
                results = cmd_train(row_args, in_experiments=True)
            accuracies = " | ".join(f"{accuracy:.2%}" for accuracy in results["final_accuracy"])
            print(f"| {row} | {' '.join(options)} | {accuracies} | {published}% |")


def cmd_evaluate(args):
    """Measure a classifier on its own test split, or on all of --data."""
    model, tokenizer, labels, options, about = load_classifier(
        args.classifier or args.weights_dir / "spam_classifier.pth", args.model and find_model(args))
    whole = args.test_data or args.data or about.get("test_data")
    args.data = whole or about.get("data")
    path = find_data(args)
    df = read_messages(path, *(getattr(args, name) or about.get(name) for name in ("text_column", "label_column")))
    if not whole:
        df = prepare_splits(df, about.get("balance", "auto"), about.get("dedupe"))[0][2]
    if unknown := sorted(set(df["Label"]) - set(labels)):
        raise ValueError(f"labels {unknown[:5]} of {path} are not among {labels}")
    probabilities = predict(df["Text"].tolist(), model, tokenizer, args.device, **options)
    accuracy, table, confusion = calc_metrics(df["Label"].map(labels.index), probabilities.argmax(dim=1), labels)
    part = "all" if whole else "test split"
    print(f"{os.path.relpath(path)}, {part}: {len(df):,} messages, accuracy {accuracy:.2%}{about.get('note', '')}\n")
    print(f"{table.round(4)}\n\nConfusion matrix (row: true, column: predicted)\n{confusion}")


def read_texts(path, text_column=None, rows=4096):
    """Yield lists of texts: a column of a .csv, .tsv or .jsonl, else lines of a file or standard input ("-")."""
    if path.lower().endswith((".csv", ".tsv", ".jsonl")):
        texts = iter(pick_column(read_table(path), "text", text_column, path))
    else:
        lines = open(0 if path == "-" else path, encoding="utf-8-sig", errors="replace")
        texts = (line.rstrip("\n") for line in lines if line.strip())
    while chunk := list(islice(texts, rows)):
        yield chunk


def cmd_classify(args):
    """Print label and probability of each TEXT or non-empty input line."""
    if bool(args.texts) == bool(args.input):
        raise ValueError("give either texts or --input FILE (- for standard input)")
    model, tokenizer, labels, options, about = load_classifier(
        args.classifier or args.weights_dir / "spam_classifier.pth", args.model and find_model(args))
    if args.threshold is not None and (len(labels) != 2 or not 0 <= args.threshold <= 1):
        raise ValueError(f"--threshold needs 0 to 1 and two labels, got {args.threshold} and {len(labels)}")
    for text in filter(os.path.isfile, args.texts):
        print(f"note: {text!r} is taken as a text; --input reads a file", file=sys.stderr)
    for texts in [args.texts] if args.texts else read_texts(args.input, args.text_column or about.get("text_column")):
        probabilities = predict(texts, model, tokenizer, args.device, **options)
        best = probabilities.argmax(dim=1) if args.threshold is None else (probabilities[:, 1] >= args.threshold).long()
        for text, i, row in zip(texts, best.tolist(), probabilities.tolist()):
            if args.format == "jsonl":
                print(json.dumps({"label": labels[i], "text": text, "probability": row[i]}, ensure_ascii=False))
                continue
            if args.format == "by-token":
                print(*review_by_token(text, model, tokenizer, args.device, labels=labels, **options), sep="\n")
            print(labels[i], f"{row[i]:.4f}", " ".join(text.split()), sep="\t")


def build_parser():
    """Return the parser."""
    files, data, settings, classifier = (argparse.ArgumentParser(add_help=False) for _ in range(4))
    add = files.add_argument
    add("--model", help="auto (124M; offline: tiny), 124M, 355M, 774M, 1558M, tiny, .npz or checkpoint folder")
    add("--device", default="auto", help="cpu, cuda, mps or auto")
    add("--weights-dir", type=Path, default=HERE / "weights", help="models, classifier; default: weights")
    add("--data-dir", type=Path, default=HERE / "data", help="SMS data, splits; default: data")
    add("--mirror", metavar="URL", help="server with OpenAI's and UCI's paths")
    add("--no-verify", dest="verify", action="store_false", help="skip SHA-256")
    add("--text-column", metavar="NAME", help="default: text")
    add = data.add_argument
    add("--data", help="auto (sms; offline: sample), sms, sample, a CSV, TSV or JSON lines file")
    add("--test-data", type=os.path.abspath, metavar="FILE", help="test set; default: 20%% of --data")
    add("--label-column", metavar="NAME", help="default: label")
    classifier.add_argument("--classifier", type=Path, help="default: where train saves it")
    for f in fields(FinetuneConfig):
        kind = {**f.metadata, "type": type(f.default)}
        if isinstance(f.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        kind["help"] = f"{f.metadata['help']} (default: {f.default})"
        settings.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **kind)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(run, *parents):
        name, text = run.__name__[4:], run.__doc__
        sub = commands.add_parser(
            name, usage=f"gpt_spam.py {name} [options]", help=text, description=text, parents=parents)
        sub.set_defaults(run=run, parser=sub)
        return sub.add_argument

    add = command(cmd_train, settings, data, files)
    add("--out", type=Path, help="default: WEIGHTS_DIR/spam_classifier.pth")
    add("--metrics", type=Path, help="results as JSON")
    add("--plot", type=Path, metavar="FOLDER", help="loss, accuracy PNGs")
    add = command(cmd_classify, classifier, files)
    add("texts", nargs="*", metavar="TEXT")
    add("--input", help=".csv, .tsv, .jsonl or lines; -: lines of stdin")
    add("--format", choices=("text", "jsonl"), default="text", help="default: text (tab-separated)")
    add("--by-token", dest="format", action="store_const", const="by-token", help="also after each token")
    add("--threshold", type=float, metavar="P", help="second label if its probability is at least P")
    command(cmd_evaluate, classifier, data, files)
    command(cmd_experiments, settings, data, files)(
        "--rows", nargs="+", type=int, choices=range(1, 20), metavar="N", help="default: all that keep --model")
    return parser


def main(argv=None):
    """Run a command; return 0, or 2 after one line about what was wrong."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if not hasattr(args, "run"):
        parser.parse_args(argv)  # says what is unknown
        parser.print_help()
        return 0
    if WORLD_SIZE > 1:
        torch.distributed.init_process_group(timeout=timedelta(days=1))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if RANK:
            sys.stdout = open(os.devnull, "w")
    try:
        if unknown:
            nearest = difflib.get_close_matches(unknown[0], re.findall(r"--[\w-]+", args.parser.format_help()), 1)
            raise ValueError(f"unexpected {unknown[0]}; {f'did you mean {nearest[0]}?' if nearest else 'see --help'}")
        args.device, args.argv = pick_device(args.device), argv or sys.argv[1:]
        args.run(args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"gpt_spam: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    gc.freeze()  # else the exit spends 0.5 s on the imported modules
    sys.stdout.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    sys.exit(main())
