"""CLIP in one file: two transformers that learn to put a photo and its caption at the same place.

    python clip.py --data shapes     drawn scenes, nothing downloaded: under 3 minutes on two CPU cores
    python clip.py --epochs 55       ViT-B/16 from scratch on Flickr30k, on a GPU

Both write runs/NAME/: the log, the learning curve, a retrieval picture and a model that `CLIP.load` opens.
The paper is Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"
(arXiv:2103.00020). Module names are those of Hugging Face's CLIPModel, so released weights load unchanged.

Shapes: B pairs in a batch, T tokens of a caption (or patches of a photo, plus one), C channels of a tower,
H heads, D = C / H channels of a head, P pixels on the side of a patch, E channels of the shared embedding.
"""
import argparse
import csv
import json
import math
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from data import InputError

# ---------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------


@dataclass
class TowerConfig:
    """The size of one transformer, in Hugging Face's names."""
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int


@dataclass
class CLIPConfig:
    """All that defines a CLIP; the defaults are ViT-B/16 as released, but for the text tower and GELU.

    causal: False is a BERT-style text tower, in which every token sees the whole caption; True is OpenAI's,
    in which a token sees what stands before it. hidden_act: "gelu" or OpenAI's "quick_gelu".
    """
    vision: TowerConfig = field(default_factory=lambda: TowerConfig(768, 12, 12, 3072))
    text: TowerConfig = field(default_factory=lambda: TowerConfig(512, 12, 8, 2048))
    image_size: int = 224
    patch_size: int = 16
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    projection_dim: int = 512
    hidden_act: str = "gelu"
    causal: bool = False


PRESETS = {
    "ViT-B/16": CLIPConfig(),
    "tiny": CLIPConfig(vision=TowerConfig(128, 4, 4, 512), text=TowerConfig(128, 3, 4, 512),
                       image_size=48, patch_size=8, projection_dim=128),
}


