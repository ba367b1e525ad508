"""The study of broken latents on a language model: does the orthogonality loss help there?"""
