# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "numpy", "pillow", "transformers>=5.8", "peft>=0.18", "pytest", "matplotlib"]
# ///
"""CLIP (Radford et al. 2021, arXiv:2103.00020): the model and its training. data.py makes the batches.

    python clip.py --data shapes     drawn scenes, no download: about a minute on two CPU cores
    python clip.py --epochs 55       ViT-B/16 from scratch on Flickr30k, the default data, on a GPU

Two transformers turn photos and captions into vectors. They learn to make a photo's vector more similar to
that of its own caption than to any other. Modules have the names of Hugging Face's CLIPModel, so released
weights load unchanged. On a first reading, stop after `train`, and believe the docstrings of what it calls,
those in data.py too. The letters in the shapes of tensors:

    B photos in a batch, V crops and K captions of each        N photos and M captions in a split
    S x S pixels in a photo, P x P pixels in a patch           E numbers in an embedding (projection_dim)
    T tokens: a class token and patches, or subwords           C channels (hidden_size), H heads of D = C / H

Inside a tower, B is the number of its inputs, V crops or K captions of each photo.
"""

import copy
import csv
import gc
import math
import os
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from itertools import combinations, product
from pathlib import Path

import data  # before torch, because it sets OMP_WAIT_POLICY for torch

# isort: split
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import nn

# torchrun starts a process for each GPU. Other programs set RANK too, so trust it only from torchrun.
IS_TORCHRUN = dist.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if IS_TORCHRUN else 0  # the number of this process
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if IS_TORCHRUN else 1  # how many there are

# --- Configuration ---------------------------------------------------------------------------------------


@dataclass(frozen=True)  # this makes it hashable, as a default value in CLIPConfig must be
class TowerConfig:
    """One transformer: width, layers, heads, width of the MLP and activation, in Hugging Face's names.

    hidden_act: "quick_gelu", as in released weights, or "gelu", which is faster on CPUs.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "quick_gelu"


@dataclass
class CLIPConfig:
    """Everything that defines a CLIP. The defaults are the released ViT-B/16, except for `causal`.

    causal: True is OpenAI's text tower, in which a token attends to itself and the tokens before it. Released
    weights need it. False, the default, is a BERT-style tower, in which every token attends to the whole
    caption. On photos the two towers are equally good, and on drawn scenes the causal one is better.
    """

    vision: TowerConfig = TowerConfig(768, 12, 12, 3072)
    text: TowerConfig = TowerConfig(512, 12, 8, 2048)
    image_size: int = 224
    patch_size: int = 16
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    projection_dim: int = 512
    causal: bool = False


TINY_TOWERS = TowerConfig(96, 3, 6, 384, "gelu"), TowerConfig(64, 2, 4, 256, "gelu")
PRESETS = {
    "ViT-B/16": CLIPConfig(),
    "tiny": CLIPConfig(*TINY_TOWERS, image_size=48, patch_size=12, projection_dim=96),
}

# --- The model -------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention: softmax(q k^T / sqrt(D)) v in each of H heads (Vaswani et al. 2017, eq. 1).

    Queries q come from the Q tokens of x (B, Q, C), keys k and values v from context (B, T, C). x and context
    are the same tokens, except in the last block, where x is one of them. The result is (B, Q, C). mask
    broadcasts to (B, H, Q, T); where it is False, the attention weight is 0.
    """

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        # Four Linears, which lora.py can replace by LoRA layers for fine-tuning. nn.MultiheadAttention only
        # reads the weight of its out_proj and never calls it, so a LoRA layer there would have no effect
        # (peft #761).
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, context, mask=None):
        heads = (self.num_heads, -1)  # splits C into (H, D)
        q = self.q_proj(x).unflatten(-1, heads).transpose(1, 2)  # (B, H, Q, D)
        k = self.k_proj(context).unflatten(-1, heads).transpose(1, 2)  # (B, H, T, D)
        v = self.v_proj(context).unflatten(-1, heads).transpose(1, 2)  # (B, H, T, D)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, Q, D)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (B, Q, C)


def quick_gelu(x):
    """OpenAI's approximation of GELU. Weights for one are worse with the other (open_clip #771)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class MLP(nn.Module):
    """Two Linears with an activation between them, applied to each token separately."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation_fn = ACTIVATIONS[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block, x (B, T, C) to (B, T, C). Attention and MLP each read x after a
    LayerNorm and add their result to x, so deep stacks train easily (Xiong et al. 2020, arXiv:2002.04745).

    queries: an index into (B, T), by default all tokens. The block computes the output of these tokens alone,
    from the keys and values of all: Encoder needs only one output of the last block."""

    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, queries=slice(None)):
        # Under autocast x is 16-bit (see Encoder), but LayerNorm returns fp32: cast once for q, k and v.
        normed = self.layer_norm1(x).to(x.dtype)
        x = x[queries] + self.self_attn(normed[queries], normed, mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """A stack of blocks on x (B, T, C). Returns (B, C): the output of the token at pool_index, which is an
    int or a tensor (B, 1). All blocks but the last use `mask`. In the last, the pooled token is the only
    query, with the mask pool_mask."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))

    def forward(self, x, pool_index, mask=None, pool_mask=None):
        # The embeddings are fp32 under autocast. In 16 bits x is read and written in half the time.
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for layer in self.layers[:-1]:
            x = layer(x, mask)
        # Nothing reads the last block's outputs for the other tokens. Leaving them out makes a step 5 %
        # shorter with ViT-B/16, and 20 % shorter with the tiny model on a CPU.
        rows = torch.arange(x.shape[0], device=x.device)[:, None]  # (B, 1)
        x = self.layers[-1](x, pool_mask, queries=(rows, pool_index))  # (B, 1, C)
        return x[:, 0]