class Attention(nn.Module):
    """Multi-head self-attention: softmax(Q K^T / sqrt(D)) V in each of H heads (Vaswani et al. 2017, eq. 1).

    Row t of the softmax says how much token t takes from every other token. Where `mask` is False, Q K^T
    is set to minus infinity, so that the weight is exactly 0.
    """

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        # One Linear each, not one for all three, nor nn.MultiheadAttention, whose hidden in_proj weight LoRA
        # can't replace: adapters then end up on out_proj alone, silently (peft #761).
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, mask=None):
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, -1).transpose(1, 2)               # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.num_heads, -1).transpose(1, 2)               # (B, H, T, D)
        v = self.v_proj(x).view(B, T, self.num_heads, -1).transpose(1, 2)               # (B, H, T, D)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)                     # (B, H, T, D)
        return self.out_proj(x.transpose(1, 2).reshape(B, T, C))


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), OpenAI's approximation of GELU. Weights trained with one lose accuracy with the
    other and nothing complains (open_clip #771), so the choice is stored with the model."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


class MLP(nn.Module):
    """Two Linears with an activation between, applied to each token on its own."""

    def __init__(self, config, hidden_act):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation_fn = ACTIVATIONS[hidden_act]()
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: the residual stream x itself is never normalised, only what is read
    from it, which is what lets deep stacks train without tricks (Xiong et al. 2020, arXiv:2002.04745)."""

    def __init__(self, config, hidden_act):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config, hidden_act)

    def forward(self, x, mask=None):
        x = x + self.self_attn(self.layer_norm1(x), mask)
        x = x + self.mlp(self.layer_norm2(x))
        return x


class Encoder(nn.Module):
    """A stack of blocks, the same for photos and captions."""

    def __init__(self, config, hidden_act):
        super().__init__()
        self.layers = nn.ModuleList(Block(config, hidden_act) for _ in range(config.num_hidden_layers))

    def forward(self, x, mask=None):
        for layer in self.layers:
            x = layer(x, mask)
        return x


class VisionEmbeddings(nn.Module):
    """A photo to tokens: one for each P x P patch, and before them the class token, which has no pixels of
    its own and gathers what the blocks find."""

    def __init__(self, config):
        super().__init__()
        C, P = config.vision.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(C))
        self.patch_embedding = nn.Conv2d(3, C, kernel_size=P, stride=P, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // P) ** 2 + 1, C)

    def forward(self, pixels):
        B, _, height, width = pixels.shape
        P = self.patch_embedding.kernel_size[0]
        # A convolution that never overlaps is one Linear on each flattened patch, and runs faster as that.
        patches = pixels.view(B, 3, height // P, P, width // P, P).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = F.linear(patches, self.patch_embedding.weight.flatten(1))                   # (B, T - 1, C)
        x = torch.cat([self.class_embedding.expand(B, 1, -1).to(x.dtype), x], dim=1)    # (B, T, C)
        return x + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al. 2020, arXiv:2010.11929): photos (B, 3, S, S) to pooled features (B, C)."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        # OpenAI's extra norm before the first block. The name lost an "e" in Hugging Face's first port and
        # is now in every released checkpoint, so it can't be mended.
        self.pre_layrnorm = nn.LayerNorm(config.vision.hidden_size)
        self.encoder = Encoder(config.vision, config.hidden_act)
        self.post_layernorm = nn.LayerNorm(config.vision.hidden_size)

    def forward(self, pixels):
        x = self.embeddings(pixels)                                                     # (B, T, C)
        x = self.pre_layrnorm(x)
        x = self.encoder(x)
        return self.post_layernorm(x[:, 0])                                             # (B, C): the class token


class TextEmbeddings(nn.Module):
    """Token ids (B, T) to vectors (B, T, C): what the token is, plus where it stands."""

    def __init__(self, config):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.text.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.text.hidden_size)

    def forward(self, ids):
        return self.token_embedding(ids) + self.position_embedding.weight[:ids.shape[1]]


class TextTransformer(nn.Module):
    """Captions (B, T), each `<start> words <end> padding`, to pooled features (B, C) of their end token."""

    def __init__(self, config):
        super().__init__()
        self.causal, self.eos_token_id = config.causal, config.eos_token_id
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config.text, config.hidden_act)
        self.final_layer_norm = nn.LayerNorm(config.text.hidden_size)

    def forward(self, ids):
        B, T = ids.shape
        # The first end token. Padding repeats it, and argmax returns the first of equals. OpenAI's code says
        # ids.argmax(), which is the same because the end token has the largest id (openai/CLIP #217).
        end = (ids == self.eos_token_id).int().argmax(dim=-1)                           # (B,)
        position = torch.arange(T, device=ids.device)
        if self.causal:
            # Padding stands after the end token, where nothing that is read can see it: no padding mask.
            mask = position[:, None] >= position                                        # (T, T)
        else:
            mask = (position <= end[:, None])[:, None, None]                            # (B, 1, 1, T)
        x = self.embeddings(ids)                                                        # (B, T, C)
        x = self.encoder(x, mask)
        x = self.final_layer_norm(x)
        return x[torch.arange(B, device=ids.device), end]                               # (B, C)


class CLIP(nn.Module):
    """Two towers and a temperature; `forward` is figure 3 of the paper.

    >>> model = CLIP(CLIPConfig())
    >>> model.encode_image(pixels)      # (B, 3, S, S) normalised pixels -> (B, E), each of length 1
    >>> model.encode_text(ids)          # (B, T) token ids, T <= 77      -> (B, E), each of length 1
    >>> model(pixels, ids)              # logits_per_image (B, B): scale x cosine of photo i and caption j
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config)
        self.text_model = TextTransformer(config)
        self.visual_projection = nn.Linear(config.vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))
        init_weights(self)

    def encode_image(self, pixels):
        """Photos (B, 3, S, S), normalised as in data.normalize, to unit vectors (B, E) in fp32."""
        return F.normalize(self.visual_projection(self.vision_model(pixels)).float(), dim=-1)

    def encode_text(self, ids):
        """Token ids (B, T) with an end token in each row to unit vectors (B, E) in fp32."""
        return F.normalize(self.text_projection(self.text_model(ids)).float(), dim=-1)

    def similarity(self, image_embeds, text_embeds):
        """exp(logit_scale) x cosine: (B, E) and (B', E) to logits (B, B'). In fp32 even under autocast:
        at a scale of 100, bf16 would round the logits to steps of a half."""
        with torch.autocast(image_embeds.device.type, enabled=False):
            return self.logit_scale.exp() * image_embeds @ text_embeds.T

    def forward(self, pixels, ids):
        """B photos and B captions to logits_per_image (B, B); its transpose is logits_per_text."""
        image_embeds = self.encode_image(pixels)                                        # (B, E)
        text_embeds = self.encode_text(ids)                                             # (B, E)
        return self.similarity(image_embeds, text_embeds)                               # (B, B)

    @classmethod
    def load(cls, run_dir, checkpoint="best.pt"):
        """The model of a run of this file, in eval mode on the CPU. Raises InputError where it can't."""
        try:
            config = json.loads((Path(run_dir) / "config.json").read_text())["model"]
            tower = {name: TowerConfig(**config.pop(name)) for name in ("vision", "text")}
            model = cls(CLIPConfig(**config, **tower))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{run_dir} is no run of clip.py: {error}") from error
        model.load_state_dict(load_checkpoint(Path(run_dir) / checkpoint)["model"])
        return model.eval()


