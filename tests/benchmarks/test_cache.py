from typing import Any

from benchmarks.cache import main


def test_every_source_is_read_and_trained_on(capsys: Any) -> None:
    sizes = {"rows": 400, "width": 8, "batch_size": 32, "d_sae": 64, "shards": 3}
    lengths = {"batches": 4, "steps": 3, "turns": 1}
    main([f"--{name}={value}" for name, value in {**sizes, **lengths}.items()])
    names = ("rows in memory", "files, shuffled singly", "files, in pieces of 16 rows")
    lines = capsys.readouterr().err.splitlines()
    for name in names:
        assert sum(line.startswith(name) and line.count("%") == 2 for line in lines) == 1