class VisionEmbeddings(nn.Module):
    """Photos (B, 3, S, S) to tokens (B, T, C): one token for each P x P patch, after a class token. The class
    token has no pixels of its own; in the blocks it gathers what the patches say."""

    def __init__(self, config):
        super().__init__()
        C, P = config.vision.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(C))  # init_weights fills it
        self.patch_embedding = nn.Conv2d(3, C, kernel_size=P, stride=P, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // P) ** 2 + 1, C)
        self.patch_dropout = 0.0  # the fraction of patches that training leaves out; `train` sets it

    def forward(self, pixels):
        B, _, _, S = pixels.shape
        P = self.patch_embedding.kernel_size[0]
        # A convolution with kernel and stride P is a Linear on each flattened patch, and as a Linear it is
        # faster. The weight is in a Conv2d because released files have this shape.
        patches = pixels.view(B, 3, S // P, P, S // P, P)
        patches = patches.permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, 3, P, P)
        patches = patches.reshape(B, -1, 3 * P * P)  # (B, T - 1, 3 P P)
        x = F.linear(patches, self.patch_embedding.weight.flatten(1))  # (B, T - 1, C)
        x = x + self.position_embedding.weight[1:]
        if self.training and self.patch_dropout:
            # Keep a random part of each photo's patches. With half of them the tower has half of the work
            # (FLIP, Li et al. 2022, arXiv:2212.00794). Their order doesn't matter: x includes the positions.
            count = max(1, round(x.shape[1] * (1 - self.patch_dropout)))
            kept = torch.rand(x.shape[:2], device=x.device).argsort(dim=1)[:, :count, None]  # (B, count, 1)
            x = x.gather(1, kept.expand(-1, -1, x.shape[2]))
        class_token = self.class_embedding + self.position_embedding.weight[0]  # (C,)
        return torch.cat([class_token.expand(B, 1, -1), x], dim=1)  # (B, T, C)


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al. 2020, arXiv:2010.11929): photos (B, 3, S, S) to pooled features (B, C)."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        # A norm that the original ViT lacks. "layrnorm" is Hugging Face's spelling, as in released files.
        self.pre_layrnorm = nn.LayerNorm(config.vision.hidden_size)
        self.encoder = Encoder(config.vision)
        self.post_layernorm = nn.LayerNorm(config.vision.hidden_size)

    def forward(self, pixels):
        x = self.pre_layrnorm(self.embeddings(pixels))  # (B, T, C)
        return self.post_layernorm(self.encoder(x, pool_index=0))  # (B, C): the class token is first


class TextEmbeddings(nn.Module):
    """Token ids (B, T) to vectors (B, T, C): an embedding of the token plus one of its position."""

    def __init__(self, config):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.text.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.text.hidden_size)

    def forward(self, ids):
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextTransformer(nn.Module):
    """Token ids (B, T) to pooled features (B, C), the output at each caption's end token.

    A row of ids is `start a dog end pad`. pad has the same id as end, so the first such id is the end. The
    masks for this row, with a line for each query and an x for each key that it attends to:

                  BERT-style                      causal
              start  a  dog end pad        start  a  dog end pad
       start    x    x   x   x   .           x    .   .   .   .
       a        x    x   x   x   .           x    x   .   .   .
       dog      x    x   x   x   .           x    x   x   .   .
       end      x    x   x   x   .           x    x   x   x   .     <- the token that is pooled
       pad      x    x   x   x   .           x    x   x   x   x

    In a causal tower the end token attends to itself and what precedes it. It never sees padding, so no
    padding mask is needed (openai/CLIP #183).
    """

    def __init__(self, config):
        super().__init__()
        self.causal, self.eos_token_id = config.causal, config.eos_token_id
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config.text)
        self.final_layer_norm = nn.LayerNorm(config.text.hidden_size)

    def forward(self, ids):
        # argmax returns the first of several maxima. OpenAI's code has ids.argmax(), which needs an end token
        # with the largest id (openai/CLIP #217).
        end_index = (ids == self.eos_token_id).int().argmax(dim=-1, keepdim=True)  # (B, 1)
        position = torch.arange(ids.shape[1], device=ids.device)  # (T,)
        end_mask = (position <= end_index)[:, None, None]  # (B, 1, 1, T): no key after the end
        causal_mask = position <= position[:, None]  # (T, T): no key after the query
        mask = causal_mask if self.causal else end_mask
        # The only query of the last block is the end token. Its line is the same in both masks.
        x = self.encoder(self.embeddings(ids), end_index, mask, pool_mask=end_mask)
        return self.final_layer_norm(x)  # (B, C)


