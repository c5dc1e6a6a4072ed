# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "tiktoken==0.14.0", "numpy>=1.26", "requests>=2.31", "pandas>=2.1", "tqdm"]
# ///
"""Pretrain the bundled model, weights/tiny.npz, from plain text files: tokenizer first, then the GPT.

    python weights/pretrain_tiny.py corpus/*.txt

Needs about an hour on 2 cores. Stopped, it goes on from its last saved state when started again.
The model is gpt_spam's GPTModel; weights/README.md is its model card.
"""

import argparse
import json
import math
import random
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import gpt_spam  # noqa: E402

CONFIG = gpt_spam.GPTConfig(vocab_size=4096, context_length=256, emb_dim=256, n_heads=8, n_layers=4, drop_rate=0.1)
# What suits this model when it is finetuned; kept in the .npz, where `train` finds it.
FINETUNE = {"lr": 5e-4, "warmup": 0.1, "decay": True}
MESSAGE_REPEATS = 8  # each bundled message stands this often in an epoch: 1,068 of them, the books' 1.7 M tokens


def train_bpe(texts, vocab_size):
    """Return OpenAI's two tokenizer files, as strings, for a byte-level BPE of `vocab_size` ids.

    Merges the most frequent neighbours again and again (Sennrich et al. 2016), words cut as GPT-2 cuts them.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = printable + [b for b in range(256) if b not in printable]
    character = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(order[len(printable):])}
    words = Counter(word for text, weight in texts for word in regex.findall(gpt_spam.GPT2_SPLIT, text) for _ in range(weight))
    pieces = [[character[b] for b in word.encode()] for word in words]
    counts = list(words.values())
    pairs, where = Counter(), defaultdict(set)
    for i, piece in enumerate(pieces):
        for pair in zip(piece, piece[1:]):
            pairs[pair] += counts[i]
            where[pair].add(i)
    merges = []
    while len(merges) < vocab_size - 257:  # 256 bytes and the end of text
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for i in where.pop(best):
            old, new, at = pieces[i], [], 0
            while at < len(old):
                both = tuple(old[at:at + 2]) == best
                new.append("".join(best) if both else old[at])
                at += 2 if both else 1
            for pair in zip(old, old[1:]):
                pairs[pair] -= counts[i]
            for pair in zip(new, new[1:]):
                pairs[pair] += counts[i]
                where[pair].add(i)
            pieces[i] = new
        del pairs[best]
    tokens = [character[b] for b in order] + ["".join(pair) for pair in merges] + [gpt_spam.END_OF_TEXT]
    if len(set(tokens)) != vocab_size:
        raise ValueError("two merges make the same token")
    encoder = json.dumps({token: i for i, token in enumerate(tokens)})
    return encoder, "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)


def read_documents(files, seed=123):
    """Return (training, validation) lists of passages of a few paragraphs; every 40th is for validation."""
    passages = []
    for file in files:
        paragraphs = [line.strip() for line in Path(file).read_text("utf-8").split("\n") if line.strip()]
        while paragraphs:
            take = 1 + len(passages) % 6  # 1 to 6 paragraphs: a message is short, too
            passages.append("\n".join(paragraphs[:take]))
            del paragraphs[:take]
    held = set(range(0, len(passages), 40))
    return [p for i, p in enumerate(passages) if i not in held], [passages[i] for i in held]


def as_typed_on_a_phone(text, rng):
    """Leave most passages as printed; write some without capitals or apostrophes, a few all in capitals."""
    draw = rng.random()
    if draw < 0.2:
        text = text.lower()
    elif draw < 0.25:
        text = text.upper()
    return text.replace("'", "") if rng.random() < 0.15 else text


def make_stream(documents, messages, tokenizer, seed):
    """Return one epoch as a tensor of ids: passages and messages shuffled, an end of text before each."""
    rng = random.Random(seed)
    texts = [as_typed_on_a_phone(text, rng) for text in documents] + messages * MESSAGE_REPEATS
    rng.shuffle(texts)
    encoded = tokenizer.encode_ordinary_batch(texts, num_threads=2)
    return torch.tensor([i for ids in encoded for i in [tokenizer.eot_token, *ids]])


def init_weights(model):
    """GPT-2's: normal with deviation 0.02, less where a block adds to its shortcut; the head is tied."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            shrink = math.sqrt(2 * model.cfg.n_layers) if name.endswith(("out_proj.weight", "layers.2.weight")) else 1
            torch.nn.init.normal_(p, std=0.02 / shrink)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)
    model.out_head.weight = model.tok_emb.weight