@torch.no_grad()
def init_weights(model):
    """Every starting value, in place. The scales are those of openai/CLIP model.py:initialize_parameters,
    there for the text tower only. (Hugging Face exchanges two of them: it gives q, k and v the smaller
    scale that belongs to the Linears that write into the residual stream.)"""
    for tower, config in ((model.vision_model, model.config.vision), (model.text_model, model.config.text)):
        # 2 L layers write into the residual stream; this keeps its variance from growing with depth (GPT-2).
        residual_std = config.hidden_size ** -0.5 * (2 * config.num_hidden_layers) ** -0.5
        for layer in tower.encoder.layers:
            nn.init.normal_(layer.self_attn.q_proj.weight, std=config.hidden_size ** -0.5)
            nn.init.normal_(layer.self_attn.k_proj.weight, std=config.hidden_size ** -0.5)
            nn.init.normal_(layer.self_attn.v_proj.weight, std=config.hidden_size ** -0.5)
            nn.init.normal_(layer.self_attn.out_proj.weight, std=residual_std)
            nn.init.normal_(layer.mlp.fc1.weight, std=(2 * config.hidden_size) ** -0.5)
            nn.init.normal_(layer.mlp.fc2.weight, std=residual_std)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):                       # LayerNorms keep PyTorch's weight 1 and bias 0
            nn.init.zeros_(parameter)
    vision, text = model.vision_model.embeddings, model.text_model.embeddings
    nn.init.normal_(vision.class_embedding, std=model.config.vision.hidden_size ** -0.5)
    nn.init.normal_(vision.position_embedding.weight, std=model.config.vision.hidden_size ** -0.5)
    nn.init.normal_(vision.patch_embedding.weight, std=(3 * model.config.patch_size ** 2) ** -0.5)  # 1 / sqrt(fan in)
    nn.init.normal_(text.token_embedding.weight, std=0.02)
    nn.init.normal_(text.position_embedding.weight, std=0.01)
    nn.init.normal_(model.visual_projection.weight, std=model.config.vision.hidden_size ** -0.5)
    nn.init.normal_(model.text_projection.weight, std=model.config.text.hidden_size ** -0.5)
    # The temperature 0.07 as the logarithm of its inverse. exp(0.07) instead, a common slip, starts at a scale
    # of 1.07: the logits are then all but equal and training crawls at chance.
    nn.init.constant_(model.logit_scale, math.log(1 / 0.07))