class CLIP(nn.Module):
    """Two towers and a temperature. `forward` and contrastive_loss are the paper's pseudo-code (figure 3). I
    is the photos, T the captions, n the batch size, W_i and W_t our projections, and t our logit_scale:

    I_e, T_e = l2_normalize(image_encoder(I) @ W_i), l2_normalize(text_encoder(T) @ W_t)
    logits = (I_e @ T_e.T) * exp(t)
    loss = (cross_entropy(logits, range(n)) + cross_entropy(logits.T, range(n))) / 2
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config)
        self.text_model = TextTransformer(config)
        self.visual_projection = nn.Linear(config.vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))  # the logarithm of 1 / temperature
        init_weights(self)

    def encode_image(self, pixels):
        """Pixels (B, 3, S, S), as data.normalize returns them, to unit vectors (B, E) in fp32."""
        return F.normalize(self.visual_projection(self.vision_model(pixels)).float(), dim=-1)

    def encode_text(self, ids):
        """Token ids (B, T) to unit vectors (B, E) in fp32."""
        return F.normalize(self.text_projection(self.text_model(ids)).float(), dim=-1)

    def similarity(self, image_embeds, text_embeds):
        """Logits (B, B) of unit vectors (B, E) and (B, E): their cosines times exp(logit_scale). Stacks
        (..., B, E), as evaluate and multiview_loss have them, give (..., B, B). Logits are fp32, because the
        scale may grow to 100, and near 100 bf16 has steps of 0.5."""
        with torch.autocast(image_embeds.device.type, enabled=False):
            return self.logit_scale.exp() * (image_embeds @ text_embeds.mT)

    def forward(self, pixels, ids):
        """B photos and B captions to logits_per_image (B, B). Its transpose is logits_per_text."""
        image_embeds, text_embeds = self.encode_image(pixels), self.encode_text(ids)  # (B, E) each
        return self.similarity(image_embeds, text_embeds)


@torch.no_grad()
def init_weights(model):
    """OpenAI's initial values (openai/CLIP, initialize_parameters). The blocks of both towers follow the
    formulas of OpenAI's text tower, each with its own C and number of layers L, and with biases of 0. Norms
    and the patch embedding keep PyTorch's defaults."""
    for tower, config in ((model.vision_model, model.config.vision), (model.text_model, model.config.text)):
        C, L = config.hidden_size, config.num_hidden_layers
        std = {"q_proj": C**-0.5, "k_proj": C**-0.5, "v_proj": C**-0.5, "fc1": (2 * C) ** -0.5}
        # A block adds to the residual stream twice, by out_proj and fc2. With the factor (2 L)^-0.5 in these
        # two, the variance of the stream after the last block is about the same for every L (GPT-2).
        std |= {"out_proj": (2 * L * C) ** -0.5, "fc2": (2 * L * C) ** -0.5}
        for name, module in tower.encoder.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std[name.split(".")[-1]])
                nn.init.zeros_(module.bias)
    vision, text = model.vision_model.embeddings, model.text_model.embeddings
    C_vision, C_text = model.config.vision.hidden_size, model.config.text.hidden_size
    nn.init.normal_(vision.class_embedding, std=C_vision**-0.5)
    nn.init.normal_(vision.position_embedding.weight, std=C_vision**-0.5)
    nn.init.normal_(text.token_embedding.weight, std=0.02)
    nn.init.normal_(text.position_embedding.weight, std=0.01)
    nn.init.normal_(model.visual_projection.weight, std=C_vision**-0.5)
    nn.init.normal_(model.text_projection.weight, std=C_text**-0.5)
    # The temperature starts at 0.07, so the scale is 14.3. A common slip is a scale of exp(0.07) = 1.07, with
    # which training is far slower (open_clip #815).
    nn.init.constant_(model.logit_scale, math.log(1 / 0.07))


# --- The loss --------------------------------------------------------------------------------------------


def contrastive_loss(logits_per_image):
    """The mean of two cross-entropies of logits (B, B), or the mean of such losses for a stack (..., B, B).

    A row asks which caption fits its photo, a column which photo fits its caption. The right answers are on
    the diagonal. For three photos and their captions:

        logits       softmax of each row    softmax of each column
        4  1  0      0.94  0.05  0.02       0.87  0.11  0.09
        2  3  1      0.24  0.67  0.09       0.12  0.79  0.24
        0  1  2      0.09  0.24  0.67       0.02  0.11  0.67

    The loss is the mean of -ln(diagonal) over both, 0.28 here. A model that guesses gives each
    answer 1 / B and has a loss of ln B: 1.10 for three pairs, 4.85 for 128. A loss that stays
    there means that nothing is learnt (open_clip #17).
    """
    loss_image = -logits_per_image.log_softmax(dim=-1).diagonal(dim1=-2, dim2=-1).mean()  # rows
    loss_text = -logits_per_image.log_softmax(dim=-2).diagonal(dim1=-2, dim2=-1).mean()  # columns
    return (loss_image + loss_text) / 2


# --- Recall and evaluation -------------------------------------------------------------------------------


def rank_of_best_match(queries, answers, query_index, answer_index):
    """Rank (Q,) of the best correct answer of each query: the number of wrong answers that are at least as
    similar, so ties count against the model.

    queries (Q, E) and answers (A, E) are embeddings. query_index (Q,) and answer_index (A,) say to which
    photo each belongs: an answer is correct if it belongs to the query's photo."""
    similarity = queries @ answers.T  # (Q, A)
    correct = query_index[:, None] == answer_index
    best = similarity.masked_fill(~correct, -torch.inf).amax(dim=1, keepdim=True)
    # Comparisons with NaN are False. So NaN counts as not below, and a broken model does not get rank 0.
    not_below = ~(similarity < best) & ~correct
    return not_below.sum(dim=1)


def recall_at_k(image_embeds, text_embeds, image_index, ks=(1, 5, 10)):
    """Retrieval recall as published for Flickr30k: {"t2i_r1": fraction, ..., "i2t_r1": fraction, ...}.

    image_embeds (N, E), text_embeds (M, E); image_index[i] is the row of caption i's photo. Text to image
    (t2i): the fraction of captions whose photo is among the k most similar photos. Image to text (i2t):
    the fraction of photos with any of their captions among the k most similar captions.
    """
    rows = torch.arange(len(image_embeds), device=image_embeds.device)
    text_rank = rank_of_best_match(text_embeds, image_embeds, image_index, rows)  # (M,)
    image_rank = rank_of_best_match(image_embeds, text_embeds, rows, image_index)  # (N,)
    recall = {f"t2i_r{k}": (text_rank < k).float().mean().item() for k in ks}
    return recall | {f"i2t_r{k}": (image_rank < k).float().mean().item() for k in ks}


@torch.no_grad()
def embed(model, split, batch_size=250):
    """Embeddings of the photos (N, E) and the captions (M, E) of a data.Split, which holds N photos and, in
    their order, the token ids of M captions. It must not be the training split, whose photos may be larger
    than image_size, for random crops."""
    device, training = model.logit_scale.device, model.training
    model.eval()
    images, texts = [], []
    with autocast(device):
        for rows in torch.arange(len(split.photos)).split(batch_size):
            images.append(model.encode_image(data.normalize(split.take(rows, device))))
        for rows in torch.arange(len(split.captions)).split(batch_size):
            texts.append(model.encode_text(split.tokens(rows, device)))
    model.train(training)
    return torch.cat(images), torch.cat(texts)


