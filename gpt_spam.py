# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "tiktoken==0.14.0", "numpy", "requests", "pandas", "tqdm", "matplotlib"]
# ///
"""Finetune GPT-2 to classify spam: chapter 6 of "Build a Large Language Model (From Scratch)" in one file.

    python gpt_spam.py train        then        python gpt_spam.py classify "You won a prize!"

Part 1 is the chapter (Sebastian Raschka, Manning 2024), 6.2 to 6.8: its order, names and calls. Part 2 is
what the chapter leaves out: one call for all of it, speed, metrics, several processes, files, command line.
Shapes: batch, tokens, emb = heads * head, vocab, classes.
"""

import argparse
import contextlib
import csv
import gc
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import sys
import tempfile
import textwrap
import time
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import requests
import tiktoken
import torch
import torch.nn.functional as F
from tiktoken_ext.openai_public import r50k_pat_str  # how GPT-2 cuts text into words
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# ======== Part 1: the chapter ========

# %% ---- 6.2 Data set: download, balance, split ----
DATA_URLS = ("https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
             "https://f001.backblazeb2.com/file/LLMs-from-scratch/sms%2Bspam%2Bcollection.zip")
DATA_SHA256 = "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d"  # of the table in the zip


def download_and_unzip_spam_data(url, zip_path, extracted_path, data_file_path):
    """Download the SMS Spam Collection (UCI, id 228) from `url`, or from the first of several that works."""
    if Path(data_file_path).exists():
        print(f"{data_file_path} already exists. Skipping download and extraction.")
        return

    def unzip(path):
        with reading(path, "is not the archive of the SMS data"), zipfile.ZipFile(path) as archive:
            content = archive.open("SMSSpamCollection").read(10_000_000)  # at most: it has 477,907 bytes
        with atomic_write(data_file_path) as temporary:  # the only member that is unpacked
            temporary.write_bytes(content)
            check_sha256(temporary, DATA_SHA256)

    download(url, zip_path, check=unzip)
    print(f"File downloaded and saved as {data_file_path}")


def create_balanced_dataset(df):
    """Undersample every label to the size of the rarest: UCI's 4,825 ham and 747 spam to 747 each."""
    # Imbalance makes accuracy lie: on the whole collection, always answering ham is 86.6% accurate.
    counts = df["Label"].value_counts()
    rarest = counts.sort_index(ascending=False).idxmin()  # in a tie the last name: spam, as in the chapter
    is_rarest = df["Label"] == rarest
    others = df[~is_rarest].groupby("Label").sample(counts.min(), random_state=123)
    return pd.concat([others, df[is_rarest]])


def random_split(df, train_frac, validation_frac):
    """Shuffle (seed 123) and cut into training, validation and test frames: 1,045, 149 and 300 of UCI's."""
    # Settings are chosen by the validation split; the test split is used once, at the end.
    df = df.sample(frac=1, random_state=123).reset_index(drop=True)
    train_end = int(len(df) * train_frac)
    validation_end = train_end + int(len(df) * validation_frac)
    return df[:train_end], df[train_end:validation_end], df[validation_end:]


# %% ---- 6.3 Data loaders: token ids, padding, batches ----
class SpamDataset(Dataset):
    """Pairs of ids (tokens,), cut and padded, and label, of a CSV file or frame (Text, Label from 0 on)."""

    def __init__(self, csv_file, tokenizer, max_length=None, pad_token_id=None, padding=True):
        self.data = csv_file
        if not isinstance(csv_file, pd.DataFrame):
            self.data = pd.read_csv(csv_file, dtype={"Text": str}, keep_default_na=False)
        # <|endoftext|>, 50256: GPT-2 has no padding token
        pad_token_id = tokenizer.eot_token if pad_token_id is None else pad_token_id
        encoded_texts = []
        for text in self.data["Text"]:  # a string, or a list of ids
            # encode_ordinary: a message that contains the letters "<|endoftext|>" does not end there.
            # A million blanks are too much for tiktoken.
            ids = tokenizer.encode_ordinary(text[:900_000]) if isinstance(text, str) else text
            encoded_texts.append(ids or [pad_token_id])  # an empty text has one token
        self.max_length = max(map(len, encoded_texts)) if max_length is None else max_length
        self.num_cut = sum(len(ids) > self.max_length for ids in encoded_texts)
        if padding:
            encoded_texts = [ids + [pad_token_id] * (self.max_length - len(ids)) for ids in encoded_texts]
        self.encoded_texts = [torch.tensor(ids[:self.max_length]) for ids in encoded_texts]  # (tokens,) each
        self.labels = torch.tensor(self.data["Label"].to_numpy(dtype=np.int64))  # (messages,)

    def __getitem__(self, index):
        return self.encoded_texts[index], self.labels[index]

    def __len__(self):
        return len(self.labels)


# The chapter's loaders: DataLoader(train_dataset, batch_size=8, shuffle=True, drop_last=True), and without
# shuffle and drop_last for validation and test.

# %% ---- 6.4 Pretrained model: the GPT architecture (chapters 3 and 4) ----
class MultiHeadAttention(nn.Module):
    """Causal self-attention by PyTorch's fused function, which needs no mask of `context_length`."""

    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False, causal=True):
        super().__init__()
        assert d_out % num_heads == 0, "d_out must be a multiple of num_heads"
        self.num_heads, self.dropout = num_heads, dropout
        self.causal = causal  # no position attends to later ones
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)

    def forward(self, x):
        heads = (self.num_heads, -1)
        queries = self.W_query(x).unflatten(-1, heads).transpose(1, 2)  # (batch, heads, tokens, head)
        keys = self.W_key(x).unflatten(-1, heads).transpose(1, 2)
        values = self.W_value(x).unflatten(-1, heads).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        # softmax(queries @ keys.T / sqrt(head) + mask) @ values; the causal mask is -inf for later tokens
        x = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, is_causal=self.causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (batch, tokens, emb)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "mask", None)  # the book's code saves its causal mask
        super()._load_from_state_dict(state_dict, prefix, *args)


class LayerNorm(nn.Module):
    """Layer normalisation over emb, with the chapter's parameter names."""

    def __init__(self, emb_dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x):
        x = x.to(self.scale.dtype)  # the frozen blocks before it may be bfloat16
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift)  # eps is 1e-5, as in GPT-2


class FeedForward(nn.Module):
    """Two linear layers, the same at each position."""

    def __init__(self, cfg):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(cfg["emb_dim"], 4 * cfg["emb_dim"]),
            nn.GELU("tanh"),  # the approximation that GPT-2 was trained with
            nn.Linear(4 * cfg["emb_dim"], cfg["emb_dim"]),
        )

    def forward(self, x):
        return self.layers(x)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each with pre-norm and a shortcut."""

    def __init__(self, cfg):
        super().__init__()
        self.att = MultiHeadAttention(
            cfg["emb_dim"], cfg["emb_dim"], cfg["context_length"], cfg["drop_rate"], cfg["n_heads"],
            cfg["qkv_bias"], cfg.get("causal", True))
        self.ff = FeedForward(cfg)
        self.norm1 = LayerNorm(cfg["emb_dim"])
        self.norm2 = LayerNorm(cfg["emb_dim"])
        self.drop_shortcut = nn.Dropout(cfg["drop_rate"])

    def forward(self, x):
        x = x + self.drop_shortcut(self.att(self.norm1(x)))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))  # (batch, tokens, emb)


class GPTModel(nn.Module):
    """GPT-2 (Radford et al. 2019): ids (batch, tokens) give logits (batch, tokens, vocab or classes)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = {"causal": True} | cfg
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        self.trf_blocks = nn.Sequential(*[TransformerBlock(cfg) for _ in range(cfg["n_layers"])])
        self.final_norm = LayerNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def embed(self, in_idx):
        """Return what the first block reads: (batch, tokens, emb)."""
        tok_embeds = self.tok_emb(in_idx)
        pos_embeds = self.pos_emb(torch.arange(in_idx.shape[1], device=in_idx.device))
        x = self.drop_emb(tok_embeds + pos_embeds)
        return x.to(self.trf_blocks[0].norm1.scale.dtype)  # bfloat16, if that block is

    def forward(self, in_idx):
        x = self.trf_blocks(self.embed(in_idx))
        return self.out_head(self.final_norm(x))


@torch.no_grad()
def generate_text_simple(model, idx, max_new_tokens, context_size):
    """Append the most likely next token `max_new_tokens` times: ids (batch, tokens) in and out."""
    for _ in range(max_new_tokens):
        logits = model(idx[:, -context_size:])[:, -1, :]  # (batch, vocab)
        idx_next = logits.argmax(dim=-1, keepdim=True)  # (batch, 1)
        idx = torch.cat((idx, idx_next), dim=1)
    return idx


def text_to_token_ids(text, tokenizer):
    """Return the ids of a text as a batch of one: (1, tokens)."""
    encoded = tokenizer.encode(text, allowed_special={"<|endoftext|>"})
    return torch.tensor(encoded).unsqueeze(0)


def token_ids_to_text(token_ids, tokenizer):
    """Return the text of ids (tokens,) or (1, tokens)."""
    return tokenizer.decode(token_ids.flatten().tolist())


