# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "numpy", "pillow", "transformers>=5.8", "peft>=0.18", "pytest", "matplotlib"]
# ///
"""CLIP in one file: two transformers that learn to put a photo and its caption at the same place.

    python clip.py --data shapes     drawn scenes, nothing downloaded: about a minute on two CPU cores
    python clip.py --epochs 55       ViT-B/16 from scratch on Flickr30k, on a GPU (40 is the default)

Radford et al. 2021, arXiv:2103.00020. Module names are Hugging Face's: released weights load unchanged.
Shapes: N photos, M captions of a split; B photos in a batch, V crops and K captions of each, S x S pixels, T
tokens (words, or patches + 1), C channels of a tower, H heads, D = C / H, P x P pixels a patch, E shared.
A first reading ends with the plain case of `backward`: what follows makes CLIP practical, not clearer.
"""

import copy
import math
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import combinations, product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from data import RANK, WORLD_SIZE, InputError, gather, is_main_process, setting, wait_for_all

# --- Configuration ---------------------------------------------------------------------------------------


@dataclass
class TowerConfig:
    """The size of one transformer, in Hugging Face's names."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int


@dataclass
class CLIPConfig:
    """All that defines a CLIP. The defaults are ViT-B/16 as released, except causal: OpenAI's is True.
    causal: False is a BERT-style text tower, in which every token sees the whole caption; True is one where
    a token sees itself and what stands before it. hidden_act: "quick_gelu", or "gelu", faster on CPUs.
    """

    vision: TowerConfig = field(default_factory=lambda: TowerConfig(768, 12, 12, 3072))
    text: TowerConfig = field(default_factory=lambda: TowerConfig(512, 12, 8, 2048))
    image_size: int = 224
    patch_size: int = 16
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    projection_dim: int = 512
    hidden_act: str = "quick_gelu"
    causal: bool = False


TINY = dict(image_size=48, patch_size=12, projection_dim=96, hidden_act="gelu")
PRESETS = {
    "ViT-B/16": CLIPConfig(),
    "tiny": CLIPConfig(TowerConfig(96, 3, 6, 384), TowerConfig(64, 2, 4, 256), **TINY),
}

# --- The model -------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention: softmax(Q K^T / sqrt(D)) V in each of H heads (Vaswani et al. 2017, eq. 1).
    x (B, T, C) and `asking`, all of its tokens or T' of them, (B, T', C), to (B, T', C). A row of the softmax
    says how much one that asks takes from each token of x. Where `mask`, of a shape that broadcasts to
    (B, H, T', T), is False, Q K^T is set to minus infinity: weight 0.
    """

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        # Linears of their own, which LoRA can wrap: in nn.MultiheadAttention it has no effect (peft #761).
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, asking, x, mask=None):
        heads = (self.num_heads, -1)
        q = self.q_proj(asking).unflatten(-1, heads).transpose(1, 2)  # (B, H, T', D)
        k = self.k_proj(x).unflatten(-1, heads).transpose(1, 2)  # (B, H, T, D)
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)  # (B, H, T, D)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, T', D)
        return self.out_proj(x.transpose(1, 2).flatten(2))


def quick_gelu(x):
    """OpenAI's GELU. Weights trained with one lose accuracy with the other, silently (open_clip #771)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class MLP(nn.Module):
    """Two Linears with an activation between, applied to each token on its own."""

    def __init__(self, config, hidden_act):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation_fn = ACTIVATIONS[hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))


def to_autocast_type(x):
    """x in 16 bits, where autocast is on: half the bytes for all that follows."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class LayerNorm(nn.LayerNorm):
    """PyTorch's, in the type of x: autocast would make it fp32, twice the bytes for all that reads it. Mean
    and variance are summed in fp32 all the same."""

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def take_tokens(x, places):
    """Of each row of x (B, T, C) the tokens at its places (B, n): (B, n, C)."""
    return x.gather(1, places[:, :, None].expand(-1, -1, x.shape[2]))