@torch.no_grad()
def evaluate(model, split):
    """Loss, and recalls in percent: {"loss", "t2i_r1", ..., "i2t_r10"}.

    A loss depends on how many photos are compared. This one is the mean over groups of 64 photos, so a guess
    has ln 64 = 4.159; if there are fewer photos, they are one group. It is also the mean over five turns: in
    turn j, each photo has its caption j, since Flickr's photos have five captions. The loss can rise from
    overconfidence while recall still rises (open_clip #811).
    """
    images, texts = embed(model, split)
    first, count = split.first_captions()  # (N,) each: index of a photo's first caption, number of captions
    turns = first + (torch.arange(5)[:, None] % count)  # (5, N): with fewer captions, they come again
    size = min(64, len(images))
    groups = len(images) // size  # an incomplete last group is dropped
    photos = images[: groups * size].unflatten(0, (groups, size))  # (groups, size, E)
    captions = texts[turns[:, : groups * size]].unflatten(1, (groups, size))  # (5, groups, size, E)
    loss = contrastive_loss(model.similarity(photos, captions))  # logits (5, groups, size, size)
    recall = recall_at_k(images, texts, split.image_index.to(images.device))
    return {"loss": loss.item()} | {name: 100 * x for name, x in recall.items()}


def describe(row):
    """An evaluation as one line of text."""
    return (
        "loss {loss:.4f}  R@1/5/10 text->image {t2i_r1:5.1f} {t2i_r5:5.1f} {t2i_r10:5.1f}"
        "  image->text {i2t_r1:5.1f} {i2t_r5:5.1f} {i2t_r10:5.1f}"
    ).format(**row)


# --- Training --------------------------------------------------------------------------------------------


@dataclass
class Recipe:
    """How to train. The defaults were chosen for a ViT-B/16 on the 6,000 photos of Flickr8k, the most photos
    that we had. Every setting is a flag. A value out of range raises InputError."""

    # Each setting has its default, its least and largest value, and its help text.
    epochs: int = data.setting(52, 1, 1e6, "epochs; the last incomplete batch of each is dropped")
    batch_size: int = data.setting(128, 2, 1e6, "photos in a step, on all GPUs together")
    lr: float = data.setting(7e-4, 0, 1e3, "learning rate after the warm-up")
    warmup: float = data.setting(2.0, 0, 1e6, "epochs in which the learning rate rises from 0")
    weight_decay: float = data.setting(1.5, 0, 1e3, "weight decay of Linears' matrices; few photos need much")
    # The recipe for few photos: see the section of this name, and augmentation in data.py.
    muon: int = data.setting(1, 0, 1, "1: Muon for the matrices of the blocks, 0: AdamW for everything")
    views: int = data.setting(4, 1, 100, "random crops of each photo in a step")
    crop_scale: float = data.setting(0.1, 0.01, 1, "smallest fraction of the area that a crop shows")
    color_jitter: float = data.setting(0.8, 0, 1, "largest change of colours; above 0, 1 in 5 crops is grey")
    patch_dropout: float = data.setting(0.75, 0, 0.99, "fraction of the patches that training leaves out")
    unmask: int = data.setting(36, 0, 1e6, "epochs after which twice as many patches are kept, at most all")
    texts: int = data.setting(4, 1, 100, "captions of each photo in a step")
    word_dropout: float = data.setting(0.9, 0, 1, "largest probability that a random token replaces a token")
    # Large batches and random numbers.
    micro_batch: int = data.setting(0, 0, 1e6, "photos that a GPU encodes at once, to save memory; 0 is all")
    seed: int = data.setting(0, 0, 1e6, "seed of weights, batches and augmentation")

    def __post_init__(self):
        data.check_settings(self)


# Plain CLIP, as finetune.py trains it. For drawn scenes, clip.py adds Muon.
PLAIN = dict(muon=0, views=1, crop_scale=0.4, color_jitter=0.0, patch_dropout=0.0, texts=1, word_dropout=0.0)
DRAWN_RECIPE = Recipe(**(PLAIN | dict(epochs=8, warmup=0.5, weight_decay=0.3, muon=1)))
# In 16 epochs the tiny model does not learn photos by heart, so on photos it has weaker augmentation.
WEAKER = dict(crop_scale=0.3, color_jitter=0.2, patch_dropout=0.5, word_dropout=0.2)
TINY_RECIPE = Recipe(epochs=16, lr=2e-3, warmup=1.0, weight_decay=0.3, **WEAKER)


def make_optimizers(model, recipe):
    """[AdamW] with OpenAI's betas. With recipe.muon, [Muon, AdamW]: Muon updates the matrices of the blocks.

    Weight decay pulls towards zero. That is a sensible prior for the matrices of Linears and of LoRA, but not
    for norms, biases, the logit scale and, unlike in the paper, for embeddings."""
    block_matrices, matrices, others = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if recipe.muon and ".layers." in name and p.ndim == 2:
            block_matrices.append(p)
        elif p.ndim >= 2 and "embedding" not in name:
            matrices.append(p)
        else:
            others.append(p)
    lr, decay = recipe.lr, recipe.weight_decay
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    return [Muon(block_matrices, lr, decay), adamw] if block_matrices else [adamw]


def make_batch(split, pairs, model, recipe):
    """The photos and captions of `pairs` (B, 1 + K) as pixels (B V, 3, S, S) and token ids (B K, T). A row of
    pairs has the index of one photo, then those of K of its captions. Two rows for K = 2:

        [17, 85, 86]   photo 17 with its captions 85 and 86
        [ 4, 24, 20]   photo 4 with its captions 24 and 20: after its last one comes its first
    """
    config, device = model.config, model.logit_scale.device
    photos = split.take(pairs[:, 0], device)  # (B, height, width, 3) uint8
    if photos.shape[1] > config.image_size:  # photos have a margin for random crops
        pixels = data.augment(photos, config.image_size, recipe)
    else:  # drawn scenes have no margin, as a crop would make "left" and "large" wrong: views are copies
        pixels = data.normalize(photos).repeat_interleave(recipe.views, dim=0)
    # cut: T is the same in every batch, so the text tower is compiled once. It cuts few captions, if any.
    ids = split.tokens(pairs[:, 1:].flatten(), device, cut=True)
    return pixels, data.augment_captions(ids, config, recipe.word_dropout)