# %% ---- 6.4 Pretrained model: OpenAI's weights (chapter 5), without TensorFlow ----
MODEL_SIZES = {"124M": 768, "355M": 1024, "774M": 1280, "1558M": 1600}  # emb_dim; the context is 1,024 tokens
MODEL_URLS = ("https://openaipublic.blob.core.windows.net/gpt-2/models",
              "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2")
DATA_FILE = "model.ckpt.data-00000-of-00001"
CHECKPOINT_FILES = ("hparams.json", "encoder.json", DATA_FILE)
MODEL_SHA256 = {  # the larger data files have no published hash
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    f"124M/{DATA_FILE}": "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118",
}


def download_and_load_gpt2(model_size, models_dir):
    """Return (settings, params: arrays by GPTModel's names) of OpenAI's "124M", "355M", "774M" or "1558M"."""
    texts, params = read_model(download_gpt2(model_size, models_dir))
    return json.loads(texts["hparams.json"]), params


def load_weights_into_gpt(gpt, params, assign=False):
    """Copy `params` into the model; with `assign` the model takes the arrays themselves, to save memory."""
    state = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in params.items()}
    state["out_head.weight"] = state["tok_emb.weight"].clone()  # GPT-2 shares it, the chapter copies it
    gpt.load_state_dict(state, assign=assign)


def download_gpt2(model_size, models_dir):
    """Return the path of the converted model; download and convert it on first use."""
    if model_size not in MODEL_SIZES:
        raise ValueError(f"there is no GPT-2 of size {model_size!r}; choose from {', '.join(MODEL_SIZES)}")
    path = Path(models_dir, f"gpt2-{model_size}.npz")
    if path.exists():
        return path
    folder = Path(models_dir, f"{model_size}.download")
    for name in CHECKPOINT_FILES:
        urls = [f"{base}/{model_size}/{name}" for base in MODEL_URLS]
        sha256 = MODEL_SHA256.get(name, MODEL_SHA256.get(f"{model_size}/{name}"))
        try:
            download(urls, folder / name, check=lambda file: check_sha256(file, sha256))
        except requests.RequestException as error:
            raise type(error)(f"{error}, likewise the others of {', '.join(CHECKPOINT_FILES)}") from error
    try:
        convert_checkpoint(folder, path)
    except ValueError:  # wrong content: the next call downloads it anew
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    return path


def convert_checkpoint(folder, path):
    """Write a folder with OpenAI's files as one .npz: tensors by the chapter's names, and the text files."""
    texts, params = read_checkpoint(folder)
    for name, text in texts.items():
        params[name] = np.frombuffer(text.encode(), np.uint8)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **params)


def read_model(path):
    """Return ({file name: text}, {the chapter's name: float32 array}) of an .npz or of a folder."""
    if Path(path).is_dir():
        return read_checkpoint(path)
    with reading(path, "is not a model that gpt_spam converted"), np.load(path, allow_pickle=False) as npz:
        files = [name for name in npz if name.endswith((".json", ".bpe"))]
        params = {name: np.asarray(npz[name], np.float32) for name in npz if name not in files}
        return {name: npz[name].tobytes().decode() for name in files}, params


def read_checkpoint(folder):
    """Return ({file name: text}, {the chapter's name: float32 array}) of a folder with OpenAI's files."""
    with reading(folder, "is not a checkpoint in OpenAI's layout"):
        texts = {name: Path(folder, name).read_text("utf-8") for name in CHECKPOINT_FILES[:-1]}
        cfg = read_config(texts["hparams.json"])
        data = np.memmap(Path(folder, DATA_FILE), "<f4", "c")  # read when used; "c": never changed
        emb, positions, vocab = cfg["emb_dim"], cfg["context_length"], cfg["vocab_size"]
        # 12 emb^2 values in a block's matrices, 13 emb in its biases and norms; then ln_f, wpe, wte
        expected = cfg["n_layers"] * (12 * emb + 13) * emb + (2 + positions + vocab) * emb
        if data.size != expected:
            raise ValueError(f"{DATA_FILE} has {data.nbytes:,} bytes, hparams.json says {4 * expected:,}")
        if not np.isfinite(data.sum(dtype=np.float64)):
            raise ValueError(f"{DATA_FILE} contains NaN or infinity")

    params = {}

    def take(*shape):  # the next tensor
        nonlocal data
        array, data = np.split(data, [math.prod(shape)])
        return array.reshape(shape)

    def take_norm(name):
        params[name + ".shift"] = take(emb)
        params[name + ".scale"] = take(emb)

    def take_linear(names, d_in, d_out):  # one layer, or several side by side
        biases = np.split(take(d_out), len(names))
        weights = np.split(take(d_in, d_out).T, len(names))  # for x @ w there, for x @ weight.T here
        for name, bias, weight in zip(names, biases, weights):
            params[name + ".bias"] = bias
            params[name + ".weight"] = weight

    # TensorFlow's Saver sorts the tensors by name: h0/attn/c_attn/b, h0/attn/c_attn/w, ..., h1/..., h10/...,
    # h2/..., ln_f/b, ln_f/g, wpe, wte.
    for i in sorted(range(cfg["n_layers"]), key=str):
        block = f"trf_blocks.{i}."
        take_linear([block + "att.W_query", block + "att.W_key", block + "att.W_value"], emb, 3 * emb)
        take_linear([block + "att.out_proj"], emb, emb)
        take_norm(block + "norm1")
        take_norm(block + "norm2")
        take_linear([block + "ff.layers.0"], emb, 4 * emb)
        take_linear([block + "ff.layers.2"], 4 * emb, emb)
    take_norm("final_norm")
    params["pos_emb.weight"] = take(positions, emb)
    params["tok_emb.weight"] = take(vocab, emb)
    return texts, params


def read_config(hparams_json):
    """Return the book's config that OpenAI's hparams.json describes."""
    hparams = json.loads(hparams_json)
    cfg = {"vocab_size": hparams["n_vocab"], "context_length": hparams["n_ctx"], "emb_dim": hparams["n_embd"],
           "n_heads": hparams["n_head"], "n_layers": hparams["n_layer"]}
    are_sizes = [isinstance(size, int) and size > 0 for size in cfg.values()]
    if not all(are_sizes) or cfg["emb_dim"] % cfg["n_heads"] != 0:
        raise ValueError(f"a model cannot have the sizes {cfg}")
    return cfg | {"drop_rate": 0.0, "qkv_bias": True}


# %% ---- 6.5 Classification head: freeze GPT-2, train the end of it ----
def add_classification_head(model, num_classes):
    """Freeze the model, replace its head, unfreeze its end (the chapter: after torch.manual_seed(123))."""
    # Most parameters stay as OpenAI trained them: of the 124M's 124,441,346 only 7,090,946 are trained.
    model.requires_grad_(False)
    # The 50,257-way head, which predicts tokens, becomes one that predicts labels.
    model.out_head = nn.Linear(in_features=model.cfg["emb_dim"], out_features=num_classes)
    # The head alone reaches 72.00% in the book's experiments, with the last block and the final norm 95.00%.
    model.trf_blocks[-1].requires_grad_(True)
    model.final_norm.requires_grad_(True)