def batches(stream, rows, tokens, generator):
    """Yield (ids, next ids) of an epoch in random order: (rows, tokens) each."""
    start = int(torch.randint(tokens, (1,), generator=generator))
    windows = stream[start:start + (len(stream) - start - 1) // tokens * tokens + 1]
    ids, targets = windows[:-1].view(-1, tokens), windows[1:].view(-1, tokens)
    for pick in torch.randperm(len(ids), generator=generator).split(rows):
        if len(pick) == rows:
            yield ids[pick], targets[pick]


def lm_loss(model, ids, targets):
    """Cross-entropy of the next token, in nats."""
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


@torch.no_grad()
def validate(model, stream, tokens):
    """Mean loss over the whole validation stream."""
    model.eval()
    ids = stream[:len(stream) - 1 - (len(stream) - 1) % tokens].view(-1, tokens)
    targets = stream[1:1 + ids.numel()].view(-1, tokens)
    losses = [lm_loss(model, i, t) * len(i) for i, t in zip(ids.split(32), targets.split(32))]
    model.train()
    return float(sum(losses) / len(ids))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("texts", nargs="+", type=Path, help="plain text files, one paragraph a line")
    parser.add_argument("--messages", type=Path, default=HERE.parent / "data" / "sample_sms.tsv",
                        help="labelled messages; their training part is read, without the labels")
    parser.add_argument("--out", type=Path, default=HERE / "tiny.npz")
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--batch-size", type=int, default=16, help="windows of 256 tokens a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=123)
    args = parser.parse_args()

    documents, held_out = read_documents(args.texts)
    messages = gpt_spam.prepare_splits(gpt_spam.read_messages(args.messages))[0][0]["Text"].tolist()
    state_file = args.out.with_suffix(".state.pt")
    state = torch.load(state_file, weights_only=True) if state_file.exists() else None
    if state:
        encoder, merges = state["encoder"], state["merges"]
    else:
        print("training the tokenizer", flush=True)
        encoder, merges = train_bpe([(d, 1) for d in documents] + [(m, MESSAGE_REPEATS) for m in messages], CONFIG.vocab_size)
    tokenizer = gpt_spam.build_tokenizer(encoder, merges)
    validation = torch.tensor([i for text in held_out for i in [tokenizer.eot_token, *tokenizer.encode_ordinary(text)]])

    torch.manual_seed(args.seed)
    model = gpt_spam.GPTModel(CONFIG)
    init_weights(model)
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    step, epoch, history = 0, 0, []
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, epoch, history = state["step"], state["epoch"], state["history"]
        print(f"going on from step {step}", flush=True)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(validation):,} validation tokens", flush=True)
    started, first = time.time(), step
    while step < args.steps:
        torch.manual_seed(args.seed + epoch)  # an epoch's windows and dropout do not depend on a break before it
        stream = make_stream(documents, messages, tokenizer, args.seed + epoch)
        for ids, targets in batches(stream, args.batch_size, CONFIG.context_length, torch.Generator().manual_seed(epoch)):
            if step == args.steps:
                break
            warm, left = (step + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(warm, left)
            with torch.autocast("cpu", torch.bfloat16):
                loss = lm_loss(model, ids, targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 50 == 0:
                pace = (time.time() - started) / (step - first)
                print(f"step {step}/{args.steps}, epoch {epoch + 1}: loss {loss:.3f}, {pace:.2f} s a step, "
                      f"{(args.steps - step) * pace / 60:.0f} min left", flush=True)
        epoch += 1
        history.append({"step": step, "val_loss": validate(model, validation, CONFIG.context_length)})
        print(f"epoch {epoch}: {len(stream):,} tokens, validation loss {history[-1]['val_loss']:.3f}", flush=True)
        with gpt_spam.atomic_write(state_file) as temporary:
            torch.save({"encoder": encoder, "merges": merges, "model": model.state_dict(), "step": step, "epoch": epoch,
                        "optimizer": optimizer.state_dict(), "history": history}, temporary)

    arrays = {name: p.numpy().astype(np.float16) for name, p in model.state_dict().items() if name != "out_head.weight"}
    hparams = {"n_vocab": CONFIG.vocab_size, "n_ctx": CONFIG.context_length, "n_embd": CONFIG.emb_dim,
               "n_head": CONFIG.n_heads, "n_layer": CONFIG.n_layers}
    texts = {"hparams.json": json.dumps(hparams).encode(), "encoder.json": encoder.encode(), "vocab.bpe": merges.encode()}
    about = {"name": "tiny", "note": "bundled tiny model: figures are not GPT-2's", "finetune": FINETUNE}
    gpt_spam.save_pretrained(args.out, arrays, texts, about, np.savez_compressed)
    loaded, _ = gpt_spam.load_pretrained(args.out)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes, SHA-256 {gpt_spam.file_sha256(args.out)}")
    val = validate(loaded, validation, CONFIG.context_length)
    print(f"validation loss {val:.3f}, perplexity {math.exp(val):.1f}, {step * args.batch_size * CONFIG.context_length:,} tokens seen")


if __name__ == "__main__":
    main()
