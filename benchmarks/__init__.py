"""lightning-sae measured beside SAELens, dictionary_learning and sparsify; see README.md."""
