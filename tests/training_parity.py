"""The same training twice: diffusers' PixArt + peft + accelerate, and ours; float32.

Both get the same weights, batches (latents, noise, timesteps, dropped conditions), rates and
clipping. The other side is written as its users write it: `accumulate`, `backward`,
`clip_grad_norm_`, DDPMScheduler.add_noise, mean squared error on epsilon, diffusers' cosine.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from peft import LoraConfig, get_peft_model
from references import BETAS, adapter_by_hand, copy_lora, peft_parameter, randn, transformer_twins

from pixcell_min.adapter import EmbeddingAdapter
from pixcell_min.batches import draw_micro_batches
from pixcell_min.features import Features
from pixcell_min.lora import inject_lora, lora_layers, lora_parameters
from pixcell_min.schedulers import NoiseSchedule
from pixcell_min.training import (build_optimizer, build_scaler, diffusion_loss, optimizer_step,
                                  rate_factor)

STEPS, ACCUMULATION, BATCH, TILES = 50, 4, 2, 8
RANK, ALPHA, WEIGHT_DECAY, MAX_GRAD_NORM, DROPPED = 4, 8, 0.01, 1.0, 0.2


def both(rate, adapter_rate):
    """→ ((losses, LoRA, adapter) of ours, the same of theirs): (STEPS,), {name: tensor} twice."""
    transformer, pixart = transformer_twins(1, 8, 0.5)
    inject_lora(transformer, RANK, ALPHA, exclude=transformer.inert_layers(),
                generator=torch.Generator().manual_seed(1))
    adapter = EmbeddingAdapter(20, generator=torch.Generator().manual_seed(2))
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(lora_layers(transformer)))
    theirs = get_peft_model(pixart, config)
    copy_lora(transformer, theirs)
    features = Features(randn(TILES, 16, 8, 8, seed=3), 0.1 * torch.ones(TILES, 16, 8, 8),
                        3 * randn(TILES, 1, 20, seed=4), list(range(TILES)))
    batches = [list(draw_micro_batches(
        features, torch.arange(TILES), NoiseSchedule.linear(), BATCH, ACCUMULATION, DROPPED, None,
        0, "cpu", 0, 1, step)) for step in range(STEPS)]
    start = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    return (train_ours(transformer, adapter, batches, rate, adapter_rate),
            train_theirs(theirs, start, transformer.uncond_embedding, batches, rate, adapter_rate,
                         list(lora_layers(transformer))))


def train_ours(transformer, adapter, batches, rate, adapter_rate):
    """The functions that train.py calls."""
    transformer.train(), adapter.train()
    optimizer = build_optimizer(lora_parameters(transformer), adapter.parameters(), rate,
                                adapter_rate, WEIGHT_DECAY)
    scaler, schedule, losses = build_scaler("cpu", None), NoiseSchedule.linear(), []
    for step, micro_batches in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate_factor(step, 0, STEPS, "cosine")
        report = optimizer_step(
            lambda batch: diffusion_loss(transformer, adapter, schedule, batch), micro_batches,
            BATCH * ACCUMULATION, optimizer, scaler, MAX_GRAD_NORM)
        losses.append(report.loss)
    lora = {f"{name}.{part}": getattr(layer, part).detach()
            for name, layer in lora_layers(transformer).items() for part in ("lora_A", "lora_B")}
    return torch.tensor(losses, dtype=torch.float64), lora, adapter.state_dict()


def train_theirs(model, adapter, uncond_embedding, batches, rate, adapter_rate, names):
    """adapter: the four tensors at the start; names: of the layers with LoRA."""
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION, cpu=True)
    adapter = torch.nn.ParameterDict({name.replace(".", "_"): tensor
                                      for name, tensor in deepcopy(adapter).items()})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained, "lr": rate}, {
        "params": list(adapter.parameters()), "lr": adapter_rate}], weight_decay=WEIGHT_DECAY)
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=STEPS)
    model, adapter, optimizer, rates = accelerator.prepare(model, adapter, optimizer, rates)
    noise_scheduler, losses = DDPMScheduler(**BETAS), []
    model.train()
    for micro_batches in batches:
        total = 0.0
        for batch in micro_batches:
            with accelerator.accumulate(model, adapter):
                noisy = noise_scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
                weights = {name.replace("_", ".", 1): p for name, p in adapter.items()}
                tokens = torch.where(batch.dropped[:, None, None], uncond_embedding,
                                     adapter_by_hand(batch.embeddings, weights))
                predicted = model(noisy, encoder_hidden_states=tokens, timestep=batch.timesteps,
                                  ).sample.chunk(2, dim=1)[0]
                loss = F.mse_loss(predicted, batch.noise)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_([*trained, *adapter.parameters()], MAX_GRAD_NORM)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
                total += loss.item() / ACCUMULATION
        losses.append(total)
    parameters = dict(accelerator.unwrap_model(model).named_parameters())
    lora = {f"{name}.{part}": peft_parameter(parameters, name, part).detach()
            for name in names for part in ("lora_A", "lora_B")}
    return (torch.tensor(losses, dtype=torch.float64), lora,
            {name.replace("_", ".", 1): p.detach() for name, p in adapter.items()})