# %% ---- Appendix E: LoRA, two thin matrices beside each frozen one ----
class LoRALayer(nn.Module):
    """Low-rank adaptation (Hu et al. 2021): x (..., in) gives alpha / rank * x @ A @ B (..., out)."""

    def __init__(self, in_dim, out_dim, rank, alpha):
        super().__init__()
        self.A = nn.Parameter(torch.empty(in_dim, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(rank, out_dim))  # zero: the first logits are unchanged
        self.scale = alpha / rank

    def forward(self, x):
        return self.scale * (x @ self.A @ self.B)


class LinearWithLoRA(nn.Module):
    """A linear layer with LoRA beside it; `weight` is the two in one, as a plain layer would have it."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear = linear
        self.lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha)

    def forward(self, x):
        return self.linear(x) + self.lora(x)

    @property
    def weight(self):
        return self.linear.weight + self.lora.scale * (self.lora.A @ self.lora.B).T  # (out, in)


def replace_linear_with_lora(model, rank, alpha):
    """Put LoRA beside every linear layer; freeze the model first, and move it to its device afterwards."""
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            setattr(model, name, LinearWithLoRA(module, rank, alpha))
        else:
            replace_linear_with_lora(module, rank, alpha)


def merge_lora(model):
    """Turn each layer with LoRA into one plain linear layer with the same output."""
    for name, module in model.named_children():
        merge_lora(module)  # the inner layers first: there may be LoRA beside LoRA
        if isinstance(module, LinearWithLoRA):
            module.linear.weight.data = module.weight.detach()
            setattr(model, name, module.linear)


# %% ---- 6.6 Loss and accuracy: accuracy is reported, cross-entropy is optimised ----
def calc_loss_batch(input_batch, target_batch, model, device, loss_fn=F.cross_entropy):
    """Return the mean cross-entropy, which is minimised since accuracy has no useful gradient."""
    # A position sees itself and earlier ones: only the last, often a padding token, sees the whole message.
    logits = model(input_batch.to(device))[:, -1, :]  # (batch, classes)
    return loss_fn(logits, target_batch.to(device))


@torch.no_grad()
def calc_loss_loader(data_loader, model, device, num_batches=None, loss_fn=F.cross_entropy):
    """Return the mean loss of the first `num_batches` batches, or of all."""
    losses = []
    for input_batch, target_batch in islice(data_loader, num_batches):
        losses.append(calc_loss_batch(input_batch, target_batch, model, device, loss_fn).item())
    return sum(losses) / len(losses) if losses else float("nan")


@torch.no_grad()
def calc_accuracy_loader(data_loader, model, device, num_batches=None):
    """Return the accuracy over the first `num_batches` batches, or over all, in eval mode."""
    model.eval()
    correct_predictions = num_examples = 0
    for input_batch, target_batch in islice(data_loader, num_batches):
        logits = model(input_batch.to(device))[:, -1, :]  # (batch, classes)
        predicted_labels = logits.argmax(dim=-1)  # softmax would not change which is the largest
        correct_predictions += (predicted_labels == target_batch.to(device)).sum().item()
        num_examples += len(target_batch)
    return correct_predictions / num_examples


# %% ---- 6.7 Finetuning ----
def evaluate_model(model, train_loader, val_loader, device, eval_iter, loss_fn=F.cross_entropy):
    """Return training and validation loss of `eval_iter` batches, measured in eval mode, without dropout."""
    model.eval()
    train_loss = calc_loss_loader(train_loader, model, device, eval_iter, loss_fn)
    val_loss = calc_loss_loader(val_loader, model, device, eval_iter, loss_fn)
    model.train()
    return train_loss, val_loss


def train_classifier_simple(model, train_loader, val_loader, optimizer, device, num_epochs, eval_freq,
                            eval_iter, loss_fn=F.cross_entropy, accumulation_steps=1, scheduler=None):
    """Train, print the chapter's log; return losses, accuracies (training, validation), examples_seen."""
    # The chapter's optimizer is torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.1), 5 epochs.
    train_losses, val_losses, train_accs, val_accs = [], [], [], []
    examples_seen, global_step = 0, -1
    optimizer.zero_grad()
    for epoch in range(num_epochs):
        model.train()  # dropout, if any, is on
        for batch_number, (input_batch, target_batch) in enumerate(train_loader, 1):
            loss = calc_loss_batch(input_batch, target_batch, model, device, loss_fn)
            global_step += 1
            if not torch.isfinite(loss):
                raise ValueError(f"the loss is {loss.item()} at step {global_step}; try a smaller lr")
            (loss / accumulation_steps).backward()
            if batch_number % accumulation_steps == 0 or batch_number == len(train_loader):
                optimizer.step()
                optimizer.zero_grad()
                if scheduler is not None:
                    scheduler.step()
            examples_seen += len(target_batch)
            if global_step % eval_freq == 0:
                train_loss, val_loss = evaluate_model(
                    model, train_loader, val_loader, device, eval_iter, loss_fn)
                train_losses.append(train_loss)
                val_losses.append(val_loss)
                print(f"Ep {epoch + 1} (Step {global_step:06d}): "
                      f"Train loss {train_loss:.3f}, Val loss {val_loss:.3f}")
        train_accs.append(calc_accuracy_loader(train_loader, model, device, eval_iter))
        val_accs.append(calc_accuracy_loader(val_loader, model, device, eval_iter))
        print(f"Training accuracy: {train_accs[-1]:.2%} | Validation accuracy: {val_accs[-1]:.2%}")
    return train_losses, val_losses, train_accs, val_accs, examples_seen


def plot_values(epochs_seen, examples_seen, train_values, val_values, label="loss"):
    """Return a matplotlib figure of values over epochs and, above, over examples seen."""
    import matplotlib.pyplot as plt  # for this function only
    fig, ax1 = plt.subplots(figsize=(5, 3))
    ax1.plot(epochs_seen, train_values, marker=".", label=f"Training {label}")
    ax1.plot(epochs_seen, val_values, marker=".", linestyle="-.", label=f"Validation {label}")
    ax1.set_xlabel("Epochs")
    ax1.set_ylabel(label.capitalize())
    ax1.legend()
    ax2 = ax1.twiny()  # a second x-axis
    ax2.plot(examples_seen, train_values, alpha=0)  # invisible: it aligns the ticks
    ax2.set_xlabel("Examples seen")
    fig.tight_layout()
    return fig


# %% ---- 6.8 Use ----
@torch.no_grad()
def classify_review(text, model, tokenizer, device, max_length=None, pad_token_id=None):
    """Return "spam" or "not spam"; `max_length` is that of the training set, to pad as in training."""
    supported_context_length = model.pos_emb.weight.shape[0]
    if max_length is None or not 1 <= max_length <= supported_context_length:
        raise ValueError(f"max_length is {max_length}, the model's limit {supported_context_length}; "
                         "pass train_dataset.max_length, to pad as in training")
    pad_token_id = tokenizer.eot_token if pad_token_id is None else pad_token_id
    model.eval()
    input_ids = tokenizer.encode_ordinary(text[:900_000])[:max_length]
    input_ids += [pad_token_id] * (max_length - len(input_ids))
    input_tensor = torch.tensor(input_ids, device=device).unsqueeze(0)  # (1, tokens)
    logits = model(input_tensor)[:, -1, :]  # (1, classes)
    predicted_label = logits.argmax(dim=-1).item()
    return "spam" if predicted_label == 1 else "not spam"


# ======== Part 2: what the chapter leaves out ========

# %% ---- The chapter in one call: from labelled texts to a classifier ----
SPAM_PROMPT = ("Is the following text 'spam'? Answer with 'yes' or 'no': 'You are a winner you have been "
               "specially selected to receive $1000 cash or a $2000 award.'")
BALANCES = ("auto", "undersample", "weights", "none")
# Settings of `finetune`: (smallest value, of the setting's type, or a tuple of choices; meaning).
HYPERPARAMETERS = {
    "epochs": (1, "passes over the training split"),
    "batch_size": (1, "messages in a batch"),
    "lr": (0.0, "AdamW's learning rate; tiny has its own, 1e-3"),
    "weight_decay": (0.0, "AdamW's weight decay"),
    "eval_freq": (1, "batches between two logged losses"),
    "eval_iter": (1, "batches that a logged value is measured on"),
    "seed": (0, "for the new head and the order of messages"),
    "dtype": (("float32", "bfloat16"), "number format of the frozen blocks"),
}
QUESTIONS = {  # what the book's table of experiments varies
    "trainable_layers": (("last_layer", "last_block", "last_two_blocks", "all", "lora"), "with the head"),
    "token_pos": (("last", "first", "mean"), "token whose logits are used; mean: of all tokens"),
    "causal_mask": ((True, False), "no token attends to later ones"),
    "lora_rank": (1, "rank of LoRA's matrices"),
    "lora_alpha": (0.0, "LoRA's output is scaled by alpha / rank"),
    "init": (("pretrained", "random"), "initial weights"),
    "padding": ((True, False), "pad to the context length, which is slower"),
    "context_length": (1, "number of tokens, or longest (message), or model (its limit)"),
    "accumulation_steps": (1, "batches per update"),
}
SETTINGS = HYPERPARAMETERS | QUESTIONS | {"schedule": (("constant", "linear"), "of lr")}  # not an option


def prepare_splits(df, balance="auto", test=None):
    """Return ((training, validation, test) frames, class weights or None) of a frame with Label and Text."""
    if balance not in BALANCES:
        raise ValueError(f"balance must be one of {', '.join(BALANCES)}, got {balance!r}")
    cells = pd.concat([df, test])[["Label", "Text"]]
    if cells.isna().to_numpy().any():
        raise ValueError("a row has no label or no text")
    df = df.astype({"Label": str})
    labels = sorted(set(df["Label"]))
    if balance == "auto":  # ham and spam are undersampled, as in the chapter; others are weighted in the loss
        balance = "undersample" if labels == ["ham", "spam"] else "weights"
    if balance == "undersample":
        df = create_balanced_dataset(df)
    if len(df) < 20 or len(labels) < 2:
        raise ValueError(f"need 20 messages or more, of two labels; got {len(df)}, {labels[:5]} ({balance=})")
    splits = random_split(df, 0.7, 0.1)
    if test is not None:
        test = test.astype({"Label": str})
        check_labels(test, labels)
        splits = (*random_split(df, 0.875, 1)[:2], test)  # training and validation, 7 to 1
    counts = pd.Categorical(splits[0]["Label"], labels).value_counts()  # of labels without messages, too
    if counts.min() < 5:
        warnings.warn(f"only {counts.min()} training messages have the label {counts.idxmin()!r}")
    if balance != "weights":
        return splits, None
    # The rarer a label, the heavier it weighs; the mean weight over training is 1.
    class_weights = float(counts.mean()) / counts.clip(lower=1).to_numpy(np.float32)
    return splits, torch.from_numpy(class_weights)


def check_labels(df, labels):
    """Raise ValueError if a label of the frame is not one of `labels`."""
    unknown = set(df["Label"]).difference(labels)
    if unknown:
        raise ValueError(f"labels {sorted(unknown)[:5]} are not among those of training, {labels[:20]}")


def check_settings(splits, cfg, **settings):
    """Raise ValueError if a setting is invalid or does not fit the splits or what is known of the `cfg`."""
    if settings["context_length"] in ("longest", "model"):
        settings["context_length"] = 1  # which fits every model
    for name, (limit, meaning) in SETTINGS.items():
        value = settings[name]
        if isinstance(limit, tuple):
            allowed = f"one of {', '.join(map(str, limit))}"
            is_valid = value in limit
        else:
            allowed = f"{type(limit).__name__}, {limit} to 2**63"
            is_valid = isinstance(value, (int, np.integer, type(limit))) and limit <= value < 2**63
        if not is_valid:
            raise ValueError(f"{name} must be {allowed}, got {value!r} ({meaning})")
    batch_size, fewest = settings["batch_size"], min(map(len, splits))
    if batch_size > len(splits[0]):
        raise ValueError(f"batch_size {batch_size} is more than {len(splits[0])} training messages")
    _, processes = get_rank_and_world_size()
    if batch_size % processes != 0 or fewest < processes:
        raise ValueError(f"{processes} processes cannot share batches of {batch_size} or {fewest} messages")
    reads_zeros = settings["token_pos"] == "mean" or not settings["causal_mask"]  # by which `collate` pads
    if reads_zeros and batch_size > 1 and not settings["padding"]:
        raise ValueError(f"without padding, this token_pos or mask needs batch_size 1, not {batch_size}")
    if cfg.get("drop_rate", 0) > 0:
        raise ValueError(f"finetuning needs a drop_rate of 0, got {cfg['drop_rate']}")
    for name, size in (("lora_rank", "emb_dim"), ("context_length", "context_length")):
        if settings[name] > cfg.get(size, math.inf):
            raise ValueError(f"{name} {settings[name]:,} is more than the model's {size}, {cfg[size]:,}")


# A new setting stands in this signature, in the call of check_settings and in SETTINGS.
def finetune(model, tokenizer, splits, class_weights=None, device="cpu", *,
             epochs=5, batch_size=8, lr=5e-5, weight_decay=0.1, eval_freq=50, eval_iter=5, seed=123,
             trainable_layers="last_block", token_pos="last", causal_mask=True, lora_rank=8, lora_alpha=8.0,
             init="pretrained", padding=True, context_length="longest", accumulation_steps=1,
             schedule="constant", dtype="float32"):
    """Finetune a GPTModel on the frames of prepare_splits; return (Classifier with that model, results)."""
    check_settings(
        splits, model.cfg, epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, seed=seed,
        eval_freq=eval_freq, eval_iter=eval_iter, trainable_layers=trainable_layers, token_pos=token_pos,
        causal_mask=causal_mask, lora_rank=lora_rank, lora_alpha=lora_alpha, init=init, padding=padding,
        context_length=context_length, accumulation_steps=accumulation_steps, schedule=schedule, dtype=dtype)
    if not tokenizer.n_vocab == model.cfg["vocab_size"] == model.out_head.out_features:
        raise ValueError("the model is finetuned already, or the tokenizer is another's; load both anew")
    _, num_processes = get_rank_and_world_size()

    # 6.3 Data sets; their loaders follow in 6.5, when it is known what is frozen
    labels = sorted(set(pd.concat(splits)["Label"]))
    datasets, max_length = make_datasets(splits, labels, tokenizer, padding, context_length, model)

    # 6.4 Pretrained model
    if init == "random":
        torch.manual_seed(seed)
        model.load_state_dict(GPTModel(model.cfg).state_dict(), assign=True)
    model.cfg["causal"] = causal_mask
    for block in model.trf_blocks:
        block.att.causal = causal_mask
    model.to(device).eval()
    print("Before finetuning the model continues a text; it was not trained to answer a question:")
    for prompt, max_new_tokens in (("Every effort moves you", 15), (SPAM_PROMPT, 23)):
        idx = text_to_token_ids(prompt, tokenizer).to(device)
        idx = generate_text_simple(model, idx, max_new_tokens, model.cfg["context_length"])
        shortened = textwrap.shorten(prompt, 90)
        print(f"  {shortened!r}\n  -> {token_ids_to_text(idx, tokenizer)[len(prompt):]!r:.95}")

    # 6.5 Classification head
    torch.manual_seed(seed)
    add_classification_head(model, len(labels))
    num_frozen = choose_trainable_layers(model, trainable_layers, lora_rank, lora_alpha)
    if dtype == "bfloat16" and num_frozen == 0:
        warnings.warn(f"dtype bfloat16 has no effect: trainable_layers {trainable_layers} freezes no block")
    model.trf_blocks[:num_frozen].to(getattr(torch, dtype))
    trained = [p for p in model.parameters() if p.requires_grad]
    num_trained = sum(map(torch.numel, trained))
    num_all = sum(map(torch.numel, model.parameters()))
    print(f"Training {num_trained:,} of {num_all:,} parameters; the others stay frozen")
    datasets, num_cached = cache_hidden_states(model, datasets, num_frozen)
    label_logits = LabelLogits(model, token_pos, num_cached).to(device)  # new layers are made on the CPU
    if num_processes > 1:
        label_logits = nn.parallel.DistributedDataParallel(label_logits, find_unused_parameters=True)
    loaders = [DataLoader(rows, batch_size // num_processes, shuffle=is_train, drop_last=is_train,
                          collate_fn=collate) for rows, is_train in zip(datasets, (True, False, False))]

    # 6.6 Loss and accuracy before training
    cross_entropy = nn.CrossEntropyLoss(class_weights, reduction="sum").to(device)

    def loss_fn(logits, target):  # PyTorch's mean divides by the weights, which in batches of one undoes them
        return cross_entropy(logits, target) / len(target)

    torch.manual_seed(seed)
    accuracies = [calc_accuracy_loader(loader, label_logits, device, 10) for loader in loaders]
    losses = [calc_loss_loader(loader, label_logits, device, 5, loss_fn) for loader in loaders]
    print("Before training the head is random; training / validation / test:\n  accuracy {:.2%} / {:.2%} / "
          "{:.2%} (10 batches), loss {:.3f} / {:.3f} / {:.3f} (5 batches)".format(*accuracies, *losses))
    # 6.7 Finetuning
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=True)
    scheduler = None
    if schedule == "linear":  # up for a tenth of the updates, then down
        updates = epochs * math.ceil(len(loaders[0]) / accumulation_steps)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, lr, updates, pct_start=0.1, anneal_strategy="linear", cycle_momentum=False)
    start_time = time.perf_counter()
    log = train_classifier_simple(label_logits, *loaders[:2], optimizer, device, epochs, eval_freq, eval_iter,
                                  loss_fn, accumulation_steps, scheduler)
    print(f"Training completed in {(time.perf_counter() - start_time) / 60:.2f} minutes.")
    results = dict(zip(("train_loss", "val_loss", "train_accuracy", "val_accuracy", "examples_seen"), log))
    results["examples_seen"] *= num_processes
    results["steps"] = list(range(0, epochs * len(loaders[0]), eval_freq))  # of the losses
    results["final_accuracy"] = calc_final_accuracies(label_logits, loaders, device, splits)
    final_loss = calc_loss_loader(loaders[1], label_logits, device, None, loss_fn)
    if not torch.isfinite(final_loss + nn.utils.get_total_norm(trained)):
        raise ValueError("after the last update, loss or parameters are not finite; try a smaller lr")
    merge_lora(model)
    return Classifier(model.eval(), tokenizer, labels, max_length, padding, token_pos), results


