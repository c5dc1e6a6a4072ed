# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "tiktoken==0.14.0", "numpy", "pandas", "tqdm"]
# ///
"""Pretrain the bundled model, weights/tiny.npz, from plain text files: tokenizer first, then the GPT.

    python weights/pretrain_tiny.py corpus/*.txt

Needs about an hour on 2 cores. Stopped, it resumes from its last saved state when started again.
The model is gpt_spam's GPTModel; weights/README.md is its model card.
"""

import argparse
import hashlib
import json
import math
import random
import re
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

CONFIG = {"vocab_size": 4096, "context_length": 256, "emb_dim": 256, "n_heads": 8, "n_layers": 4, "drop_rate": 0.1,
          "qkv_bias": True}
# What suits this model when it is finetuned; kept in the .npz, where `train` finds it.
FINETUNE = {"lr": 1e-3, "schedule": "linear"}
NOT_A_TARGET = -100  # cross-entropy's ignore_index
SEGMENT = 500        # steps between two saved states


def train_bpe(texts, vocab_size):
    """Return OpenAI's two tokenizer files, as strings, for a byte-level BPE of `vocab_size` ids.

    Merges the most frequent neighbours again and again (Sennrich et al. 2016), words cut as GPT-2 cuts them.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = printable + [b for b in range(256) if b not in printable]
    character = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(order[len(printable):])}
    words = Counter()
    for text, weight in texts:
        for word in regex.findall(gpt_spam.r50k_pat_str, text):
            words[word] += weight
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


def make_ids(texts, tokenizer):
    """Return all texts as one tensor of ids, an end of text before each."""
    encoded = tokenizer.encode_ordinary_batch(texts, num_threads=2)
    return torch.tensor([i for ids in encoded for i in [tokenizer.eot_token, *ids]])


def make_stream(documents, tokenizer, rng):
    """Return the ids of all passages, shuffled and with fresh noise."""
    texts = [as_typed_on_a_phone(text, rng) for text in documents]
    rng.shuffle(texts)
    return make_ids(texts, tokenizer)


def message_window(messages, tokenizer, tokens, rng):
    """Return (tokens + 1,) ids of messages of one label, each followed by one end of text or by a run of them.

    A run is what padding looks like in finetuning. As the next message is of the same label, what the model predicts
    at the end of a run depends on what the message before it was: the last position learns to sum up.
    """
    same, ids = rng.choice(messages), []
    while len(ids) <= tokens:
        text = rng.choice(same)
        if rng.random() < 0.5:
            text = as_typed_on_a_phone(text, rng)
        if rng.random() < 0.5:
            text = re.sub(r"\d", lambda _: str(rng.randrange(10)), text)
        run = 1 if rng.random() < 0.5 else rng.randrange(1, 160)
        ids += tokenizer.encode_ordinary(text) + [tokenizer.eot_token] * run
    return torch.tensor(ids[:tokens + 1])


def init_weights(model):
    """GPT-2's: normal with deviation 0.02, less where a block adds to its shortcut; the head is tied."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            shrink = math.sqrt(2 * model.cfg["n_layers"]) if name.endswith(("out_proj.weight", "layers.2.weight")) else 1
            torch.nn.init.normal_(p, std=0.02 / shrink)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)
    model.out_head.weight = model.tok_emb.weight


def make_batch(stream, messages, tokenizer, args, step):
    """Return (ids, next ids), (rows, tokens) each: random windows of the books, and some of messages.

    Depends on the step alone, so that a run that went on after a break equals one without.
    """
    rng, tokens, rows = random.Random(f"{args.seed} {step}"), CONFIG["context_length"], []
    for row in range(args.batch_size):
        start = rng.randrange(len(stream) - tokens)
        rows.append(message_window(messages, tokenizer, tokens, rng) if row < args.message_rows
                    else stream[start:start + tokens + 1])
    ids, targets = torch.stack(rows)[:, :-1], torch.stack(rows)[:, 1:].clone()
    targets[(ids == tokenizer.eot_token) & (targets == tokenizer.eot_token)] = NOT_A_TARGET  # how long a run is
    return ids, targets


