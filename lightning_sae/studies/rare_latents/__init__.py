"""The study of rare latents: how many there are, and what gives them a common direction."""
