"""pixcell_min: fine-tune PixCell with LoRA and an embedding adapter, in plain PyTorch.

from pixcell_min import load_pixcell_base, load_adapter, uni2h_encoder
"""

from pixcell_min.adapter import load_adapter, save_adapter
from pixcell_min.base import load_pixcell_base, uni2h_encoder

__all__ = ["load_adapter", "load_pixcell_base", "save_adapter", "uni2h_encoder"]
