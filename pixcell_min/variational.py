"""The variational bound that trains a learned variance, an option beside the loss on epsilon.

    L = Σ_t L_t ≈ T·L_t at a drawn t,
    L_t = KL( q(x_{t−1} | x_t, x0) ‖ N(μ_θ, Σ_θ) ),  Σ_θ = exp(f·log β + (1−f)·log β̃),  f = (v+1)/2
Nichol & Dhariwal 2021, eq. 4 and 15; v is the second half of the network's output channels.
"""

import math

import torch


def variational_bound(schedule, output, latents, noisy, timesteps):
    """Bits per latent number, (B,) float32, of output (B, 2C, H, W) at VP latents `noisy`.

    T times the term of each sample's own t: its mean over uniform t is the whole bound, which the
    paper weighs by 0.001 (its prior at t = T has nothing to learn and is left out).
    The mean takes no gradient from it (their section 3.1): only the variance half learns.
    """
    # Differs from Nichol & Dhariwal: at t = 0 the same Gaussian term, with β̃ of t = 1, where they
    # take the likelihood of 8-bit pixels, which latents are not.
    channels, betas, bars = latents.shape[1], schedule.betas, schedule.alphas_cumprod
    before = torch.cat([torch.ones(1), bars[:-1]])
    posterior = betas * (1 - before) / (1 - bars)                            # β̃, (T,)
    posterior[0] = posterior[1]

    def at(table):
        return table.to(output.device)[timesteps].view(-1, 1, 1, 1)

    x0 = schedule.predict_x0(output[:, :channels].detach(), noisy, timesteps)
    # The x_t part of both means is the same.
    apart = at(before.sqrt() * betas / (1 - bars)) * (latents - x0)          # (B, C, H, W)
    low, high = at(posterior.log()), at(betas.log())                         # (B, 1, 1, 1)
    log_variance = low + (output[:, channels:].float() + 1) / 2 * (high - low)
    divergence = 0.5 * (log_variance - low + (low - log_variance).exp()
                        + apart.square() * (-log_variance).exp() - 1)
    return schedule.num_train_timesteps * divergence.mean(dim=(1, 2, 3)) / math.log(2)
