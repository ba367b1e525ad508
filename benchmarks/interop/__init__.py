"""SAEs handed over between this package and others, judged by the others themselves."""