def contrastive_loss(logits_per_image):
    """Mean of two cross-entropies over logits (B, B): for each photo the right caption is the one of its own
    row, for each caption the right photo is that of its own column. Chance is ln B (4.85 for 128: a loss
    that stays there has learnt nothing). Two equal photos in a batch would be each other's negatives."""
    labels = torch.arange(len(logits_per_image), device=logits_per_image.device)
    loss_image = F.cross_entropy(logits_per_image.float(), labels)
    loss_text = F.cross_entropy(logits_per_image.float().T, labels)
    return (loss_image + loss_text) / 2


def recall_at_k(similarity, caption_owner, ks=(1, 5, 10)):
    """Retrieval recall as published for Flickr30k, both ways.

    similarity (photos, captions); caption_owner (captions,): the photo that each caption describes.
    Returns {"text_to_image": {k: fraction}, "image_to_text": {k: fraction}}: how often a caption's photo is
    among its k best photos, and how often any of a photo's captions is among its k best captions. A tie
    counts against the model, and so does NaN: constant similarities score 0, not 100 %.
    """
    photos, captions = similarity.shape
    own = caption_owner == torch.arange(photos, device=similarity.device)[:, None]      # (photos, captions)
    right_photo = similarity[caption_owner, torch.arange(captions, device=similarity.device)]
    best_caption = similarity.masked_fill(~own, -torch.inf).amax(dim=1)
    # The rank of the right answer is the number of wrong ones that are not strictly below it.
    text_rank = (~(similarity < right_photo) & ~own).sum(dim=0)                         # (captions,)
    image_rank = (~(similarity < best_caption[:, None]) & ~own).sum(dim=1)              # (photos,)
    return {"text_to_image": {k: (text_rank < k).float().mean().item() for k in ks},
            "image_to_text": {k: (image_rank < k).float().mean().item() for k in ks}}


# ---------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------


@contextmanager
def evaluating(model):
    """No dropout, no graph, bf16 on CUDA; afterwards the model is as it was."""
    training, device = model.training, model.logit_scale.device
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        yield device
    model.train(training)


def embed(model, split, batch_size=250):
    """All photos and captions of a split: (N, E) and (C, E) on the model's device."""
    with evaluating(model) as device:
        images = [model.encode_image(data.normalize(split.take(rows, device)))
                  for rows in torch.arange(len(split.photos)).split(batch_size)]
        texts = [model.encode_text(split.tokens(rows, device))
                 for rows in torch.arange(len(split.captions)).split(4 * batch_size)]
    return torch.cat(images), torch.cat(texts)


def evaluate(model, split, group=64):
    """The numbers of one split: its loss and its recalls in percent, {"loss", "t2i_r1", ..., "i2t_r10"}.

    The loss is over fixed groups of 64 photos with one caption each, for each of five captions: so it
    compares across batch sizes, and chance is ln 64 = 4.159. Photos that fill no group are left out.
    """
    images, texts = embed(model, split)
    owner = split.owner.to(images.device)
    first, count = torch.searchsorted(owner, torch.arange(len(images), device=owner.device)), owner.bincount()
    group, losses = min(group, len(images)), []
    for turn in range(5):
        chosen = texts[first + turn % count]                                            # (N, E)
        for start in range(0, len(images) - group + 1, group):
            rows = slice(start, start + group)
            losses.append(contrastive_loss(model.similarity(images[rows], chosen[rows]).detach()))
    recall = recall_at_k(images @ texts.T, owner)
    row = {"loss": torch.stack(losses).mean().item()}
    row |= {f"t2i_r{k}": 100 * fraction for k, fraction in recall["text_to_image"].items()}
    return row | {f"i2t_r{k}": 100 * fraction for k, fraction in recall["image_to_text"].items()}


