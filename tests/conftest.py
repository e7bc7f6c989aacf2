"""Shared fixtures: a tiny random base in the released layout, tiles, and where the project lies."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # train.py and sample.py are scripts beside the package

from pixcell_min.checkpoint import read_tensors, save_tensors  # noqa: E402
from pixcell_min.transformer import PixCellTransformer, TransformerConfig  # noqa: E402
from pixcell_min.uni import TileEncoder  # noqa: E402
from pixcell_min.vae import AutoencoderKL, VAEConfig  # noqa: E402

SHARED = ROOT.parent / "shared"  # real tiles; the suite passes without them
TINY_TRANSFORMER = {
    "_class_name": "PixCellTransformer2DModel", "activation_fn": "gelu-approximate",
    "attention_bias": True, "attention_head_dim": 8, "attention_type": "default",
    "caption_channels": 16, "caption_num_tokens": 1, "dropout": 0.0, "in_channels": 16,
    "interpolation_scale": 0.5, "norm_elementwise_affine": False, "norm_eps": 1e-6,
    "norm_type": "ada_norm_single", "num_attention_heads": 4, "num_layers": 2, "out_channels": 32,
    "patch_size": 2, "sample_size": 8, "use_additional_conditions": False,
}
TINY_VAE = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [4, 4, 8, 8],
    "in_channels": 3, "latent_channels": 16, "layers_per_block": 1,
    "mid_block_add_attention": True, "norm_num_groups": 2, "out_channels": 3,
    "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
    "use_post_quant_conv": False,
}
TINY_ENCODER = {"img_size": 28, "patch_size": 14, "depth": 1, "num_heads": 2, "embed_dim": 16,
                "init_values": 1.0, "mlp_ratio": 4.0, "reg_tokens": 2}
SCHEDULER = {"_class_name": "DPMSolverMultistepScheduler", "beta_end": 0.02,
             "beta_schedule": "linear", "beta_start": 0.0001, "num_train_timesteps": 1000,
             "prediction_type": "epsilon"}

torch.set_num_threads(
    min(torch.get_num_threads(), int(os.environ.get("PIXCELL_TEST_THREADS", "2"))))


def pytest_configure(config):
    """What a test expects, and `auto`, is a CPU's, on any machine; only `-m gpu` shows a GPU."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def write_base(folder: Path, seed: int = 0, **changes) -> Path:
    """A 64-px base of random weights, a few thousand parameters, laid out as a PixCell snapshot.

    changes: of the transformer's config.
    """
    torch.manual_seed(seed)
    config = {**TINY_TRANSFORMER, **changes}
    transformer = PixCellTransformer(TransformerConfig.from_dict(config))
    vae = AutoencoderKL(VAEConfig.from_dict(TINY_VAE))
    encoder = TileEncoder(TINY_ENCODER)
    parts = {
        "transformer": (config, transformer, "diffusion_pytorch_model.safetensors"),
        "vae": (TINY_VAE, vae, "diffusion_pytorch_model.safetensors"),
        "uni": ({"architecture": "vit_giant_patch14_224", "model_args": TINY_ENCODER}, encoder.vit,
                "model.safetensors"),
    }
    for name, (config, module, weights) in parts.items():
        save_tensors(folder / name / weights, module.state_dict())
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """Folder of the tiny base, shared by all tests: do not write to it."""
    return write_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def compared_base(tmp_path_factory) -> Path:
    """The tiny networks of benchmarks/compare.py, as it writes them, and tiles."""
    import compare  # of benchmarks/, which brings diffusers: whoever asks for it has a path to it
    folder = tmp_path_factory.mktemp("compare") / "tiny"
    compare.write_networks(folder, "tiny")
    compare.write_tiles(folder / "tiles", 64)
    return folder


def case_of(base, **settings) -> dict:
    """A case of benchmarks/compare.py on `compared_base`, float32 on one thread."""
    return {"precision": "no", "device": "cpu", "threads": 1, "base": str(base),
            "tiles": str(base / "tiles"), "cache": str(base / "cache"), **settings}


@pytest.fixture
def own_base(tiny_base, tmp_path) -> Path:
    """A copy of the tiny base to take things away from, in a folder of bases."""
    return shutil.copytree(tiny_base, tmp_path / "bases" / "own")


@pytest.fixture
def nothing_downloaded(tmp_path, monkeypatch):
    """What this machine has of real weights is no part of a test: neither weights/ nor a cache."""
    monkeypatch.setattr("pixcell_min.base.REPOSITORY", tmp_path / "no-repository")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-cache"))


@pytest.fixture
def tiles(tmp_path) -> Path:
    """Folder of two classes with four 64-px PNG tiles each."""
    generator = np.random.default_rng(0)
    for label in ("STR", "TUM"):
        (tmp_path / "tiles" / label).mkdir(parents=True)
        for i in range(4):
            pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "tiles" / label / f"{label}_{i}.png")
    return tmp_path / "tiles"


@pytest.fixture
def arguments(tiny_base, tiles, tmp_path):
    """Flags of a run of a few float32 steps."""
    return ["--rank", "2", "--alpha", "4", "--base", str(tiny_base), "--data", str(tiles),
            "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run"),
            "--max-train-steps", "4", "--batch-size", "2", "--gradient-accumulation-steps", "2",
            "--mixed-precision", "no", "--sample-count", "0", "--validation-fraction", "0.25",
            "--warmup-steps", "1", "--learning-rate", "0.01"]


@pytest.fixture
def reset_determinism():
    """The switch is the process's."""
    yield
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def metrics(run):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    """The tensors of a run's two files to share."""
    return {name: read_tensors(run / name)[0]
            for name in ("lora_weights.safetensors", "adapter.safetensors")}


def assert_same_weights(first, second):
    """Two results of `weights` agree bit for bit."""
    for name in first:
        assert first[name].keys() == second[name].keys()
        for key in first[name]:
            assert torch.equal(first[name][key], second[name][key]), key
