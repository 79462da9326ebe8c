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
from dataclasses import asdict, dataclass, field
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
