"""A small trainable map from one tile embedding to another, in front of the frozen denoiser.

    adapter(x) = x + r·W₂·GELU(W₁·x/r + b₁) + r·b₂        r = √mean(x²), one number per embedding

W₂ and b₂ are zero at the start: the first step sees the released model exactly. The null embedding
of classifier-free guidance does not pass through it; that is the caller's part. Parameters are
float32 and the term is computed in their precision; the result has the precision of x.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from pixcell_min.checkpoint import load_strict, read_tensors, save_tensors

SMALLEST_SQUARE = 1e-24  # keeps x / r finite for an embedding of zeros


class EmbeddingAdapter(nn.Module):
    """Residual MLP E → hidden → E, exactly the identity when new; adapter(c·x) = c·adapter(x)."""

    def __init__(self, embedding_dim, hidden_dim=None, generator=None):
        """hidden_dim None is E // 4; `generator` draws W₁, U(±1/√E). Raises: ValueError: sizes."""
        super().__init__()
        hidden_dim = embedding_dim // 4 if hidden_dim is None else hidden_dim
        if embedding_dim < 1 or hidden_dim < 1:
            raise ValueError(f"adapter sizes must be 1 or more, got {embedding_dim}, {hidden_dim}")
        self.fc1 = nn.utils.skip_init(nn.Linear, embedding_dim, hidden_dim, dtype=torch.float32)
        self.fc2 = nn.utils.skip_init(nn.Linear, hidden_dim, embedding_dim, dtype=torch.float32)
        nn.init.kaiming_uniform_(self.fc1.weight, a=math.sqrt(5), generator=generator)
        for tensor in (self.fc1.bias, self.fc2.weight, self.fc2.bias):
            nn.init.zeros_(tensor)

    def forward(self, x):
        """x (…, E) → (…, E), same dtype. Raises: ValueError if the last dimension is not E."""
        if x.shape[-1:] != (self.fc1.in_features,):
            raise ValueError(f"the adapter takes embeddings (…, {self.fc1.in_features}), got "
                             f"{tuple(x.shape)}; was it trained with another encoder?")
        wide = x.to(self.fc1.weight.dtype)                                   # (…, E)
        # Divided by its size and multiplied back, so that one learning rate serves any encoder: at
        # embedding scales 0.01, 1, 100 of a synthetic shift, 400 AdamW steps at 1e-4 leave 33 % of
        # the error each time; a LayerNorm in its place leaves 17, 31, 95 %, no norm 26, 33, 34 %.
        size = wide.square().mean(-1, keepdim=True).clamp_min(SMALLEST_SQUARE).sqrt()  # (…, 1)
        hidden = F.gelu(self.fc1(wide / size))                               # (…, E // 4)
        return x + (size * self.fc2(hidden)).to(x.dtype)                     # (…, E)


def save_adapter(adapter, path, metadata: dict[str, str] | None = None) -> None:
    """Write the four tensors; `metadata` is kept by .safetensors, a .pth holds tensors alone."""
    save_tensors(path, adapter.state_dict(), metadata)


def load_adapter(path, expected_base_hash=None) -> EmbeddingAdapter:
    """Read .safetensors or .pth (never code); sizes come from the tensors; float32, in eval mode.

    expected_base_hash: what a header that names its `base_hash` must say (a .pth has no header).
    Raises: ValueError if the file is missing, broken, holds code, other keys, shapes or NaN, or
    was trained with another base.
    """
    tensors, metadata = read_tensors(path)
    if expected_base_hash not in (None, made_for := metadata.get("base_hash", expected_base_hash)):
        raise ValueError(f"{path}: adapter of base {made_for}, the loaded base is "
                         f"{expected_base_hash}; load the base it was trained with")
    shape = tensors["fc1.weight"].shape if "fc1.weight" in tensors else (1, 1)
    if len(shape) != 2 or 0 in shape or not all(
            t.float().isfinite().all() for t in tensors.values() if t.is_floating_point()):
        raise ValueError(f"{path}: not an adapter: NaN, or fc1.weight is not (hidden, E)")
    adapter = EmbeddingAdapter(shape[1], shape[0])
    load_strict(adapter, tensors, path)
    return adapter.eval()