def make_datasets(splits, labels, tokenizer, padding, context_length, model):
    """Return (pairs of ids and label for this process: training, validation, test; max_length)."""
    limit = model.cfg["context_length"]
    frames = [split.assign(Label=split["Label"].map(labels.index)) for split in splits]
    longest = SpamDataset(frames[0], tokenizer, padding=False).max_length
    max_length = {"longest": longest, "model": limit}.get(context_length, context_length)
    if max_length > limit:
        raise ValueError(f"{max_length:,} tokens are too many; context_length model cuts texts at {limit:,}")
    # Validation and test messages are cut and padded as those of training are.
    datasets = [SpamDataset(frame, tokenizer, max_length, padding=padding) for frame in frames]
    num_cut = sum(dataset.num_cut for dataset in datasets)
    if num_cut > 0:
        warnings.warn(f"{num_cut:,} messages are cut to {max_length:,} tokens; their rest is not read")
    rank, num_processes = get_rank_and_world_size()
    shares = [list(dataset)[rank::num_processes] for dataset in datasets]
    del shares[0][len(frames[0]) // num_processes:]  # as many training messages in each process
    return shares, max_length


def choose_trainable_layers(model, trainable_layers, lora_rank, lora_alpha):
    """Train other layers than the chapter's, as in the book's table; return how many blocks stay frozen."""
    if trainable_layers == "all":
        model.requires_grad_(True)
    if trainable_layers == "last_two_blocks":
        model.trf_blocks[-2:].requires_grad_(True)
    if trainable_layers in ("last_layer", "lora"):  # the head alone
        model.requires_grad_(False)
        model.out_head.requires_grad_(True)
    if trainable_layers == "lora":
        replace_linear_with_lora(model, lora_rank, lora_alpha)
    return sum(not any(p.requires_grad for p in block.parameters()) for block in model.trf_blocks)


def calc_final_accuracies(model, loaders, device, splits):
    """Return and print the accuracies of training, validation and test, over all processes."""
    # The test split comes last and is for this number alone: settings are chosen by validation.
    accuracies = []
    for loader in loaders:
        num_examples = min(len(loader) * loader.batch_size, len(loader.dataset))  # last batches dropped
        num_correct = round(num_examples * calc_accuracy_loader(loader, model, device))
        counts = torch.tensor([num_correct, num_examples])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)  # the sum over all processes
        accuracies.append(counts[0].item() / counts[1].item())
    num_known = splits[2]["Text"].isin(splits[0]["Text"]).sum()
    commonest = splits[0]["Label"].mode()[0]
    _, val_baseline, test_baseline = [(split["Label"] == commonest).mean() for split in splits]
    print(f"Of {len(splits[2]):,} test messages {num_known:,} also occur, word for word, in training;",
          f"always {commonest!r} is right in {test_baseline:.2%}")
    print("Final accuracy, training / validation / test: {:.2%} / {:.2%} / {:.2%}".format(*accuracies))
    if accuracies[1] <= val_baseline < 1:
        warnings.warn(f"nothing was learned: validation accuracy {accuracies[1]:.2%}, that of always "
                      f"{commonest!r} {val_baseline:.2%}; try another lr or more epochs")
    return accuracies