def train_step(model, optimizers, scaler, pixels, ids, lr):
    """One step on B photos (B, 3, S, S) and their captions (B, T). Returns the loss."""
    with autocast(pixels.device):
        logits = model(pixels, ids)  # (B, B)
    loss = contrastive_loss(logits)
    scaler.scale(loss).backward()  # the scaler changes nothing unless matrix products are in fp16
    update_weights(model, optimizers, scaler, lr)
    return loss.detach()


def update_weights(model, optimizers, scaler, lr):
    """Clip gradients, set the learning rate, step, clamp the logit scale."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # so one odd batch has little weight
    # If fp16 gradients overflow, the norm is infinite, and clipping by it makes all finite gradients 0.
    # scaler.step skips only an optimizer whose own gradients overflow, and the other would use zeros. So we
    # skip both.
    overflow = scaler.is_enabled() and not norm.isfinite()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        if not overflow:
            scaler.step(optimizer)
        optimizer.zero_grad()
    scaler.update()
    model.logit_scale.data.clamp_(max=math.log(100))  # the paper's bound (openai/CLIP #46)


SAVE_FRACTION = 0.05  # `train` spends at most about this fraction of its time on checkpoints


def train(model, splits, recipe, run_dir, resume=False, compile=False):
    """Train the parameters that require a gradient, in place. Returns (ema_model, history).

    ema_model is a copy with the moving average of the weights: evaluate and use this one. history has a row
    for each epoch. log.csv and checkpoint.pt are written to run_dir after the last epoch, and after
    other epochs as long as writing takes at most about 5 % of the time. `resume` continues from there, with
    more epochs if you like; on the CPU a resumed run is bit for bit the uninterrupted one.
    """
    split, B, device = splits["train"], recipe.batch_size, model.logit_scale.device
    steps_per_epoch = len(split.photos) // B
    steps = recipe.epochs * steps_per_epoch
    # train_step suffices for one crop and one caption of each photo, in one process without micro-batches, as
    # for drawn scenes. The default recipe needs train_step_general, which comes later.
    is_simple = recipe.views == recipe.texts == WORLD_SIZE == 1 and not recipe.micro_batch
    optimizers = make_optimizers(model, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast_dtype(device) == torch.float16)
    ema_model = copy.deepcopy(model).eval()
    # finetune.py needs the source, the name of the data.
    settings = {"config": asdict(model.config), "recipe": asdict(recipe), "source": split.source}
    settings["data"] = [part.fingerprint() for part in splits.values()]
    history = resume_run(run_dir, settings, model, ema_model, optimizers) if resume else []
    if compile:
        compile_model(model)

    model.train()
    last_save, seconds_to_save = time.perf_counter(), 0.0
    for epoch in range(len(history), recipe.epochs):
        # In use the model sees all patches, so later epochs drop fewer. FLIP's last epochs drop none.
        kept = (1 - recipe.patch_dropout) * (1 if epoch < recipe.unmask else 2)
        model.vision_model.embeddings.patch_dropout = max(0.0, 1 - kept)
        start, total = time.perf_counter(), 0.0
        pairs = split.pairs(recipe.seed, epoch, recipe.texts)  # (N, 1 + K), in another order each epoch
        for i, batch in enumerate(pairs[: steps_per_epoch * B].split(B)):
            step = epoch * steps_per_epoch + i
            # Each step and process has its own seed, so a resumed run draws the same crops and dropout. The
            # hash of a tuple of integers is always the same. train_step_general adds to the seed.
            torch.manual_seed(hash((recipe.seed, step, RANK)) % 2**32)
            if compile:  # from here on, CUDA graphs may reuse the memory of the last step
                torch.compiler.cudagraph_mark_step_begin()
            part = batch.chunk(WORLD_SIZE)[RANK]  # that of this process; with one GPU, all of it
            pixels, ids = make_batch(split, part, model, recipe)
            # The rate need not decay after the warm-up, since update_ema averages out the noise of steps.
            lr = recipe.lr * min(1, (step + 1) / max(1, recipe.warmup * steps_per_epoch))
            if is_simple:
                loss = train_step(model, optimizers, scaler, pixels, ids, lr)
            else:
                loss = train_step_general(model, optimizers, scaler, pixels, ids, lr, recipe)
            update_ema(ema_model, model, step)
            total += loss  # a tensor, so the CPU does not wait for the GPU
            if (step + 1) % max(10, steps // 40) == 0:  # about 40 lines in a long run
                text = f"epoch {epoch + 1:3d}/{recipe.epochs}  step {step + 1:6d}/{steps}"
                text += f"  loss {loss.item():7.4f}  lr {lr:.2e}  scale {model.logit_scale.exp().item():6.2f}"
                rate = (i + 1) / (time.perf_counter() - start)  # loss.item() above has waited for the GPU
                minutes = (steps - step - 1) / rate / 60
                print(f"{text}  {rate * B:6,.0f} pairs/s  ETA {minutes:6.1f} min", flush=True)

        # train_loss is the photo-caption loss, by chance ln B. With several crops or captions,
        # what is minimized has more terms (see multiview_loss).
        row = {"epoch": epoch + 1, "train_loss": float(total) / steps_per_epoch, "train_chance": math.log(B)}
        row |= evaluate(ema_model, splits["val"])
        if not math.isfinite(row["train_loss"] + row["loss"]):
            raise data.InputError("the loss is not finite: start a new run with a lower --lr")
        row["minutes"] = (time.perf_counter() - start) / 60 + (history[-1]["minutes"] if history else 0)
        history.append(row)
        text = f"epoch {epoch + 1:3d}/{recipe.epochs}  train {row['train_loss']:.4f}  val {describe(row)}"
        print(text, flush=True)
        now = time.perf_counter()
        if RANK == 0 and (epoch + 1 == recipe.epochs or SAVE_FRACTION * (now - last_save) > seconds_to_save):
            save_run(run_dir, settings, history, model, ema_model, optimizers)
            last_save = time.perf_counter()
            seconds_to_save = last_save - now
    if WORLD_SIZE > 1:
        dist.barrier()  # the files of process 0 are complete when this returns
    return ema_model, history


def write_csv(path, rows):
    """Write dictionaries, which have the same keys, as the lines of a CSV file."""
    with data.atomic(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def weights_of(model):
    """{name: weight} of the parameters that require a gradient: all of them, or those of an adapter."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_run(run_dir, settings, history, model, ema_model, optimizers):
    """Write log.csv and checkpoint.pt, each whole or not at all."""
    state = {"history": history, "ema_model": weights_of(ema_model), "model": weights_of(model)}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    write_csv(Path(run_dir) / "log.csv", history)
    with data.atomic(Path(run_dir) / "checkpoint.pt") as temporary:
        torch.save(settings | state, temporary)