class Block(nn.Module):
    """Pre-norm transformer block, (B, T, C) to (B, T, C): the residual stream x is never normalised, only
    what is read from it; deep stacks then train without tricks (Xiong et al. 2020, arXiv:2002.04745).
    With `read` (B, 1), the place of a token in each row, that token alone asks and goes on: (B, 1, C)."""

    def __init__(self, config, hidden_act):
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size)
        self.self_attn = Attention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size)
        self.mlp = MLP(config, hidden_act)

    def forward(self, x, mask=None, read=None):
        asking = normed = self.layer_norm1(x)  # (B, T, C)
        if read is not None:
            x, asking = take_tokens(x, read), take_tokens(normed, read)  # (B, 1, C)
        x = x + self.self_attn(asking, normed, mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """A stack of blocks, (B, T, C) to (B, C): CLIP reads a photo or a caption at one token, `read` (B,). What
    the last block would make of the others nothing reads: it needs their keys and values alone. read_mask
    is the row of the mask for the token that is read."""

    def __init__(self, config, hidden_act):
        super().__init__()
        self.layers = nn.ModuleList(Block(config, hidden_act) for _ in range(config.num_hidden_layers))

    def forward(self, x, read, mask, read_mask):
        x = to_autocast_type(x)
        for layer in self.layers[:-1]:
            x = layer(x, mask)
        return self.layers[-1](x, read_mask, read[:, None])[:, 0]


def drop_patches(x, share):
    """Leaves a share of the patches x (B, T, C) out, other ones for each photo and step: half of them halve
    the work (FLIP, Li et al. 2022, arXiv:2212.00794), and a photo never looks the same twice."""
    B, T, _ = x.shape
    kept = max(1, round(T * (1 - share)))
    places = torch.rand(B, T, device=x.device).argsort(dim=1)[:, :kept]  # (B, T')
    return take_tokens(x, places)  # (B, T', C), in any order: x knows the positions


class VisionEmbeddings(nn.Module):
    """Photos (B, 3, S, S) to tokens (B, T, C): one for each P x P patch, and before them the class token,
    which has no pixels of its own and gathers what the blocks find."""

    def __init__(self, config):
        super().__init__()
        C, P = config.vision.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(C))
        self.patch_embedding = nn.Conv2d(3, C, kernel_size=P, stride=P, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // P) ** 2 + 1, C)
        self.patch_dropout = 0.0  # share of the patches that training leaves out

    def forward(self, pixels):
        B, _, height, width = pixels.shape
        P = self.patch_embedding.kernel_size[0]
        # A Conv2d for its name in released files; as a Linear on each flattened patch it runs faster.
        patches = to_autocast_type(pixels).view(B, 3, height // P, P, width // P, P)
        patches = patches.permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, 3, P, P)
        patches = patches.reshape(B, -1, 3 * P * P)  # (B, T - 1, 3 P P)
        x = F.linear(patches, self.patch_embedding.weight.flatten(1))  # (B, T - 1, C)
        x = x + self.position_embedding.weight[1:].to(x.dtype)
        if self.training and self.patch_dropout:
            x = drop_patches(x, self.patch_dropout)
        class_token = self.class_embedding + self.position_embedding.weight[0]
        return torch.cat([class_token.to(x.dtype).expand(B, 1, -1), x], dim=1)  # (B, T, C)


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al. 2020, arXiv:2010.11929): photos (B, 3, S, S) to pooled features (B, C)."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        # OpenAI's extra norm. Hugging Face's name for it lost an "e", and is so in every released file.
        self.pre_layrnorm = LayerNorm(config.vision.hidden_size)
        self.encoder = Encoder(config.vision, config.hidden_act)
        self.post_layernorm = LayerNorm(config.vision.hidden_size)

    def forward(self, pixels):
        x = self.embeddings(pixels)  # (B, T, C)
        x = self.pre_layrnorm(x)
        class_token = x.new_zeros(x.shape[0], dtype=torch.long)  # it stands first
        x = self.encoder(x, class_token, mask=None, read_mask=None)
        return self.post_layernorm(x)  # (B, C)


class TextEmbeddings(nn.Module):
    """Token ids (B, T) to vectors (B, T, C): what the token is, plus where it stands."""

    def __init__(self, config):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.text.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.text.hidden_size)

    def forward(self, ids):
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextTransformer(nn.Module):
    """Captions (B, T), each `<start> words <end> padding`, to pooled features (B, C) of their end token."""

    def __init__(self, config):
        super().__init__()
        self.causal, self.eos_token_id = config.causal, config.eos_token_id
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config.text, config.hidden_act)
        self.final_layer_norm = LayerNorm(config.text.hidden_size)

    def forward(self, ids):
        B, T = ids.shape
        # The first end token: padding repeats it, argmax returns the first of equals.
        end = (ids == self.eos_token_id).int().argmax(dim=-1)  # (B,)
        position = torch.arange(T, device=ids.device)
        padding_mask = (position <= end[:, None])[:, None, None]  # (B, 1, 1, T): no token sees padding
        # Causal: padding stands after the end token, where nothing that is read can see it. The end token's
        # own row of the causal mask is the padding mask.
        mask = position[:, None] >= position if self.causal else padding_mask  # (T, T) or as above
        x = self.embeddings(ids)  # (B, T, C)
        x = self.encoder(x, end, mask, read_mask=padding_mask)
        return self.final_layer_norm(x)  # (B, C)