# %% ---- A model with its tokenizer, pretrained or finetuned; how texts are prepared for it ----
END_OF_TEXT = "<|endoftext|>"
CLASSIFIER_VERSION = 2


def load_pretrained(path):
    """Return (GPTModel in eval mode, its tokenizer, its settings for `finetune`) of an .npz or a folder."""
    texts, params = read_model(path)
    with reading(path, "is not a GPT-2 model"):
        cfg = read_config(texts["hparams.json"])
        if len(params) != 16 * cfg["n_layers"] + 4:
            raise ValueError(f"{len(params)} tensors, of {cfg['n_layers']} blocks")
        with torch.device("meta"):  # no initial values
            model = GPTModel(cfg)
        load_weights_into_gpt(model, params, assign=True)
        tokenizer = build_tokenizer(texts["encoder.json"])
        settings = json.loads(texts.get("about.json", "{}")).get("finetune", {})  # the bundled model has some
    return model.eval(), tokenizer, settings


def build_tokenizer(encoder_json):
    """Return the tiktoken.Encoding of the text of OpenAI's encoder.json; tiktoken would download its own."""
    # encoder.json has a character for each byte: itself, or where that is not printable, one from 256 on.
    byte_of = dict(enumerate([*range(33), *range(127, 161), 173], 256))
    ids = dict(json.loads(encoder_json))
    ids = {token.translate(byte_of).encode("latin-1"): i for token, i in ids.items()}
    # Bytes, then merges in the order of vocab.bpe, which is thus not needed; last the end of text.
    *tokens, last = sorted(ids, key=ids.get)
    has_all_bytes = all(bytes([byte]) in ids for byte in range(256))
    is_complete = has_all_bytes and sorted(ids.values()) == list(range(len(ids)))
    if last != END_OF_TEXT.encode() or not is_complete:
        raise ValueError(f"encoder.json does not number its tokens from 0 to {END_OF_TEXT}, the last one")
    return encoding_of(tokens)


def encoding_of(tokens):
    """Return the tiktoken.Encoding of byte strings in the order of their ids."""
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(tokens)})


@dataclass
class Classifier:
    """A finetuned GPT with all that it needs to classify a text as in training."""

    model: GPTModel
    tokenizer: tiktoken.Encoding
    labels: list  # in the order of the model's classes
    max_length: int  # tokens; the rest of a text is cut off
    padding: bool = True  # to max_length
    token_pos: str = "last"

    def predict(self, texts):
        """Return the likeliest label of each text; a string is one text."""
        return [self.labels[i] for i in self.predict_proba(texts).argmax(dim=-1)]

    def predict_proba(self, texts):
        """Return probabilities (texts, labels) of a string, or of several, which may be lists of ids."""
        rows = [texts] if isinstance(texts, str) else list(texts)
        are_texts = all(isinstance(row, (str, list)) for row in rows)
        if isinstance(texts, (pd.DataFrame, dict)) or not are_texts:
            raise TypeError(f"expected a string, or a list or column of strings, got {texts!r:.80}")
        frame = pd.DataFrame({"Text": rows, "Label": 0})
        dataset = SpamDataset(frame, self.tokenizer, self.max_length, padding=self.padding)
        if dataset.num_cut > 0:
            warnings.warn(f"texts are cut to {self.max_length} tokens, as in training; the rest is not read")
        label_logits = LabelLogits(self.model.eval(), self.token_pos)
        outputs = run_in_batches(self.model, label_logits, dataset, equal_lengths=self.token_pos == "mean")
        logits = torch.cat([torch.empty(0, len(self.labels)), *outputs])  # there may be no texts
        return logits.softmax(dim=-1)


def save_classifier(path, classifier):
    """Save a self-contained classifier."""
    model = getattr(classifier.model, "_orig_mod", classifier.model)  # torch.compile wraps it
    merge_lora(model)
    content = vars(classifier) | {
        "version": CLASSIFIER_VERSION,
        "config": model.cfg,
        "model": {name: tensor.cpu() for name, tensor in model.state_dict().items()},
        "tokenizer": classifier.tokenizer.decode_tokens_bytes(range(classifier.tokenizer.eot_token)),
    }
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as file:  # an open file reports that the disk is full
            torch.save(content, file)
        torch.load(temporary, mmap=True, weights_only=True)  # an error now, not when it is needed


def load_classifier(path, device="cpu"):
    """Return the Classifier that was saved as `path`, or by train in the folder `path`."""
    path = Path(path)
    if path.is_dir():
        path /= "classifier.pth"
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; train a classifier first")
    with path.open("rb") as file:
        problem = "is damaged" if file.read(2) == b"PK" else "is not a classifier"
    with reading(path, problem), zipfile.ZipFile(path) as archive:
        if archive.testzip():  # torch.load does not check the checksums
            raise ValueError("a checksum is wrong")
    with reading(path, "is not a classifier"):
        content = dict(torch.load(path, map_location="cpu", weights_only=True))
        if content.pop("version", None) != CLASSIFIER_VERSION:
            raise ValueError("saved by another version of gpt_spam; train again")
        model = GPTModel(content.pop("config"))
        model.out_head = nn.Linear(model.cfg["emb_dim"], len(content["labels"]))
        model.load_state_dict(content.pop("model"), assign=True)
        content["tokenizer"] = encoding_of(content["tokenizer"])
        classifier = Classifier(model.eval(), **content)
    model.to(device)
    return classifier


# %% ---- Speed: frozen blocks once a message, the last block at one position; metrics; processes ----
class Batch(NamedTuple):
    """Messages of different lengths, filled up with zeros, and where each one ends."""

    inputs: torch.Tensor  # ids (batch, tokens), or hidden states (batch, tokens, emb)
    positions: torch.Tensor  # (batch,) of the last tokens

    def to(self, device):
        return Batch(*[tensor.to(device) for tensor in self])


def collate(items):
    """Return (Batch, labels (batch,)) of pairs whose inputs differ in length."""
    inputs, labels = zip(*items)
    positions = torch.tensor([*map(len, inputs)]) - 1
    filled = nn.utils.rnn.pad_sequence(inputs, batch_first=True)  # causal attention never reads these zeros
    return Batch(filled, positions), torch.stack(labels)


class LabelLogits(nn.Module):
    """Logits (batch, 1, classes) of a GPT for a Batch: those at one position, or the mean of all."""

    def __init__(self, model, token_pos="last", num_cached=0):
        super().__init__()
        self.model, self.token_pos = model, token_pos
        self.num_cached = num_cached  # of blocks whose output the inputs are

    def forward(self, batch):
        model, (x, positions) = self.model, batch
        if self.num_cached == 0:
            x = model.embed(x)
        x = model.trf_blocks[self.num_cached:-1](x)  # (batch, tokens, emb)
        if self.token_pos == "first":
            positions = torch.zeros_like(positions)
        if self.token_pos == "mean":
            x = model.trf_blocks[-1](x)
        else:
            x = last_block_at(model.trf_blocks[-1], x, positions).unsqueeze(1)  # (batch, 1, emb)
        return model.out_head(model.final_norm(x)).mean(dim=1, keepdim=True)  # of one: itself


