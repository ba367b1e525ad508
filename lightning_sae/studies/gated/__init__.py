"""The study of gating: do gated SAEs need fewer latents, and do they shrink less?"""
