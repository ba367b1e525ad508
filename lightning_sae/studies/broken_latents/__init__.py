"""The study of broken latents: when does a latent mix features?"""
