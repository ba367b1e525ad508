"""The study of penalties: what do other penalties than L1 gain?"""