def load_checkpoint(run_dir):
    """What save_run wrote, on the CPU and with a CLIPConfig as "config". InputError if it can't be read."""
    path = Path(run_dir) / "checkpoint.pt"
    try:
        is_damaged = zipfile.ZipFile(path).testzip()  # compares checksums, which torch.load does not
        state = torch.load(path, map_location="cpu", weights_only=True)  # weights_only runs no code
        keys = {"recipe", "data", "source", "history", "ema_model", "model", "optimizers"}
        config = state["config"]
        towers = {name: TowerConfig(**config[name]) for name in ("vision", "text")}
        state["config"] = CLIPConfig(**(config | towers))
        if is_damaged or asdict(state["config"]) != config or not keys <= state.keys():
            raise KeyError
        return state
    except Exception as error:  # torch.load raises a dozen kinds
        raise data.InputError(f"{path} is missing, damaged or of another version of this project") from error


def resume_run(run_dir, settings, model, ema_model, optimizers):
    """Restore what save_run saved and return the history, empty if there is no checkpoint yet. InputError if
    the model, the recipe or the data differ. In the recipe only micro_batch may differ, and epochs, unless
    more are done already."""
    if not (Path(run_dir) / "checkpoint.pt").exists():
        print(f"new run   {run_dir}")
        return []
    state = load_checkpoint(run_dir)
    if state["data"] != settings["data"]:
        difference = "the photos, captions or tokenizer differ"
        raise data.InputError(f"{run_dir} can't be resumed: {difference}. Give another --out")
    before, now = asdict(state["config"]) | state["recipe"], settings["config"] | settings["recipe"]
    done = len(state["history"])
    for name in before | now:
        may_differ = name == "micro_batch" or (name == "epochs" and now[name] >= done)
        if before.get(name) != now.get(name) and not may_differ:
            difference = f"{name} was {before.get(name)} and is {now.get(name)} now"
            raise data.InputError(f"{run_dir} can't be resumed: {difference}. Give another --out")
    model.load_state_dict(state["model"], strict=False)  # a checkpoint has only the weights that are trained
    ema_model.load_state_dict(state["ema_model"], strict=False)
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(optimizer_state)
    print(f"resumed   after epoch {done}")
    return state["history"]


# --- The recipe for few photos ---------------------------------------------------------------------------
# A ViT-B/16 with the plain recipe learns the 6,000 photos of Flickr8k by heart. What helps is another
# initialisation of attention, an optimizer that learns weak directions too, several varied crops and captions
# of each photo, and the moving average of the weights. The README says what most of these bring.


@torch.no_grad()
def init_mimetic(model):
    """Set k_proj to q_proj, so a token attends to itself and to tokens like it. Set out_proj to -v_proj^T /
    sqrt(2 L), for L blocks. v_proj^T v_proj is on average the identity, since the entries of v_proj have a
    variance of 1 / C. So attention subtracts 1 / sqrt(2 L) of the mean of these tokens. Large trained models
    do this too; few photos can't teach it. It simplifies Trockman & Kolter 2023 (arXiv:2305.09828)."""
    for tower in (model.vision_model, model.text_model):
        for block in tower.encoder.layers:
            attention = block.self_attn
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            ratio = attention.out_proj.weight.std() / attention.v_proj.weight.std()
            attention.out_proj.weight.copy_(-ratio * attention.v_proj.weight.T)  # with its former std