def last_block_at(block, x, positions):
    """Return `block(x)` at positions (batch,), without dropout: x (batch, tokens, emb) to (batch, emb)."""
    # As q.(W_k x) = (W_k^T q).x, keys and values are not computed: 3.4 million products, not 142 million
    # (124M, 120 tokens).
    att = block.att
    heads = (att.num_heads, -1)
    rows = torch.arange(len(x), device=x.device)
    shortcut = x[rows, positions]  # (batch, emb)
    x = block.norm1(x)
    query = att.W_query(x[rows, positions]).unflatten(-1, heads)  # (batch, heads, head)
    key_weight = att.W_key.weight.unflatten(0, heads)  # (heads, head, emb)
    query_for_x = torch.einsum("bhd,hde->bhe", query, key_weight)  # (batch, heads, emb)
    # The key's bias shifts all scores of a query alike, which softmax ignores.
    scores = query_for_x @ x.mT / math.sqrt(query.shape[-1])  # (batch, heads, tokens)
    if att.causal:
        later = torch.arange(x.shape[1], device=x.device) > positions[:, None, None]
        scores = scores.masked_fill(later, -torch.inf)
    weighted_x = scores.softmax(dim=-1) @ x  # (batch, heads, emb)
    value_weight = att.W_value.weight.unflatten(0, heads)  # (heads, head, emb)
    context = torch.einsum("bhe,hde->bhd", weighted_x, value_weight).flatten(1)  # (batch, emb)
    context = context + att.W_value(x.new_zeros(1, x.shape[2]))  # its bias: the attention weights sum to 1
    x = shortcut + att.out_proj(context)
    return x + block.ff(block.norm2(x))