def describe(row):
    """An evaluation in one line."""
    recalls = [" ".join(f"{row[f'{way}_r{k}']:5.1f}" for k in (1, 5, 10)) for way in ("t2i", "i2t")]
    return f"loss {row['loss']:.4f}  R@1/5/10 text->image {recalls[0]}  image->text {recalls[1]}"


def rsum(row):
    """The sum of the six recalls, the usual yardstick, picks the best epoch. Not the loss: it also measures
    how sure the model is of itself, and rises by overconfidence while recall still rises (open_clip #811)."""
    return sum(value for name, value in row.items() if "_r" in name)


# ---------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------


def make_optimizer(model, lr, weight_decay):
    """AdamW with OpenAI's betas. Decay pulls towards zero, which is a sensible prior for the matrices of a
    Linear but not for norms, biases, embeddings or the logit scale."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = {name for name, p in trainable.items() if p.ndim >= 2 and "embedding" not in name}
    groups = [{"params": [p for name, p in trainable.items() if name in decayed], "weight_decay": weight_decay},
              {"params": [p for name, p in trainable.items() if name not in decayed], "weight_decay": 0.0}]
    # fused: one kernel for all parameters
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


def learning_rate(step, steps, peak, warmup):
    """Linear from 0 over the first `warmup` share of the steps, then half a cosine down to 0."""
    if step < warmup * steps:
        return peak * (step + 1) / (warmup * steps + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup * steps) / (steps - warmup * steps)))


def save_checkpoint(path, **state):
    """A plain dict of tensors, numbers, strings, lists and dicts; the file appears whole or not at all."""
    with data.atomic(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path):
    """weights_only: a checkpoint is data, and opening somebody else's must not run what it brings."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"no checkpoint {path}") from error
    except Exception as error:                              # torch.load has a dozen ways to fail
        raise InputError(f"{path} is damaged or no checkpoint: delete it to start again "
                         f"({type(error).__name__})") from error