def orthogonalize(x):
    """Replace the singular values of the matrices x (n, rows, columns) by values near 1 (tiny ones stay
    smaller). Five Newton-Schulz steps do this, with fast coefficients (Jordan 2024,
    kellerjordan.github.io/posts/muon)."""
    if x.shape[1] > x.shape[2]:  # so that gram is as small as possible
        return orthogonalize(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values must be at most 1
    x = x.to(autocast_dtype(x.device))  # emulated bf16 on CPUs would be 20 times slower than fp32
    for _ in range(5):
        gram = x @ x.mT  # (n, rows, rows)
        # x = (3.4445 I - 4.7750 gram + 2.0315 gram gram) x. So each singular value s of x becomes
        # 3.4445 s - 4.7750 s^3 + 2.0315 s^5, and five times this brings all but tiny values near 1.
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        factor.diagonal(dim1=1, dim2=2).add_(3.4445)
        x = factor @ x
    return x


class Muon(torch.optim.Optimizer):
    """SGD with momentum, but with the singular values of each matrix's update made nearly equal. So it learns
    weak directions of the gradient as fast as strong ones (Liu et al. 2025, arXiv:2502.16982). Muon equals
    torch.optim.Muon(adjust_lr_fn="match_rms_adamw") up to rounding, but stacks the matrices of one shape: one
    by one, the 144 matrices of both towers would make a step on an H100 nearly twice as long."""

    def __init__(self, matrices, lr, weight_decay, momentum=0.9):
        by_shape = {}
        for p in matrices:
            by_shape.setdefault(p.shape, []).append(p)
        groups = [{"params": same_shape} for same_shape in by_shape.values()]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            matrices, lr, momentum = group["params"], group["lr"], group["momentum"]
            gradients = torch.stack([p.grad for p in matrices])  # (n, rows, columns)
            state = self.state[matrices[0]]  # one momentum buffer for the whole stack
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradients)
            # The buffer averages the gradients. Nesterov momentum mixes the newest ones in once more.
            buffer = state["momentum_buffer"].lerp_(gradients, 1 - momentum)
            updates = orthogonalize(gradients.lerp(buffer, momentum)).float()
            torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
            # Scale the updates to a root mean square of 0.2, as AdamW's updates usually have. That of an
            # orthogonal matrix is 1 / sqrt(longer side).
            torch._foreach_add_(matrices, updates.unbind(), alpha=-lr * 0.2 * max(matrices[0].shape) ** 0.5)


def multiview_loss(model, image_embeds, text_embeds):
    """loss = photo-caption + (crop-crop + caption-caption) / 2, for V crops (B, V, E) and K captions
    (B, K, E) of each photo. Each term is the mean of contrastive_loss over all choices: of a crop and a
    caption, of two crops (as in SLIP, arXiv:2112.12750) or two captions. Returns (loss, photo-caption)."""

    def mean_loss(pairs):
        a, b = zip(*pairs)  # n pairs of (B, E)
        return contrastive_loss(model.similarity(torch.stack(a), torch.stack(b)))  # logits (n, B, B)

    crops, captions = image_embeds.unbind(1), text_embeds.unbind(1)  # V and K times (B, E)
    photo_caption = mean_loss(product(crops, captions))
    loss = photo_caption
    if len(crops) > 1:
        loss = loss + mean_loss(combinations(crops, 2)) / 2
    if len(captions) > 1:
        loss = loss + mean_loss(combinations(captions, 2)) / 2
    return loss, photo_caption


@torch.no_grad()
def update_ema(ema_model, model, step):
    """ema = ema + (weights - ema) 6 / (7 + step): a moving average, which removes the noise of single steps.
    The factor falls, so that the mean age of the averaged weights is a seventh of all steps so far."""
    averages = [p for p in ema_model.parameters() if p.requires_grad]
    weights = [p for p in model.parameters() if p.requires_grad]
    torch._foreach_lerp_(averages, weights, 6 / (7 + step))


# --- The general step: several crops and captions, large batches, several GPUs ----------------------------


def gather_rows(x):
    """Rows of all processes, (B / processes, ...) to (B, ...). The backward pass adds up the gradients that
    the processes have for a row, and returns them to the process of the row."""
    return torch.cat(dist_nn.all_gather(x)) if WORLD_SIZE > 1 else x


def train_step_general(model, optimizers, scaler, pixels, ids, lr, recipe):
    """train_step for V crops (B V, 3, S, S) and K captions (B K, T) of each photo, micro-batches and several
    processes. The loss compares all pairs of all processes. If a GPU encodes only micro_batch photos at once:

    1. Encode all micro-batches without keeping activations.
    2. Compute the loss of all embeddings, and its gradient with respect to each embedding.
    3. Encode each micro-batch again, now with activations, and backpropagate its part of that gradient.

    This is gradient caching (Gao et al. 2021, arXiv:2101.06983): the gradient is that of the whole batch.
    With one micro-batch, the function encodes once and backpropagates the loss."""
    size = recipe.micro_batch or len(pixels) // recipe.views
    pixel_parts, id_parts = pixels.split(size * recipe.views), ids.split(size * recipe.texts)
    is_cached = len(pixel_parts) > 1
    seed = torch.initial_seed()  # which `train` set for this step

    def encode(i):
        torch.manual_seed(seed + 1 + i)  # steps 1 and 3 drop the same; + 1, since make_batch used `seed`
        with autocast(pixels.device):
            image_embeds, text_embeds = model.encode_image(pixel_parts[i]), model.encode_text(id_parts[i])
        return image_embeds.unflatten(0, (-1, recipe.views)), text_embeds.unflatten(0, (-1, recipe.texts))

    with torch.set_grad_enabled(not is_cached):
        image_parts, text_parts = zip(*[encode(i) for i in range(len(pixel_parts))])
    image_embeds, text_embeds = torch.cat(image_parts), torch.cat(text_parts)  # (B, V, E), (B, K, E)
    if is_cached:
        image_embeds.requires_grad_()
        text_embeds.requires_grad_()
    loss, photo_caption = multiview_loss(model, gather_rows(image_embeds), gather_rows(text_embeds))
    scaler.scale(loss).backward()
    if is_cached:
        image_grads, text_grads = image_embeds.grad.split(size), text_embeds.grad.split(size)
        for i in range(len(pixel_parts)):
            images, texts = encode(i)
            # By the chain rule, the gradients of these sums add up to that of the loss. The scaler has
            # scaled image_grads and text_grads already.
            ((images * image_grads[i]).sum() + (texts * text_grads[i]).sum()).backward()
    if WORLD_SIZE > 1:
        # Each process backpropagates the whole loss, and gather_rows adds up the WORLD_SIZE equal gradients
        # of each row. So the sum over processes, each with its own rows, is WORLD_SIZE times the gradient.
        # That holds for logit_scale too, of which each process has the whole gradient.
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= WORLD_SIZE
    update_weights(model, optimizers, scaler, lr)
    return photo_caption.detach()


