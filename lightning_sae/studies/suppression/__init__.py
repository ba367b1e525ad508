"""The study of feature suppression: how much do latents shrink, and does fine-tuning help?"""