def lm_loss(model, ids, targets):
    """Cross-entropy of the next token, in nats."""
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=NOT_A_TARGET)


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
    parser.add_argument("--messages", nargs="+", type=Path, default=[HERE / "messages.tsv"], help="labelled messages")
    parser.add_argument("--sample", type=Path, default=HERE.parent / "data" / "sample_sms.tsv",
                        help="labelled messages whose training part is read, too")
    parser.add_argument("--out", type=Path, default=HERE / "tiny.npz")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch-size", type=int, default=16, help="windows of 256 tokens a step")
    parser.add_argument("--message-rows", type=int, default=6, help="how many of them hold messages")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=123)
    args = parser.parse_args()

    documents, held_out = read_documents(args.texts)
    (sample, sample_validation, _), _ = gpt_spam.prepare_splits(gpt_spam.read_messages(args.sample))
    frames = [*map(gpt_spam.read_messages, args.messages), sample]
    messages = [[text for frame in frames for text in frame["Text"][frame["Label"] == label]]
                for label in ("ham", "spam")]
    state_file = args.out.with_suffix(".state.pt")
    state = torch.load(state_file, weights_only=True) if state_file.exists() else None
    if state:
        encoder, merges = state["encoder"], state["merges"]
    else:
        print("training the tokenizer", flush=True)
        weighted = [(d, 1) for d in documents] + [(text, 3) for same in messages for text in same]
        encoder, merges = train_bpe(weighted, CONFIG["vocab_size"])
    tokenizer = gpt_spam.build_tokenizer(encoder)
    validation = {"books": make_ids(held_out, tokenizer),
                  "messages": make_ids(sample_validation["Text"].tolist(), tokenizer)}

    torch.manual_seed(args.seed)
    model = gpt_spam.GPTModel(CONFIG)
    init_weights(model)
    for block in model.trf_blocks:
        block.att.dropout = 0.0  # costs more time than all the rest: it turns the fast attention off
    blocks = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("trf_blocks")]
    embeddings = [model.tok_emb.weight, model.pos_emb.weight]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizers = [torch.optim.Muon(blocks, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW([{"params": embeddings}, {"params": vectors, "weight_decay": 0.0}],
                                    lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)]
    step = 0
    if state:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        step = state["step"]
        print(f"resuming from step {step}", flush=True)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {sum(map(len, messages)):,} messages; "
          f"validation tokens: {', '.join(f'{name} {len(ids):,}' for name, ids in validation.items())}", flush=True)
    started, first = time.time(), step
    while step < args.steps:
        torch.manual_seed(args.seed + step)  # dropout does not depend on a break before it
        stream = make_stream(documents, tokenizer, random.Random(args.seed + step))
        for _ in range(min(SEGMENT, args.steps - step)):
            warm, left = (step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
            with torch.autocast("cpu", torch.bfloat16):
                loss = lm_loss(model, *make_batch(stream, messages, tokenizer, args, step))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * min(warm, left)
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            if step % 50 == 0:
                pace = (time.time() - started) / (step - first)
                print(f"step {step}/{args.steps}: loss {loss:.3f}, {pace:.2f} s a step, "
                      f"{(args.steps - step) * pace / 60:.0f} min left", flush=True)
        losses = {name: validate(model, ids, CONFIG["context_length"]) for name, ids in validation.items()}
        print("validation " + ", ".join(f"{name} {value:.3f}" for name, value in losses.items()), flush=True)
        with gpt_spam.atomic_write(state_file) as temporary:
            torch.save({"encoder": encoder, "merges": merges, "model": model.state_dict(), "step": step,
                        "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, temporary)

    arrays = {name: p.numpy().astype(np.float16) for name, p in model.state_dict().items() if name != "out_head.weight"}
    hparams = {"n_vocab": CONFIG["vocab_size"], "n_ctx": CONFIG["context_length"], "n_embd": CONFIG["emb_dim"],
               "n_head": CONFIG["n_heads"], "n_layer": CONFIG["n_layers"]}
    texts = {"hparams.json": json.dumps(hparams), "encoder.json": encoder, "vocab.bpe": merges,
             "about.json": json.dumps({"name": "tiny", "finetune": FINETUNE})}
    arrays |= {name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}
    with gpt_spam.atomic_write(args.out) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    loaded, _, _ = gpt_spam.load_pretrained(args.out)
    sha256 = hashlib.sha256(args.out.read_bytes()).hexdigest()
    print(f"{args.out}: {args.out.stat().st_size:,} bytes, SHA-256 {sha256}")
    for name, ids in validation.items():
        loss = validate(loaded, ids, CONFIG["context_length"])
        print(f"validation loss on {name} {loss:.3f}, perplexity {math.exp(loss):.1f}")
    print(f"{step * args.batch_size * CONFIG['context_length']:,} tokens seen")
    state_file.unlink()


if __name__ == "__main__":
    main()