class CLIP(nn.Module):
    """Two towers and a temperature. `forward`, then contrastive_loss, are the paper's pseudo-code (figure 3):

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
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.name = self.source = None  # of a model that was loaded: where it is, where its tokenizer is
        init_weights(self)

    def encode_image(self, pixels):
        """Photos (B, 3, S, S), normalised as in data.normalize, to unit vectors (B, E) in fp32."""
        return F.normalize(self.visual_projection(self.vision_model(pixels)).float(), dim=-1)

    def encode_text(self, ids):
        """Token ids (B, T) to unit vectors (B, E) in fp32. A row that has no end is read at its start."""
        return F.normalize(self.text_projection(self.text_model(ids)).float(), dim=-1)

    def similarity(self, image_embeds, text_embeds):
        """exp(logit_scale) x cosine, (..., B, E), (..., B', E) to (..., B, B'). Near 100 bf16 is coarse."""
        with torch.autocast(image_embeds.device.type, enabled=False):
            return self.logit_scale.exp() * image_embeds @ text_embeds.mT

    def forward(self, pixels, ids):
        """B photos and B captions to logits_per_image (B, B); its transpose is logits_per_text."""
        image_embeds = self.encode_image(pixels)  # (B, E)
        text_embeds = self.encode_text(ids)  # (B, E)
        return self.similarity(image_embeds, text_embeds)  # (B, B)


def sines(places, C):
    """Sines and cosines of places (T,) at C / 2 wavelengths, (T, C): at neighbouring places they are alike
    (Vaswani et al. 2017, 3.5)."""
    angles = places[:, None] * 10_000 ** -torch.linspace(0, 1, C // 2, device=places.device)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@torch.no_grad()
def init_weights(model):
    """In place: biases 0, the rest normal with the scales of openai/CLIP (model.py, initialize_parameters),
    those of its text blocks for both towers; norms are left as PyTorch makes them, with weight 1, bias 0.
    Attention and positions start as trained models have them, since few photos hardly teach them."""
    for tower, config in ((model.vision_model, model.config.vision), (model.text_model, model.config.text)):
        inner = config.hidden_size**-0.5
        # A block adds to the residual stream twice: this keeps its variance from growing with depth (GPT-2).
        outer = inner * (2 * config.num_hidden_layers) ** -0.5
        for name, module in tower.encoder.named_modules():
            if isinstance(module, nn.Linear):
                std = {"fc1": (2 * config.hidden_size) ** -0.5, "fc2": outer}.get(name.split(".")[-1], inner)
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
        for attention in [block.self_attn for block in tower.encoder.layers]:
            # A token looks at those like it, k = q, and takes their mean away, out = -v transposed (mimetic
            # initialisation: Trockman & Kolter 2023, arXiv:2305.09828, whose singular values aren't needed).
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.out_proj.weight.copy_(attention.v_proj.weight.T * -outer / inner)

    vision, text = model.vision_model.embeddings, model.text_model.embeddings
    C, side = model.config.vision.hidden_size, model.config.image_size // model.config.patch_size
    nn.init.normal_(vision.class_embedding, std=C**-0.5)
    down, right = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    grid = torch.cat([sines(down, C // 2), sines(right, C // 2)], dim=1)  # (T - 1, C)
    nn.init.zeros_(vision.position_embedding.weight[0])  # the class token stands nowhere
    vision.position_embedding.weight[1:] = grid * C**-0.5 / grid.std()
    # Ours: patches of unit pixels start as strong as positions. With the usual 1 / sqrt(fan in) they would be
    # sqrt(C) times stronger, 28 for ViT-B/16, and where a patch stands would hardly be seen.
    fan_in = 3 * model.config.patch_size**2
    nn.init.normal_(vision.patch_embedding.weight, std=(C * fan_in) ** -0.5)
    nn.init.normal_(text.token_embedding.weight, std=0.02)
    line = sines(torch.arange(model.config.max_position_embeddings), model.config.text.hidden_size)
    text.position_embedding.weight.copy_(line * 0.01 / line.std())

    nn.init.normal_(model.visual_projection.weight, std=C**-0.5)
    nn.init.normal_(model.text_projection.weight, std=model.config.text.hidden_size**-0.5)
    # One over the temperature 0.07. At a scale of exp(0.07), a common slip, training is slow to leave chance.
    nn.init.constant_(model.logit_scale, math.log(1 / 0.07))


# --- Loss and recall -------------------------------------------------------------------------------------


def contrastive_loss(logits_per_image):
    """Mean of two cross-entropies over logits (B, B), a scalar: a row asks which caption fits its photo, a
    column which photo fits its caption, and the diagonal is right. Chance is ln B, 4.85 for 128."""
    if logits_per_image.shape != (len(logits_per_image),) * 2:
        raise ValueError(f"logits_per_image is {tuple(logits_per_image.shape)}, where (B, B) is needed")
    labels = torch.arange(len(logits_per_image), device=logits_per_image.device)
    loss_image = F.cross_entropy(logits_per_image.float(), labels)
    loss_text = F.cross_entropy(logits_per_image.float().T, labels)
    return (loss_image + loss_text) / 2


def multiview_loss(model, image_embeds, text_embeds):
    """V crops (B, V, E) and K captions (B, K, E) of B photos: (loss, pair_loss), scalars. pair_loss is the
    mean of contrastive_loss over all V K ways to pair a crop with a caption: with one of each, CLIP's loss.
    The loss adds that over pairs of crops (SLIP, arXiv:2112.12750) and of captions, where there are any."""

    def mean_loss(pairs):
        one, other = zip(*pairs)  # n times (B, E) each
        logits = model.similarity(torch.stack(one), torch.stack(other))  # (n, B, B)
        return torch.vmap(contrastive_loss)(logits).mean()

    crops, captions = image_embeds.unbind(1), text_embeds.unbind(1)  # V and K times (B, E)
    loss = pair_loss = mean_loss(product(crops, captions))
    if len(crops) > 1:
        loss = loss + mean_loss(combinations(crops, 2))
    if len(captions) > 1:
        loss = loss + mean_loss(combinations(captions, 2))
    return loss, pair_loss


def ranks(queries, answers, query_photo, answer_photo, size):
    """How many wrong answers are at least as similar to each query as its best right one, (Q,). queries
    (Q, E) and answers (A, E) are embeddings; an answer of the query's photo is right, and where there is none
    the rank is infinite. Similarities are made in parts of `size` numbers, and of one row at least."""
    found, rows = [], max(1, size // len(answers))
    for part, photo in zip(queries.split(rows), query_photo.split(rows)):
        similarity = part @ answers.T  # (q, A)
        right = photo[:, None] == answer_photo
        best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        wrong = ~(similarity < best) & ~right  # not `>=`: NaN counts against the model, as ties do
        found.append(torch.where(right.any(dim=1), wrong.sum(dim=1), torch.inf))
    return torch.cat(found)


def recall_at_k(image_embeds, text_embeds, caption_owner, ks=(1, 5, 10), size=2**26):
    """Retrieval recall as published for Flickr30k: {"t2i_r1": fraction, ..., "i2t_r1": fraction, ...}.
    image_embeds (N, E), text_embeds (M, E); caption_owner (M,): the photo that each caption describes. Text
    to image: how often a caption's photo is among its k best; image to text: how often any of its captions
    is. Equal embeddings score 0, not 100 %. Where two photos share a caption, the other one counts against
    the model: it fits, but only owners are known.
    """
    photos = torch.arange(len(image_embeds), device=image_embeds.device)
    if len(caption_owner) != len(text_embeds):
        raise ValueError(f"caption_owner has {len(caption_owner)} entries for {len(text_embeds)} captions")
    if not 0 <= caption_owner.min() <= caption_owner.max() < len(photos):
        raise ValueError(f"caption_owner names photos outside the {len(photos)} of image_embeds")
    text_rank = ranks(text_embeds, image_embeds, caption_owner, photos, size)  # (M,)
    image_rank = ranks(image_embeds, text_embeds, photos, caption_owner, size)  # (N,)
    recall = {f"t2i_r{k}": (text_rank < k).float().mean().item() for k in ks}
    return recall | {f"i2t_r{k}": (image_rank < k).float().mean().item() for k in ks}


# --- Evaluation ------------------------------------------------------------------------------------------


@torch.no_grad()
def embed(model, split, batch_size=250):
    """Photos (N, E) and captions (M, E) of a split, in eval mode. Not of train, whose photos are larger."""
    device, training = model.logit_scale.device, model.training
    model.eval()
    images, texts = [], []
    with data.autocast(device), data.uncompiled():  # compiled parts are for training
        for rows in torch.arange(len(split.photos)).split(batch_size):
            images.append(model.encode_image(data.normalize(split.take(rows, device))))
        for rows in torch.arange(len(split.captions)).split(batch_size):
            texts.append(model.encode_text(split.tokens(rows, device)))
    model.train(training)
    return torch.cat(images), torch.cat(texts)


@torch.no_grad()
def evaluate(model, split):
    """The loss of a split, its recalls in percent and their sum: {"loss", "t2i_r1", ..., "i2t_r10", "rsum"}.
    The loss is over whole groups of 64 photos (of all, if fewer), five times with another caption of each, so
    that it compares across batch sizes: chance is ln 64 = 4.159. The sum picks the best epoch."""
    images, texts = embed(model, split)
    first, count = split.first_captions()  # (N,), (N,)
    size, losses = min(64, len(images)), []
    for turn in range(5):
        own = texts[first + turn % count]  # (N, E): a caption of each photo
        for start in range(0, len(images) - size + 1, size):
            group = slice(start, start + size)
            losses.append(contrastive_loss(model.similarity(images[group], own[group])))
    recall = recall_at_k(images, texts, split.owner.to(images.device))
    percent = {name: 100 * value for name, value in recall.items()}
    return {"loss": torch.stack(losses).mean().item(), **percent, "rsum": sum(percent.values())}


# --- Training --------------------------------------------------------------------------------------------


@dataclass
class Recipe:
    """How to train: the defaults are for some thousand photos and a ViT-B/16. InputError for odd values."""

    epochs: int = setting(40, 1, 1e6, "passes over the photos, less those that fill no whole batch")
    batch_size: int = setting(128, 2, 1e6, "photos in a step, on all GPUs together")
    micro_batch: int = setting(0, 0, 1e6, "photos that a GPU embeds at once, with all crops; 0 is all")
    lr: float = setting(1e-3, 0, 1e3, "peak learning rate")
    weight_decay: float = setting(0.5, 0, 1e3, "of the matrices of Linears")
    warmup: float = setting(0.1, 0, 1, "share of the steps in which lr rises")
    muon: int = setting(1, 0, 1, "1: Muon trains the matrices of the blocks, 0: AdamW trains all")
    # A small set of photos is soon learnt by heart. It helps to show each in another way every time: cropped,
    views: int = setting(4, 1, 1e3, "crops of a photo in a step, all positives (drawn scenes aren't cropped)")
    crop: float = setting(0.1, 0.01, 1, "smallest share of a photo that a crop shows")
    # in another light,
    colour: float = setting(0.8, 0, 1, "largest change of a crop's brightness, contrast and saturation")
    # with gaps, so that four crops cost as much as one photo,
    patch_dropout: float = setting(0.75, 0, 0.99, "share of a photo's patches that training leaves out")
    # in other sentences,
    captions: int = setting(4, 1, 1e3, "captions of a photo in a step, positives of crops and each other")
    # with words that are missing or wrong, and halves that have changed places.
    delete_words: float = setting(0.2, 0, 0.99, "share of a caption's words that training leaves out")
    delete_spans: float = setting(0.4, 0, 1, "share of the captions that lose some words in a row")
    swap_halves: float = setting(0.3, 0, 1, "share of the captions whose two halves change places")
    replace_words: float = setting(0.3, 0, 0.99, "share of a caption's words that others replace")
    # As a falling lr does, a mean takes the noise out of the weights, but while lr is still high.
    ema: float = setting(0.999, 0, 1, "largest decay of the weights' running mean, which is kept; 0: none")
    seed: int = setting(0, 0, 1e9, "of weights, batches and crops")

    def __post_init__(self):
        data.check_settings(self)


# With muon=0 near CLIP as published: one crop, one caption, no colours or words changed, the last weights.
PLAIN = dict(views=1, crop=0.4, colour=0.0, patch_dropout=0.0, captions=1, ema=0.0)
PLAIN |= dict(delete_words=0.0, delete_spans=0.0, swap_halves=0.0, replace_words=0.0)
DRAWN_RECIPE = Recipe(epochs=6, lr=1.5e-3, weight_decay=0.3, **PLAIN)  # a small model for a small world


def trained_weights(model):
    """{name: parameter} of what trains: all, or an adapter alone."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def orthogonalize(x):
    """Matrices x (n, rows, columns) with all singular values moved near 1: five steps of Newton and Schulz in
    bf16, with coefficients that hurry and are not exact (Jordan 2024, kellerjordan.github.io/posts/muon)."""
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT).mT
    x = x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT  # (n, rows, rows)
        # 3.4445 x - 4.7750 x x^T x + 2.0315 (x x^T)^2 x. The first term joins the others in bf16, which makes
        # the result 2 % inexact: to add it afterwards would read and write x once more.
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        factor.diagonal(dim1=1, dim2=2).add_(3.4445)
        x = factor @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal: a step moves a matrix equally far in all directions, as far as AdamW would in
    the mean (Liu et al. 2025, arXiv:2502.16982). It is torch.optim.Muon ("match_rms_adamw") with groups of
    one shape, stepped together: the 144 matrices of ViT-B/16, one by one, would leave a GPU waiting."""

    def __init__(self, groups, lr, weight_decay, momentum=0.95):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            matrices, lr, momentum = group["params"], group["lr"], group["momentum"]
            gradients = torch.stack([matrix.grad for matrix in matrices])  # (n, rows, columns)
            state = self.state[matrices[0]]  # that of all
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradients)
            mean = state["momentum_buffer"].lerp_(gradients, 1 - momentum)
            ahead = gradients.lerp(mean, momentum)  # Nesterov's: a look ahead
            updates = data.share(orthogonalize, ahead).float()
            torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
            torch._foreach_add_(matrices, updates.unbind(), alpha=-lr * 0.2 * max(matrices[0].shape) ** 0.5)


def make_optimizers(model, recipe):
    """[Muon, AdamW]: Muon for the matrices of the blocks, if the recipe has it; AdamW with OpenAI's betas for
    the rest. Decay pulls towards zero: a sensible prior for matrices of Linears (LoRA's too), not for norms,
    biases, the logit scale and, unlike the paper, embeddings, also of patches."""
    blocks, matrices, others = {}, [], []
    for name, p in trained_weights(model).items():
        if recipe.muon and ".layers." in name and p.ndim == 2:
            blocks.setdefault(p.shape, []).append(p)
        else:
            (matrices if p.ndim >= 2 and "embedding" not in name else others).append(p)
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    decay = recipe.weight_decay
    adamw = torch.optim.AdamW(groups, recipe.lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=decay, fused=True)
    shapes = [{"params": same} for same in blocks.values()]
    return [Muon(shapes, recipe.lr, decay), adamw] if shapes else [adamw]


def learning_rate(step, steps, peak, warmup):
    """At step 0, 1, ...: a line up to `peak` over the share `warmup` of the steps, then half a cosine."""
    if step < warmup * steps:
        return peak * (step + 1) / (warmup * steps + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup * steps) / (steps - warmup * steps)))


def encode_pairs(model, split, pairs, recipe, seed):
    """pairs (B, 1 + K): rows of B photos, and of K captions of each. Returns the embeddings of V crops of a
    photo (B, V, E) and of its captions (B, K, E). The same seed makes the same crops, words and dropout."""
    torch.manual_seed(seed)
    device, size = model.logit_scale.device, model.config.image_size
    pixels = split.take(pairs[:, 0], device)  # (B, S, S, 3)
    # Photos are stored with a margin for crops. Drawn scenes are not: a crop makes "left" and "large" wrong.
    pixels = data.augment(pixels, size, recipe) if pixels.shape[1] > size else data.normalize(pixels)
    ids = split.tokens(pairs[:, 1:].flatten(), device, cut=True)  # (B K, T)
    ids = data.vary_captions(ids, model.config, recipe)
    with data.autocast(device):
        image_embeds, text_embeds = model.encode_image(pixels), model.encode_text(ids)
    return image_embeds.unflatten(0, (len(pairs), -1)), text_embeds.unflatten(0, (len(pairs), -1))


def train_step(model, optimizers, scaler, split, pairs, recipe, step, steps):
    """Embed, loss, backward, clip, schedule, step on pairs (B, 1 + K). Returns the loss between photos and
    captions, a scalar on the device."""
    # This process's share, in micro-batches (in the plain case one), each with a seed of its own.
    parts = pairs.chunk(WORLD_SIZE)[RANK].split(recipe.micro_batch or len(pairs))
    seed = (recipe.seed << 32) + (step * WORLD_SIZE + RANK) * len(parts)
    encode = [partial(encode_pairs, model, split, part, recipe, seed + i) for i, part in enumerate(parts)]
    loss = backward(model, encode, scaler)
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # one odd batch can't throw the model far
    # In fp16 neither optimizer steps then: an infinite norm makes 0 of what is finite.
    overflow = scaler.is_enabled() and not norm.isfinite()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, recipe.lr, recipe.warmup)
        if not overflow:
            scaler.step(optimizer)
        optimizer.zero_grad()
    scaler.update()
    model.logit_scale.data.clamp_(max=math.log(100))  # the paper's bound (openai/CLIP #46)
    return loss


def update_mean(mean, trained, step, largest_decay):
    """mean = decay mean + (1 - decay) trained, in place. A decay of (1 + step) / (10 + step), TensorFlow's
    rule, takes the mean over about the last tenth of the steps so far: the random start is forgotten."""
    decay = min(largest_decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(mean.values()), [trained[name] for name in mean], 1 - decay)


def train(model, splits, recipe, run_dir, resume=False, compile=False):
    """Trains what requires a gradient in the model, on its device. Returns the history: a row an epoch, with
    the loss and recalls that the weights' running mean has on splits["val"]. After an epoch run_dir gets
    log.csv, and a checkpoint if the last is 20 seconds old or the run ends; resume goes on from there, on the
    CPU bit for bit: batches and crops derive from seed and step. InputError if the loss isn't finite."""
    split, B = splits["train"], recipe.batch_size
    steps_per_epoch = len(split.photos) // B
    steps = recipe.epochs * steps_per_epoch
    model.vision_model.embeddings.patch_dropout = recipe.patch_dropout
    optimizers = make_optimizers(model, recipe)
    scaler = torch.amp.GradScaler(enabled=data.half(model.logit_scale.device) == torch.float16)
    averaged = copy.deepcopy(model) if recipe.ema else model
    state = data.new_state(model.config, recipe, splits, trained_weights(model), trained_weights(averaged))
    if resume:
        data.load_state(run_dir, state, optimizers)
    if compile:
        data.compile_blocks(model)

    model.train()
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    saved = time.perf_counter()
    for epoch in range(len(state["history"]), recipe.epochs):
        start, total = time.perf_counter(), 0.0
        pairs = split.pairs(recipe.seed, epoch, recipe.captions)  # (N, 1 + K)
        for i, batch in enumerate(pairs[: steps_per_epoch * B].split(B)):
            step = epoch * steps_per_epoch + i
            loss = train_step(model, optimizers, scaler, split, batch, recipe, step, steps)
            if recipe.ema:
                update_mean(state["last"], state["trained"], step, recipe.ema)  # the weights of `averaged`
            total += loss
            if (step + 1) % max(10, steps // 40) == 0:  # some 40 lines for a long run
                loss = loss.item()  # waits for the GPU, so before the clock
                scale = model.logit_scale.exp().item()
                rate = (i + 1) / (time.perf_counter() - start)
                data.print_step(recipe, step, steps, loss, optimizers[0].param_groups[0]["lr"], scale, rate)

        row = {"epoch": epoch + 1, "train_loss": float(total) / steps_per_epoch, "train_chance": math.log(B)}
        row |= evaluate(averaged, splits["val"])
        if not math.isfinite(row["train_loss"] + row["loss"]):
            raise InputError("the loss is not finite: start a new run with a lower --lr or a longer --warmup")
        state["seconds"] += time.perf_counter() - start
        scale, lr = model.logit_scale.exp().item(), optimizers[0].param_groups[0]["lr"]
        row |= {"lr": lr, "logit_scale": scale, "minutes": state["seconds"] / 60}
        data.add_epoch(state, row, recipe)
        saved = data.save_progress(run_dir, state, optimizers, saved, epoch + 1 == recipe.epochs)
    wait_for_all()  # what process 0 wrote is there now
    return state["history"]


# --- Many pairs and many GPUs ----------------------------------------------------------------------------


def backward(model, encode, scaler):
    """Leaves the gradient of multiview_loss over the pairs of all processes in the parameters; returns
    pair_loss. encode: for each micro-batch a function that returns its embeddings, the same each time."""
    if len(encode) == 1:  # the plain case
        image_embeds, text_embeds = encode[0]()
        loss, pair_loss = multiview_loss(model, gather(image_embeds), gather(text_embeds))
        scaler.scale(loss).backward()
    else:
        # Every pair meets every other in the loss, but the towers need not hold all at once: gradient caching
        # (Gao et al. 2021, arXiv:2101.06983), which is exact.
        # Gradients add up in zeros of their own: what a CUDA graph gives, its next call overwrites.
        for p in trained_weights(model).values():
            p.grad = torch.zeros_like(p)
        # 1. Embed all pairs, and keep no graph: that is what fills the memory.
        with torch.no_grad():
            images, texts = zip(*[embeddings() for embeddings in encode])
        image_embeds, text_embeds = torch.cat(images).requires_grad_(), torch.cat(texts).requires_grad_()
        # 2. The loss is a function of the embeddings alone: compute it, and its gradient for each of them.
        loss, pair_loss = multiview_loss(model, gather(image_embeds), gather(text_embeds))
        scaler.scale(loss).backward()
        # 3. Embed each micro-batch again, now with a graph, and send its part of that gradient through it.
        sizes = [len(part) for part in images]
        gradients = zip(image_embeds.grad.split(sizes), text_embeds.grad.split(sizes))
        for embeddings, gradient in zip(encode, gradients):
            # The gradient of sum(x g), with g held fixed, is that of the loss: the chain rule.
            sum((x * g).sum() for x, g in zip(embeddings(), gradient)).backward()
    data.average_gradients(model)
    return pair_loss.detach()


# --- The command -----------------------------------------------------------------------------------------


@torch.no_grad()
def finish(model, splits, history, seed, run_dir):
    """The last and the best epoch on the test photos, if there are any; the pictures of the best."""
    state, judged = data.load_checkpoint(run_dir), splits.get("test", splits["val"])
    best = max(history, key=lambda row: row["rsum"])
    model.eval()
    for name, row in (("last", history[-1]), ("best", best)):
        model.load_state_dict(state[name])
        print(f"{name} epoch {row['epoch']:3d}  {data.describe(evaluate(model, judged))}")
    data.print_end(history, run_dir)

    split = splits["val"]
    torch.manual_seed(seed)
    untrained = CLIP(model.config).to(model.logit_scale.device)
    before, after = embed(untrained, split), embed(model, split)
    data.draw_curve(run_dir / "curve.png", history, len(split.photos))
    data.draw_retrieval(run_dir / "retrieval.png", split, *after)
    data.draw_inside(run_dir / "inside.png", split, before, after, model)


def parse_args(argv):
    drawn = {"model": "tiny", "tokenizer": "train", **asdict(DRAWN_RECIPE)}
    parser = data.Parser(description=f"Train CLIP from scratch. Defaults of drawn worlds: {drawn}.")
    parser.add_argument("--model", choices=PRESETS, default="ViT-B/16", help="size")
    parser.add_argument("--text", choices=("bert", "causal"), default="bert", help="causal is OpenAI's")
    parser.add_argument("--tokenizer", default="openai/clip-vit-base-patch16", help="name, folder or `train`")
    parser.add_settings(Recipe())  # and --data, --out, --resume, --device, --compile
    if parser.parse_known_args(argv)[0].data in data.DRAWN:  # a first look: the defaults depend on it
        parser.set_defaults(**drawn)
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / Path(args.data).absolute().name
    return args


def run(args):
    recipe, device = Recipe(**data.settings_of(args, Recipe)), data.open_device(args.device)
    config = PRESETS[args.model]
    splits, tokenizer = data.open_data(args, device, data.tokenizer_of_run(args), config)
    recipe = replace(recipe, batch_size=args.batch_size)  # smaller where there are fewer photos
    data.save_tokenizer(tokenizer, args.out)
    words = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(recipe.seed)  # the same weights in every process
    model = CLIP(replace(config, causal=args.text == "causal", **words)).to(device)
    compile = args.compile and device.type == "cuda"
    data.print_start(model, splits, recipe, device, compile)
    history = train(model, splits, recipe, args.out, args.resume, compile)
    if is_main_process():
        finish(model, splits, history, recipe.seed, args.out)


def main(argv=None):
    return data.command(argv, parse_args, run)


if __name__ == "__main__":
    sys.exit(main())