@torch.no_grad()
def run_in_batches(model, function, items, equal_lengths=False):
    """Call `function` on Batches of items (ids, label), the longest first; return an output for each item."""
    device = model.tok_emb.weight.device
    max_tokens = 2048 if device.type == "cpu" else 16384  # small: fits a CPU's cache
    lengths = [len(ids) for ids, _ in items]
    rows = sorted(range(len(items)), key=lengths.__getitem__)
    batches = []
    while rows:
        longest = lengths[rows[-1]]
        batch = rows[-max(1, max_tokens // longest):]
        if equal_lengths or not model.cfg["causal"]:  # all of a batch is read
            batch = [row for row in batch if lengths[row] == longest]
        batches.append(batch)
        del rows[-len(batch):]
    outputs = [None] * len(items)
    for batch in tqdm(batches, unit=" batches", leave=False, delay=1, disable=None):
        inputs, _ = collate([items[row] for row in batch])
        for row, output in zip(batch, function(inputs.to(device)).cpu()):
            outputs[row] = output[:lengths[row]].clone()  # a copy, so that the filled batch can go
    return outputs


def cache_hidden_states(model, datasets, num_frozen):
    """Return (datasets with hidden states (tokens, emb) in place of ids, how many blocks computed them)."""
    num_cached = min(num_frozen, len(model.trf_blocks) - 1)  # the last block runs at one position
    items = sum(datasets, [])
    size = sum(len(ids) for ids, _ in items) * model.trf_blocks[0].norm1.scale.nbytes
    sysconf = getattr(os, "sysconf", lambda name: math.inf)  # Windows does not tell its memory
    memory = sysconf("SC_PHYS_PAGES") * sysconf("SC_PAGE_SIZE")
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of this machine
    if num_cached == 0 or num_local * size > memory / 2:  # too large to be kept
        return datasets, 0
    print(f"The frozen blocks' output never changes: it is computed once and kept, {size / 1e6:,.0f} MB")
    start_time = time.perf_counter()
    blocks = model.trf_blocks[:num_cached]
    states = iter(run_in_batches(model, lambda batch: blocks(model.embed(batch.inputs)), items))
    print(f"The frozen blocks took {time.perf_counter() - start_time:.1f} s")
    return [[(next(states), label) for _, label in dataset] for dataset in datasets], num_cached


def calc_metrics(true, predicted, names):
    """Return accuracy, a table of precision, recall, F1 and support by class, and the confusion matrix."""
    confusion = pd.crosstab(pd.Categorical(true, names), pd.Categorical(predicted, names),
                            rownames=["true"], colnames=["predicted"], dropna=False)  # of all names
    right, support, guessed = np.diag(confusion), confusion.sum(axis=1), confusion.sum()
    table = pd.DataFrame({"precision": right / guessed, "recall": right / support,
                          "f1": 2 * right / (guessed + support), "support": support})
    return right.sum() / len(true), table.fillna(0), confusion


def get_rank_and_world_size():
    """Return this process's number, from 0, and how many there are."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


@contextlib.contextmanager
def first_process_first():
    """Run the block in the first process, then in the others, which find the files that it has made."""
    rank, num_processes = get_rank_and_world_size()
    if rank > 0:
        torch.distributed.barrier()  # returns when all processes have called it
    yield
    if rank == 0 and num_processes > 1:
        torch.distributed.barrier()


# %% ---- Files: tables, lines, downloads, atomic write ----
def read_messages(path, text_column="text", label_column="label"):
    """Return a table's labelled texts as a frame of strings: Label, Text."""
    df = read_columns(path, [label_column, text_column])
    df.columns = ["Label", "Text"]
    df["Label"] = df["Label"].str.normalize("NFC").str.strip()
    for number, (label, text) in enumerate(df.itertuples(index=False), 1):
        is_header = f"{label}\n{text}".lower() == f"{label_column}\n{text_column}".lower()  # again
        if is_header or label == "" or label != printable(label).lstrip('"'):
            raise ValueError(f"row {number} of {path} has no proper label: {label!r:.80}, text {text!r:.80}")
    num_empty = (df["Text"].str.strip() == "").sum()
    if num_empty > 0:
        warnings.warn(f"empty texts in {path}: {num_empty:,}")
    return df


def read_columns(path, names):
    """Return a frame of strings: a CSV, JSON or UCI table's columns of these names, in any capitals."""
    content = Path(path).read_bytes()
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    text = decode(content, path, encoding).strip("\r\n")
    with reading(path, "is not a table of texts"):
        if text.startswith("{"):  # JSON lines: an array but for its brackets and commas
            text = "[" + re.sub(r"\n[ \t\r]*\{", ",\n{", text) + "]"
        if text.startswith("["):
            df = pd.DataFrame(json.loads(text), dtype=object)
        else:
            df = read_csv(text)
        df.columns = [str(column).strip().lower() for column in df]
        wanted = [name.lower() for name in names]
        if df.empty or sorted(df.columns[df.columns.isin(wanted)]) != sorted(wanted):
            raise ValueError(f"needed: rows, and different columns of the names {names}; found: the columns "
                             f"{list(df)!r:.150} and {len(df)} rows")
        df = df[wanted]
        is_cell = df.map(np.isscalar) & df.notna()  # JSON may hold lists and null
        wrong = df[~is_cell.all(axis=1)]
        if len(wrong) > 0:
            raise ValueError(f"row {wrong.index[0] + 1} lacks a text or number: {list(wrong.iloc[0])!r:.150}")

    def as_text(cell):  # JSON may hold NUL and half of a surrogate pair
        if isinstance(cell, float) and cell.is_integer():  # as pandas writes an integer column
            cell = int(cell)
        return str(cell).replace("\0", " ").encode(errors="replace").decode()

    return df.map(as_text)


def read_csv(text):
    """Return the frame of a CSV text, whose header shows the separator; UCI's form has no header."""
    if "\0" in text:
        raise ValueError("a binary file, such as Excel, zip or Parquet; export it as CSV in UTF-8")
    is_uci = text.startswith(("ham\t", "spam\t"))
    if is_uci:
        text = "label\ttext\n" + text
    separator = max("\t;,", key=re.match(r"[^\r\n]*", text)[0].count)
    csv.field_size_limit(2**31 - 1)
    # Default quoting, as in the chapter, merges some of UCI's messages: 5,572 rows, not 5,574.
    lines = csv.reader(io.StringIO(text + "\nEND", newline=""), delimiter=separator)
    rows = [row for row in lines if row == [""] or "".join(row).strip()]  # [""]: quotation marks alone
    header, *rows = rows
    if not rows or rows.pop() != ["END"]:  # which an open quotation mark swallows
        raise ValueError("empty, or a quotation mark is left open")
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise ValueError(f"row {number} has {len(row)} fields, its header {len(header)}: {row!r:.100}")
        if not is_uci and separator == "\t" and re.search("\n.*\t", "".join(row)):
            warnings.warn(f"row {number} spans lines; is a quotation mark open? {row!r:.80}")
    return pd.DataFrame(rows, columns=header)


def decode(content, source, encoding="utf-8"):
    """Return bytes as text: of this encoding, else of Windows-1252."""
    try:
        return content.decode(encoding).replace("\ufeff", "")  # byte order marks, also of files put together
    except UnicodeDecodeError:
        warnings.warn(f"{source} is not all UTF-8: this table, or line, is read as Windows-1252")
        return content.decode("cp1252", errors="replace")


def read_lines(stream, source):
    """Yield lists of the lines of a byte stream, each as soon as it has arrived."""
    rest, size = b"", 1 << 12
    for chunk in iter(lambda: stream.read1(size), b""):
        is_utf_16 = chunk.startswith((b"\xff\xfe", b"\xfe\xff")) and b"\0" in chunk
        is_packed = chunk.startswith((b"\x1f\x8b", b"PK\3\4"))  # gzip, zip
        if size == 1 << 12 and (is_utf_16 or is_packed):
            raise ValueError(f"{source} is packed or UTF-16; lines are read in UTF-8")
        size = 1 << 18  # after the first answers, which come soon, many at a time: it is faster
        *lines, rest = (rest + chunk).splitlines(keepends=True)
        if rest.endswith(b"\n"):  # "\r" may be half of "\r\n"
            lines.append(rest)
            rest = b""
        yield [decode(line.rstrip(b"\r\n"), source) for line in lines]
    if rest:
        yield [decode(rest.rstrip(b"\r"), source)]


def printable(text):
    """Replace control characters, and those that are invisible or turn the direction of text, by blanks."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069]", " ", text)


def download(urls, path, check):
    """Fetch `path` from the first of `urls` whose content `check(file)` accepts; resume what was cut off."""
    path = Path(path)
    if path.exists():  # saved by hand
        return check(path)
    urls = [urls] if isinstance(urls, str) else urls
    part = Path(f"{path}.part")
    failures, error_type = [], requests.ConnectionError  # if no server is reached
    for url in urls:
        for pause in (0, 1, 3):  # three attempts
            time.sleep(pause)
            start = part.stat().st_size if part.exists() else 0
            headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-"}
            response = None
            try:
                response = requests.get(url, headers=headers, stream=True, timeout=(5, 30))
                error_type = requests.RequestException
                response.raise_for_status()
                part.parent.mkdir(parents=True, exist_ok=True)
                total = response.raw.length_remaining
                file = part.open("ab" if response.status_code == 206 else "wb")  # 200: from the start
                with file, tqdm.wrapattr(file, "write", total, desc=path.name, disable=None) as target:
                    for chunk in response.iter_content(1 << 16):
                        target.write(chunk)
                check(part)
                return os.replace(part, path)
            except requests.RequestException as error:
                reason = getattr(error.response, "status_code", type(error).__name__)
                if reason == 416:  # the part is as long as the file, or longer
                    part.unlink(missing_ok=True)
            except ValueError as error:  # what came is not what was wanted
                part.unlink()
                reason = error
            if response is None or reason == 404:  # there is no use in trying again
                break
        failures.append(f"{requests.compat.urlsplit(url).netloc}: {reason}")
    raise error_type(f"cannot download {path.name} ({', '.join(failures)}); save {urls[0]} as {path} by hand")


def check_sha256(path, expected):
    """Raise ValueError unless the file has this SHA-256 (None: any)."""
    if expected is None:
        return  # without reading what may be 6 GB
    found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(f"SHA-256 of {path} is {found[:9]}, not {expected[:9]}: damaged, or another file")


@contextlib.contextmanager
def atomic_write(path):
    """Write to a temporary file and rename it on success."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def reading(path, problem):
    """Turn an error in what is read into one line of ValueError; an OSError says itself what it is."""
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError, AssertionError, EOFError, RuntimeError,
            zlib.error, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} {problem} ({reason:.200})") from error


# %% ---- Command line ----
HERE = Path(__file__).resolve().parent
TINY, SAMPLE = HERE / "weights" / "tiny.npz", HERE / "data" / "sample_sms.tsv"
OUT = HERE / "weights" / "spam_classifier"
RESULT_FILES = ("classifier.pth", "metrics.json", "train.csv", "validation.csv", "test.csv",
                "loss-plot.png", "accuracy-plot.png")


@first_process_first()
def find_model(name):
    """Return the file or folder that --model means; a size of GPT-2 is downloaded and converted once."""
    if name in MODEL_SIZES:
        return download_gpt2(name, HERE / "weights")
    if name != "auto":
        path = TINY if name == "tiny" else Path(name)
        if not path.exists():
            raise FileNotFoundError(f"no model {name!r}; choose {', '.join(MODEL_SIZES)}, tiny or a path")
        return path
    try:
        return download_gpt2("124M", HERE / "weights")
    except requests.ConnectionError:
        warnings.warn("no server with GPT-2 can be reached; using tiny.npz, a small GPT, not GPT-2")
        return TINY


@first_process_first()
def find_data(name):
    """Return the file that --data means; the SMS Spam Collection is downloaded once."""
    if name not in ("auto", "sms"):
        return SAMPLE if name == "sample" else Path(name)
    folder, path = HERE / "data", HERE / "data" / "SMSSpamCollection.tsv"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            download_and_unzip_spam_data(DATA_URLS, folder / "sms+spam+collection.zip", folder, path)
        return path
    except requests.ConnectionError:
        if name == "sms":
            raise
        warnings.warn("no server with the SMS data can be reached; using the invented sample_sms.tsv")
        return SAMPLE


def train_model(options, data_file, splits, class_weights):
    """Finetune as the command's options say; return (Classifier, results and settings, changes in words)."""
    name, device, chapter = options["model"], options["device"], finetune.__kwdefaults__
    given = {setting: options[setting] for setting in chapter if setting in options}
    # What is known of a model's cfg before it is downloaded, which is not worth it if a setting is wrong:
    cfg = {"emb_dim": MODEL_SIZES[name], "context_length": 1024} if name in MODEL_SIZES else {}
    check_settings(splits, cfg, **(chapter | given))
    model_file = find_model(name)
    model, tokenizer, own = load_pretrained(model_file)  # the bundled model has settings of its own
    settings = chapter | own | given
    changes = [f"{key} {value}" for key, value in settings.items() if value != chapter[key]]
    print(f"Model {model_file.name}, data {data_file.name}, device {device}")
    print(f"Changed from the chapter: {', '.join(changes) or 'nothing'}")
    print("Training / validation / test: {:,} / {:,} / {:,} messages".format(*map(len, splits)))
    counts = splits[0]["Label"].value_counts()[:10]  # the commonest
    print("Labels of training:", ", ".join(f"{label} {count:,}" for label, count in counts.items()))
    classifier, results = finetune(model, tokenizer, splits, class_weights, device, **settings)
    return classifier, results | settings, changes


def cmd_train(args):
    """Finetune GPT-2 on labelled texts; save classifier, splits, metrics and plots in one folder."""
    out = Path(args.out).resolve()
    existing = [out / name for name in RESULT_FILES if (out / name).exists()]
    for path in (args.data, args.test_data or ""):
        if Path(path).resolve() in [file.resolve() for file in existing]:
            raise ValueError(f"{path} would be replaced by a file in {out}; choose another --out")
    is_ours = any(out.glob("classifier.pth")) or any(out.glob(".classifier.pth.*.tmp"))  # of a killed run
    foreign = [path for path in existing if not (is_ours and path.is_file())]
    if foreign:
        raise ValueError(f"{foreign[0]} is not a file beside a classifier.pth; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()  # an error now, not after the training
    if args.plot:
        import matplotlib.pyplot  # noqa: F401, likewise
    columns = (args.text_column, args.label_column)
    test = read_messages(args.test_data, *columns) if args.test_data else None
    data_file = find_data(args.data)
    splits, class_weights = prepare_splits(read_messages(data_file, *columns), args.balance, test)
    classifier, results, _ = train_model(vars(args), data_file, splits, class_weights)
    if get_rank_and_world_size()[0] > 0:
        return
    # A classifier never stands beside the files of an earlier training: the old one goes first, the new one
    # comes last, as an ExitStack ends in reverse order.
    names = RESULT_FILES if args.plot else RESULT_FILES[:-2]
    with contextlib.ExitStack() as stack:
        classifier_path, metrics_path, *paths = [
            stack.enter_context(atomic_write(out / name)) for name in names]
        save_classifier(classifier_path, classifier)
        metrics_path.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
        for path, split in zip(paths, splits):
            split.to_csv(path, index=False, quoting=csv.QUOTE_ALL)  # else a lone "\r" ends a row
        save_plots(paths[3:], results)  # none without --plot
        for name in RESULT_FILES:
            (out / name).unlink(missing_ok=True)
    print(f"Saved; try: python gpt_spam.py classify --classifier {args.out} TEXT")


def save_plots(paths, results):
    """Save the plots of loss and accuracy as PNG files, with each value where it was measured."""
    examples_an_epoch = results["examples_seen"] / results["epochs"]
    epochs_seen = {"loss": np.array(results["steps"]) * results["batch_size"] / examples_an_epoch,
                   "accuracy": np.arange(results["epochs"]) + 1}
    for path, (label, epochs) in zip(paths, epochs_seen.items()):
        values = results[f"train_{label}"], results[f"val_{label}"]
        plot_values(epochs, epochs * examples_an_epoch, *values, label).savefig(path, format="png", dpi=150)


# The book's table, row by row: published test accuracy, what differs from the chapter. Its script does not
# divide LoRA's alpha by the rank: its alpha 16 and 8 at rank 16 are 256 and 128 here. Row 18's loss ignores
# the label 50256, which no message has: it is row 1 again.
EXPERIMENTS = [
    ("95.00%", {}),
    ("75.00%", {"token_pos": "first"}),
    ("72.00%", {"trainable_layers": "last_layer"}),
    ("98.33%", {"trainable_layers": "last_two_blocks"}),
    ("96.67%", {"trainable_layers": "all"}),
    ("84.67%", {"model": "355M"}),
    ("96.67%", {"model": "774M"}),
    ("98.33%", {"model": "1558M"}),
    ("98.67%", {"model": "1558M", "trainable_layers": "all"}),
    ("93.67%", {"init": "random", "trainable_layers": "all"}),
    ("96.67%", {"trainable_layers": "lora", "lora_rank": 16, "lora_alpha": 256}),
    ("98.33%", {"model": "1558M", "trainable_layers": "lora", "lora_rank": 16, "lora_alpha": 128}),
    ("78.33%", {"context_length": "model"}),
    ("98.00%", {"padding": False, "context_length": "model", "batch_size": 1}),
    ("98.33%", {"padding": False, "context_length": "model", "batch_size": 1, "accumulation_steps": 8}),
    ("98.33%", {"padding": False}),
    ("95.33%", {"causal_mask": False}),
    ("95.00%", {}),
    ("96.33%", {"token_pos": "mean"}),
]


def cmd_experiments(args):
    """Run the book's experiments; print a table with the published test accuracy beside ours."""
    data_file, balance = find_data(args.data), "auto"
    df = read_messages(data_file, args.text_column, args.label_column)
    if set(df["Label"]) == {"ham", "spam"}:  # the book's script shuffles once more than the chapter
        df, balance = create_balanced_dataset(df).sample(frac=1, random_state=123), "none"
    splits, class_weights = prepare_splits(df, balance)
    print("| Row | Changed | Training | Validation | Test | Published test |\n|---|---|---|---|---|---|")
    for row, (published, changes) in enumerate(EXPERIMENTS, 1):
        options = vars(args) | changes
        is_asked = row in args.rows if args.rows else options["model"] == args.model
        if is_asked:
            with contextlib.redirect_stdout(sys.stderr):
                print(f"Row {row}")
                _, results, in_words = train_model(options, data_file, splits, class_weights)
            changed = ", ".join([f"model {options['model']}", *in_words])
            accuracies = "{:.2%} | {:.2%} | {:.2%}".format(*results["final_accuracy"])
            print(f"| {row} | {changed} | {accuracies} | {published} |")


def cmd_evaluate(args):
    """Measure a classifier on the test split of its training, or on another table."""
    classifier = load_classifier(args.classifier, args.device)
    path = find_data(args.data or Path(args.classifier, "test.csv"))
    df = read_messages(path, args.text_column, args.label_column)
    check_labels(df, classifier.labels)
    accuracy, table, confusion = calc_metrics(df["Label"], classifier.predict(df["Text"]), classifier.labels)
    print(f"{path}: {len(df):,} messages, accuracy {accuracy:.2%}\n\n{table.round(4).to_string()}\n")
    print(f"Confusion matrix\n{confusion.to_string()}")


def cmd_classify(args):
    """Print label, probability and text, a line for each TEXT, or each line of a file or standard input."""
    if (args.texts and args.input) or (args.text_column and not args.input):
        raise ValueError("give texts or --input FILE, not both; --text-column is for a table: --input FILE")
    classifier = load_classifier(args.classifier, args.device)
    if args.texts:
        batches = [args.texts]
    elif not args.input:
        if sys.stdin.isatty():
            print("Type a text and press Enter; Ctrl-D ends.", file=sys.stderr)
        batches = read_lines(sys.stdin.buffer, "standard input")
    elif args.text_column or args.input.lower().endswith((".csv", ".tsv", ".json", ".jsonl")):
        batches = [read_columns(args.input, [args.text_column or "text"]).squeeze("columns")]
    else:
        batches = read_lines(open(args.input, "rb"), args.input)
    for texts in batches:
        best = classifier.predict_proba(texts).max(dim=-1)
        for text, i, probability in zip(texts, best.indices.tolist(), best.values.tolist()):
            if args.by_token:
                print_by_token(text, classifier)
            print(f"{classifier.labels[i]}\t{probability:.4f}\t{printable(text)}")


def print_by_token(text, classifier):
    """Print a line per token: the second of two labels, or the likeliest, and its probability so far."""
    ids = classifier.tokenizer.encode_ordinary(text[:900_000])[:classifier.max_length]
    beginnings = [ids[:end] for end in range(1, len(ids) + 1)]
    for token_id, row in zip(ids, classifier.predict_proba(beginnings)):
        token = repr(classifier.tokenizer.decode([token_id]))[1:-1]  # it may be a line break
        i = 1 if len(row) == 2 else row.argmax()
        print(f"{token:<15} {classifier.labels[i]} {row[i]:.4f} {'█' * round(20 * row[i].item())}".rstrip())


def add_settings(command, title, settings):
    """Add a group of options for settings of `finetune`; one that is not given stays out of the result."""
    group = command.add_argument_group(title)
    for name, (limit, meaning) in settings.items():
        default = finetune.__kwdefaults__[name]
        options = {"type": type(limit), "metavar": "N"}
        if name == "context_length":
            options["type"] = lambda text: int(text) if text.isdecimal() else text
        if isinstance(limit, tuple):
            options = {"choices": limit}
        if isinstance(default, bool):
            options = {"action": argparse.BooleanOptionalAction}
        group.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS,
                           help=f"{meaning} (default: {default})", **options)


def build_parser():
    """Return the parser; what several commands share is added in a loop over them."""
    parser = argparse.ArgumentParser(description="Finetune GPT-2 to classify texts, such as spam.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run, purpose, example in (
        ("train", cmd_train, "finetune GPT-2 on labelled texts", "--data reviews.csv --out reviews --plot"),
        ("experiments", cmd_experiments, "run the book's table of experiments", "--model tiny > table.md"),
        ("evaluate", cmd_evaluate, "measure a classifier on a table", "--data data/hard_sms.tsv"),
        ("classify", cmd_classify, "classify texts", "< messages.txt"),
    ):
        command = commands.add_parser(name, help=purpose, usage="%(prog)s [options]",
                                      epilog=f"example: python gpt_spam.py {name} {example}")
        command.set_defaults(run=run)
        command.add_argument("--device", default="auto", help="cpu, cuda, mps, auto (default)")
    train, experiments, evaluate, classify = commands.choices.values()

    add = train.add_argument
    add("--out", default=OUT, metavar="FOLDER", help="for all results (default: weights/spam_classifier)")
    add("--plot", action="store_true", help="draw loss and accuracy into that folder")
    add("--test-data", metavar="FILE", help="table to test on; without, a fifth of --data")
    add("--balance", default="auto", choices=BALANCES, help="default: undersample ham and spam, else weights")
    experiments.add_argument("--rows", nargs="+", type=int, metavar="N",
                             choices=range(1, len(EXPERIMENTS) + 1),
                             help=f"of the book's table, 1 to {len(EXPERIMENTS)}; without, those of --model")
    evaluate.add_argument("--data", metavar="FILE", help="sms, sample or a table; without, FOLDER/test.csv")
    classify.usage = "%(prog)s [options] [TEXT ...]"
    add = classify.add_argument
    add("texts", nargs="*", metavar="TEXT", help="text to classify; without, lines of standard input")
    add("--input", metavar="FILE", help="lines, or a table (.csv, .tsv, .json, .jsonl)")
    add("--text-column", metavar="NAME", help="column of a table's texts (default: text)")
    add("--by-token", action="store_true", help="show the probability after each token")

    for command in (train, experiments):
        add = command.add_argument_group("model and data").add_argument
        add("--data", default="auto", help="sms, sample, CSV, TSV, JSON, auto (default: sms, offline sample)")
        add("--model", default="auto", help="124M, 355M, 774M, 1558M, tiny, an .npz, a folder of OpenAI's "
                                            "files, auto (default: 124M, offline tiny)")
        add_settings(command, "hyperparameters, by default the chapter's", HYPERPARAMETERS)
    for command in (train, experiments, evaluate):
        add = command.add_argument_group("columns of a table").add_argument
        add("--text-column", default="text", metavar="NAME", help="column of texts (default: text)")
        add("--label-column", default="label", metavar="NAME", help="column of labels (default: label)")
    for add in (evaluate.add_argument, classify.add_argument):
        add("--classifier", default=OUT, metavar="FOLDER", help="of train (default: weights/spam_classifier)")
    add_settings(train, "the book's seven questions, which experiments answers", QUESTIONS)
    return parser


def main(argv=None):
    """Run a command; return its exit status, 2 after one line about what was wrong."""
    args = build_parser().parse_args(argv)
    warnings.formatwarning = lambda message, *rest: f"gpt_spam: warning: {printable(str(message))}\n"
    is_launched = torch.distributed.is_torchelastic_launched()  # by torchrun
    rank = int(os.environ["RANK"]) if is_launched else 0
    try:
        best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        if args.device not in ("auto", "cpu", best.type):
            raise ValueError(f"no device {args.device!r} here; auto takes {best.type}")
        args.device = best if args.device == "auto" else torch.device(args.device)
        if is_launched and args.run in (cmd_train, cmd_experiments):
            backend = "gloo"
            if args.device.type == "cuda":
                backend = "cpu:gloo,cuda:nccl"
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            torch.distributed.init_process_group(backend, timeout=timedelta(days=1))
            if rank > 0:  # only the first process prints
                sys.stdout = sys.stderr = open(os.devnull, "w")
        elif rank > 0:  # the first process answers alone
            return 0
        args.run(args)
        return 0
    except BrokenPipeError:  # such as `classify ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        if rank > 0:  # the first process has said it, and torchrun ends the others
            time.sleep(5)
        print(f"gpt_spam: error: {printable(str(error))}", file=sys.__stderr__)
        return 2
    finally:
        if torch.distributed.is_initialized():
            gc.collect()  # else objects that still hold the group end the interpreter with SIGABRT
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    gc.freeze()  # else the exit spends 0.5 s on the imported modules
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    sys.exit(main())
