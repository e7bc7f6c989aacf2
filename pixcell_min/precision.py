"""Which number format the network's forward runs in; what autocast covers, and what it must not.

LoRA, adapter, schedule, loss and latents stay float32: autocast wraps the transformer's forward,
and bfloat16's the decoding of samples. The frozen base may hold what autocast would round anyway.
"""

import os

import torch
from torch import nn

TRAIN_IN_LESS = ("start anew with --gradient-checkpointing or a smaller --batch-size and more "
                 "--gradient-accumulation-steps")
DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose_device(name: str) -> torch.device:
    """"auto": CUDA where there is one, else the CPU. Raises: ValueError if no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    message = f"device {name!r} is not available here; expected auto or cpu"
    try:
        device = torch.device(name)
    except RuntimeError:  # no such name; torch's own text lists every back end
        raise ValueError(message) from None
    there = {"cuda": torch.cuda.is_available,
             "mps": torch.backends.mps.is_available}.get(device.type, lambda: True)
    if not there() or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(message)
    return device


def choose_dtype(mixed_precision: str, device: torch.device) -> torch.dtype | None:
    """"no", "fp16", "bf16" or "auto" → the autocast dtype, None for plain float32.

    auto: fp16 on CUDA; bf16 on a CPU with bf16 instructions (AMX or AVX-512, where it is the faster
    one); else None. Raises: ValueError for another name.
    """
    if mixed_precision not in ("auto", *DTYPES):
        raise ValueError(f"mixed_precision is {mixed_precision!r}, expected auto, no, fp16 or bf16")
    if mixed_precision != "auto":
        return DTYPES[mixed_precision]
    if device.type == "cuda":
        return torch.float16
    fast_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if device.type == "cpu" and fast_bf16 else None


def autocast(device: torch.device, dtype: torch.dtype | None):
    """Context in which matrix products run in `dtype`; with None it changes nothing."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def decoding_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """Autocast dtype of the decoder where the denoiser's is `dtype`: float16 would overflow there,
    bfloat16 would not.
    """
    return dtype if dtype == torch.bfloat16 else None


def hold_products_in(network: nn.Module, dtype: torch.dtype | None) -> None:
    """Keep weights and biases of linear and convolutional layers in the `dtype` of autocast.

    For a frozen network: half the memory, and autocast has nothing to round at each use; results
    and gradients keep their bits. Tables and buffers keep theirs. None changes nothing.
    """
    if dtype is None:
        return
    products = {f"{name}.{part}" for name, layer in network.named_modules()
                if isinstance(layer, (nn.Linear, nn.Conv2d)) for part in ("weight", "bias")}
    network.load_state_dict({name: tensor.to(dtype) if name in products else tensor
                             for name, tensor in network.state_dict().items()}, assign=True)


def refusal(error, less: str = TRAIN_IN_LESS) -> str | None:
    """What the device refused, in a line: memory, or an operation after `make_deterministic`.

    None if the error is another one: a fault of this code, whose traceback is wanted. less: advice
    to who has too little memory.
    """
    sentences = " ".join(str(error).split()).split(". ")  # torch goes on with advice of its own
    if isinstance(error, MemoryError) or any(
            words in str(error).lower() for words in ("out of memory", "can't allocate memory")):
        return f"{'. '.join(sentences[:2]) or 'out of memory'}; free some, or {less}"
    if "deterministic" in str(error).lower():
        return f"{sentences[0]}; start anew without --deterministic"
    return None


def make_deterministic() -> None:
    """From now on an operation that two runs may round apart raises, in the whole process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at cuBLAS's first product
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