def trained_state(model):
    """What training changes: every parameter from scratch, only the adapters with LoRA."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def train(model, dataset, args, run_dir):
    """Trains what requires a gradient, and returns the history: one evaluated row for each epoch.

    Writes last.pt (to resume), best.pt (the epoch with the highest rsum) and log.csv after each epoch. The
    batches of an epoch derive from (seed, epoch), cropping and dropout from (seed, step): a resumed run does
    on the CPU, bit for bit, what an uninterrupted one does. Raises InputError when the loss is not finite.
    """
    device, split = model.logit_scale.device, dataset.splits["train"]
    steps_per_epoch = len(split.photos) // args.batch_size
    steps = args.epochs * steps_per_epoch
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    history, best, epoch, seconds = [], -1.0, 0, 0.0
    if args.resume and (run_dir / "last.pt").exists():
        state = load_checkpoint(run_dir / "last.pt")
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        history, best, epoch, seconds = state["history"], state["best"], state["epoch"], state["seconds"]
        print(f"resumed   after epoch {epoch}")
    compiled = torch.compile(model) if args.compile else model
    interval = max(1, steps // 40)                          # about 40 lines for a run of any length
    model.train()
    for epoch in range(epoch, args.epochs):
        pairs = split.pairs(args.seed, epoch)               # (N, 2): a photo and one of its captions
        total, start = torch.zeros((), device=device), time.perf_counter()
        for i in range(steps_per_epoch):
            step = epoch * steps_per_epoch + i
            torch.manual_seed((args.seed << 32) + step)
            photo, caption = pairs[i * args.batch_size:(i + 1) * args.batch_size].T
            pixels = split.take(photo, device)
            pixels = data.augment(pixels, model.config.image_size) if dataset.augmented else data.normalize(pixels)
            ids = split.tokens(caption, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits_per_image = compiled(pixels, ids)
            loss = contrastive_loss(logits_per_image)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, args.lr, args.warmup)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():                           # the paper's bound: logits at most 100 (openai/CLIP #46)
                model.logit_scale.clamp_(max=math.log(100))
            total += loss.detach()
            if (step + 1) % interval == 0:
                rate = (i + 1) * args.batch_size / (time.perf_counter() - start)
                print(f"epoch {epoch + 1:3d}/{args.epochs} step {step + 1:6d}/{steps} loss {loss.item():7.4f} "
                      f"lr {optimizer.param_groups[0]['lr']:.2e} scale {model.logit_scale.exp().item():6.2f} "
                      f"{rate:6,.0f} pairs/s ETA {minutes((steps - step) * args.batch_size / rate)}", flush=True)
        train_loss, row = total.item() / steps_per_epoch, evaluate(model, dataset.splits["val"])
        if not math.isfinite(train_loss + row["loss"]):
            raise InputError(f"the loss is not finite in epoch {epoch + 1}: the checkpoints of the last good epoch are "
                             f"in {run_dir}; try a lower --lr or a longer --warmup in a new run")
        seconds += time.perf_counter() - start
        history.append({"epoch": epoch + 1, "train_loss": train_loss, "lr": optimizer.param_groups[0]["lr"],
                        "logit_scale": model.logit_scale.exp().item(), "minutes": seconds / 60, **row})
        print(f"epoch {epoch + 1:3d}/{args.epochs} train {train_loss:.4f}  val {describe(row)}"
              f"{'  best' if rsum(row) > best else ''}", flush=True)
        if rsum(row) > best:
            best = rsum(row)
            save_checkpoint(run_dir / "best.pt", model=trained_state(model), epoch=epoch + 1)
        save_checkpoint(run_dir / "last.pt", model=trained_state(model), optimizer=optimizer.state_dict(),
                        history=history, best=best, epoch=epoch + 1, seconds=seconds)
        write_log(run_dir / "log.csv", history)
    return history


# ---------------------------------------------------------------------------------------------------------
# What a run leaves behind
# ---------------------------------------------------------------------------------------------------------


def minutes(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def write_log(path, history):
    with data.atomic(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, history[0])
        writer.writeheader()
        writer.writerows(history)


def draw_curve(path, history, val_photos):
    """Loss with the line of chance on the left, recall on the right."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs, group = [row["epoch"] for row in history], min(64, val_photos)
    left.plot(epochs, [row["loss"] for row in history], "o-", ms=3, label=f"validation, {group} pairs")
    left.plot(epochs, [row["train_loss"] for row in history], "o-", ms=3, label="training, whole batch")
    left.axhline(math.log(group), color="grey", ls=":", label=f"validation at chance, ln {group}")
    left.set(xlabel="epoch", ylabel="contrastive loss", ylim=(0, None))
    for way, style in (("t2i", "-"), ("i2t", "--")):
        for k, colour in ((10, "C2"), (5, "C1"), (1, "C0")):
            label = f"R@{k} {'caption to photo' if way == 't2i' else 'photo to caption'}"
            right.plot(epochs, [row[f"{way}_r{k}"] for row in history], style, color=colour, label=label)
    right.set(xlabel="epoch", ylabel=f"% of {val_photos:,} validation photos", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with data.atomic(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def draw_retrieval(path, model, split, queries=6, shown=6):
    """Captions, evenly spaced through the split, and the photos that each finds first; the right one framed."""
    from matplotlib.figure import Figure
    images, texts = embed(model, split)
    chosen = torch.linspace(0, len(texts) - 1, min(queries, len(texts))).long()
    best = (texts[chosen.to(texts.device)] @ images.T).topk(min(shown, len(images))).indices.cpu()
    figure = Figure(figsize=(1.6 * shown, 1.85 * len(chosen)), layout="constrained")
    grid = figure.subplots(len(chosen), best.shape[1], squeeze=False)
    for caption, found, row in zip(chosen.tolist(), best, grid):
        row[0].set_title(split.captions[caption][:110], loc="left", fontsize=9)
        for photo, axes in zip(found.tolist(), row):
            axes.imshow(split.photos[photo].cpu())
            axes.set(xticks=[], yticks=[])
            right = photo == split.owner[caption]
            axes.spines[:].set(color="limegreen" if right else "lightgrey", linewidth=4 if right else 1)
    with data.atomic(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


# ---------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------

# What `None` in a flag means: photos need the model they were published with, drawn scenes a small one.
RECIPES = {
    "photos": {"model": "ViT-B/16", "tokenizer": "openai/clip-vit-base-patch16", "epochs": 55, "batch_size": 256,
               "lr": 5e-4, "weight_decay": 0.2},
    "shapes": {"model": "tiny", "tokenizer": "train", "epochs": 9, "batch_size": 256, "lr": 2e-3,
               "weight_decay": 0.1},
}


def number(kind, low, high=math.inf):
    """An argparse type: a number of this kind in [low, high]."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number' if kind is int else 'a number'} from "
                                             f"{low} to {high}" if high < math.inf else f"{text!r} is less than {low}")
        return value
    return parse


class Parser(argparse.ArgumentParser):
    """Bad flags end as all bad input does: one line, exit code 2."""

    def error(self, message):
        raise InputError(f"{message} (--help lists the flags)")


def parse_args(argv):
    parser = Parser(description="Train CLIP from scratch.", epilog=__doc__.split("\n\n")[1],
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    recipe = {name: "default " + ", for shapes ".join(str(values[name]) for values in RECIPES.values())
              for name in RECIPES["photos"]}
    group = parser.add_argument_group("data")
    group.add_argument("--data", default=data.DOWNLOAD, metavar="DIR",
                       help="folder with photos and captions, or `shapes`; default ./flickr30k, downloaded if missing")
    group.add_argument("--tokenizer", metavar="NAME", help=f"hub name, folder, or `train`; {recipe['tokenizer']}")
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=PRESETS, help=recipe["model"])
    group.add_argument("--text", choices=("bert", "causal"), default="bert",
                       help="whether a word sees the whole caption (default) or what stands before it, as OpenAI's")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=number(int, 1), help=recipe["epochs"])
    group.add_argument("--batch-size", type=number(int, 2), help=recipe["batch_size"])
    group.add_argument("--lr", type=number(float, 0), help=f"peak learning rate; {recipe['lr']}")
    group.add_argument("--weight-decay", type=number(float, 0), help=recipe["weight_decay"])
    group.add_argument("--warmup", type=number(float, 0, 1), default=0.1, help="share of the steps; default 0.1")
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, metavar="DIR", help="default runs/NAME, after the data")
    group.add_argument("--resume", action="store_true", help="go on with the run in --out")
    group.add_argument("--seed", type=number(int, 0), default=0)
    group.add_argument("--device", help="default cuda if there is one, else cpu")
    group.add_argument("--no-compile", dest="compile", action="store_false",
                       help="no torch.compile, which takes a minute and pays from a few hundred steps on; CUDA only")
    args = parser.parse_args(argv)
    for name, value in RECIPES["shapes" if args.data == "shapes" else "photos"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or Path("runs") / Path(args.data).resolve().name
    args.device = pick_device(args.device)
    args.compile = args.compile and args.device.type == "cuda"
    return args


def pick_device(name):
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"no device {name!r} here: {str(error).splitlines()[0]}") from error
    return device


def open_run(run_dir, config, tokenizer, settings, resume):
    """Makes the folder of a run, or checks that the one there is the same run."""
    described = {"model": asdict(config), "run": settings}
    try:
        if (run_dir / "config.json").exists():
            before = json.loads((run_dir / "config.json").read_text())
            if not resume:
                raise InputError(f"{run_dir} holds a run: --resume goes on with it, --out DIR starts another")
            if before != described:
                changed = [f"{name} was {was}, now {described[part].get(name)}" for part in described
                           for name, was in before[part].items() if described[part].get(name) != was]
                raise InputError(f"--resume: {run_dir} is another run ({'; '.join(changed)}); --out DIR starts a new one")
        run_dir.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(run_dir / "tokenizer")
        with data.atomic(run_dir / "config.json") as temporary:
            temporary.write_text(json.dumps(described, indent=1))
    except OSError as error:
        raise InputError(f"can't write to {run_dir}: {error}") from error


def print_start(model, dataset, args):
    def millions(*modules):
        return sum(p.numel() for module in modules for p in module.parameters()) / 1e6

    device, dtype = args.device, "bfloat16" if args.device.type == "cuda" else "float32"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    steps = args.epochs * (len(dataset.splits["train"].photos) // args.batch_size)
    print(f"device    {name}, {dtype}{', compiled' if args.compile else ''}")
    print(f"model     {args.model}, {args.text} text: vision {millions(model.vision_model):.1f} M + text "
          f"{millions(model.text_model):.1f} M + projections = {millions(model):.1f} M parameters")
    print("data      " + ", ".join(f"{name} {len(split.photos):,} photos {len(split.captions):,} captions"
                                   for name, split in dataset.splits.items()))
    print(f"training  {args.epochs} epochs, {steps:,} steps of {args.batch_size} pairs; chance loss: training "
          f"ln {args.batch_size} = {math.log(args.batch_size):.3f}, validation ln 64 = {math.log(64):.3f}", flush=True)


def print_end(model, dataset, history, run_dir, started):
    """The closing block, with the figures of the best and of the last epoch on photos not used so far."""
    split = "test" if "test" in dataset.splits else "val"
    best = max(history, key=rsum)
    for name, checkpoint, epoch in (("last", "last.pt", history[-1]["epoch"]), ("best", "best.pt", best["epoch"])):
        model.load_state_dict(load_checkpoint(run_dir / checkpoint)["model"], strict=False)
        print(f"{name} epoch {epoch}, {split}: {describe(evaluate(model, dataset.splits[split]))}")
    pairs = len(dataset.splits["train"].photos) * history[-1]["epoch"]
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"done      {minutes(time.perf_counter() - started)} minutes, {peak:.1f} GiB at most; "
          f"{history[-1]['minutes']:.2f} minutes of training and validation, {pairs / 60 / history[-1]['minutes']:,.0f} "
          f"pairs/s; lowest validation loss {min(row['loss'] for row in history):.4f}; see {run_dir}")


def run(args):
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")              # TF32 where a matmul is in fp32, on GPUs that have it
    config = PRESETS[args.model]
    dataset = data.load(args.data, args.tokenizer, config.image_size, config.max_position_embeddings)
    if args.batch_size > len(dataset.splits["train"].photos):
        raise InputError(f"--batch-size {args.batch_size} is more than the {len(dataset.splits['train'].photos)} "
                         "training photos")
    config = replace(config, vocab_size=len(dataset.tokenizer), eos_token_id=dataset.tokenizer.eos_token_id,
                     causal=args.text == "causal")
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("resume", "device", "compile", "out")}
    open_run(args.out, config, dataset.tokenizer, settings, args.resume)
    model = CLIP(config).to(args.device)
    for split in dataset.splits.values():
        split.place(args.device)
    print_start(model, dataset, args)
    history = train(model, dataset, args, args.out)
    print_end(model, dataset, history, args.out, started)
    draw_curve(args.out / "curve.png", history, len(dataset.splits["val"].photos))
    draw_retrieval(args.out / "retrieval.png", model, dataset.splits["val"])


def main(argv=None):
    try:
        run(parse_args(argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