def open_device(name):
    """The torch.device of this name. With torchrun, connect its processes, whose --device is by default the
    GPU of LOCAL_RANK. InputError if the device can't be used."""
    try:
        device = torch.zeros(1, device=name).device  # with an index, as in "cuda:0"
        torch.zeros(1, device=device).item()  # fails for "meta", a device without numbers
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without CUDA
        raise data.InputError(f"--device {name} can't be used here: use cpu, cuda:N or mps") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD_SIZE > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # process 0 may decode for hours
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, process 0 prints for all
    return device


# --- Precision and compiling -----------------------------------------------------------------------------


def autocast_dtype(device):
    """The type of matrix products: bf16 on CUDA. Cards without it (T4, P100) have fp16, with a smaller range,
    so the loss must be scaled (openai/CLIP #40). Elsewhere it is fp32."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def autocast(device):
    """The context of forward passes, in which matrix products have the type autocast_dtype(device)."""
    dtype = autocast_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def compile_model(model):
    """Compile the blocks of both towers, with CUDA graphs: without these, the GPU waits for Python, which
    starts about a thousand kernels in a pass. The last block has little work, so it is not compiled."""
    gc.collect()  # free the graphs of a model trained before, as in a study of finetune.py
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # all blocks share one function, with a version for each shape
    torch._inductor.config.fallback_random = True  # PyTorch's dropout (in LoRA) is faster than Inductor's
    for tower in (model.vision_model, model.text_model):
        for block in tower.encoder.layers[:-1]:
            block.compile(dynamic=False, mode="reduce-overhead")  # which means CUDA graphs


# --- The command -----------------------------------------------------------------------------------------


def open_data(args, device, tokenizer_name, config):
    """(splits, tokenizer) of --data, for a model of this configuration. Checks --out and --batch-size."""
    if not args.resume and (args.out / "checkpoint.pt").exists():
        raise data.InputError(f"--out {args.out} holds a run: add --resume, or give another folder")
    if RANK > 0:
        dist.barrier()  # wait until process 0 has decoded the photos
    sizes = config.image_size, config.max_position_embeddings
    splits, tokenizer = data.load(args.data, tokenizer_name, *sizes, args.captions, args.photos)
    if RANK == 0 and WORLD_SIZE > 1:
        dist.barrier()  # let the others read what is decoded
    photos = len(splits["train"].photos)
    if args.batch_size > photos:
        raise data.InputError(f"--batch-size {args.batch_size} is more than the {photos} photos: give fewer")
    if args.batch_size % WORLD_SIZE:
        raise data.InputError(f"--batch-size must be a multiple of {WORLD_SIZE}, the number of processes")
    for name, split in splits.items():
        print(f"{name:10s}{len(split.photos):,} photos, {len(split.captions):,} captions")
        split.place(device)
    return splits, tokenizer


def print_start(model, splits, batch_size, device):
    """Print the device, the size, and the losses of a model that guesses."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    parameters = sum(p.numel() for p in model.parameters())
    B, group = batch_size, min(64, len(splits["val"].photos))
    print(f"device    {WORLD_SIZE} x {name}, {autocast_dtype(device)}")
    print(f"model     {parameters / 1e6:.1f} M parameters")
    print(f"chance    loss ln {B} = {math.log(B):.3f}, in validation ln {group} = {math.log(group):.3f}")


def parse_args(argv):
    parser = data.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=PRESETS, default="ViT-B/16")
    parser.add_argument("--text", choices=("bert", "causal"), default="bert", help="causal is OpenAI's")
    parser.add_argument("--init", choices=("mimetic", "openai"), default="mimetic", help="initial attention")
    tokenizer = "openai/clip-vit-base-patch16"
    parser.add_argument("--tokenizer", default=tokenizer, help="hub name, folder, or `train` to train one")
    parser.add_recipe(Recipe())  # and --data, --captions, --photos, --out, --resume, --device, --compile
    given = parser.first_look(argv)  # parse once to learn --data and --model, on which defaults depend
    if given.data in data.DRAWN:
        # These were best on drawn scenes.
        drawn = {"model": "tiny", "text": "causal", "init": "openai", "tokenizer": "train"}
        parser.set_defaults(**drawn, **asdict(DRAWN_RECIPE))
    elif given.model == "tiny":
        parser.set_defaults(**asdict(TINY_RECIPE))
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / Path(args.data).absolute().name
    return args


def run(args):
    recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
    device = open_device(args.device)
    # With --micro-batch the memory of a CPU suffices, and a very slow run is the user's choice.
    if device.type == "cpu" and args.model == "ViT-B/16" and not recipe.micro_batch:
        advice = "add --model tiny --tokenizer train, or take --data shapes"
        raise data.InputError(f"ViT-B/16, the default for photos, needs a GPU: {advice}")
    config = replace(PRESETS[args.model], causal=args.text == "causal")
    splits, tokenizer = open_data(args, device, args.tokenizer, config)
    if RANK == 0 and not (args.out / "checkpoint.pt").exists():  # a resumed run has its tokenizer
        with data.atomic(args.out / "tokenizer") as temporary:
            tokenizer.save_pretrained(temporary)
    torch.manual_seed(recipe.seed)  # the same weights in every process
    config = replace(config, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model = CLIP(config).to(device)
    if args.init == "mimetic":
        init_mimetic(model)
    print_start(model, splits, recipe.batch_size, device)
    before = embed(model, splits["val"])  # for inside.png
    compile = args.compile and device.type == "cuda"
    ema_model, history = train(model, splits, recipe, args.out, args.resume, compile)
    if RANK == 0:
        if "test" in splits:
            print(f"test      {describe(evaluate(ema_model, splits['test']))}")
        after = embed(ema_model, splits["val"])
        data.draw_pictures(args.out, history, splits["val"], before, after, ema_model)
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
        print(f"done      {history[-1]['minutes']:.1f} minutes of training{memory}: {args.out}")


def main(argv=None):
    return data.run_command(argv, parse_args, run)


if __name__ == "__main__":
    sys.exit(main())
