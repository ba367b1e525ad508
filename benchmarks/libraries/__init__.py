"""How each library trains an SAE, one file per library, behind the interface in `base`."""
